"""Metrics on masks drawn by hand, and against brute force."""

import functools
import itertools

import numpy as np
import pytest
from scipy import ndimage

from pspnet_jax.evaluation import metrics
from pspnet_jax.inference import postprocess


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
    assert (postprocess.largest_component(mask) == expected).all()
    assert not postprocess.largest_component(np.zeros((2, 2, 2), bool)).any()


def brute_force_distances(a, b, spacing):
    """Of each surface voxel of `a` to the nearest of `b`, and back, over all pairs."""

    def surface(mask):
        padded = np.pad(mask, 1)
        for z, y, x in np.argwhere(padded):
            steps = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0), (0, 0, -1))
            if not all(padded[z + i, y + j, x + k] for i, j, k in steps):
                yield np.array([z, y, x]) * spacing

    def directed(these, those):
        return [min(np.linalg.norm(p - q) for q in those) for p in these]

    a, b = list(surface(a)), list(surface(b))
    return directed(a, b), directed(b, a)


@pytest.mark.parametrize('spacing', [(1.0, 1.0, 1.0), (3.0, 0.5, 0.8)])
def test_distances_of_surfaces_equal_brute_force(rng, spacing):
    for _ in range(3):
        a, b = ndimage.binary_dilation(rng.random((2, 5, 7, 6)) < 0.04, np.ones((1, 2, 2, 2)))
        there, back = brute_force_distances(a, b, spacing)
        hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
        assert metrics.hd95(a, b, spacing) == pytest.approx(hd95)
        assert metrics.assd(a, b, spacing) == pytest.approx(np.mean(there + back))
        for tolerance in (0.0, 0.9, 1.75, 3.1):
            share = sum(d <= tolerance for d in there + back) / len(there + back)
            assert metrics.surface_dice(a, b, spacing, tolerance) == pytest.approx(share)


def test_hd95_of_a_shift_is_the_shift():
    a, b = np.zeros((2, 3, 20, 20), bool)
    a[1, 5:9, 5:9] = True
    b[1, 5:9, 8:12] = True
    assert metrics.hd95(a, b, (1, 1, 2.0)) == pytest.approx(6.0)
    assert metrics.hd95(a, a, (1, 1, 1)) == 0


def two_blobs(rng, shape):
    """Two ellipsoids that overlap."""
    centre, grid = np.array(shape) / 2, np.moveaxis(np.indices(shape), 0, -1)
    for _ in range(2):
        place, radius = centre + rng.uniform(-2, 2, len(shape)), rng.uniform(3, 6, len(shape))
        yield (((grid - place) / radius) ** 2).sum(-1) < 1


def outline_distances(a, b, spacing):
    """`brute_force_distances` of two pictures H W."""

    def outline(mask):
        padded = np.pad(mask, 1)
        for y, x in np.argwhere(padded):
            if not all(padded[y + i, x + j] for i, j in ((1, 0), (0, 1), (-1, 0), (0, -1))):
                yield np.array([y, x]) * spacing

    a, b = np.array(list(outline(a))), np.array(list(outline(b)))
    apart = np.linalg.norm(a[:, None] - b, axis=-1)
    return apart.min(1), apart.min(0)


def test_the_surface_of_a_picture_is_its_outline():
    """A square of 40 x 40 predicted 5 pixels too wide. Where the slice axis counted, every pixel
    was surface: HD95 was 3, ASSD 0.18 and surface Dice 0.95.
    """
    true, pred = np.zeros((2, 80, 80), bool)
    true[20:60, 20:60] = pred[20:60, 20:65] = True
    both = np.concatenate(outline_distances(pred, true, (1, 1)))
    for axis in range(3):  # whichever axis is the single slice's
        pair, spacing = [np.expand_dims(mask, axis) for mask in (pred, true)], np.ones(3)
        spacing[axis] = 7.0  # says nothing
        assert metrics.hd95(*pair, spacing) == 5
        assert metrics.assd(*pair, spacing) == pytest.approx(both.mean())
        assert both.mean() == pytest.approx(1.21, abs=0.01)
        assert metrics.surface_dice(*pair, spacing, 1.0) == pytest.approx((both <= 1).mean())
        assert (both <= 1).mean() == pytest.approx(0.75, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(1, 24, 30), (9, 14, 16)])
