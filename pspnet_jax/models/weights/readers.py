"""Reads weight files: {name: array} of .safetensors, .npz, .h5 and PyTorch's .pth and .pt.

Nothing in a file is executed, and the size that it claims is compared with its own size before
anything of that size is allocated.

torch.save writes the numbers and a pickle, a program for a stack machine that may call any Python
function. Here, without PyTorch, the program is interpreted opcode by opcode. It can make dicts,
lists, tuples, texts and numbers, and describe tensors; it calls nothing, and every other opcode and
name is refused. Both formats are read: the zip archive, and the stream that PyTorch wrote before
1.6 (2020), which torchvision's VGG16 and MobileNetV2 and semseg's weights still have.
"""

import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from pspnet_jax.models.weights.sources import existing
from pspnet_jax.runtime.errors import PretrainedError, first_line
from pspnet_jax.runtime.text import too_much

Arrays = dict[str, np.ndarray]

MOST_BYTES = 2**32  # of all arrays as float32; the largest network here needs an eighth
MOST_ARRAYS = 10_000  # in a file; ResNet-152 has 932
WRAPPERS = ('module.', 'model.', '_orig_mod.')  # prefixes of all names, such as DataParallel's


def read_arrays(path: str | Path) -> Arrays:
    """{name: array} of a file, without WRAPPERS and batch counters. Raises PretrainedError."""
    path = existing(path)
    if path.suffix not in READERS:
        raise PretrainedError(
            f'{path.name} must end in one of {", ".join(READERS)}: convert the file'
        )
    try:
        check_size(path, path.stat().st_size)
        arrays = READERS[path.suffix](path)
        _check_names(arrays)
    except ImportError as error:
        raise PretrainedError(
            f'{path.suffix} files need {error.name}: pip install {error.name}'
        ) from error
    except PretrainedError:
        raise
    except Exception as error:  # each reader raises its own
        reason = first_line(error)
        raise PretrainedError(f'{path} is not a readable weight file: {reason}') from error
    arrays = {k: x for k, x in arrays.items() if not k.endswith('num_batches_tracked')}
    while prefix := next(
        (w for w in WRAPPERS if arrays and all(k.startswith(w) for k in arrays)), ''
    ):
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays


def check_size(path: Path, claimed: int) -> None:
    """Raise PretrainedError if a file of this size can't hold arrays of `claimed` bytes."""
    if fault := too_much(path, claimed, path.stat().st_size, MOST_BYTES):
        raise PretrainedError(fault)


def check_archive(path: Path) -> None:
    """`check_size` of the size that a zip file claims to unpack to."""
    with zipfile.ZipFile(path) as archive:
        check_size(path, sum(entry.file_size for entry in archive.infolist()))


def _check_names(arrays: Mapping[Any, Any]) -> None:
    if len(arrays) > MOST_ARRAYS:
        raise PretrainedError(f'it holds {len(arrays)} arrays, but at most {MOST_ARRAYS} are read')
    for name, array in arrays.items():
        named = isinstance(name, str) and len(name) < 500 and name.isprintable()
        if not named or array.dtype.kind not in 'fiub':
            raise PretrainedError(f'{name!r:.80} is not a named array of real numbers')


def _read_safetensors(path: Path) -> Arrays:
    from safetensors import safe_open

    # numpy has no bfloat16; ml_dtypes, which comes with JAX, has it.
    with safe_open(path, 'flax') as file:
        names = list(file.keys())
        return {name: np.asarray(file.get_tensor(name), np.float32) for name in names}


def _read_npz(path: Path) -> Arrays:
    check_archive(path)
    read_1_0, read_2_0 = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
    headers = {(1, 0): read_1_0, (2, 0): read_2_0}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():  # NumPy allocates what a header claims, then reads
            with archive.open(entry) as file:
                shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
                if entry.file_size != file.tell() + math.prod(shape) * dtype.itemsize:
                    raise PretrainedError(f"{entry.filename!r:.80}'s size does not fit its shape")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


# ---- Keras' .h5 -------------------------------------------------------------------------


