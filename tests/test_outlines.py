"""Outlines to masks, against exact fractions, equations and distances."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import spatial

from pspnet_jax.data.formats import outlines
from pspnet_jax.data.formats.outlines import Shape, check_shapes, rasterize
from pspnet_jax.runtime.errors import DataError


def polygon(*points, label=1):
    return Shape('polygon', np.array(points, np.float64).reshape(-1, 2), label)


def ellipse(x, y, rx, ry, theta=0.0):
    return Shape('ellipse', np.array([(x, y)], np.float64), radii=(rx, ry), theta=theta)


def centres(size):
    """x and y of every pixel's centre, each H W."""
    return np.meshgrid(np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5)


def exactly_inside(points, x, y):
    """Even-odd in fractions, by a ray upwards from a point just right of and below (x, y)."""
    x, y = Fraction(x) + Fraction(1, 10**9), Fraction(y) + Fraction(1, 10**18)
    inside = False
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
        x0, y0, x1, y1 = map(Fraction, (x0, y0, x1, y1))
        if (x0 < x) != (x1 < x) and y0 + (x - x0) * (y1 - y0) / (x1 - x0) < y:
            inside = not inside
    return inside


# In halves of a pixel, so that many corners and edges go right through centres.
@pytest.mark.parametrize('steps', [1, 2, 64])
@pytest.mark.parametrize('seed', range(8))
def test_polygons_are_those_of_exact_fractions(seed, steps):
    rng = np.random.default_rng(seed)
    size = (9, 11)
    for corners in (3, 4, 7, 12):
        points = rng.integers(-3 * steps, 14 * steps, (corners, 2)) / steps
        mask = rasterize([polygon(*points)], size)
        for r, c in np.ndindex(size):
            assert mask[r, c] == exactly_inside(points.tolist(), c + 0.5, r + 0.5), (points, r, c)


@pytest.mark.parametrize('seed', range(10))
def test_triangles_that_share_edges_own_each_pixel_once(seed):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-2, 34, (40, 2)) if seed % 2 else rng.integers(0, 65, (40, 2)) / 2
    points = np.rint(points * outlines.ONE) / outlines.ONE  # else a hull point may be a hair inside
    mesh = spatial.Delaunay(points)
    size = (32, 32)
    owners = sum(rasterize([polygon(*points[corners])], size) for corners in mesh.simplices)
    hull = spatial.ConvexHull(points)
    assert (owners == rasterize([polygon(*points[hull.vertices])], size)).all()


def test_any_two_polygons_along_one_line_own_each_pixel_once(rng):
    """Their shared edge has corners of any float, and is gone along once each way."""
    for _ in range(50):
        a, b = np.array([rng.uniform(0, 20), 0.0]), np.array([rng.uniform(0, 20), 20.0])
        left = rasterize([polygon((0, 0), a, b, (0, 20))], (20, 20))
        right = rasterize([polygon((20, 20), b, a, (20, 0))], (20, 20))
        assert (left + right == 1).all()


def test_a_rectangle_has_its_left_and_upper_edge_only():
    expected = np.zeros((8, 8), np.uint8)
    expected[2:5, 1:6] = 1
    for shift in (0.0, 0.5, 0.3):  # whole pixels, from centre to centre, in between
        box = (1 + shift, 2 + shift, 6 + shift, 5 + shift)
        (x0, y0, x1, y1), by = box, int(shift > 0.5)
        mask = rasterize([polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))], (8, 8))
        assert (mask == np.roll(expected, by, (0, 1))).all(), shift


def test_later_shapes_cover_earlier_ones():
    square = [(0, 0), (4, 0), (4, 4), (0, 4)]
    small = [(1, 1), (2, 1), (2, 2), (1, 2)]
    mask = rasterize([polygon(*square, label=7), polygon(*small, label=0)], (5, 5))
    expected = np.zeros((5, 5), np.uint8)
    expected[:4, :4] = 7
    expected[1, 1] = 0
    assert (mask == expected).all()
    assert (rasterize([polygon(*small, label=3), polygon(*square, label=7)], (5, 5)) <= 7).all()
    assert rasterize([polygon(*small, label=3), polygon(*square, label=7)], (5, 5))[1, 1] == 7


def test_what_is_enclosed_twice_is_outside():
    star = [
        (10 + 9 * math.sin(i * 0.8 * math.pi), 10 - 9 * math.cos(i * 0.8 * math.pi))
        for i in range(5)
    ]
    mask = rasterize([polygon(*star)], (20, 20))
    assert mask[10, 10] == 0  # the middle of a pentagram
    assert mask[3, 9] == 1  # its upper tip


