"""Volumes and slices, the two shapes in which data travels, and their intensities.

Training reads slices in any order; evaluation reads whole volumes. A source
(phantom, lgg) makes a `Slices`, everything else here is a function of one.
"""

import collections
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

MEMINFO = Path('/proc/meminfo')
IGNORE_LABEL = 255  # pixels that count in no loss and no metric


class Volume(NamedTuple):
    """One patient: image D H W C, mask D H W uint8, D slice numbers, (4, C) intensity.

    The image is uint8, uint16 or float32; spacing is (slice, row, column) in mm, None unknown.
    `scan` is a number for each of the D slices: those of one number are neighbours in space, a
    picture has its own. None: all D slices are one scan.
    """

    patient: str
    image: np.ndarray
    mask: np.ndarray
    slices: np.ndarray
    intensity: np.ndarray
    spacing: tuple[float, float, float] | None = None
    scan: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Slices:
    """N slices, ordered by patient and slice number.

    `read(key)` gives image H W C (uint8, uint16 or float32) and mask H W uint8; the arrays,
    all of length N, are the keys, and what sampling needs to know without reading.
    `intensity` holds each patient's (4, C) array from `measure_intensity`, `spacing` the
    patients' steps in mm where they are known. `scan` is `Volume`'s, of length N: a source
    whose patients may be several pictures or volumes sets it.
    """

    read: Callable[[int], tuple[np.ndarray, np.ndarray]]
    key: np.ndarray
    patient: np.ndarray
    slice: np.ndarray
    lesion_pixels: np.ndarray
    intensity: dict[str, np.ndarray]
    spacing: dict[str, tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    scan: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.key)

    @property
    def channels(self) -> int:
        return next(iter(self.intensity.values())).shape[-1]


def select(slices: Slices, patients: Sequence[str]) -> Slices:
    """The slices of these patients."""
    keep = np.isin(slices.patient, list(patients))
    return dataclasses.replace(
        slices,
        key=slices.key[keep],
        patient=slices.patient[keep],
        slice=slices.slice[keep],
        lesion_pixels=slices.lesion_pixels[keep],
        scan=None if slices.scan is None else slices.scan[keep],
        intensity={patient: slices.intensity[patient] for patient in patients},
    )


def describe(slices: Slices) -> str:
    """'70 patients, 2536 slices, 902 with lesion'."""
    return (
        f'{len(slices.intensity)} patients, {len(slices)} slices, '
        f'{np.count_nonzero(slices.lesion_pixels)} with lesion'
    )


def iterate_volumes(slices: Slices) -> Iterator[Volume]:
    """Whole volumes, one in memory at a time, in the order of their names.

    A patient whose slices have several sizes is a volume a size, 'NAME HEIGHTxWIDTH'.
    """
    for patient in sorted(set(slices.patient.tolist())):
        by_size = collections.defaultdict(list)
        for row in np.flatnonzero(slices.patient == patient):
            image, mask = slices.read(int(slices.key[row]))
            by_size[mask.shape].append((row, image, mask))
        for (height, width), found in by_size.items():
            rows, image, mask = zip(*found, strict=True)
            yield Volume(
                patient if len(by_size) == 1 else f'{patient} {height}x{width}',
                np.stack(image),
                np.stack(mask),
                slices.slice[list(rows)],
                slices.intensity[patient],
                slices.spacing.get(patient),
                None if slices.scan is None else slices.scan[list(rows)],
            )


def scans(scan: np.ndarray | None, depth: int) -> list[np.ndarray]:
    """Rows of each scan of `depth` slices: `Volume.scan`, or all of them where that is None."""
    if scan is None:
        return [np.arange(depth)]
    return [np.flatnonzero(scan == number) for number in np.unique(scan)]


def from_volumes(volumes: Sequence[Volume]) -> Slices:
    """Slices of volumes that are in memory."""
    image = [pixels for volume in volumes for pixels in volume.image]
    mask = [labels for volume in volumes for labels in volume.mask]
    return Slices(
        read=lambda key: (image[key], mask[key]),
        key=np.arange(len(image)),
        patient=np.concatenate([[v.patient] * len(v.mask) for v in volumes]),
        slice=np.concatenate([v.slices for v in volumes]),
        lesion_pixels=np.array([lesion_pixels(labels) for labels in mask]),
        intensity={v.patient: v.intensity for v in volumes},
        spacing={v.patient: v.spacing for v in volumes if v.spacing is not None},
        scan=np.concatenate([np.zeros(len(v.mask)) if v.scan is None else v.scan for v in volumes]),
    )