def _read_h5(path: Path) -> Arrays:
    """Keras' arrays as 'layer/kernel', from `save`, and from `save_weights` of Keras 1 to 3.

    Layers with automatic numbers, such as conv2d_7, become 'conv2d#0', 'conv2d#1' in order.
    """
    import h5py

    with h5py.File(path, 'r') as file:
        root = _member(file, 'model_weights') if 'model_weights' in file else file
        layers = _keras_layers(root) if 'layer_names' in root.attrs else _keras_3_layers(file)
        if not layers:
            raise PretrainedError(f'{path} has no layers with weights: save it with Keras')
        for kind in ('conv2d', 'batch_normalization'):
            matches = (re.fullmatch(rf'{kind}(?:_(\d+))?', layer) for layer in layers)
            numbered = sorted((int(match[1] or 0), match[0]) for match in matches if match)
            ranks = {layer: f'{kind}#{rank}' for rank, (_, layer) in enumerate(numbered)}
            layers = {ranks.get(layer, layer): kinds for layer, kinds in layers.items()}
        datasets = {
            f'{layer}/{kind}': dataset
            for layer, kinds in layers.items()
            for kind, dataset in kinds.items()
        }
        # All together, before any is read: one dataset can have many names.
        check_size(path, sum(map(_claimed, datasets.values())))
        return {name: dataset[()] for name, dataset in datasets.items()}


def _member(group, name: str):
    """group[name] by hard links only: others may form circles or lead into other files."""
    import h5py

    for part in filter(None, name.split('/')):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise PretrainedError(f'{name!r:.80} is a link: save the weights with Keras again')
        group = group[part]
    return group


def _claimed(dataset) -> int:
    """Bytes that reading it takes. Raises PretrainedError if it is stored in other files."""
    if dataset.external or dataset.is_virtual:
        raise PretrainedError(f'{dataset.name!r:.80} is stored in other files: save one file')
    each = max(4, dataset.dtype.itemsize)
    return each * max(dataset.size or 0, math.prod(dataset.chunks or (0,)))


def _keras_layers(root) -> dict[str, dict[str, Any]]:
    """{layer: {kind: dataset}} from the .h5 of Keras 1 and 2, and from `Model.save` of Keras 3."""

    def owner(name: str) -> str:
        return name.rpartition('/')[0].rpartition('/')[2]

    layers: dict[str, dict[str, Any]] = {}
    for layer in map(_text, root.attrs['layer_names']):
        group = _member(root, layer)
        names = [_text(name) for name in group.attrs['weight_names']]
        is_model = len({owner(name) for name in names}) > 1  # then use the inner layers' names
        found: dict[str, list[tuple[str, Any]]] = {}
        for name in names:
            kind = name.rpartition('/')[2].partition(':')[0]
            whose = owner(name) if is_model else layer
            found.setdefault(whose, []).append((kind, _member(group, name)))
        layers |= {whose: _by_kind(datasets) for whose, datasets in found.items()}
    return layers


def _keras_3_layers(file) -> dict[str, dict[str, Any]]:
    """{layer: {kind: dataset}} from Keras 3's `save_weights`: numbered, names as attributes."""
    layers = {}

    def visit(path: str, group) -> None:
        if path.endswith('/vars') and len(group):
            name = _text(group.attrs.get('name', path.split('/')[-2]))
            layers[name] = _by_kind([('', _member(group, i)) for i in sorted(group, key=int)])

    file.visititems(visit)
    return layers


OF_NORM = ('gamma', 'beta', 'moving_mean', 'moving_variance')


def _by_kind(arrays: list[tuple[str, Any]]) -> dict[str, Any]:
    """A layer's arrays by Keras' names; without names by their order, which never changed."""
    known = {*OF_NORM, 'kernel', 'depthwise_kernel', 'bias'}
    if known.issuperset(kind for kind, _ in arrays):
        return dict(arrays)
    is_norm = len(arrays) == 4 and all(array.ndim == 1 for _, array in arrays)
    words = OF_NORM if is_norm else ('kernel', 'bias')
    if len(arrays) > len(words):
        return {kind or str(i): array for i, (kind, array) in enumerate(arrays)}
    return dict(zip(words, (array for _, array in arrays), strict=False))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


# ---- PyTorch's .pth and .pt -------------------------------------------------------------

