"""From probabilities to cleaned labels, on numpy arrays."""

import functools
from collections.abc import Callable

import numpy as np
from scipy import ndimage


def to_labels(prob_K: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """... K -> ... uint8: the most probable class, or class 1 where it exceeds the threshold.

    A threshold is for two classes (`config.validate` refuses it for more).
    """
    if threshold is None:
        return prob_K.argmax(-1).astype(np.uint8)
    return (prob_K[..., 1] > threshold).astype(np.uint8)


def keep(sizes: np.ndarray, *, largest_component: bool = False, min_size: int = 0) -> np.ndarray:
    """Which components `clean` keeps, by their sizes (at least one)."""
    kept = sizes >= min_size
    if largest_component:
        kept &= np.arange(len(sizes)) == sizes.argmax()
    return kept


def clean(
    labels_DHW: np.ndarray, *, largest_component: bool = False, min_size: int = 0
) -> np.ndarray:
    """Replace small components by background, class by class.

    `largest_component` keeps one component per class, `min_size` those of at least that many
    voxels; corners connect. Components extend over all axes, so pass unrelated slices one by one.
    """
    if not largest_component and min_size <= 1:
        return labels_DHW
    kept = np.zeros_like(labels_DHW)
    rule = functools.partial(keep, largest_component=largest_component, min_size=min_size)
    for label in np.flatnonzero(np.bincount(labels_DHW.ravel())[1:]) + 1:
        kept[components(labels_DHW == label, rule)] = label
    return kept


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest connected component (corners connect) of a boolean array, any rank."""
    return components(mask, lambda sizes: np.arange(len(sizes)) == sizes.argmax())


def components(mask: np.ndarray, keep: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The connected components (corners connect) of a boolean array of any rank that `keep`
    selects by their sizes.
    """
    if not (found := label_components(mask)):
        return mask
    box, parts, sizes = found
    kept = np.zeros_like(mask)
    kept[box] = np.concatenate([[False], keep(sizes)])[parts]
    return kept


def label_components(
    mask: np.ndarray,
) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray] | None:
    """(bounding box of the mask; in the box, each voxel's component number or 0; sizes from
    number 1 on). None for an empty mask.
    """
    boxes = ndimage.find_objects(mask.astype(np.uint8))
    if not boxes:
        return None
    (box,) = boxes
    corners = ndimage.generate_binary_structure(mask.ndim, mask.ndim)
    parts, count = ndimage.label(mask[box], corners)
    sizes = sum(np.bincount(rows.ravel(), minlength=count + 1) for rows in parts)
    return box, parts, sizes[1:]
