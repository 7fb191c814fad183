"""The report's drawings as inline SVG: sized by their box, so that they are readable on a phone, and without any script or file."""

import math
from html import escape

from testing.matrix.roofline import Point, Roof

OPERATION_COLOURS = {
    "up_projection": "#0072b2",
    "down_projection": "#56b4e9",
    "gather_sum": "#999999",
    "activation_backward": "#d55e00",
    "down_weight_grad": "#e69f00",
    "dx_rows": "#cc79a7",
    "up_weight_grad": "#009e73",
}
"""Okabe and Ito's palette: told apart with any colour vision."""
WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 44, 20, 12, 40


class _Logarithmic:
    """A logarithmic axis from one power of ten to another."""

    def __init__(self, values: list[float], begin: float, end: float) -> None:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self.low, self.high, self.begin, self.end = low, max(high, low + 1), begin, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return round(self.begin + share * (self.end - self.begin), 1)

    def ticks(self) -> list[float]:
        return [10.0**power for power in range(self.low, self.high + 1)]


def roofline(points: list[Point], roof: Roof | None) -> str:
    """FLOPs a byte against TFLOPS, one dot for each operation of each cell, below the device's roof where it is known."""
    intensities = [point.work.intensity for point in points]
    heights = [point.tflops for point in points] + ([roof.tflops] if roof else [])
    x = _Logarithmic(intensities, LEFT, WIDTH - RIGHT)
    y = _Logarithmic(heights, HEIGHT - BOTTOM, TOP)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Roofline: TFLOPS over FLOPs per byte">']
    for tick in x.ticks():
        parts.append(f'<line class="grid" x1="{x(tick)}" y1="{TOP}" x2="{x(tick)}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x(tick)}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{tick:g}</text>')
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y(tick)}" x2="{WIDTH - RIGHT}" y2="{y(tick)}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">FLOPs per byte</text>')
    parts.append(f'<text x="12" y="{HEIGHT / 2 - 14}" text-anchor="middle" transform="rotate(-90 12 {HEIGHT / 2 - 14})">TFLOPS</text>')
    if roof:
        parts.append(_roof(roof, x, y))
    for point in points:
        label = f"{point.operation} of {point.cell}: {point.tflops:.0f} TFLOPS at {point.work.intensity:.0f} FLOPs a byte"
        label += f", {point.share(roof):.0%} of what the device can do there" if roof else ""
        colour = OPERATION_COLOURS.get(point.operation, "#000")
        dot = f'<circle cx="{x(point.work.intensity)}" cy="{y(point.tflops)}" r="4" fill="{colour}">'
        parts.append(f"{dot}<title>{escape(label)}</title></circle>")
    return "".join([*parts, "</svg>"])


def _roof(roof: Roof, x: _Logarithmic, y: _Logarithmic) -> str:
    """The memory's slope and the matrix units' ceiling, cut to the axes."""
    left = max(10.0**x.low, 10.0**y.low / roof.tb_per_s)
    ridge = min(max(roof.tflops / roof.tb_per_s, left), 10.0**x.high)
    corners = [(left, roof.attainable(left)), (ridge, roof.attainable(ridge)), (10.0**x.high, roof.attainable(10.0**x.high))]
    return f'<polyline class="roof" points="{" ".join(f"{x(one)},{y(height)}" for one, height in corners)}"/>'


def sparkline(values: list[float]) -> str:
    """The course of a ratio, the last value marked; nothing for a single one."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = max(high - low, 0.02 * high)  # two percent are not drawn as a cliff
    middle = (low + high) / 2
    dots = [(6 + 88 * index / (len(values) - 1), 13 - 18 * (value - middle) / span) for index, value in enumerate(values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
    end = dots[-1]
    label = f"from {values[0]:.3f} to {values[-1]:.3f}"
    return (
        f'<svg class="spark" viewBox="0 0 100 26" role="img" aria-label="{label}"><polyline points="{line}"/>'
        f'<circle cx="{end[0]:.1f}" cy="{end[1]:.1f}" r="3.5"/></svg>'
    )
