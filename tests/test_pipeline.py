"""Batches: the same from any start, halves on two hosts, drawn as promised."""

import collections
import itertools

import numpy as np
import pytest

from pspnet_jax.data import phantom, pipeline, volumes
from pspnet_jax.runtime.errors import DataError


@pytest.fixture(scope='module')
def slices():
    return phantom.load(volumes=3, slices=6, size=32, seed=0)


def batches(slices, count, sampling='lesion', **change):
    drawn = pipeline.draws(slices, seed=0, sampling=sampling, lesion_floor=0.1)
    options = {'batch_size': 4, 'first_step': 0, 'intensity': None, 'threads': 2, **change}
    return list(itertools.islice(pipeline.batches(slices, drawn, **options), count))


@pytest.mark.parametrize('sampling', ['lesion', 'uniform'])
def test_batches_from_a_later_step_are_the_same(slices, sampling):
    whole = batches(slices, 9, sampling=sampling)
    later = batches(slices, 4, sampling=sampling, first_step=5)
    for one, other in zip(whole[5:], later, strict=True):
        assert (one['image'] == other['image']).all()
        assert (one['mask'] == other['mask']).all()


@pytest.mark.parametrize('sampling', ['lesion', 'uniform'])
@pytest.mark.parametrize('count', [1, 2, 4])
def test_the_parts_of_all_hosts_one_behind_the_other_are_the_batch_of_one(slices, sampling, count):
    drawn = pipeline.draws(slices, seed=0, sampling=sampling, lesion_floor=0.1)

    def of(shard):
        later = {'first_step': 3, 'shard': shard}
        rows = pipeline.rows(drawn, batch_size=4, **later)
        return [
            (batch['image'], batch['mask'], next(rows))
            for batch in batches(slices, 3, sampling=sampling, **later)
        ]

    parts = [of((i, count)) for i in range(count)]
    for step, whole in enumerate(of((0, 1))):
        for n, array in enumerate(whole):
            assert (np.concatenate([part[step][n] for part in parts]) == array).all()


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
    shapes = [batch.shape for batch in pipeline.eval_batches(volume, 4, None)]
    assert shapes == [(4, 32, 32, 3)] * 2  # of six slices
    last = list(pipeline.eval_batches(volume, 4, None))[-1]
    assert (last[2:] == 0).all()


def test_an_image_that_the_runs_scale_is_not_for_is_refused_in_training_and_evaluation(slices):
    fixed = np.array([[-4080] * 3, [8160] * 3, [10, 20, 30], [2, 4, 8]], np.float32)
    with pytest.raises(DataError, match=r'phantom_00\d has 8 bits, but the run was trained on'):
        pipeline.read_row(slices, 0, fixed, None)
    with pytest.raises(DataError, match='phantom_000 has 8 bits'):
        next(pipeline.eval_batches(next(volumes.iterate_volumes(slices)), 4, fixed))
    with pytest.raises(DataError, match='has 8 bits'):
        pipeline.store(slices, fixed)


def test_a_fixed_intensity_takes_the_place_of_the_volumes_own(slices):
    fixed = np.array([[0] * 3, [255] * 3, [10, 20, 30], [2, 4, 8]], np.float32)
    volume = next(volumes.iterate_volumes(slices))
    batch = next(pipeline.eval_batches(volume, 4, fixed))
    expected = (volume.image[:4].astype(np.float32) - [10, 20, 30]) / [2, 4, 8]
    np.testing.assert_allclose(batch, expected, rtol=1e-5)
    (batch,) = batches(slices, 1, intensity=fixed)
    pixels = batch['image'] * fixed[3] + fixed[2]  # whole numbers again
    np.testing.assert_allclose(pixels, pixels.round(), atol=1e-3)


def test_padded_rows_are_few_and_never_fewer():
    for count in range(1, 3000):
        rows = pipeline.padded_rows(count)
        assert count <= rows <= max(count, 1.25 * count)
        assert len({pipeline.padded_rows(n) for n in range(count, 2 * count)}) <= 17
