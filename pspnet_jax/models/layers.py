"""Building blocks shared by every model.

Adaptive average pooling and bilinear resizing are linear, so with static shapes each is a product
with constant matrices: exact, differentiable, exportable, and the same on every platform. A program
that is exported for any size computes the same matrices as it runs.
"""

import functools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pspnet_jax.models.convolution import conv_general_dilated, is_static, product

HE_NORMAL = nn.initializers.he_normal()


def adaptive_pool_matrix(size: int, bins: int) -> np.ndarray | jax.Array:
    """(bins, size) matrix of adaptive average pooling; PyTorch's bin edges.

    Bin i averages cells floor(i*size/bins) .. ceil((i+1)*size/bins)-1.
    """
    xp = np if is_static([size]) else jnp
    i, cells, size = xp.arange(bins)[:, None], xp.arange(size)[None], xp.asarray(size)
    start, stop = i * size // bins, -(-(i + 1) * size // bins)
    inside = (cells >= start) & (cells < stop)
    return xp.where(inside, 1.0 / (stop - start), 0.0).astype(np.float32)


def resize_matrix(size: int, out: int, *, align_corners: bool = True) -> np.ndarray | jax.Array:
    """(out, size) matrix of bilinear interpolation along one axis.

    `align_corners` maps the first cell to the first and the last to the last (the paper and
    PyTorch's `align_corners=True`); otherwise cells are half-pixel centred with clamped ends
    (PyTorch's False, TensorFlow 2).
    """
    if not is_static([size, out]):
        return _resize_matrix_of_symbols(size, out, align_corners)
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


