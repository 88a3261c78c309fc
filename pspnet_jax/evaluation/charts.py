"""The charts of a run and its evaluation, drawn by matplotlib, which is imported when needed.

An axis spans the values, not their possible range. A line's name stands next to it, in its colour.
"""

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from pspnet_jax.evaluation.words import PATIENTS, Words
from pspnet_jax.runtime import log
from pspnet_jax.runtime.storage import writing

BLUE, ORANGE, GRAY = '#0072b2', '#b85000', '#666666'  # after Okabe and Ito; dark enough for text
WIDTH, HEIGHT = 420, 280  # of a chart, in points
LEFT, RIGHT, TOP, BOTTOM = 60, 24, 56, 42  # margins around its axes
NAMES = 100  # replaces RIGHT if names stand at the ends of lines
NAME_HEIGHT = 15
STYLE = Path(__file__).parent / 'templates' / 'charts.mplstyle'


class Line(NamedTuple):
    """Points in one colour; `form` is matplotlib's: '-', '--', 'o', 'o-'.

    The name stands at the last point with its value, or next to the point `at`, above the line or
    below. `titles` are the tooltips of the dots.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = BLUE
    form: str = '-'
    titles: Sequence[str] = ()
    at: tuple[float, float] | None = None
    above: bool = True


class Axis(NamedTuple):
    label: str
    limits: tuple[float, float]
    log: bool = False


class Chart(NamedTuple):
    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]


def fit(
    label: str,
    values: Sequence[float],
    least: float = 0.0,
    within: tuple[float, float] = (-math.inf, math.inf),
    log: bool = False,
) -> Axis:
    """An axis over the range of the values and a margin.

    It spans at least `least` and stays `within`. With `log` it is logarithmic if the largest value
    is more than ten times the smallest.
    """
    low, high = float(min(values)), float(max(values))
    if log and 0 < 10 * low < high < 1e9 * low:
        return Axis(f'{label}, logarithmic axis', (low / 1.2, high * 1.2), True)
    margin = max(0.06 * (high - low), (least - high + low) / 2, 1e-3 * max(abs(low), abs(high)))
    return Axis(label, (max(low - margin, within[0]), min(high + (margin or 1), within[1])))


def run_charts(
    records: Sequence[dict[str, float | None]], unit: str = 'mm, or the unit of eval.spacing'
) -> list[Chart]:
    """Charts of metrics.jsonl with the same step axis; `unit` is the unit of distances."""

    def line(name: str, key: str, **options: Any) -> Line:
        pairs = [(r['step'], r[key]) for r in records if _is_finite(r.get(key))]
        return Line(name, *thin(*zip(*pairs, strict=True)) if pairs else ((), ()), **options)

    dots = {'form': 'o-'}
    rows = (
        ('Training loss', 'loss per batch', {'log': True}, [line('', 'loss')]),
        ('Validation Dice', 'mean and median over volumes', {'least': 0.05, 'within': (0, 1)},
         [line('mean', 'validation/dice', **dots),
          line('median', 'validation/dice_median', color=ORANGE, **dots)]),
        ('Validation HD95', f'mean over volumes, in {unit}', {'least': 1, 'within': (0, math.inf)},
         [line('', 'validation/hd95', **dots)]),
        ('Learning rate', 'as scheduled', {'within': (0, math.inf)}, [line('', 'learning_rate')]),
    )  # fmt: skip
    rows = [(*row, drawn) for *row, lines in rows if (drawn := [each for each in lines if each.x])]
    last = max((step for *_, lines in rows for one in lines for step in one.x), default=0)
    steps = Axis('step', (0, max(last, 1)))
    return [
        Chart(title, steps, fit(label, [y for one in lines for y in one.y], **options), lines)
        for title, label, options, lines in rows
    ]


def thin(x: Sequence[float], y: Sequence[float], most: int = 300) -> tuple[list, list]:
    """At most `most` points, each the mean over as many values."""
    size = math.ceil(len(x) / most)
    runs = [slice(i, i + size) for i in range(0, len(x), size)]
    return [float(np.mean(x[run])) for run in runs], [float(np.mean(y[run])) for run in runs]


def lesion_volume(patients: Sequence[dict[str, Any]], unit: str, words: Words = PATIENTS) -> Chart:
    """Dice against lesion volume, one dot per patient with a lesion."""
    volume = [math.prod(p['spacing']) * p['lesion_voxels'] for p in patients]
    dice = [p['dice'] for p in patients]
    titles = [
        f'{p["patient"]}: Dice {p["dice"]:.3f}, {words.lesion} {v:,.0f}'
        for p, v in zip(patients, volume, strict=True)
    ]
    return Chart(
        f'Dice against {words.size}',
        fit(f'{words.size} in {unit}', volume, log=True),
        fit(f'Dice of a {words.case}', dice, 0.05, (0, 1)),
        [Line('', volume, dice, form='o', titles=titles)],
    )


def calibration(bins: Sequence[dict[str, Any]]) -> Chart:
    """The share of foreground against its predicted probability, for bins with voxels."""
    x, y = [b['probability'] for b in bins], [b['frequency'] for b in bins]
    titles = [
        f'{b["low"]:.2f} to {b["high"]:.2f}: {b["voxels"]:,} voxels, probability '
        f'{b["probability"]:.3f}, frequency {b["frequency"]:.3f}'
        for b in bins
    ]
    inside = [i for i, value in enumerate(x) if 0.2 <= value <= 0.8]
    far = max(inside, key=lambda i: abs(y[i] - x[i]), default=None)
    at = (0.5, float(np.interp(0.5, x, y))) if far is None else (x[far], y[far])
    above = at[1] >= at[0]
    return Chart(
        'Calibration of the probability of foreground',
        Axis('predicted probability', (0, 1)),
        Axis('share of the voxels that is foreground', (0, 1)),
        [
            Line(
                'perfectly calibrated', (0, 1), (0, 1), GRAY, '--', at=(0.5, 0.5), above=not above
            ),
            Line('this run', x, y, form='o-', titles=titles, at=at, above=above),
        ],
    )


def write_curves(workdir: str | Path) -> Path | None:
    """Write WORKDIR/curves.png from WORKDIR/metrics.jsonl; None if that holds nothing yet."""
    charts = run_charts(log.read(workdir))
    if not charts:
        return None
    path = Path(workdir) / 'curves.png'
    with writing(path) as aside:
        aside.write_bytes(_saved(charts, columns=2, format='png', dpi=144))
    return path


def svg(chart: Chart) -> str:
    """An <svg> element that fills its container's width; all its text is escaped."""
    root = ElementTree.fromstring(_saved([chart], format='svg', transparent=True))
    for element in root.iter():  # a page needs no namespaces, which look like addresses
        element.tag = element.tag.split('}')[-1]
        element.attrib = {name.split('}')[-1]: value for name, value in element.attrib.items()}
    for parent in list(root.iter()):
        for child in parent.findall('metadata') + parent.findall('style'):
            parent.remove(child)
    for i, line in enumerate(chart.lines):
        dots = root.findall(f".//g[@id='line-{i}']//use") if line.titles else []
        for dot, words in zip(dots, line.titles, strict=True):
            ElementTree.SubElement(dot, 'title').text = words
    for group in root.iter('g'):  # other charts on the page use the same ids
        group.attrib.pop('id', None)
    root.attrib = {'viewBox': root.get('viewBox'), 'role': 'img', 'aria-label': chart.title}
    return ElementTree.tostring(root, 'unicode')


