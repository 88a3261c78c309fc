"""Published weights into our networks: named, strict both ways, and reported.

Each source is a table of rows `theirs <-> ours`, in which {} is a number, and reads both
ways. A file is of the source whose table has a place for each of its arrays. Then every
array that the network (or its backbone) needs must be found once, with its shape, and
every array of the file be used or known to be of no use here; any difference is an
error that lists both sides.

  model.pretrained=FILE                         weights of a classifier into the backbone
  model.pretrained=hf:REPO[/FILE]               the same, by huggingface_hub
  python -m pspnet_jax.models.pretrained --source=FILE --model=fcn_resnet50 --out=RUN
                                                a whole network into a checkpoint
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import numpy as np

from pspnet_jax.errors import PretrainedError

Arrays = dict[str, np.ndarray]


class Normalization(NamedTuple):
    """What a network's input was in training: channels in RGB order, of images 0 to 255."""

    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    trained_order: str = 'RGB'  # 'BGR': the first kernel is turned round when it is read

    def intensity(self, channels: int) -> np.ndarray:
        """(4, channels) for `data.volumes.normalize`: low, high, mean, deviation, in turn."""
        rows = np.array([(0,) * 3, (255,) * 3, self.mean, self.std], np.float32)
        return rows[:, np.arange(channels) % 3]


IMAGENET = Normalization()
CAFFE = Normalization((123.68, 116.779, 103.939), (1.0, 1.0, 1.0), 'BGR')


class Source(NamedTuple):
    """A table, and what goes with the weights that it names."""

    rows: tuple[tuple[str, str], ...]  # their module <-> ours
    unused: str = r'\b\B'  # keys that no network here has a place for; as it is, none
    normalization: Normalization = IMAGENET
    options: Mapping[str, Any] = {}  # that the config's model must have


# ---- tables -----------------------------------------------------------------------------

_RESNET = (
    ('conv{}', 'conv{}'),  # conv1; conv1 to conv3 with a deep stem
    ('bn{}', 'bn{}'),
    ('layer{}.{}.conv{}', 'layer{}_{}/conv{}'),
    ('layer{}.{}.bn{}', 'layer{}_{}/bn{}'),
    ('layer{}.{}.downsample.0', 'layer{}_{}/downsample'),
    ('layer{}.{}.downsample.1', 'layer{}_{}/downsample_bn'),
)
_VGG_DEPTHS = (2, 2, 3, 3, 3)
_FC = (('classifier.0', 'fully_connected/fc6'), ('classifier.3', 'fully_connected/fc7'))
_FC_TIMM = (('pre_logits.fc1', _FC[0][1]), ('pre_logits.fc2', _FC[1][1]))


def _under(theirs: str, ours: str, rows) -> tuple[tuple[str, str], ...]:
    return tuple((f'{theirs}{a}', f'{ours}{b}') for a, b in rows)


def _vgg(norm: bool) -> tuple[tuple[str, str], ...]:
    """torchvision numbers VGG16's layers in order: convolution, BatchNorm, ReLU, pooling."""
    rows, n = [], 0
    for block, depth in enumerate(_VGG_DEPTHS, start=1):
        for i in range(1, depth + 1):
            rows.append((f'features.{n}', f'backbone/conv{block}_{i}'))
            if norm:
                rows.append((f'features.{n + 1}', f'backbone/bn{block}_{i}'))
            n += 3 if norm else 2
        n += 1
    return tuple(rows)


def _mobilenet() -> tuple[tuple[str, str], ...]:
    rows = [
        ('features.0.0', 'stem'),
        ('features.0.1', 'stem_bn'),
        ('features.1.conv.0.0', 'block1/depthwise'),
        ('features.1.conv.0.1', 'block1/depthwise_bn'),
        ('features.1.conv.1', 'block1/project'),
        ('features.1.conv.2', 'block1/project_bn'),
        ('features.18.0', 'head'),
        ('features.18.1', 'head_bn'),
    ]
    for n in range(2, 18):
        for theirs, ours in (
            ('0.0', 'expand'), ('0.1', 'expand_bn'), ('1.0', 'depthwise'),
            ('1.1', 'depthwise_bn'), ('2', 'project'), ('3', 'project_bn'),
        ):  # fmt: skip
            rows.append((f'features.{n}.conv.{theirs}', f'block{n}/{ours}'))
    return tuple(rows)


