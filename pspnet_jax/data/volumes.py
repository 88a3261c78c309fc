"""Volumes and slices, the two forms of data, and their intensities.

Training reads slices in any order; evaluation reads whole volumes. A source (phantom, lgg) makes
a `Slices`, on which the functions here work.
"""

import collections
import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pspnet_jax.data.formats.limits import free_memory
from pspnet_jax.runtime.errors import DataError

logger = logging.getLogger(__name__)

IGNORE_LABEL = 255  # pixels that count in no loss and no metric
STEP, LARGEST = 32, 512  # side in pixels of the size that is chosen for slices of several sizes
RANGE_PIXELS = 2**20  # evenly spread pixels of an image on which its range is measured


class Volume(NamedTuple):
    """One patient: image D H W C, mask D H W uint8, D slice numbers, (4, C) intensity.

    The image is uint8, uint16 or float32; spacing is (slice, row, column) in mm, None if unknown.
    `scan` is a number for each of the D slices: slices with the same number are neighbours in
    space, a 2D image has a number of its own. None: all D slices are one scan.
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

    `read(key)` returns image H W C (uint8, uint16 or float32) and mask H W uint8. `key`, `patient`,
    `slice` and `lesion_pixels` have length N: the keys, and what sampling needs without reading.

    By patient: `intensity` is the (4, C) array from `measure_intensity`, `spacing` the step in mm
    if known, `ranges` the `measure_range` if images are not 8-bit. `class_names` are those of all
    classes in order, if the source names them. `num_classes` includes background.

    Arrays of length N, or None: `scan` as in `Volume`, if patients may be several images or
    volumes; `digest` from `picture_digest`, if the source reads all slices anyway; `sizes` (N, 2),
    the files' heights and widths (None: all slices have one size); `content` (N, 4), the top, left,
    height and width of the picture in a slice that was `resized` with its aspect ratio, outside of
    which it is 0 after normalisation. `read_own` then reads slices at their own size.
    """

    read: Callable[[int], tuple[np.ndarray, np.ndarray]]
    key: np.ndarray
    patient: np.ndarray
    slice: np.ndarray
    lesion_pixels: np.ndarray
    intensity: dict[str, np.ndarray]
    spacing: dict[str, tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    ranges: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    scan: np.ndarray | None = None
    digest: np.ndarray | None = None
    read_own: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None
    content: np.ndarray | None = None
    sizes: np.ndarray | None = None
    num_classes: int = 2

    def __len__(self) -> int:
        return len(self.key)

    @property
    def channels(self) -> int:
        return next(iter(self.intensity.values())).shape[-1]


def select(slices: Slices, patients: Sequence[str]) -> Slices:
    """The slices of these patients."""
    keep = np.isin(slices.patient, list(patients))
    unless_known = ('scan', 'digest', 'content', 'sizes')
    rows = ('key', 'patient', 'slice', 'lesion_pixels', *unless_known)
    arrays = {name: getattr(slices, name) for name in rows}
    return dataclasses.replace(
        slices,
        **{name: array if array is None else array[keep] for name, array in arrays.items()},
        intensity={patient: slices.intensity[patient] for patient in patients},
    )


def describe(slices: Slices) -> str:
    """'70 cases, 2,536 images, 902 with a structure'."""
    cases, images = len(slices.intensity), len(slices)
    return (
        f'{cases:,} case{"s" * (cases != 1)}, {images:,} image{"s" * (images != 1)}, '
        f'{np.count_nonzero(slices.lesion_pixels):,} with a structure'
    )


def iterate_volumes(slices: Slices, method: str = 'volume') -> Iterator[Volume]:
    """Whole volumes, one in memory at a time, in the order of their names.

    A patient with slices of several sizes gives one volume per size, 'NAME HEIGHTxWIDTH'. With
    `method` 'volume', intensities are those of `slices`; otherwise they are measured again.
    """
    for patient in sorted(set(slices.patient.tolist())):
        by_size = collections.defaultdict(list)
        for row in np.flatnonzero(slices.patient == patient):
            image, mask = slices.read(int(slices.key[row]))
            by_size[mask.shape].append((row, image, mask))
        sizes = {
            size: [np.array(rows), *map(np.stack, arrays)]
            for size, found in by_size.items()
            for rows, *arrays in [zip(*found, strict=True)]
        }
        intensity = slices.intensity[patient]
        if method != 'volume':
            intensity = measure([image for _, image, _ in sizes.values()], method)
        for (height, width), (rows, image, mask) in sizes.items():
            yield Volume(
                patient if len(by_size) == 1 else f'{patient} {height}x{width}',
                image,
                mask,
                slices.slice[rows],
                intensity,
                slices.spacing.get(patient),
                None if slices.scan is None else slices.scan[rows],
            )


def measured(slices: Slices, method: str) -> Slices:
    """The same slices with their patients' intensities measured by `method`, at their own size.

    It reads all slices once, except for 'volume', which every source measures itself.
    """
    if method == 'volume':
        return slices
    own = dataclasses.replace(slices, read=slices.read_own or slices.read)
    intensity = {
        patient: next(iterate_volumes(select(own, [patient]), method)).intensity
        for patient in slices.intensity
    }
    return dataclasses.replace(slices, intensity=intensity)


def scans(scan: np.ndarray | None, depth: int) -> list[np.ndarray]:
    """The rows of each scan among `depth` slices; all rows if `scan` is None (see `Volume`)."""
    if scan is None:
        return [np.arange(depth)]
    return [np.flatnonzero(scan == number) for number in np.unique(scan)]


def channels_seen(channels: int, context: int) -> int:
    """The number of channels that the network sees: those of a slice and of `context` neighbours on
    each side (data.context).
    """
    return channels * (2 * context + 1)


def neighbours(scan: np.ndarray | None, depth: int, context: int) -> np.ndarray:
    """(D, 2 context + 1) rows: for each of `depth` slices, its own row between its neighbours'.

    Neighbours belong to the same scan (see `scans`); its first and last slice are repeated.
    """
    rows = np.empty((depth, 2 * context + 1), np.intp)
    for own in scans(scan, depth):
        places = np.arange(len(own))[:, None] + np.arange(-context, context + 1)
        rows[own] = own[np.clip(places, 0, len(own) - 1)]
    return rows


def stack(image_DHWC: np.ndarray, rows_Bn: np.ndarray) -> np.ndarray:
    """B H W nC: the n slices of each row, concatenated along the channels."""
    return np.concatenate([image_DHWC[rows_B] for rows_B in rows_Bn.T], axis=-1)


def tile(intensity: np.ndarray, context: int) -> np.ndarray:
    """(4, C) repeated for the channels of neighbours, which share the scan's scale."""
    return np.tile(intensity, (1, 2 * context + 1))


def with_context(slices: Slices, context: int) -> Slices:
    """The same slices with the channels of `context` neighbours; `ranges` stay as they are.

    A slice is read again for each neighbour, unless it is among the last few.
    """
    if not context:
        return slices
    around = {}
    for patient in slices.intensity:
        rows = np.flatnonzero(slices.patient == patient)
        scan, keys = None if slices.scan is None else slices.scan[rows], slices.key[rows]
        keys_Dn = keys[neighbours(scan, len(rows), context)]
        around |= zip(keys.tolist(), keys_Dn.tolist(), strict=True)
    if all(len(set(keys)) == 1 for keys in around.values()):
        logger.warning(
            'data.context=%d, but no slice has a neighbour, so each is stacked with itself: tell '
            'which slices form a volume, data.group="(.+)_(?P<slice>[0-9]+)", or set '
            'data.context=0', context,
        )  # fmt: skip
    read_one = functools.lru_cache(maxsize=2 * context + 1)(slices.read)

    def read(key: int) -> tuple[np.ndarray, np.ndarray]:
        found = {other: read_one(other) for other in around[key]}
        image = np.concatenate([found[other][0] for other in around[key]], axis=-1)
        return image, found[key][1]

    intensity = {name: tile(own, context) for name, own in slices.intensity.items()}
    return dataclasses.replace(slices, read=read, intensity=intensity)


def from_volumes(volumes: Sequence[Volume]) -> Slices:
    """Slices of volumes in memory."""
    image = [pixels for volume in volumes for pixels in volume.image]
    mask = [labels for volume in volumes for labels in volume.mask]
    return Slices(
        read=lambda key: (image[key], mask[key]),
        key=np.arange(len(image)),
        patient=np.concatenate([[v.patient] * len(v.mask) for v in volumes]),
        slice=np.concatenate([v.slices for v in volumes]),
        lesion_pixels=np.array([lesion_pixels(labels) for labels in mask]),
        intensity={v.patient: v.intensity for v in volumes},
        ranges={v.patient: measure_range(v.image) for v in volumes if v.image.dtype != np.uint8},
        digest=np.array([picture_digest(pixels) for pixels in image]),
        spacing={v.patient: v.spacing for v in volumes if v.spacing is not None},
        scan=np.concatenate([np.zeros(len(v.mask)) if v.scan is None else v.scan for v in volumes]),
    )


def with_intensity(volume: Volume, method: str) -> Volume:
    """The volume of a whole patient with intensities measured by `method`."""
    if method == 'volume':
        return volume
    return volume._replace(intensity=measure([volume.image], method))


def with_channels(volume: Volume, channels: int) -> Volume:
    """The volume with the network's number of channels, see `fit_channels`."""
    if volume.image.shape[-1] == channels:
        return volume
    image = fit_channels(volume.image, channels, volume.patient)
    intensity = np.resize(volume.intensity.T, (channels, 4)).T
    return volume._replace(image=image, intensity=intensity)


def fit_channels(image_DHWC: np.ndarray, channels: int, name: Any) -> np.ndarray:
    """Turn grey into three equal channels, or three equal channels into grey, for the network.

    Raises DataError for other numbers of channels.
    """
    found = image_DHWC.shape[-1]
    if found == channels:
        return image_DHWC
    if (found, channels) == (1, 3):
        return np.broadcast_to(image_DHWC, (*image_DHWC.shape[:-1], 3))
    if (found, channels) == (3, 1) and (image_DHWC == image_DHWC[..., :1]).all():
        return image_DHWC[..., :1]
    raise DataError(f'{name} has {found} channels, but the network takes {channels}')


def in_memory(slices: Slices) -> Slices:
    """The same slices, each decoded once and kept in memory.

    If they need more than half of the free memory, they are returned as they are; that is logged.
    """
    if not len(slices):
        return slices
    needed = len(slices) * sum(array.nbytes for array in slices.read(int(slices.key[0])))
    free = free_memory()
    if needed > free / 2:
        logger.info(
            '%d images would take %.0f of %.0f MB of free memory, so they are decoded each time '
            'they are read',
            len(slices),
            needed / 2**20,
            free / 2**20,
        )
        return slices
    return dataclasses.replace(slices, read=functools.cache(slices.read))


def resized(
    slices: Slices, size: tuple[int, int], fit: str = 'letterbox', ignore_label: int = IGNORE_LABEL
) -> Slices:
    """The same slices at H W pixels: 'letterbox' keeps the aspect ratio and pads with
    `ignore_label`, `fit` 'stretch' fills height and width.
    """
    if fit == 'stretch':

        def stretch(key: int) -> tuple[np.ndarray, np.ndarray]:
            image, mask = slices.read(key)
            return resize_image(image, size), resize_labels(mask, size)

        return dataclasses.replace(slices, read=stretch, read_own=slices.read)

    def read(key: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = slices.read(key)
        top, left, height, width = letterbox(mask.shape, size)
        around = [(top, size[0] - top - height), (left, size[1] - left - width)]
        image, mask = resize_image(image, (height, width)), resize_labels(mask, (height, width))
        return np.pad(image, [*around, (0, 0)]), np.pad(mask, around, constant_values=ignore_label)

    sizes = slices.sizes
    if sizes is None and len(slices):
        sizes = np.array([slices.read(int(slices.key[0]))[1].shape] * len(slices))
    content = np.array([letterbox(own, size) for own in (() if sizes is None else sizes.tolist())])
    content = content.reshape(-1, 4).astype(np.int32)
    return dataclasses.replace(slices, read=read, read_own=slices.read, content=content)


def letterbox(own: Sequence[int], size: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a picture of `own` height and width, scaled with its aspect
    ratio to fit into `size` and centred; an odd row or column is left at the end.
    """
    (h, w), (H, W) = own, size
    if h * W >= H * w:  # at least as high, for its width
        h, w = H, max(1, round(w * H / h))
    else:
        h, w = max(1, round(h * W / w)), W
    return (H - h) // 2, (W - w) // 2, h, w


def blank_around(image_HWC: np.ndarray, content: Sequence[int]) -> np.ndarray:
    """A normalised image, set to 0 outside of `content` (top, left, height, width)."""
    top, left, height, width = content
    if (height, width) == image_HWC.shape[:2]:
        return image_HWC
    blank = np.zeros_like(image_HWC)
    inside = slice(top, top + height), slice(left, left + width)
    blank[inside] = image_HWC[inside]
    return blank


def common_size(sizes_N2: np.ndarray) -> tuple[int, int]:
    """(height, width) near the medians of the sizes, multiples of STEP and at most LARGEST."""
    median = np.median(sizes_N2, axis=0)
    median *= min(1.0, LARGEST / median.max())
    height, width = (STEP * max(1, math.floor(n / STEP + 0.5)) for n in median.tolist())
    return height, width


def resize_image(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize h w C to H W pixels of the same type: bilinear, averaging when it shrinks."""
    if image_HWC.shape[:2] == tuple(size):
        return image_HWC
    channels = [
        Image.fromarray(channel).resize(size[::-1], Image.Resampling.BILINEAR)
        for channel in np.moveaxis(image_HWC.astype(np.float32), -1, 0)
    ]
    out = np.stack(channels, axis=-1)
    return out if image_HWC.dtype == np.float32 else np.rint(out).astype(image_HWC.dtype)


def resize_labels(mask_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize h w labels to H W pixels; each takes the label at its centre (`centres`)."""
    rows, columns = (centres(n, old) for n, old in zip(size, mask_HW.shape, strict=True))
    return mask_HW[rows][:, columns]


def centres(cells: int, size: int) -> np.ndarray:
    """(cells,) pixels of `size` that are nearest to the centres of `cells` cells of equal width.

    At even ratios two pixels are equally near: even cells take the lower, odd ones the upper, so
    that nothing shifts on average. (PyTorch's 'nearest-exact' always takes the upper one, which
    shifts labels by half a pixel against the image.)
    """
    i = np.arange(cells)
    doubled = (2 * i + 1) * size - cells  # the centre is pixel doubled / (2 cells)
    lower, upper = -((cells - doubled) // (2 * cells)), (doubled + cells) // (2 * cells)
    return np.where(i % 2, upper, lower)


def lesion_pixels(mask: np.ndarray, ignore_label: int = IGNORE_LABEL) -> int:
    """Pixels that are neither background nor ignored."""
    return int(np.count_nonzero((mask != 0) & (mask != ignore_label)))


def measure(images: Sequence[np.ndarray], method: str) -> np.ndarray:
    """`measure_intensity` or `measure_head` of a patient's images, D H W C, of any sizes."""
    if method == 'buda':
        return measure_head(images)
    if len(images) > 1:
        images = [np.concatenate([image.reshape(-1, image.shape[-1]) for image in images])]
    return measure_intensity(images[0])


def measure_intensity(image: np.ndarray) -> np.ndarray:
    """(4, C) float32 of a volume D H W C: low, high, mean and deviation of each channel.

    They clip to the channel's 10th and 99th percentile, then z-score over the volume, as Buda et
    al. 2019 describe it; their code differs, see `measure_head`. MRI intensities have no unit, so
    each volume has its own scale. There is no crop to the head, so low is usually the black
    background. A constant channel gets deviation 1.
    """
    if image.shape[-1] > 1 and image.strides[-1] == 0:  # grey, which `fit_channels` repeats
        return np.repeat(measure_intensity(image[..., :1]), image.shape[-1], axis=1)
    channels = np.moveaxis(image, -1, 0)
    return np.stack([_measure(values.reshape(-1)) for values in channels], 1).astype(np.float32)


def measure_head(images: Sequence[np.ndarray]) -> np.ndarray:
    """(4, C) float32 as Buda's code measures a volume: low and high are over all channels.

    github.com/mateuszbuda/brain-segmentation-pytorch, commit 11e6c78, utils.py: values below a
    tenth of the maximum become 0; the volume is cropped to the box of the rest (the head) and
    padded with 0 to square slices; it is clipped to the 10th and 99th percentile over all channels,
    and each channel is z-scored. Deviations: only the measurement uses the crop, the network sees
    whole slices with dark voxels unchanged; they first resize to 256 x 256 and leave out each
    volume's first and last slice. Images of several sizes are cropped separately and measured
    together.
    """
    C = images[0].shape[-1]
    if C > 1 and all(image.strides[-1] == 0 for image in images):  # grey, repeated
        return np.repeat(measure_head([image[..., :1] for image in images]), C, axis=1)
    dark = 0.1 * max(float(image.max()) for image in images)
    heads = [image[_box(image >= dark)] for image in images]
    padding = sum(
        len(head) * (max(head.shape[1:3]) ** 2 - math.prod(head.shape[1:3])) for head in heads
    )

    def parts(channel: int) -> Iterator[np.ndarray]:
        for head in heads:
            for part in _parts(head[..., channel].reshape(-1)):
                yield np.where(part < dark, 0, part).astype(part.dtype)
        for first in range(0, padding, 2**16):
            yield np.zeros(min(padding - first, 2**16), heads[0].dtype)

    if heads[0].dtype in (np.uint8, np.uint16):
        counts = [_count(parts(channel)) for channel in range(C)]
        low, high = _percentiles(sum(counts))
        rows = [(low, high, *_moments(count, low, high)) for count in counts]
    else:
        together = np.concatenate([part for channel in range(C) for part in parts(channel)])
        size = len(together) // C
        low, high = np.percentile(together, (10, 99), overwrite_input=True)
        del together
        rows = [
            (low, high, *_moments_of(functools.partial(parts, channel), size, low, high))
            for channel in range(C)
        ]
    return np.array(rows).T.astype(np.float32)


def _box(inside: np.ndarray) -> tuple[slice, ...]:
    """The smallest D H W box around the true values of D H W C booleans; all of it if none is."""
    places = [np.flatnonzero(inside.any(axis=tuple({0, 1, 2, 3} - {axis}))) for axis in range(3)]
    return tuple(slice(at[0], at[-1] + 1) if len(at) else slice(None) for at in places)


def _measure(values_N: np.ndarray) -> tuple[float, float, float, float]:
    """`measure_intensity` of one channel, with little extra memory.

    It uses counts of each value for 8 and 16 bits, otherwise a copy in float32.
    """
    if values_N.dtype in (np.uint8, np.uint16):
        counts = _count(_parts(values_N))
        low, high = _percentiles(counts)
        return low, high, *_moments(counts, low, high)
    sorting = np.array(values_N, np.float32)
    low, high = np.percentile(sorting, (10, 99), overwrite_input=True)
    parts = functools.partial(_parts, sorting)
    return low, high, *_moments_of(parts, len(sorting), low, high)


def _count(parts: Iterator[np.ndarray]) -> np.ndarray:
    """How often each value of 8 or 16 bits occurs."""
    return sum(np.bincount(part, minlength=2 ** (8 * part.dtype.itemsize)) for part in parts)


def _percentiles(counts: np.ndarray) -> tuple[float, float]:
    """The 10th and 99th percentile of values with these counts, interpolated linearly."""
    seen = np.flatnonzero(counts)
    last = np.cumsum(counts[seen]) - 1  # place, in order, of the last of each value
    places = last[-1] * np.array([0.1, 0.99])
    below, share = np.floor(places), places % 1
    one, next_one = (seen[np.searchsorted(last, at)] for at in (below, np.ceil(places)))
    return tuple(one + (next_one - one) * share)


def _moments(counts: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Mean and deviation (1 if it is 0) of the values, clipped to low..high."""
    seen = np.flatnonzero(counts)
    clipped, weights = np.clip(seen, low, high), counts[seen] / counts.sum()
    mean = (clipped * weights).sum()
    std = np.sqrt(((clipped - mean) ** 2 * weights).sum())
    return mean, std if std > 1e-6 else 1.0


def _moments_of(
    parts: Callable[[], Iterator[np.ndarray]], size: int, low: float, high: float
) -> tuple[float, float]:
    """`_moments` of `size` values, which `parts()` yields part by part."""
    mean = sum(np.clip(part, low, high).sum() for part in parts()) / size
    std = np.sqrt(sum(((np.clip(part, low, high) - mean) ** 2).sum() for part in parts()) / size)
    return mean, std if std > 1e-6 else 1.0


def _parts(values_N: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(values_N), 2**16):
        yield values_N[first : first + 2**16]


def normalize(image: np.ndarray, intensity: np.ndarray) -> np.ndarray:
    """... C -> float32: clip to low..high, subtract the mean, divide by the deviation.

    It multiplies by the reciprocal, as XLA does in `training.placement.gather`, for equal bits.
    """
    low, high, mean, std = intensity
    return (np.clip(image.astype(np.float32), low, high) - mean) * (1 / std)


def picture_digest(image_HWC: np.ndarray) -> str:
    """A digest of the pixels, the same for any file format; '' if all have one value.

    Grey gives the same digest in one channel and in three.
    """
    if (image_HWC == image_HWC[:1, :1]).all():
        return ''
    if (image_HWC == image_HWC[..., :1]).all():
        image_HWC = image_HWC[..., :1]
    digest = hashlib.blake2b(repr(image_HWC.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image_HWC, '<f4').data)
    return digest.hexdigest()


def measure_range(image: np.ndarray) -> np.ndarray:
    """(2, C) float32 of an image ... C: the 0.5th and 99.5th percentile of each channel, or the
    smallest and largest value if these are equal.
    """
    values = image.reshape(-1, image.shape[-1])
    some = values[:: len(values) // RANGE_PIXELS | 1]  # odd, so that all columns are sampled
    low, high = np.percentile(some, (0.5, 99.5), axis=0)
    if (flat := low >= high).any():
        low, high = np.where(flat, values.min(0), low), np.where(flat, values.max(0), high)
    return np.stack([low, high]).astype(np.float32)


def joint_range(slices: Slices, others: Sequence[Slices] = ()) -> np.ndarray | None:
    """(2, C) low and high of all images' values, as medians over patients; None if all are 8-bit.

    Medians are robust against single odd images. Raises DataError if some images, including those
    of `others`, are 8-bit and some are not: their scales can't be compared.
    """
    known = [(name, name in part.ranges) for part in (slices, *others) for name in part.intensity]
    deep, eight = ([name for name, is_deep in known if is_deep == kind] for kind in (True, False))
    if deep and eight:
        raise DataError(
            f'{len(eight)} of {len(known)} patients have 8-bit images ({eight[0]}), the others '
            f'do not ({deep[0]}): set --config.data.normalize=volume, which gives each patient its '
            'own scale, or save all images with the same number of bits'
        )
    if not deep:
        return None
    found = np.stack([slices.ranges[patient] for patient in slices.intensity])
    low, high = np.median(found, axis=0)
    flat = low >= high  # most of the images are constant
    low, high = np.where(flat, found[:, 0].min(0), low), np.where(flat, found[:, 1].max(0), high)
    return np.stack([low, np.where(low < high, high, low + 1)]).astype(np.float32)


def check_kind(image: np.ndarray, intensity: np.ndarray, name: Any) -> None:
    """Raise DataError if an image ... C has another kind of values than a run's (4, C) `intensity`.

    A run on 8-bit images takes whole numbers from 0 to 255 of any type; a run on other images takes
    no 8-bit images.
    """
    low, high = intensity[:2]
    if (low != 0).any() or (high != 255).any():
        if image.dtype == np.uint8:
            width = (high - low) / 3  # see `models.weights.Normalization.intensity`
            raise DataError(
                f'{name} has 8 bits, but the run was trained on images with values of about '
                f'{(low + width).min():.4g} to {(high - width).max():.4g}: give the image in that '
                'unit, not with 8 bits'
            )
        return
    if image.dtype == np.uint8:
        return
    least, most = image.min(), image.max()
    whole = image.dtype.kind in 'iu' or (most > 1 and (image == np.rint(image)).all())
    if least < 0 or most > 255 or not (whole or least == most == 0):
        raise DataError(
            f'{name} holds {image.dtype} values from {least:.4g} to {most:.4g}, but the run was '
            'trained on 8-bit images, 0 to 255: save the image with 8 bits (black 0, white 255), '
            'or train a run on images like it'
        )
