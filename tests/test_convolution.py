"""Each form that is there for speed equals the plain one: values and gradients.

The plain form is XLA's convolution, window reduction or concatenation in float64 where that
matters, and PyTorch's where ties have to fall as its do.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.models import convolution, layers
from pspnet_jax.runtime.compilation import jit
from tests.conftest import slow_but

FORMS = [((9, 7), (1, 1)), ((8, 8), (2, 2)), ((13, 10), (4, 4)), ((7, 5), (3, 2)), ((1, 1), (1, 1))]


def by_loop(x, kernel, dilation):
    """Nine products on a padded array, in float64."""
    (dy, dx), (B, H, W, _) = dilation, x.shape
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    padded = np.pad(x, ((0, 0), (dy, dy), (dx, dx), (0, 0)))
    out = np.zeros((B, H, W, kernel.shape[-1]))
    for i in range(3):
        for j in range(3):
            out += padded[:, i * dy :][:, :H, j * dx :][:, :, :W] @ kernel[i, j]
    return out


@pytest.mark.parametrize(('size', 'dilation'), FORMS)
def test_winograd_is_the_convolution(rng, size, dilation):
    x = rng.standard_normal((2, *size, 5)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 5, 4)).astype(np.float32)
    ours = jit(convolution.winograd_3x3, static_argnums=2)(x, kernel, dilation)
    np.testing.assert_allclose(ours, by_loop(x, kernel, dilation), rtol=1e-5, atol=2e-5)
    back = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    ours = convolution.winograd_3x3(ours, kernel, dilation, transpose=True)
    expected = by_loop(by_loop(x, kernel, dilation), back, dilation)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(('size', 'dilation'), FORMS)
def test_weight_gradients_are_the_convolutions(rng, size, dilation):
    """By Winograd, and by the dilation's phases."""
    x = rng.standard_normal((2, *size, 5)).astype(np.float32)
    grad = rng.standard_normal((2, *size, 4)).astype(np.float32)
    expected = np.zeros((3, 3, 5, 4))
    for index in np.ndindex(3, 3, 5):  # a convolution is linear in its kernel
        kernel = np.zeros((3, 3, 5, 4))
        kernel[index] = 1
        expected[index] = (by_loop(x, kernel, dilation) * grad).sum((0, 1, 2))
    for form in (convolution.winograd_weight_gradient, convolution.weight_gradient_by_phases):
        ours = form(x, grad, dilation)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('channels', [(3, 1), (1, 2), (5, 3), (7, 12), (16, 16)])
@pytest.mark.parametrize('size', [(9, 7), (8, 8), (6, 5), (1, 1)])
def test_a_thin_convolution_is_the_convolution(rng, size, channels):
    """However many outputs share a window, and whatever is left at the end of a row."""
    x = rng.standard_normal((2, *size, channels[0])).astype(np.float32)
    kernel = rng.standard_normal((3, 3, *channels)).astype(np.float32)
    ours = convolution.thin_3x3(x, kernel, (1, 1))
    np.testing.assert_allclose(ours, by_loop(x, kernel, (1, 1)), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('features', [4, convolution.THIN + 1])
@pytest.mark.parametrize('skips', [0, 3])
@pytest.mark.parametrize('size', [(5, 4), (1, 1), (2, 7)])
def test_a_convolution_of_a_doubled_map(rng, size, skips, features):
    """It is that of the map with every cell repeated, beside the other; so are its gradients."""
    x = rng.standard_normal((2, *size, 5)).astype(np.float32)
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)
    skip = rng.standard_normal((*doubled.shape[:3], skips)).astype(np.float32) if skips else None
    kernel = rng.standard_normal((3, 3, 5 + skips, features)).astype(np.float32)
    whole = np.concatenate([doubled, skip], axis=3) if skips else doubled
    ours, back = jax.vjp(convolution.conv3x3_of_doubled, x, skip, kernel)
    np.testing.assert_allclose(ours, by_loop(whole, kernel, (1, 1)), rtol=1e-5, atol=2e-5)

    grad = rng.standard_normal(ours.shape).astype(np.float32)
    of_x, of_skip, of_kernel = back(grad)
    of_whole, expected = jax.vjp(
        lambda x, kernel: convolution.plain_3x3(x, kernel, (1, 1)), whole, kernel
    )[1](grad)
    of_cells = of_whole[..., :5].reshape(2, size[0], 2, size[1], 2, 5).sum((2, 4))
    np.testing.assert_allclose(of_x, of_cells, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of_kernel, expected, rtol=1e-4, atol=1e-4)
    if skips:
        np.testing.assert_allclose(of_skip, of_whole[..., 5:], rtol=1e-4, atol=1e-4)


