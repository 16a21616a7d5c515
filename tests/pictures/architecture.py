"""How an update travels: `docs/how/architecture.svg`. The numbers are those of the list beside it."""

from __future__ import annotations

from tests.pictures.svg import arrow, box, picture, text

HEIGHT = 492
#: The ways in.
SOURCES = ("Producer", "Celery client", "stream", "file")
LANES = (("live", "first come"), ("backfill", "spare seats"), ("delayed", "not before t"))
#: What a worker does with a ticket, one under the other.
STEPS = (
    ("reserve a slot", 4),
    ("claim ≤ 100 users", 4),
    ("prepare, wait", 5),
    ("write in the slot", 5),
    ("decide, settle", 6),
)


def _number(x: float, y: float, number: int) -> str:
    return f'<circle class="dot" cx="{x:g}" cy="{y:g}" r="8.5"/>' + text(
        x, y + 4, str(number), "number middle"
    )


def draw() -> str:
    """The SVG."""
    parts = []
    for place, source in enumerate(SOURCES):
        x = 12 + 116 * place
        parts += [box(x, 12, 108, 28), text(x + 54, 30, source, "middle")]
        parts.append(f'<path class="arrow" d="M{x + 54} 40V54"/>')
    parts += ['<path class="arrow" d="M66 54H414"/>', arrow("M120 54V103"), _number(120, 54, 1)]

    # Redis, on the left.
    parts += [
        box(12, 72, 282, 408, "room", 9),
        text(24, 90, "Redis", "name"),
        text(282, 90, "each step a Lua script", "end small faint"),
        text(128, 98, "add", "mono"),
        box(24, 106, 258, 88),
        text(36, 125, "pending", "name"),
        text(270, 125, "one entry a user", "end small faint"),
        _number(24, 106, 2),
    ]
    for place, (lane, meaning) in enumerate(LANES):
        x = 32 + 82 * place
        parts += [
            box(x, 134, 78, 50, "lane", 5),
            text(x + 39, 155, lane, "mono middle"),
            text(x + 39, 173, meaning, "small faint middle"),
        ]
    parts += [
        box(184, 222, 98, 48),
        text(233, 242, "shared clock", "middle"),
        text(233, 259, "next free slot", "small faint middle"),
        box(84, 306, 198, 52),
        text(96, 328, "in flight", "name"),
        text(96, 346, "batch id, lease, values sent", "small faint"),
        box(24, 418, 122, 48, "box done"),
        text(85, 439, "delivered", "middle name"),
        text(85, 456, "remembered", "small faint middle"),
        box(160, 418, 122, 48, "box kept"),
        text(221, 439, "dead letter", "middle name"),
        text(221, 456, "kept for a person", "small faint middle"),
        arrow("M150 194V305"),
        text(143, 254, "claim", "mono end"),
        arrow("M84 332C50 332 44 300 44 194"),
        text(54, 290, "retry,", "mono"),
        text(54, 304, "snooze", "mono"),
        arrow("M116 358V417"),
        text(109, 392, "ack", "mono end"),
        arrow("M221 358V417"),
        text(214, 392, "dead_letter", "mono end"),
        _number(252, 388, 7),
    ]

    # A worker, on the right.
    parts += [
        box(318, 72, 150, 326, "room", 9),
        text(330, 90, "Workers", "name"),
        box(330, 106, 126, 46),
        text(393, 126, "dispatcher", "middle"),
        text(393, 142, "there is work", "small faint middle"),
        arrow("M282 129H329"),
        _number(330, 106, 3),
        arrow("M393 152V187"),
        text(400, 173, "ticket", "mono"),
    ]
    top = 188
    for place, (step, number) in enumerate(STEPS):
        y = top + 38 * place
        parts += [box(330, y, 126, 30), text(400, y + 20, step, "small middle"), _number(332, y + 15, number)]
        if place:
            parts.append(arrow(f"M393 {y - 8}V{y - 1}"))
    parts += [
        arrow("M322 203C302 203 304 240 283 240"),
        arrow("M322 241C300 241 310 318 283 318"),
        arrow("M322 355C300 355 306 345 283 345"),
        box(318, 428, 150, 52, "box api"),
        text(393, 450, "the API", "name middle"),
        text(393, 468, "≤ 100 calls a second", "small faint middle"),
        arrow("M462 317C476 350 466 390 440 427"),
        arrow("M364 428C352 412 350 392 360 371"),
        text(438, 416, "call", "mono end"),
        text(350, 416, "answer", "mono end"),
    ]
    style = """
.room { fill: none; stroke: var(--line); stroke-width: 1.5; } .lane { fill: var(--paper); stroke: var(--line); }
.done { stroke: var(--good); stroke-width: 1.6; } .kept { stroke: var(--limit); stroke-width: 1.6; }
.api { stroke: var(--a); stroke-width: 1.6; }
.dot { fill: var(--a); } .number { fill: var(--paper); font-size: 11px; font-weight: 700; }
"""
    title = (
        "Updates come in by four ways, wait in lanes in Redis, and are claimed by a worker that has a ticket and a slot; "
        "the answer of the API decides whether a user is delivered, comes back, or becomes a dead letter"
    )
    return picture(HEIGHT, title, parts, style)
