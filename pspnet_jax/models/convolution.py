"""Convolutions and max pooling in forms that XLA's CPU and GPU backends run fast.

A 1x1 is a matrix product, except with a stride on an accelerator. Accelerators otherwise use XLA's
own convolutions (cuDNN's, the TPU's), except for two gradients on NVIDIA GPUs, of dilated 3x3s and
of max pooling. On a CPU, a 3x3 at stride 1 between wide maps is Winograd's F(2x2, 3x3) (Lavin and
Gray 2016, arXiv 1509.09308): 16 products instead of 36, with 1/2 as the only coefficient, so it
rounds like the plain form. With few channels, neighbouring outputs share one window. A 3x3 of a map
that was doubled in size (`conv3x3_of_doubled`) is computed on the map as it was. A depthwise
convolution is one shifted multiply-add per tap, and max pooling has a gradient without a scatter.
experiments/README.md lists the gain of each.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

# Output tile = AT [(G kernel GT) * (BT input B)] A, for a 4x4 input and a 2x2 output tile.
BT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
AT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
WINOGRAD_CHANNELS = 256  # in and out; with fewer, moving the tiles costs more than it saves
CONVOLVED = 'convolved'
THIN = 16  # channels; vectors of the CPU hold as many numbers


def is_static(sizes: Iterable[Any]) -> bool:
    """Whether all sizes are numbers; in an exported program some may be symbols (`jax.export`)."""
    return all(isinstance(size, int | np.integer) for size in sizes)


def conv_general_dilated(x, kernel, strides, padding, **kwargs):
    """`lax.conv_general_dilated` for images B H W C and kernels h w I O, in the forms above.

    The output has the name CONVOLVED, by which `jax.checkpoint` can keep it. With symbolic sizes
    (an exported program, which must suit every platform) it is XLA's own convolution.
    """
    if not is_static(x.shape):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)
    dilation = tuple(kwargs.get('rhs_dilation') or (1, 1))
    groups, same = kwargs.get('feature_group_count', 1), tuple((d, d) for d in dilation)
    dense, strides = groups == 1, tuple(strides)
    padding = padding if isinstance(padding, str) else tuple(padding)
    if dense and kernel.shape[:2] == (1, 1) and padding == ((0, 0), (0, 0)):
        out = conv1x1(x, kernel, strides, **kwargs)
    elif dense and kernel.shape[:2] == (3, 3) and strides == (1, 1) and padding == same:
        out = conv3x3(x, kernel, dilation)
    elif not dense and groups == x.shape[-1] == kernel.shape[-1]:
        if isinstance(padding, str):
            extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[:2], strict=True)]
            padding = tuple(jax.lax.padtype_to_pads(x.shape[1:3], extent, strides, padding))
        out = depthwise(x, kernel, Window(strides, padding, dilation))
    else:
        out = jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)
    return checkpoint_name(out, CONVOLVED)


def conv1x1(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], **kwargs) -> jax.Array:
    """B H W I and 1 1 I O -> B h w O, as a product of the pixels that the stride selects."""

    def as_product(x, kernel):
        x = x[:, :: strides[0], :: strides[1], :]
        return product(x.reshape(-1, x.shape[-1]), kernel[0, 0]).reshape(*x.shape[:3], -1)

    if strides == (1, 1):
        return as_product(x, kernel)

    def by_xla(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, 'VALID', **kwargs)

    # XLA for GPUs (jax 0.11.2) aborts when it fuses a strided slice into a product.
    return jax.lax.platform_dependent(x, kernel, cpu=as_product, default=by_xla)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """N I times I O."""
    return dot(x, kernel, (1, 0))


def _product_backward(residuals, grad):
    x, kernel = residuals
    if x.dtype != jnp.bfloat16 and x.shape[1] > grad.shape[1]:
        grad_kernel = dot(grad, x, (0, 0)).T  # less to transpose
    else:
        grad_kernel = dot(x, grad, (0, 0))
    return dot(grad, kernel, (1, 1)), grad_kernel


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_backward)


def dot(x: jax.Array, y: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """The product of two matrices over an axis of each, in their dtype."""
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    plain = functools.partial(jax.lax.dot_general, dimension_numbers=axes)
    if x.dtype != jnp.bfloat16:
        return plain(x, y)

    def on_cpu(x, y):
        return cpu_dot(x, y, contracted).astype(x.dtype)

    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=plain)


def cpu_dot(x: jax.Array, y: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """`dot` of float32 or bfloat16 with a float32 result, over the axes (1, 0), (1, 1) or (0, 0).

    The CPU's instructions for bfloat16 have no other result. XLA (jax 0.10 to 0.12) uses them only
    over the last axis of x; over the first one it stops the program with an error. So the narrower
    matrix is transposed, and then the result if that is y.
    """
    if contracted[0] == 0 and x.dtype == jnp.bfloat16:
        if x.shape[1] > y.shape[1]:
            return transposed(cpu_dot(y, x, (0, 0)))
        x, contracted = transposed(x), (1, contracted[1])
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def transposed(x: jax.Array) -> jax.Array:
    """x.T in two halves, because XLA undoes a plain one beside a product.

    bfloat16 is transposed as integers, since XLA for CPUs would convert it to float32 and back.
    """
    if len(x) == 1:
        return x.reshape(-1, 1)
    half = len(x) // 2
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x
    bits = jnp.concatenate([bits[:half].T, bits[half:].T], axis=1)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


class Window(NamedTuple):
    """How a convolution's window moves, rows first."""

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]