def _mobilenet_timm() -> tuple[tuple[str, str], ...]:
    rows = [
        ('conv_stem', 'stem'), ('bn1', 'stem_bn'), ('conv_head', 'head'), ('bn2', 'head_bn'),
        ('blocks.0.0.conv_dw', 'block1/depthwise'), ('blocks.0.0.bn1', 'block1/depthwise_bn'),
        ('blocks.0.0.conv_pw', 'block1/project'), ('blocks.0.0.bn2', 'block1/project_bn'),
    ]  # fmt: skip
    number = 2
    for stage, depth in enumerate((2, 3, 4, 3, 3, 1), start=1):
        for i in range(depth):
            for theirs, ours in (
                ('conv_pw', 'expand'), ('bn1', 'expand_bn'), ('conv_dw', 'depthwise'),
                ('bn2', 'depthwise_bn'), ('conv_pwl', 'project'), ('bn3', 'project_bn'),
            ):  # fmt: skip
                rows.append((f'blocks.{stage}.{i}.{theirs}', f'block{number}/{ours}'))
            number += 1
    return tuple(rows)


def _head(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    """3x3, BatchNorm, ReLU, dropout, 1x1 as a torch Sequential."""
    return (
        (f'{theirs}.0', f'{ours}/project/conv'),
        (f'{theirs}.1', f'{ours}/project/bn'),
        (f'{theirs}.4', f'{ours}/classifier'),
    )


def _aspp(theirs: str, separable: bool) -> tuple[tuple[str, str], ...]:
    rows = [
        ('convs.0.0', 'conv1x1/conv'), ('convs.0.1', 'conv1x1/bn'),
        ('convs.4.1', 'image/conv'), ('convs.4.2', 'image/bn'),
        ('project.0', 'project/conv'), ('project.1', 'project/bn'),
    ]  # fmt: skip
    for n in (1, 2, 3):
        if separable:
            rows.append((f'convs.{n}.0.0', f'dilated{n}/depthwise'))
            rows.append((f'convs.{n}.0.1', f'dilated{n}/pointwise'))
        else:
            rows.append((f'convs.{n}.0', f'dilated{n}/conv'))
        rows.append((f'convs.{n}.1', f'dilated{n}/bn'))
    return _under(f'{theirs}.', 'aspp/', rows)


_SEMSEG_STEM = tuple(
    (f'layer0.{3 * i + j}', f'backbone/{kind}{i + 1}')
    for i in range(3)
    for j, kind in enumerate(('conv', 'bn'))
)
_SEMSEG_PYRAMID = tuple(
    (f'ppm.features.{i}.{j}', f'pyramid/bin{bins}/{kind}')
    for i, bins in enumerate((1, 2, 3, 6))
    for j, kind in ((1, 'conv'), (2, 'bn'))
)
_KERAS_VGG = tuple(
    (f'block{block}_conv{i}', f'backbone/conv{block}_{i}')
    for block, depth in enumerate(_VGG_DEPTHS, start=1)
    for i in range(1, depth + 1)
)
_KERAS_RESNET = (
    ('conv1_conv', 'backbone/conv1'),
    ('conv1_bn', 'backbone/bn1'),
    *(
        (f'conv{layer + 1}_block{i + 1}_{n}_{kind}', f'backbone/layer{layer}_{i}/{ours}')
        for layer in (1, 2, 3, 4)
        for i in range(36)
        for n, kind, ours in (
            (0, 'conv', 'downsample'), (0, 'bn', 'downsample_bn'),
            *((n, kind, f'{kind}{n}') for n in (1, 2, 3) for kind in ('conv', 'bn')),
        )
    ),
)  # fmt: skip
_CAFFE_RESNET = (
    *((f'conv1_{i}_3x3{"_s2" if i == 1 else ""}', f'backbone/conv{i}') for i in (1, 2, 3)),
    *((f'conv1_{i}_3x3{"_s2" if i == 1 else ""}_bn', f'backbone/bn{i}') for i in (1, 2, 3)),
    *(
        (f'conv{layer + 1}_{i + 1}_{theirs}{norm}', f'backbone/layer{layer}_{i}/{ours}')
        for layer in (1, 2, 3, 4)
        for i in range(36)
        for theirs, conv, bn in (
            ('1x1_reduce', 'conv1', 'bn1'), ('3x3', 'conv2', 'bn2'),
            ('1x1_increase', 'conv3', 'bn3'), ('1x1_proj', 'downsample', 'downsample_bn'),
        )
        for norm, ours in (('', conv), ('_bn', bn))
    ),
)  # fmt: skip
_SMP_ENCODER = _under('encoder.', 'backbone/', _RESNET)

BACKBONE_SOURCES = {
    'vgg16': Source((*_vgg(False), *_FC, *_FC_TIMM), r'(classifier\.6|head\.fc)\..*'),
    'vgg16_bn': Source((*_vgg(True), *_FC, *_FC_TIMM), r'(classifier\.6|head\.fc)\..*'),
    'resnet': Source(_under('', 'backbone/', _RESNET), r'fc\..*'),
    'mobilenet_v2': Source(_under('', 'backbone/', _mobilenet()), r'classifier\..*'),
    'mobilenet_v2 of timm': Source(_under('', 'backbone/', _mobilenet_timm()), r'classifier\..*'),
    'vgg16 of Keras': Source(
        (*_KERAS_VGG, ('fc1', _FC[0][1]), ('fc2', _FC[1][1])), r'predictions/.*', CAFFE
    ),
    'resnet of Keras': Source(
        _KERAS_RESNET, r'(predictions|probs)/.*', CAFFE, {'stride_in_1x1': True}
    ),
}
_TORCHVISION = {'dilate_first_block': False, 'output_stride': 8}
_AUX = _head('aux_classifier', 'aux')
NETWORK_SOURCES = {
    'fcn of torchvision': Source(
        (*_under('backbone.', 'backbone/', _RESNET), *_head('classifier', 'head'), *_AUX),
        options={'name': 'fcn', **_TORCHVISION},
    ),
    'deeplabv3 of torchvision': Source(
        (
            *_under('backbone.', 'backbone/', _RESNET),
            *_aspp('classifier.0', separable=False),
            ('classifier.1', 'project/conv'),
            ('classifier.2', 'project/bn'),
            ('classifier.4', 'classifier'),
            *_AUX,
        ),
        options={
            'name': 'deeplab_v3',
            'variant': 'torchvision',
            'multi_grid': (1,),
            'rates': (12, 24, 36),
            **_TORCHVISION,
        },
    ),
    'unet of segmentation_models_pytorch': Source(
        (
            *_SMP_ENCODER,
            ('decoder.blocks.{}.conv{}.0', 'up{}_{}/conv'),
            ('decoder.blocks.{}.conv{}.1', 'up{}_{}/bn'),
            ('segmentation_head.0', 'classifier'),
        ),
        options={'name': 'unet'},
    ),
    'deeplabv3plus of segmentation_models_pytorch': Source(
        (
            *_SMP_ENCODER,
            *_aspp('decoder.aspp.0', separable=True),
            ('decoder.aspp.1.0', 'fuse1/depthwise'),
            ('decoder.aspp.1.1', 'fuse1/pointwise'),
            ('decoder.aspp.2', 'fuse1/bn'),
            ('decoder.block1.0', 'low/conv'),
            ('decoder.block1.1', 'low/bn'),
            ('decoder.block2.0.0', 'fuse2/depthwise'),
            ('decoder.block2.0.1', 'fuse2/pointwise'),
            ('decoder.block2.1', 'fuse2/bn'),
            ('segmentation_head.0', 'classifier'),
        ),
        options={'name': 'deeplab_v3plus', 'variant': 'smp', 'rates': (12, 24, 36)},
    ),
    'pspnet of semseg': Source(
        (
            *_SEMSEG_STEM,
            *_under('', 'backbone/', _RESNET[2:]),
            *_SEMSEG_PYRAMID,
            *_head('cls', 'head'),
            *_head('aux', 'aux'),
        ),
        options={'name': 'pspnet', 'deep_stem': True},
    ),
    'vgg_pspnet of image-segmentation-keras': Source(
        (
            *_KERAS_VGG,
            *((f'conv2d#{i}', f'bin{bins}') for i, bins in enumerate((1, 2, 3, 6))),
            *((f'batch_normalization#{i}', f'bin{bins}_bn') for i, bins in enumerate((1, 2, 3, 6))),
            ('conv2d#4', 'project'),
            ('batch_normalization#4', 'project_bn'),
            ('conv2d#5', 'classifier'),
        ),
        normalization=CAFFE._replace(trained_order='RGB'),  # it feeds RGB to BGR's weights
        options={'name': 'vgg_pspnet_blog'},
    ),
    'pspnet of image-segmentation-keras': Source(
        (
            *_CAFFE_RESNET,
            *((f'conv5_3_pool{n}_conv', f'pyramid/bin{n}/conv') for n in (1, 2, 3, 6)),
            *((f'conv5_3_pool{n}_conv_bn', f'pyramid/bin{n}/bn') for n in (1, 2, 3, 6)),
            ('conv5_4', 'head/project/conv'),
            ('conv5_4_bn', 'head/project/bn'),
            ('conv6', 'head/classifier'),
        ),
        normalization=CAFFE,
        options={'name': 'pspnet', 'deep_stem': True, 'aux_head': False, 'stride_in_1x1': True},
    ),
}
SOURCES = {**BACKBONE_SOURCES, **NETWORK_SOURCES}


# ---- reading files ----------------------------------------------------------------------


def read_arrays(path: str | Path) -> Arrays:
    """{name: array} of a .safetensors, .npz, .h5, .pth or .pt file. Nothing in it is executed.

    'module.' of DataParallel and counters of batches are left out. Raises PretrainedError.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise PretrainedError(f"{path} is not a file: give the weights' path")
    readers = {
        '.safetensors': _read_safetensors,
        '.npz': _read_npz,
        '.h5': _read_h5,
        '.hdf5': _read_h5,
        '.pth': _read_torch,
        '.pt': _read_torch,
    }
    if path.suffix not in readers:
        raise PretrainedError(f'{path.name} ends in none of {", ".join(readers)}: convert it')
    try:
        arrays = readers[path.suffix](path)
    except ImportError as error:
        raise PretrainedError(
            f'{path.suffix} files need {error.name}: pip install {error.name}'
        ) from error
    except PretrainedError:
        raise
    except Exception as error:  # each reader raises its own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PretrainedError(f'{path} is not a readable weight file: {reason}') from error
    return {
        name.removeprefix('module.'): array
        for name, array in arrays.items()
        if not name.endswith('num_batches_tracked')
    }


def _read_safetensors(path: Path) -> Arrays:
    from safetensors.numpy import load_file

    return load_file(path)


def _read_npz(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _read_torch(path: Path) -> Arrays:
    """A state dict, or one under 'state_dict' or 'model', of PyTorch's own format."""
    import torch

    tree = torch.load(path, map_location='cpu', weights_only=True)
    for key in ('state_dict', 'model'):
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            tree = tree[key]
    if not isinstance(tree, Mapping) or not all(map(torch.is_tensor, tree.values())):
        raise PretrainedError(f'{path} holds no state dict: save model.state_dict()')
    return {name: tensor.float().numpy() for name, tensor in tree.items()}


def _read_h5(path: Path) -> Arrays:
    """Keras' weights by layer, 'block1_conv1/kernel', as `save_weights` of Keras 2 writes them.

    Layers that Keras numbers by itself, conv2d_7, come as 'conv2d#0', 'conv2d#1' in order.
    """
    import h5py

    arrays = {}
    with h5py.File(path, 'r') as file:
        root = file.get('model_weights', file)
        if 'layer_names' not in root.attrs:
            raise PretrainedError(
                f'{path} has no layer names: save it in the .h5 format of Keras 2'
            )
        for layer in map(_text, root.attrs['layer_names']):
            for weight in map(_text, root[layer].attrs['weight_names']):
                kind = weight.rpartition('/')[2].partition(':')[0]
                arrays[f'{layer}/{kind}'] = np.asarray(root[layer][weight])
    numbered: dict[str, set[int]] = {}
    for name in arrays:
        if match := re.fullmatch(r'(conv2d|batch_normalization)(?:_(\d+))?/\w+', name):
            numbered.setdefault(match[1], set()).add(int(match[2] or 0))
    for kind, numbers in numbered.items():
        for rank, number in enumerate(sorted(numbers)):
            old = f'{kind}_{number}/' if number else f'{kind}/'
            for name in [name for name in arrays if name.startswith(old)]:
                arrays[f'{kind}#{rank}/{name.removeprefix(old)}'] = arrays.pop(name)
    return arrays


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def fetch(where: str) -> Path:
    """The file at a path or at hf:REPO[/FILE], fetched to the cache of huggingface_hub."""
    if not where.startswith('hf:'):
        return Path(where).expanduser()
    owner, _, rest = where.removeprefix('hf:').partition('/')
    name, _, file = rest.partition('/')
    file = file or 'model.safetensors'
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(f'{owner}/{name}', file))
    except ImportError as error:
        raise PretrainedError('hf: needs huggingface_hub: pip install huggingface_hub') from error
    except Exception as error:  # no network, no such repository, no such file
        raise PretrainedError(
            f'{where} could not be fetched ({type(error).__name__}): download {file} of '
            f'https://huggingface.co/{owner}/{name} in a browser and give its path instead'
        ) from error


