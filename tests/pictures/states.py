"""The states of a user, and the scripts that move it: `docs/how/state-machine.svg`."""

from __future__ import annotations

from tests.pictures.svg import picture, text

WIDTH, HEIGHT = 860, 450

#: Name, what it means, x, y of the middle, colour.
STATES = (
    ("pending", "accepted, not being sent", 430, 150, "box"),
    ("in flight", "claimed, under a lease", 430, 320, "box"),
    ("delivered", "remembered in the shadow", 750, 320, "box done"),
    ("dead letter", "kept for a person", 110, 320, "box kept"),
    ("quarantined", "cannot be read; bytes kept", 110, 150, "box kept"),
)
#: Lanes of who is pending.
LANES = ("live", "backfill", "delayed")
#: The scripts that move a user, the path of the arrow, and where its words stand.
ARROWS = (
    ("add", "M430 30 L430 94", 442, 66, ""),
    ("claim", "M400 204 L400 282", 390, 248, "end"),
    ("settle: retry, snooze", "M460 284 L460 206", 472, 240, ""),
    ("reclaim", "", 472, 256, ""),
    ("settle: ack", "M516 320 L654 320", 586, 310, "middle"),
    ("settle: dead_letter", "M344 320 L206 320", 272, 310, "middle"),
    ("redrive", "M130 284 Q170 225 310 190", 218, 240, ""),
    ("purge", "M110 356 L110 404", 122, 386, ""),
    ("forget", "M750 356 L750 404", 762, 386, ""),
    ("when read", "M312 150 L206 150", 258, 140, "middle"),
    ("reassert", "M740 284 Q710 200 552 166", 692, 210, ""),
)


def draw() -> str:
    """The SVG."""
    parts = [
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L10 5L0 10z" class="tip"/></marker></defs>'
    ]
    for name, meaning, x, y, look in STATES:
        height = 108 if name == "pending" else 72
        width = {"pending": 236, "in flight": 172}.get(name, 184)
        parts.append(
            f'<rect class="{look}" x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width}" height="{height}" rx="8"/>'
        )
        top = y - 30 if name == "pending" else y - 6
        parts += [
            text(x, top, name, "middle name"),
            text(x, top + (20 if name != "pending" else 18), meaning, "middle small faint"),
        ]
    for place, lane in enumerate(LANES):
        x = 322 + 74 * place
        parts += [
            f'<rect class="lane" x="{x}" y="158" width="68" height="32" rx="5"/>',
            text(x + 34, 178, lane, "middle small mono"),
        ]
    for words, line, x, y, look in ARROWS:
        parts += [f'<path class="arrow" d="{line}" marker-end="url(#tip)"/>'] if line else []
        parts.append(text(x, y, words, f"{look} small mono"))
    parts += [
        text(430, 22, "Producer, Celery, stream, file", "middle small"),
        text(110, 420, "gone", "middle small faint"),
        text(750, 420, "no longer remembered", "middle small faint"),
        text(430, 392, "A user in flight may be pending, too: its newer values wait", "middle small faint"),
        text(
            430, 408, "outside the lanes until settle merges what came back under them.", "middle small faint"
        ),
    ]
    style = """
.box { fill: none; stroke: var(--ink); stroke-width: 1.5; } .done { stroke: var(--good); stroke-width: 2.5; } .kept { stroke: var(--limit); }
.lane { fill: none; stroke: var(--line); } .arrow { fill: none; stroke: var(--faint); stroke-width: 1.5; } .tip { fill: var(--faint); }
.name { font-weight: 600; font-size: 15px; }
"""
    title = "A user is pending in one of three lanes, then in flight, then delivered, a dead letter, or pending again"
    return picture(WIDTH, HEIGHT, title, parts, style)