def plain(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """B H W C and i j I O -> B h w O, in C / I groups: XLA's convolution."""
    groups, layout = x.shape[-1] // kernel.shape[2], ('NHWC', 'HWIO', 'NHWC')
    options = {'dimension_numbers': layout, 'feature_group_count': groups}
    strides, padding, dilation = window
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilation, **options
    )


def plain_3x3(x: jax.Array, kernel: jax.Array, dilation: tuple[int, int]) -> jax.Array:
    """B H W I and 3 3 I O -> B H W O, padded by the dilation."""
    return plain(x, kernel, Window((1, 1), tuple((d, d) for d in dilation), dilation))


@functools.partial(jax.jit, static_argnums=2)
def _conv3x3(x, kernel, dilation):
    default = functools.partial(plain_3x3, dilation=dilation)
    on_cpu = functools.partial(cpu_form(x.shape, kernel.shape, dilation), dilation=dilation)
    if on_cpu.func is plain_3x3:
        return default(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=default)


conv3x3 = jax.custom_vjp(_conv3x3, nondiff_argnums=(2,))


@functools.partial(jax.jit, static_argnums=0)
def _conv3x3_backward(dilation, residuals, grad):
    x, kernel = residuals

    def by_xla(x, kernel, grad):
        linear = jax.linear_transpose(lambda x: plain_3x3(x, kernel, dilation), x)(grad)
        return *linear, *jax.linear_transpose(lambda k: plain_3x3(x, k, dilation), kernel)(grad)

    def on_cuda(x, kernel, grad):
        return by_xla(x, kernel, grad)[0], weight_gradient_by_phases(x, grad, dilation)

    def on_cpu(x, kernel, grad):
        form = cpu_form(x.shape, kernel.shape, dilation)
        if form is winograd_3x3:
            grad_x = winograd_3x3(grad, kernel, dilation, transpose=True)
            return grad_x, winograd_weight_gradient(x, grad, dilation)
        if form is tapped_3x3:
            return jax.vjp(lambda *args: tapped_3x3(*args, dilation), x, kernel)[1](grad)
        grad_x, grad_kernel = by_xla(x, kernel, grad)
        if form is thin_3x3:
            grad_x = thin_3x3(grad, kernel[::-1, ::-1].swapaxes(2, 3), dilation)
        return grad_x, grad_kernel

    return jax.lax.platform_dependent(x, kernel, grad, cpu=on_cpu, cuda=on_cuda, default=by_xla)


conv3x3.defvjp(
    lambda x, kernel, dilation: (_conv3x3(x, kernel, dilation), (x, kernel)), _conv3x3_backward
)


