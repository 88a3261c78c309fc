"""Metrics on masks drawn by hand, and against brute force."""

import itertools

import numpy as np
import pytest

from pspnet_jax import metrics


def grid(text):
    return np.array([[int(c) for c in row.split()] for row in text.strip().splitlines()])


TRUE = grid("""
    0 0 1 1
    0 0 1 1
    0 0 0 0
    2 2 255 255
""")
PRED = grid("""
    0 1 1 1
    0 1 1 0
    0 0 0 2
    2 0 1 2
""")


def test_counts_by_hand():
    assert metrics.counts(PRED, TRUE, 3).tolist() == [
        [5, 2, 3],  # background: 5 hit; 1 of class 1, 1 of class 2 called background; 3 lost
        [3, 2, 1],
        [1, 1, 1],
    ]


def test_counts_add_up():
    parts = [metrics.counts(p, t, 3) for p, t in zip(PRED, TRUE, strict=True)]
    assert (np.sum(parts, axis=0) == metrics.counts(PRED, TRUE, 3)).all()


def test_ratios_by_hand():
    ratios = metrics.ratios(np.array([[3, 2, 1], [0, 0, 0], [0, 0, 4]]))
    np.testing.assert_allclose(ratios['dice'], [6 / 9, np.nan, 0])
    np.testing.assert_allclose(ratios['iou'], [3 / 6, np.nan, 0])
    np.testing.assert_allclose(ratios['sensitivity'], [3 / 4, np.nan, 0])
    np.testing.assert_allclose(ratios['precision'], [3 / 5, np.nan, np.nan])


def test_largest_component_connects_corners_and_slices():
    mask = np.zeros((3, 5, 5), bool)
    mask[0, 2, 2] = mask[1, 3, 3] = mask[2, 4, 4] = True  # one diagonal of three
    expected = mask.copy()
    mask[0, 0, :2] = True  # one of two, the first that a scan meets
    assert (metrics.largest_component(mask) == expected).all()
    assert not metrics.largest_component(np.zeros((2, 2, 2), bool)).any()


def brute_force_hd95(a, b, spacing):
    def surface(mask):
        padded = np.pad(mask, 1)
        for z, y, x in np.argwhere(padded):
            steps = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0), (0, 0, -1))
            if not all(padded[z + i, y + j, x + k] for i, j, k in steps):
                yield np.array([z, y, x]) * spacing

    def directed(these, those):
        return np.percentile([min(np.linalg.norm(p - q) for q in those) for p in these], 95)

    a, b = list(surface(a)), list(surface(b))
    return max(directed(a, b), directed(b, a))


@pytest.mark.parametrize('spacing', [(1.0, 1.0, 1.0), (3.0, 0.5, 0.8)])
def test_hd95_equals_brute_force(rng, spacing):
    for _ in range(3):
        a, b = rng.random((2, 5, 7, 6)) < 0.15
        assert metrics.hd95(a, b, spacing) == pytest.approx(brute_force_hd95(a, b, spacing))


def test_hd95_of_a_shift_is_the_shift():
    a, b = np.zeros((2, 3, 20, 20), bool)
    a[1, 5:9, 5:9] = True
    b[1, 5:9, 8:12] = True
    assert metrics.hd95(a, b, (1, 1, 2.0)) == pytest.approx(6.0)
    assert metrics.hd95(a, a, (1, 1, 1)) == 0


def test_hd95_without_a_surface_is_undefined():
    empty, full = np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool)
    for a, b in itertools.product((empty, full), repeat=2):
        assert np.isnan(metrics.hd95(a, b, (1, 1, 1))) == (not (a.any() and b.any()))


def test_bootstrap_interval_narrows_with_the_number_of_patients(rng):
    few, many = rng.normal(0.8, 0.1, 10), rng.normal(0.8, 0.1, 1000)
    for values in (few, many):
        low, high = metrics.bootstrap_ci(values)
        assert low < values.mean() < high
        # The interval of a mean is about 2 x 1.96 standard errors wide.
        expected = 2 * 1.96 * values.std() / np.sqrt(len(values))
        assert high - low == pytest.approx(expected, rel=0.15)
    assert metrics.bootstrap_ci(few) == metrics.bootstrap_ci(np.append(few, np.nan))
