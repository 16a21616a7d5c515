"""The dashboard, and the pages on monitoring, are what the catalogue and the last runs say."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests import docs
from tests.monitoring import dashboard, page, rules
from tests.monitoring.promtool import needs_promtool, promtool
from tests.monitoring.test_alerts import _metric
from worker.operate.metric_catalog import FLEET, WORKER


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(dashboard.DASHBOARD.read_text())["panels"]
    return found


def test_the_file_is_what_the_script_makes() -> None:
    assert dashboard.DASHBOARD.read_text() == dashboard.text(), "make docs"


@needs_promtool
def test_every_query_can_be_parsed(tmp_path: Path) -> None:
    queries = [
        dashboard.filled_in(target["expr"], "1400000000", "1m")
        for panel in panels()
        for target in panel.get("targets", [])
    ]
    named = [{"record": f"panel_{number}", "expr": expr} for number, expr in enumerate(queries)]
    path = tmp_path / "queries.json"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": named}]}))

    assert len(queries) > 40
    assert not promtool("check", "rules", str(path))


@pytest.mark.parametrize("expr", dashboard.expressions())
def test_a_query_uses_what_the_catalogue_has(expr: str) -> None:
    recorded = {rule.name for group in rules.read().values() for rule in group if not rule.is_alert}
    found = list(rules.selectors(expr))
    for name, held_to in found:
        assert "sdkappid" in held_to
        if name.startswith("sdkappid:"):
            assert name in recorded
            continue
        metric = _metric(name)
        allowed = dict(metric.labels)
        assert (metric.kind == "histogram") == (name != metric.name)
        for label, pattern in held_to.items():
            values = pattern.split("|") if label != "sdkappid" else []
            assert set(values) <= set(allowed.get(label, ())), (name, label, pattern)
    by = {label for labels in re.findall(r"\bby \(([^)]*)\)", expr) for label in labels.split(", ")}
    known = {label for name, _ in found if ":" not in name for label in _metric(name).label_names}
    assert found
    assert by <= known | {"sdkappid", "le"}


def test_the_names_of_series_have_labels_that_are_there() -> None:
    for row in dashboard.ROWS:
        for panel in row.panels:
            for query in panel.queries:
                for label in re.findall(r"{{(\w+)}}", query.name):
                    assert re.search(rf"by \([^)]*\b{label}\b", query.expr), query


def test_panels_do_not_overlap_and_fill_their_rows() -> None:
    places = [panel["gridPos"] for panel in panels()]
    cells = [
        {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        for at in places
    ]

    assert not any(one & other for one, other in combinations(cells, 2))
    assert {x for x, _ in set().union(*cells)} == set(range(24))
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_the_runbook_names_panels_that_are_there() -> None:
    titles = [panel["title"].lower() for panel in panels()]
    named = re.findall(r"(?<![*\w])\*([^*\s][^*\n]*)\*(?!\*)", (docs.OPERATE / "runbook.md").read_text())

    assert len(named) > 15
    for name in named:
        assert any(title.startswith(name.lower()) for title in titles), name


def test_the_page_on_metrics_has_all_of_them() -> None:
    text = docs.metrics()

    assert docs.METRICS.read_text() == text, "make docs"
    for metric in (*FLEET, *WORKER):
        assert f"| `{metric.name}` | {metric.kind} |" in text


def test_the_page_on_monitoring_is_what_the_last_runs_say() -> None:
    assert page.PAGE.read_text() == page.monitoring(), "make docs"


def test_the_page_on_monitoring_has_every_alert_with_its_severity() -> None:
    found = re.findall(
        r"^\| \[(Imattr\w+)\]\(runbook\.md#(\w+)\) \| ([a-z, ]+) \|", page.PAGE.read_text(), re.MULTILINE
    )
    severities: dict[str, list[str]] = {}
    for rule in rules.alerts():
        severities.setdefault(rule.name, []).append(rule.severity)

    assert found == [(name, name.lower(), ", ".join(severity)) for name, severity in severities.items()]  # fmt: skip
