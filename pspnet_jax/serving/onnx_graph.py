"""Converts a traced inference function to an ONNX graph, for the primitives of our networks.

Every equation of the jaxpr whose inputs are known is computed here, so that kernels are stored in
ONNX's order and BatchNorm is a product and a sum; every other equation becomes the ONNX operator in
RULES. Images stay B H W C, with transpositions around operators that need B C H W; onnxruntime
merges these. The batch is a symbol, all other sizes are numbers.

jax2onnx, which does this for any function, can't be installed together with the Orbax we need.
"""

import dataclasses
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from pspnet_jax.runtime.errors import ExportError

OPSET = 18
END = 2**63 - 1  # of an axis of any size
IR_VERSION = 9  # of 2023, so that older runtimes can read it
NEED = 'ONNX needs onnx and onnxruntime: pip install "onnx>=1.23,<1.24" "onnxruntime>=1.30,<1.31"'

Value = np.ndarray | str  # a known array, or the name of a value in the graph


@dataclasses.dataclass
class Graph:
    """The graph under construction: nodes, and known arrays by name."""

    batch: Any  # the batch's symbol
    nodes: list = dataclasses.field(default_factory=list)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    size_of_batch: str = ''

    def name(self, value: Value) -> str:
        """The value's name; an array without one gets one."""
        if isinstance(value, str):
            return value
        name = f'array{len(self.arrays)}'
        self.arrays[name] = np.ascontiguousarray(value).reshape(np.shape(value))
        return name

    def add(self, operator: str, *inputs: Value, **attributes) -> str:
        """Add a node; return the name of its output."""
        from onnx import helper

        out = f'value{len(self.nodes)}'
        names = [self.name(value) for value in inputs]
        self.nodes.append(helper.make_node(operator, names, [out], **attributes))
        return out

    def shape(self, sizes: Sequence[Any]) -> Value:
        """Sizes, numbers or multiples of the batch, as int64."""
        if all(isinstance(size, int) for size in sizes):
            return np.array(sizes, np.int64)
        return self.add('Concat', *map(self._size, sizes), axis=0)

    def _size(self, size: Any) -> Value:
        if isinstance(size, int):
            return np.array([size], np.int64)
        return self.add('Mul', self.size_of_batch, np.array([self.times(size)], np.int64))

    def times(self, size: Any) -> int:
        """A size divided by the batch. Raises ExportError if it is not a multiple."""
        times = size // self.batch
        if not isinstance(times, int) or times * self.batch != size:
            raise ExportError(
                f'a size of {size} is no multiple of the batch: ONNX has no form here'
            )
        return times


def convert(
    function: Callable[[jax.Array], jax.Array],
    image: jax.ShapeDtypeStruct,
    *,
    input_name: str,
    output_name: str,
    metadata: dict[str, str],
):
    """`onnx.ModelProto` of function(image) -> array; image's first size is a symbol.

    Raises ExportError for a primitive that has no rule, and without the onnx package.
    """
    try:
        import onnx
        from onnx import helper, numpy_helper
    except ImportError as error:
        raise ExportError(NEED) from error

    traced = jax.make_jaxpr(function)(image)
    graph = Graph(image.shape[0])
    shape = graph.add('Shape', input_name)
    graph.size_of_batch = graph.add('Slice', shape, *(np.array([i], np.int64) for i in (0, 1)))
    (out,) = _evaluate(graph, traced.jaxpr, traced.consts, [input_name])
    graph.nodes.append(helper.make_node('Identity', [graph.name(out)], [output_name]))

    def described(name, aval):
        sizes = ['batch' if not isinstance(n, int) else n for n in aval.shape]
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype))
        return helper.make_tensor_value_info(name, kind, sizes)

    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            'pspnet_jax',
            [described(input_name, traced.in_avals[0])],
            [described(output_name, traced.out_avals[0])],
            [numpy_helper.from_array(array, name) for name, array in graph.arrays.items()],
        ),
        opset_imports=[helper.make_opsetid('', OPSET)],
        producer_name='pspnet_jax',
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return model


INSIDE = {  # {primitive that holds a jaxpr: the parameter with it}
    'jit': 'jaxpr',
    'pjit': 'jaxpr',
    'closed_call': 'call_jaxpr',
    'custom_jvp_call': 'call_jaxpr',
    'custom_vjp_call': 'call_jaxpr',
}


