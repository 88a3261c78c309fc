"""Fitting on validation cases: the temperature, and the choice of post-processing."""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pspnet_jax.data import volumes
from pspnet_jax.data.volumes import Volume
from pspnet_jax.evaluation import metrics
from pspnet_jax.evaluation.scores import (
    Batching,
    PredictFn,
    Scoring,
    check_labels,
    in_order,
    predict_slices,
)
from pspnet_jax.inference import calibration, postprocess
from pspnet_jax.inference.choice import OPTIONS
from pspnet_jax.runtime import hosts
from pspnet_jax.runtime.errors import DataError

FIT_VOXELS = 50_000  # of each validation patient that the temperature is fitted on


def fit_temperature(
    predict_fn: PredictFn,
    data: Iterable[Volume],
    *,
    batching: Batching,
    scoring: Scoring,
) -> dict[str, Any]:
    """'temperature', the negative log likelihood without and with it, and over how much.

    On at most FIT_VOXELS voxels a volume, drawn evenly, so small volumes weigh what large
    ones do. Raises DataError when there is nothing to fit on.
    """
    probs, labels = [], []
    for index, volume in enumerate(data):
        check_labels(volume, scoring)
        start, depth = 0, len(volume.mask)
        for part in predict_slices(predict_fn, volume, batching):
            mask, count = volume.mask[start : start + len(part)], FIT_VOXELS * len(part) // depth
            prob, label = calibration.sample(
                part, mask, scoring.ignore_label, count, [index, start]
            )
            probs.append(prob)
            labels.append(label)
            start += len(part)
    if not sum(map(len, labels)):
        raise DataError('there is no voxel to fit the temperature on: the split is empty')
    prob, label = np.concatenate(probs), np.concatenate(labels)
    temperature = calibration.fit(prob, label)
    return {
        'temperature': temperature,
        'negative_log_likelihood': calibration.negative_log_likelihood(prob, label, temperature),
        'without': calibration.negative_log_likelihood(prob, label, 1.0),
        'voxels': len(label),
        'patients': index + 1,
    }


def choose_postprocessing(
    program: Callable[[bool], PredictFn],
    data: Iterable[Volume],
    *,
    tried: Mapping[str, Sequence[Any]],
    batching: Batching,
    scoring: Scoring,
    order: Sequence[str] = (),
) -> dict[str, Any]:
    """`choose` of the Dice that `evaluate_volumes` has of each volume for each combination
    of what is `tried` (`choice.grid`). The network runs once a volume for each `program(flip)`.

    On several hosts `data` are this one's volumes and `order` the patients of all.
    """
    structures, rows = scoring.structures, []
    for volume in data:
        check_labels(volume, scoring)
        dice = []
        for flip in tried['flip']:
            parts = predict_slices(program(flip), volume, batching)
            labels = zip(
                *([postprocess.to_labels(part, t) for t in tried['threshold']] for part in parts),
                strict=True,
            )
            for of_one in labels:
                counts = tally(
                    np.concatenate(of_one),
                    volume.mask,
                    scans=volumes.scans(volume.scan, len(volume.mask)),
                    structures=structures,
                    ignore_label=scoring.ignore_label,
                    largest=tried['largest_component'],
                    min_sizes=tried['min_size'],
                )
                dice += mean_dice(counts).ravel().tolist()
        rows.append([{'patient': volume.patient}, dice])
    rows = in_order(hosts.gather(rows), order)
    if not rows:
        raise DataError('there is no volume to choose post-processing on: the split is empty')
    return choose(tried, np.array([dice for _, dice in rows]))


THRESHOLDS = tuple(n / 20 for n in range(2, 19))  # 0.1 to 0.9, of two classes
MIN_SIZES = (0, 10, 30, 100, 300, 1000)  # voxels
TIE = 1e-9  # of Dice


def grid(own: Mapping[str, Any], num_classes: int, given: Collection[str]) -> dict[str, list[Any]]:
    """{option: values to try}, the first of each is `own`; those that were `given` have no other.

    More than two classes have no threshold: the likeliest is taken.
    """
    values = {
        'flip': (False, True),
        'threshold': THRESHOLDS if num_classes == 2 else (),
        'largest_component': (False, True),
        'min_size': MIN_SIZES,
    }
    return {
        key: list(dict.fromkeys([own[key], *(() if key in given else values[key])]))
        for key in OPTIONS
    }