MAGIC = 0x1950A86A20F9469CFC6C  # the first value of the older format
MOST_CODES = 10**6  # of a pickle; ResNet-152's has 30,000
MOST_AXES = 16
STORAGES = {
    'torch DoubleStorage': 'float64', 'torch FloatStorage': 'float32',
    'torch HalfStorage': 'float16', 'torch BFloat16Storage': ml_dtypes.bfloat16,
    'torch LongStorage': 'int64', 'torch IntStorage': 'int32', 'torch ShortStorage': 'int16',
    'torch CharStorage': 'int8', 'torch ByteStorage': 'uint8', 'torch BoolStorage': 'bool',
}  # fmt: skip
KEPT = (  # opcodes whose argument is the value
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'BINSTRING',
    'SHORT_BINSTRING',
)  # fmt: skip
EMPTY: dict[str, Callable[[], Any]] = {
    'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple, 'NONE': lambda: None,
    'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False,
}  # fmt: skip
TAKEN = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'APPEND': 1, 'SETITEM': 2}  # else: to the mark


class Name(NamedTuple):
    """The 'module name' that the pickle would import."""

    name: str


class Storage(NamedTuple):
    """`numel` numbers that the file stores under `key`."""

    key: str
    dtype: np.dtype
    numel: int


class Tensor(NamedTuple):
    """A strided view of a storage; offset and strides count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, data: bytes) -> np.ndarray:
        width = self.storage.dtype.itemsize
        strides = [width * stride for stride in self.strides]
        return np.ndarray(self.shape, self.storage.dtype, data, width * self.offset, strides)


def _read_torch(path: Path) -> Arrays:
    """The arrays of a state dict, or of one under 'state_dict' or 'model', as float32.

    Raises ValueError for any other file.
    """
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
            with zipfile.ZipFile(path) as archive:
                tensors, data = _read_archive(archive)
        else:
            tensors, data = _read_stream(io.BytesIO(path.read_bytes()))
        for storage in {tensor.storage for tensor in tensors.values()}:
            if len(data[storage.key]) != storage.dtype.itemsize * storage.numel:
                raise ValueError(
                    'a tensor is longer or shorter than the file states: download it again'
                )
    except (KeyError, IndexError, TypeError) as error:  # from an inconsistent pickle
        raise ValueError('it is corrupted: download it again') from error
    # With strides of 0, one number in the file can have any shape.
    check_size(path, sum(4 * math.prod(tensor.shape) for tensor in tensors.values()))
    return {
        name: np.asarray(tensor.of(data[tensor.storage.key]), np.float32)
        for name, tensor in tensors.items()
    }


def _read_archive(archive: zipfile.ZipFile) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    programs = [name for name in archive.namelist() if name.endswith('/data.pkl')]
    if len(programs) != 1:
        raise ValueError('it is a zip file without a data.pkl: save model.state_dict()')
    folder = programs[0].removesuffix('data.pkl')
    if f'{folder}byteorder' in archive.namelist():
        _check_order(archive.read(f'{folder}byteorder') == b'little')
    tensors = _state_dict(unpickle(io.BytesIO(archive.read(programs[0]))))
    keys = {tensor.storage.key for tensor in tensors.values()}
    return tensors, {key: archive.read(f'{folder}data/{key}') for key in keys}


def _read_stream(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """Read a magic number, a version, the machine, the state dict, the keys, then each storage."""
    if unpickle(file) != MAGIC:
        raise ValueError('PyTorch did not write it')
    unpickle(file)
    _check_order(unpickle(file)['little_endian'])
    storages: dict[str, Storage] = {}
    tensors = _state_dict(unpickle(file, storages))
    data = {}
    for key in unpickle(file):
        dtype, numel = storages[key].dtype, int.from_bytes(file.read(8), 'little', signed=True)
        data[key] = file.read(dtype.itemsize * numel) if numel == storages[key].numel else b''
    return tensors, data


def _check_order(little: bool) -> None:
    if not little:
        raise ValueError('it was saved on a big-endian machine: save it on a little-endian one')


def _state_dict(tree: Any) -> dict[str, Tensor]:
    for key in ('state_dict', 'model'):
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            tree = tree[key]
    if not isinstance(tree, dict) or not all(isinstance(x, Tensor) for x in tree.values()):
        raise ValueError('it holds no state dict: save model.state_dict()')
    return tree


def unpickle(file: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """The value of the pickle at the file's position, which moves to the pickle's end.

    `storages` gets all storages by their keys. Raises ValueError, and KeyError, IndexError or
    TypeError if the pickle is inconsistent.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int | None = None) -> list[Any]:
        """Pop the last `count` values, or all since the last mark if None."""
        start = marks.pop() if count is None else len(stack) - count
        if start < 0:
            raise IndexError
        items = stack[start:]
        del stack[start:]
        return items

    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if number == MOST_CODES:
            raise ValueError(f'its pickle has more than {MOST_CODES} opcodes')
        match opcode.name:
            case 'PROTO':
                pass
            case name if name in KEPT:
                stack.append(argument)
            case name if name in EMPTY:
                stack.append(EMPTY[name]())
            case 'MARK':
                marks.append(len(stack))
            case 'TUPLE' | 'TUPLE1' | 'TUPLE2' | 'TUPLE3' as name:
                stack.append(tuple(pop(TAKEN.get(name))))
            case 'APPEND' | 'APPENDS' as name:
                items = pop(TAKEN.get(name))
                _of(list, stack[-1]).extend(items)
            case 'SETITEM' | 'SETITEMS' as name:
                items = pop(TAKEN.get(name))
                for key, value in zip(items[::2], items[1::2], strict=True):
                    # Hashing nested tuples could take for ever.
                    _of(dict, stack[-1])[_of(str | int, key)] = value
            case 'BUILD':  # an OrderedDict's attributes: versions of modules
                pop(1)
                _of(dict, stack[-1])
            case 'BINPUT' | 'LONG_BINPUT':
                memo[argument] = stack[-1]
            case 'BINGET' | 'LONG_BINGET':
                stack.append(memo[argument])
            case 'GLOBAL':
                stack.append(_name(argument))
            case 'REDUCE':
                called, arguments = pop(2)
                stack.append(MADE[_of(Name, called).name](*_of(tuple, arguments)))
            case 'BINPERSID':
                stored = _storage(*_of(tuple, pop(1)[0]))
                stack.append(stored)
                if storages is not None:
                    storages[stored.key] = stored
            case 'STOP':
                return pop(1)[0]
            case name:
                raise ValueError(f'its pickle has the opcode {name}: save model.state_dict()')
    raise IndexError