# ---- from their names to ours -----------------------------------------------------------


def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r'\{\}', r'(\d+)'))


def module_names(source: Source, names: set[str], *, back: bool = False) -> dict[str, str]:
    """{their module: ours}, or with `back` {ours: theirs}, of the names that the table has.

    Raises PretrainedError for a name with two rows, and for two names that mean the same.
    """
    rows = [(b, a) if back else (a, b) for a, b in source.rows]
    plain = {a: b for a, b in rows if '{}' not in a}
    patterns = [(_pattern(a), b) for a, b in rows if '{}' in a]
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
    for target in {t for t in found.values() if list(found.values()).count(t) > 1}:
        faults.append(f'{target} is named by {[n for n, t in found.items() if t == target]}')
    if faults:
        raise PretrainedError('\n  '.join(['the table is ambiguous:', *sorted(faults)]))
    return found


def _split(name: str) -> tuple[str, str]:
    """Module and kind of array: 'a.b.weight' or Keras' 'layer/kernel'."""
    module, _, kind = name.rpartition('/' if '/' in name else '.')
    return module, kind


def detect(arrays: Arrays, sources: Mapping[str, Source]) -> str:
    """The name of the source whose table has a place for every array of the file.

    Raises PretrainedError with the nearest table and the arrays it has no place for.
    """
    left_over = {}
    modules = {_split(name)[0] for name in arrays}
    for name, source in sources.items():
        known = module_names(source, modules)
        left_over[name] = [
            key
            for key in arrays
            if _split(key)[0] not in known and not re.fullmatch(source.unused, key)
        ]
    best = min(left_over, key=lambda name: len(left_over[name]))
    if left_over[best]:
        shown = sorted(left_over[best])
        raise PretrainedError(
            f'no known source has these names; {best} comes nearest, without a place for '
            f'{len(shown)} of {len(arrays)}: {", ".join(shown[:8])}{" ..." if shown[8:] else ""}'
        )
    return best


