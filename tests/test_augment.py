"""Augmentation: what each knob does alone, and that mask follows image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from pspnet_jax.config import base
from pspnet_jax.data.augment import OFF, augment, blurred, coarse, power
from pspnet_jax.data.volumes import IGNORE_LABEL


def pair(rng, h=24, w=24):
    mask = np.zeros((h, w), np.int32)
    mask[6:15, 4:10] = 1
    image = np.stack([mask, 2 * mask - 1, rng.standard_normal((h, w))], axis=-1)
    return jnp.asarray(image, jnp.float32), jnp.asarray(mask)


def test_without_knobs_nothing_changes(rng):
    image, mask = pair(rng)
    out_image, out_mask = augment(jax.random.key(0), image, mask, {})
    np.testing.assert_array_equal(out_image, image)
    np.testing.assert_array_equal(out_mask, mask)


def test_every_knob_of_the_config_has_its_off_and_no_other_is_taken(rng):
    assert OFF.keys() == set(base.get_config().augment)
    with pytest.raises(ValueError, match=r'augment has no flop, it has crop, '):
        augment(jax.random.key(0), *pair(rng), {'flop': 1.0})


def test_flip_mirrors_both(rng):
    image, mask = pair(rng, 24, 31)
    out_image, out_mask = augment(jax.random.key(0), image, mask, {'flip': 1.0})
    np.testing.assert_allclose(out_image, image[:, ::-1], atol=1e-5)
    assert (out_mask == mask[:, ::-1]).all()


def test_flip_vertical_turns_both_upside_down(rng):
    image, mask = pair(rng, 24, 31)
    out_image, out_mask = augment(jax.random.key(0), image, mask, {'flip_vertical': 1.0})
    np.testing.assert_allclose(out_image, image[::-1], atol=1e-5)
    assert (out_mask == mask[::-1]).all()


def test_the_two_flips_are_drawn_apart(rng):
    image, mask = pair(rng)
    flips = {'flip': 0.5, 'flip_vertical': 0.5}
    pairs = [augment(jax.random.key(i), image, mask, flips) for i in range(24)]
    found = {np.asarray(out_mask).tobytes() for _, out_mask in pairs}
    assert len(found) == 4


def test_the_mask_follows_the_image(rng):
    """Channel 0 is the mask itself: away from its edges both must move alike."""
    image, mask = pair(rng, 64, 64)
    geometry = {'flip': 0.5, 'scale': 0.3, 'rotate': 40.0, 'elastic': 2.0, 'crop': 48}
    for seed in range(8):
        out_image, out_mask = augment(jax.random.key(seed), image, mask, geometry)
        assert out_mask.shape == out_image.shape[:2] == (48, 48)
        inside = np.asarray(out_mask) != IGNORE_LABEL
        sure = inside & (np.abs(np.asarray(out_image[..., 0]) - 0.5) > 0.499)
        assert sure.sum() > 300
        agree = np.asarray(out_image[..., 0] > 0.5) == (np.asarray(out_mask) == 1)
        assert agree[sure].all()


@pytest.mark.parametrize('context', [0, 1])
@pytest.mark.parametrize('kept', [0, 2])
def test_channel_dropout_leaves_one_channel_of_each_slice_in_place_of_all(rng, context, kept):
    slices = 2 * context + 1
    image = jnp.asarray(rng.standard_normal((6, 5, 3 * slices)), jnp.float32)
    mask = jnp.zeros((6, 5), jnp.int32)
    options = {'channel_dropout': 1.0, 'kept_channel': kept}
    out_image, out_mask = augment(jax.random.key(0), image, mask, options, context=context)
    for s in range(slices):
        for c in range(3):
            np.testing.assert_allclose(
                out_image[..., 3 * s + c], image[..., 3 * s + kept], atol=1e-5
            )
    assert (out_mask == mask).all()


def test_channel_dropout_is_drawn_for_each_example_and_so_is_the_channel(rng):
    image, mask = pair(rng)
    keys = jax.random.split(jax.random.key(0), 600)
    options = {'channel_dropout': 0.5}
    out = jax.vmap(lambda key: augment(key, image, mask, options)[0])(keys)
    image, out = np.asarray(image), np.asarray(out)
    is_whole = np.abs(out - image).max((1, 2, 3)) < 1e-5
    is_channel = [np.abs(out - image[..., c : c + 1]).max((1, 2, 3)) < 1e-5 for c in range(3)]
    counts = [int(one.sum()) for one in (is_whole, *is_channel)]
    assert sum(counts) == 600
    for count, share in zip(counts, (1 / 2, 1 / 6, 1 / 6, 1 / 6), strict=True):
        assert abs(count - 600 * share) < 5 * np.sqrt(600 * share * (1 - share))


def test_a_kept_channel_that_the_image_lacks_is_refused(rng):
    with pytest.raises(ValueError, match=r'kept_channel 3 is not one of the 3 channels, 0 to 2'):
        augment(jax.random.key(0), *pair(rng), {'channel_dropout': 0.1, 'kept_channel': 3})


def test_outside_is_the_minimum_and_ignored(rng):
    image, mask = pair(rng)
    out_image, out_mask = augment(jax.random.key(3), image, mask, {'rotate': 45.0})
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
        out, labels = augment(jax.random.key(seed), image, mask, {'crop': 22})
        i, j = place_of(out[..., 2])
        found.add((i, j))
        np.testing.assert_array_equal(labels, mask[i : i + 22, j : j + 22])
    assert found == set(places)
    mirrored, _ = augment(jax.random.key(3), image, mask, {'crop': 22, 'flip': 1.0})
    place_of(mirrored[:, ::-1, 2])
    with pytest.raises(ValueError, match='crop 25 is larger than the image, 24x27'):
        augment(jax.random.key(0), image, mask, {'crop': 25})


def test_the_elastic_field_has_the_deviation_that_is_asked_for_everywhere():
    """Read off an image of its own coordinates, away from what falls outside."""
    size, deviation = 64, 1.5
    place = jnp.stack(jnp.mgrid[:size, :size], axis=-1).astype(jnp.float32)
    mask = jnp.zeros((size, size), jnp.int32)

    def moved(key):
        return augment(key, place, mask, {'elastic': deviation})[0] - place

    field = jax.jit(jax.vmap(moved))(jax.random.split(jax.random.key(0), 2000))
    by_pixel = np.asarray(field)[:, 10:-10, 10:-10].std(axis=0)
    np.testing.assert_allclose(by_pixel, deviation, rtol=0.08)


@pytest.mark.parametrize('ignore_label', [0, 2, 254, 255])
def test_what_falls_outside_has_the_label_that_is_ignored(rng, ignore_label):
    image, mask = pair(rng)
    _, plain = augment(jax.random.key(3), image, mask, {'rotate': 45.0})
    _, ours = augment(jax.random.key(3), image, mask, {'rotate': 45.0}, ignore_label=ignore_label)
    outside = np.asarray(plain) == IGNORE_LABEL
    assert (np.asarray(ours)[outside] == ignore_label).all()
    assert (np.asarray(ours) == np.asarray(plain))[~outside].all()


def test_intensity_knobs_leave_the_mask(rng):
    image, mask = pair(rng)
    out_image, out_mask = augment(
        jax.random.key(1), image, mask, {'gain': 0.2, 'bias': 0.3, 'noise': 0.5}
    )
    assert (out_mask == mask).all()
    assert float(jnp.abs(out_image - image).max()) > 0.1
    # Without noise each channel is a straight line of the original.
    straight, _ = augment(jax.random.key(1), image, mask, {'gain': 0.2, 'bias': 0.3})
    for c in range(3):
        slope, shift = np.polyfit(np.ravel(image[..., c]), np.ravel(straight[..., c]), 1)
        assert abs(slope - 1) <= 0.2 + 1e-5
        np.testing.assert_allclose(straight[..., c], slope * image[..., c] + shift, atol=1e-4)


ON = {'blur': 1.5, 'low_resolution': 0.5, 'gamma': 0.5}
OTHERS = {
    'crop': 20, 'flip': 0.5, 'flip_vertical': 0.5, 'scale': 0.2, 'rotate': 20.0, 'elastic': 1.0,
    'gain': 0.2, 'bias': 0.3, 'noise': 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    'off', [dict.fromkeys(ON, 0.0), {f'{knob}_probability': 0.0 for knob in ON}]
)
def test_what_is_off_is_not_in_the_program(rng, off):
    image, mask = pair(rng)

    def program(**options):
        run = functools.partial(augment, image_HWC=image, mask_HW=mask, options=OTHERS | options)
        return str(jax.make_jaxpr(run)(jax.random.key(0)))

    assert program(**{**ON, **off}) == program() != program(**ON)


def test_blur_low_resolution_and_gamma_change_no_draw_of_the_others(rng):
    """Never drawn, they leave every bit; always drawn, the mask."""
    image, mask = pair(rng)
    for seed in range(4):
        key = jax.random.key(seed)
        plain, labels = augment(key, image, mask, OTHERS)
        never = {f'{knob}_probability': 1e-30 for knob in ON}
        same, same_labels = augment(key, image, mask, OTHERS | ON | never)
        np.testing.assert_array_equal(same, plain)
        np.testing.assert_array_equal(same_labels, labels)
        changed, changed_labels = augment(key, image, mask, OTHERS | ON)
        assert float(jnp.abs(changed - plain).max()) > 0.01
        np.testing.assert_array_equal(changed_labels, labels)


@pytest.mark.parametrize('knob', ON)
def test_a_change_is_made_as_often_as_its_probability(rng, knob):
    image, mask = pair(rng)
    plain, _ = augment(jax.random.key(0), image, mask, {})

    def changed(key):
        options = {knob: ON[knob], f'{knob}_probability': 0.3}
        return (augment(key, image, mask, options)[0] != plain).any()

    keys = jax.random.split(jax.random.key(1), 400)
    assert jax.jit(jax.vmap(changed))(keys).mean() == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize('sigma', [0.0, 0.4, 1.0, 3.0])
def test_blurred_is_scipys_gaussian_of_what_is_there(rng, sigma):
    image, _ = pair(rng, 24, 31)

    def there(x):
        return ndimage.gaussian_filter(x, sigma, mode='constant', truncate=12, axes=(0, 1))

    picture = np.asarray(image, np.float64)
    expected = there(picture) / there(np.ones_like(picture))
    np.testing.assert_allclose(blurred(image, jnp.float32(sigma)), expected, atol=1e-5)


@pytest.mark.parametrize('zoom', [0.05, 0.3, 0.5, 0.77, 1.0])
def test_coarse_takes_the_nearest_pixels_and_interpolates_between_their_centres(rng, zoom):
    image, _ = pair(rng, 24, 31)
    expected = np.asarray(image)
    for axis, n in enumerate(expected.shape[:2]):
        cells = max(round(zoom * n), 1)
        seen = [(2 * cell + 1) * n // (2 * cells) for cell in range(cells)]
        centres = (np.arange(cells) + 0.5) * n / cells - 0.5
        small = np.take(expected, seen, axis)
        expected = np.apply_along_axis(
            lambda line, n=n, centres=centres: np.interp(np.arange(n), centres, line), axis, small
        )
    np.testing.assert_allclose(coarse(image, jnp.float32(zoom)), expected, atol=1e-5)


def test_power_is_of_each_channels_own_range_and_keeps_its_moments(rng):
    image, exponents = np.asarray(pair(rng)[0], np.float64), (0.6, 1.0, 1.7)
    flat = np.dstack([image, np.full(image.shape[:2], -0.7)])
    ours = power(jnp.asarray(flat, jnp.float32), jnp.array([[[*exponents, 1.3]]]))
    for c, exponent in enumerate(exponents):
        x = image[..., c]
        y = ((x - x.min()) / np.ptp(x)) ** exponent
        expected = (y - y.mean()) / y.std() * x.std() + x.mean()
        np.testing.assert_allclose(ours[..., c], expected, atol=1e-5)
    np.testing.assert_allclose(ours[..., 3], -0.7, atol=1e-5)  # of one value: as it was


def test_strengths_are_drawn_over_the_ranges_that_are_promised():
    """Read off images of which the strength can be recovered."""
    n, keys = 48, jax.random.split(jax.random.key(0), 300)
    mask, rows = jnp.zeros((n, n), jnp.int32), np.arange(n, dtype=np.float32)

    def seen(picture, **options):
        image = jnp.asarray(np.broadcast_to(picture, (n, n))[..., None], jnp.float32)
        run = jax.vmap(lambda key: augment(key, image, mask, options)[0][..., 0])
        return np.asarray(jax.jit(run)(keys), np.float64)

    spread = seen((rows == 24.0)[:, None] * (rows == 24.0) * 1.0, blur=2.0).sum(2)
    deviation = np.sqrt((spread * (np.arange(n) - 24.0) ** 2).sum(1))
    assert deviation.max() == pytest.approx(2.0, abs=0.1)
    assert deviation.min() < 0.3
    assert np.mean(deviation) == pytest.approx(1.0, abs=0.1)

    # A channel of 0, 1/2 and 1 alone: the middle value of the range is 2^-exponent.
    y = seen(rows // 16 / 2, gamma=0.5)
    low, middle, high = y[:, 0, 0], y[:, 0, 20], y[:, 0, -1]
    exponent = -np.log2((middle - low) / (high - low))
    assert exponent.min() == pytest.approx(1 / 1.5, abs=0.02)
    assert exponent.max() == pytest.approx(1.5, abs=0.02)
    assert np.mean(np.log(exponent)) == pytest.approx(0, abs=0.05)

    # A ramp: as many cells as give what is seen.
    found = seen(rows, low_resolution=0.5)
    image = jnp.asarray(np.broadcast_to(rows, (n, n))[..., None])
    made = np.stack([coarse(image, cells / n)[..., 0] for cells in range(n + 1)])
    apart = np.abs(found[:, None, 0] - made[None, :, 0]).max(-1)
    assert apart.min(1).max() < 1e-4
    assert set(apart.argmin(1)) == set(range(n // 2, n + 1))
