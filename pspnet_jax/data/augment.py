"""Augmentation inside the compiled step: one sampling grid for image and mask.

Flip, scale, rotation, elastic deformation and crop are composed into one map from output pixel to
input position, so each image is interpolated once: the image bilinearly, the mask by nearest
neighbour. Pixels from outside get the image's minimum and, in the mask, the ignored label. Blur,
lower resolution and changed intensities come after that and affect only the image.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from pspnet_jax.data.volumes import IGNORE_LABEL

ELASTIC_GRID = 4  # control points along each side of the deformation field
GEOMETRY = ('crop', 'flip', 'flip_vertical', 'scale', 'rotate', 'elastic')  # options of the grid


# The config's section `augment` without any change, and the defaults of `augment`'s options.
OFF: dict[str, Any] = {
    'crop': 0,  # side of the square output, placed at random; 0 keeps the size
    'flip': 0.0,  # probability of a left-right mirror
    'flip_vertical': 0.0,  # of an upside-down one
    'scale': 0.0,  # 0.1 zooms by 1/1.1 .. 1.1
    'rotate': 0.0,  # degrees
    'elastic': 0.0,  # standard deviation of the field in pixels, the same everywhere
    'blur': 0.0,  # largest deviation of the Gaussian, in pixels
    'blur_probability': 1.0,
    'low_resolution': 0.0,  # largest share of the pixels along each axis that is lost
    'low_resolution_probability': 1.0,
    'gamma': 0.0,  # 0.5 takes powers of 1/1.5 .. 1.5 (`power`)
    'gamma_probability': 1.0,
    'gain': 0.0,  # channel-wise factor 1 +- gain
    'bias': 0.0,  # channel-wise shift, in units of the normalised image
    'noise': 0.0,  # largest standard deviation of a pixel's, in that unit
    'channel_dropout': 0.0,  # probability that one channel replaces the others
    'kept_channel': None,  # that channel's number; None draws one
}


def augment(
    key: jax.Array,
    image_HWC: jax.Array,
    mask_HW: jax.Array,
    options: Mapping[str, Any],
    *,
    ignore_label: int = IGNORE_LABEL,
    context: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """One example; `jax.vmap` over keys for a batch. All ranges are symmetric.

    `options` is the config's section, or the keys that differ from `OFF`. `ignore_label` marks
    pixels from outside. The image also holds the channels of `context` neighbours on each side
    (`volumes.channels_seen`); they share the random changes of a channel.

    Raises ValueError for a crop larger than the image, an unknown key, and a kept channel that the
    image lacks.
    """
    if unknown := sorted(options.keys() - OFF.keys()):
        raise ValueError(f'augment has no {", ".join(unknown)}, it has {", ".join(OFF)}')
    options = OFF | dict(options)
    keys = jax.random.split(key, 8)
    if any(options[name] for name in GEOMETRY):
        H, W = mask_HW.shape
        rows, columns = sampling_grid(keys, (H, W), options)

        def sample(picture, order, outside):
            return map_coordinates(picture, [rows, columns], order, mode='constant', cval=outside)

        lowest_11C = image_HWC.min(axis=(0, 1), keepdims=True)
        by_channel = jax.vmap(lambda c: sample(c, 1, 0.0), in_axes=-1, out_axes=-1)
        image_HWC = by_channel(image_HWC - lowest_11C) + lowest_11C
        mask_HW = sample(mask_HW, 0, ignore_label)
    image_HWC = with_other_intensities(key, keys, image_HWC, options, context)
    if options['channel_dropout'] > 0.0:
        chance, which = jax.random.split(jax.random.fold_in(key, 11))
        dropped = jax.random.bernoulli(chance, options['channel_dropout'])
        single = one_channel(which, image_HWC, options['kept_channel'], 2 * context + 1)
        image_HWC = jnp.where(dropped, single, image_HWC)
    return image_HWC, mask_HW


def sampling_grid(
    keys: jax.Array, size: tuple[int, int], options: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """Rows and columns of the image, each H W, from which the output's pixels come.

    A crop starts at whole pixels if neither scale, rotate nor elastic is used.
    """
    (h, w), crop = size, options['crop']
    out_h, out_w = (crop, crop) if crop else (h, w)
    if out_h > h or out_w > w:
        raise ValueError(f'augment.crop {crop} is larger than the image, {h}x{w}: lower it')
    scale, rotate, elastic = (options[name] for name in ('scale', 'rotate', 'elastic'))

    # Output pixels, centred, mirrored, rotated and zoomed, then moved to the crop's place.
    rows = jnp.arange(out_h, dtype=jnp.float32)[:, None] - (out_h - 1) / 2
    columns = jnp.arange(out_w, dtype=jnp.float32)[None, :] - (out_w - 1) / 2
    columns = jnp.where(jax.random.bernoulli(keys[0], options['flip']), -columns, columns)
    if options['flip_vertical'] > 0.0:
        over = jax.random.bernoulli(jax.random.fold_in(keys[0], 1), options['flip_vertical'])
        rows = jnp.where(over, -rows, rows)
    angle = jnp.deg2rad(_uniform(keys[1], rotate))
    zoom = jnp.exp(-_uniform(keys[2], jnp.log1p(scale)))
    room, place = jnp.array([h - out_h, w - out_w]), _uniform(keys[3], 0.5, (2,))
    shift = place * room
    if not (scale or rotate or elastic):  # fractions of a pixel would blur and remove noise
        shift = jnp.minimum(jnp.floor((place + 0.5) * (room + 1)), room) - room / 2
    rows, columns = (
        zoom * (jnp.cos(angle) * rows - jnp.sin(angle) * columns) + (h - 1) / 2 + shift[0],
        zoom * (jnp.sin(angle) * rows + jnp.cos(angle) * columns) + (w - 1) / 2 + shift[1],
    )
    if elastic > 0.0:
        field = elastic * jax.random.normal(keys[4], (2, ELASTIC_GRID, ELASTIC_GRID))
        field = jax.image.resize(field, (2, out_h, out_w), 'cubic')
        # Between control points it is a mean of independent values, with a smaller deviation.
        shares = (
            jax.image.resize(jnp.eye(ELASTIC_GRID), (n, ELASTIC_GRID), 'cubic')
            for n in (out_h, out_w)
        )
        down, across = (jnp.linalg.norm(share, axis=1) for share in shares)
        field = field / jnp.outer(down, across)[None]
        rows, columns = rows + field[0], columns + field[1]
    return rows, columns


def with_other_intensities(
    key: jax.Array,
    keys: jax.Array,
    image_HWC: jax.Array,
    options: Mapping[str, Any],
    context: int,
) -> jax.Array:
    """The image with random blur, resolution, gamma, gain, bias and noise."""

    def by_channel(key, limit):
        seen = 2 * context + 1
        return jnp.tile(_uniform(key, limit, (1, 1, image_HWC.shape[-1] // seen)), seen)

    changes = (  # numbers other than those of `keys`, so that draws do not depend on each other
        (8, 'blur', blurred, lambda key, most: most * jax.random.uniform(key)),
        (9, 'low_resolution', coarse, lambda key, most: 1.0 - most * jax.random.uniform(key)),
        (10, 'gamma', power, lambda key, most: jnp.exp(by_channel(key, jnp.log1p(most)))),
    )
    for number, name, change, draw in changes:
        strength, probability = options[name], options[f'{name}_probability']
        if strength > 0.0 and probability > 0.0:
            chance, amount = jax.random.split(jax.random.fold_in(key, number))
            done = jax.random.bernoulli(chance, probability)
            image_HWC = jnp.where(done, change(image_HWC, draw(amount, strength)), image_HWC)
    if options['gain'] > 0.0:
        image_HWC = image_HWC * (1.0 + by_channel(keys[5], options['gain']))
    if options['bias'] > 0.0:
        image_HWC = image_HWC + by_channel(keys[6], options['bias'])
    if options['noise'] > 0.0:
        amount, pixels = jax.random.split(keys[7])
        sigma = jax.random.uniform(amount, maxval=options['noise'])
        image_HWC = image_HWC + sigma * jax.random.normal(pixels, image_HWC.shape)
    return image_HWC


def one_channel(key: jax.Array, image_HWC: jax.Array, kept: int | None, slices: int) -> jax.Array:
    """The image in which channel `kept` of each of its `slices` replaces that slice's others.

    It looks like an examination with a single sequence. If `kept` is None, the channel is drawn.
    """
    by_slice_HWnC = image_HWC.reshape(*image_HWC.shape[:2], slices, -1)
    channels = by_slice_HWnC.shape[-1]
    if kept is not None and not 0 <= kept < channels:
        raise ValueError(
            f'augment.kept_channel {kept} is not one of the {channels} channels, 0 to '
            f'{channels - 1}: give one of these, or None'
        )
    number = jax.random.randint(key, (), 0, channels) if kept is None else kept
    kept_HWn1 = jnp.take(by_slice_HWnC, number, axis=-1)[..., None]
    return jnp.broadcast_to(kept_HWn1, by_slice_HWnC.shape).reshape(image_HWC.shape)


def _uniform(key: jax.Array, limit, shape: tuple[int, ...] = ()) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def along_both(image_HWC: jax.Array, matrix: Callable[[int], jax.Array]) -> jax.Array:
    """`matrix(n)`, n x n, times the columns and then the rows."""
    for axis, n in enumerate(image_HWC.shape[:2]):
        image_HWC = jnp.tensordot(matrix(n), image_HWC, axes=(1, axis), precision='highest')
        image_HWC = jnp.moveaxis(image_HWC, 0, axis)
    return image_HWC


def blurred(image_HWC: jax.Array, sigma: jax.Array) -> jax.Array:
    """Blur by a Gaussian of `sigma` pixels; near the border its weights are renormalised to 1."""

    def matrix(n):
        apart = jnp.arange(n)[:, None] - jnp.arange(n)[None]
        weights = jnp.exp(-0.5 * (apart / jnp.maximum(sigma, 1e-3)) ** 2)
        return weights / weights.sum(axis=1, keepdims=True)

    return along_both(image_HWC, matrix)


def coarse(image_HWC: jax.Array, zoom: jax.Array) -> jax.Array:
    """Lower the resolution to `zoom` times height and width, and interpolate back.

    nnU-Net's SimulateLowResolutionTransform (PyTorch's 'nearest-exact', then 'bilinear').
    Deviation: all channels get the same zoom; it draws one for each of half of the channels.
    """

    def matrix(n):
        cells = jnp.maximum(jnp.round(zoom * n), 1.0)
        position = jnp.clip((jnp.arange(n) + 0.5) * cells / n - 0.5, 0.0, cells - 1.0)
        low = jnp.floor(position)
        share = (position - low)[:, None]

        def seen(cell):
            pixel = jnp.floor((cell + 0.5) * n / cells)
            return pixel[:, None] == jnp.arange(n)[None]

        return jnp.where(seen(low), 1.0 - share, 0.0) + jnp.where(
            seen(jnp.minimum(low + 1.0, cells - 1.0)), share, 0.0
        )

    return along_both(image_HWC, matrix)


def power(image_HWC: jax.Array, exponent_11C: jax.Array) -> jax.Array:
    """Scale each channel to 0..1, raise it to `exponent`, and restore its mean and deviation.

    nnU-Net's GammaTransform, without its inverted variant.
    """

    def moments(x):
        return x.mean((0, 1), keepdims=True), x.std((0, 1), keepdims=True)

    low, high = (f(axis=(0, 1), keepdims=True) for f in (image_HWC.min, image_HWC.max))
    changed = ((image_HWC - low) / jnp.maximum(high - low, 1e-6)) ** exponent_11C
    (mean, deviation), (own_mean, own_deviation) = moments(image_HWC), moments(changed)
    return (changed - own_mean) * (deviation / jnp.maximum(own_deviation, 1e-6)) + mean