def test_distances_are_monais_and_medpys(rng, shape):
    reason = 'the reference: pip install monai==1.6.1 MedPy==0.5.2'
    torch = pytest.importorskip('torch', reason='MONAI needs PyTorch')
    monai = pytest.importorskip('monai.metrics', reason=reason)
    medpy = pytest.importorskip('medpy.metric.binary', reason=reason)
    flat = shape[0] == 1
    spacing = (4.0, 0.7, 0.9)
    for _ in range(4):
        a, b = two_blobs(rng, shape[flat:])
        ours = (*(mask.reshape(shape) for mask in (a, b)), spacing)
        one_hot = [
            torch.from_numpy(np.stack([~mask, mask])[None].astype(np.float32)) for mask in (a, b)
        ]
        options = {'include_background': False, 'spacing': spacing[flat:]}
        hausdorff = monai.compute_hausdorff_distance(*one_hot, percentile=95, **options)
        assert metrics.hd95(*ours) == pytest.approx(hausdorff.item(), rel=1e-5)
        average = monai.compute_average_surface_distance(*one_hot, symmetric=True, **options)
        assert metrics.assd(*ours) == pytest.approx(average.item(), rel=1e-5)
        dice = monai.compute_surface_dice(*one_hot, [1.5], **options)
        assert metrics.surface_dice(*ours, 1.5) == pytest.approx(dice.item(), rel=1e-5)
        joined = medpy.hd95(a, b, voxelspacing=spacing[flat:])
        assert metrics.hd95_joined(*ours) == pytest.approx(joined, rel=1e-6)
        expected = medpy.assd(a, b, voxelspacing=spacing[flat:])
        assert metrics.assd(*ours) == pytest.approx(expected, rel=1e-6)


def test_the_two_hd95_differ_where_few_voxels_of_both_surfaces_are_far():
    """Found exactly, but for 20 single voxels: 7 % of one surface, 4 % of both."""
    true, spots = np.zeros((2, 1, 100, 100), bool)
    true[0, :63, :63] = True
    spots[0, 90:99:8, :90:9] = True
    pred = true | spots
    assert metrics.hd95_joined(pred, true, (1, 1, 1)) == 0
    assert metrics.hd95(pred, true, (1, 1, 1)) == metrics.hd95(true, pred, (1, 1, 1)) == 28


def test_distances_without_a_surface_are_undefined_and_a_missed_one_scores_0():
    empty, full = np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool)
    for a, b in itertools.product((empty, full), repeat=2):
        for distance in (metrics.hd95, metrics.hd95_joined, metrics.assd):
            assert np.isnan(distance(a, b, (1, 1, 1))) == (not (a.any() and b.any()))
    assert metrics.surface_dice(full, full, (1, 1, 1), 0) == 1
    assert metrics.surface_dice(full, empty, (1, 1, 1), 9) == 0
    assert metrics.surface_dice(empty, full, (1, 1, 1), 9) == 0
    assert np.isnan(metrics.surface_dice(empty, empty, (1, 1, 1), 9))


def test_a_shift_by_the_tolerance_is_within_it_though_its_float_is_not():
    a, b = np.zeros((2, 1, 1, 8), bool)
    a[..., 0] = b[..., 3] = True
    assert 3 * 0.1 > 0.3
    assert metrics.surface_dice(a, b, (1, 1, 0.1), 0.3) == 1
    assert metrics.surface_dice(a, b, (1, 1, 0.1), 0.29) == 0


def test_pooled_iou_is_what_the_keras_tool_computes(rng):
    """Its evaluate_segmentation, pixel by pixel: tp, fp, fn and pixels of each class, pooled."""
    true, pred = rng.integers(0, 3, (2, 4, 9, 9))  # of four classes: the last is nowhere
    tp, fp, fn, pixels = np.zeros((4, 4))
    for t, p in zip(true.ravel(), pred.ravel(), strict=True):
        pixels[t] += 1
        if t == p:
            tp[t] += 1
        else:
            fp[p] += 1
            fn[t] += 1
    class_wise = tp / (tp + fp + fn + 1e-12)
    parts = [metrics.counts(p, t, 4) for p, t in zip(pred, true, strict=True)]
    found = metrics.pooled_iou(np.sum(parts, axis=0))
    assert found['class_wise_IU'] == pytest.approx(class_wise)
    assert found['class_wise_IU'][3] == 0
    assert found['mean_IU'] == pytest.approx(class_wise.mean())
    weighted = (class_wise * pixels / pixels.sum()).sum()
    assert found['frequency_weighted_IU'] == pytest.approx(weighted)


def test_an_ignored_class_is_in_no_mean_iou(rng):
    true = rng.integers(0, 3, (9, 9))
    perfect = metrics.pooled_iou(metrics.counts(true, true, 3, 2), 2)
    assert perfect['mean_IU'] == pytest.approx(1)
    assert perfect['frequency_weighted_IU'] == pytest.approx(1)
    assert perfect['class_wise_IU'] == [pytest.approx(1), pytest.approx(1), None]