@pytest.mark.parametrize('seed', range(6))
def test_circles_and_ellipses_are_their_equation(seed):
    rng = np.random.default_rng(seed)
    x, y, a, b = (int(n) for n in rng.integers((5, 5, 1, 1), (25, 15, 13, 9)))
    for cx, cy, rx, ry in ((x, y, a, b), (x + 0.5, y + 0.5, 5, 5)):  # 3, 4, 5: on the circle
        mask = rasterize([ellipse(cx, cy, rx, ry)], (20, 30))
        for r, c in np.ndindex(mask.shape):
            u, v = c + Fraction(1, 2) - Fraction(cx), r + Fraction(1, 2) - Fraction(cy)
            assert mask[r, c] == ((u / rx) ** 2 + (v / ry) ** 2 < 1)


@pytest.mark.parametrize('theta', [0.0, 0.4, -1.1, math.pi / 2, 3.0])
def test_an_ellipse_is_turned_from_x_towards_y(theta):
    x, y, rx, ry = 20.3, 19.8, 15.0, 4.0
    mask = rasterize([ellipse(x, y, rx, ry, theta)], (40, 40))
    # Where VIA draws the two handles of an ellipse, just inside them.
    for reach, angle in ((0.93 * rx, theta), (0.8 * ry, theta - math.pi / 2)):
        column, row = x + reach * math.cos(angle), y + reach * math.sin(angle)
        assert mask[int(row), int(column)] == 1
    turn = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    form = np.linalg.inv(turn @ np.diag([rx**2, ry**2]) @ turn.T)
    d = np.stack(centres((40, 40)), -1) - (x, y)
    value = np.einsum('hwi,ij,hwj->hw', d, form, d)
    assert (mask == (value < 1))[np.abs(value - 1) > 1e-9].all()


@pytest.mark.parametrize('width', [1.0, 3.0, 6.5])
def test_a_polyline_is_what_lies_within_half_its_width(rng, width):
    for _ in range(5):
        points = rng.uniform(-4, 28, (4, 2))
        x, y = centres((24, 24))
        distance = np.full(x.shape, np.inf)
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / np.hypot(x1 - x0, y1 - y0) ** 2
            along = along.clip(0, 1)
            away = np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0))
            distance = np.minimum(distance, away)
        mask = rasterize([Shape('polyline', points)], x.shape, line_width=width)
        sure = np.abs(distance - width / 2) > 1e-3
        assert (mask == (distance < width / 2))[sure].all()


def test_a_level_line_between_two_rows_is_one_row():
    mask = rasterize([Shape('polyline', np.array([(2.0, 4.0), (9.0, 4.0)]))], (8, 12))
    assert mask.sum() == 7
    assert (mask[4, 2:9] == 1).all() or (mask[3, 2:9] == 1).all()


def runs_of(inside):
    """(first, after the last) of each run of True, counted down the columns: by hand."""
    flat = [False, *inside.T.ravel().tolist(), False]
    changes = [i for i in range(1, len(flat)) if flat[i] != flat[i - 1]]
    return np.array([i - 1 for i in changes], int).reshape(-1, 2)


def mask(inside, x=0, y=0):
    return Shape('mask', np.array([(x, y)], float), size=inside.shape, runs=runs_of(inside))


@pytest.mark.parametrize('band', [1, 37, outlines.BAND])
@pytest.mark.parametrize(('x', 'y'), [(0, 0), (3, 2), (-4, -5), (7, -2), (-20, 0), (0, 30)])
def test_a_mask_is_its_runs_where_the_picture_is(rng, monkeypatch, x, y, band):
    monkeypatch.setattr(outlines, 'BAND', band)
    for share in (0.1, 0.5, 0.95, 1.0):
        inside = rng.random((9, 12)) < share
        whole = np.zeros((60, 60), bool)  # the picture is in its middle
        whole[20 + y : 29 + y, 20 + x : 32 + x] = inside
        expected = whole[20:30, 20:31]
        assert (rasterize([mask(inside, x, y)], (10, 11)) == expected).all()
    together = [mask(inside, x, y)._replace(label=3), polygon((0, 0), (2, 0), (2, 2), (0, 2))]
    assert (rasterize(together, (10, 11))[:2, :2] == 1).all()


def test_runs_that_meet_or_are_empty_are_one():
    runs = np.array([[2, 4], [4, 4], [4, 7], [9, 9]])
    found = rasterize([Shape('mask', np.zeros((1, 2)), size=(5, 4), runs=runs)], (5, 4))
    assert np.flatnonzero(found.T.ravel()).tolist() == [2, 3, 4, 5, 6]


def test_bands_and_batches_change_nothing(rng, monkeypatch):
    shapes = [
        polygon(*rng.uniform(-10, 70, (30, 2)), label=1),
        ellipse(30, 20, 25, 9, 0.5)._replace(label=2),
        mask(rng.random((30, 40)) < 0.4, 15, -3)._replace(label=3),
    ]
    whole = rasterize(shapes, (50, 60))
    monkeypatch.setattr(outlines, 'BAND', 130)
    monkeypatch.setattr(
        outlines, '_batches', lambda counts, real=outlines._batches: real(counts, 7)
    )
    assert (rasterize(shapes, (50, 60)) == whole).all()


