"""Slices -> batches, by Grain: random access, so that step s needs nothing but s.

A batch is {'image': B H W C float32 normalised, 'mask': B H W int32}. Resuming at a
step reads the batches from there; two hosts see halves of the batches that one sees.
"""

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


def batches(
    slices: Slices,
    *,
    batch_size: int,
    first_step: int,
    seed: int,
    sampling: str,
    lesion_floor: float,
    intensity: np.ndarray | None,
    threads: int,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """Training batches without end, from `first_step` on; `batch_size` is over all hosts.

    `shard` is (index, count) of this host. 'uniform' sampling shuffles each pass over
    the slices; 'lesion' draws with `lesion_weights`. `intensity` (4, C) normalises every image
    alike; None takes each patient's own.
    """
    index, count = shard
    if sampling == 'uniform':
        draws = grain.MapDataset.range(len(slices)).seed(seed).shuffle().repeat()
    elif sampling == 'lesion':
        edges = np.cumsum(lesion_weights(slices, lesion_floor))[:-1]

        def draw(_, rng: np.random.Generator) -> int:
            return int(np.searchsorted(edges, rng.random(), 'right'))

        draws = grain.MapDataset.range(2**40).seed(seed).random_map(draw)
    else:
        raise ValueError(f"data.sampling {sampling!r} is not one of 'lesion', 'uniform'")

    def read(row: int) -> dict[str, np.ndarray]:
        image, mask = slices.read(int(slices.key[row]))
        measured = slices.intensity[slices.patient[row]]
        return {
            'image': normalize(image, measured if intensity is None else intensity),
            'mask': mask.astype(np.int32),
        }

    dataset = draws[first_step * batch_size + index :: count].map(read)
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
