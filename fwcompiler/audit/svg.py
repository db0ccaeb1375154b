"""The port plan as inline SVG, drawn to scale: one lane a line, one unit of the scale a port."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from fwcompiler.ports import LAST

if TYPE_CHECKING:
    from fwcompiler.audit.drawing import Bar, Lane

WIDTH, LEFT, RIGHT = 1080, 150, 16
BAR, GAP, LINE, TOP = 20, 12, 16, 26
LETTER = 6.6
"""About the width of a letter at 12 px; labels are placed by it."""
LEAST = 2.5
"""A single port is a fiftieth of this wide; it is drawn so that it can be seen."""
STEP = 10_000


@dataclass(frozen=True, slots=True)
class _Label:
    bar: Bar
    x: float
    level: int


def drawing(lanes: Sequence[Lane]) -> str:
    """The whole plan; empty where there is nothing to draw."""
    if not lanes:
        return "<p class=none>The policy opens no ports.</p>"
    parts: list[str] = []
    y = float(TOP)
    for lane in lanes:
        beside = _beside(lane.bars)
        labels = [] if beside else list(_labels(lane.bars))
        levels = max((label.level for label in labels), default=-1) + 1
        parts += [f'<text x="0" y="{y + 14:.0f}">{escape(lane.title)}</text>', *(_bar(bar, y) for bar in lane.bars)]
        parts += [line for label in labels for line in _label(label, y)]
        if beside:
            parts.append(f'<text x="{_x(beside.span[1]) + 8:.1f}" y="{y + 14:.0f}">{escape(beside.text())}</text>')
        y += BAR + levels * LINE + (6 if levels else 0) + GAP
    body = "\n".join((*_axis(y), *parts))
    summary = escape("; ".join(f"{lane.title}: {', '.join(bar.text() for bar in lane.bars)}" for lane in lanes))
    return f'<div class=wide><svg viewBox="0 0 {WIDTH} {y:.0f}" role="img" aria-label="{summary}">\n{body}\n</svg></div>'


def _x(port: int) -> float:
    return LEFT + port * (WIDTH - LEFT - RIGHT) / (LAST + 1)


def _wide(bar: Bar) -> float:
    return max(LEAST, _x(bar.span[1] + 1) - _x(bar.span[0]))


def _fits(bar: Bar) -> bool:
    return _wide(bar) > len(bar.text()) * LETTER * 1.15 + 8


def _axis(bottom: float) -> Iterator[str]:
    for port in (*range(0, LAST, STEP), LAST + 1):
        x = _x(port)
        yield f'<line class="axis" x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom - GAP + 4:.0f}"/>'
        text, anchor = (str(port), "middle") if port <= LAST else (str(LAST), "end")
        yield f'<text class="soft" x="{x:.1f}" y="12" text-anchor="{anchor}">{text}</text>'


def _bar(bar: Bar, y: float) -> str:
    x, width = _x(bar.span[0]), _wide(bar)
    place = f'x="{x:.1f}" y="{y:.0f}" width="{width:.1f}" height="{BAR}" rx="2"'
    shape = f'<rect class="{bar.kind}" {place}><title>{escape(bar.text())}</title></rect>'
    if not _fits(bar):
        return shape
    return f'{shape}<text class="inside" x="{x + width / 2:.1f}" y="{y + 14:.0f}" text-anchor="middle">{escape(bar.text())}</text>'


def _beside(bars: Sequence[Bar]) -> Bar | None:
    """The only bar of a lane, where its label does not fit into it but behind it."""
    if len(bars) != 1 or _fits(bars[0]) or _x(bars[0].span[1]) + 8 + len(bars[0].text()) * LETTER > WIDTH:
        return None
    return bars[0]


def _labels(bars: Sequence[Bar]) -> Iterator[_Label]:
    """Labels of bars too narrow to hold them: side by side below the lane, in the order of the ports, on as many lines as it takes."""
    x, level = 0.0, 0
    for bar in sorted((b for b in bars if not _fits(b)), key=lambda b: b.span):
        width = len(bar.text()) * LETTER
        at = max(_x(bar.span[0]), x)
        if at + width > WIDTH:
            level, at = level + 1, min(max(LEFT, _x(bar.span[0]) - width), WIDTH - width)
        yield _Label(bar, at, level)
        x = at + width + 12


def _label(label: _Label, y: float) -> Iterator[str]:
    start = _x(label.bar.span[0]) + _wide(label.bar) / 2
    low = y + BAR + 6 + label.level * LINE
    yield f'<path class="lead" d="M{start:.1f} {y + BAR:.0f} L{label.x + 3:.1f} {low:.0f}"/>'
    yield f'<text x="{label.x:.1f}" y="{low + 11:.0f}">{escape(label.bar.text())}</text>'