SQUARE = [(2, 2), (8, 2), (8, 8), (2, 8)]


@pytest.mark.parametrize(
    ('shape', 'fault', 'note'),
    [
        (polygon(*SQUARE), '', ''),
        (polygon(*SQUARE[:2]), 'only 2 points, but a polygon needs 3', ''),
        (polygon(), 'only 0 points', ''),
        (Shape('polyline', np.array([(1.0, 1.0)])), 'only 1 points, but a polyline needs 2', ''),
        (Shape('polyline', np.array([(1.0, 1.0)] * 3)), 'no area', ''),
        (polygon((1, 1), (3, 3), (7, 7)), 'no area', ''),
        (polygon((1, 1), (1, 1), (1, 1)), 'no area', ''),
        (ellipse(5, 5, 3, 0), 'no area', ''),
        (polygon((20, 2), (30, 2), (30, 8)), 'outside the image', ''),
        (polygon((-9, -1), (-1, -9), (12, 30), (-20, 30), (-20, -9)), '', 'out of the image'),
        (polygon((6, -9), (30, -9), (30, 6)), 'outside the image', ''),  # around a corner
        (ellipse(-9, 5, 3, 3), 'outside the image', ''),
        (ellipse(0, 5, 3, 3), '', 'reaches 3.0 pixels out of the image'),
        (polygon((2, 2), (10.4, 2), (10.4, 8)), '', ''),  # less than a pixel is no news
        (polygon((1, 1), (8, 8), (8, 1), (1, 8)), '', 'crosses itself'),
        (polygon((1, 1), (5, 5), (8, 8), (8, 1), (5, 5), (1, 8)), '', ''),  # touches itself
        (polygon((4.6, 4.6), (4.9, 4.6), (4.9, 4.9)), '', "no pixel's centre"),
        (Shape('polyline', np.array([(1.0, 1.0), (5.0, 5.0)])), '', 'open line'),
        (mask(np.ones((3, 4), bool), 5, 5), '', ''),
        (mask(np.zeros((3, 4), bool)), 'no area', ''),
        (mask(np.ones((3, 4), bool), 20, 5), 'outside the image', ''),
        (mask(np.ones((3, 4), bool), 8, 5), '', 'reaches 2.0 pixels out of the image'),
    ],
)
def test_faults_and_notes(shape, fault, note):
    faults, notes = check_shapes([polygon(*SQUARE), shape._replace(where='it')], (9, 10))
    for found, expected in ((faults, fault), (notes, note)):
        assert len(found) == bool(expected), found
        assert not expected or (expected in found[0] and found[0].startswith('it ')), found


@pytest.mark.parametrize('seed', range(3))
def test_crossings_are_those_of_every_pair_of_edges(seed):
    rng = np.random.default_rng(seed)

    def side(a, b, p):
        return np.sign((b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]))

    seen = set()
    for _ in range(60):
        points = rng.integers(0, 9, (5, 2)).tolist()
        edges = list(zip(points, [*points[1:], points[0]], strict=True))
        expected = any(
            side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
            for (a, b), (c, d) in itertools.combinations(edges, 2)
        )
        found, pairs = outlines._crosses_itself(outlines._grid(np.array(points, float)), 10**6)
        assert found == expected
        assert pairs <= 10
        seen.add(found)
    assert seen == {True, False}


def test_what_would_take_minutes_is_refused_at_once():
    size = (4000, 4000)
    full = polygon((0, 0), (4000, 0), (4000, 4000), (0, 4000))
    comb = np.stack([np.arange(400_000) % 4000, np.tile((0, 4000), 200_000)], axis=-1)
    lines = Shape('polyline', np.array([(0, 0), (4000, 4000)] * 500, np.float64))
    whole = Shape('mask', np.zeros((1, 2)), size=size, runs=np.array([[0, 16_000_000]]))
    for shapes in ([full] * 2000, [polygon(*comb)], [lines], [whole] * 2000):
        assert 'times the limit' in check_shapes(shapes, size)[0][0]
        with pytest.raises(DataError, match='times the limit'):
            rasterize(shapes, size)


@pytest.mark.parametrize('bad', [math.nan, math.inf, 1e300, -3e5])
def test_coordinates_that_no_picture_has_are_refused(bad):
    for shape in (polygon((0, 0), (bad, 5), (5, 5)), ellipse(3, 3, abs(bad), 2)):
        assert 'coordinates beyond' in check_shapes([shape], (9, 9))[0][0]
        with pytest.raises(DataError, match='coordinates beyond'):
            rasterize([shape], (9, 9))


@pytest.mark.parametrize('size', [(0, 5), (70_000, 10), (60_000, 60_000)])
def test_sizes_that_no_picture_has_are_refused(size):
    with pytest.raises(DataError, match='too large for a mask'):
        rasterize([], size)
