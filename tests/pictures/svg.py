"""What the drawn pictures share: one look, readable on light and dark pages, and nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape

#: The colours: ink, fainter ink, the picture's own background, what is good, what is limited, and what is wrong.
_STYLE = """
svg { --ink: #1f2328; --faint: #6e7781; --line: #d0d7de; --paper: #ffffff; --good: #1a7f64; --limit: #bf5b17; --bad: #c4314b;
      font: 13px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --faint: #9198a1; --line: #3d444d; --paper: #16191f; --good: #3fb68b; --limit: #e38b4f; --bad: #f0758a; } }
text { fill: var(--ink); } .faint { fill: var(--faint); } .small { font-size: 11px; } .mono { font-family: monospace; }
.paper { fill: var(--paper); } .rule { stroke: var(--line); fill: none; } .middle { text-anchor: middle; } .end { text-anchor: end; }
.good { fill: var(--good); } .bad { fill: var(--bad); } .limit { fill: var(--limit); }
.trace { fill: none; stroke: var(--good); stroke-width: 1.5; } .border { stroke: var(--limit); stroke-dasharray: 4 3; fill: none; }
"""


def picture(width: int, height: int, title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole SVG; `title` says in words what it shows."""
    name = escape(title, {'"': "&quot;"})
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{name}">\n'
        f"<style>{_STYLE}{style}</style>\n"
        f'<rect class="paper" width="{width}" height="{height}" rx="8"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, look: str = "") -> str:
    """A line of text; `look` are classes."""
    return f'<text x="{x:g}" y="{y:g}" class="{look}">{escape(words)}</text>'


def path(points: Iterable[tuple[float, float]], look: str) -> str:
    """A line through points."""
    first, *rest = points
    steps = "".join(f"L{x:.1f} {y:.1f}" for x, y in rest)
    return f'<path class="{look}" d="M{first[0]:.1f} {first[1]:.1f}{steps}"/>'