def tally(
    labels_DHW: np.ndarray,
    mask_DHW: np.ndarray,
    *,
    scans: Sequence[np.ndarray],
    structures: Sequence[int],
    ignore_label: int,
    largest: Sequence[bool],
    min_sizes: Sequence[int],
) -> np.ndarray:
    """(largest, min_sizes, structures, 3) int64: `metrics.counts` of what `postprocess.clean`
    leaves of each scan, for each of `largest` with each of `min_sizes`.

    Components are labelled once: what they hold adds up, and cleaning one class changes no other.
    """
    counts = np.zeros((len(largest), len(min_sizes), len(structures), 3), np.int64)
    counted = mask_DHW != ignore_label
    for s, label in enumerate(structures):
        theirs = mask_DHW == label
        for rows in scans:
            if not (found := postprocess.label_components(labels_DHW[rows] == label)):
                continue
            box, parts, sizes = found
            hits, seen = (
                np.bincount(parts[where[rows][box]], minlength=len(sizes) + 1)[1:]
                for where in (theirs, counted)
            )
            for i, one in enumerate(largest):
                for j, size in enumerate(min_sizes):
                    kept = postprocess.keep(sizes, largest_component=one, min_size=size)
                    counts[i, j, s, :2] += hits[kept].sum(), (seen - hits)[kept].sum()
        counts[..., s, 2] = np.count_nonzero(theirs) - counts[..., s, 0]
    return counts


def mean_dice(counts: np.ndarray) -> np.ndarray:
    """(..., structures, 3) -> (...): the mean over structures, NaN where all are undefined."""
    return _mean(metrics.ratios(counts)['dice'], axis=-1)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    with np.errstate(invalid='ignore'):
        return np.nansum(values, axis) / np.count_nonzero(~np.isnan(values), axis)


def combinations(tried: Mapping[str, Sequence[Any]], dice_PN: np.ndarray) -> list[dict[str, Any]]:
    """A row a combination, in the order of `itertools.product`: its options, 'dice', the mean over
    those of P patients where it is defined, None where it is of none, and 'n', how many these are.
    """
    return [
        {
            **dict(zip(tried, values, strict=True)),
            'dice': None if np.isnan(dice) else float(dice),
            'n': int(n),
        }
        for values, dice, n in zip(
            itertools.product(*tried.values()),
            _mean(dice_PN, axis=0),
            np.count_nonzero(~np.isnan(dice_PN), axis=0),
            strict=True,
        )
    ]


def best(rows: Sequence[dict[str, Any]], tried: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The row of the highest Dice; of several within `TIE` that which changes the fewest options.

    Raises DataError where no Dice is defined.
    """
    defined = [row for row in rows if row['dice'] is not None]
    if not defined:
        raise DataError(
            'no validation case has an object, so there is no Dice to choose post-processing by: '
            'raise data.validation_fraction and train again'
        )
    highest = max(row['dice'] for row in defined)
    return min(
        (row for row in defined if row['dice'] >= highest - TIE),
        key=lambda row: sum(row[key] != values[0] for key, values in tried.items()),
    )


def choose(tried: Mapping[str, Sequence[Any]], dice_PN: np.ndarray) -> dict[str, Any]:
    """What `save` keeps of Dice of P patients and N combinations: 'options', their 'dice' and that
    'without', over how many 'patients', and under 'best' the best row of each value tried.
    """
    rows = combinations(tried, dice_PN)
    found = best(rows, tried)
    several = [(key, value) for key, values in tried.items() if values[1:] for value in values]
    return {
        'options': {key: found[key] for key in tried},
        'dice': found['dice'],
        'without': rows[0]['dice'],
        'patients': len(dice_PN),
        'n': found['n'],
        'best': [
            {'of': key, **best(some, tried)}
            for key, value in several
            for some in [[row for row in rows if row[key] == value]]
            if any(row['dice'] is not None for row in some)
        ],
    }