def test_a_doubled_map_is_concatenated_on_accelerators_alone():
    x, skip, kernel = jnp.zeros((1, 4, 4, 32)), jnp.zeros((1, 8, 8, 8)), jnp.zeros((3, 3, 40, 32))
    for platform, made in (('cpu', False), ('cuda', True), ('tpu', True)):
        lowered = lowered_for(platform, convolution.conv3x3_of_doubled, x, skip, kernel)
        assert ('1x8x8x40x' in lowered) == made, platform


@pytest.mark.parametrize(
    ('size', 'dilation'), [*FORMS, ((9, 7), (4, 6)), ((9, 7), (8, 7)), ((5, 6), (40, 1))]
)
def test_the_taps_are_the_convolution(rng, size, dilation):
    x = rng.standard_normal((2, *size, 5)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 5, 4)).astype(np.float32)
    ours = convolution.tapped_3x3(x, kernel, dilation)
    np.testing.assert_allclose(ours, by_loop(x, kernel, dilation), rtol=1e-5, atol=2e-5)


def test_the_form_is_that_with_least_multiplications():
    def form(size, dilation, *channels):
        kernel = (3, 3, *(channels or (2048, 512)))
        return convolution.cpu_form((4, size, size, kernel[2]), kernel, (dilation, dilation))

    for dilation in (1, 2, 4):  # ResNet at output stride 8
        assert form(32, dilation) is convolution.winograd_3x3
    for dilation in (12, 24, 36):  # DeepLab v3's pyramid: 9 taps are 5, 2.3 and 1 of the map
        assert form(32, dilation) is convolution.tapped_3x3
    assert form(120, 12) is convolution.winograd_3x3
    assert form(32, 1, 128, 512) is convolution.plain_3x3
    assert form(32, 1, 16, 2) is convolution.thin_3x3
    assert form(32, 2, 16, 2) is form(32, 1, 17, 2) is convolution.plain_3x3


@pytest.mark.parametrize('channels', [4, 24])
@pytest.mark.parametrize('dilation', [1, 2, 5, 30])
def test_a_3x3_and_its_gradients_are_the_plain_ones(rng, monkeypatch, channels, dilation):
    """As the models call it, below and above the width from which it is Winograd's or taps'."""
    jax.clear_caches()  # of what was traced with another WINOGRAD_CHANNELS
    monkeypatch.setattr(convolution, 'WINOGRAD_CHANNELS', 20)
    x = jnp.asarray(rng.standard_normal((2, 9, 7, channels)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, channels, channels)), jnp.float32)

    def scalar(form, x, kernel):
        return jnp.sin(form(x, kernel, (dilation, dilation))).sum()

    def both(form):
        return jit(jax.value_and_grad(functools.partial(scalar, form), (0, 1)))

    lowered = both(convolution.conv3x3).lower(x, kernel).as_text()
    assert ('convolution' in lowered) == (channels < 20)
    for a, b in zip(
        jax.tree.leaves(both(convolution.conv3x3)(x, kernel)),
        jax.tree.leaves(both(convolution.plain_3x3)(x, kernel)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def lowered_for(platform, function, *arguments):
    """The StableHLO of `function` and its gradients for a platform that need not be here."""
    numbers = tuple(range(len(arguments)))
    traced = jit(jax.value_and_grad(lambda *xs: function(*xs).sum(), numbers)).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_other_platforms_get_the_plain_convolution():
    x, kernel = jnp.zeros((1, 8, 8, 256)), jnp.zeros((3, 3, 256, 256))

    def dilated(x, kernel):
        return convolution.conv3x3(x, kernel, (2, 2))

    assert lowered_for('cuda', dilated, x, kernel).count('stablehlo.convolution') == 3
    assert lowered_for('tpu', dilated, x, kernel).count('stablehlo.convolution') == 3
    assert 'stablehlo.convolution' not in lowered_for('cpu', dilated, x, kernel)


def test_a_gpu_gets_weight_gradients_that_cudnn_has():
    """The window of a weight gradient is the gradient of the output: with a stride it is not."""
    x, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))

    def dilated(x, kernel):
        return convolution.conv3x3(x, kernel, (2, 2))

    assert 'stride = [2, 2]' in lowered_for('tpu', dilated, x, kernel)
    assert 'stride = [2, 2]' not in lowered_for('cuda', dilated, x, kernel)


