"""Settings as text that people may see, and where workers disagree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from worker.config import Secret, Settings
from worker.state.fleet import Worker

#: Settings that concern one process alone, so that workers need not agree on them.
OWN = {"health_port", "log_level", "log_format"}
HIDDEN = "set, and hidden"


def shown(settings: Settings) -> dict[str, str]:
    """Every setting by its name, as text: for URLs only the place, for secrets only that there is one."""
    found = {
        field.name: _text(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
        if not field.name.startswith("console_")
    }
    found["redis_url"] = str(settings.redis) if settings.redis_url else ""
    found["broker_url"] = _broker(settings)
    found["api_url"] = _place(settings.api_url)
    return found


def changed(settings: Settings) -> dict[str, str]:
    """Those that are not the defaults."""
    defaults = shown(Settings())
    return {name: value for name, value in shown(settings).items() if value != defaults[name]}


def _text(value: object) -> str:
    if isinstance(value, Secret):
        return HIDDEN if value else ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _broker(settings: Settings) -> str:
    if not settings.broker_url:
        return ""
    broker = settings.broker
    return _place(settings.broker_url.reveal()) if broker is None else str(broker)


def _place(url: str) -> str:
    """A URL without user, password, or anything after the host."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return HIDDEN
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if url else ""


@dataclass(frozen=True, slots=True)
class InForce:
    """A setting: value -> the workers that have it. The value is None for those that do not report it."""

    name: str
    doc: str
    default: str
    workers: Mapping[str | None, Sequence[str]]

    @property
    def disagree(self) -> bool:
        """Whether workers that must agree have different values."""
        return self.name not in OWN and len(self.workers.keys() - {None}) > 1


def in_force(workers: Iterable[Worker]) -> list[InForce]:
    """The values of each setting among live workers. Defaults are those of this version."""
    alive = list(workers)
    defaults = shown(Settings())
    docs = {field.name: str(field.metadata["doc"]) for field in dataclasses.fields(Settings)}
    found = []
    for name, default in defaults.items():
        by_value: dict[str | None, list[str]] = {}
        for worker in alive:
            value = None if worker.settings is None else worker.settings.get(name, default)
            by_value.setdefault(value, []).append(worker.name)
        found.append(InForce(name, docs[name], default, by_value))
    return found
