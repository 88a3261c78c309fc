"""The fully connected CRF of Krähenbühl and Koltun 2011 (arXiv 1210.5644), by mean field.

Two Gaussian kernels with the Potts model: one over position (smoothness), one over position and
colour (appearance). Each is normalised symmetrically and includes the pixel itself, as in the
authors' code and pydensecrf. Deviation: no permutohedral lattice. The position kernel is a product
of two one-dimensional ones and always exact. The bilateral kernel is either

  exact     over all pairs of pixels, a matrix of (H W)**2 floats: 1 GiB for 128 x 128
  windowed  over the pairs within a square window, ignoring those outside:
            (2 window + 1)**2 H W floats, 285 MB for 256 x 256 and a window of 16
"""

import math

import jax
import jax.numpy as jnp


def mean_field(
    logits_HWK: jax.Array,
    image_HWC: jax.Array,
    *,
    window: int | None,
    spatial_weight: float = 3.0,
    spatial_sigma: float = 3.0,
    bilateral_weight: float = 4.0,
    bilateral_sigma: float = 49.0,
    color_sigma: float = 5.0,
    iterations: int = 10,
) -> jax.Array:
    """H W K float32 probabilities after `iterations` updates; sigmas in pixels and colours.

    `window` is the radius of the windowed bilateral kernel in pixels, or None for the
    exact one. `color_sigma` has the unit of `image_HWC`.
    """
    logits_HWK, image_HWC = logits_HWK.astype(jnp.float32), image_HWC.astype(jnp.float32)

    def spatial(x_HWK):
        return _spatial(x_HWK, spatial_sigma)

    if window is None:
        kernel_NN = _bilateral_matrix(image_HWC, bilateral_sigma, color_sigma)

        def bilateral(x_HWK):
            flat = x_HWK.reshape(-1, x_HWK.shape[-1])
            return jnp.dot(kernel_NN, flat, precision='highest').reshape(x_HWK.shape)
    else:
        kernel_OHW = _bilateral_window(image_HWC, bilateral_sigma, color_sigma, window)

        def bilateral(x_HWK):
            return _sum_window(x_HWK, kernel_OHW)

    ones_HW1 = jnp.ones((*logits_HWK.shape[:2], 1))
    terms = []
    for weight, kernel in ((spatial_weight, spatial), (bilateral_weight, bilateral)):
        terms.append((weight, kernel, jax.lax.rsqrt(kernel(ones_HW1))))

    def update(_, q_HWK):
        messages = sum(w * norm_HW1 * k(norm_HW1 * q_HWK) for w, k, norm_HW1 in terms)
        return jax.nn.softmax(logits_HWK + messages)

    return jax.lax.fori_loop(0, iterations, update, jax.nn.softmax(logits_HWK))


def _spatial(x_HWK: jax.Array, sigma: float) -> jax.Array:
    """Sum over all pixels, each weighted by exp(-distance**2 / (2 sigma**2))."""
    H, W, _ = x_HWK.shape

    def gaussian(n):
        offset = jnp.arange(n, dtype=jnp.float32)[:, None] - jnp.arange(n, dtype=jnp.float32)[None]
        return jnp.exp(-0.5 * jnp.square(offset / sigma))

    x_HWK = jnp.einsum('Hh,hwk->Hwk', gaussian(H), x_HWK, precision='highest')
    return jnp.einsum('Ww,Hwk->HWk', gaussian(W), x_HWK, precision='highest')


def _bilateral_matrix(image_HWC: jax.Array, sigma: float, color_sigma: float) -> jax.Array:
    """(N, N) weights of all pairs of the N = H W pixels."""
    H, W, C = image_HWC.shape
    rows, columns = jnp.meshgrid(jnp.arange(H), jnp.arange(W), indexing='ij')
    position_N2 = jnp.stack([rows, columns], axis=-1).reshape(-1, 2) / sigma
    features_NF = jnp.concatenate([position_N2, image_HWC.reshape(-1, C) / color_sigma], axis=-1)
    exponent_NN = 0.0
    for feature_N in features_NF.T:  # one at a time: differences, not a cancelling expansion
        exponent_NN += jnp.square(feature_N[:, None] - feature_N[None])
    return jnp.exp(-0.5 * exponent_NN)


def _bilateral_window(
    image_HWC: jax.Array, sigma: float, color_sigma: float, radius: int
) -> jax.Array:
    """(O, H, W) weights of the O pixels at most `radius` rows and columns away."""
    H, W, C = image_HWC.shape
    side = 2 * radius + 1
    padded = jnp.pad(image_HWC, ((radius, radius), (radius, radius), (0, 0)))

    def weights(offset):
        row, column = offset // side, offset % side
        near_HWC = jax.lax.dynamic_slice(padded, (row, column, 0), (H, W, C))
        distance = ((row - radius) ** 2 + (column - radius) ** 2) / sigma**2
        color_HW = jnp.square((near_HWC - image_HWC) / color_sigma).sum(axis=-1)
        return jnp.exp(-0.5 * (distance + color_HW))

    return jax.lax.map(weights, jnp.arange(side**2))


def _sum_window(x_HWK: jax.Array, kernel_OHW: jax.Array) -> jax.Array:
    """Sum over each pixel's window, weighted by `_bilateral_window`; outside x is zero."""
    H, W, K = x_HWK.shape
    side = math.isqrt(len(kernel_OHW))
    radius = side // 2
    padded = jnp.pad(x_HWK, ((radius, radius), (radius, radius), (0, 0)))

    def add_row(total_HWK, row_and_kernels):  # one row of offsets per step: fewer passes
        row, kernels_SHW = row_and_kernels
        for column in range(side):
            near_HWK = jax.lax.dynamic_slice(padded, (row, column, 0), (H, W, K))
            total_HWK += kernels_SHW[column][:, :, None] * near_HWK
        return total_HWK, None

    rows = jnp.arange(side), kernel_OHW.reshape(side, side, H, W)
    return jax.lax.scan(add_row, jnp.zeros_like(x_HWK), rows)[0]
