"""Building blocks shared by every model.

Adaptive average pooling and bilinear resizing are linear maps along one axis,
so with static shapes each is a small constant matrix and both are two einsums:
exact, differentiable, exportable, and the same on every platform.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def adaptive_pool_matrix(size: int, bins: int) -> np.ndarray:
    """(bins, size) matrix of adaptive average pooling; PyTorch's bin edges.

    Bin i averages cells floor(i*size/bins) .. ceil((i+1)*size/bins)-1.
    """
    matrix = np.zeros((bins, size), np.float32)
    for i in range(bins):
        start, stop = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix


def resize_matrix(size: int, out: int, *, align_corners: bool = True) -> np.ndarray:
    """(out, size) matrix of bilinear interpolation along one axis.

    `align_corners` maps first cell to first and last to last (the paper and
    PyTorch's `align_corners=True`); otherwise cells are half-pixel centred with
    clamped ends (PyTorch's False, TensorFlow 2).
    """
    if align_corners:
        position = np.arange(out) * ((size - 1) / max(out - 1, 1))
    else:
        position = np.clip((np.arange(out) + 0.5) * (size / out) - 0.5, 0, size - 1)
    low = np.minimum(position.astype(np.int64), max(size - 2, 0))
    weight = (position - low).astype(np.float32)
    matrix = np.zeros((out, size), np.float32)
    matrix[np.arange(out), low] = 1.0 - weight
    matrix[np.arange(out), np.minimum(low + 1, size - 1)] += weight
    return matrix


def apply_matrices(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """B h w C -> B H W C by `rows` (H, h) and `columns` (W, w), in x's dtype."""
    rows, columns = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    x = jnp.einsum('Hh,bhwc->bHwc', rows, x, precision='highest')
    return jnp.einsum('Ww,bHwc->bHWc', columns, x, precision='highest')


def adaptive_pool(x: jax.Array, bins: int) -> jax.Array:
    """B h w C -> B bins bins C, `torch.nn.AdaptiveAvgPool2d(bins)`."""
    _, h, w, _ = x.shape
    return apply_matrices(x, adaptive_pool_matrix(h, bins), adaptive_pool_matrix(w, bins))


def resize(x: jax.Array, size: Sequence[int], *, align_corners: bool = True) -> jax.Array:
    """B h w C -> B H W C, bilinear. For images and logits, never for labels."""
    _, h, w, _ = x.shape
    if (h, w) == tuple(size):
        return x
    return apply_matrices(
        x,
        resize_matrix(h, size[0], align_corners=align_corners),
        resize_matrix(w, size[1], align_corners=align_corners),
    )


def conv_general_dilated(x, kernel, strides, padding, **kwargs):
    """`lax.conv_general_dilated`, stated so that XLA's CPU backend runs it well.

    A 1x1 kernel is a matrix product, which has the faster weight gradient. A dense 3x3
    at stride 1 has a weight gradient of its own, below. On accelerators both are what XLA
    makes of the plain convolution.
    """
    dilation = kwargs.get('rhs_dilation') or (1, 1)
    if kwargs.get('feature_group_count', 1) != 1:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)
    if kernel.shape[:2] == (1, 1) and all(pad == (0, 0) for pad in padding):
        x = x[:, :: strides[0], :: strides[1], :]
        return jnp.einsum('bhwi,io->bhwo', x, kernel[0, 0], precision=kwargs.get('precision'))
    same = ((dilation[0],) * 2, (dilation[1],) * 2)
    if kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and tuple(padding) == same:
        return _conv3x3(x, kernel, tuple(dilation))
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)


def _plain_conv3x3(x, kernel, dilation):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        tuple((d, d) for d in dilation),
        rhs_dilation=dilation,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


_conv3x3 = jax.custom_vjp(_plain_conv3x3, nondiff_argnums=(2,))


def _conv3x3_forward(x, kernel, dilation):
    return _plain_conv3x3(x, kernel, dilation), (x, kernel)


