"""Pooling, resizing and convolutions against independent statements of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.models import layers
from pspnet_jax.runtime.compilation import jit


@pytest.mark.parametrize(('size', 'bins'), [(6, 3), (17, 6), (32, 6), (5, 6), (1, 3)])
def test_adaptive_pool_averages_pytorchs_bins(rng, size, bins):
    x = rng.standard_normal((2, size, size + 3, 4)).astype(np.float32)
    pooled = np.asarray(layers.adaptive_pools(jnp.asarray(x), (2, bins))[1])
    for i in range(bins):
        for j in range(bins):
            rows = slice(int(np.floor(i * size / bins)), int(np.ceil((i + 1) * size / bins)))
            wide = size + 3
            columns = slice(int(np.floor(j * wide / bins)), int(np.ceil((j + 1) * wide / bins)))
            np.testing.assert_allclose(
                pooled[:, i, j], x[:, rows, columns].mean((1, 2)), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize(('size', 'bins'), [(17, 1), (17, 6), (60, 6), (7, 3)])
def test_adaptive_pool_equals_pytorch(rng, size, bins):
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    x = rng.standard_normal((2, 3, size, size)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x), bins).numpy()
    ours = layers.adaptive_pools(jnp.asarray(x.transpose(0, 2, 3, 1)), (bins, 1))[0]
    np.testing.assert_allclose(np.asarray(ours).transpose(0, 3, 1, 2), expected, atol=1e-6)


@pytest.mark.parametrize('align_corners', [True, False])
@pytest.mark.parametrize('sizes', [((3, 5), (17, 33)), ((1, 1), (4, 7)), ((9, 8), (4, 4))])
def test_resize_equals_pytorch(rng, sizes, align_corners):
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    (h, w), out = sizes
    x = rng.standard_normal((2, 3, h, w)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x), size=out, mode='bilinear', align_corners=align_corners
    ).numpy()
    ours = layers.resize(jnp.asarray(x.transpose(0, 2, 3, 1)), out, align_corners=align_corners)
    np.testing.assert_allclose(np.asarray(ours).transpose(0, 3, 1, 2), expected, atol=1e-5)


def test_resize_with_aligned_corners_keeps_a_plane(rng):
    rows, columns = np.mgrid[0:1:5j, 0:1:4j]
    plane = (2 * rows - 3 * columns + 1)[None, :, :, None]
    rows, columns = np.mgrid[0:1:33j, 0:1:50j]
    resized = layers.resize(jnp.asarray(plane, jnp.float32), (33, 50))
    np.testing.assert_allclose(resized[0, :, :, 0], 2 * rows - 3 * columns + 1, atol=1e-5)


@pytest.mark.parametrize(
    ('kernel', 'stride', 'dilation'), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 1, 2), (3, 2, 1)]
)
def test_conv_and_its_gradients_equal_the_plain_convolution(rng, kernel, stride, dilation):
    x = jnp.asarray(rng.standard_normal((2, 9, 7, 5)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((kernel, kernel, 5, 4)), jnp.float32)
    pad = ((dilation * (kernel - 1) // 2,) * 2,) * 2
    options = {'rhs_dilation': (dilation,) * 2, 'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}

    def scalar(convolve):
        return lambda x, k: jnp.sin(convolve(x, k, (stride, stride), pad, **options)).sum()

    ours = jax.value_and_grad(scalar(layers.conv_general_dilated), (0, 1))(x, k)
    plain = jax.value_and_grad(scalar(jax.lax.conv_general_dilated), (0, 1))(x, k)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kernel', [1, 3])
def test_a_padding_by_name_is_passed_on(rng, kernel):
    """As TensorFlow pads a strided convolution: less above and to the left."""
    x = jnp.asarray(rng.standard_normal((2, 8, 7, 5)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((kernel, kernel, 5, 4)), jnp.float32)
    options = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
    ours = layers.conv_general_dilated(x, k, (2, 2), 'SAME', **options)
    plain = jax.lax.conv_general_dilated(x, k, (2, 2), 'SAME', **options)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_batch_norm_keeps_pytorchs_statistics(rng):
    """Its running variance is the unbiased one; what the batch is divided by is not."""
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    theirs = torch.nn.BatchNorm2d(4, momentum=0.1)
    ours = layers.BatchNorm()
    values = ours.init(jax.random.key(0), jnp.zeros((1, 2, 3, 4)), True)
    for _ in range(3):
        x = rng.normal(2, 3, (2, 3, 2, 4)).astype(np.float32)  # 12 values a channel: 9 % apart
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy()
        y, updates = ours.apply(values, x, True, mutable=['batch_stats'])
        values = {**values, **updates}
        np.testing.assert_allclose(y, expected.transpose(0, 2, 3, 1), atol=1e-5)
        stats = values['batch_stats']
        np.testing.assert_allclose(stats['mean'], theirs.running_mean.numpy(), rtol=1e-5)
        np.testing.assert_allclose(stats['var'], theirs.running_var.numpy(), rtol=1e-5)


def test_batch_norm_over_an_axis_keeps_the_statistics_of_the_whole_batch(rng):
    x = jnp.asarray(rng.normal(2, 3, (4, 3, 2, 5)), jnp.float32)
    whole, parted = layers.BatchNorm(), layers.BatchNorm(axis_name='data')
    values = whole.init(jax.random.key(0), x, True)
    _, expected = whole.apply(values, x, True, mutable=['batch_stats'])

    def part(x):
        return parted.apply(values, x, True, mutable=['batch_stats'])[1]

    found = jax.vmap(part, axis_name='data')(x.reshape(2, 2, 3, 2, 5))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, np.stack([b, b]), rtol=1e-5)


def test_dropout_drops_whole_channels_and_keeps_the_mean():
    x = jnp.ones((64, 3, 3, 32))
    y = layers.Dropout(0.25, True).apply({}, x, True, rngs={'dropout': jax.random.key(0)})
    y = np.asarray(y)
    assert (y == y[:, :1, :1]).all()  # a channel of an example is kept or dropped whole
    assert set(np.unique(y).round(4)) == {0.0, np.float32(4 / 3).round(4)}
    assert abs(y.mean() - 1) < 0.05
    assert (np.asarray(layers.Dropout(0.25, True).apply({}, x, False)) == 1).all()


def test_dropout_of_single_values():
    x = jnp.ones((4, 16, 16, 8))
    y = np.asarray(layers.Dropout(0.5).apply({}, x, True, rngs={'dropout': jax.random.key(0)}))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert abs(y.mean() - 1) < 0.05
    assert not (y == y[:, :1, :1]).all()


@pytest.mark.parametrize('sizes', [((3, 5), (6, 10)), ((3, 4), (5, 9)), ((7, 8), (3, 4))])
def test_resize_nearest_equals_pytorch(rng, sizes):
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    (h, w), out = sizes
    x = rng.standard_normal((2, 3, h, w)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(x), size=out, mode='nearest')
    ours = layers.resize_nearest(jnp.asarray(x.transpose(0, 2, 3, 1)), out)
    np.testing.assert_array_equal(np.asarray(ours).transpose(0, 3, 1, 2), expected.numpy())


def test_max_unpool_equals_pytorch(rng):
    """With ties too: PyTorch and we take a window's first maximum."""
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    before = rng.integers(0, 4, (2, 3, 8, 6)).astype(np.float32)
    pooled, indices = torch.nn.functional.max_pool2d(
        torch.from_numpy(before), 2, return_indices=True
    )
    values = torch.from_numpy(rng.standard_normal(pooled.shape).astype(np.float32))
    expected = torch.nn.functional.max_unpool2d(values, indices, 2).numpy()
    ours = jit(layers.max_unpool)(
        values.numpy().transpose(0, 2, 3, 1), before.transpose(0, 2, 3, 1)
    )
    np.testing.assert_array_equal(np.asarray(ours).transpose(0, 3, 1, 2), expected)


