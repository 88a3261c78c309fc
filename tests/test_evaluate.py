"""Evaluation: the numbers by hand, their names, and the command on a folder."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest

from pspnet_jax.config import with_prediction
from pspnet_jax.data import pipeline, sources
from pspnet_jax.data.volumes import Volume, iterate_volumes, measure_head, normalize, select
from pspnet_jax.evaluation import fitting, metrics, protocol, scores
from pspnet_jax.inference import infer, predictors, settings
from pspnet_jax.inference.runs import open_run
from pspnet_jax.runtime.errors import CheckpointError, ConfigError, DataError
from pspnet_jax.training import loop
from tests.conftest import tiny_config, write_case

BATCHING = scores.Batching(batch_size=2, intensity=None, context=0)
SCORING = scores.Scoring(
    num_classes=2,
    ignore_label=255,
    spacing=(1.0, 1.0, 1.0),
    surface_tolerance=1.0,
    lesion_options={'dilation': 1, 'smallest': 2.0},
    calibration_bins=10,
    bootstrap=100,
)
OPTIONS = {'batching': BATCHING, 'scoring': SCORING}


def options_with(**scoring):
    return OPTIONS | {'scoring': SCORING._replace(**scoring)}


def volume(name, mask):
    mask = np.asarray(mask, np.uint8)
    image = np.repeat(mask[..., None], 3, axis=-1)
    intensity = np.array([[0], [255], [0], [1]], np.float32) * np.ones((1, 3), np.float32)
    return Volume(name, image, mask, np.arange(len(mask)), intensity)


def oracle(image):
    """Calls every pixel what channel 0 says: the images above carry their own truth."""
    return np.stack([image[..., 0] != 1, image[..., 0] == 1], axis=-1).astype(np.float32)


def nothing(image):
    return np.stack([np.ones(image.shape[:3]), np.zeros(image.shape[:3])], axis=-1)


MASK = np.zeros((3, 6, 6), int)
MASK[1, 1:4, 1:4] = 1


def test_the_truth_scores_one():
    result = scores.evaluate_volumes(oracle, [volume('a', MASK)], **OPTIONS)
    (row,) = result['patients']
    assert row['dice'] == row['dice_largest'] == row['iou'] == 1
    assert row['hd95'] == row['assd'] == 0
    assert row['surface_dice'] == 1
    assert result['summary']['class_wise_IU'] == pytest.approx([1, 1])
    assert result['calibration']['expected_calibration_error'] == 0
    assert row['lesion_voxels'] == row['predicted_voxels'] == 9
    assert result['summary']['dice'] == {
        'mean': 1, 'median': 1, 'sd': None, 'ci95': None, 'n': 1
    }  # fmt: skip


def test_distances_are_in_mm_where_the_volume_has_its_spacing():
    moved = volume('a', np.roll(MASK, 1, axis=2))._replace(mask=MASK.astype(np.uint8))
    steps = scores.evaluate_volumes(oracle, [moved], **OPTIONS)
    assert steps['patients'][0]['hd95'] == 1
    mm = scores.evaluate_volumes(oracle, [moved._replace(spacing=(3.0, 0.5, 0.7))], **OPTIONS)
    assert mm['patients'][0]['hd95'] == pytest.approx(0.7)
    assert mm['data']['hd95_unit'] == 'mm'
    both = [moved, moved._replace(patient='b', spacing=(3.0, 0.5, 0.7))]
    unit = scores.evaluate_volumes(oracle, both, **OPTIONS)['data']['hd95_unit']
    assert 'if the file has' in unit


def pictures(rng, count=3, size=40):
    """A patient of several pictures: a square each, predicted wider, and with a stray pixel."""
    mask = np.zeros((count, size, size), np.uint8)
    image = np.zeros((count, size, size, 3), np.uint8)
    for d in range(count):
        top, left, more = rng.integers(4, 14, 3)
        mask[d, top : top + 12, left : left + 9] = 1
        image[d, top : top + 12, left : left + 9 + more] = 1
        image[d, -2, -2] = 1
    one = volume('p', mask)._replace(image=image)
    alone = [
        one._replace(patient=f'p{d}', image=image[d : d + 1], mask=mask[d : d + 1])
        for d in range(count)
    ]
    return one._replace(scan=np.arange(count)), alone


def test_pictures_of_one_patient_are_scored_picture_by_picture(rng):
    """They lie nowhere on one another: as if each were a patient, and the mean over them."""
    together, alone = pictures(rng)
    (row,) = scores.evaluate_volumes(oracle, [together], **OPTIONS)['patients']
    each = scores.evaluate_volumes(oracle, alone, **OPTIONS)['patients']
    for name in ('hd95', 'hd95_joined', 'assd', 'surface_dice'):
        assert row[name] == pytest.approx(np.mean([part[name] for part in each])), name
    assert (row['scans'], row['slices']) == (3, 3)
    # The largest component of each picture is kept, and Dice is over the pixels of all.
    kept = {'largest_component': True}
    whole = scores.evaluate_volumes(oracle, [together], **OPTIONS, label_options=kept)
    assert whole['patients'][0]['dice'] == pytest.approx(row['dice_largest'])
    assert whole['patients'][0]['predicted_voxels'] == row['predicted_voxels'] - 3
    as_volume = scores.evaluate_volumes(oracle, [together._replace(scan=None)], **OPTIONS)
    assert as_volume['patients'][0]['assd'] < 0.7 * row['assd']  # every pixel counts as surface


def test_two_volumes_of_one_patient_are_not_neighbours():
    """The last slice of one and the first of the other hold the same square: no component joins
    them, and it is surface on both sides.
    """
    mask = np.zeros((4, 6, 6), int)
    mask[1:3, 1:4, 1:4] = 1
    both = volume('p', mask)._replace(scan=np.array([0, 0, 1, 1]))
    both.image[3, 5, 5] = 1
    (row,) = scores.evaluate_volumes(oracle, [both], **OPTIONS)['patients']
    assert row['dice_largest'] == 1
    (joined,) = scores.evaluate_volumes(oracle, [both._replace(scan=None)], **OPTIONS)['patients']
    assert joined['scans'] == 1
    missing = both._replace(image=both.image * (np.arange(4) < 2)[:, None, None, None])
    (row,) = scores.evaluate_volumes(oracle, [missing], **OPTIONS)['patients']
    assert (row['present'], row['missed'], row['invented']) == (2, 1, 0)
    assert row['hd95'] == 0


def labelled(image):
    """Calls every pixel the class that channel 0 says, of four."""
    return (np.arange(4) == image[..., :1]).astype(np.float32)


def test_structures_that_are_missed_or_invented_are_counted():
    """One of three found, one missed, one invented: HD95 is of the first alone, and looks fine."""
    mask = np.zeros((3, 12, 12), int)
    mask[1, 1:4, 1:4], mask[1, 6:9, 6:9] = 1, 2
    one = volume('a', mask)
    one.image[mask == 2] = 0
    one.image[2, 9:11, 1:3] = 3
    perfect = volume('b', np.where(mask == 2, 0, mask))
    options = options_with(num_classes=4)
    result = scores.evaluate_volumes(labelled, [one, perfect], **options)
    first, second = result['patients']
    assert first['hd95'] == second['hd95'] == 0
    assert [first[name] for name in ('present', 'missed', 'invented')] == [2, 1, 1]
    assert [second[name] for name in ('present', 'missed', 'invented')] == [1, 0, 0]
    counts = [
        [row[name] for name in ('label', 'present', 'missed', 'invented')]
        for row in result['summary']['structures']
    ]
    assert counts == [[1, 2, 0, 0], [2, 1, 1, 0], [3, 0, 0, 1]]
    hd95 = [row['hd95'] for row in result['summary']['structures']]
    assert hd95 == [{'mean': 0, 'n': 2}, {'mean': None, 'n': 0}, {'mean': None, 'n': 0}]
    dice = [row['dice'] for row in result['summary']['structures']]
    assert dice == [{'mean': 1, 'n': 2}, {'mean': 0, 'n': 1}, {'mean': 0, 'n': 1}]
    text = scores.table(result)
    assert '1 of 3 structures are missed and 1 invented' in text
    line = next(line.split() for line in text.splitlines() if line.startswith('class 2'))
    none = ['0.000', '(1)', '-', '(0)', '-', '(0)']  # sensitivity, precision, HD95
    expected = ['0.000', '(1)', '0.000', 'none', '0.000', '(1)', *none, '1', 'of', '1', '0']
    assert line == ['class', '2', *expected]


def several(rng, count=5, ignored=True):
    """Volumes of three structures, predicted wrongly here and there; not each has every class."""
    data = []
    for n in range(count):
        mask = np.zeros((3, 12, 12), int)
        for label in (1, 2, 3):
            top, left = rng.integers(0, 8, 2)
            if rng.random() < 0.8:
                mask[:, top : top + 5, left : left + 4] = label
        one = volume(f'v{n}', mask)
        wrong = rng.random(mask.shape) < 0.1
        one.image[wrong] = rng.integers(0, 4, (wrong.sum(), 1))
        one.mask[rng.random(mask.shape) < 0.05 * ignored] = 255
        data.append(one)
    return data


def by_hand(pred, true):
    """Figures of two boolean arrays, None where they are 0/0."""
    both, ours, theirs = (pred & true).sum(), pred.sum(), true.sum()
    parts = {
        'dice': (2 * both, ours + theirs),
        'iou': (both, (pred | true).sum()),
        'sensitivity': (both, theirs),
        'precision': (both, ours),
    }
    return {name: top / below if below else None for name, (top, below) in parts.items()}


def resampled(values):
    """Means of 100 draws with the seed that is documented."""
    draws = np.random.default_rng(0).integers(len(values), size=(100, len(values)))
    return [np.mean(np.array(values)[draw]) for draw in draws]


def test_each_class_has_its_figures_by_volume_and_over_volumes(rng):
    data, names = several(rng), ('background', 'liver', 'kidney', 'spleen')
    options = options_with(num_classes=4, class_names=names)
    result = scores.evaluate_volumes(labelled, data, **options)
    confusion = np.zeros((4, 4), int)
    for one in data:
        keep = one.mask != 255
        np.add.at(confusion, (one.mask[keep], one.image[..., 0][keep]), 1)
    assert result['confusion']['classes'] == list(names)
    assert result['confusion']['voxels'] == confusion.tolist()
    assert (confusion > 0).all()
    undefined = 0
    for label, name in enumerate(names[1:], 1):
        found = {key: [] for key in ('dice', 'iou', 'sensitivity', 'precision', 'hd95')}
        for one, row in zip(data, result['patients'], strict=True):
            assert list(row['classes']) == list(names[1:])
            pred, true = (one.image[..., 0] == label) & (one.mask != 255), one.mask == label
            expected = by_hand(pred, true)
            distance = metrics.hd95(pred, true, (1, 1, 1))
            expected['hd95'] = None if np.isnan(distance) else distance
            ours = row['classes'][name]
            assert {key: ours[key] for key in expected} == pytest.approx(expected)
            assert (ours['voxels'], ours['predicted_voxels']) == (true.sum(), pred.sum())
            for key, values in found.items():
                values += [] if expected[key] is None else [expected[key]]
        over = result['summary']['classes'][name]
        assert over['label'] == label
        for key, values in found.items():
            undefined += len(data) - len(values)
            assert over[key]['n'] == len(values)
            assert over[key]['mean'] == pytest.approx(np.mean(values))
            assert over[key]['median'] == pytest.approx(np.median(values))
            assert over[key]['sd'] == pytest.approx(np.std(values, ddof=1))
            low, high = over[key]['ci95']
            assert (low, high) == pytest.approx(np.percentile(resampled(values), (2.5, 97.5)))
    assert undefined
    # The single figure: the mean over the classes of each volume, then over volumes.
    for row in result['patients']:
        each = [one['dice'] for one in row['classes'].values() if one['dice'] is not None]
        assert row['dice'] == pytest.approx(np.mean(each))
    assert json.loads(json.dumps(result)) == result


def test_the_console_names_the_classes_and_shows_the_matrix(rng):
    names = ('background', 'liver\x1b[2J', 'kidney', 'kidney')
    options = options_with(num_classes=4, class_names=names)
    result = scores.evaluate_volumes(labelled, several(rng, 12), **options)
    assert list(result['summary']['classes']) == ['liver\x1b[2J', 'kidney (2)', 'kidney (3)']
    lines = scores.table(result).splitlines()
    assert '\x1b' not in ''.join(lines)
    dice = result['summary']['classes']['kidney (2)']['dice']
    (row,) = [line.split() for line in lines if line.startswith('kidney (2)  ')][:1]
    ends = [f'{dice["ci95"][0]:.3f}', 'to', f'{dice["ci95"][1]:.3f}']
    assert row[2:8] == [f'{dice["mean"]:.3f}', f'({dice["n"]})', f'{dice["median"]:.3f}', *ends]
    place = next(n for n, line in enumerate(lines) if line.startswith('truth'))
    for line, voxels in zip(lines[place + 1 :], result['confusion']['voxels'], strict=False):
        assert line.split()[-4:] == [f'{number:,}' for number in voxels]
    (said,) = [line for line in lines if line.startswith('Dice is the mean over 3 classes')]
    assert said == result['data']['mean_of'].replace('\x1b', '\\x1b')
    for words in ('(liver', 'kidney (2), kidney (3)) of each patient', 'over 12 of 12 patients',
                  'background is left out', 'counts 0', 'does not count there'):  # fmt: skip
        assert words in said
    result['confusion']['classes'] = [f'c{n}' for n in range(9)]
    assert 'the confusion matrix of 9 classes is in evaluation.json' in scores.table(result)


def test_one_structure_has_the_figures_of_before_to_the_bit(rng):
    """From the functions of `metrics`, and no table of classes."""
    data = several(rng, ignored=True)
    for one in data:
        np.minimum(one.image, 1, out=one.image)
        one.mask[:] = np.where(one.mask == 255, 255, one.mask > 0)
    data.append(volume('none', 0 * MASK))
    result = scores.evaluate_volumes(oracle, data, **OPTIONS)
    values = {name: [] for name in ('dice', 'iou', 'sensitivity', 'precision')}
    for one, row in zip(data, result['patients'], strict=True):
        ratios = metrics.ratios(metrics.counts(one.image[..., 0], one.mask, 2))
        for name, found in values.items():
            value = None if np.isnan(ratios[name][1]) else float(ratios[name][1])
            assert row[name] == row['classes']['class 1'][name] == value
            found += [] if value is None else [value]
        pred, true = (one.image[..., 0] == 1) & (one.mask != 255), one.mask == 1
        distances = metrics.surface_ratios(metrics.surface_distances(pred, true, (1, 1, 1)), 1.0)
        for name, value in distances.items():
            assert row[name] == (None if np.isnan(value) else value)
        assert row['structures'][0]['dice'] == row['dice']
    summary = result['summary']
    for name, found in values.items():
        assert summary[name] == {
            'mean': float(np.mean(found)),
            'median': float(np.median(found)),
            'sd': float(np.std(found, ddof=1)),
            'ci95': metrics.bootstrap_ci(np.array(found), resamples=100),
            'n': len(found),
        }
        assert summary['classes']['class 1'][name] == summary[name]
    text = scores.table(result)
    assert 'confusion' not in text
    assert 'truth' not in text.replace('neither truth nor prediction', '')
    assert result['data']['mean_of'].startswith('Dice is that of class 1 in each patient')
    assert 'over 5 of 6 patients' in result['data']['mean_of']


def test_pictures_are_cases_with_objects_and_volumes_patients_with_lesions(rng):
    _, alone = pictures(rng)
    text = scores.table(scores.evaluate_volumes(oracle, alone, **OPTIONS))
    assert text.startswith('case')
    assert 'object by object' in text
    assert not re.search('patient|lesion|slice|volume', text)
    text = scores.table(scores.evaluate_volumes(oracle, [volume('a', MASK)], **OPTIONS))
    assert text.startswith('patient')
    assert 'lesion by lesion' in text
    assert not re.search('case|object|picture', text)


def test_a_lesion_that_is_missed_is_counted_with_two_classes_too():
    result = scores.evaluate_volumes(nothing, [volume('a', MASK)], **OPTIONS)
    assert result['patients'][0]['missed'] == result['summary']['structures'][0]['missed'] == 1


@pytest.mark.parametrize('ignore_label', [0, 2, 3, 254])
def test_a_perfect_prediction_is_perfect_whichever_label_is_ignored(ignore_label):
    """Where it is a class too, it is no structure, no lesion and in no mean."""
    mask = np.zeros((3, 12, 12), int)
    mask[1, 1:4, 1:4], mask[1, 6:9, 6:9], mask[:, 10:, 10:] = 1, 2, 3
    mask[2, 5, 5] = ignore_label
    one = volume('a', mask)
    one.image[mask == ignore_label] = 1  # whatever is said there
    options = options_with(num_classes=4, ignore_label=ignore_label)
    seen = []
    result = scores.evaluate_volumes(
        labelled, [one], **options, each=lambda volume, _: seen.append(volume.mask)
    )
    (row,) = result['patients']
    for name in ('dice', 'iou', 'sensitivity', 'precision', 'surface_dice'):
        assert row[name] == 1, name
    assert row['hd95'] == row['hd95_joined'] == row['assd'] == 0
    structures = [n for n in (1, 2, 3) if n != ignore_label]
    assert [found['label'] for found in row['structures']] == structures
    assert row['lesion_voxels'] == np.isin(mask, structures).sum()
    summary = result['summary']
    assert summary['mean_IU'] == pytest.approx(1)
    assert summary['per_slice_dice_empty_is_1'] == summary['pooled']['dice'] == 1
    np.testing.assert_array_equal(seen[0] == 255, mask == ignore_label)  # as pictures show it
    scores.table(result)


def test_the_baseline_has_a_dice_where_its_rule_gives_one():
    """All background is undefined where there is no lesion, as every prediction of that is."""
    result = scores.evaluate_volumes(oracle, [volume('none', 0 * MASK)], **OPTIONS)
    assert result['baseline']['dice'] is result['summary']['dice']['mean'] is None
    both = [volume('none', 0 * MASK), volume('a', MASK)]
    assert scores.evaluate_volumes(oracle, both, **OPTIONS)['baseline']['dice'] == 0


@pytest.mark.parametrize(
    ('patients', 'words'),
    [(1, 'Dice 1.000, no interval for 1 ('), (3, 'to 1.000, too narrow for 3 ('), (10, '1.000 (')],
)
def test_few_patients_have_an_interval_that_says_so_and_one_has_none(patients, words):
    data = [volume(f'p{n}', MASK) for n in range(patients)]
    result = scores.evaluate_volumes(oracle, data, **OPTIONS)
    assert words in scores.table(result)
    assert (result['summary']['dice']['ci95'] is None) == (patients == 1)


def test_predicting_nothing_is_the_baseline():
    result = scores.evaluate_volumes(nothing, [volume('a', MASK)], **OPTIONS)
    summary, baseline = result['summary'], result['baseline']
    assert summary['dice']['mean'] == baseline['dice'] == 0
    assert summary['hd95'] == {'mean': None, 'median': None, 'sd': None, 'ci95': None, 'n': 0}
    # Two of three slices are empty and count 1 where empty slices do.
    for part in (summary, baseline):
        assert part['per_slice_dice_empty_is_1'] == pytest.approx(2 / 3)
    assert baseline['pooled_pixel_accuracy'] == pytest.approx(1 - 9 / 108)
    assert baseline['pooled_mean_iou'] == pytest.approx((99 / 108 + 0) / 2)
    for part in (summary, baseline):
        assert part['class_wise_IU'] == pytest.approx([99 / 108, 0])
        assert part['frequency_weighted_IU'] == pytest.approx((99 / 108) ** 2)
    # Certain of background everywhere: wrong in 9 of 108 voxels, and missed surfaces count.
    assert result['calibration']['expected_calibration_error'] == pytest.approx(9 / 108)
    assert summary['surface_dice']['mean'] == 0
    assert summary['assd']['n'] == 0


def test_a_mean_over_patients_is_not_the_pooled_figure():
    big = np.zeros((3, 6, 6), int)
    big[:, :5, :5] = 1
    half = volume('half', MASK)
    half = half._replace(image=half.image * (np.arange(6) < 3)[:, None])  # sees 3 of 3x3 no more
    result = scores.evaluate_volumes(oracle, [volume('big', big), half], **OPTIONS)
    dice = [row['dice'] for row in result['patients']]
    assert dice == [1, pytest.approx(2 * 6 / (6 + 9))]
    assert result['summary']['dice']['mean'] == pytest.approx(np.mean(dice))
    assert result['summary']['dice']['sd'] == pytest.approx(np.std(dice, ddof=1))
    pooled = 2 * (75 + 6) / (75 + 75 + 6 + 9)
    assert result['summary']['pooled']['dice'] == pytest.approx(pooled)


def test_the_largest_component_drops_a_stray():
    stray = volume('a', MASK)
    stray.image[2, 5, 5] = 1
    (row,) = scores.evaluate_volumes(oracle, [stray], **OPTIONS)['patients']
    assert row['dice'] == pytest.approx(18 / 19)
    assert row['dice_largest'] == 1


def test_what_is_done_to_the_labels_is_in_the_figures():
    stray = volume('a', MASK)
    stray.image[2, 5, 5] = 1

    def dice(**options):
        result = scores.evaluate_volumes(oracle, [stray], **OPTIONS, label_options=options)
        return result['patients'][0]['dice']

    assert dice() == pytest.approx(18 / 19)
    assert dice(largest_component=True) == dice(min_size=2) == 1
    assert dice(min_size=10) == dice(threshold=1.0) == 0


def test_a_volume_without_lesion_is_undefined_not_one():
    result = scores.evaluate_volumes(
        oracle, [volume('a', MASK), volume('none', 0 * MASK)], **OPTIONS
    )
    assert result['patients'][1]['dice'] is None
    assert result['summary']['dice']['n'] == 1
    assert '(bootstrap over 1 of 2 patients)' in scores.table(result)


def hesitant(image):
    """Three classes: 0.7 or 0.5 for what channel 0 says, the rest evenly, by column."""
    sure = np.where(np.arange(image.shape[2]) % 2, 0.7, 0.5)
    said = np.arange(3) == image[..., :1]
    return np.where(said, sure[:, None], (1 - sure[:, None]) / 2).astype(np.float32)


def test_lesions_are_counted_one_by_one_and_by_class():
    """Of class 1 one is found by half and one missed, and one is false; of class 2 one is found."""
    mask = np.zeros((3, 12, 12), int)
    mask[0, 0:2, 0:2] = mask[0, 0:2, 9:11] = 1
    mask[2, 9:11, 0:2] = 2
    mask[2, 0, 0] = 2  # too small to count
    seen = volume('a', mask)
    seen.image[0, 0:2, 1:3] = seen.image[0, 0:2, 0:2]
    seen.image[0, 0:2, 0] = seen.image[0, 0:2, 9:11] = 0
    seen.image[0, 9:11, 9:11] = 1
    data = [seen, volume('b', 0 * mask)]
    result = scores.evaluate_volumes(hesitant, data, **options_with(num_classes=3))
    row, empty = result['patients']
    assert row['lesion_dice'] == pytest.approx(np.mean([0.5 / 3, 1]))
    assert row['lesion_f1'] == pytest.approx(np.mean([2 / (2 + 1 + 1), 1]))
    assert (row['lesions_found'], row['lesions_missed'], row['lesions_false']) == (2, 1, 1)
    assert (empty['lesion_dice'], empty['lesion_f1']) == (None, None)
    assert result['summary']['lesions'] == {'found': 2, 'missed': 1, 'false': 1}
    assert result['summary']['lesion_f1']['n'] == 1
    assert result['data']['lesion_options'] == SCORING.lesion_options
    words = 'Dice 0.583, detection F1 0.750 over 1; lesions: 2 found, 1 missed, 1 false'
    assert words in scores.table(result)
    grown = options_with(num_classes=3, lesion_options={'dilation': 4, 'smallest': 2.0})
    (row, _) = scores.evaluate_volumes(hesitant, data, **grown)['patients']
    assert (row['lesions_found'], row['lesions_missed'], row['lesions_false']) == (2, 0, 1)


def test_lesions_of_two_pictures_of_a_patient_are_two():
    mask = np.zeros((2, 6, 6), int)
    mask[:, 1:4, 1:4] = 1
    (apart,), (joined,) = (
        scores.evaluate_volumes(oracle, [item], **OPTIONS)['patients']
        for item in (volume('a', mask)._replace(scan=np.array([0, 1])), volume('a', mask))
    )
    assert (apart['lesions_found'], joined['lesions_found']) == (2, 1)


def test_ignored_voxels_are_of_no_lesion():
    mask = MASK.copy()
    seen = volume('a', mask)
    seen.image[:, 5, 5], mask[:, 5, 5] = 1, 255  # said to be a lesion, and ignored
    seen = seen._replace(mask=mask.astype(np.uint8))
    (row,) = scores.evaluate_volumes(oracle, [seen], **OPTIONS)['patients']
    assert (row['lesion_dice'], row['lesions_false']) == (1, 0)


def test_a_lesions_size_is_in_the_unit_of_the_spacing():
    tall = volume('a', MASK)  # of 9 voxels
    lesions = {'dilation': 1, 'smallest': 10.0}

    def found(volume, spacing=(1.0, 1.0, 1.0)):
        options = options_with(lesion_options=lesions, spacing=spacing)
        figures = scores.evaluate_volumes(oracle, [volume], **options)
        return figures['summary']['lesions']['found']

    assert found(tall) == 0
    assert found(tall, (2.0, 1.0, 1.0)) == found(tall._replace(spacing=(2.0, 1.0, 1.0))) == 1


def test_calibration_is_of_foreground_over_all_counted_voxels_of_all_volumes():
    first, second = MASK.copy(), 2 * MASK
    first[0, 0, :3] = 255  # 3 voxels that count nowhere; the images say class 0 there
    data = [volume('a', first), volume('b', second)]
    data[0].image[0, 0, :3] = 0
    data[1].image[:] = 0  # says background everywhere
    found = scores.evaluate_volumes(hesitant, data, **options_with(num_classes=3))
    bins = found['calibration']['bins']
    assert sum(b['voxels'] for b in bins) == 2 * 108 - 3
    # Where 0.7 is said of background, foreground has 0.3; of class 1 or 2, 1 - 0.3 / 2.
    filled = {round(b['probability'], 3): b for b in bins if b['voxels']}
    assert filled.keys() == {0.3, 0.5, 0.75, 0.85}
    columns = {0.3: (1, 3), 0.5: (2,), 0.85: (1, 3), 0.75: (2,)}  # of MASK's square
    for prob in (0.3, 0.5):
        assert filled[prob]['frequency'] == pytest.approx(
            3 * len(columns[prob]) / filled[prob]['voxels']
        )
    for prob in (0.75, 0.85):
        assert filled[prob]['voxels'] == 3 * len(columns[prob])
        assert filled[prob]['frequency'] == 1
    gaps = [b['voxels'] * abs(p - b['frequency']) for p, b in filled.items()]
    error = found['calibration']['expected_calibration_error']
    assert error == pytest.approx(sum(gaps) / 213)


def test_a_temperature_changes_probabilities_and_no_label():
    data = volume('a', MASK)
    labels, plain = scores.predict_foreground(hesitant, data, BATCHING)
    again, tempered = scores.predict_foreground(hesitant, data, BATCHING, temperature=4.0)
    assert (labels == again).all()
    batch = normalize(data.image, data.intensity)
    assert (labels == hesitant(batch).argmax(-1)).all()
    assert np.abs(tempered - 2 / 3).max() < np.abs(plain - 2 / 3).max() / 2  # nearer to even
    assert plain.shape == tempered.shape == MASK.shape


def test_the_temperature_is_fitted_on_every_counted_voxel_of_small_volumes():
    def sure(image):
        return np.where(np.arange(2) == (image[..., :1] == 1), 0.99, 0.01).astype(np.float32)

    wrong = volume('a', MASK)
    wrong.image[0, 0, 0] = 1  # 1 of 107 voxels
    ignored = MASK.copy()
    ignored[2, 5, 5] = 255
    found = fitting.fit_temperature(
        sure,
        [wrong._replace(mask=ignored.astype(np.uint8)), wrong],
        **OPTIONS,
    )
    assert found['voxels'] == 107 + 108
    assert found['patients'] == 2
    # The likeliest probability of being right is how often it is: 213 of 215 times.
    expected = np.log(0.99 / 0.01) / np.log(213 / 2)
    assert found['temperature'] == pytest.approx(expected, rel=1e-3)
    assert found['negative_log_likelihood'] < found['without']


def test_labels_outside_the_model_and_no_volume_are_errors():
    with pytest.raises(DataError, match=r'a has labels \[2\], but the model has classes 0 to 1'):
        scores.evaluate_volumes(oracle, [volume('a', 2 * MASK)], **OPTIONS)
    with pytest.raises(DataError, match='no volume'):
        scores.evaluate_volumes(oracle, [], **OPTIONS)
    with pytest.raises(DataError, match='every voxel is labelled 255'):
        scores.evaluate_volumes(oracle, [volume('a', 0 * MASK + 255)], **OPTIONS)


def test_evaluation_json_has_what_is_promised(trained):
    workdir, evaluation = trained
    written = json.loads((workdir / 'evaluation.json').read_text())
    assert written == json.loads(json.dumps(evaluation))
    assert {'summary', 'patients', 'baseline', 'checkpoint', 'data'} <= set(written)
    assert {'frequency_weighted_IU', 'mean_IU', 'class_wise_IU'} <= set(written['summary'])
    for name in (
        'dice', 'dice_largest', 'iou', 'sensitivity', 'precision', 'hd95', 'hd95_joined', 'assd',
        'surface_dice', 'lesion_dice', 'lesion_f1',
    ):  # fmt: skip
        assert set(written['summary'][name]) == {'mean', 'median', 'sd', 'ci95', 'n'}
        assert name in written['patients'][0]
    assert written['data']['lesion_options'] == {'dilation': 3, 'smallest': 50.0}
    assert written['checkpoint']['config']['model']['name'] == 'unet_mini'
    folder = workdir / 'evaluation' / 'test'
    names = {path.stem for path in (folder / 'pictures').iterdir()}
    assert names == {row['patient'] for row in written['patients']}
    for name in ('evaluation.json', 'report.html'):  # copies
        assert (workdir / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_a_folder_in_the_kaggle_layout_is_evaluated_from_the_checkpoint_alone(trained, tmp_path):
    alone = tmp_path / 'alone'
    shutil.copytree(trained[0] / 'checkpoints', alone / 'checkpoints')
    write_case(tmp_path / 'kaggle_3m', 'someone', slices=3)
    result = protocol.evaluate_checkpoint(alone, data=str(tmp_path))
    assert [row['patient'] for row in result['patients']] == ['someone']
    assert result['patients'][0]['lesion_voxels'] == 2 * 40 * 60


@pytest.mark.slow
def test_averages_over_views_are_evaluated_and_said_in_the_file(trained, tmp_path):
    import shutil

    workdir = shutil.copytree(trained[0], tmp_path / 'run')
    changes = {'flip': True, 'window': 24, 'threshold': 0.2}
    result = protocol.evaluate_checkpoint(workdir, changes=changes)
    written = json.loads((workdir / 'evaluation.json').read_text())
    assert (
        written['checkpoint']['config']['predict'] | changes
        == (written['checkpoint']['config']['predict'])
    )
    predicted = [row['predicted_voxels'] for row in result['patients']]
    assert predicted != [row['predicted_voxels'] for row in trained[1]['patients']]
    run = open_run(workdir)
    config = with_prediction(run.config, changes)
    program = infer.compile_predict(run.model, window=24, flip=True, batch_size=4)
    slices, parts = sources.load(config, workdir / 'splits.json')
    volumes = iterate_volumes(select(slices, parts['test']))
    for voxels, item in zip(predicted, volumes, strict=True):
        image = normalize(item.image, item.intensity if run.intensity is None else run.intensity)
        assert (program(run.variables, image)[..., 1] > 0.2).sum() == pytest.approx(voxels, abs=2)


def test_each_split_and_data_set_has_a_folder_of_its_own(tmp_path):
    def folder(source, split='', out='', digest='d'):
        about = {'source': source, 'split': split, 'digest': digest}
        found = protocol._results_folder(tmp_path / 'run', out, about, source != 'phantom')
        return found.relative_to(tmp_path).as_posix()

    for split in ('test', 'validation', 'train'):
        for digest in 'ab':  # trained for longer
            assert folder('phantom', split, digest=digest) == f'run/evaluation/{split}'
    assert folder('/a/clinic') == 'run/evaluation/clinic'
    assert folder('/b/clinic') == 'run/evaluation/clinic-2'
    assert folder('/c/clinic') == 'run/evaluation/clinic-3'
    assert folder('/b/clinic', digest='other') == 'run/evaluation/clinic-2'
    assert folder('/a/clinic', 'test') == 'run/evaluation/clinic-test'
    assert folder('/a/clinic') == 'run/evaluation/clinic'
    assert folder('/a/test') == 'run/evaluation/test-2'  # a split has that name
    assert folder('/') == 'run/evaluation/data'
    (tmp_path / 'run' / 'evaluation' / 'old').mkdir()
    (tmp_path / 'run' / 'evaluation' / 'old' / 'evaluation.json').touch()
    assert folder('/a/old') == 'run/evaluation/old-2'
    (tmp_path / 'run' / 'evaluation' / 'clinic' / protocol.ABOUT).write_text('[')
    assert folder('/a/clinic') == 'run/evaluation/clinic-4'  # whose the first is, is not known

    out = str(tmp_path / 'mine')
    for _ in range(2):
        assert folder('/a/clinic', out=out) == 'mine'
    for other in ({'source': '/b/clinic'}, {'split': 'test'}, {'digest': 'other'}):
        with pytest.raises(
            ConfigError, match=r'mine holds an evaluation of other data.*another --out'
        ):
            folder(**{'source': '/a/clinic', 'out': out} | other)
    (tmp_path / 'run' / 'evaluation.json').touch()
    with pytest.raises(ConfigError, match='give another --out'):
        folder('/a/clinic', out=tmp_path / 'run')


@pytest.mark.slow
def test_an_evaluation_replaces_no_other(trained, tmp_path, capsys):
    workdir = shutil.copytree(trained[0], tmp_path / 'run')
    own = [workdir / name for name in ('evaluation.json', 'report.html')]
    before = [path.read_bytes() for path in own]
    write_case(tmp_path / 'kaggle_3m', 'someone', slices=3)
    validation = protocol.evaluate_checkpoint(workdir, split='validation')
    protocol.evaluate_checkpoint(workdir, data=str(tmp_path / 'kaggle_3m'))
    changes = {'eval.bootstrap': 7, 'eval.spacing': (3.0, 1.0, 1.0)}
    chosen = protocol.evaluate_checkpoint(workdir, out=tmp_path / 'out', changes=changes)
    assert [path.read_bytes() for path in own] == before
    for name, figures in (('validation', validation), ('../../out', chosen)):
        folder = workdir / 'evaluation' / name
        assert json.loads((folder / 'evaluation.json').read_text()) == json.loads(
            json.dumps(figures)
        )
        names = {path.stem for path in (folder / 'pictures').iterdir()}
        assert names == {row['patient'] for row in figures['patients']}
        assert (folder / 'report.html').stat().st_size
    assert (workdir / 'evaluation' / 'kaggle_3m' / 'pictures' / 'someone.png').stat().st_size
    used = chosen['checkpoint']['config']['eval']
    assert (used['bootstrap'], used['spacing']) == (7, [3.0, 1.0, 1.0])
    assert chosen['data']['spacing'] == [3.0, 1.0, 1.0]
    # Those of which the run has seen pictures are marked, and the console says so.
    assert {row['seen'] for row in validation['patients']} == {'validation'}
    said = capsys.readouterr().out
    assert 'patients have images that the checkpoint was chosen on' in said
    assert 'trained on' not in said
    train = protocol.evaluate_checkpoint(workdir, split='train')
    n = len(train['patients'])
    said = capsys.readouterr().out
    assert f'{n} of {n} patients have images that the run was trained on: these results' in said
    assert sum(line.endswith('  trained on') for line in said.splitlines()) == n


@pytest.mark.slow
def test_a_run_and_itself_are_evaluated_as_the_run_and_nothing_is_written_to_it(trained, tmp_path):
    runs = [shutil.copytree(trained[0], tmp_path / name) for name in ('first', 'second')]
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    result = protocol.evaluate_checkpoint(runs, out=tmp_path / 'out')
    for row, alone in zip(result['patients'], trained[1]['patients'], strict=True):
        assert row['dice'] == pytest.approx(alone['dice'], abs=1e-3)
        assert 'seen' not in row
    told = result['checkpoint']['members']
    assert [each['workdir'] for each in told] == [str(run) for run in runs]
    assert {each['step'] for each in told} == {trained[1]['checkpoint']['step']}
    report = (tmp_path / 'out' / 'report.html').read_text()
    assert f'--workdir={runs[0]},{runs[1]} ' in report
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in tmp_path.iterdir()} == {'first', 'second', 'out'}


@pytest.mark.slow
def test_cases_on_which_any_member_was_trained_are_told(trained, tmp_path, caplog):
    runs = [shutil.copytree(trained[0], tmp_path / name) for name in ('first', 'second')]
    kept = runs[1] / 'splits.json'
    parts = json.loads(kept.read_text())
    stolen = parts['test'][0]
    parts['test'][0], parts['train'][0] = parts['train'][0], stolen
    kept.write_text(json.dumps(parts))
    result = protocol.evaluate_checkpoint(runs, split='test', out=tmp_path / 'out')
    seen = {row['patient'] for row in result['patients'] if row.get('seen') == 'train'}
    assert seen == {stolen}
    assert 'have images that the run was trained on' in caplog.text


def test_an_ensemble_needs_a_folder_and_is_not_fitted(tmp_path):
    with pytest.raises(ConfigError, match=r'names 2 runs, .*ensemble: give --out=FOLDER'):
        protocol.evaluate_checkpoint(['a', 'b'])
    with pytest.raises(ConfigError, match=r'names 2 runs, .*ensemble: fit one run at a time'):
        protocol.evaluate_checkpoint(
            ['a', 'b'], split='validation', fit=['temperature'], out=tmp_path
        )
    with pytest.raises(ConfigError, match='workdir is empty'):
        protocol.evaluate_checkpoint([])


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match='holds no checkpoint'):
        protocol.evaluate_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_temperature_is_fitted_on_validation_kept_and_applied(trained, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(trained[0], workdir)
    plain = protocol.evaluate_checkpoint(workdir, split='validation')
    fitted = protocol.evaluate_checkpoint(workdir, split='validation', fit=['temperature'])
    kept = json.loads((workdir / 'temperature.json').read_text())
    assert kept['step'] == fitted['checkpoint']['step']
    assert kept['negative_log_likelihood'] < kept['without']
    assert fitted['calibration']['temperature'] == kept['temperature'] != 1
    assert plain['calibration']['temperature'] == 1
    assert fitted['summary'] == plain['summary']  # no label has changed
    assert fitted['calibration']['bins'] != plain['calibration']['bins']
    # Kept: for that checkpoint's next evaluation, on other patients, seen in the same way.
    again = protocol.evaluate_checkpoint(workdir, split='test')
    assert again['calibration']['temperature'] == kept['temperature']
    other = protocol.evaluate_checkpoint(workdir, split='test', changes={'flip': True})
    assert other['calibration']['temperature'] == 1
    assert predictors.load(workdir).temperature == kept['temperature']
    assert predictors.load(workdir, changes={'flip': True}).temperature == 1
    assert predictors.load(workdir, changes={'threshold': 0.4}).temperature == kept['temperature']


def test_views_are_what_changes_probabilities():
    config = tiny_config()
    plain = settings.views(config)
    same = [{'overlap': 0.7}, {'threshold': 0.3}, {'largest_component': True}, {'min_size': 9}]
    for changes in same:
        assert settings.views(with_prediction(config, changes)) == plain
    others = [{'flip': True}, {'scales': (1.0, 1.5)}, {'window': 32}]
    found = [settings.views(with_prediction(config, changes)) for changes in others]
    found.append(settings.views(tiny_config(**{'crf.kernel': 'windowed'})))
    found.append(settings.views(tiny_config(**{'crf.kernel': 'windowed', 'crf.window': 9})))
    found.append(settings.views(with_prediction(config, {'window': 32, 'overlap': 0.7})))
    for one, other in itertools.combinations([plain, *found], 2):
        assert one != other
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize('where', [{'split': 'test'}, {'split': 'validation', 'data': 'folder'}])
def test_a_temperature_is_fitted_on_validation_only(tmp_path, where):
    with pytest.raises(ConfigError, match='--fit_temperature is for'):
        protocol.evaluate_checkpoint(tmp_path, fit=['temperature'], **where)


def test_a_slice_of_nothing_but_ignored_pixels_counts_nowhere():
    ignored = MASK.copy()
    ignored[0] = 255
    wrong = volume('a', ignored)
    wrong.image[1] = 0  # misses the lesion
    result = scores.evaluate_volumes(oracle, [wrong], **OPTIONS)
    # Of two slices that count one is empty and right, one is missed.
    for part in (result['summary'], result['baseline']):
        assert part['per_slice_dice_empty_is_1'] == pytest.approx(1 / 2)
    assert result['data']['ignored_slices'] == 1
    assert result['data']['slices'] == 3


@pytest.mark.slow
def test_pictures_that_the_run_was_trained_on_are_told(trained, tmp_path, caplog):
    """Under other names, in another format: by their pixels."""
    workdir = shutil.copytree(trained[0], tmp_path / 'run')
    slices, parts = sources.load(sources_config(workdir), workdir / 'splits.json')
    for name, new in (
        (parts['train'][0], 'other'), (parts['validation'][0], 'chosen'),
        (parts['test'][0], 'new'),
    ):  # fmt: skip
        (found,) = iterate_volumes(select(slices, [name]))
        for kind, pixels in (('images', found.image), ('masks', found.mask)):
            (tmp_path / 'data' / kind).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / 'data' / kind / f'{new}.npy', pixels[1:3])  # some slices
    with caplog.at_level('WARNING'):
        result = protocol.evaluate_checkpoint(workdir, data=str(tmp_path / 'data'))
    assert result['data']['overlap'] == {
        'train': ['other'], 'validation': ['chosen'], 'same_name': []
    }  # fmt: skip
    folder = workdir / 'evaluation' / 'data'
    written = json.loads((folder / 'evaluation.json').read_text())
    assert written['data']['overlap'] == result['data']['overlap']
    seen = {row['patient']: row.get('seen') for row in written['patients']}
    assert seen == {'other': 'train', 'chosen': 'validation', 'new': None}
    assert '(trained on)' in (folder / 'report.html').read_text()
    assert '1 of 3 patients have images that the run was trained on' in scores.table(result)
    assert '1 of 3 patients have images that the run was trained on' in caplog.text
    assert '1 of 3 patients have images of its validation set' in caplog.text
    caplog.clear()
    (workdir / 'splits.json').unlink()
    with caplog.at_level('WARNING'):
        result = protocol.evaluate_checkpoint(workdir, data=str(tmp_path / 'data'))
    assert result['data']['overlap'] is None
    assert 'it is not known whether the run was trained on these images' in caplog.text
    assert 'overlap' not in protocol.evaluate_checkpoint(workdir)['data']


@pytest.mark.slow
def test_a_run_normalised_as_published_is_so_wherever_images_are_seen(tmp_path, monkeypatch):
    """In training, at the slices' own size, in evaluation and prediction."""
    seen, real = [], pipeline.batches
    monkeypatch.setattr(pipeline, 'batches', lambda slices, *a, **k: seen.append(slices) or
                        real(slices, *a, **k))  # fmt: skip
    config = tiny_config(**{'data.normalize': 'buda', 'data.size': (32, 32), 'phantom.size': 40})
    result = loop.train_and_evaluate(config, str(tmp_path))
    slices, parts = sources.load(config, tmp_path / 'splits.json')  # as the source measures it
    found = {volume.patient: volume for volume in iterate_volumes(slices)}
    expected = {name: measure_head([volume.image]) for name, volume in found.items()}
    assert [*seen[0].intensity] == parts['train']
    for name, intensity in seen[0].intensity.items():
        np.testing.assert_array_equal(intensity, expected[name])
        assert (intensity != slices.intensity[name]).any()
    run = open_run(tmp_path)
    program = infer.compile_predict(run.model, size=(32, 32), batch_size=4)
    predictor = predictors.load(tmp_path)
    for row in result['patients']:
        image = found[row['patient']].image
        labels = program(run.variables, normalize(image, expected[row['patient']])).argmax(-1)
        assert row['predicted_voxels'] == (labels > 0).sum()
        np.testing.assert_array_equal(predictors.predict_array(predictor, image)[0], labels)


def sources_config(workdir):
    return open_run(workdir).config


def test_a_group_is_of_a_folder_of_images(trained):
    with pytest.raises(ConfigError, match='--group is for --data=FOLDER'):
        protocol.evaluate_checkpoint(trained[0], group='(.+)_')
