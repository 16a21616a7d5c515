"""The Grafana dashboard, `docker/grafana/imattr.json`: made here, from the catalogue's names. `make docs` writes it.

Rows are in the order in which an on-call engineer asks: is it delivering, what comes in, what goes wrong, is there enough of
everything, who runs. Nothing is by instance: the number of pods does not matter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from worker.operate import metric_catalog as catalog
from worker.operate.metric_catalog import Metric

DASHBOARD = Path(__file__).parent.parent.parent / "docker" / "grafana" / "imattr.json"

#: Which app; and the window of rates, which Grafana fits to the zoom and to the interval of scrapes.
APP, WINDOW = "$sdkappid", "$__rate_interval"

Shape = Literal["stat", "timeseries", "state-timeline"]

GREEN, YELLOW, RED, BLUE, GREY = "green", "yellow", "red", "blue", "#8c959f"


@dataclass(frozen=True, slots=True)
class Query:
    """One expression, and the name of its series, which may have labels in braces."""

    expr: str
    name: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `width` of 24 columns; `colours` by the name of a series; `steps` = colours of a stat, each from a value on."""

    title: str
    about: str
    queries: Sequence[Query]
    shape: Shape = "timeseries"
    unit: str = "short"
    width: int = 8
    stacked: bool = False
    colours: dict[str, str] = field(default_factory=dict)
    steps: Sequence[tuple[float | None, str]] = ((None, GREEN),)
    #: Words for a stat's values.
    words: dict[float, tuple[str, str]] = field(default_factory=dict)
    least: float | None = 0.0
    most: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: Sequence[Panel]


# Expressions. The exporter's figures are the fleet's, so two exporters say the same: max. The workers' are added up.


def fleet(metric: Metric, *by: str, **held_to: str) -> str:
    return f"max by ({', '.join(('sdkappid', *by))}) ({_selector(metric.name, held_to)})"


def fleet_rate(metric: Metric, *by: str, **held_to: str) -> str:
    labels = ", ".join(("sdkappid", *by))
    return f"max by ({labels}) (rate({_selector(metric.name, held_to)}[{WINDOW}]))"


def rate(metric: Metric, *by: str, part: str = "", **held_to: str) -> str:
    """Of all workers together, a second."""
    labels = ", ".join(("sdkappid", *by))
    return f"sum by ({labels}) (rate({_selector(metric.name + part, held_to)}[{WINDOW}]))"


def quantile(part: float, metric: Metric, **held_to: str) -> str:
    return f"histogram_quantile({part}, {rate(metric, 'le', part='_bucket', **held_to)})"


def _selector(name: str, held_to: dict[str, str]) -> str:
    labels = [f'sdkappid="{APP}"', *(f'{label}=~"{value}"' for label, value in held_to.items())]
    return f"{name}{{{', '.join(labels)}}}"


def _recorded(name: str) -> str:
    return f'sdkappid:{name}{{sdkappid="{APP}"}}'


#: The state of the line as one number, worst last.
LINE = " + ".join(
    f"{number} * {fleet(catalog.LINE, state=state)}"
    for number, state in enumerate(("probing", "paused", "stopped"), 1)
)
LINE_WORDS = {0.0: ("open", GREEN), 1.0: ("probing", YELLOW), 2.0: ("paused", YELLOW), 3.0: ("stopped", RED)}

