"""Line charts as SVG text that stands inside a page: no script, no font, no file beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Told apart also by those who see few colours (Okabe and Ito's palette, blue first).
COLOURS = ("#2563eb", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8b5cf6", "#6b7280", "#b45309", "#0f766e")

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 42
_STYLE = (
    "<style>svg{background:#fff}text{font:11.5px sans-serif;fill:#555}.label{font-size:12.5px;fill:#111}"
    ".grid{stroke:#ddd}</style>"
)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line; points that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """An SVG element with axes, and a legend below where there are several lines. A range defaults to the data's."""
    x_range = x_range or _range([value for line in series for value in line.x])
    y_range = y_range or _range([value for line in series for value in line.y])
    x_ticks, y_ticks = ticks(*x_range), ticks(*y_range)
    columns = 3
    legend_rows = math.ceil(len(series) / columns) if len(series) > 1 else 0
    height = _HEIGHT + 20 * legend_rows
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(y_label)}">',
        *(_y_tick(value, _place_y(value, y_range)) for value in y_ticks),
        *(_x_tick(value, _place_x(value, x_range)) for value in x_ticks),
        f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text class="label" transform="translate(13 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>',
    ]
    for number, line in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="6 3"' if number >= len(COLOURS) else ""
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"{dash}>'
            f"<title>{escape(line.name)}</title></polyline>"
            for points in _pieces(line, x_range, y_range)
        ]
        if legend_rows:
            x = _LEFT + (number % columns) * (_WIDTH - _LEFT) / columns
            y = _HEIGHT + 14 + 20 * (number // columns)
            parts.append(
                f'<path d="M{x:.0f} {y - 4}h18" stroke="{colour}" stroke-width="3"{dash}/>'
                f'<text x="{x + 24:.0f}" y="{y}">{escape(_short(line.name))}</text>'
            )
    return "".join([*parts, "</svg>"])


def standalone(svg: str) -> str:
    """A chart as a file of its own: with its namespace, and the styles that a page would give it."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{_STYLE}", 1) + "\n"


def ticks(low: float, high: float, *, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Without noise of the last bits: 0.30000000000000004 is 0.3, 20000 is 20k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.6g}k"
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The range of the finite values, with a little room; never of no width."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    if high - low < 1e-12:
        return low - 0.5 * max(abs(low), 1e-6), high + 0.5 * max(abs(high), 1e-6)
    return low, high


def _place_x(value: float, x_range: tuple[float, float]) -> float:
    return _LEFT + (value - x_range[0]) / (x_range[1] - x_range[0]) * (_WIDTH - _LEFT - _RIGHT)


def _place_y(value: float, y_range: tuple[float, float]) -> float:
    return _HEIGHT - _BOTTOM - (value - y_range[0]) / (y_range[1] - y_range[0]) * (_HEIGHT - _TOP - _BOTTOM)


def _y_tick(value: float, y: float) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick_text(value)}</text>'
    )


def _x_tick(value: float, x: float) -> str:
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick_text(value)}</text>'
    )


def _pieces(line: Series, x_range: tuple[float, float], y_range: tuple[float, float]) -> list[str]:
    """The points of each unbroken piece of the line, as SVG writes them."""
    pieces: list[list[str]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            y = min(max(y, y_range[0]), y_range[1])
            pieces[-1].append(f"{_place_x(x, x_range):.1f},{_place_y(y, y_range):.1f}")
        elif pieces[-1]:
            pieces.append([])
    return [" ".join(piece) for piece in pieces if piece]


def _short(name: str, longest: int = 22) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"
