"""Translates names and layouts of published weights to ours, strictly both ways.

A file belongs to the table that has a place for each of its arrays. Every array that the network
(or its backbone) needs must then be found exactly once, with its shape, and every array of the file
must be used or known to be unused; any difference is an error that lists both sides.
"""

import collections
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pspnet_jax.models.backbones import BASIC_RESNETS, RESNETS
from pspnet_jax.models.weights.readers import Arrays, read_arrays
from pspnet_jax.models.weights.sources import fetch
from pspnet_jax.models.weights.tables import IMAGENET, NETWORKS, TABLES, Normalization, Table
from pspnet_jax.runtime.errors import PretrainedError

MOST_LISTED = 50  # faults in one error
# {their name of an array: ours}; a 'weight' with one axis is a BatchNorm's scale.
KINDS = {
    'weight': 'kernel', 'kernel': 'kernel', 'depthwise_kernel': 'kernel', 'gamma': 'scale',
    'bias': 'bias', 'beta': 'bias', 'running_mean': 'mean', 'moving_mean': 'mean',
    'running_var': 'var', 'moving_variance': 'var',
}  # fmt: skip
TORCH_KINDS = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
STEMS = ('conv1', 'conv1_1', 'stem')


def module_names(table: Table, names: set[str], *, back: bool = False) -> dict[str, str]:
    """{their module: ours}, or with `back` {ours: theirs}, for the names in the table.

    Raises PretrainedError for a name that matches two rows, and for two names of one module.
    """
    rows = [(b, a) if back else (a, b) for a, b in table.rows]
    plain = {a: b for a, b in rows if '{}' not in a}
    patterns = [
        (re.compile(re.escape(a).replace(r'\{\}', r'(\d+)')), b) for a, b in rows if '{}' in a
    ]
    found, faults = {}, []
    for name in sorted(names):
        targets = {plain[name]} if name in plain else set()
        for pattern, template in patterns:
            if match := pattern.fullmatch(name):
                targets.add(template.format(*match.groups()))
        if len(targets) > 1:
            faults.append(f'{name} could be {" or ".join(sorted(targets))}')
        if targets:
            found[name] = targets.pop()
    for target in [t for t, n in collections.Counter(found.values()).items() if n > 1]:
        faults.append(f'{target} is named by {[n for n, t in found.items() if t == target]}')
    if faults:
        raise PretrainedError('the table is ambiguous:', sorted(faults))
    return found


def _split(name: str) -> tuple[str, str]:
    """Module and kind of array: 'a.b.weight' or Keras' 'layer/kernel'."""
    module, _, kind = name.rpartition('/' if '/' in name else '.')
    return module, kind


def detect(arrays: Arrays, tables: Mapping[str, Table]) -> str:
    """The name of the table that has a place for every array of the file.

    Raises PretrainedError with the nearest table and the arrays without a place in it.
    """
    left_over = {}
    modules = {_split(name)[0] for name in arrays}
    for name, table in tables.items():
        known = module_names(table, modules)
        left_over[name] = sorted(
            key
            for key in arrays
            if _split(key)[0] not in known and not re.fullmatch(table.unused, key)
        )
    best = min(left_over, key=lambda name: len(left_over[name]))
    if shown := left_over[best]:
        raise PretrainedError(
            f'no known source has these names; the nearest is {best}, which has no place for '
            f'{len(shown)} of {len(arrays)}: {", ".join(shown[:8])}{" ..." if shown[8:] else ""}'
        )
    return best