def translate(arrays: Arrays, source: Source, wanted: Arrays) -> Arrays:
    """{'params/backbone/conv1/kernel': HWIO, 'batch_stats/...'} from their names and layouts.

    `wanted` has what the network needs by our names (arrays or shapes): a dense layer's
    matrix becomes the convolution that is wanted there. Arrays of no use are left out.
    """
    modules = module_names(source, {_split(name)[0] for name in arrays})
    found = {}
    for name, array in arrays.items():
        module, kind = _split(name)
        if module not in modules:
            continue
        ours, array = modules[module], np.asarray(array, np.float32)
        keras = '/' in name
        is_norm = f'{module}.running_mean' in arrays or f'{module}/moving_mean' in arrays
        if kind in ('running_mean', 'moving_mean'):
            found[f'batch_stats/{ours}/mean'] = array
        elif kind in ('running_var', 'moving_variance'):
            found[f'batch_stats/{ours}/var'] = array
        elif kind == 'gamma' or (kind == 'weight' and is_norm):
            found[f'params/{ours}/scale'] = array
        elif kind in ('bias', 'beta'):
            found[f'params/{ours}/bias'] = array
        elif kind in ('kernel', 'weight'):
            key = f'params/{ours}/kernel'
            shape = getattr(wanted.get(key), 'shape', None)
            found[key] = _kernel(array, keras, shape)
        else:
            found[f'params/{ours}/{kind}'] = array  # unknown: a difference is an error later
    if source.normalization.trained_order == 'BGR':
        for stem in ('conv1', 'conv1_1', 'stem'):
            if (key := f'params/backbone/{stem}/kernel') in found and found[key].shape[2] == 3:
                found[key] = found[key][:, :, ::-1]
    return _fold_biases(found, wanted)