def _evaluate(graph: Graph, jaxpr, consts, inputs: Sequence[Value]) -> list[Value]:
    values = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    values |= zip(jaxpr.invars, inputs, strict=True)

    def read(atom) -> Value:
        return np.asarray(atom.val, atom.aval.dtype) if is_literal(atom) else values[atom]

    def is_literal(atom) -> bool:
        return isinstance(atom, core.Literal)

    for equation in jaxpr.eqns:
        name, arguments = equation.primitive.name, [read(atom) for atom in equation.invars]
        if name in INSIDE:
            inner = equation.params[INSIDE[name]]
            outputs = _evaluate(graph, inner.jaxpr, inner.consts, arguments)
        elif _is_known(equation, arguments):
            outputs = equation.primitive.bind(*map(jnp.asarray, arguments), **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
            outputs = [np.asarray(output) for output in outputs]
        elif name in RULES:
            outputs = RULES[name](graph, equation, *arguments)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        else:
            raise ExportError(f'{name} has no rule for ONNX: use --format=stablehlo')
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _is_known(equation, arguments) -> bool:
    """Whether an equation can be computed now: its inputs are arrays, its sizes numbers."""
    sizes = [size for out in equation.outvars for size in out.aval.shape]
    return (
        equation.primitive.name != 'dim_as_value'
        and all(isinstance(value, np.ndarray) for value in arguments)
        and all(isinstance(size, int) for size in sizes)
    )


# ---- one rule per primitive: (graph, equation, inputs) -> the output -------------------------


def _node(operator: str) -> Callable[..., str]:
    return lambda graph, equation, *inputs: graph.add(operator, *inputs)


def _same(graph: Graph, equation, x: Value) -> Value:
    return x


def _transposed(graph: Graph, x: Value, order: Sequence[int]) -> Value:
    if isinstance(x, np.ndarray):
        return x.transpose(order)
    return graph.add('Transpose', x, perm=list(order))


def _transpose(graph, equation, x):
    return _transposed(graph, x, equation.params['permutation'])


def _convolution(graph, equation, x, kernel):
    """In B C H W; a dilated input becomes ONNX's ConvTranspose with the rotated kernel."""
    params = equation.params
    order = params['dimension_numbers']
    (below, left), (above, right) = zip(*params['padding'], strict=True)
    x = _transposed(graph, x, order.lhs_spec)
    kernel = _transposed(graph, kernel, order.rhs_spec)
    options = {
        'dilations': list(params['rhs_dilation']),
        'group': params['feature_group_count'],
    }
    if params['batch_group_count'] != 1:
        raise ExportError('a convolution with groups of the batch has no form in ONNX')
    if tuple(params['lhs_dilation']) == (1, 1):
        pads = [below, left, above, right]
        options['strides'] = list(params['window_strides'])
        out = graph.add('Conv', x, kernel, pads=pads, **options)
    else:
        plain = tuple(params['window_strides']) == (1, 1) and options['group'] == 1
        if not plain or isinstance(kernel, str):
            raise ExportError('this transposed convolution has no form in ONNX')
        reach = [d * (n - 1) for d, n in zip(options['dilations'], kernel.shape[2:], strict=True)]
        pads = [reach[0] - below, reach[1] - left, reach[0] - above, reach[1] - right]
        options['strides'] = list(params['lhs_dilation'])
        turned = kernel.swapaxes(0, 1)[..., ::-1, ::-1]
        out = graph.add('ConvTranspose', x, turned, pads=pads, **options)
    return _transposed(graph, out, np.argsort(order.out_spec).tolist())


def _max_pool(graph, equation, x):
    params = equation.params
    window, strides = params['window_dimensions'], params['window_strides']
    dilated = set(params['base_dilation']) | set(params['window_dilation']) != {1}
    if len(window) != 4 or window[0] != 1 or window[3] != 1 or dilated:
        raise ExportError(f'pooling by {window} has no form in ONNX')
    (below, above), (left, right) = params['padding'][1:3]
    out = graph.add(
        'MaxPool',
        _transposed(graph, x, (0, 3, 1, 2)),
        kernel_shape=list(window[1:3]),
        strides=list(strides[1:3]),
        pads=[below, left, above, right],
    )
    return _transposed(graph, out, (0, 2, 3, 1))


def _product(graph, equation, x, y):
    """MatMul if possible, else Einsum: batch axes, then those of x, then those of y."""
    (x_sum, y_sum), (x_batch, y_batch) = equation.params['dimension_numbers']
    x_rank, y_rank = (len(atom.aval.shape) for atom in equation.invars)
    if (x_rank, y_rank, *x_sum, *y_sum) == (2, 2, 1, 0):
        return graph.add('MatMul', x, y)
    letters = iter(string.ascii_lowercase)
    x_names, y_names = [next(letters) for _ in range(x_rank)], [''] * y_rank
    for i, j in zip((*x_sum, *x_batch), (*y_sum, *y_batch), strict=True):
        y_names[j] = x_names[i]
    y_names = [name or next(letters) for name in y_names]
    out = [x_names[i] for i in x_batch]
    out += [name for i, name in enumerate(x_names) if i not in (*x_sum, *x_batch)]
    out += [name for i, name in enumerate(y_names) if i not in (*y_sum, *y_batch)]
    form = f'{"".join(x_names)},{"".join(y_names)}->{"".join(out)}'
    return graph.add('Einsum', x, y, equation=form)


def _broadcast(graph, equation, x, *_):
    """Reshape to the right rank, then expand new sizes."""
    shape, axes = equation.params['shape'], equation.params['broadcast_dimensions']
    from_shape = equation.invars[0].aval.shape
    sizes, expanded = [1] * len(shape), list(shape)
    for size, axis in zip(from_shape, axes, strict=True):
        if size == shape[axis]:
            sizes[axis], expanded[axis] = size, 1
    if len(from_shape) != len(shape):
        x = _reshaped(graph, x, sizes)
    if all(isinstance(size, int) and size == 1 for size in expanded):
        return x
    return graph.add('Expand', x, graph.shape(expanded))


def _reshaped(graph: Graph, x: Value, sizes: Sequence[Any]) -> Value:
    """A reshape with -1 for the size that contains the batch."""
    sizes = [size if isinstance(size, int) else -1 for size in sizes]
    if isinstance(x, np.ndarray):
        return x.reshape(sizes)
    return graph.add('Reshape', x, np.array(sizes, np.int64))


def _reshape(graph, equation, x, *_):
    return _reshaped(graph, x, equation.outvars[0].aval.shape)


def _cast(graph, equation, x):
    from onnx import helper

    return graph.add(
        'Cast', x, to=helper.np_dtype_to_tensor_dtype(np.dtype(equation.params['new_dtype']))
    )


def _slice(graph, equation, x):
    """Whole axes are left out. Positions that depend on the batch are counted from the end."""
    params, shape = equation.params, equation.invars[0].aval.shape
    strides = params['strides'] or (1,) * len(shape)

    def place(at: Any, size: Any) -> int:
        if isinstance(at, int):
            return at
        return at - size or END

    rows = [
        (axis, place(start, size), place(stop, size), stride)
        for axis, (size, start, stop, stride) in enumerate(
            zip(shape, params['start_indices'], params['limit_indices'], strides, strict=True)
        )
        if (start, stop, stride) != (0, size, 1)
    ]
    return _sliced(graph, x, rows)


def _sliced(graph: Graph, x: Value, rows: Sequence[tuple[int, ...]]) -> Value:
    """A Slice by (axis, start, stop, stride) per axis."""
    if not rows:
        return x
    axes, starts, stops, strides = (
        np.array(column, np.int64) for column in zip(*rows, strict=True)
    )
    return graph.add('Slice', x, starts, stops, axes, strides)


def _split(graph, equation, x):
    params, first, parts = equation.params, 0, []
    axes = np.array([params['axis']], np.int64)
    for size in params['sizes']:
        ends = (np.array([end], np.int64) for end in (first, first + size))
        parts.append(graph.add('Slice', x, *ends, axes))
        first += size
    return parts


def _unstack(graph, equation, x):
    axis = equation.params['axis']
    places = range(len(equation.outvars))  # an index without a shape removes its axis
    return [graph.add('Gather', x, np.array(n, np.int64), axis=axis) for n in places]


def _pad(graph, equation, x, value):
    below, above, between = zip(*equation.params['padding_config'], strict=True)
    if any(between) or min(*below, *above) < 0:
        raise ExportError('padding between cells, or of less than none, has no form in ONNX')
    return graph.add('Pad', x, np.array([*below, *above], np.int64), value)


def _concatenate(graph, equation, *parts):
    return graph.add('Concat', *parts, axis=equation.params['dimension'])


def _stack(graph, equation, *parts):
    axis = np.array([equation.params['axis']], np.int64)
    parts = [graph.add('Unsqueeze', part, axis) for part in parts]
    return graph.add('Concat', *parts, axis=int(axis[0]))


def _reduce(operator: str) -> Callable[..., str]:
    def rule(graph, equation, x):
        return graph.add(operator, x, np.array(equation.params['axes'], np.int64), keepdims=0)

    return rule


def _argmax(graph, equation, x):
    (axis,) = equation.params['axes']
    out = graph.add('ArgMax', x, axis=axis, keepdims=0)
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(equation.params['index_dtype']))
    return graph.add('Cast', out, to=kind)


