"""Slices -> batches, by Grain: random access, so that step s needs nothing but s.

A batch is {'image': B H W C float32 normalised, 'mask': B H W int32}. Resuming at a
step reads the batches from there; two hosts see halves of the batches that one sees.
"""

import itertools
from collections.abc import Iterator

import grain
import numpy as np

from pspnet_jax.data.volumes import Slices, Volume, normalize


def lesion_weights(slices: Slices, floor: float) -> np.ndarray:
    """(N,) sampling probabilities after Buda et al. 2019: each patient weighs the same.

    Within a patient a slice is drawn in proportion to its area of lesion, except for
    the share `floor`, which is spread evenly over its slices (all of it, where the
    patient has no lesion).
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


def draws(slices: Slices, *, seed: int, sampling: str, lesion_floor: float) -> grain.MapDataset:
    """Rows of `slices` without end, each a function of its place.

    'uniform' sampling shuffles each pass over the slices; 'lesion' draws with
    `lesion_weights`. Raises ValueError for another.
    """
    if sampling == 'uniform':
        return grain.MapDataset.range(len(slices)).seed(seed).shuffle().repeat()
    if sampling != 'lesion':
        raise ValueError(f"data.sampling {sampling!r} is not one of 'lesion', 'uniform'")
    edges = np.cumsum(lesion_weights(slices, lesion_floor))[:-1]

    def draw(_, rng: np.random.Generator) -> int:
        return int(np.searchsorted(edges, rng.random(), 'right'))

    return grain.MapDataset.range(2**40).seed(seed).random_map(draw)


def rows(
    drawn: grain.MapDataset, *, batch_size: int, first_step: int, shard: tuple[int, int] = (0, 1)
) -> Iterator[np.ndarray]:
    """The rows of `batches`' batches, (batch_size // hosts,) int32 each."""
    index, count = shard
    for step in itertools.count(first_step):
        places = range(step * batch_size + index, (step + 1) * batch_size, count)
        yield np.array([drawn[place] for place in places], np.int32)


def store(slices: Slices, intensity: np.ndarray | None) -> dict[str, np.ndarray]:
    """Every slice, decoded: 'image' N H W C and 'mask' N H W uint8, 'intensity' N 4 C."""
    images, masks = zip(*(slices.read(int(key)) for key in slices.key), strict=True)
    each = [slices.intensity[p] if intensity is None else intensity for p in slices.patient]
    return {'image': np.stack(images), 'mask': np.stack(masks), 'intensity': np.stack(each)}


def megabytes(arrays: dict[str, np.ndarray]) -> float:
    """2**20 bytes."""
    return sum(array.nbytes for array in arrays.values()) / 2**20


def batches(
    slices: Slices,
    drawn: grain.MapDataset,
    *,
    batch_size: int,
    first_step: int,
    intensity: np.ndarray | None,
    threads: int,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """Training batches without end, from `first_step` on; `batch_size` is over all hosts.

    `drawn` are the rows from `draws`, `shard` is (index, count) of this host. `intensity`
    (4, C) normalises every image alike; None takes each patient's own.
    """
    index, count = shard

    def read(row: int) -> dict[str, np.ndarray]:
        image, mask = slices.read(int(slices.key[row]))
        measured = slices.intensity[slices.patient[row]]
        return {
            'image': normalize(image, measured if intensity is None else intensity),
            'mask': mask.astype(np.int32),
        }

    dataset = drawn[first_step * batch_size + index :: count].map(read)
    dataset = dataset.batch(batch_size // count).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * batch_size)
    )
    return iter(dataset)


def eval_batches(
    volume: Volume, batch_size: int, intensity: np.ndarray | None
) -> Iterator[np.ndarray]:
    """The volume's slices, normalised, in batches of one size: the last is padded by zeros."""
    intensity = volume.intensity if intensity is None else intensity
    for start in range(0, len(volume.image), batch_size):
        image = normalize(volume.image[start : start + batch_size], intensity)
        yield np.pad(image, [(0, batch_size - len(image))] + [(0, 0)] * 3)