def _kernel(array: np.ndarray, keras: bool, wanted: tuple[int, ...] | None) -> np.ndarray:
    """HWIO of a convolution or of a dense layer on flattened features."""
    if array.ndim == 4:
        return array if keras else array.transpose(2, 3, 1, 0)
    if array.ndim != 2 or wanted is None:
        return array
    rows, columns, features_in, features_out = wanted
    if array.size != np.prod(wanted):
        return array
    if keras:  # (rows columns in, out)
        return array.reshape(wanted)
    return array.reshape(features_out, features_in, rows, columns).transpose(2, 3, 1, 0)


def _fold_biases(found: Arrays, wanted: Arrays) -> Arrays:
    """Biases in front of a BatchNorm, which Keras' ResNets have, taken off its mean: the same."""
    for key in [key for key in found if key.endswith('/bias') and key not in wanted]:
        module = key.removeprefix('params/').removesuffix('/bias')
        norm = (
            f'{module}_bn'
            if module.endswith('downsample')
            else re.sub(r'conv(\d+)$', r'bn\1', module)
        )
        mean = f'batch_stats/{norm}/mean'
        if norm != module and mean in found:
            found[mean] = found[mean] - found.pop(key)
    return found


def adapt_stem(kernel: np.ndarray, channels: int, how: str) -> np.ndarray:
    """(h, w, 3, O) filters for `channels` channels, scaled so that their sum stays as large.

    'cycle' takes R, G, B, R, ...; 'mean' their mean for each.
    """
    if how == 'mean':
        kernel = np.repeat(kernel.mean(axis=2, keepdims=True), 3, axis=2)
    return kernel[:, :, np.arange(channels) % 3] * (3 / channels)