def _running_sum(graph, equation, x):
    axis, backwards = np.array(equation.params['axis'], np.int64), int(equation.params['reverse'])
    return graph.add('CumSum', x, axis, reverse=backwards)


def _select(graph, equation, which, *cases):
    if len(cases) != 2 or equation.invars[0].aval.dtype != bool:
        raise ExportError('a choice of more than two has no form in ONNX')
    return graph.add('Where', which, cases[1], cases[0])


def _clamp(graph, equation, low, x, high):
    return graph.add('Min', graph.add('Max', x, low), high)


def _rsqrt(graph, equation, x):
    return graph.add('Reciprocal', graph.add('Sqrt', x))


def _square(graph, equation, x):
    return graph.add('Mul', x, x)


def _integer_power(graph, equation, x):
    return graph.add('Pow', x, np.array(equation.params['y'], equation.invars[0].aval.dtype))


def _different(graph, equation, x, y):
    return graph.add('Not', graph.add('Equal', x, y))


def _gather(graph, equation, x, index):
    """Rows of one axis by known indices, as in x[:, rows]; or x[:, :H] by known numbers."""
    params, shape = equation.params, equation.invars[0].aval.shape
    numbers = params['dimension_numbers']
    axes = tuple(numbers.collapsed_slice_dims)
    if isinstance(index, np.ndarray) and index.ndim == 1 and not axes:
        sizes = params['slice_sizes']
        starts = zip(numbers.start_index_map, index.tolist(), strict=True)
        rows = [(axis, start, start + sizes[axis], 1) for axis, start in starts]
        return _sliced(graph, x, rows)
    whole = all(
        taken == (1 if i in axes else size)
        for i, (taken, size) in enumerate(zip(params['slice_sizes'], shape, strict=True))
    )
    rows = isinstance(index, np.ndarray) and index.ndim == 2 and index.shape[1] == 1
    if not rows or not whole or len(axes) != 1 or tuple(numbers.start_index_map) != axes:
        raise ExportError('this gather has no form in ONNX')
    (axis,), out_rank = axes, len(equation.outvars[0].aval.shape)
    if tuple(numbers.offset_dims) != tuple(i for i in range(out_rank) if i != axis):
        raise ExportError('this gather has no form in ONNX')
    return graph.add('Gather', x, index[:, 0].astype(np.int64), axis=axis)


