"""Charts: ticks that are round, and the same points in both drawings."""

import re

import numpy as np
import pytest
from PIL import ImageColor

from pspnet_jax import chart
from pspnet_jax.chart import Chart, Series


@pytest.mark.parametrize(
    ('low', 'high'), [(0, 1), (0, 260), (0.81, 0.93), (-3, 7), (1e-6, 3e-4), (0, 1e7), (5, 5.001)]
)
def test_ticks_are_a_few_round_numbers_within_the_range(low, high):
    found = chart.ticks(low, high)
    assert 3 <= len(found) <= 7
    assert all(low - 1e-12 <= t <= high + 1e-12 for t in found)
    step = found[1] - found[0]
    assert f'{step:.0e}'[0] in '125'
    np.testing.assert_allclose(np.diff(found), step)
    np.testing.assert_allclose(np.remainder(np.array(found) / step + 0.5, 1), 0.5, atol=1e-6)


@pytest.mark.parametrize(('low', 'high'), [(40, 90_000), (100, 900), (3, 12)])
def test_log_ticks_are_within_the_range(low, high):
    found = chart.log_ticks(low, high)
    assert len(found) >= 2
    assert low <= min(found)
    assert max(found) <= high


X, Y = [10, 100, 1000, 20], [0.1, 0.9, 0.5, 0.3]


def drawn(**options):
    dots = Series('', X, Y, line=False, dots=True, titles=['<b>&"', 'b', 'c', 'd'])
    return Chart('t', 'x', 'y', [dots], y_range=(0, 1), **options)


@pytest.mark.parametrize('x_log', [False, True])
def test_places_are_a_linear_map_of_the_points(x_log):
    svg = chart.svg(drawn(x_log=x_log))
    circles = np.array(re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg), float)
    x = np.log10(X) if x_log else np.array(X, float)
    for place, value, sign in ((circles[:, 0], x, 1), (circles[:, 1], np.array(Y), -1)):
        slope, start = np.polyfit(value, place, 1)
        np.testing.assert_allclose(slope * value + start, place, atol=0.1)
        assert sign * slope > 0  # to the right, and up


def test_the_picture_has_the_dots_where_the_svg_has_them():
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart.svg(drawn()))
    pixels = chart.picture(drawn(), scale=3)
    assert pixels.shape == (3 * chart.HEIGHT, 3 * chart.WIDTH, 3)
    blue = (pixels == ImageColor.getrgb(chart.BLUE)).all(-1)
    for x, y in circles:
        assert blue[round(3 * float(y)), round(3 * float(x))]
    assert blue.sum() < 4 * 3.2 * (3 * 4) ** 2  # four dots, and nothing else


def test_words_in_an_svg_are_escaped():
    assert '<title>&lt;b&gt;&amp;&quot;</title>' in chart.svg(drawn())


@pytest.mark.parametrize('points', [([], []), ([5], [0.5]), ([5, 5], [1, 1])])
def test_no_range_is_too_small(points):
    one = Chart('t', 'x', 'y', [Series('s', *points)])
    assert 'nan' not in chart.svg(one)
    assert chart.picture(one).shape[-1] == 3