def _saved(charts: Sequence[Chart], columns: int = 1, **options: Any) -> bytes:
    buffer = io.BytesIO()
    nameless = {'Software': None} if options['format'] == 'png' else {'Date': None}
    with _styled():
        figure(charts, columns).savefig(buffer, metadata=nameless, **options)
    return buffer.getvalue()


def _styled() -> contextlib.AbstractContextManager:
    from matplotlib import style

    return style.context(['default', STYLE])


def figure(charts: Sequence[Chart], columns: int = 1):
    """A matplotlib Figure, row by row."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(charts) / columns)
    width, height = columns * WIDTH, rows * HEIGHT
    drawn = Figure((width / 72, height / 72))
    for i, chart in enumerate(charts):
        left = i % columns * WIDTH + LEFT
        bottom = (rows - 1 - i // columns) * HEIGHT + BOTTOM
        right = NAMES if _with_ends(chart) else RIGHT
        size = (WIDTH - LEFT - right) / width, (HEIGHT - TOP - BOTTOM) / height
        _draw(drawn.add_axes((left / width, bottom / height, *size)), chart)
    return drawn


def _draw(axes, chart: Chart) -> None:
    from matplotlib import ticker

    def words(text, x, y, place=(0, 0), **options):
        axes.annotate(text, place, (x, y), 'axes fraction', 'offset points', **options)

    words(chart.title, 8 - LEFT, 34, (0, 1), weight='bold')
    words(chart.y.label, 8 - LEFT, 14, (0, 1), color=GRAY)
    words(chart.x.label, 0, -35, (1, 0), color=GRAY, ha='right')
    for axis, name, given in ((axes.xaxis, 'x', chart.x), (axes.yaxis, 'y', chart.y)):
        axes.set(**{f'{name}lim': given.limits, f'{name}scale': 'log' if given.log else 'linear'})
        if given.log:
            few = given.limits[1] < 1e3 * given.limits[0]
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,)))
            axis.set_minor_locator(ticker.NullLocator())
        else:
            axis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 5, 10), min_n_ticks=3))
        axis.set_major_formatter(lambda value, _: _number(value))
    taken = -math.inf
    for i, line in enumerate(chart.lines):
        form = 'o' if len(line.x) == 1 else line.form
        axes.plot(line.x, line.y, form, color=line.color, gid=f'line-{i}', clip_on=False, alpha=0.9)
        if line.at:
            ha, va, shift = ('right', 'bottom', (-5, 4)) if line.above else ('left', 'top', (5, -4))
            axes.annotate(
                line.name, line.at, shift, 'data', 'offset points',
                color=line.color, ha=ha, va=va,
            )  # fmt: skip
    for line in sorted(_with_ends(chart), key=lambda line: line.y[-1]):
        x, y = (axes.transData - axes.transAxes).transform((line.x[-1], line.y[-1]))
        taken = max(y * (HEIGHT - TOP - BOTTOM), taken + NAME_HEIGHT)
        words(
            f'{line.name} {line.y[-1]:.3g}'.strip(), 7 + x * (WIDTH - LEFT - NAMES), taken,
            color=line.color, va='center',
        )  # fmt: skip


def _with_ends(chart: Chart) -> list[Line]:
    """The lines whose names stand at their ends."""
    return [line for line in chart.lines if line.at is None and '-' in line.form]


def _number(value: float) -> str:
    return f'{value:,.0f}' if 1000 <= abs(value) < 1e10 else f'{value:g}'


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
