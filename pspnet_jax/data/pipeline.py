"""Slices -> batches, by Grain with random access: the batch of step s depends only on s.

A batch is {'image': B H W C float32 normalised, 'mask': B H W int32}. Resuming at a step reads the
batches from there; two hosts see the two halves of the batch that one host would see.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pspnet_jax.data.volumes import (
    Slices,
    Volume,
    blank_around,
    check_kind,
    neighbours,
    normalize,
    stack,
    tile,
)
from pspnet_jax.runtime.errors import DataError

if TYPE_CHECKING:  # imported where it is used: data on the device does not need it
    import grain


def lesion_weights(slices: Slices, floor: float) -> np.ndarray:
    """(N,) sampling probabilities after Buda et al. 2019, with equal weight per patient.

    Within a patient a slice is drawn in proportion to its lesion area, except for the share
    `floor`, which is spread evenly over its slices (all of it if the patient has no lesion). Buda's
    code adds a tenth of the patient's lesion evenly to the areas, which is a floor of 1/11.
    """
    weights = np.zeros(len(slices))
    patients = np.unique(slices.patient)
    for patient in patients:
        rows = slices.patient == patient
        area = slices.lesion_pixels[rows].astype(np.float64)
        even = np.full(len(area), 1 / len(area))
        by_area = area / area.sum() if area.any() else even
        weights[rows] = (floor * even + (1 - floor) * by_area) / len(patients)
    return weights


def draws(slices: Slices, *, seed: int, sampling: str, lesion_floor: float) -> 'grain.MapDataset':
    """An endless sequence of rows of `slices`, each a function of its position.

    'uniform' sampling shuffles each pass over the slices; 'lesion' draws with `lesion_weights`.
    Raises ValueError for another.
    """
    import grain

    if sampling == 'uniform':
        return grain.MapDataset.range(len(slices)).seed(seed).shuffle().repeat()
    if sampling != 'lesion':
        raise ValueError(f"data.sampling {sampling!r} is not one of 'lesion', 'uniform'")
    edges = np.cumsum(lesion_weights(slices, lesion_floor))[:-1]

    def draw(_, rng: np.random.Generator) -> int:
        return int(np.searchsorted(edges, rng.random(), 'right'))

    return grain.MapDataset.range(2**40).seed(seed).random_map(draw)


def rows(
    drawn: 'grain.MapDataset', *, batch_size: int, first_step: int, shard: tuple[int, int] = (0, 1)
) -> Iterator[np.ndarray]:
    """The rows of each batch of `batches`, (batch_size // hosts,) int32."""
    index, count = shard
    share = batch_size // count
    for step in itertools.count(first_step):
        first = step * batch_size + index * share
        places = range(first, first + share)
        yield np.array([drawn[place] for place in places], np.int32)


def read_row(
    slices: Slices, row: int, intensity: np.ndarray | None, unread: dict[int, str] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(image H W C, mask H W, intensity 4 C, content 4) of a row.

    The content is `Slices.content`, or the whole image. An unreadable row raises DataError if
    `unread` is None; otherwise its fault is stored there by row, and the next readable row is used.
    `intensity` normalises every image alike; None takes the patient's own.
    """
    for other in range(row, row + len(slices)):
        other %= len(slices)
        try:
            image, mask = slices.read(int(slices.key[other]))
            if intensity is not None:
                check_kind(image, intensity, slices.patient[other])
        except DataError as error:
            if unread is None:
                raise
            unread[other] = str(error)
            continue
        own = slices.intensity[slices.patient[other]]
        content = np.array([0, 0, *mask.shape], np.int32)
        if slices.content is not None:
            content = slices.content[other]
        return image, mask, own if intensity is None else intensity, content
    raise DataError(f'none of {len(slices)} slices can be read: {unread[row]}')


def store(
    slices: Slices, intensity: np.ndarray | None, unread: dict[int, str] | None = None
) -> dict[str, np.ndarray]:
    """All slices, decoded: 'image' N H W C, 'mask' N H W uint8, 'intensity' N 4 C, 'content' N 4.

    N is `padded_rows(len(slices))`; the rows after the slices are zeros.
    """
    found = [read_row(slices, row, intensity, unread) for row in range(len(slices))]
    arrays = {}
    names = ('image', 'mask', 'intensity', 'content')
    for name, part in zip(names, zip(*found, strict=True), strict=True):
        arrays[name] = np.zeros((padded_rows(len(part)), *part[0].shape), part[0].dtype)
        np.stack(part, out=arrays[name][: len(part)])
    return arrays


def padded_rows(count: int) -> int:
    """`count` rounded up to a multiple of about 1/8 of it, so that folds share a program."""
    eighth = 1 << max(count.bit_length() - 4, 0)
    return -(-count // eighth) * eighth


def megabytes(arrays: dict[str, np.ndarray]) -> float:
    """Size of the arrays in units of 2**20 bytes."""
    return sum(array.nbytes for array in arrays.values()) / 2**20


def batches(
    slices: Slices,
    drawn: 'grain.MapDataset',
    *,
    batch_size: int,
    first_step: int,
    intensity: np.ndarray | None,
    threads: int,
    shard: tuple[int, int] = (0, 1),
    unread: dict[int, str] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches from `first_step` on; `batch_size` is over all hosts.

    `drawn` are the rows from `draws`, `shard` is (index, count) of this host. `intensity` (4, C)
    normalises every image alike; None takes each patient's own. `unread` is that of `read_row`.
    """
    import grain

    index, count = shard

    def read(row: int) -> dict[str, np.ndarray]:
        image, mask, measured, content = read_row(slices, row, intensity, unread)
        image = blank_around(normalize(image, measured), content)
        return {'image': image, 'mask': mask.astype(np.int32)}

    share = batch_size // count
    if count == 1:
        dataset = drawn[first_step * batch_size :]
    else:  # host i has the i-th part of each batch, in the order of devices in one process

        def at(n: int) -> int:
            step, place = divmod(n, share)
            return int(drawn[(first_step + step) * batch_size + index * share + place])

        dataset = grain.MapDataset.range(2**40).map(at)
    dataset = (
        dataset.map(read)
        .batch(share)
        .to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * batch_size)
        )
    )
    return iter(dataset)


def eval_batches(
    volume: Volume, batch_size: int, intensity: np.ndarray | None, context: int = 0
) -> Iterator[np.ndarray]:
    """The volume's slices, normalised, in batches of one size; the last is padded with zeros.

    With `context` each slice also has its neighbours' channels, see `volumes.channels_seen`.
    """
    if intensity is None:
        intensity = volume.intensity
    else:
        check_kind(volume.image, intensity, volume.patient)
    intensity = tile(intensity, context)
    rows_Dn = neighbours(volume.scan, len(volume.image), context)
    for start in range(0, len(volume.image), batch_size):
        image = normalize(stack(volume.image, rows_Dn[start : start + batch_size]), intensity)
        yield np.pad(image, [(0, batch_size - len(image))] + [(0, 0)] * 3)
