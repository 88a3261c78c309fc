"""Prediction as a pure function of parameters and images.

`probabilities` is one compiled program: a network or an ensemble, at one or more scales, with or
without the mirror image, followed by a CRF. `slide` applies such a program to square tiles of
images of any size. It cuts and blends on the host: all tiles have one shape, so one program serves
all image sizes, and the device never holds a whole image.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pspnet_jax.data import volumes
from pspnet_jax.inference import crf
from pspnet_jax.models.layers import resize, scaled
from pspnet_jax.runtime import compilation
from pspnet_jax.runtime.errors import ConfigError

EXACT_CRF_PIXELS = 128 * 128  # a matrix of 1 GiB


def probabilities(
    variables: dict[str, Any],
    image_BHWC: jax.Array,
    *,
    model: nn.Module,
    ensemble: bool = False,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    crf_options: Mapping[str, Any] | None = None,
) -> jax.Array:
    """B H W K float32 class probabilities at the image's own size.

    They are averaged over `scales` of the image, and with `flip` over the image and its left-right
    mirror image at each scale. With `ensemble` the arrays of `variables` hold several networks
    along a leading axis, which are averaged too; they run one after the other, since a map over
    weights would turn each convolution into a grouped one and hold the activations of all.
    `crf_options`, the arguments of `refine`, add a CRF after the mean.
    """
    H, W = image_BHWC.shape[1:3]

    def network(variables, image_BhwC):
        logits_BijK = model.apply(variables, image_BhwC, train=False)['logits']
        size = image_BhwC.shape[1:3]  # training takes labels at the centres of the cells
        return jax.nn.softmax(resize(logits_BijK, size, align_corners=False))

    def at_scale(variables, scale):
        image_BhwC = resize(image_BHWC, [max(scaled(size, scale), 1) for size in (H, W)])
        if not flip:
            return resize(network(variables, image_BhwC), (H, W))
        both = jnp.stack([image_BhwC, image_BhwC[:, :, ::-1]])
        prob_BhwK, mirrored_BhwK = jax.lax.map(functools.partial(network, variables), both)
        return resize((prob_BhwK + mirrored_BhwK[:, :, ::-1]) / 2, (H, W))

    def of_one(variables):
        return sum(at_scale(variables, scale) for scale in scales) / len(scales)

    if ensemble:
        first = jax.tree.map(lambda x: x[0], variables)
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_one, first))
        total, _ = jax.lax.scan(
            lambda total, member: (total + of_one(member), None), nothing, variables
        )
        prob_BHWK = total / len(jax.tree.leaves(variables)[0])
    else:
        prob_BHWK = of_one(variables)
    if crf_options is None:
        return prob_BHWK
    return refine(prob_BHWK, image_BHWC, **crf_options)


def refine(
    prob_BHWK: jax.Array,
    image_BHWC: jax.Array,
    *,
    kernel: str,
    window: int,
    context: int = 0,
    **options: Any,
) -> jax.Array:
    """Apply a fully connected CRF to each image's probabilities; kernel 'none' returns them as is.

    `kernel` is 'exact' or 'windowed'; the other options are those of `crf.mean_field`. If the image
    also holds the channels of `context` neighbours on each side, the CRF sees only its own. Raises
    ConfigError if the image has too many pixels for 'exact'.
    """
    H, W = image_BHWC.shape[1:3]
    if kernel == 'none':
        return prob_BHWK
    if kernel == 'exact' and H * W > EXACT_CRF_PIXELS:
        raise ConfigError(
            f"crf.kernel 'exact' is for up to {EXACT_CRF_PIXELS} pixels, but the images have "
            f"{H} x {W}: use 'windowed'"
        )
    window = None if kernel == 'exact' else window
    channels = image_BHWC.shape[-1] // (2 * context + 1)
    image_BHWC = image_BHWC[..., context * channels : (context + 1) * channels]
    mean_field = functools.partial(crf.mean_field, window=window, **options)
    # The logits up to a constant per pixel, which does not change the softmax.
    logits_BHWK = jnp.log(jnp.maximum(prob_BHWK, jnp.finfo(jnp.float32).tiny))
    return jax.lax.map(lambda pair: mean_field(*pair), (logits_BHWK, image_BHWC))


def gaussian(window: int) -> np.ndarray:
    """(window,) float32: a tile's weight along one axis, with a deviation of window / 8.

    nnU-Net (Isensee et al. 2021) and MONAI do the same, but half a pixel off the centre if the
    window is even, and with a lower limit. Here the smallest weight is exp(-8) of the largest.
    """
    offset = np.arange(window) - (window - 1) / 2
    return np.exp(-0.5 * (offset / (window / 8)) ** 2).astype(np.float32)


def tile_starts(size: int, window: int, overlap: float) -> list[int]:
    """Starts of evenly spaced tiles along an axis, at most (1 - overlap) windows apart.

    `window` is at most `size`.
    """
    step = max(window * (1 - overlap), 1)
    count = int(np.ceil((size - window) / step)) + 1
    return np.rint(np.linspace(0, size - window, count)).astype(int).tolist()


def pad_batch(array_B: np.ndarray, batch_size: int) -> np.ndarray:
    """Append zeros up to the next power of two or `batch_size`, so that few shapes are compiled."""
    return _pad(array_B, min(1 << (len(array_B) - 1).bit_length(), batch_size))


def _pad(array_B: np.ndarray, length: int) -> np.ndarray:
    return np.pad(array_B, [(0, length - len(array_B))] + [(0, 0)] * (array_B.ndim - 1))


def slide(
    predict: Callable[[np.ndarray], Any],
    image_BHWC: np.ndarray,
    *,
    window: int,
    overlap: float,
    batch_size: int,
) -> np.ndarray:
    """B H W K: the mean of `predict` over overlapping tiles, weighted towards their centres.

    `predict` takes N window window C, at most `batch_size` tiles at a time, and may return before
    it is done. Images smaller than the window are padded with zeros, their mean after
    normalisation, as semseg does.
    """
    B, H, W, _ = image_BHWC.shape
    top, left = max(window - H, 0) // 2, max(window - W, 0) // 2
    if max(window - H, window - W) > 0:
        bottom, right = max(window - H - top, 0), max(window - W - left, 0)
        image_BHWC = np.pad(image_BHWC, ((0, 0), (top, bottom), (left, right), (0, 0)))
    rows, columns = (tile_starts(size, window, overlap) for size in image_BHWC.shape[1:3])
    places = [(b, i, j) for b in range(B) for i in rows for j in columns]
    line = gaussian(window)
    weight_HW1 = (line[:, None] * line)[..., None]
    total_BHWK = None

    def add(places, probs_NHWK):
        nonlocal total_BHWK
        probs_NHWK = np.asarray(probs_NHWK)
        if total_BHWK is None:
            total_BHWK = np.zeros((*image_BHWC.shape[:3], probs_NHWK.shape[-1]), np.float32)
        for (b, i, j), prob_HWK in zip(places, probs_NHWK, strict=False):  # the rest is padding
            total_BHWK[b, i : i + window, j : j + window] += weight_HW1 * prob_HWK

    before = None
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        tiles = np.stack([image_BHWC[b, i : i + window, j : j + window] for b, i, j in batch])
        running = batch, predict(pad_batch(tiles, batch_size))
        if before:  # add these while the next ones run
            add(*before)
        before = running
    add(*before)

    sums = [np.zeros(size, np.float32) for size in image_BHWC.shape[1:3]]
    for total, starts in zip(sums, (rows, columns), strict=True):
        for start in starts:
            total[start : start + window] += line
    total_BHWK /= (sums[0][:, None] * sums[1])[..., None]
    return total_BHWK[:, top : top + H, left : left + W]


def at_size(
    program: Callable, refined: Callable | None, size: tuple[int, ...], boxed: bool
) -> Callable[[dict[str, Any], np.ndarray], np.ndarray]:
    """`program(variables, image_BHWC)` of images resized to `size`; what it gives is resized back.

    `boxed` images keep their proportion and are padded; `refined` then refines what is inside.
    """
    # By half-pixel centres, as `volumes.resize_image`.
    back = compilation.jit(functools.partial(resize, align_corners=False), static_argnums=1)

    def predict(variables, image_BHWC):
        own = image_BHWC.shape[1:3]
        top, left, height, width = volumes.letterbox(own, size) if boxed else (0, 0, *size)
        seen = np.stack([volumes.resize_image(x, (height, width)) for x in image_BHWC])
        around = [(top, size[0] - top - height), (left, size[1] - left - width)]
        prob_BHWK = program(variables, np.pad(seen, [(0, 0), *around, (0, 0)]))
        prob_BHWK = prob_BHWK[:, top : top + height, left : left + width]
        if boxed and refined:
            prob_BHWK = refined(prob_BHWK, seen)
        return np.asarray(back(prob_BHWK, own))

    return predict


def compile_predict(
    model: nn.Module,
    *,
    ensemble: bool = False,
    size: tuple[int, ...] = (),
    fit: str | None = 'letterbox',
    window: int = 0,
    overlap: float = 0.5,
    batch_size: int = 1,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    crf_options: Mapping[str, Any] | None = None,
) -> Callable[[dict[str, Any], np.ndarray], np.ndarray]:
    """`predict(variables, image_BHWC)`: `probabilities`, with the batch split over local devices.

    It compiles once per batch shape, and pads a batch that is not a multiple of the devices. With
    `size` the network sees every image at that height and width, as in training (`fit` as in
    `volumes.resized`), and the result has the image's own size. With `window` the network sees
    square tiles of that side, `batch_size` at a time, which `slide` blends. The CRF sees whole
    images, resized ones with `size`.
    """
    n = jax.local_device_count()
    mesh = jax.make_mesh((n,), ('data',), axis_types=(AxisType.Auto,), devices=jax.local_devices())
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
    behind = None if crf_options is None or crf_options['kernel'] == 'none' else crf_options

    def on_devices(function, *shardings):
        compiled = compilation.jit(function, in_shardings=shardings, out_shardings=split)

        def call(*arguments):
            count = len(arguments[-1])
            if count % n:
                arguments = [
                    array if sharding is whole else _pad(array, count + -count % n)
                    for sharding, array in zip(shardings, arguments, strict=True)
                ]
            if jax.process_count() > 1:  # jit there takes host arrays only if all have the same
                arguments = map(jax.device_put, arguments, shardings)
            return compiled(*arguments)[:count]

        return call

    network = functools.partial(
        probabilities, model=model, ensemble=ensemble, scales=scales, flip=flip
    )
    refined = on_devices(functools.partial(refine, **behind), split, split) if behind else None
    if not window:
        boxed = bool(size) and fit != 'stretch'  # then the CRF does not see the padding
        inside = None if boxed else behind
        program = on_devices(functools.partial(network, crf_options=inside), whole, split)
        if size:
            return at_size(program, refined, size, boxed)
        return lambda variables, image_BHWC: np.asarray(program(variables, image_BHWC))
    on_tiles = on_devices(network, whole, split)

    def predict(variables, image_BHWC):
        prob_BHWK = slide(
            functools.partial(on_tiles, variables),
            image_BHWC,
            window=window,
            overlap=overlap,
            batch_size=batch_size,
        )
        return np.asarray(refined(prob_BHWK, image_BHWC)) if refined else prob_BHWK

    return predict