# ---- loading ----------------------------------------------------------------------------


def _flat(variables: Mapping[str, Any]) -> Arrays:
    return flax.traverse_util.flatten_dict(dict(variables), sep='/')


def _differences(wanted: Arrays, found: Arrays) -> list[str]:
    faults = [f'the model has {name}, the file has not' for name in wanted.keys() - found.keys()]
    faults += [f'the file has {name}, the model has not' for name in found.keys() - wanted.keys()]
    faults += [
        f'{name} is {tuple(wanted[name].shape)} in the model, {found[name].shape} in the file'
        for name in wanted.keys() & found.keys()
        if tuple(wanted[name].shape) != found[name].shape
    ]
    return sorted(faults)


def load_backbone(
    variables: dict[str, Any], where: str, *, stem: str = 'cycle', options: Mapping[str, Any] = {}
) -> tuple[dict[str, Any], Normalization, str]:
    """`variables` with the backbone from a classifier's weights, their normalisation, a report.

    VGG16's fc6 and fc7 are taken too where the network has them at their size. `options`
    is the config's model section, which some sources need to agree. Every other array of
    the backbone must be in the file with its shape, and every array of the file in
    the backbone; else PretrainedError lists both sides.
    """
    path = fetch(where)
    arrays = read_arrays(path)
    kind = detect(arrays, SOURCES)
    if kind in NETWORK_SOURCES:
        raise PretrainedError(
            f'{path} is a whole network ({kind}): convert it with python -m '
            'pspnet_jax.models.pretrained, or give the weights of a backbone'
        )
    source = SOURCES[kind]
    _check_options(path, source, options)
    everything = _flat(variables)
    found = translate(arrays, source, everything)
    notes = []

    # A classifier's own layers: taken where the network has them so, else of no use.
    for name in [name for name in found if '/backbone/' not in name]:
        if name not in everything or tuple(everything[name].shape) != found[name].shape:
            found.pop(name)
            notes.append(name.removeprefix('params/'))
    wanted = {name: x for name, x in everything.items() if '/backbone/' in name or name in found}
    for name in wanted.keys() & found.keys():
        (here, there) = (tuple(wanted[name].shape), found[name].shape)
        if len(here) == 4 and here[2] != there[2] == 3 and here[3] == there[3]:
            found[name] = adapt_stem(found[name], here[2], stem)
            notes.append(f'{name} from 3 to {here[2]} channels by {stem}')
    faults = _differences(wanted, found)
    if faults:
        raise PretrainedError('\n  '.join([f'{path} ({kind}) does not fit the backbone:', *faults]))
    loaded = {name: np.asarray(found[name], np.float32) for name in wanted}
    random = sorted({name.split('/')[1] for name in everything.keys() - loaded.keys()})
    report = (
        f'{len(loaded)} arrays of the backbone loaded from {path} ({kind}; '
        f'{sum(a.size for a in loaded.values()):,} values); random: {", ".join(random) or "none"}'
        + (f'; left out or changed: {", ".join(notes)}' if notes else '')
    )
    merged = flax.traverse_util.unflatten_dict({**everything, **loaded}, sep='/')
    return merged, source.normalization, report