def free_memory() -> int:
    """Bytes that a program can still take; half of all where the system does not say."""
    found = MEMINFO.exists() and re.search(r'MemAvailable: *(\d+) kB', MEMINFO.read_text())
    if found:
        return 1024 * int(found[1])
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2


def in_memory(slices: Slices) -> Slices:
    """The same slices, each decoded once and kept; as they are where half the memory is too
    little for all, which the log says.
    """
    if not len(slices):
        return slices
    needed = len(slices) * sum(array.nbytes for array in slices.read(int(slices.key[0])))
    free = free_memory()
    fits = needed <= free / 2
    logger.info(
        '%d slices decoded are %.0f MB, %.0f MB are free: %s',
        len(slices),
        needed / 2**20,
        free / 2**20,
        'kept in memory' if fits else 'decoded each time they are read',
    )
    if not fits:
        return slices
    return dataclasses.replace(slices, read=functools.cache(slices.read))


def resized(slices: Slices, size: tuple[int, int]) -> Slices:
    """The same slices at H W pixels."""

    def read(key: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = slices.read(key)
        return resize_image(image, size), resize_labels(mask, size)

    return dataclasses.replace(slices, read=read)


def resize_image(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """h w C at H W pixels, of the same type: bilinear, averaging where it shrinks."""
    if image_HWC.shape[:2] == tuple(size):
        return image_HWC
    channels = [
        Image.fromarray(channel).resize(size[::-1], Image.Resampling.BILINEAR)
        for channel in np.moveaxis(image_HWC.astype(np.float32), -1, 0)
    ]
    out = np.stack(channels, axis=-1)
    return out if image_HWC.dtype == np.float32 else np.rint(out).astype(image_HWC.dtype)


def resize_labels(mask_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """h w labels at H W pixels: each takes the label at its centre (`centres`)."""
    rows, columns = (centres(n, old) for n, old in zip(size, mask_HW.shape, strict=True))
    return mask_HW[rows][:, columns]


def centres(cells: int, size: int) -> np.ndarray:
    """(cells,) pixels of `size` that lie nearest to the centres of as many cells of equal width.

    At even ratios two pixels are equally near: even cells take the lower, odd ones the upper,
    so that nothing moves on average. (Always the upper, as PyTorch's 'nearest-exact' has it, moves
    labels by half a pixel against the image.)
    """
    i = np.arange(cells)
    doubled = (2 * i + 1) * size - cells  # the centre is pixel doubled / (2 cells)
    lower, upper = -((cells - doubled) // (2 * cells)), (doubled + cells) // (2 * cells)
    return np.where(i % 2, upper, lower)


def lesion_pixels(mask: np.ndarray, ignore_label: int = IGNORE_LABEL) -> int:
    """Pixels that are neither background nor ignored."""
    return int(np.count_nonzero((mask != 0) & (mask != ignore_label)))


def measure_intensity(image: np.ndarray) -> np.ndarray:
    """(4, C) float32 of a volume D H W C: low, high, mean and deviation of each channel.

    After Buda et al. 2019: clip to the 10th and 99th percentile, then z-score over
    the volume. MRI intensities have no unit, so each volume brings its own scale.
    Deviations: no crop to the head first, so low is usually the black background; a
    constant channel gets deviation 1.
    """
    values = image.reshape(-1, image.shape[-1]).astype(np.float32)
    low, high = np.percentile(values, (10, 99), axis=0)
    clipped = np.clip(values, low, high)
    mean, std = clipped.mean(axis=0, dtype=np.float64), clipped.std(axis=0, dtype=np.float64)
    return np.stack([low, high, mean, np.where(std > 1e-6, std, 1.0)]).astype(np.float32)


def normalize(image: np.ndarray, intensity: np.ndarray) -> np.ndarray:
    """... C uint8 -> float32: clipped to low..high, minus mean, over deviation.

    Times the reciprocal, as XLA does it in `train.gather`: so both have the same bits.
    """
    low, high, mean, std = intensity
    return (np.clip(image.astype(np.float32), low, high) - mean) * (1 / std)
