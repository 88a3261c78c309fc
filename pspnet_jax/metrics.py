"""Metrics: counts first, merged by +, the ratio last. Undefined is NaN.

Arrays in, arrays out, on the host. What a number is a mean over (volume, slice,
pooled pixels) is decided, and named, by whoever adds the counts up.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage


def counts(pred: np.ndarray, true: np.ndarray, num_classes: int, ignore_label: int = 255):
    """(K, 3) int64: true positives, false positives, false negatives of each class.

    `pred` and `true` are label arrays of one shape; pixels whose truth is
    `ignore_label` count nowhere.
    """
    counted = true != ignore_label
    pred, true = pred[counted].astype(np.int64), true[counted].astype(np.int64)
    confusion = np.bincount(true * num_classes + pred, minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes)
    hit = np.diag(confusion)
    return np.stack([hit, confusion.sum(0) - hit, confusion.sum(1) - hit], axis=-1)


def ratios(counts: np.ndarray) -> dict[str, np.ndarray]:
    """(..., 3) counts -> dice, iou, sensitivity, precision, each (...); 0/0 is NaN."""
    tp, fp, fn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    with np.errstate(invalid='ignore', divide='ignore'):
        return {
            'dice': 2 * tp / (2 * tp + fp + fn),
            'iou': tp / (tp + fp + fn),
            'sensitivity': tp / (tp + fn),
            'precision': tp / (tp + fp),
        }


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest connected component (corners connect) of a boolean array, any rank."""
    labels, n = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, mask.ndim))
    if n <= 1:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def hd95(pred: np.ndarray, true: np.ndarray, spacing: Sequence[float]) -> float:
    """95th percentile Hausdorff distance between two boolean volumes, in spacing's unit.

    The larger of the two directed 95th percentiles of the distance from one mask's
    surface (voxels with a face neighbour outside it) to the other's. NaN when a mask
    is empty: there is no surface to measure to.
    """
    if not pred.any() or not true.any():
        return float('nan')
    # Only the box around both masks matters; one voxel of margin keeps surfaces surfaces.
    where = np.argwhere(pred | true)
    box = tuple(slice(a, b + 1) for a, b in zip(where.min(0), where.max(0), strict=True))
    pred, true = np.pad(pred[box], 1), np.pad(true[box], 1)
    pred_surface = pred & ~ndimage.binary_erosion(pred)
    true_surface = true & ~ndimage.binary_erosion(true)
    to_true = ndimage.distance_transform_edt(~true_surface, sampling=spacing)
    to_pred = ndimage.distance_transform_edt(~pred_surface, sampling=spacing)
    return float(
        max(np.percentile(to_true[pred_surface], 95), np.percentile(to_pred[true_surface], 95))
    )


def bootstrap_ci(values: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean over resampled patients; NaNs are left out."""
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return [float('nan')] * 2
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return np.percentile(values[draws].mean(axis=1), (2.5, 97.5)).tolist()
