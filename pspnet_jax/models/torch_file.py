"""State dicts of PyTorch's .pth and .pt files, read without PyTorch.

torch.save writes a pickle, a program for a stack machine that may call any function of Python,
and the numbers beside it. Here the program is read opcode by opcode. It can make dicts, lists,
tuples, text and numbers, and say which numbers are a tensor and how they lie; it calls nothing,
and every other opcode and name is refused.

Both formats are read: the zip archive, and the stream that PyTorch wrote before 1.6 (2020), as
torchvision's VGG16 and MobileNetV2 and semseg's weights still are.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C  # the first value of the older format
MOST_CODES = 10**6  # of a pickle; ResNet-152's has 30,000
MOST_AXES = 16
STORAGES = {
    'torch DoubleStorage': 'float64',
    'torch FloatStorage': 'float32',
    'torch HalfStorage': 'float16',
    'torch BFloat16Storage': ml_dtypes.bfloat16,
    'torch LongStorage': 'int64',
    'torch IntStorage': 'int32',
    'torch ShortStorage': 'int16',
    'torch CharStorage': 'int8',
    'torch ByteStorage': 'uint8',
    'torch BoolStorage': 'bool',
}
KEPT = (  # opcodes whose argument is the value
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'BINSTRING',
    'SHORT_BINSTRING',
)  # fmt: skip
EMPTY: dict[str, Callable[[], Any]] = {
    'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple, 'NONE': lambda: None,
    'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False,
}  # fmt: skip


class Name(NamedTuple):
    """'module name' of something that the pickle would import."""

    name: str


class Storage(NamedTuple):
    """`numel` numbers, kept in the file under `key`."""

    key: str
    dtype: np.dtype
    numel: int


class Tensor(NamedTuple):
    """A strided view of a storage, in numbers and not in bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, data: bytes) -> np.ndarray:
        width = self.storage.dtype.itemsize
        strides = [width * stride for stride in self.strides]
        return np.ndarray(self.shape, self.storage.dtype, data, width * self.offset, strides)


def read(path: Path, check_size: Callable[[Path, int], None]) -> dict[str, np.ndarray]:
    """The arrays of a state dict, or of one under 'state_dict' or 'model', as float32.

    `check_size` refuses the bytes that a file claims to hold, before they are made. Raises
    ValueError for all that is no such file.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_size(path, sum(entry.file_size for entry in archive.infolist()))
                tensors, data = _read_archive(archive)
        else:
            tensors, data = _read_stream(io.BytesIO(path.read_bytes()))
    except (KeyError, IndexError, TypeError) as error:  # of a pickle that does not add up
        raise ValueError('it is damaged: download it again') from error
    # One number in the file can stand for any shape, by strides of 0.
    check_size(path, sum(4 * math.prod(tensor.shape) for tensor in tensors.values()))
    arrays = {name: tensor.of(data[tensor.storage.key]) for name, tensor in tensors.items()}
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def _read_archive(archive: zipfile.ZipFile) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    programs = [name for name in archive.namelist() if name.endswith('/data.pkl')]
    if len(programs) != 1:
        raise ValueError('it is a zip file without a data.pkl: save model.state_dict()')
    folder = programs[0].removesuffix('data.pkl')
    if f'{folder}byteorder' in archive.namelist():
        _check_order(archive.read(f'{folder}byteorder') == b'little')
    tensors = _state_dict(unpickle(io.BytesIO(archive.read(programs[0]))))
    data = {}
    for storage in {tensor.storage for tensor in tensors.values()}:
        data[storage.key] = archive.read(f'{folder}data/{storage.key}')
        _check_length(storage, data)
    return tensors, data


def _read_stream(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """A number, a version, the machine, the state dict, the storages' keys; then each storage."""
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
    for tensor in tensors.values():
        _check_length(tensor.storage, data)
    return tensors, data


def _check_order(little: bool) -> None:
    if not little:
        raise ValueError('it was saved on a big-endian machine: save it on a little-endian one')


def _check_length(storage: Storage, data: Mapping[str, bytes]) -> None:
    if len(data[storage.key]) != storage.dtype.itemsize * storage.numel:
        raise ValueError('a tensor is longer or shorter than the file states: download it again')


def _state_dict(tree: Any) -> dict[str, Tensor]:
    for key in ('state_dict', 'model'):
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            tree = tree[key]
    if not isinstance(tree, dict) or not all(isinstance(x, Tensor) for x in tree.values()):
        raise ValueError('it holds no state dict: save model.state_dict()')
    return tree


# ---- the pickle -------------------------------------------------------------------------


def unpickle(file: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """The value of the pickle at the file's position, and the position moves to its end.

    `storages` gets all that it names, by their keys. Raises ValueError, and KeyError, IndexError
    or TypeError where its parts do not fit together.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def pop(count: int) -> list[Any]:
        items = stack[len(stack) - count :]
        if len(items) != count:
            raise IndexError
        del stack[len(stack) - count :]
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
            case 'TUPLE':
                stack.append(tuple(since_mark()))
            case 'TUPLE1' | 'TUPLE2' | 'TUPLE3' as name:
                stack.append(tuple(pop(int(name[-1]))))
            case 'APPEND':
                (item,) = pop(1)
                _of(list, stack[-1]).append(item)
            case 'APPENDS':
                items = since_mark()
                _of(list, stack[-1]).extend(items)
            case 'SETITEM' | 'SETITEMS' as name:
                items = pop(2) if name == 'SETITEM' else since_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    # A tuple of tuples takes any time to hash.
                    _of(dict, stack[-1])[_of(str | int, key)] = value
            case 'BUILD':  # what an OrderedDict has beside its items: versions of modules
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
    """The value, which has to be of this type. Raises TypeError."""
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
    """Raises ValueError for a view that would leave the storage."""
    if len(_of(tuple, shape)) != len(_of(tuple, strides)) or len(shape) > MOST_AXES:
        raise ValueError('a tensor has an impossible shape')
    last = _size(offset)
    for length, stride in zip(shape, strides, strict=True):
        last += (_size(length) - 1) * _size(stride)
    if math.prod(shape) and last >= _of(Storage, storage).numel:
        raise ValueError('a tensor lies outside its storage')
    return Tensor(storage, offset if math.prod(shape) else 0, shape, strides)


def _size(number: int) -> int:
    if type(number) is not int or not 0 <= number < 2**48:
        raise ValueError('a tensor has an impossible size')
    return number


def _parameter(tensor: Tensor, *_: Any) -> Tensor:
    return _of(Tensor, tensor)


def _ordered_dict() -> dict:  # with no items: pickles fill it afterwards
    return {}


# What a pickle may name beside the storages, and what stands for it here.
MADE: dict[str, Callable[..., Any]] = {
    'collections OrderedDict': _ordered_dict,
    'torch._utils _rebuild_tensor': _tensor,
    'torch._utils _rebuild_tensor_v2': _tensor,
    'torch._utils _rebuild_parameter': _parameter,
}
