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

FIT_VOXELS = 50_000  # of each validation patient, to fit the temperature


def fit_temperature(
    predict_fn: PredictFn,
    data: Iterable[Volume],
    *,
    batching: Batching,
    scoring: Scoring,
) -> dict[str, Any]:
    """Fit the 'temperature'; also the negative log likelihood with and without it, and counts.

    It uses at most FIT_VOXELS random voxels per volume, so that large volumes do not dominate.
    Raises DataError if there is nothing to fit on.
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
    """`choose` by each volume's Dice for each combination of the options in `tried` (see `grid`).

    The network runs once per volume and `program(flip)`. On several hosts `data` are this host's
    volumes and `order` the patients of all hosts.
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
    """{option: values to try}, starting with `own`, which is the only one if the option is `given`.

    With more than two classes there is no threshold: the likeliest class is taken.
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
    """(largest, min_sizes, structures, 3) int64: `metrics.counts` after `postprocess.clean` of each
    scan, for each combination of `largest` and `min_sizes`.

    Components are labelled only once: their counts add up, and classes are cleaned independently.
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
    """(..., structures, 3) -> (...): the mean over structures, NaN if all are undefined."""
    return _mean(metrics.ratios(counts)['dice'], axis=-1)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    with np.errstate(invalid='ignore'):
        return np.nansum(values, axis) / np.count_nonzero(~np.isnan(values), axis)


def combinations(tried: Mapping[str, Sequence[Any]], dice_PN: np.ndarray) -> list[dict[str, Any]]:
    """One row per combination, in the order of `itertools.product`: its options, 'dice' and 'n'.

    'dice' is the mean over the 'n' of P patients where it is defined, None if 'n' is 0.
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
    """The row with the highest Dice; among ties (`TIE`) the one that changes the fewest options.

    Raises DataError if no Dice is defined.
    """
    defined = [row for row in rows if row['dice'] is not None]
    if not defined:
        raise DataError(
            'no validation case has an object, so there is no Dice to choose post-processing by: '
            'raise --config.data.validation_fraction and train again'
        )
    highest = max(row['dice'] for row in defined)
    return min(
        (row for row in defined if row['dice'] >= highest - TIE),
        key=lambda row: sum(row[key] != values[0] for key, values in tried.items()),
    )


def choose(tried: Mapping[str, Sequence[Any]], dice_PN: np.ndarray) -> dict[str, Any]:
    """The choice by the Dice of P patients and N combinations, as `save` stores it.

    It has the 'options', their 'dice' and the Dice 'without' them, the number of 'patients', and
    under 'best' the best row for each value that was tried.
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
