"""Charts: the points that were given, told apart by axis, name and colour."""

import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from pspnet_jax.evaluation import charts
from pspnet_jax.evaluation.charts import Axis, Chart, Line
from tests import test_layering

X, Y = [10, 100, 1000, 20], [0.1, 0.9, 0.5, 0.3]
HOSTILE = '</title><script>"$x^2$&'
RECORDS = [{'step': s, 'loss': 2.0 / s, 'learning_rate': 1e-3} for s in range(1, 900)] + [
    {'step': s, 'validation/dice': s / 1000, 'validation/dice_median': None, 'validation/hd95': 4}
    for s in (300, 600, 899)
]
# Colours as those see them who lack a kind of cone (Machado, Oliveira and Fernandes 2009, of
# linear RGB): protanopia, deuteranopia, tritanopia.
BLIND = np.array([
    [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
])  # fmt: skip


def dots(x_log=False):
    line = Line('', X, Y, form='o', titles=[HOSTILE, 'b', 'c', 'd'])
    return Chart(HOSTILE, Axis('x', (5, 2000), x_log), Axis('y', (0, 1)), [line])


def drawn(chart):
    """The axes of a chart, drawn."""
    with charts._styled():
        figure = charts.figure([chart])
        figure.canvas.draw()
    return figure.axes[0]


def named(axes):
    """{text: matplotlib's Text} of the names of lines: all but the title and the axes' labels."""
    return {text.get_text(): text for text in axes.texts[3:]}


def places(svg):
    """(N, 2) of the dots that say something."""
    return np.array([
        [float(dot.get(axis)) for axis in 'xy']
        for dot in ElementTree.fromstring(svg).iter('use') if dot.find('title') is not None
    ])  # fmt: skip


def test_lines_have_the_points_of_the_records():
    for chart in charts.run_charts(RECORDS):
        for line, given_line in zip(drawn(chart).lines, chart.lines, strict=True):
            np.testing.assert_array_equal(line.get_xydata().T, [given_line.x, given_line.y])
    _, dice, hd95, rate = charts.run_charts(RECORDS)
    assert [line.name for line in dice.lines] == ['mean']  # there is no median
    assert (dice.lines[0].x, dice.lines[0].y) == ([300, 600, 899], [0.3, 0.6, 0.899])
    assert hd95.lines[0].y == [4] * 3
    assert rate.lines[0].y == pytest.approx([1e-3] * 300)
    assert charts.run_charts([{'step': 1, 'loss': None}]) == []


def test_curves_are_thinned_to_means():
    x, y = charts.thin(range(1, 1001), np.arange(1000.0) % 4)
    assert len(x) == 250
    assert set(y) == {1.5}
    assert [len(chart.lines[0].x) for chart in charts.run_charts(RECORDS)] == [300, 3, 3, 300]


def test_training_and_validation_share_a_step_axis():
    found = charts.run_charts(RECORDS)
    assert len(found) == 4
    assert {drawn(chart).get_xlim() for chart in found} == {(0, 899)}
    frames = {drawn(chart).get_position().bounds for chart in found}
    assert len(frames) == 1  # below each other, the same step is at the same place


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e39, 1e39), min_size=1), st.booleans(), st.sampled_from((0, 0.05, 1)))
def test_an_axis_is_no_wider_than_its_values_need(values, log, least):
    axis = charts.fit('label', values, least, log=log)
    low, high = axis.limits
    assert low <= min(values) <= max(values) <= high
    assert low < high
    span = max(values) - min(values)
    if axis.log:
        assert min(values) > 0
        assert high / low <= 1.5 * max(values) / min(values)
        assert axis.label == 'label, logarithmic axis'
    elif span:
        floor = max(least, 0.002 * max(map(abs, values)))
        assert high - low <= max(1.13 * span, span + floor) * (1 + 1e-9)


def test_an_axis_shows_small_differences_and_not_what_cannot_be():
    low, high = charts.fit('Dice', [0.93, 0.99], 0.05, (0, 1)).limits
    assert 0.9 < low < 0.93
    assert 0.99 < high <= 1
    assert charts.fit('Dice', [1.0, 1.0], 0.05, (0, 1)).limits == (0.975, 1)
    assert charts.fit('HD95', [0.0], 1, (0, np.inf)).limits == (0, 0.5)
    assert charts.fit('loss', [2.0, 0.1], log=True).log
    assert not charts.fit('loss', [2.0, 0.3], log=True).log
    assert not charts.fit('loss', [2.0, 0.0], log=True).log
    assert not charts.fit('step', [1, 1000]).log


@pytest.mark.parametrize('apart', [0.1, 1e-6])
def test_names_stand_at_the_ends_of_lines_and_not_on_each_other(apart):
    records = [{'step': s, 'validation/dice': 0.9 + s * apart / 1000,
                'validation/dice_median': 0.9} for s in (100, 900)]  # fmt: skip
    (chart,) = charts.run_charts(records)
    axes = drawn(chart)
    assert axes.get_legend() is None
    names = named(axes)
    assert names.keys() == {f'mean {0.9 + 0.9 * apart:.3g}', 'median 0.9'}
    boxes = []
    for line in axes.lines:
        (text,) = (t for t in names.values() if t.get_color() == line.get_color())
        box = text.get_window_extent()
        end = axes.transData.transform(line.get_xydata()[-1])
        assert 0 < box.x0 - end[0] < 12
        assert abs((box.y0 + box.y1) / 2 - end[1]) < 30
        assert box.x1 < axes.figure.bbox.x1
        boxes.append(box)
    assert not boxes[0].overlaps(boxes[1])


