"""Augmentation: what each knob does alone, and that mask follows image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.data.augment import augment
from pspnet_jax.data.volumes import IGNORE_LABEL


def pair(rng, h=24, w=24):
    mask = np.zeros((h, w), np.int32)
    mask[6:15, 4:10] = 1
    image = np.stack([mask, 2 * mask - 1, rng.standard_normal((h, w))], axis=-1)
    return jnp.asarray(image, jnp.float32), jnp.asarray(mask)


def test_without_knobs_nothing_changes(rng):
    image, mask = pair(rng)
    out_image, out_mask = augment(jax.random.key(0), image, mask)
    np.testing.assert_allclose(out_image, image, atol=1e-5)
    assert (out_mask == mask).all()


def test_flip_mirrors_both(rng):
    image, mask = pair(rng, 24, 31)
    out_image, out_mask = augment(jax.random.key(0), image, mask, flip=1.0)
    np.testing.assert_allclose(out_image, image[:, ::-1], atol=1e-5)
    assert (out_mask == mask[:, ::-1]).all()


def test_flip_vertical_turns_both_upside_down(rng):
    image, mask = pair(rng, 24, 31)
    out_image, out_mask = augment(jax.random.key(0), image, mask, flip_vertical=1.0)
    np.testing.assert_allclose(out_image, image[::-1], atol=1e-5)
    assert (out_mask == mask[::-1]).all()


def test_the_two_flips_are_drawn_apart(rng):
    image, mask = pair(rng)
    flips = {'flip': 0.5, 'flip_vertical': 0.5}
    pairs = [augment(jax.random.key(i), image, mask, **flips) for i in range(24)]
    found = {np.asarray(out_mask).tobytes() for _, out_mask in pairs}
    assert len(found) == 4


def test_the_mask_follows_the_image(rng):
    """Channel 0 is the mask itself: away from its edges both must move alike."""
    image, mask = pair(rng, 64, 64)
    geometry = {'flip': 0.5, 'scale': 0.3, 'rotate': 40.0, 'elastic': 2.0, 'crop': 48}
    for seed in range(8):
        out_image, out_mask = augment(jax.random.key(seed), image, mask, **geometry)
        assert out_mask.shape == out_image.shape[:2] == (48, 48)
        inside = np.asarray(out_mask) != IGNORE_LABEL
        sure = inside & (np.abs(np.asarray(out_image[..., 0]) - 0.5) > 0.499)
        assert sure.sum() > 300
        agree = np.asarray(out_image[..., 0] > 0.5) == (np.asarray(out_mask) == 1)
        assert agree[sure].all()


def test_outside_is_the_minimum_and_ignored(rng):
    image, mask = pair(rng)
    out_image, out_mask = augment(jax.random.key(3), image, mask, rotate=45.0)
    outside = np.asarray(out_mask) == IGNORE_LABEL
    assert outside[0, 0]
    assert not outside[8:16, 8:16].any()
    corner = np.asarray(out_image)[0, 0]
    np.testing.assert_allclose(corner, np.asarray(image).min((0, 1)), atol=1e-5)


def test_a_crop_is_a_window_of_the_original(rng):
    image, mask = pair(rng, 24, 24)
    out, _ = augment(jax.random.key(5), image, mask, crop=23)
    # A random, unaligned place: between the windows at rows and columns 0 and 1.
    values = [image[i : i + 23, j : j + 23, 0] for i in (0, 1) for j in (0, 1)]
    assert (out[..., 0] >= np.min(values, axis=0) - 1e-5).all()
    assert (out[..., 0] <= np.max(values, axis=0) + 1e-5).all()
    with pytest.raises(ValueError, match='crop 25 is larger than the image, 24x24'):
        augment(jax.random.key(0), image, mask, crop=25)


def test_intensity_knobs_leave_the_mask(rng):
    image, mask = pair(rng)
    out_image, out_mask = augment(jax.random.key(1), image, mask, gain=0.2, bias=0.3, noise=0.5)
    assert (out_mask == mask).all()
    assert float(jnp.abs(out_image - image).max()) > 0.1
    # Without noise each channel is a straight line of the original.
    straight, _ = augment(jax.random.key(1), image, mask, gain=0.2, bias=0.3)
    for c in range(3):
        slope, shift = np.polyfit(np.ravel(image[..., c]), np.ravel(straight[..., c]), 1)
        assert abs(slope - 1) <= 0.2 + 1e-5
        np.testing.assert_allclose(straight[..., c], slope * image[..., c] + shift, atol=1e-4)
