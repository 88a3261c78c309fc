"""Volumes and slices, the two shapes in which data travels, and their intensities.

Training reads slices in any order; evaluation reads whole volumes. A source
(phantom, lgg) makes a `Slices`, everything else here is a function of one.
"""

import collections
import contextlib
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

MEMINFO, STATUS = Path('/proc/meminfo'), Path('/proc/self/status')
GROUPS, OWN_GROUP = Path('/sys/fs/cgroup'), Path('/proc/self/cgroup')
GROUPS_V1 = ('memory.limit_in_bytes', 'memory.usage_in_bytes')
IGNORE_LABEL = 255  # pixels that count in no loss and no metric


class Volume(NamedTuple):
    """One patient: image D H W C, mask D H W uint8, D slice numbers, (4, C) intensity.

    The image is uint8, uint16 or float32; spacing is (slice, row, column) in mm, None unknown.
    """

    patient: str
    image: np.ndarray
    mask: np.ndarray
    slices: np.ndarray
    intensity: np.ndarray
    spacing: tuple[float, float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Slices:
    """N slices, ordered by patient and slice number.

    `read(key)` gives image H W C (uint8, uint16 or float32) and mask H W uint8; the arrays,
    all of length N, are the keys, and what sampling needs to know without reading.
    `intensity` holds each patient's (4, C) array from `measure_intensity`, `spacing` the
    patients' steps in mm where they are known, `class_names` those of all classes in turn where the
    source names them.
    """

    read: Callable[[int], tuple[np.ndarray, np.ndarray]]
    key: np.ndarray
    patient: np.ndarray
    slice: np.ndarray
    lesion_pixels: np.ndarray
    intensity: dict[str, np.ndarray]
    spacing: dict[str, tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()

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
            )


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
    )


def free_memory() -> int:
    """Bytes that this program can still take: of the machine, of its container, by its ulimit.

    Half of the machine's where the system does not say.
    """
    found = MEMINFO.exists() and re.search(r'MemAvailable: *(\d+) kB', MEMINFO.read_text())
    if found:
        free = 1024 * int(found[1])
    else:
        free = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2
    return max(min([free, *_group_limits(), *_process_limits()]), 0)


def _group_limits() -> Iterator[int]:
    """Bytes left in the control groups that this process is in, as Docker and Slurm set them."""
    own = OWN_GROUP.read_text() if OWN_GROUP.exists() else ''
    for root, line, names in (
        (GROUPS, r'^0::(/.*)$', ('memory.max', 'memory.current')),
        (GROUPS / 'memory', r'^\d+:memory:(/.*)$', GROUPS_V1),
    ):
        below = re.search(line, own, re.MULTILINE)
        folder = root / below[1].lstrip('/') if below else root
        for place in (folder, *folder.parents):  # a limit of any group above holds too
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((place / name).read_text()) for name in names)
                stat = (place / 'memory.stat').read_text()
                cache = re.search(r'^inactive_file (\d+)$', stat, re.MULTILINE)
                yield limit - used + (int(cache[1]) if cache else 0)
            if place == root:
                break


def _process_limits() -> Iterator[int]:
    """Bytes left of the address space and of the data that `ulimit` allows."""
    with contextlib.suppress(ImportError, OSError):
        import resource

        used = 1024 * int(re.search(r'VmSize:\s*(\d+) kB', STATUS.read_text())[1])
        for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY:
                yield limit - used


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
    """h w labels at H W pixels: each takes the label at its centre."""
    rows, columns = (
        ((np.arange(n) + 0.5) * old / n).astype(int)
        for n, old in zip(size, mask_HW.shape, strict=True)
    )
    return mask_HW[rows][:, columns]


def lesion_pixels(mask: np.ndarray) -> int:
    """Pixels that are neither background nor ignored."""
    return int(np.count_nonzero((mask != 0) & (mask != IGNORE_LABEL)))


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