def _resize_matrix_of_symbols(size: Any, out: Any, align_corners: bool) -> jax.Array:
    """`resize_matrix` in 32 bits, exact since positions are fractions of whole numbers."""
    i, cells = jnp.arange(out)[:, None], jnp.arange(size)[None]
    size, out = jnp.asarray(size), jnp.asarray(out)
    if align_corners:
        over, under = i * (size - 1), jnp.maximum(out - 1, 1)
    else:
        over, under = (2 * i + 1) * size - out, 2 * out
        over = jnp.clip(over, 0, (size - 1) * under)
    low = jnp.minimum(over // under, jnp.maximum(size - 2, 0))
    weight = (over - low * under) / under
    high = jnp.minimum(low + 1, size - 1)
    return jnp.where(cells == low, 1.0 - weight, 0.0) + jnp.where(cells == high, weight, 0.0)


def adaptive_pools(x: jax.Array, bins: Sequence[int]) -> list[jax.Array]:
    """B h w C -> B n n C for each n of `bins`, `torch.nn.AdaptiveAvgPool2d(n)`.

    One product with all the bins' averages reads x once, in memory order.
    """
    B, h, w, C = x.shape
    xp = np if is_static([h, w]) else jnp
    averages = xp.concatenate(
        [xp.kron(adaptive_pool_matrix(h, n), adaptive_pool_matrix(w, n)) for n in bins]
    )
    averages = jnp.broadcast_to(averages.astype(x.dtype), (B, *averages.shape))
    pooled = jnp.einsum('bnp,bpc->bnc', averages, x.reshape(B, h * w, C), precision='highest')
    ends = np.cumsum([n * n for n in bins])
    return [
        part.reshape(B, n, n, C)
        for n, part in zip(bins, jnp.split(pooled, ends[:-1], axis=1), strict=True)
    ]


def resize(x: jax.Array, size: Sequence[int], *, align_corners: bool = True) -> jax.Array:
    """B h w C -> B H W C, bilinear. For images and logits, never for labels."""
    _, h, w, _ = x.shape
    if (h, w) == tuple(size):
        return x
    rows, columns = (
        jnp.asarray(resize_matrix(n, out, align_corners=align_corners), x.dtype)
        for n, out in zip((h, w), size, strict=True)
    )
    x = jnp.einsum('Hh,bhwc->bHwc', rows, x, precision='highest')
    return jnp.einsum('Ww,bHwc->bHWc', columns, x, precision='highest')


def scaled(size: int, scale: float) -> int:
    """round(size * scale), also for a symbol: to the nearest, halves to even."""
    if is_static([size]):
        return round(size * scale)
    over, under = Fraction(scale).limit_denominator(1000).as_integer_ratio()
    return (2 * over * size + under - 1 + over * size // under % 2) // (2 * under)


def resize_nearest(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """B h w C -> B H W C; cell i takes floor(i h / H), PyTorch's `mode='nearest'`."""
    _, h, w, _ = x.shape
    xp = np if is_static([h, w, *size]) else jnp
    rows, columns = xp.arange(size[0]) * h // size[0], xp.arange(size[1]) * w // size[1]
    return x[:, rows][:, :, columns]


def conv(
    features: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    use_bias: bool = False,
    same_padding: bool = False,
    kernel_init: Callable = HE_NORMAL,
    dtype: jnp.dtype = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """Square convolution, padded by dilation * (kernel - 1) / 2 on every side.

    With `same_padding` it is padded as in TensorFlow: with a stride, less above and to the left.
    """
    pad = dilation * (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding='SAME' if same_padding else ((pad, pad), (pad, pad)),
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


class BatchNorm(nn.Module):
    """BatchNorm over all but the last axis; parameters and statistics are float32.

    Under `jax.pmap`, `axis_name` makes the statistics those of the global batch; under `jit` over a
    mesh they are always global. The variables are those of `nn.BatchNorm`; it differs in its
    gradient (below) and in always using two passes.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        shape, ones, zeros = x.shape[-1:], nn.initializers.ones, nn.initializers.zeros
        mean = self.variable('batch_stats', 'mean', jnp.zeros, shape)
        var = self.variable('batch_stats', 'var', jnp.ones, shape)
        scale, bias = self.param('scale', ones, shape), self.param('bias', zeros, shape)
        if not train:
            factor = scale * jax.lax.rsqrt(var.value + self.epsilon)
            x = (x - _wide(mean.value, x)) * _wide(factor, x) + _wide(bias, x)
            return x.astype(self.dtype)
        axis_name = None if self.is_initializing() else self.axis_name
        x, batch_mean, batch_var = normalize(x, scale, bias, self.epsilon, axis_name)
        if not self.is_initializing():
            count = x.size // x.shape[-1] * _devices(axis_name)
            batch_var *= count / max(count - 1, 1)  # unbiased, as in PyTorch
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * batch_var
        return x.astype(self.dtype)


def _wide(vector_C: jax.Array, x: jax.Array) -> jax.Array:
    """The vector with leading axes of length 1, to the rank of x."""
    return vector_C.reshape((1,) * (x.ndim - 1) + (-1,))


def _devices(axis_name: str | None) -> int:
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def _means(axis_name: str | None, *arrays_BHWC: jax.Array) -> tuple[jax.Array, ...]:
    """The mean of each over all but the last axis, and over the devices of `axis_name`."""
    means = tuple(x.mean(axis=tuple(range(x.ndim - 1))) for x in arrays_BHWC)
    return means if axis_name is None else jax.lax.pmean(means, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(x, scale, bias, epsilon, axis_name):
    """((x - mean) * rsqrt(var + epsilon) * scale + bias, mean, var), all float32.

    The variance is that of x - mean: E[x**2] - mean**2 loses one or two digits in deep networks. No
    gradient flows through the returned mean and variance.
    """
    return _normalize_forward(x, scale, bias, epsilon, axis_name)[0]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _normalize_forward(x, scale, bias, epsilon, axis_name):
    wide = x.astype(jnp.float32)
    (mean,) = _means(axis_name, wide)
    (var,) = _means(axis_name, jnp.square(wide - _wide(mean, x)))
    inverse = jax.lax.rsqrt(var + epsilon)
    y = (wide - _wide(mean, x)) * _wide(inverse * scale, x) + _wide(bias, x)
    return (y, mean, var), (x, mean, inverse, scale)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normalize_backward(epsilon, axis_name, residuals, grads):
    """Ioffe and Szegedy 2015, section 3, with both sums over the batch in one pass."""
    (x, mean, inverse, scale), (grad, _, _) = residuals, grads
    normal = (x.astype(jnp.float32) - _wide(mean, x)) * _wide(inverse, x)
    own = _means(None, grad, grad * normal)
    mean_grad, mean_product = own if axis_name is None else jax.lax.pmean(own, axis_name)
    grad_x = grad - _wide(mean_grad, x) - normal * _wide(mean_product, x)
    grad_x = grad_x * _wide(inverse * scale, x)
    count = x.size // x.shape[-1]
    return grad_x.astype(x.dtype), own[1] * count, own[0] * count


normalize.defvjp(_normalize_forward, _normalize_backward)


def batch_norm(
    train: bool, dtype: jnp.dtype, axis_name: str | None, name: str | None = None
) -> Callable[[jax.Array], jax.Array]:
    """`BatchNorm` with PyTorch's constants, as a function of x only."""
    return functools.partial(BatchNorm(dtype=dtype, axis_name=axis_name, name=name), train=train)


def units(module: nn.Module, train: bool) -> tuple[Callable, Callable]:
    """(`conv`, `batch_norm`) with the module's dtype and axis."""
    norm = functools.partial(batch_norm, train, module.dtype, module.axis_name)
    return functools.partial(conv, dtype=module.dtype), norm


class PyramidConv(nn.Module):
    """Square convolution of maps B h_i w_i C_i, as if all were resized to the first's size and
    concatenated.

    The kernel is that of the concatenation. Resizing and convolving are both linear, so a small map
    is multiplied by its part of the kernel before it is resized, one product per tap: exact, and
    very cheap if the map has few cells.
    """

    features: int
    kernel: int = 3
    align_corners: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> jax.Array:
        k, channels = self.kernel, [x.shape[-1] for x in maps]
        kernel = self.param('kernel', HE_NORMAL, (k, k, sum(channels), self.features))
        first, *parts = jax.lax.split(kernel.astype(self.dtype), channels, axis=2)
        x, pad = maps[0].astype(self.dtype), ((k // 2, k // 2),) * 2
        total = conv_general_dilated(
            x, first, (1, 1), pad, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        for small, part in zip(maps[1:], parts, strict=True):
            total = total + self._resized(small.astype(self.dtype), part, x.shape[1:3])
        return total

    def _resized(self, small, kernel, size):
        """B i j C -> B h w O: the convolution of `small` resized to `size`."""

        def taps(cells, out):  # (out, taps, cells): the resized map as each tap sees it
            pad, xp = self.kernel // 2, np if is_static([cells, out]) else jnp
            matrix = xp.pad(
                resize_matrix(cells, out, align_corners=self.align_corners), ((pad, pad), (0, 0))
            )
            return xp.stack([matrix[t : t + out] for t in range(self.kernel)], axis=1)

        rows, columns = taps(small.shape[1], size[0]), taps(small.shape[2], size[1])
        products = jnp.einsum('bijc,yxco->bijyxo', small, kernel)
        x = jnp.einsum('hyi,bijyxo->bhjxo', rows.astype(small.dtype), products, precision='highest')
        return jnp.einsum('wxj,bhjxo->bhwo', columns.astype(small.dtype), x, precision='highest')


class ConvNorm(nn.Module):
    """Convolution without bias -> BatchNorm -> ReLU, as submodules `conv`, `bn`.

    It takes one map, or a tuple of maps for `PyramidConv`.
    """

    features: int
    kernel: int = 3
    dilation: int = 1
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array | tuple[jax.Array, ...], train: bool):
        conv, norm = units(self, train)
        if isinstance(x, tuple):
            x = PyramidConv(self.features, self.kernel, dtype=self.dtype, name='conv')(x)
        else:
            x = conv(self.features, self.kernel, dilation=self.dilation, name='conv')(x)
        return nn.relu(norm('bn')(x))


class SeparableConvNorm(nn.Module):
    """Depthwise 3x3 -> 1x1 -> BatchNorm -> ReLU; `norm_between` adds BatchNorm and ReLU between."""

    features: int
    dilation: int = 1
    norm_between: bool = True
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        (conv, norm), C = units(self, train), x.shape[-1]
        x = conv(C, dilation=self.dilation, groups=C, name='depthwise')(x)
        if self.norm_between:
            x = nn.relu(norm('depthwise_bn')(x))
        x = conv(self.features, 1, name='pointwise')(x)
        return nn.relu(norm('bn')(x))


class Dropout(nn.Module):
    """`torch.nn.Dropout`, or `torch.nn.Dropout2d` with `whole_channels`.

    Each example of the global batch has its own key, so the mask does not depend on the number of
    devices, nor on jit or pmap.
    """

    rate: float
    whole_channels: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        if not train or self.rate == 0.0:
            return x
        key, keep = self.make_rng('dropout'), 1.0 - self.rate
        shape = (1, 1, x.shape[-1]) if self.whole_channels else x.shape[1:]
        index = global_indices(x.shape[0], self.axis_name)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        mask = jax.vmap(lambda k: jax.random.bernoulli(k, keep, shape))(keys)
        return x * (mask / keep).astype(x.dtype)


def score(x: jax.Array, num_classes: int, kernel: int = 1, **options) -> jax.Array:
    """Convolution with bias to K classes, in float32 for any dtype of x."""
    return conv(num_classes, kernel, use_bias=True, **options)(x.astype(jnp.float32))


class Head(nn.Module):
    """3x3 ConvNorm -> dropout -> 1x1 to K classes; logits are float32.

    semseg drops whole channels in both heads; torchvision's FCN drops single values.
    """

    features: int
    num_classes: int
    dropout: float
    whole_channels: bool = True
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        shared = {'dtype': self.dtype, 'axis_name': self.axis_name}
        x = ConvNorm(self.features, 3, **shared, name='project')(x, train)
        x = Dropout(self.dropout, self.whole_channels, self.axis_name)(x, train)
        return score(x, self.num_classes, name='classifier')


def global_indices(batch: int, axis_name: str | None) -> jax.Array:
    """Place of each local example in the global batch, (batch,) int32."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * batch
    return first + jnp.arange(batch)


def pad_to_multiple(x: jax.Array, multiple: int) -> jax.Array:
    """Pad B H W C with zeros below and to the right, to the next multiple of both sizes."""
    # Written so that with symbolic sizes, halvings are known to be exact.
    rows, columns = ((n + multiple - 1) // multiple * multiple - n for n in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, rows), (0, columns), (0, 0)))


def bilinear_kernel(key, shape, dtype=jnp.float32):
    """(2s, 2s, C, C) that interpolates each channel by s (Long 2015, section 3.3)."""
    size, _, features_in, features_out = shape
    ramp = 1.0 - np.abs(np.arange(size) + 0.5 - size / 2) / (size / 2)
    return jnp.asarray(
        np.outer(ramp, ramp)[:, :, None, None] * np.eye(features_in, features_out), dtype
    )


def bilinear_upsample(features: int, stride: int, name: str | None = None) -> nn.ConvTranspose:
    """Learned transposed convolution that enlarges by `stride` and starts bilinear.

    `torch.nn.ConvTranspose2d(features, features, 2 * stride, stride, stride // 2, bias=False)`.
    """
    size = 2 * stride
    pad = size - 1 - stride // 2
    return nn.ConvTranspose(
        features,
        (size, size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        kernel_init=bilinear_kernel,
        name=name,
    )


class DoubleSize(nn.Module):
    """B h w C -> B 2h 2w features: `nn.ConvTranspose` with 2x2 windows at stride 2.

    The windows do not overlap, so it is one product and a reordering.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        B, h, w, C = x.shape
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (2, 2, C, self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        # JAX's transposed convolutions correlate: the window's last tap is above and left.
        taps = kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(C, 4 * self.features)
        x = product(x.reshape(-1, C).astype(self.dtype), taps.astype(self.dtype))
        x = x.reshape(B, h, w, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(B, 2 * h, 2 * w, self.features)
        return x + _wide(bias.astype(self.dtype), x)


def max_unpool(x: jax.Array, before: jax.Array) -> jax.Array:
    """B h w C -> B 2h 2w C: put each value where its window of `before` has its maximum.

    `torch.nn.MaxUnpool2d(2)` with the indices of `MaxPool2d(2)` on `before`, B 2h 2w C; among equal
    values the first counts. Without gather or scatter, it can be compiled and exported anywhere.
    """
    B, h, w, C = x.shape
    windows = jnp.moveaxis(before.reshape(B, h, 2, w, 2, C), 3, 2).reshape(B, h, w, 4, C)
    largest = jnp.argmax(windows, axis=3)  # B h w C
    placed = x[:, :, :, None] * jax.nn.one_hot(largest, 4, axis=3, dtype=x.dtype)
    placed = jnp.moveaxis(placed.reshape(B, h, w, 2, 2, C), 2, 3)
    return placed.reshape(B, 2 * h, 2 * w, C)