def _of(kind: Any, value: Any) -> Any:
    """The value. Raises TypeError if it has another type."""
    if not isinstance(value, kind):
        raise TypeError
    return value


def _name(name: str) -> Name:
    if name not in STORAGES and name not in MADE:
        raise ValueError(
            f'it names {name.replace(" ", ".")!r:.90}, which is never run: save model.state_dict()'
        )
    return Name(name)


def _storage(kind: str, of: Name, key: str, device: str, numel: int, view: None = None) -> Storage:
    if kind != 'storage' or view is not None:
        raise ValueError('it stores numbers in an unknown way: save model.state_dict() again')
    return Storage(_of(str, key), np.dtype(STORAGES[of.name]), _size(numel))


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> Tensor:
    """A Tensor. Raises ValueError for a view that would leave the storage."""
    if len(_of(tuple, shape)) != len(_of(tuple, strides)) or len(shape) > MOST_AXES:
        raise ValueError('a tensor has an impossible shape')
    last = _size(offset)
    for length, stride in zip(shape, strides, strict=True):
        last += (_size(length) - 1) * _size(stride)
    if last >= _of(Storage, storage).numel and math.prod(shape):
        raise ValueError('a tensor lies outside its storage')
    return Tensor(storage, offset if math.prod(shape) else 0, shape, strides)


def _size(number: int) -> int:
    if type(number) is not int or not 0 <= number < 2**48:
        raise ValueError('a tensor has an impossible size')
    return number


def _ordered_dict() -> dict:  # with no items: pickles fill it afterwards
    return {}


# The names that a pickle may use besides the storages, and their replacements here.
MADE: dict[str, Callable[..., Any]] = {
    'collections OrderedDict': _ordered_dict,
    'torch._utils _rebuild_tensor': _tensor,
    'torch._utils _rebuild_tensor_v2': _tensor,
    'torch._utils _rebuild_parameter': lambda tensor, *_: _of(Tensor, tensor),
}
READERS = {
    '.safetensors': _read_safetensors, '.npz': _read_npz, '.h5': _read_h5, '.hdf5': _read_h5,
    '.pth': _read_torch, '.pt': _read_torch,
}  # fmt: skip