def _conv3x3_backward(dilation, residuals, grad):
    x, kernel = residuals
    (grad_x,) = jax.linear_transpose(lambda x: _plain_conv3x3(x, kernel, dilation), x)(grad)

    def plain(x, grad):
        return jax.linear_transpose(lambda k: _plain_conv3x3(x, k, dilation), kernel)(grad)[0]

    def products(x, grad):
        return weight_gradient_3x3(x, grad, dilation)

    return grad_x, jax.lax.platform_dependent(x, grad, cpu=products, default=plain)


_conv3x3.defvjp(_conv3x3_forward, _conv3x3_backward)


def weight_gradient_3x3(x: jax.Array, grad: jax.Array, dilation: tuple[int, int]) -> jax.Array:
    """3 3 I O from x: B H W I and the gradient B H W O of a stride-1 'same' 3x3.

    One matrix product an image, (3 I, H W) by (H W, 3 O): the inputs at three column
    offsets against the gradients at three row offsets meet in all nine taps. Each side
    is copied three times rather than one side nine times, and both stay in the cache.
    """
    rows, columns = dilation
    w, features_in, features_out = x.shape[2], x.shape[3], grad.shape[-1]

    def add_image(total, pair):
        x, grad = pair
        x = jnp.pad(jnp.moveaxis(x, -1, 0), ((0, 0), (rows, rows), (columns, columns)))
        shifted = [x[:, :, i * columns : i * columns + w] for i in range(3)]
        moved = [jnp.pad(grad, ((i * rows, (2 - i) * rows), (0, 0), (0, 0))) for i in range(3)]
        left = jnp.concatenate(shifted).reshape(3 * features_in, -1)
        right = jnp.concatenate(moved, axis=-1).reshape(-1, 3 * features_out)
        return total + jnp.dot(left, right, preferred_element_type=jnp.float32), None

    zero = jnp.zeros((3 * features_in, 3 * features_out), jnp.float32)
    total, _ = jax.lax.scan(add_image, zero, (x, grad))
    taps = total.reshape(3, features_in, 3, features_out).transpose(2, 0, 1, 3)
    return taps.astype(x.dtype)


def conv(
    features: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    use_bias: bool = False,
    dtype: jnp.dtype = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """Square convolution, padded by dilation * (kernel - 1) / 2 on every side."""
    pad = dilation * (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=dilation,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.he_normal(),
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


def batch_norm(
    train: bool, dtype: jnp.dtype, axis_name: str | None, name: str | None = None
) -> nn.BatchNorm:
    """BatchNorm with PyTorch's constants; parameters and statistics are float32.

    Under `jax.pmap`, `axis_name` makes the statistics those of the global batch;
    under `jit` over a mesh they are global by construction.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        axis_name=axis_name,
        name=name,
    )


class ConvNorm(nn.Module):
    """Convolution without bias -> BatchNorm -> ReLU, as submodules `conv`, `bn`."""

    features: int
    kernel: int = 3
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        x = conv(self.features, self.kernel, dtype=self.dtype, name='conv')(x)
        return nn.relu(batch_norm(train, self.dtype, self.axis_name, 'bn')(x))


class Dropout2d(nn.Module):
    """Drop whole channels of whole examples (`torch.nn.Dropout2d`).

    Each example of the global batch has its own key, so the mask does not depend
    on how many devices share the batch, nor on jit or pmap.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        if not train or self.rate == 0.0:
            return x
        key, keep = self.make_rng('dropout'), 1.0 - self.rate
        index = global_indices(x.shape[0], self.axis_name)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        mask = jax.vmap(lambda k: jax.random.bernoulli(k, keep, x.shape[-1:]))(keys)
        return x * (mask[:, None, None, :] / keep).astype(x.dtype)


def global_indices(batch: int, axis_name: str | None) -> jax.Array:
    """Place of each local example in the global batch, (batch,) int32."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * batch
    return first + jnp.arange(batch)
