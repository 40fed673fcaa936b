"""
A scatter plot as SVG, written by hand: one panel above another, over one axis of minutes.

Knows nothing of what it draws, and needs no library.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, GAP = 960, 260, 80, 20, 56, 56
COLOURS = ("#2563a8", "#c2562d", "#4a7d3c")


@dataclass
class Panel:
    """Points by series, and lines that bound what is allowed."""

    title: str
    unit: str
    series: dict[str, list[tuple[float, float]]]
    bounds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def svg(title: str, panels: list[Panel], minutes: float) -> str:
    height = TOP + len(panels) * (HEIGHT + GAP)
    namespace, font = 'xmlns="http://www.w3.org/2000/svg"', 'font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg {namespace} viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" {font}>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, TOP + number * (HEIGHT + GAP), minutes)
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, top: float, minutes: float) -> list[str]:
    everything = [y for points in [*panel.series.values(), *panel.bounds.values()] for _, y in points] or [0.0]
    step = _step(max(everything) - min(0.0, *everything) or 1.0)
    low, high = step * (min(0.0, *everything) // step), step * (max(everything) // step + 1)
    plot = WIDTH - LEFT - RIGHT

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + plot * x / minutes, top + HEIGHT * (high - y) / (high - low)

    parts = [f'<text x="{LEFT}" y="{top - 10}">{escape(panel.title)}, {escape(panel.unit)}</text>']
    parts += _grid(at, top, (low, high, step), minutes)
    for name, line in panel.bounds.items():
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        parts.append(f'<polyline points="{points}" fill="none" stroke="#999" stroke-dasharray="5 3"/>')
        x, y = at(*line[-1])
        parts.append(f'<text x="{x - 4:.1f}" y="{y - 4:.1f}" text-anchor="end" fill="#666">{escape(name)}</text>')
    for number, (name, points) in enumerate(panel.series.items()):
        colour = COLOURS[number % len(COLOURS)]
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in (at(*point) for point in points))
        parts.append(f'<path d="{dots}" stroke="{colour}" stroke-width="3" stroke-linecap="round" opacity="0.5"/>')
        x = LEFT + 300 + number * 220
        parts.append(f'<circle cx="{x}" cy="{top - 14}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 8}" y="{top - 10}">{escape(name)}</text>')
    return parts


def _grid(at, top: float, scale: tuple[float, float, float], minutes: float) -> list[str]:
    low, high, step = scale
    parts = []
    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        _, y = at(0, value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{"#888" if value == 0 else "#e3e3e3"}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    every = _step(minutes)
    for number in range(int(minutes / every) + 1):
        x, _ = at(number * every, 0)
        parts.append(f'<text x="{x:.1f}" y="{top + HEIGHT + 18}" text-anchor="middle">{number * every:g} min</text>')
    return parts


def _step(span: float) -> float:
    """A round number that divides the span into four to ten."""
    step = 10.0**-6
    while span / step > 10:
        for factor in (1, 2, 5):
            if span / (step * factor) <= 10:
                return step * factor
        step *= 10
    return step
