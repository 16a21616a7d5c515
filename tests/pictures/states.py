"""The places of a user, and the scripts that move it: `docs/how/state-machine.svg`."""

from __future__ import annotations

from tests.pictures.svg import arrow, box, picture, text

HEIGHT = 524
#: Name, what it means, x, y, width, height, look.
PLACES = (
    ("in flight", "until settle ends it", 152, 252, 176, 56, "box"),
    ("delivered", "remembered", 352, 376, 116, 54, "box done"),
    ("dead letter", "kept for a person", 182, 376, 116, 54, "box kept"),
    ("quarantine", "raw bytes kept", 12, 376, 134, 54, "box kept"),
)
LANES = (("live", "first come"), ("backfill", "spare seats"), ("delayed", "not before t"))
#: What moves a user: the script or, of `settle`, the outcome; its arrow, and where its words stand.
MOVES = (
    (("add",), "M240 34V71", 248, 56, ""),
    (("claim",), "M206 172V251", 199, 206, "end"),
    (("retry", "snooze"), "M274 252V173", 282, 206, ""),
    (("ack",), "M328 292C390 296 410 320 410 375", 392, 326, "end"),
    (("dead_letter",), "M240 308V375", 232, 346, "end"),
    (("reclaim",), "M152 266C110 264 110 296 151 294", 112, 284, "end"),
    (("redrive",), "M286 376C330 320 352 250 352 173", 358, 256, ""),
    (("reassert",), "M446 376C462 300 452 220 418 173", 432, 212, "end"),
    (("purge",), "M240 430V462", 247, 450, ""),
    (("forget",), "M410 430V462", 417, 450, ""),
    (("correct",), "M352 392C324 392 324 416 351 416", 346, 446, "end"),
    # A delay that is over: back to the own lane.
    (("claim",), "M366 108C356 97 340 97 330 107", 322, 97, "end"),
)


def draw() -> str:
    """The SVG."""
    parts = [text(240, 26, "an update is accepted", "middle small faint")]
    parts += [box(92, 72, 336, 100), text(104, 92, "pending", "name")]
    for place, (lane, meaning) in enumerate(LANES):
        x = 104 + 106 * place
        parts += [
            box(x, 108, 100, 52, "lane", 5),
            text(x + 50, 130, lane, "mono middle"),
            text(x + 50, 148, meaning, "small faint middle"),
        ]
    for name, meaning, x, y, width, height, look in PLACES:
        middle = x + width / 2
        parts += [
            box(x, y, width, height, look),
            text(middle, y + height / 2 - 3, name, "middle name"),
            text(middle, y + height / 2 + 15, meaning, "middle small faint"),
        ]
    for names, line, x, y, look in MOVES:
        parts += [arrow(line)] if line else []
        parts += [text(x, y + 14 * place, name, f"{look} mono") for place, name in enumerate(names)]
    parts += [
        # What cannot be read leaves from wherever a script meets it.
        arrow("M92 140C20 150 22 300 32 375", "arrow dashed"),
        arrow("M160 308C140 330 116 350 108 375", "arrow dashed"),
        text(46, 218, "cannot", "small faint"),
        text(46, 233, "be read", "small faint"),
        text(240, 480, "gone", "middle small faint"),
        text(410, 480, "forgotten", "middle small faint"),
        text(14, 496, "A user in flight may be pending, too:", "small faint"),
        text(14, 512, "its newer values wait outside the lanes.", "small faint"),
    ]
    style = """
.lane { fill: var(--paper); stroke: var(--line); } .done { stroke: var(--good); stroke-width: 1.6; }
.kept { stroke: var(--limit); stroke-width: 1.6; } .dashed { stroke-dasharray: 4 3; }
"""
    title = "A user is pending in one of three lanes, then in flight, then delivered, a dead letter, or pending again"
    return picture(HEIGHT, title, parts, style)
