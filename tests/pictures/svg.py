"""What the drawn pictures share: one look, for light and dark pages, small screens and large, and nothing from elsewhere.

A picture has its own paper, since a page may be dark while the browser prefers light. It is narrow, so that its words can be
read on a phone. What moves stands still for whoever prefers that.
"""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape

#: Units across, and pixels where there is room for them.
WIDTH, SHOWN_WIDTH = 480, 600

_STYLE = """
svg { --ink: #1f2328; --faint: #59636e; --line: #d0d7de; --paper: #ffffff; --box: #f3f5f7; --good: #1a7f64; --limit: #b35309;
      --bad: #c4314b; --a: #2f6fde; --b: #1a7f64; --c: #b35309; --d: #8250df;
      font: 13px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --faint: #9aa4af; --line: #3d444d; --paper: #16191f; --box: #20252d; --good: #3fb68b;
        --limit: #e38b4f; --bad: #f0758a; --a: #6ea3ff; --b: #3fb68b; --c: #e38b4f; --d: #b98cff; } }
text { fill: var(--ink); } .faint { fill: var(--faint); } .small { font-size: 11.5px; } .name { font-weight: 600; }
.mono { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 11.5px; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.paper { fill: var(--paper); stroke: var(--line); } .box { fill: var(--box); stroke: var(--line); }
.rule { stroke: var(--line); fill: none; } .arrow { stroke: var(--faint); stroke-width: 1.4; fill: none; }
.tip { fill: var(--faint); }
.good { fill: var(--good); } .bad { fill: var(--bad); } .limit { fill: var(--limit); }
.trace { fill: none; stroke: var(--good); stroke-width: 1.6; stroke-linejoin: round; }
.border { stroke: var(--limit); stroke-dasharray: 4 3; fill: none; }
"""
_TIP = (
    '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L10 5L0 10z" class="tip"/></marker></defs>'
)


def picture(height: int, title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole SVG; `title` says in words what it shows."""
    name = escape(title, {'"': "&quot;"})
    shown = round(height * SHOWN_WIDTH / WIDTH)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{SHOWN_WIDTH}" height="{shown}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="{name}">\n<style>{_STYLE}{style}</style>\n{_TIP}\n'
        f'<rect class="paper" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, look: str = "") -> str:
    """A line of text; `look` are classes."""
    return f'<text x="{x:g}" y="{y:g}" class="{look}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, look: str = "box", radius: float = 7) -> str:
    """A box, with round corners."""
    return f'<rect class="{look}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'


def bar(x: float, y: float, width: float, height: float, look: str) -> str:
    """A piece of a chart."""
    return f'<rect class="{look}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def arrow(line: str, look: str = "arrow") -> str:
    """An arrow along a path."""
    return f'<path class="{look}" d="{line}" marker-end="url(#tip)"/>'


def path(points: Iterable[tuple[float, float]], look: str) -> str:
    """A line through points."""
    first, *rest = points
    steps = "".join(f"L{x:.1f} {y:.1f}" for x, y in rest)
    return f'<path class="{look}" d="M{first[0]:.1f} {first[1]:.1f}{steps}"/>'