def load_network(
    variables: dict[str, Any], path: str | Path, kind: str, arrays: Arrays
) -> dict[str, Any]:
    """`variables` with every array from a published network of source `kind`, strictly."""
    wanted = _flat(variables)
    found = translate(arrays, SOURCES[kind], wanted)
    if faults := _differences(wanted, found):
        raise PretrainedError('\n  '.join([f'{path} ({kind}) does not fit the model:', *faults]))
    return flax.traverse_util.unflatten_dict({name: found[name] for name in wanted}, sep='/')


def to_torch(variables: Mapping[str, Any], source: Source) -> Arrays:
    """Our arrays under a PyTorch source's names and layouts: `translate`, backwards.

    Raises PretrainedError where the table has no name for a module.
    """
    arrays = {}
    flat = _flat(variables)
    modules = {name.split('/', 1)[1].rpartition('/')[0] for name in flat}
    theirs = module_names(source, modules, back=True)
    if missing := sorted(modules - theirs.keys()):
        raise PretrainedError(f'the table has no name for {", ".join(missing)}')
    kinds = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
    for name, array in flat.items():
        module, _, kind = name.split('/', 1)[1].rpartition('/')
        array = np.asarray(array)
        if kind == 'kernel':
            array = array.transpose(3, 2, 0, 1)
        arrays[f'{theirs[module]}.{kinds.get(kind, kind)}'] = array
    return arrays


def _check_options(path: Path, source: Source, options: Mapping[str, Any]) -> None:
    for key, value in source.options.items():
        if options and options.get(key) != value:
            raise PretrainedError(
                f'{path} needs model.{key}={value}, the config has {options.get(key)}'
            )


# ---- a whole network into a checkpoint --------------------------------------------------