def cpu_form(shape: tuple[int, ...], kernel_shape: tuple[int, ...], dilation: tuple[int, int]):
    """`winograd_3x3`, `tapped_3x3`, `thin_3x3` or `plain_3x3`.

    Between wide maps it is the form with the fewest multiplications. Few cells per phase leave
    Winograd's tiles half empty; a dilation near the map's size leaves most taps outside. Winograd's
    cost includes a quarter more for moving its tiles.
    """
    if max(kernel_shape[2:]) <= THIN and dilation == (1, 1):
        return thin_3x3
    if min(kernel_shape[2:]) < WINOGRAD_CHANNELS:
        return plain_3x3
    tiles, inside = 1, 1.0
    for size, step in zip(shape[1:3], dilation, strict=True):
        cells = -(-size // step)  # per phase
        tiles *= step * -(-cells // 2)
        inside *= size + 2 * max(size - step, 0)
    costs = {
        tapped_3x3: inside,
        winograd_3x3: 1.25 * 16 * tiles,
        plain_3x3: 9 * shape[1] * shape[2],
    }
    return min(costs, key=costs.get)


@functools.partial(jax.jit, static_argnames='dilation')
def thin_3x3(x: jax.Array, kernel: jax.Array, dilation: tuple[int, int]) -> jax.Array:
    """`plain_3x3` with 2 to 4 neighbouring outputs of a row from one window, as channels.

    The wider kernel holds the 3x3 once for each of them, shifted: up to twice the multiplications,
    but vectors are full, and each input is read less often. `dilation` is (1, 1).
    """
    (B, H, W, _), features = x.shape, kernel.shape[3]
    count = max(2, min(4, 2 * THIN // features))
    shifted = [jnp.pad(kernel, ((0, 0), (n, count - 1 - n), (0, 0), (0, 0))) for n in range(count)]
    window = Window((1, count), (dilation, (1, 1 + -W % count)), dilation)
    out = plain(x, jnp.concatenate(shifted, axis=3), window)
    return out.reshape(B, H, -1, features)[:, :, :W]


@functools.partial(jax.jit, static_argnames='dilation')
def tapped_3x3(x: jax.Array, kernel: jax.Array, dilation: tuple[int, int]) -> jax.Array:
    """`plain_3x3` as one product per tap, over the cells that the tap sees within the map."""
    (_, H, W, C), total = x.shape, 0.0

    def overlap(size, offset):  # the outputs to which a tap contributes, and its inputs
        first, last = max(0, -offset), min(size, size - offset)
        return (first, size - last), slice(first + offset, last + offset)

    for i, j in np.ndindex(3, 3):
        rows, seen_rows = overlap(H, (i - 1) * dilation[0])
        columns, seen_columns = overlap(W, (j - 1) * dilation[1])
        if sum(rows) < H and sum(columns) < W:
            seen = x[:, seen_rows, seen_columns]
            out = product(seen.reshape(-1, C), kernel[i, j]).reshape(*seen.shape[:3], -1)
            total = total + jnp.pad(out, ((0, 0), rows, columns, (0, 0)))
    return total


def combine(matrix: np.ndarray, arrays: list[jax.Array]) -> list[jax.Array]:
    """matrix @ arrays, with each entry written out as a sum over arrays."""

    def row(coefficients):
        terms = [x if c == 1 else c * x for c, x in zip(coefficients, arrays, strict=True) if c]
        return functools.reduce(jnp.add, terms)

    return [row(coefficients) for coefficients in matrix.tolist()]


def on_both_axes(matrix: np.ndarray, grid: list[list[jax.Array]]) -> list[list[jax.Array]]:
    """matrix @ grid @ matrix.T, for a grid of arrays."""
    rows = [combine(matrix, list(column)) for column in zip(*grid, strict=True)]
    return [combine(matrix, list(row)) for row in zip(*rows, strict=True)]


def tiles(x: jax.Array, size: int, count: tuple[int, int]) -> list[list[jax.Array]]:
    """Cell (i, j) of the size x size tiles that start at every second row and column."""
    rows, columns = count
    return [
        [
            x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2].reshape(-1, x.shape[-1])
            for j in range(size)
        ]
        for i in range(size)
    ]


def to_phases(x: jax.Array, dilation: tuple[int, int]) -> jax.Array:
    """B H W C -> (B dy dx) H/dy W/dx C: in each phase, a dilated kernel sees dense cells.

    B stays outermost, so that a batch that is split over devices is not gathered.
    """
    if dilation == (1, 1):
        return x
    (dy, dx), (B, H, W, C) = dilation, x.shape
    x = jnp.pad(x, ((0, 0), (0, -H % dy), (0, -W % dx), (0, 0)))
    x = x.reshape(B, -(-H // dy), dy, -(-W // dx), dx, C)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(B * dy * dx, -(-H // dy), -(-W // dx), C)


def from_phases(x: jax.Array, dilation: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """Undo `to_phases`, and crop to `shape`, B H W C."""
    (dy, dx), (B, H, W, C) = dilation, shape
    h, w = x.shape[1:3]
    if dilation != (1, 1):
        x = x.reshape(B, dy, dx, h, w, C).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(B, h * dy, w * dx, C)[:, :H, :W]


def _input_tiles(x, dilation):
    """B H W C -> 4 x 4 of (tiles, C), transformed, and the (images, rows, columns) of tiles."""
    x = to_phases(x.astype(jnp.float32), dilation)
    B, H, W, _ = x.shape
    h, w = -(-H // 2), -(-W // 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * h + 1 - H), (1, 2 * w + 1 - W), (0, 0)))
    # Without the barrier, the computation of x and its padding would be repeated 16 times.
    x = jax.lax.optimization_barrier(x)
    return on_both_axes(BT, tiles(x, 4, (h, w))), (B, h, w)


def _multiplied(x):
    """The dtype of the factors of Winograd's products."""
    return jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32


@functools.partial(jax.jit, static_argnames=('dilation', 'transpose'))
def winograd_3x3(
    x: jax.Array, kernel: jax.Array, dilation: tuple[int, int], transpose: bool = False
) -> jax.Array:
    """`plain_3x3` by Winograd's F(2x2, 3x3), in float32; bfloat16 is rounded before the products.

    With `transpose` it maps B H W O to B H W I: the gradient of the input, which is the convolution
    with the rotated kernel. That only exchanges the first and last row and column of the
    transformed kernel, so no kernel is copied into another order.
    """
    inputs, (B, h, w) = _input_tiles(x, dilation)
    dtype, kernel = _multiplied(x), kernel.astype(jnp.float32)
    kernels = on_both_axes(G, [[kernel[i, j] for j in range(3)] for i in range(3)])
    contracted = (1, 0)
    if transpose:
        order, contracted = (3, 1, 2, 0), (1, 1)
        kernels = [[kernels[i][j] for j in order] for i in order]
    products = [
        [
            cpu_dot(v.astype(dtype), u.astype(dtype), contracted).reshape(B, h, w, -1)
            for v, u in zip(*pair, strict=True)
        ]
        for pair in zip(inputs, kernels, strict=True)
    ]
    out = on_both_axes(AT, products)  # 2 x 2 of B h w O
    out = jnp.stack([jnp.stack(row, axis=3) for row in out], axis=2)  # B h 2 w 2 O
    out = out.reshape(B, 2 * h, 2 * w, -1)
    features = kernel.shape[2 if transpose else 3]
    return from_phases(out, dilation, (*x.shape[:3], features)).astype(x.dtype)


@functools.partial(jax.jit, static_argnames='dilation')
def winograd_weight_gradient(x: jax.Array, grad: jax.Array, dilation: tuple[int, int]) -> jax.Array:
    """3 3 I O from x: B H W I and the gradient B H W O: the transpose of `winograd_3x3`."""
    inputs, (_, h, w) = _input_tiles(x, dilation)
    grad = to_phases(grad.astype(jnp.float32), dilation)
    grad = jnp.pad(grad, ((0, 0), (0, 2 * h - grad.shape[1]), (0, 2 * w - grad.shape[2]), (0, 0)))
    grads = on_both_axes(AT.T, tiles(jax.lax.optimization_barrier(grad), 2, (h, w)))
    dtype = _multiplied(x)
    products = [
        [cpu_dot(v.astype(dtype), g.astype(dtype), (0, 0)) for v, g in zip(*pair, strict=True)]
        for pair in zip(inputs, grads, strict=True)
    ]
    taps = on_both_axes(G.T, products)
    return jnp.stack([jnp.stack(row) for row in taps]).astype(x.dtype)


def weight_gradient_by_phases(
    x: jax.Array, grad: jax.Array, dilation: tuple[int, int]
) -> jax.Array:
    """3 3 I O from x: B H W I and the gradient B H W O of `plain_3x3`, by XLA's convolution on the
    phases of the dilation, which are dense.

    XLA passes only undilated weight gradients to cuDNN. Otherwise it convolves with a window of the
    gradient's size, which took 14 of the 53 ms of PSPNet-50's step on an H200.
    """
    x_phases, grad_phases = to_phases(x, dilation), to_phases(grad, dilation)
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[3], grad.shape[3]), x.dtype)
    dense = jax.linear_transpose(lambda k: plain_3x3(x_phases, k, (1, 1)), kernel)
    return dense(grad_phases)[0]


@jax.custom_vjp
def conv3x3_of_doubled(x: jax.Array, skip: jax.Array | None, kernel: jax.Array) -> jax.Array:
    """B h w I, B 2h 2w S and 3 3 I+S O -> B 2h 2w O: a 3x3 of the first map with each cell repeated
    2 x 2 times and the second, concatenated. Without `skip` (None) it is of the first alone.

    On a CPU the first map is not repeated: an output of a given parity sees 2 x 2 of its cells, by
    the sums of the taps that fall on each. That is 4 multiplications instead of 9.
    """
    forms = {'cpu': _of_doubled_by_parities, 'default': _of_doubled_by_repeating}
    return jax.lax.platform_dependent(x, skip, kernel, **forms)


def _conv3x3_of_doubled_backward(residuals, grad):
    def gradient_of(form):
        return lambda grad, *residuals: jax.vjp(form, *residuals)[1](grad)

    by_parities, by_repeating = map(
        gradient_of, (_of_doubled_by_parities, _of_doubled_by_repeating)
    )
    return jax.lax.platform_dependent(grad, *residuals, cpu=by_parities, default=by_repeating)


conv3x3_of_doubled.defvjp(
    lambda *inputs: (conv3x3_of_doubled(*inputs), inputs), _conv3x3_of_doubled_backward
)


@jax.jit
def _of_doubled_by_repeating(x, skip, kernel):
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    x = x if skip is None else jnp.concatenate([x, skip], axis=3)
    return conv3x3(x, kernel, (1, 1))


@jax.jit
def _of_doubled_by_parities(x, skip, kernel):
    out = doubled_3x3(x, kernel[:, :, : x.shape[3]])
    return out if skip is None else out + conv3x3(skip, kernel[:, :, x.shape[3] :], (1, 1))


@jax.jit
def doubled_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """B h w I and 3 3 I O -> B 2h 2w O: `plain_3x3` of x with each cell repeated 2 x 2 times.

    Between thin maps, both parities of the columns are channels of one convolution.
    """
    (B, h, w, _), features = x.shape, kernel.shape[3]
    before, after = (1, 0), (0, 1)

    def of_parities(kernel, axis):  # the two cells that even outputs see, and odd ones
        first, middle, last = jnp.split(kernel, 3, axis)
        even = jnp.concatenate([first, middle + last], axis)
        return (before, even), (after, jnp.concatenate([first + middle, last], axis))

    def at(kernel, *padding):
        return plain(x, kernel, Window((1, 1), padding, (1, 1)))

    def row(kernel, padding):
        columns = of_parities(kernel, 1)
        if features > THIN:
            return jnp.stack([at(part, padding, around) for around, part in columns], axis=3)
        wide = [jnp.pad(part, ((0, 0), around[::-1], (0, 0), (0, 0))) for around, part in columns]
        return at(jnp.concatenate(wide, axis=3), padding, (1, 1))

    out = [
        row(part, around).reshape(B, h, 2 * w, features) for around, part in of_parities(kernel, 0)
    ]
    return jnp.stack(out, axis=2).reshape(B, 2 * h, 2 * w, features)


@functools.partial(jax.jit, static_argnums=2)
def _depthwise(x, kernel, window):
    on_cpu, default = (functools.partial(f, window=window) for f in (shifted_depthwise, plain))
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=default)


depthwise = jax.custom_vjp(_depthwise, nondiff_argnums=(2,))


@functools.partial(jax.jit, static_argnums=0)
def _depthwise_backward(window, residuals, grad):
    def by_xla(x, kernel, grad):
        return jax.vjp(functools.partial(plain, window=window), x, kernel)[1](grad)

    def on_cpu(x, kernel, grad):
        return (
            depthwise_input_gradient(grad, kernel, window, x.shape),
            depthwise_weight_gradient(x, grad, window, kernel.shape),
        )

    return jax.lax.platform_dependent(*residuals, grad, cpu=on_cpu, default=by_xla)


depthwise.defvjp(
    lambda x, kernel, window: (_depthwise(x, kernel, window), (x, kernel)), _depthwise_backward
)


def pad_map(x: jax.Array, rows: tuple[int, int], columns: tuple[int, int]) -> jax.Array:
    """Pad B H W C with zeros; a negative number crops rows or columns."""
    around = ((0, 0), rows, columns, (0, 0))
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(*pair, 0) for pair in around])


def seen_by_taps(
    x: jax.Array, kernel_shape: tuple[int, ...], window: Window
) -> dict[tuple[int, int], jax.Array]:
    """{tap (i, j): the cells of x that it sees, B h w C}."""
    (dy, dx), (sy, sx) = window.dilation, window.strides
    # Without the barrier, the computation of x and its padding would be repeated for every tap.
    x = jax.lax.optimization_barrier(pad_map(x, *window.padding))
    h = (x.shape[1] - dy * (kernel_shape[0] - 1) - 1) // sy + 1
    w = (x.shape[2] - dx * (kernel_shape[1] - 1) - 1) // sx + 1
    return {
        (i, j): x[:, i * dy :: sy, j * dx :: sx][:, :h, :w]
        for i, j in np.ndindex(*kernel_shape[:2])
    }


@functools.partial(jax.jit, static_argnames='window')
def shifted_depthwise(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """`plain` by shifted multiply-adds, one for each tap; summed in float32."""
    seen, kernel = seen_by_taps(x, kernel.shape, window), kernel.astype(jnp.float32)
    terms = [cells * kernel[i : i + 1, j : j + 1] for (i, j), cells in seen.items()]
    return functools.reduce(jnp.add, terms).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=('window', 'kernel_shape'))
def depthwise_weight_gradient(
    x: jax.Array, grad: jax.Array, window: Window, kernel_shape: tuple[int, ...]
) -> jax.Array:
    """i j 1 C from x: B H W C and the gradient B h w C of `plain`.

    All taps are summed in one pass along each row, then over rows, then over images: shorter sums
    round less. The stack keeps XLA from merging the last two sums.
    """
    seen = seen_by_taps(x, kernel_shape, window).values()
    products = [cells * grad.astype(jnp.float32) for cells in seen]
    zeros = [jnp.zeros((), jnp.float32)] * len(products)
    rows = jax.lax.reduce(products, zeros, _add_each, (2,))
    total = jnp.stack([row.sum(1) for row in rows]).sum(1)
    return total.reshape(kernel_shape).astype(x.dtype)


def _add_each(left, right):
    return [a + b for a, b in zip(left, right, strict=True)]


@functools.partial(jax.jit, static_argnames=('window', 'shape'))
def depthwise_input_gradient(
    grad: jax.Array, kernel: jax.Array, window: Window, shape: tuple[int, ...]
) -> jax.Array:
    """`shape`, B H W C, from the gradient B h w C of `plain`.

    A stride splits the padded input into phases, such as even and odd rows. Tap i sees only phase
    i * dilation % stride, so each phase is a stride-1 sum.
    """
    (sy, sx), (rows, columns), (dy, dx) = window
    B, H, W, C = shape
    h, w = -(-(H + sum(rows)) // sy), -(-(W + sum(columns)) // sx)  # of a phase
    down, right = dy * (kernel.shape[0] - 1) // sy, dx * (kernel.shape[1] - 1) // sx
    grad = pad_map(grad, (down, h - grad.shape[1]), (right, w - grad.shape[2]))
    grad, kernel = jax.lax.optimization_barrier(grad), kernel.astype(jnp.float32)

    def phase(p, q):
        total = jnp.zeros((B, h, w, C), jnp.float32)
        for i, j in np.ndindex(*kernel.shape[:2]):
            (row, of_row), (column, of_column) = divmod(i * dy, sy), divmod(j * dx, sx)
            if (of_row, of_column) == (p, q):
                cells = grad[:, down - row :, right - column :][:, :h, :w]
                total = total + cells * kernel[i : i + 1, j : j + 1]
        return total.astype(grad.dtype)

    out = jnp.stack([jnp.stack([phase(p, q) for q in range(sx)], axis=3) for p in range(sy)], 2)
    out = out.reshape(B, h * sy, w * sx, C)
    (top, _), (left, _) = rows, columns
    return pad_map(out, (-top, H + top - h * sy), (-left, W + left - w * sx))


def _max_pool(x, window, pad):
    return nn.max_pool(x, (window, window), (2, 2), ((pad, pad), (pad, pad)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def max_pool(x: jax.Array, window: int, pad: int) -> jax.Array:
    """B H W C -> B h w C at stride 2; among equal values the first one gets the gradient."""
    return _max_pool(x, window, pad)


def _max_pool_forward(x, window, pad):
    return _max_pool(x, window, pad), x


def _max_pool_backward(window, pad, x, grad):
    def by_xla(x, grad):
        return jax.vjp(lambda x: _max_pool(x, window, pad), x)[1](grad)[0]

    by_cells = functools.partial(max_pool_gradient, window=window, pad=pad)

    def on_cpu(x, grad):
        wide = x.astype(jnp.float32), grad.astype(jnp.float32)  # bfloat16 is compared one by one
        # Both branches give the same. Without them XLA would fuse the gradient with what comes
        # next, and compute it again for each cell.
        return jax.lax.cond(jnp.isnan(wide[1][0, 0, 0, 0]), by_xla, by_cells, *wide).astype(x.dtype)

    return (jax.lax.platform_dependent(x, grad, cpu=on_cpu, cuda=by_cells, default=by_xla),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@functools.partial(jax.jit, static_argnames=('window', 'pad'))
def max_pool_gradient(x: jax.Array, grad: jax.Array, *, window: int, pad: int) -> jax.Array:
    """The gradient of x, B H W C, from that of `max_pool`, for windows of 2 and 3 cells.

    XLA searches every window and scatters. Here each window stores which of its cells is the first
    maximum; each cell of the four parities then checks the windows that contain it.

    The position of the maximum is found among the cells instead of by its value: XLA may compute x
    in two kernels with different rounding, and then no cell would equal the maximum.
    """
    (B, H, W, C), (h, w) = x.shape, grad.shape[1:3]
    far = ((pad, 2 * h + 2 - H - pad), (pad, 2 * w + 2 - W - pad))
    padded = jnp.pad(x, ((0, 0), *far, (0, 0)), constant_values=-jnp.inf)
    cells = [(i, j) for i in range(window) for j in range(window)]
    largest, place = padded[:, : 2 * h : 2, : 2 * w : 2], jnp.zeros(grad.shape, jnp.int8)
    for number, (i, j) in enumerate(cells[1:], start=1):
        cell = padded[:, i : i + 2 * h : 2, j : j + 2 * w : 2]
        place = jnp.where(cell > largest, jnp.int8(number), place)
        largest = jnp.maximum(cell, largest)
    place, grad = jax.lax.optimization_barrier((place, grad))

    def parity(p, q):
        total = 0.0
        for number, (i, j) in enumerate(cells):
            if (i % 2, j % 2) == (p, q):  # cell (i, j) of window (r, c) is at (r + i//2, c + j//2)
                chosen = jnp.where(place == number, grad, 0)
                before = ((0, 0), (i // 2, 1 - i // 2), (j // 2, 1 - j // 2), (0, 0))
                total = total + jnp.pad(chosen, before)
        return total  # B h+1 w+1 C

    out = jnp.stack([jnp.stack([parity(p, q) for q in (0, 1)], axis=3) for p in (0, 1)], axis=2)
    out = out.reshape(B, 2 * h + 2, 2 * w + 2, C)
    return out[:, pad : pad + H, pad : pad + W]