ROWS = (
    Row(
        "Is it delivering?",
        (
            Panel("Line", "Whether anything is sent. imattr status says why not.", [Query(LINE, "line")],
                  "stat", width=4, words=LINE_WORDS),
            Panel("Pending", "Users with something undelivered, not in flight.",
                  [Query(f"sum by (sdkappid) ({fleet(catalog.USERS, 'state', state='live|backfill|delayed|waiting')})", "users")],
                  "stat", width=4, steps=((None, BLUE),)),
            Panel("Oldest live update", "How long the first in the live lane has waited.",
                  [Query(fleet(catalog.OLDEST_PENDING, lane="live"), "age")],
                  "stat", "s", 4, steps=((None, GREEN), (10, YELLOW), (60, RED))),
            Panel("All delivered in", "At the rate of the last minute.", [Query(fleet(catalog.DRAIN), "time")],
                  "stat", "s", 4, steps=((None, GREEN), (600, YELLOW), (3600, RED))),
            Panel("Late, last hour", "Live updates that took longer than a minute, without excused times. The objective is 1 %.",
                  [Query(_recorded("imattr_live_late:ratio1h"), "late")],
                  "stat", "percentunit", 4, steps=((None, GREEN), (0.01, YELLOW), (0.144, RED))),
            Panel("Slots used", "At 100 %, the quota is what limits.", [Query(_recorded("imattr_slots_used:ratio"), "used")],
                  "stat", "percentunit", 4, steps=((None, GREEN), (0.9, YELLOW))),
            Panel("Line", "What the line did, and why it was stopped.", [
                Query(f"{fleet(catalog.LINE, 'state')} == 1", "{{state}}"),
                Query(f"{fleet(catalog.LINE_STOPPED, 'kind')} == 1", "by {{kind}}"),
            ], "state-timeline", width=24, colours={
                "open": GREEN, "probing": YELLOW, "paused": YELLOW, "stopped": RED,
                "by error": RED, "by outage": RED, "by data": RED,
            }),
            Panel("Calls a second", "Settled calls, against what is granted and what is allowed.", [
                Query(fleet_rate(catalog.CALLS_SETTLED), "calls"),
                Query(fleet(catalog.LIMIT), "limit"),
                Query(fleet(catalog.QUOTA), "quota"),
            ], colours={"calls": BLUE, "limit": YELLOW, "quota": GREY}),
            Panel("Delivery delay, live", "From a user's first undelivered update to the API's answer.", [
                Query(quantile(0.5, catalog.DELIVERY_DELAY, lane="live"), "median"),
                Query(quantile(0.95, catalog.DELIVERY_DELAY, lane="live"), "95 %"),
                Query(quantile(0.99, catalog.DELIVERY_DELAY, lane="live"), "99 %"),
            ], unit="s", colours={"median": GREEN, "95 %": YELLOW, "99 %": RED}),
            Panel("Backlog", "Users with something undelivered, by where they are.",
                  [Query(fleet(catalog.USERS, "state"), "{{state}}")], stacked=True),
        ),
    ),
    Row(
        "What comes in?",
        (
            Panel("Updates accepted a second", "By the way they came.",
                  [Query(fleet_rate(catalog.UPDATES_ACCEPTED, "way"), "{{way}}")], stacked=True),
            Panel("What became of updates, a second", "Coalesced, unchanged and stale ones cost no call.",
                  [Query(fleet_rate(catalog.UPDATES_ENDED, "fate"), "{{fate}}")], stacked=True),
            Panel("Not taken yet", "In Celery's queues and in the stream.", [
                Query(fleet(catalog.QUEUE, "queue"), "queue {{queue}}"),
                Query(fleet(catalog.STREAM), "stream"),
                Query(fleet(catalog.SCHEDULED), "scheduled"),
                Query(fleet(catalog.IMPORTS), "unfinished imports"),
            ]),
        ),
    ),
    Row(
        "What goes wrong?",
        (
            Panel("Calls by outcome, a second", "The verdict on each call of the API.",
                  [Query(rate(catalog.CALLS, "outcome"), "{{outcome}}")], stacked=True, colours={"ok": GREEN}),
            Panel("Errors by code, a second", "docs/operate/error-codes.md says what each means.",
                  [Query(f"{rate(catalog.CALL_ERRORS, 'code')} > 0", "{{code}}")]),
            Panel("Batches by outcome, a second", "Everything but `delivered` costs time.",
                  [Query(rate(catalog.BATCHES, "outcome"), "{{outcome}}")], stacked=True, colours={"delivered": GREEN}),
            Panel("Dead letters by code, a second", "Users given up; imattr dead list.",
                  [Query(f"{rate(catalog.DEAD_LETTERED, 'code')} > 0", "{{code}}")], width=6),
            Panel("Kept for a person", "imattr dead, refused and quarantine list them.", [
                Query(fleet(catalog.DEAD_LETTERS), "dead letters"),
                Query(fleet(catalog.REFUSED), "refused"),
                Query(fleet(catalog.QUARANTINED), "quarantined"),
            ], width=6),
            Panel("Read back, users a second", "What audits find, by verdict. `lost` may be the work of another program, too.",
                  [Query(fleet_rate(catalog.AUDIT_USERS, "verdict"), "{{verdict}}")], width=6,
                  colours={"as_delivered": GREEN, "lost": RED, "changed": YELLOW, "gone": YELLOW, "skipped": GREY}),
            Panel("Must be 0", "Updates that the ledger cannot account for, or that are gone from Redis; leases that ran out.", [
                Query(fleet(catalog.LEDGER_IMBALANCE), "ledger imbalance"),
                Query(fleet(catalog.UPDATES_LOST, "how"), "lost, {{how}}"),
                Query(rate(catalog.LEASES_RECLAIMED), "leases reclaimed a second"),
                Query(rate(catalog.LEASES_LOST), "leases lost a second"),
            ], width=6, colours={"ledger imbalance": RED}, least=None),
        ),
    ),
    Row(
        "Is there enough of everything?",
        (
            Panel("Threads", "Twice what the rate needs, against what there is. Fewer than half of what is wanted is too few.", [
                Query(fleet(catalog.THREADS_WANTED), "wanted"),
                Query(f"sum by (sdkappid) ({fleet(catalog.THREADS, 'state')})", "there are"),
                Query(fleet(catalog.THREADS, state="busy"), "busy"),
            ], colours={"wanted": YELLOW, "there are": GREEN, "busy": BLUE}),
            Panel("Call duration", "From a call's slot to the end of its answer. Twice as long takes twice the threads.", [
                Query(quantile(0.5, catalog.CALL_DURATION, operation="set|remove"), "median"),
                Query(quantile(0.99, catalog.CALL_DURATION, operation="set|remove"), "99 %"),
            ], unit="s", colours={"median": GREEN, "99 %": RED}),
            Panel("Users per batch", "Up to 100. Full ones under load, small ones otherwise.",
                  [Query(f"{rate(catalog.BATCH_USERS, part='_sum')} / {rate(catalog.BATCH_USERS, part='_count')}", "mean")],
                  colours={"mean": BLUE}),
            Panel("Permits, a second", "Many late: too little processor. Many none: too many threads.",
                  [Query(rate(catalog.PERMITS, "result"), "{{result}}")], stacked=True, colours={"used": GREEN}),
            Panel("Waiting for a permit", "From asking to the slot.", [
                Query(quantile(0.5, catalog.PERMIT_WAIT), "median"),
                Query(quantile(0.99, catalog.PERMIT_WAIT), "99 %"),
            ], unit="s", colours={"median": GREEN, "99 %": RED}),
            Panel("Redis memory", "At 90 % of the limit, new users are refused.", [
                Query(fleet(catalog.REDIS_USED), "used"),
                Query(f"{fleet(catalog.REDIS_MAX)} > 0", "limit"),
            ], unit="bytes", colours={"used": BLUE, "limit": GREY}),
        ),
    ),
    Row(
        "Who runs?",
        (
            Panel("Workers", "Alive in the last 15 seconds; those that Prometheus scrapes; and the versions of whatever it scrapes.", [
                Query(fleet(catalog.WORKERS), "alive"),
                Query(f"count by (sdkappid) ({_selector(catalog.TURN.name, {})})", "scraped"),
                Query(f"count by (sdkappid, version) ({_selector(catalog.BUILD_INFO.name, {})})", "parts of version {{version}}"),
            ], colours={"alive": GREEN}),
            Panel("Leaders", "1 while some worker leads in this.", [Query(fleet(catalog.LEADER, "role"), "{{role}}")], most=1.2),
            Panel("Redis", "Whether it answers, its replicas, and how often it failed over or was restarted.", [
                Query(fleet(catalog.REDIS_UP), "up"),
                Query(fleet(catalog.REDIS_REPLICAS), "replicas"),
                Query(fleet(catalog.REDIS_FAILOVERS), "failovers"),
            ], colours={"up": GREEN}),
        ),
    ),
)  # fmt: skip

