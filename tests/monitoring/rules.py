"""The rules of `docker/prometheus/imattr.rules.yml`: read, and played faster.

Real scenarios cannot last for hours, so every time in the rules is divided by one factor: durations, and numbers of 60 or
more in expressions, which are times in seconds by a rule of that file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RULES = Path(__file__).parent.parent.parent / "docker" / "prometheus" / "imattr.rules.yml"

#: A minute becomes 5 s, which is a bound of the histogram of delays, as 60 s is.
FACTOR = 12

_UNITS = {"s": 1, "m": 60, "h": 3600}
#: A duration, or a number that belongs to no name.
_TIMES = re.compile(r"\b(\d+)([smh])\b|(?<![\w.])(\d+)(?![\w.])")
#: A selector: a metric or a recorded series, with its labels.
_SELECTOR = re.compile(r"\b((?:sdkappid:)?imattr_\w+(?::\w+)?)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"(\w+)\s*(=~|!~|!=|=)\s*(?:\"([^\"]*)\"|'([^']*)')")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; a recording rule has no severity. `wait` is how long it must hold, as Prometheus writes it."""

    name: str
    expr: str
    wait: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_alert(self) -> bool:
        return bool(self.labels)

    @property
    def severity(self) -> str:
        return self.labels.get("severity", "")


def read(path: Path = RULES) -> dict[str, list[Rule]]:
    """The rules of each group."""
    document, _ = _parse(list(_lines(path.read_text(encoding="utf-8"))), 0, 0)
    return {group["name"]: [_rule(found) for found in group["rules"]] for group in document["groups"]}


def alerts(path: Path = RULES) -> list[Rule]:
    return [rule for rules in read(path).values() for rule in rules if rule.is_alert]


def _rule(found: Mapping[str, Any]) -> Rule:
    return Rule(
        found.get("alert") or found["record"],
        found["expr"].strip(),
        found.get("for", ""),
        found.get("labels", {}),
        found.get("annotations", {}),
    )


def selectors(expr: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each metric or recorded series of an expression, with the values its labels are held to, as patterns."""
    for name, labels in _SELECTOR.findall(expr):
        yield name, {label: one or other for label, _, one, other in _MATCHER.findall(labels)}


def faster(expr: str, factor: int = FACTOR) -> str:
    """The same expression for times that pass `factor` times as fast."""

    def divided(found: re.Match[str]) -> str:
        count, unit, number = found.groups()
        if number is not None:
            return number if int(number) < 60 else f"{int(number) / factor:g}"
        milliseconds = int(count) * _UNITS[unit] * 1000 / factor
        return f"{milliseconds:.0f}ms"

    return _TIMES.sub(divided, expr)


def faster_rules(factor: int = FACTOR, path: Path = RULES) -> str:
    """All rules, `factor` times as fast, for Prometheus; as JSON, which is YAML, too."""
    groups = [
        {"name": name, "rules": [_as_document(rule, factor) for rule in rules]}
        for name, rules in read(path).items()
    ]
    return json.dumps({"groups": groups}, indent=1)


def _as_document(rule: Rule, factor: int) -> dict[str, Any]:
    expr = faster(rule.expr, factor)
    if not rule.is_alert:
        return {"record": rule.name, "expr": expr}
    wait = {"for": faster(rule.wait, factor)} if rule.wait else {}
    return {
        "alert": rule.name,
        "expr": expr,
        **wait,
        "labels": dict(rule.labels),
        "annotations": dict(rule.annotations),
    }


# As much YAML as that file has: mappings, lists of mappings, and texts, plain, quoted or in blocks.

_Line = tuple[int, str]


def _lines(text: str) -> Iterator[_Line]:
    """Indentation and content of each line that says something."""
    for line in text.splitlines():
        content = line.strip()
        if content and not content.startswith("#"):
            yield len(line) - len(line.lstrip()), content


def _parse(lines: list[_Line], at: int, indent: int) -> tuple[Any, int]:
    """The value that begins at a line, and where it ends."""
    found: Any = None
    while at < len(lines) and lines[at][0] >= indent:
        _, content = lines[at]
        if content.startswith("- "):
            found = found if found is not None else []
            lines[at] = (lines[at][0] + 2, content[2:])
            item, at = _parse(lines, at, lines[at][0])
            found.append(item)
            continue
        name, _, value = content.partition(":")
        found = found if found is not None else {}
        found[name], at = _value(lines, at, value.strip())
    return found, at


def _value(lines: list[_Line], at: int, value: str) -> tuple[Any, int]:
    indent = lines[at][0]
    if value in ("|", ">-"):
        end = at + 1
        while end < len(lines) and lines[end][0] > indent:
            end += 1
        between = "\n" if value == "|" else " "
        return between.join(content for _, content in lines[at + 1 : end]), end
    if value:
        return (json.loads(value) if value.startswith('"') else value), at + 1
    return _parse(lines, at + 1, indent + 1)
