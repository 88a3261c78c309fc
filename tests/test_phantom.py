"""Phantoms: deterministic, of known outline, and not to be had by a threshold."""

import numpy as np
import pytest

from pspnet_jax.data import phantom, volumes
from pspnet_jax.evaluation import metrics
from pspnet_jax.runtime.errors import ConfigError


def test_a_phantom_depends_on_seed_and_index_alone():
    slices = phantom.load(volumes=3, slices=6, size=48, seed=4)
    alone = phantom.make_volume(4, 2, 6, 48)
    third = list(volumes.iterate_volumes(slices))[2]
    assert (third.image == alone.image).all()
    assert (third.mask == alone.mask).all()
    other = phantom.make_volume(5, 2, 6, 48)
    assert (other.image != alone.image).mean() > 0.1


@pytest.fixture(scope='module')
def heads():
    return [phantom.make_volume(0, i, 12, 96) for i in range(8)]


def test_every_head_has_slices_with_and_without_tumour(heads):
    for volume in heads:
        assert volume.image.dtype == np.uint8
        with_tumour = volume.mask.any((1, 2))
        assert 2 <= with_tumour.sum() <= 10
        assert 0.002 < volume.mask.mean() < 0.1


def test_no_threshold_finds_the_tumour(heads):
    """Not even the best threshold of each head and channel, chosen with the truth in hand."""
    best = []
    for volume in heads:
        scores = [
            metrics.ratios(metrics.counts(volume.image[..., c] > t, volume.mask, 2))['dice'][1]
            for c in range(3)
            for t in range(10, 250, 8)
        ]
        best.append(max(scores))
    assert np.mean(best) < 0.6


def test_the_tumour_is_bright_on_flair(heads):
    for volume in heads:
        tumor = volume.mask > 0
        near = (volume.image[..., 1] > 20) & ~tumor & tumor.any((1, 2))[:, None, None]
        flair = volume.image[..., 1].astype(float)
        assert flair[tumor].mean() > flair[near].mean()


def test_a_single_slice_can_not_be_with_and_without_tumour():
    with pytest.raises(
        ConfigError, match='slices=1 leaves no slice without a tumour: give at least 2'
    ):
        phantom.make_volume(0, 0, 1, 16)
    assert phantom.make_volume(0, 0, 2, 16).mask.any((1, 2)).sum() < 2