def test_calibration_is_named_beside_its_lines():
    for power in (2, 0.5):
        axes = drawn(charts.calibration([
            {'low': p, 'high': p, 'voxels': 9, 'probability': p, 'frequency': p**power}
            for p in (0.05, 0.35, 0.65, 0.95)
        ]))  # fmt: skip
        names, canvas = named(axes), axes.figure.bbox
        assert names.keys() == {'this run', 'perfectly calibrated'}
        curve = axes.transData.transform(axes.lines[1].get_xydata())
        for text in names.values():
            assert text.get_color() == axes.lines[text.get_text() == 'this run'].get_color()
            box = text.get_window_extent()
            assert axes.bbox.x0 < box.x0 < box.x1 < canvas.x1
            along = np.linspace(box.x0, box.x1)
            for line in (curve, axes.transData.transform(axes.lines[0].get_xydata())):
                height = np.interp(along, *line.T)
                assert ((height < box.y0) | (height > box.y1)).all(), text


def test_the_unit_is_in_words():
    labels = [c.y.label for c in charts.run_charts(RECORDS, 'millimetres')]
    assert labels[2] == 'mean over volumes, in millimetres'
    assert 'mm, or the unit of eval.spacing' in charts.run_charts(RECORDS)[2].y.label
    patient = {'patient': 'a', 'dice': 0.5, 'lesion_voxels': 8, 'spacing': [2, 1, 1]}
    chart = charts.lesion_volume([patient], 'cubic millimetres')
    assert chart.x.label == 'lesion volume in cubic millimetres'
    assert chart.lines[0].x == [16]
    texts = [text.get_text() for text in drawn(chart).texts]
    assert texts == [chart.title, chart.y.label, chart.x.label]


def linear(colors):
    """(N, 3) in 0..1 of '#rrggbb', without sRGB's gamma."""
    rgb = np.array([ImageColor.getrgb(color) for color in colors]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(linear_N3):
    """CIE L*a*b* under D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    t = np.clip(linear_N3, 0, 1) @ np.transpose(to_xyz) / (0.9505, 1, 1.089)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=-1
    )


@pytest.mark.parametrize('sight', [np.eye(3), *BLIND], ids=['all', 'protan', 'deutan', 'tritan'])
def test_colours_are_told_apart_by_colour_blind_eyes(sight):
    seen = lab(linear([charts.BLUE, charts.ORANGE, charts.GRAY, '#ffffff']) @ sight.T)
    distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert distances[np.triu_indices(4, 1)].min() > 20  # 2.3 is just noticeable


def test_names_can_be_read_on_white():
    luminance = linear([charts.BLUE, charts.ORANGE, charts.GRAY]) @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05) > 4.5).all()  # WCAG's contrast for text


@pytest.mark.parametrize('x_log', [False, True])
def test_places_are_a_linear_map_of_the_points(x_log):
    found = places(charts.svg(dots(x_log)))
    x = np.log10(X) if x_log else np.array(X, float)
    for place, value, sign in ((found[:, 0], x, 1), (found[:, 1], np.array(Y), -1)):
        slope, start = np.polyfit(value, place, 1)
        np.testing.assert_allclose(slope * value + start, place, atol=0.1)
        assert sign * slope > 0  # to the right, and up


def test_the_picture_has_the_dots_where_the_svg_has_them():
    chart = dots()
    png = charts._saved([chart, chart, chart], columns=2, format='png', dpi=144)
    pixels = np.array(Image.open(io.BytesIO(png)).convert('RGB'), int)
    assert pixels.shape == (4 * charts.HEIGHT, 4 * charts.WIDTH, 3)
    blue = np.abs(pixels - ImageColor.getrgb(charts.BLUE)).max(-1) < 40  # they let 10 % through
    for x, y in 2 * places(charts.svg(chart)):
        for row, column in ((0, 0), (0, 1), (1, 0)):
            place = round(y) + row * 2 * charts.HEIGHT, round(x) + column * 2 * charts.WIDTH
            assert blue[place]
    assert (pixels[2 * charts.HEIGHT :, 2 * charts.WIDTH :] == 255).all()  # there is no fourth


def test_words_in_an_svg_are_escaped_and_stand_as_they_are():
    svg = charts.svg(dots())
    assert '<script' not in svg
    root = ElementTree.fromstring(svg)
    assert root.get('aria-label') == HOSTILE
    assert root.find('.//use/title').text == HOSTILE
    assert HOSTILE in [text.text for text in root.iter('text')]  # no formula either


def test_an_svg_is_the_same_bytes_whatever_the_users_settings(monkeypatch):
    import matplotlib

    expected = charts.svg(dots())
    assert 'id="line' not in expected  # a page has several
    assert not re.search(r'https?:|xmlns|<style|<metadata|20\d\d-\d\d', expected)
    with matplotlib.rc_context({'text.usetex': True, 'lines.linewidth': 9, 'font.size': 30}):
        assert charts.svg(dots()) == expected


@pytest.mark.parametrize('points', [([5], [0.5]), ([5, 5], [1, 1]), ([0, 0], [0, 0])])
def test_no_range_is_too_small(points):
    chart = Chart('t', charts.fit('x', points[0]), charts.fit('y', points[1]), [Line('s', *points)])
    assert 'nan' not in charts.svg(chart)
    assert drawn(chart).lines[0].get_marker() == ('o' if len(points[0]) == 1 else 'None')


def test_matplotlib_and_jinja2_are_imported_only_to_draw():
    for path in test_layering.FILES:
        names = {name.split('.')[0] for name in test_layering.imports(path, inside=False)}
        assert not names & {'matplotlib', 'jinja2', 'markupsafe'}, path