def translate(arrays: Arrays, table: Table, wanted: Arrays) -> Arrays:
    """{'params/backbone/conv1/kernel': HWIO, 'batch_stats/...'} from their names and layouts.

    `wanted` has the network's arrays or shapes by our names: a dense layer's matrix becomes the
    convolution that is wanted there. Unused arrays are left out.
    """
    modules = module_names(table, {_split(name)[0] for name in arrays})
    found = {}
    for name, array in arrays.items():
        module, theirs = _split(name)
        if module not in modules:
            continue
        ours, array = modules[module], np.asarray(array, np.float32)
        if theirs not in KINDS:  # reported later as a difference
            found[f'params/{ours}/{theirs}'] = array
            continue
        keras = '/' in name
        is_norm = f'{module}.running_mean' in arrays or f'{module}/moving_mean' in arrays
        kind = 'scale' if theirs == 'weight' and is_norm else KINDS[theirs]
        if array.ndim not in ((2, 4) if kind == 'kernel' else (1,)):
            raise PretrainedError(
                f'{name!r:.80} has {array.ndim} dimensions, not those of a {kind}'
            )
        key = f'{"batch_stats" if kind in ("mean", "var") else "params"}/{ours}/{kind}'
        if kind == 'var':  # with our epsilon it then equals theirs with their epsilon
            array = array + np.float32(table.epsilon - 1e-5)
        elif kind == 'kernel':
            depthwise = theirs == 'depthwise_kernel' or (keras and ours.endswith('/depthwise'))
            if depthwise and array.ndim == 4:
                array = array.swapaxes(2, 3)  # h w C 1
            array = _kernel(array, keras, getattr(wanted.get(key), 'shape', None))
        found[key] = array
    stem, project = _stem(found), 'params/head/project/conv/kernel'
    if table.normalization.trained_order == 'BGR' and stem and found[stem].shape[2] == 3:
        found[stem] = found[stem][:, :, ::-1]
    if project in found and found[project].ndim == 4:
        found[project] = _reorder_pyramid(found[project], table.pyramid)
    return _fold_biases(found, wanted)


def _stem(found: Mapping[str, Any]) -> str | None:
    """The name of the kernel that sees the image."""
    names = [f'params/backbone/{name}/kernel' for name in STEMS]
    return next((name for name in names if name in found and found[name].ndim == 4), None)