def test_calibration_counts_are_a_count_by_bins_and_add_up(rng):
    prob, true = rng.random((3, 50), np.float32), rng.random((3, 50)) < 0.3
    prob[0, :3] = 0.0, 0.25, 1.0  # a bin holds its lower edge, the last both
    expected = np.zeros((4, 3))
    for p, t in zip(prob.ravel().tolist(), true.ravel().tolist(), strict=True):
        b = max(b for b in range(4) if b / 4 <= p)
        expected[b] += 1, p, t
    parts = [metrics.calibration_counts(p, t, 4) for p, t in zip(prob, true, strict=True)]
    np.testing.assert_allclose(np.sum(parts, axis=0), expected)
    np.testing.assert_allclose(metrics.calibration_counts(prob, true, 4), expected)
    gaps = [n / 150 * abs(p / n - t / n) for n, p, t in expected]
    assert metrics.expected_calibration_error(expected) == pytest.approx(sum(gaps))


def test_calibration_error_is_0_where_frequency_is_probability_and_the_gap_where_not():
    prob, true = np.repeat([0.25, 0.75], 8), np.tile([1, 0, 0, 0], 4)
    true[8:] = 1 - true[8:]
    assert metrics.expected_calibration_error(metrics.calibration_counts(prob, true, 10)) == 0
    sure = metrics.calibration_counts(np.ones(8), true[:8], 10)
    assert metrics.expected_calibration_error(sure) == 0.75
    assert np.isnan(metrics.expected_calibration_error(np.zeros((10, 3))))


def test_bootstrap_interval_narrows_with_the_number_of_patients(rng):
    few, many = rng.normal(0.8, 0.1, 10), rng.normal(0.8, 0.1, 1000)
    for values in (few, many):
        low, high = metrics.bootstrap_ci(values)
        assert low < values.mean() < high
        # The interval of a mean is about 2 x 1.96 standard errors wide.
        expected = 2 * 1.96 * values.std() / np.sqrt(len(values))
        assert high - low == pytest.approx(expected, rel=0.15)
    assert metrics.bootstrap_ci(few) == metrics.bootstrap_ci(np.append(few, np.nan))


def brats_lesions(pred, true, spacing, dilation, smallest):
    """Lesion by lesion, in the steps of the challenge's own code, over whole volumes."""
    by_edges, by_corners = (ndimage.generate_binary_structure(3, n) for n in (2, 3))

    def wide(mask):
        return ndimage.binary_dilation(mask, by_edges, iterations=dilation) if dilation else mask

    predicted, n_predicted = ndimage.label(pred, by_corners)
    joined, n_lesions = ndimage.label(wide(true), by_corners)
    dice, found, met = [], [], set()
    for number in range(1, n_lesions + 1):
        lesion = true & (joined == number)
        meeting = set(np.unique(predicted[wide(lesion)])) - {0}
        met |= meeting
        if lesion.sum() * np.prod(spacing) > smallest:
            whole = np.isin(predicted, list(meeting))
            dice.append(2 * (whole & lesion).sum() / (whole.sum() + lesion.sum()))
            found.append(bool(meeting))
    return dice, found, n_predicted - len(met)


def test_lesions_are_those_of_the_challenges_code(rng):
    kinds = set()
    for share, dilation in itertools.product(4 * (0.0005, 0.004, 0.02), (0, 1, 3)):
        seeds = rng.random((2, 6, 25, 22)) < share
        true, pred = ndimage.binary_dilation(seeds, np.ones((1, 2, 2, 2)))
        pred |= true & (rng.random(true.shape) < rng.choice([0.0, 0.5]))
        for spacing, smallest in (((1, 1, 1), 0.0), ((3.0, 0.5, 0.5), 8.0)):
            options = {'dilation': dilation, 'smallest': smallest}
            dice, found, invented = metrics.lesions(pred, true, spacing, **options)
            expected = brats_lesions(pred, true, spacing, dilation, smallest)
            np.testing.assert_allclose(dice, expected[0])
            assert found.tolist() == expected[1]
            assert invented == expected[2]
            kinds |= {('found', x) for x in expected[1]} | {('invented', invented > 0)}
    assert len(kinds) == 4  # of all cases, some


def cubes(*corners, side=4):
    """Cubes of 64 voxels, by their first corner."""
    mask = np.zeros((12, 40, 40), bool)
    for z, y, x in corners:
        mask[z : z + side, y : y + side, x : x + side] = True
    return mask


ONE = (1, 1, 1)
lesions = functools.partial(metrics.lesions, dilation=3, smallest=50.0)  # as of gliomas