#: Heights in Grafana's grid.
STAT, GRAPH, TIMELINE = 4, 8, 5

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def height(panel: Panel) -> int:
    return {"stat": STAT, "timeseries": GRAPH, "state-timeline": TIMELINE}[panel.shape]


def dashboard() -> dict[str, Any]:
    """The document that Grafana imports."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": 24, "x": 0, "y": y},
                "panels": [],
            }
        )
        x, y, below = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > 24:
                x, y, below = 0, y + below, 0
            place = {"h": height(panel), "w": panel.width, "x": x, "y": y}
            panels.append({"id": len(panels) + 1, **_panel(panel), "gridPos": place})
            x, below = x + panel.width, max(below, height(panel))
        y += below
    return {
        "uid": "imattr",
        "title": "imattr",
        "description": "Attribute updates on their way to Tencent Cloud Chat. Made by `make docs`; docs/operate/runbook.md has the alerts.",
        "tags": ["imattr"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "",
        "annotations": {"list": [_alerts()]},
        "templating": {"list": _variables()},
        "links": [],
        "panels": panels,
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "hide": 0,
            "refresh": 1,
        },
        {
            "name": "sdkappid",
            "label": "App",
            "type": "query",
            "datasource": _SOURCE,
            "definition": f"label_values({catalog.APP_INFO.name}, sdkappid)",
            "query": {"query": f"label_values({catalog.APP_INFO.name}, sdkappid)", "refId": "apps"},
            "hide": 0,
            "refresh": 2,
            "sort": 1,
            "multi": False,
            "includeAll": False,
        },
    ]


def _alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "datasource": _SOURCE,
        "enable": True,
        "iconColor": RED,
        "expr": f'ALERTS{{alertstate="firing", alertname=~"Imattr.*", sdkappid="{APP}"}}',
        "titleFormat": "{{alertname}}",
        "tagKeys": "severity",
    }


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": _SOURCE,
            "editorMode": "code",
            "expr": query.expr,
            "legendFormat": query.name,
            "range": True,
            "instant": panel.shape == "stat",
        }
        for number, query in enumerate(panel.queries)
    ]
    for target in targets:
        target["range"] = not target["instant"]
    return {
        "type": panel.shape,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {
            "defaults": _defaults(panel),
            "overrides": [
                {
                    "matcher": {"id": "byName", "options": name},
                    "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
                }
                for name, colour in panel.colours.items()
            ],
        },
        "options": _options(panel),
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    found: dict[str, Any] = {"unit": panel.unit, "mappings": []}
    if panel.shape == "stat":
        found |= {
            "color": {"mode": "thresholds"},
            "thresholds": {
                "mode": "absolute",
                "steps": [{"value": value, "color": colour} for value, colour in panel.steps],
            },
        }
        if panel.words:
            options = {
                f"{value:g}": {"text": text, "color": colour, "index": index}
                for index, (value, (text, colour)) in enumerate(panel.words.items())
            }
            found["mappings"] = [{"type": "value", "options": options}]
        return found
    if panel.shape == "state-timeline":
        text = {"type": "value", "options": {"1": {"text": " ", "index": 0}}}
        return found | {
            "color": {"mode": "fixed"},
            "mappings": [text],
            "custom": {"fillOpacity": 80, "lineWidth": 0},
        }
    bounds = {"min": panel.least, "max": panel.most}
    found |= {name: bound for name, bound in bounds.items() if bound is not None}
    return found | {
        "color": {"mode": "palette-classic"},
        "custom": {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 60 if panel.stacked else 0,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "showPoints": "never",
            "spanNulls": False,
        },
    }  # fmt: skip


def _options(panel: Panel) -> dict[str, Any]:
    if panel.shape == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "background",
            "graphMode": "none",
            "textMode": "value",
        }
    legend = {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []}
    tooltip = {"mode": "multi", "sort": "desc"}
    if panel.shape == "state-timeline":
        return {
            "legend": legend | {"showLegend": False},
            "tooltip": tooltip,
            "showValue": "never",
            "mergeValues": True,
        }
    return {"legend": legend, "tooltip": tooltip}  # fmt: skip


def expressions() -> list[str]:
    """Every expression of the dashboard, as it is there."""
    return [query.expr for row in ROWS for panel in row.panels for query in panel.queries]


def filled_in(expr: str, sdkappid: str, window: str) -> str:
    """An expression with Grafana's variables replaced, as Prometheus takes it."""
    return expr.replace(APP, sdkappid).replace(WINDOW, window)


def text() -> str:
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"