def _reorder_pyramid(kernel: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Inputs [features, bins in `order`] of PSPNet's head into [features, bins ascending]."""
    if order == tuple(sorted(order)):
        return kernel
    features = kernel.shape[2] // 2
    each = features // len(order)
    starts = [features + order.index(bins) * each for bins in sorted(order)]
    blocks = [kernel[:, :, :features], *(kernel[:, :, i : i + each] for i in starts)]
    return np.concatenate(blocks, axis=2)


def _kernel(array: np.ndarray, keras: bool, wanted: tuple[int, ...] | None) -> np.ndarray:
    """HWIO of a convolution or of a dense layer on flattened features."""
    if array.ndim == 4:
        return array if keras else array.transpose(2, 3, 1, 0)
    if array.ndim != 2 or wanted is None or array.size != np.prod(wanted):
        return array
    rows, columns, features_in, features_out = wanted
    if keras:  # (rows columns in, out)
        return array.reshape(wanted)
    return array.reshape(features_out, features_in, rows, columns).transpose(2, 3, 1, 0)


def _fold_biases(found: Arrays, wanted: Arrays) -> Arrays:
    """Subtract biases before a BatchNorm (Keras' ResNets have them) from its mean."""
    for key in [key for key in found if key.endswith('/bias') and key not in wanted]:
        module = key.removeprefix('params/').removesuffix('/bias')
        norm = re.sub(r'downsample$', 'downsample_bn', re.sub(r'conv(\d+)$', r'bn\1', module))
        mean = f'batch_stats/{norm}/mean'
        if norm != module and mean in found and found[mean].shape == found[key].shape:
            found[mean] = found[mean] - found.pop(key)
    return found


def adapt_stem(
    kernel: np.ndarray, channels: int, how: str, *, context: int = 0, their_context: int = 0
) -> np.ndarray:
    """Adapt (h, w, n, O) filters to images with `channels` channels.

    'cycle' takes R, G, B, R, ...; 'mean' takes their mean for each channel. Filters are scaled by
    n / channels, to keep the size of the output. With `context`, each of the slices that the
    network sees gets these filters, divided by the number of slices. With an equal `their_context`,
    each slice keeps its own filters.
    """
    seen, their_seen = 2 * context + 1, 2 * their_context + 1
    slices = np.split(kernel, their_seen, axis=2)
    if seen != their_seen:
        slices = [sum(slices) / seen] * seen
    n = slices[0].shape[2]
    if how == 'mean':
        slices = [np.repeat(x.mean(axis=2, keepdims=True), n, axis=2) for x in slices]
    chosen = np.arange(channels) % n
    return np.concatenate([x[:, :, chosen] * (n / channels) for x in slices], axis=2)


# ---- into a network ---------------------------------------------------------------------


def _flat(variables: Mapping[str, Any]) -> Arrays:
    return flatten_dict(dict(variables), sep='/')


def _differences(wanted: Arrays, found: Arrays) -> list[str]:
    faults = [f'only the model has {name}' for name in wanted.keys() - found.keys()]
    faults += [f'only the file has {name}' for name in found.keys() - wanted.keys()]
    faults += [
        f'{name} is {tuple(wanted[name].shape)} in the model, {found[name].shape} in the file'
        for name in wanted.keys() & found.keys()
        if tuple(wanted[name].shape) != found[name].shape
    ]
    more = [f'... and {len(faults) - MOST_LISTED} more'] if len(faults) > MOST_LISTED else []
    return [*sorted(faults)[:MOST_LISTED], *more]


def load_backbone(
    variables: dict[str, Any],
    where: str,
    *,
    stem: str = 'cycle',
    unit_deviation: bool = False,
    options: Mapping[str, Any] = {},
    context: int = 0,
) -> tuple[dict[str, Any], Normalization, str]:
    """(`variables` with the backbone from a classifier's weights, their normalisation, a report).

    VGG16's fc6 and fc7 are loaded too if the network has them with that size. With
    `unit_deviation` the images will be z-scores, and the first kernel is scaled to them. `options`
    is the config's model section, with which some sources must agree; `context` is its
    data.context. Otherwise the backbone and the file must have the same arrays and shapes, or
    PretrainedError lists both sides.
    """
    path = fetch(where)
    arrays = read_arrays(path)
    kind = detect(arrays, TABLES)
    if kind in NETWORKS:
        raise PretrainedError(
            f'{path} is a whole network ({kind}): convert it with python -m pspnet_jax.convert, '
            'or give the weights of a backbone'
        )
    table = TABLES[kind]
    for key, value in table.options.items():
        if options and options.get(key) != value:
            raise PretrainedError(
                f'{path} needs --config.model.{key}={value}, but the config has {options.get(key)}'
            )
    everything = _flat(variables)
    found = translate(arrays, table, everything)
    notes = []

    # A classifier's own layers are used if the network has them with this shape.
    for name in [name for name in found if '/backbone/' not in name]:
        if name not in everything or tuple(everything[name].shape) != found[name].shape:
            found.pop(name)
            notes.append(name.removeprefix('params/'))
    wanted = {name: x for name, x in everything.items() if '/backbone/' in name or name in found}
    if (name := _stem(found)) in wanted and found[name].shape[2] == 3:
        ratio = np.array(IMAGENET.std, np.float32) / np.array(table.normalization.std, np.float32)
        if unit_deviation and (ratio != 1).any():
            found[name] = found[name] * ratio[:, None]
            notes.append(f'{name} scaled to z-scores')
        seen = wanted[name].shape[2]
        if (seen, context) != (3, 0):
            channels = seen // (2 * context + 1)
            found[name] = adapt_stem(found[name], channels, stem, context=context)
            notes.append(f'{name} from 3 to {seen} channels by {stem}')
    if faults := _differences(wanted, found):
        raise PretrainedError(f'{path} ({kind}) does not fit the backbone:', faults)
    loaded = {name: np.asarray(found[name], np.float32) for name in wanted}
    random = sorted({name.split('/')[1] for name in everything.keys() - loaded.keys()})
    report = (
        f'{len(loaded)} arrays of the backbone loaded from {path} ({kind}; '
        f'{sum(a.size for a in loaded.values()):,} values); random: {", ".join(random) or "none"}'
        + (f'; left out or changed: {", ".join(notes)}' if notes else '')
    )
    merged = unflatten_dict({**everything, **loaded}, sep='/')
    return merged, table.normalization, report


def load_network(variables: dict[str, Any], arrays: Arrays, table: Table) -> dict[str, Any]:
    """`variables` with every array from a published network; all must match."""
    wanted = _flat(variables)
    found = translate(arrays, table, wanted)
    if faults := _differences(wanted, found):
        raise PretrainedError('the file does not fit the model:', faults)
    return unflatten_dict({name: found[name] for name in wanted}, sep='/')


def to_torch(variables: Mapping[str, Any], table: Table) -> Arrays:
    """Our arrays with a PyTorch source's names and layouts: the inverse of `translate`.

    Raises PretrainedError if the table has no name for a module.
    """
    arrays = {}
    flat = _flat(variables)
    modules = {name.split('/', 1)[1].rpartition('/')[0] for name in flat}
    theirs = module_names(table, modules, back=True)
    if missing := sorted(modules - theirs.keys()):
        raise PretrainedError(f'the table has no name for {", ".join(missing)}')
    for name, array in flat.items():
        module, _, kind = name.split('/', 1)[1].rpartition('/')
        array = np.asarray(array)
        if kind == 'kernel':
            array = array.transpose(3, 2, 0, 1)
        elif kind == 'var':
            array = array - np.float32(table.epsilon - 1e-5)
        # safetensors writes memory as it is and ignores strides.
        arrays[f'{theirs[module]}.{TORCH_KINDS.get(kind, kind)}'] = np.ascontiguousarray(array)
    return arrays


def network_options(arrays: Arrays, kind: str) -> dict[str, Any]:
    """The config's model section that a published network's arrays need, and 'channels'."""
    table = TABLES[kind]
    found = translate(arrays, table, {})
    heads = [f'params/{name}/kernel' for name in ('classifier', 'head/classifier')]
    stem, head = _stem(found), next((name for name in heads if name in found), None)
    if stem is None or head is None:
        raise PretrainedError(
            f'the file has no stem or no classifier ({kind}): is it part of a network?'
        )
    options = {**table.options, 'num_classes': found[head].shape[-1]}
    depths = [0, 0, 0, 0]
    for name in found:
        if match := re.match(r'params/backbone/layer([1-4])_([0-9]{1,3})/', name):
            layer, block = int(match[1]) - 1, int(match[2])
            depths[layer] = max(depths[layer], block + 1)
    if any(depths):
        basic = 'params/backbone/layer1_0/conv3/kernel' not in found
        names = [
            name
            for name, blocks in RESNETS.items()
            if blocks == tuple(depths) and (name in BASIC_RESNETS) == basic
        ]
        if not names:
            raise PretrainedError(
                f'a ResNet with {depths} blocks is not one of {", ".join(RESNETS)}'
            )
        options['backbone'] = names[0]
    options.setdefault('aux_head', any(name.startswith('params/aux/') for name in found))
    return options | {'channels': found[stem].shape[2]}


def is_name_of(name: str, kind: str, options: Mapping[str, Any]) -> bool:
    """Whether `name`, ours or theirs, names a network of this source with these options.

    For semseg's PSPNet-50: pspnet, PSPNet, pspnet50, pspnet_resnet50, pspnet_50.
    """

    def plain(text: str) -> str:
        return re.sub(r'[^a-z0-9]', '', text.lower()).replace('resnet', '')

    ours, theirs = options['name'], re.split(' on | of ', kind)[0]
    backbone = options.get('backbone', 'vgg16')
    names = {ours, theirs, f'{ours}_{backbone}', f'{theirs}_{backbone}', f'{ours}:{backbone}'}
    return plain(name) in map(plain, names)
