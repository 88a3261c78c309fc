"""Batches: the same from any start, halves on two hosts, drawn as promised."""

import collections
import itertools

import numpy as np
import pytest

from pspnet_jax.data import phantom, pipeline, volumes
from pspnet_jax.errors import DataError


@pytest.fixture(scope='module')
def slices():
    return phantom.load(volumes=3, slices=6, size=32, seed=0)


def batches(slices, count, **change):
    options = {
        'batch_size': 4,
        'first_step': 0,
        'seed': 0,
        'sampling': 'lesion',
        'lesion_floor': 0.1,
        'normalization': 'volume',
        'threads': 2,
        **change,
    }
    return list(itertools.islice(pipeline.batches(slices, **options), count))


@pytest.mark.parametrize('sampling', ['lesion', 'uniform'])
def test_batches_from_a_later_step_are_the_same(slices, sampling):
    whole = batches(slices, 9, sampling=sampling)
    later = batches(slices, 4, sampling=sampling, first_step=5)
    for one, other in zip(whole[5:], later, strict=True):
        assert (one['image'] == other['image']).all()
        assert (one['mask'] == other['mask']).all()


def test_two_hosts_share_the_batches_of_one(slices):
    one = batches(slices, 3)
    two = [batches(slices, 3, shard=(i, 2)) for i in range(2)]
    for step in range(3):
        together = np.empty_like(one[step]['image'])
        together[0::2], together[1::2] = (host[step]['image'] for host in two)
        assert (together == one[step]['image']).all()


def test_uniform_sampling_passes_over_every_slice_once(slices):
    seen = collections.Counter()
    for batch in batches(slices, len(slices) // 3, sampling='uniform', batch_size=3):
        seen.update(image.tobytes() for image in batch['image'])
    assert len(seen) == len(slices)
    assert set(seen.values()) == {1}


def test_lesion_weights_are_budas(slices):
    weights = pipeline.lesion_weights(slices, 0.1)
    assert weights.sum() == pytest.approx(1)
    for patient in np.unique(slices.patient):
        rows = slices.patient == patient
        area = slices.lesion_pixels[rows]
        assert weights[rows].sum() == pytest.approx(1 / 3)
        expected = (0.1 / rows.sum() + 0.9 * area / area.sum()) / 3
        np.testing.assert_allclose(weights[rows], expected)


def test_draws_follow_the_weights(slices):
    lesion = sum(
        int((batch['mask'] > 0).any((1, 2)).sum()) for batch in batches(slices, 100, batch_size=8)
    )
    expected = pipeline.lesion_weights(slices, 0.1)[slices.lesion_pixels > 0].sum()
    assert lesion / 800 == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 800))


def test_a_batch_is_the_normalised_slice(slices):
    (batch,) = batches(slices, 1)
    assert batch['image'].dtype == np.float32
    assert batch['mask'].dtype == np.int32
    everything = {
        volumes.normalize(image, volume.intensity).astype(np.float32).tobytes(): mask
        for volume in volumes.iterate_volumes(slices)
        for image, mask in zip(volume.image, volume.mask, strict=True)
    }
    for image, mask in zip(batch['image'], batch['mask'], strict=True):
        assert (everything[image.tobytes()] == mask).all()


def test_the_last_eval_batch_is_padded_never_dropped(slices):
    volume = next(volumes.iterate_volumes(slices))
    shapes = [batch.shape for batch in pipeline.eval_batches(volume, 4, 'volume')]
    assert shapes == [(4, 32, 32, 3)] * 2  # of six slices
    last = list(pipeline.eval_batches(volume, 4, 'volume'))[-1]
    assert (last[2:] == 0).all()


def test_imagenet_normalisation_needs_three_channels():
    with pytest.raises(DataError, match="'imagenet' needs 3 channels, the images have 2"):
        pipeline.intensity_of('imagenet', np.ones((4, 2)))