def test_lesion_figures_by_hand():
    """One found exactly, one by half, one missed, one invented."""
    true = cubes((1, 1, 1), (1, 1, 20), (1, 25, 1))
    pred = cubes((1, 1, 1), (1, 1, 22), (1, 25, 25))
    dice, found, invented = lesions(pred, true, ONE)
    assert sorted(dice) == [0, 0.5, 1]
    assert (sorted(found), invented) == ([False, True, True], 1)
    figures = metrics.lesion_ratios((dice, found, invented))
    assert figures['lesion_dice'] == pytest.approx(1.5 / 4)  # of three lesions and one invented
    assert figures['lesion_f1'] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


def test_lesions_that_meet_by_their_dilation_are_one():
    """Six voxels apart they meet after three steps each; seven, they do not."""
    for gap, number in ((6, 1), (7, 2)):
        true = cubes((1, 1, 1), (1, 1, 5 + gap))
        dice, found, invented = lesions(cubes((1, 1, 1)), true, ONE)
        assert len(dice) == number
        assert sorted(dice) == ([64 * 2 / (64 + 128)] if number == 1 else [0, 1])
        assert (sorted(found), invented) == ([True] if number == 1 else [False, True], 0)


def test_a_predicted_lesion_beside_one_finds_it_without_overlap_and_counts_whole():
    true = cubes((1, 1, 1))
    beside, off = cubes((1, 1, 7)), cubes((1, 1, 8))  # 2 and 3 voxels between them
    dice, found, invented = lesions(beside, true, ONE)
    assert (dice.tolist(), found.tolist(), invented) == ([0], [True], 0)
    dice, found, invented = lesions(off, true, ONE)
    assert (dice.tolist(), found.tolist(), invented) == ([0], [False], 1)
    figures = metrics.lesion_ratios((dice, found, invented))
    assert figures == {'lesion_dice': 0, 'lesion_f1': 0}
    dice, _, _ = lesions(true | cubes((1, 1, 6)), true, ONE)  # one voxel apart, both met
    assert dice.tolist() == [pytest.approx(2 * 64 / (64 + 128))]


def test_a_predicted_lesion_may_serve_two_and_corners_connect():
    true = cubes((1, 1, 1), (1, 1, 14))
    pred = true.copy()
    pred[1, 1, 1:18] = True  # a bridge
    dice, found, invented = lesions(pred, true, ONE)
    assert dice.tolist() == [pytest.approx(2 * 64 / (64 + 128 + 9))] * 2
    assert (found.tolist(), invented) == ([True, True], 0)
    corner = cubes((1, 20, 20)) | cubes((5, 24, 24))
    assert lesions(corner, cubes((1, 1, 1)), ONE)[2] == 1


def test_small_lesions_and_what_meets_them_are_left_out():
    true = cubes((1, 1, 1)) | cubes((1, 25, 25), side=3)  # 64 and 27 voxels
    dice, found, invented = lesions(true, true, ONE)
    assert (dice.tolist(), found.tolist(), invented) == ([1], [True], 0)
    assert len(lesions(true, true, (2, 1, 1))[0]) == 2  # 54 cubic millimetres
    assert len(lesions(true, true, ONE, smallest=26.9)[0]) == 2
    assert len(lesions(true, true, ONE, smallest=27.0)[0]) == 1


def test_lesion_figures_without_lesions():
    empty, one = np.zeros((12, 40, 40), bool), cubes((1, 1, 1))
    for pred, true, expected in ((empty, empty, np.nan), (one, empty, 0), (empty, one, 0)):
        figures = metrics.lesion_ratios(lesions(pred, true, ONE))
        assert figures == pytest.approx(
            {'lesion_dice': expected, 'lesion_f1': expected}, nan_ok=True
        )


def test_lesions_touch_the_border_as_in_a_larger_volume():
    true, pred = cubes((0, 0, 0), (8, 36, 36)), cubes((0, 0, 2), (8, 30, 36))
    inside = lesions(np.pad(pred, 5), np.pad(true, 5), ONE)
    for ours, theirs in zip(lesions(pred, true, ONE), inside, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_one_patient_has_no_interval():
    assert metrics.bootstrap_ci([0.8]) is metrics.bootstrap_ci([0.8, np.nan]) is None
    assert metrics.bootstrap_ci([]) is None


@pytest.mark.parametrize(('patients', 'share'), [(3, 0.76), (6, 0.86), (10, 0.90)])
def test_the_interval_of_few_holds_the_mean_as_often_as_is_said(rng, patients, share):
    ends = (metrics.bootstrap_ci(rng.normal(0, 1, patients), resamples=500) for _ in range(1500))
    assert np.mean([low < 0 < high for low, high in ends]) == pytest.approx(share, abs=0.035)