def network_options(arrays: Arrays, kind: str) -> dict[str, Any]:
    """The config's model section that a published network's arrays need, and 'channels'."""
    source = SOURCES[kind]
    found = translate(arrays, source, {})
    kernels = {
        name.removeprefix('params/').removesuffix('/kernel'): array
        for name, array in found.items()
        if name.endswith('/kernel')
    }
    depths = [0, 0, 0, 0]
    for name in kernels:
        if match := re.match(r'backbone/layer(\d)_(\d+)/', name):
            layer, block = int(match[1]) - 1, int(match[2])
            depths[layer] = max(depths[layer], block + 1)
    stem = next(k for n, k in kernels.items() if n in ('backbone/conv1', 'backbone/conv1_1'))
    heads = [k for n, k in kernels.items() if n in ('classifier', 'head/classifier')]
    if not heads:
        raise PretrainedError(f'the file has no classifier ({kind}): is it a backbone alone?')
    options = {**source.options, 'num_classes': heads[0].shape[-1]}
    if any(depths):
        bottleneck = 'backbone/layer1_0/conv3' in kernels
        names = {
            (2, 2, 2, 2): 'resnet18',
            (3, 4, 6, 3): 'resnet50' if bottleneck else 'resnet34',
            (3, 4, 23, 3): 'resnet101',
            (3, 8, 36, 3): 'resnet152',
        }
        if tuple(depths) not in names:
            raise PretrainedError(f'a ResNet with {depths} blocks is none of {sorted(names)}')
        options['backbone'] = names[tuple(depths)]
    if 'aux_head' not in options:
        options['aux_head'] = any(name.startswith('aux/') for name in kernels)
    return options | {'channels': stem.shape[2]}


def main() -> None:
    """Write RUN/checkpoints/0 from a published network; see the module's docstring."""
    import functools
    import types

    import jax
    from absl import flags

    from pspnet_jax import checkpoint, models
    from pspnet_jax.config import to_dict, validate
    from pspnet_jax.errors import ConfigError

    options = flags.FLAGS
    if checkpoint.steps(options.out):
        raise ConfigError(f'{options.out} holds checkpoints already: give another --out')
    path = fetch(options.source)
    arrays = read_arrays(path)
    kind = detect(arrays, NETWORK_SOURCES)
    changes = network_options(arrays, kind)
    channels = changes.pop('channels')
    expected = [changes['name'], f'{changes["name"]}_{changes.get("backbone", "vgg16")}']
    expected += [kind.split(' of ')[0], f'{kind.split(" of ")[0]}_{changes.get("backbone", "")}']
    if options.model not in ('', *expected):
        raise ConfigError(f'{path} holds {expected[-1]} ({kind}), not --model={options.model}')
    config = options.config
    config.model.update(changes)
    config.data.normalize = 'weights'
    validate(config)
    model = models.create(**config.model)
    image = jax.ShapeDtypeStruct((1, 65, 65, channels), np.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)
    variables = load_network(shapes, path, kind, arrays)
    state = types.SimpleNamespace(
        params=variables['params'],
        batch_stats=variables.get('batch_stats', {}),
        ema_params=None,
        opt_state=None,
    )
    intensity = SOURCES[kind].normalization.intensity(channels).tolist()
    writer = checkpoint.open_writer(options.out)
    checkpoint.save(
        writer,
        0,
        state,
        config=to_dict(config),
        progress={'best_dice': None, 'stale': 0},
        inputs={'channels': channels, 'intensity': intensity},
        dice=None,
    )
    writer.close()
    print(
        f'{len(arrays)} arrays of {path} ({kind}) are {changes["name"]} in {options.out}: '
        f'{config.model.num_classes} classes, images as {SOURCES[kind].normalization}'
    )


if __name__ == '__main__':
    from absl import flags
    from ml_collections import config_flags

    from pspnet_jax import cli

    config_flags.DEFINE_config_file('config', 'configs/base.py', "the rest of the run's config")
    flags.DEFINE_string('source', None, "the network's weights: a file, or hf:REPO[/FILE]")
    flags.DEFINE_string('model', '', "what the file must hold, such as fcn_resnet50; '': any")
    flags.DEFINE_string('out', None, 'workdir that gets the checkpoint')
    flags.mark_flags_as_required(['source', 'out'])
    cli.run(main)