def test_a_gpu_gets_no_strided_product():
    """Its compiler aborts where it fuses the slice into the product (jax 0.11.2)."""
    x, kernel = jnp.zeros((1, 9, 9, 4)), jnp.zeros((1, 1, 4, 4))

    def strided(x, kernel):
        names = ('NHWC', 'HWIO', 'NHWC')
        pad = ((0, 0), (0, 0))
        return convolution.conv_general_dilated(x, kernel, (2, 2), pad, dimension_numbers=names)

    assert 'dot_general' in lowered_for('cpu', strided, x, kernel)
    assert 'dot_general' not in lowered_for('cuda', strided, x, kernel)


@pytest.mark.parametrize('strides', [(1, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize('size', [(9, 7), (8, 8)])
def test_a_1x1_and_its_gradients_are_the_plain_ones(rng, size, strides):
    x = jnp.asarray(rng.standard_normal((2, *size, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((1, 1, 5, 4)), jnp.float32)
    names = ('NHWC', 'HWIO', 'NHWC')

    def both(form, padding):
        def scalar(x, kernel):
            return jnp.sin(form(x, kernel, strides, padding, dimension_numbers=names)).sum()

        return jax.value_and_grad(scalar, (0, 1))(x, kernel)

    ours = both(convolution.conv_general_dilated, ((0, 0), (0, 0)))
    plain = both(jax.lax.conv_general_dilated, 'VALID')
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')


def grouped(convolve, strides, padding, dilation, groups=None):
    """`convolve` as Flax calls it; without `groups` each channel is by itself."""

    def form(x, kernel):
        return convolve(
            x,
            kernel,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=DIMENSIONS,
            feature_group_count=groups or x.shape[-1],
        )

    return form


def value_and_gradients(form):
    """The map that comes out, and what its sine's sum gives to x and to the kernel."""

    @jit
    def run(x, kernel):
        out, back = jax.vjp(form, x, kernel)
        return out, *back(jnp.cos(out))

    return run


@pytest.mark.parametrize('kernel', slow_but([3, 5], 3))
@pytest.mark.parametrize('dilation', [1, 2, 4])
@pytest.mark.parametrize('stride', [1, 2, 3])
def test_a_depthwise_convolution_is_the_plain_one(rng, stride, dilation, kernel):
    """With its gradients, of sizes odd and even; padded evenly, unevenly and as Keras pads."""
    half = dilation * (kernel // 2)
    weights = jnp.asarray(rng.standard_normal((kernel, kernel, 1, 3)), jnp.float32)
    for size, padding in (
        ((9, 8), ((half, half), (half, half))),
        ((12, 7), ((half - 1, half), (0, 2 * half))),
        ((8, 9), 'SAME'),  # by a 3x3 at stride 2 (0, 1) and (1, 1)
        ((18, 19), 'VALID'),
    ):
        x = jnp.asarray(rng.standard_normal((2, *size, 3)), jnp.float32)
        how = ((stride, stride), padding, (dilation, dilation))
        ours = value_and_gradients(grouped(convolution.conv_general_dilated, *how))
        theirs = value_and_gradients(grouped(jax.lax.conv_general_dilated, *how))
        assert 'stablehlo.convolution' not in ours.lower(x, weights).as_text()
        for a, b in zip(ours(x, weights), theirs(x, weights), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_depthwise_window_differs_by_axis(rng):
    x = jnp.asarray(rng.standard_normal((2, 9, 14, 3)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((3, 5, 1, 3)), jnp.float32)
    for how in (((1, 2), ((0, 2), (3, 1)), (2, 1)), ((3, 1), ((1, 0), (0, 0)), (1, 3))):
        ours = value_and_gradients(grouped(convolution.conv_general_dilated, *how))
        theirs = value_and_gradients(grouped(jax.lax.conv_general_dilated, *how))
        for a, b in zip(ours(x, weights), theirs(x, weights), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('stride', [1, 2])
def test_a_depthwise_convolution_rounds_no_more_than_the_plain_one(rng, stride, dtype):
    """Against float64; the weight gradient sums thousands of products."""
    x = jnp.asarray(0.5 + rng.standard_normal((8, 33, 32, 4)), dtype)
    weights = jnp.asarray(rng.standard_normal((3, 3, 1, 4)), dtype)
    how = ((stride, stride), ((1, 1), (1, 1)), (1, 1))
    ours = jax.jit(grouped(convolution.conv_general_dilated, *how))
    theirs = jax.jit(grouped(jax.lax.conv_general_dilated, *how))
    grad = jnp.asarray(0.5 + rng.standard_normal(ours(x, weights).shape), dtype)

    exact_x, exact_weights, exact_grad = (np.asarray(a, np.float64) for a in (x, weights, grad))
    padded = np.pad(exact_x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out, padded_grad = np.zeros(grad.shape), np.zeros(padded.shape)
    weight_grad, (h, w) = np.zeros(weights.shape), grad.shape[1:3]
    for i, j in np.ndindex(3, 3):
        cells = (slice(None), *(slice(t, t + stride * n, stride) for t, n in ((i, h), (j, w))))
        out += padded[cells] * exact_weights[i, j]
        padded_grad[cells] += exact_grad * exact_weights[i, j]
        weight_grad[i, j] = (padded[cells] * exact_grad).sum((0, 1, 2))

    def errors(form):
        value, back = jax.vjp(form, x, weights)
        exact = (out, padded_grad[:, 1:-1, 1:-1], weight_grad)
        return [
            np.sqrt(np.mean((np.asarray(a, np.float64) - b) ** 2))
            for a, b in zip((value, *back(grad)), exact, strict=True)
        ]

    # A fused multiply-add rounds once, a product and a sum twice; bfloat16 sums would be far off.
    names = ('out', 'x', 'weights')
    for name, mine, plain in zip(names, errors(ours), errors(theirs), strict=True):
        assert mine <= 1.25 * plain, (name, mine, plain)


def test_which_convolutions_are_shifted():
    """Depthwise ones on a CPU; not on accelerators, not of several inputs or outputs a group."""

    def lowered(inputs, outputs, groups, platform):
        x, kernel = jnp.zeros((1, 8, 8, inputs)), jnp.zeros((3, 3, inputs // groups, outputs))

        how = ((2, 2), 'SAME', (1, 1), groups)
        run = value_and_gradients(grouped(convolution.conv_general_dilated, *how))
        return run.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

    assert lowered(6, 6, 6, 'cpu').count('stablehlo.convolution') == 0
    for case in ((6, 6, 6, 'cuda'), (6, 6, 6, 'tpu'), (6, 12, 6, 'cpu'), (6, 6, 3, 'cpu')):
        assert lowered(*case).count('stablehlo.convolution') == 3, case


def test_an_exported_depthwise_convolution(rng):
    """Of a known size it suits every platform it is exported for; of symbols it is XLA's."""
    how = ((2, 2), 'SAME', (1, 1))
    form = jit(grouped(convolution.conv_general_dilated, *how))
    plain = grouped(jax.lax.conv_general_dilated, *how)
    x = jnp.asarray(rng.standard_normal((2, 9, 8, 3)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((3, 3, 1, 3)), jnp.float32)
    for shape, chosen in ((x.shape, True), (jax.export.symbolic_shape('b, h, w, 3'), False)):
        spec = jax.ShapeDtypeStruct(shape, x.dtype)
        exported = jax.export.export(form, platforms=('cpu', 'cuda', 'tpu'))(spec, weights)
        assert ('@_depthwise' in exported.mlir_module()) == chosen
        again = jax.export.deserialize(exported.serialize())
        np.testing.assert_allclose(again.call(x, weights), plain(x, weights), atol=1e-5)


def test_what_a_depthwise_convolution_gives_can_be_kept():
    """By its name, so that `jax.checkpoint` does not compute it again."""
    form = grouped(convolution.conv_general_dilated, (1, 1), 'SAME', (1, 1))
    keep = jax.checkpoint_policies.save_only_these_names(convolution.CONVOLVED)
    x, weights = jnp.ones((1, 5, 6, 3)), jnp.ones((3, 3, 1, 3))

    def computed(policy):
        loss = jax.checkpoint(lambda x: jnp.sin(form(x, weights)).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(loss))(x)).count('name=_depthwise\n')

    assert (computed(keep), computed(None)) == (1, 2)


@pytest.mark.parametrize('wide', [1, 3, 7, 64])
@pytest.mark.parametrize('rows', [1, 2, 65])
@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_a_product_of_16_bits(rng, rows, wide, transposed, dtype):
    """Each number is the exact one, rounded once, for any shape, and where it is transposed."""
    x = jnp.asarray(rng.standard_normal((rows, 48)), dtype)
    kernel = jnp.asarray(rng.standard_normal((48, wide)), dtype)
    grad = jnp.asarray(rng.standard_normal((rows, wide)), dtype)

    @jit
    def run(x, kernel, grad):
        out, back = jax.vjp(convolution.product, x, kernel)
        outs = (out, *back(grad))
        return [a.T for a in outs] if transposed else outs

    exact_x, exact_kernel, exact_grad = (np.asarray(a, np.float64) for a in (x, kernel, grad))
    exact = (exact_x @ exact_kernel, exact_grad @ exact_kernel.T, exact_x.T @ exact_grad)
    for ours, theirs in zip(run(x, kernel, grad), exact, strict=True):
        assert ours.dtype == dtype
        theirs, rounding = theirs.T if transposed else theirs, float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=rounding, atol=1e-4)


def test_winograds_products_of_float16(rng):
    """They are in float32, as it has no instructions of its own."""
    x = jnp.asarray(rng.standard_normal((1, 6, 6, 16)), jnp.float16)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 16, 4)), jnp.float16)
    ours = convolution.winograd_3x3(x, kernel, (1, 1))
    exact = by_loop(x, kernel, (1, 1))
    np.testing.assert_allclose(ours, exact, rtol=float(jnp.finfo(jnp.float16).eps), atol=1e-4)


@pytest.mark.parametrize('wide', [3, 7])
def test_a_products_gradients(rng, wide):
    x = jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((5, wide)), jnp.float32)
    weight = rng.standard_normal((6, wide)).astype(np.float32)
    grads = jax.grad(lambda x, k: (convolution.product(x, k) * weight).sum(), (0, 1))(x, kernel)
    np.testing.assert_allclose(grads[0], weight @ kernel.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads[1], x.T @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('window', 'pad'), [(2, 0), (3, 1)])
@pytest.mark.parametrize('size', [(8, 8), (7, 9), (6, 11)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_max_pooling_and_its_gradient_equal_pytorchs(rng, window, pad, size, dtype):
    """Of equal values, of which there are many here, the first one has the gradient."""
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    x = rng.integers(0, 4, (2, *size, 3)).astype(np.float32)
    theirs = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_()
    pooled = torch.nn.functional.max_pool2d(theirs, window, 2, pad)
    weight = rng.integers(-8, 8, pooled.shape).astype(np.float32)  # sums are exact
    (pooled * torch.from_numpy(weight)).sum().backward()

    def scalar(x):
        out = convolution.max_pool(x, window, pad)
        return (out * weight.transpose(0, 2, 3, 1)).sum(), out

    (_, ours), grad = jit(jax.value_and_grad(scalar, has_aux=True))(jnp.asarray(x, dtype))
    assert grad.dtype == dtype
    np.testing.assert_array_equal(np.asarray(ours).transpose(0, 3, 1, 2), pooled.detach())
    np.testing.assert_array_equal(np.asarray(grad).transpose(0, 3, 1, 2), theirs.grad.numpy())


@pytest.mark.parametrize('align_corners', [True, False])
@pytest.mark.parametrize('kernel', [1, 3])
def test_a_pyramid_convolution_is_that_of_the_concatenation(rng, kernel, align_corners):
    maps = [
        jnp.asarray(rng.standard_normal((2, *size)), jnp.float32)
        for size in ((7, 9, 4), (1, 1, 2), (2, 2, 3), (6, 6, 2))
    ]
    module = layers.PyramidConv(5, kernel, align_corners=align_corners)
    variables = module.init(jax.random.key(0), maps)

    def concatenated(variables, maps):
        resized = [layers.resize(x, (7, 9), align_corners=align_corners) for x in maps]
        return jax.lax.conv_general_dilated(
            jnp.concatenate(resized, axis=-1),
            variables['params']['kernel'],
            (1, 1),
            ((kernel // 2,) * 2,) * 2,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )

    def both(form):
        return jax.value_and_grad(lambda v, m: jnp.sin(form(v, m)).sum(), (0, 1))(variables, maps)

    np.testing.assert_allclose(
        module.apply(variables, maps), concatenated(variables, maps), rtol=1e-4, atol=1e-5
    )
    for a, b in zip(
        jax.tree.leaves(both(module.apply)), jax.tree.leaves(both(concatenated)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_batch_norm_and_its_gradients_equal_flaxs(rng, dtype):
    import flax.linen as nn

    x = jnp.asarray(3 + 2 * rng.standard_normal((4, 5, 6, 7)), dtype)
    weight = rng.standard_normal(x.shape).astype(np.float32)
    ours = layers.BatchNorm(dtype=dtype)
    flaxs = nn.BatchNorm(momentum=0.9, epsilon=1e-5, use_fast_variance=False, dtype=dtype)
    variables = ours.init(jax.random.key(0), x, False)
    variables = jax.tree.map(
        lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), jnp.float32), variables
    )

    def run(apply, **train):
        def scalar(params, x):
            y, updates = apply({**variables, 'params': params}, x, **train, mutable=['batch_stats'])
            return (y * weight).sum(), (y, updates)

        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(variables['params'], x)

    tolerance = 1e-4 if dtype == jnp.float32 else 2e-2
    for train in (True, False):
        mine = run(ours.apply, train=train)
        theirs = run(flaxs.apply, use_running_average=not train)
        if train:  # Flax keeps the biased variance of the batch's 120 values, we PyTorch's
            kept, new = (v['batch_stats'] for v in (variables, theirs[0][1][1]))
            new['var'] = 0.9 * kept['var'] + (new['var'] - 0.9 * kept['var']) * 120 / 119
        assert mine[0][1][0].dtype == dtype
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1.0)


def test_doubled_size_is_the_transposed_convolution(rng):
    import flax.linen as nn

    x = jnp.asarray(rng.standard_normal((2, 3, 4, 5)), jnp.float32)
    theirs = nn.ConvTranspose(6, (2, 2), (2, 2), 'VALID')
    variables = jax.tree.map(
        lambda v: jnp.asarray(rng.standard_normal(v.shape), jnp.float32),
        theirs.init(jax.random.key(0), x),
    )
    ours = layers.DoubleSize(6).apply(variables, x)
    np.testing.assert_allclose(ours, theirs.apply(variables, x), rtol=1e-5, atol=1e-5)