def _scatter_add(graph, equation, x, index, updates):
    """Additions to single cells of a vector, as in a histogram."""
    if [len(atom.aval.shape) for atom in equation.invars] != [1, 2, 1]:
        raise ExportError('this scatter has no form in ONNX')
    index = _reshaped(graph, index, [-1])
    return graph.add('ScatterElements', x, index, updates, axis=0, reduction='add')


def _batch_size(graph, equation):
    (size,) = equation.outvars
    from onnx import helper

    value = graph.add('Squeeze', graph.shape([equation.params['dim']]), np.array([0], np.int64))
    return graph.add('Cast', value, to=helper.np_dtype_to_tensor_dtype(np.dtype(size.aval.dtype)))


RULES: dict[str, Callable[..., Any]] = {
    'add': _node('Add'),
    'sub': _node('Sub'),
    'mul': _node('Mul'),
    'div': _node('Div'),
    'rem': _node('Mod'),
    'max': _node('Max'),
    'min': _node('Min'),
    'neg': _node('Neg'),
    'abs': _node('Abs'),
    'exp': _node('Exp'),
    'sqrt': _node('Sqrt'),
    'floor': _node('Floor'),
    'not': _node('Not'),
    'and': _node('And'),
    'or': _node('Or'),
    'eq': _node('Equal'),
    'lt': _node('Less'),
    'le': _node('LessOrEqual'),
    'gt': _node('Greater'),
    'ge': _node('GreaterOrEqual'),
    'ne': _different,
    'rsqrt': _rsqrt,
    'square': _square,
    'integer_pow': _integer_power,
    'clamp': _clamp,
    'select_n': _select,
    'copy': _same,
    'name': _same,
    'stop_gradient': _same,
    'convert_element_type': _cast,
    'broadcast_in_dim': _broadcast,
    'reshape': _reshape,
    'squeeze': _reshape,
    'expand_dims': _reshape,
    'transpose': _transpose,
    'concatenate': _concatenate,
    'stack': _stack,
    'slice': _slice,
    'split': _split,
    'unstack': _unstack,
    'pad': _pad,
    'reduce_max': _reduce('ReduceMax'),
    'reduce_min': _reduce('ReduceMin'),
    'reduce_sum': _reduce('ReduceSum'),
    'argmax': _argmax,
    'cumsum': _running_sum,
    'gather': _gather,
    'scatter-add': _scatter_add,
    'dim_as_value': _batch_size,
    'conv_general_dilated': _convolution,
    'reduce_window_max': _max_pool,
    'dot_general': _product,
}
