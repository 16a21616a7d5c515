"""Makes pages from templates. Everything that a template shows is escaped, and made harmless: most of it is foreign text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from worker.operate.status import span
from worker.operate.words import counted, details, plain
from worker.version import VERSION

#: The files that are served as they are, with their types.
STATIC = {
    "style.css": "text/css; charset=utf-8",
    "script.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def static(name: str) -> bytes:
    """One of the files that are served as they are."""
    return resources.files(__package__).joinpath("static", name).read_bytes()


#: Changes with the files, so that browsers may cache them.
MARK = hashlib.sha256(b"".join(static(name) for name in STATIC)).hexdigest()[:12]


def _shown(value: Any) -> Any:
    if value is None:
        return ""
    # The output of a macro or a chart is escaped already.
    return value if isinstance(value, Markup) else plain(value)


def _exact(value: Any) -> Markup:
    """For a form's hidden fields: unchanged, since it comes back."""
    return escape("" if value is None else str(value))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _when(moment: Any) -> Markup:
    """A time, as ISO 8601 or in seconds since 1970."""
    if moment is None or moment == "":
        return Markup("–")
    try:
        at = (
            datetime.fromisoformat(moment) if isinstance(moment, str) else datetime.fromtimestamp(moment, UTC)
        )
    except (ValueError, OverflowError, OSError):
        return escape(plain(moment))
    return Markup('<time datetime="{}">{} <abbr title="Coordinated Universal Time">UTC</abbr></time>').format(
        at.isoformat(timespec="seconds"), f"{at:%Y-%m-%d %H:%M:%S}"
    )


def _query(given: Mapping[str, Any], **changed: Any) -> str:
    """The query of a link: the given fields, with some changed; empty ones are left out."""
    pairs = {name: value for name, value in {**given, **changed}.items() if value not in (None, "")}
    # A lone surrogate cannot be encoded.
    encoded = urlencode(pairs, errors="replace")
    return f"?{encoded}" if encoded else ""


def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("worker.console"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(exact=_exact, number=_number, when=_when, span=span, happened=details)
    found.globals.update(query=_query, counted=counted, mark=MARK, version=VERSION)
    return found


ENVIRONMENT = _environment()


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page, or a part of one."""
    return ENVIRONMENT.get_template(template).render(context)
