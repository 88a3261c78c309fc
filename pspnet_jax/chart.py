"""Line and dot charts, laid out once and drawn twice: as SVG for a page, as a picture by Pillow.

Two small renderers in place of matplotlib: a report then needs nothing to be installed, and
its charts are a few kilobytes of text.
"""

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BLUE, ORANGE, GRAY = '#0072b2', '#d55e00', '#767676'  # Okabe and Ito; gray of 4.5:1 on white
INK, GRID = '#222222', '#dddddd'
WIDTH, HEIGHT = 460, 300  # of a chart, in SVG units and in pixels before scaling
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 56, 44  # margins around the axes
FONT = 12


class Series(NamedTuple):
    """Points of one colour, joined by a line or not; `titles` are what dots say when pointed at."""

    name: str  # in the legend; '' is not in it
    x: Sequence[float]
    y: Sequence[float]
    color: str = BLUE
    line: bool = True
    dots: bool = False
    dashed: bool = False
    titles: Sequence[str] = ()


class Chart(NamedTuple):
    """An end of a range that is None is that of the points."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_log: bool = False
    x_range: tuple[float | None, float | None] = (None, None)
    y_range: tuple[float | None, float | None] = (None, None)


class Line(NamedTuple):
    points: list[tuple[float, float]]
    color: str
    width: float
    dashed: bool = False


class Dot(NamedTuple):
    point: tuple[float, float]
    color: str
    title: str


class Text(NamedTuple):
    point: tuple[float, float]
    words: str
    anchor: str  # 'start', 'middle', 'end'
    color: str = INK
    bold: bool = False


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` + 1 multiples of 1, 2 or 5 times a power of ten within low..high."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within low..high; 3 times them too, or 2 and 5 times, where they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [n * 10.0**p for p in powers for n in factors if low <= n * 10.0**p <= high]
        if len(found) >= 3:
            break
    return found


def _limits(values, given, log: bool) -> tuple[float, float]:
    low, high = (min(values, default=1.0), max(values, default=1.0))
    if log:
        low, high = low / 1.3, high * 1.3
    else:
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - margin, high + margin
    low = low if given[0] is None else given[0]
    high = high if given[1] is None else given[1]
    return low, high if high > low else low + 1.0


def _layout(chart: Chart) -> Iterator[Line | Dot | Text]:
    """What is drawn, in this order, in units of WIDTH x HEIGHT with the origin top left."""
    xs, ys = ([v for s in chart.series for v in s[axis]] for axis in (1, 2))
    x_limits, y_limits = _limits(xs, chart.x_range, chart.x_log), _limits(ys, chart.y_range, False)
    x_scale = math.log10 if chart.x_log else float
    left, right = map(x_scale, x_limits)

    def place(x, y):
        u = (x_scale(x) - left) / (right - left)
        v = (y - y_limits[0]) / (y_limits[1] - y_limits[0])
        return LEFT + u * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - v * (HEIGHT - TOP - BOTTOM)

    yield Text((8, 18), chart.title, 'start', bold=True)
    yield Text((8, TOP - 12), chart.y_label, 'start', GRAY)
    yield Text((WIDTH - RIGHT, HEIGHT - 8), chart.x_label, 'end', GRAY)
    for y in ticks(*y_limits):
        (_, v) = place(x_limits[0], y)
        yield Line([(LEFT, v), (WIDTH - RIGHT, v)], GRID, 1)
        yield Text((LEFT - 6, v + 4), _number(y), 'end')
    for x in log_ticks(*x_limits) if chart.x_log else ticks(*x_limits):
        (u, _) = place(x, y_limits[0])
        yield Line([(u, HEIGHT - BOTTOM), (u, HEIGHT - BOTTOM + 4)], GRAY, 1)
        yield Text((u, HEIGHT - BOTTOM + 17), _number(x), 'middle')
    yield Line([(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], GRAY, 1)

    end = WIDTH - RIGHT
    for series in reversed([s for s in chart.series if s.name]):  # the legend, right to left
        yield Text((end, TOP - 12), series.name, 'end')
        end -= 7 * len(series.name) + 10
        if series.line:
            yield Line([(end - 16, TOP - 16), (end, TOP - 16)], series.color, 2, series.dashed)
        if series.dots:
            yield Dot((end - 8, TOP - 16), series.color, '')
        end -= 32
    for series in chart.series:
        points = [place(x, y) for x, y in zip(series.x, series.y, strict=True)]
        if series.line and len(points) > 1:
            yield Line(points, series.color, 2, series.dashed)
        if series.dots or len(points) == 1:
            for i, point in enumerate(points):
                yield Dot(point, series.color, series.titles[i] if series.titles else '')


def _number(value: float) -> str:
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:g}'


def svg(chart: Chart) -> str:
    """An <svg> element that is as wide as its place; every text in it is escaped."""
    title = html.escape(chart.title)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" '
        f'font-size="{FONT}" font-family="sans-serif">'
    ]
    for shape in _layout(chart):
        match shape:
            case Line(points, color, width, dashed):
                where = ' '.join(f'{x:.1f},{y:.1f}' for x, y in points)
                dash = ' stroke-dasharray="5 4"' if dashed else ''
                parts.append(
                    f'<polyline points="{where}" fill="none" stroke="{color}" '
                    f'stroke-width="{width}"{dash}/>'
                )
            case Dot((x, y), color, words):
                inner = f'<title>{html.escape(words)}</title>' if words else ''
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}" '
                    f'fill-opacity="0.75">{inner}</circle>'
                )
            case Text((x, y), words, anchor, color, bold):
                weight = ' font-weight="bold"' if bold else ''
                parts.append(
                    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"'
                    f'{weight}>{html.escape(words)}</text>'
                )
    return '\n'.join([*parts, '</svg>'])


def picture(chart: Chart, scale: int = 2) -> np.ndarray:
    """H W 3 uint8, `scale` pixels a unit."""
    canvas = Image.new('RGB', (WIDTH * scale, HEIGHT * scale), 'white')
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT * scale)
    anchors = {'start': 'ls', 'middle': 'ms', 'end': 'rs'}
    for shape in _layout(chart):
        match shape:
            case Line(points, color, width, dashed):
                points = [(x * scale, y * scale) for x, y in points]
                for piece in _dashes(points, 5 * scale, 4 * scale) if dashed else [points]:
                    draw.line(piece, color, round(width * scale), 'curve')
            case Dot((x, y), color, _):
                draw.circle((x * scale, y * scale), 3.5 * scale, color)
            case Text((x, y), words, anchor, color, bold):
                draw.text(
                    (x * scale, y * scale),
                    words,
                    color,
                    font,
                    anchors[anchor],
                    stroke_width=0.3 * scale if bold else 0,
                )
    return np.array(canvas)


def _dashes(points, on: float, off: float) -> Iterator[list[tuple[float, float]]]:
    """The first line of `points`, in pieces: only straight lines are dashed."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    length = math.hypot(x1 - x0, y1 - y0)
    for start in np.arange(0, length, on + off):
        a, b = start / length, min(start + on, length) / length
        yield [(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in (a, b)]


def grid(pictures: Sequence[np.ndarray], columns: int = 2) -> np.ndarray:
    """H W 3: pictures of one size side by side, white where the last row lacks one."""
    blank = np.full_like(pictures[0], 255)
    padded = [*pictures, *[blank] * (-len(pictures) % columns)]
    rows = [np.concatenate(padded[i : i + columns], axis=1) for i in range(0, len(padded), columns)]
    return np.concatenate(rows)
