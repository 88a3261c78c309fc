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


def test_a_crop_is_a_window_of_the_original_at_any_place(rng):
    """At whole pixels: between them noise would be averaged, to 0.68 of its deviation."""
    image, mask = pair(rng, 24, 27)
    places = list(np.ndindex(3, 6))
    windows = np.stack([image[i : i + 22, j : j + 22, 2] for i, j in places])

    def place_of(out_HW):
        apart = np.abs(windows - np.asarray(out_HW)).max((1, 2))
        assert apart.min() < 1e-5
        return places[apart.argmin()]

    found = set()
    for seed in range(80):
        out, labels = augment(jax.random.key(seed), image, mask, crop=22)
        i, j = place_of(out[..., 2])
        found.add((i, j))
        np.testing.assert_array_equal(labels, mask[i : i + 22, j : j + 22])
    assert found == set(places)
    mirrored, _ = augment(jax.random.key(3), image, mask, crop=22, flip=1.0)
    place_of(mirrored[:, ::-1, 2])
    with pytest.raises(ValueError, match='crop 25 is larger than the image, 24x27'):
        augment(jax.random.key(0), image, mask, crop=25)


def test_the_elastic_field_has_the_deviation_that_is_asked_for_everywhere():
    """Read off an image of its own coordinates, away from what falls outside."""
    size, deviation = 64, 1.5
    place = jnp.stack(jnp.mgrid[:size, :size], axis=-1).astype(jnp.float32)
    mask = jnp.zeros((size, size), jnp.int32)

    def moved(key):
        return augment(key, place, mask, elastic=deviation)[0] - place

    field = jax.jit(jax.vmap(moved))(jax.random.split(jax.random.key(0), 2000))
    by_pixel = np.asarray(field)[:, 10:-10, 10:-10].std(axis=0)
    np.testing.assert_allclose(by_pixel, deviation, rtol=0.08)


@pytest.mark.parametrize('ignore_label', [0, 2, 254, 255])
def test_what_falls_outside_has_the_label_that_is_ignored(rng, ignore_label):
    image, mask = pair(rng)
    _, plain = augment(jax.random.key(3), image, mask, rotate=45.0)
    _, ours = augment(jax.random.key(3), image, mask, rotate=45.0, ignore_label=ignore_label)
    outside = np.asarray(plain) == IGNORE_LABEL
    assert (np.asarray(ours)[outside] == ignore_label).all()
    assert (np.asarray(ours) == np.asarray(plain))[~outside].all()


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