@pytest.mark.parametrize('stride', [2, 4, 8])
def test_bilinear_upsampling_equals_pytorchs_transposed_convolution(rng, stride):
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    x = rng.standard_normal((2, 5, 6, 3)).astype(np.float32)
    module = layers.bilinear_upsample(3, stride)
    values = module.init(jax.random.key(0), x)
    kernel = np.asarray(values['params']['kernel'])
    random = rng.standard_normal(kernel.shape).astype(np.float32)  # and as it is once trained
    for k in (kernel, random):
        # PyTorch has (in, out, rows, columns), and turned round against a correlation.
        weight = torch.from_numpy(k[::-1, ::-1].transpose(2, 3, 0, 1).copy())
        expected = torch.nn.functional.conv_transpose2d(
            torch.from_numpy(x.transpose(0, 3, 1, 2)), weight, stride=stride, padding=stride // 2
        ).numpy()
        ours = module.apply({'params': {'kernel': k}}, x)
        assert ours.shape == (2, 5 * stride, 6 * stride, 3)
        np.testing.assert_allclose(np.asarray(ours).transpose(0, 3, 1, 2), expected, atol=1e-4)


def test_bilinear_upsampling_starts_as_interpolation(rng):
    """Away from the border, where zeros come in, it is the half-pixel resize."""
    x = jnp.asarray(rng.standard_normal((1, 6, 7, 2)), jnp.float32)
    module = layers.bilinear_upsample(2, 4)
    ours = module.apply(module.init(jax.random.key(0), x), x)
    resized = layers.resize(x, (24, 28), align_corners=False)
    np.testing.assert_allclose(ours[:, 4:-4, 4:-4], resized[:, 4:-4, 4:-4], atol=1e-5)


def test_a_separable_convolution_is_a_depthwise_and_a_pointwise_one(rng):
    x = jnp.asarray(rng.standard_normal((2, 9, 8, 4)), jnp.float32)
    module = layers.SeparableConvNorm(5, dilation=2, norm_between=False)
    values = jax.tree.map(jnp.asarray, module.init(jax.random.key(0), x, False))
    depthwise = np.asarray(values['params']['depthwise']['kernel'])  # 3 3 1 4
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    expected = np.zeros(x.shape)
    for i in range(3):
        for j in range(3):
            window = padded[:, 2 * i : 2 * i + 9, 2 * j : 2 * j + 8]
            expected += window * depthwise[i, j, 0]
    pointwise = np.asarray(values['params']['pointwise']['kernel'])[0, 0]
    expected = np.maximum(expected @ pointwise / np.sqrt(1 + 1e-5), 0)
    np.testing.assert_allclose(module.apply(values, x, False), expected, rtol=1e-4, atol=1e-5)
