"""Weights from a stranger: refused in one line, and nothing in them is run."""

import ast
import contextlib
import io
import json
import os
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pspnet_jax.models import weights
from pspnet_jax.models.weights import readers
from pspnet_jax.runtime.errors import PretrainedError
from tests.conftest import ROOT, refused
from tests.stress import fuzz_state


class Harm:
    """Pickled, it is a command to the shell."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


# Nothing is run.


def test_pickle_json_and_code_are_read_in_no_other_way():
    """Every call in the package that could run what a file says."""
    for path in sorted((ROOT / 'pspnet_jax').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, given_by = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            where = f'{path.name}:{node.lineno} calls {name}'
            constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
            assert name not in ('eval', 'exec', 'compile', '__import__', 'os.system'), where
            assert not re.search(r'\b(pickle|dill|joblib|shelve|marshal|yaml)\.', name), where
            if name == 'importlib.import_module' or (name, path.name) == ('_imported', 'limits.py'):
                assert constant or path.name == 'limits.py', where
                assert constant or ast.unparse(node.args[0]) == 'name', where
            assert name != 'torch.load', where  # models/weights/readers.py reads its files
            if name == 'np.load':
                assert ast.unparse(given_by['allow_pickle']) == 'False', where


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'npz', 'npz of pickles'])
def test_a_pickle_that_calls_the_shell_is_not_run(tmp_path, kind):
    marker = tmp_path / 'marker'
    os.system(f'touch {tmp_path}/works')
    assert (tmp_path / 'works').exists()
    if kind.startswith('npz'):
        path = tmp_path / 'w.npz'
        if kind == 'npz':
            np.savez(path, a=np.array([Harm(marker)], object))
        else:
            with zipfile.ZipFile(path, 'w') as archive:
                archive.writestr('a.npy', pickle.dumps(Harm(marker)))
    else:
        path = tmp_path / 'w.pth'
        write = write_archive if kind == 'zip' else write_stream
        write(path, pickle.dumps({'a': Harm(marker)}, 2), {})
    told = refused(weights.read_arrays, path, kind=PretrainedError)
    assert kind.startswith('npz') or "it names 'posix.system', which is never run" in told
    assert not marker.exists()


# No size is believed.


def npy(shape, data=b''):
    file = io.BytesIO()
    header = {'descr': '<f4', 'fortran_order': False, 'shape': shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def archive(path, **entries):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(f'{name}.npy', content)


NPZ = {
    'bomb': (lambda: {'a': npy((2**25,), bytes(2**27))}, 'claims to hold'),
    'absurd shape': (lambda: {'a': npy((10**6, 10**6), bytes(8))}, 'size does not fit its shape'),
    'negative shape': (lambda: {'a': npy((-2, -2), bytes(16))}, 'readable weight file'),
    'names': (lambda: {f'a{i}': npy((), bytes(4)) for i in range(101)}, 'at most 100 are read'),
    'terminal': (lambda: {'\x1b[2J': npy((), bytes(4))}, 'not a named array'),
}


@pytest.mark.parametrize('name', NPZ)
def test_an_npz_is_no_larger_than_its_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, 'MOST_ARRAYS', 100)
    make, words = NPZ[name]
    archive(tmp_path / 'w.npz', **make())
    refused(weights.read_arrays, tmp_path / 'w.npz', match=words, kind=PretrainedError)


# PyTorch's pickles, opcode by opcode: what torch.save writes, and what it would not.


def text(value):
    return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def number(value):
    size = value.bit_length() // 8 + 1
    return b'\x8a' + bytes([size]) + value.to_bytes(size, 'little', signed=True)


def group(*items):
    return b'(' + b''.join(items) + b't'


def named(module, name):
    return f'c{module}\n{name}\n'.encode()


def storage(key='0', numel=6, kind='FloatStorage', *view):
    stored = (text('storage'), named('torch', kind), text(key), text('cpu'), number(numel))
    return group(*stored, *view) + b'Q'


HOOKS = named('collections', 'OrderedDict') + b')R'
FALSE, NONE = b'\x89', b'N'


def tensor_of(stored, offset=0, shape=(2, 3), strides=(3, 1)):
    shape, strides = (group(*map(number, numbers)) for numbers in (shape, strides))
    made = group(stored, number(offset), shape, strides, FALSE, HOOKS)
    return named('torch._utils', '_rebuild_tensor_v2') + made + b'R'


def program(*values):
    """Of a state dict with these values, 'a', 'b' ..."""
    items = b''.join(text(key) + value for key, value in zip('abcdef', values, strict=False))
    return b'\x80\x02}(' + items + b'u.'


DATA = {'0': np.arange(6, dtype='<f4').tobytes()}


def write_archive(path, content, data, **more):
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('w/data.pkl', content)
        for key, numbers in data.items():
            file.writestr(f'w/data/{key}', numbers)
        for key, value in more.items():
            file.writestr(f'w/{key}', value)


def write_stream(path, content, data, *, magic=0x1950A86A20F9469CFC6C, order=True, count=None):
    """As PyTorch wrote before 1.6; of four bytes a number."""
    machine = {'protocol_version': 1001, 'little_endian': order}
    head = [pickle.dumps(value, 2) for value in (magic, 1001, machine)]
    counts = [len(numbers) // 4 if count is None else count for numbers in data.values()]
    tail = [
        struct.pack('<q', number) + numbers
        for number, numbers in zip(counts, data.values(), strict=True)
    ]
    path.write_bytes(b''.join((*head, content, pickle.dumps(list(data), 2), *tail)))


WRITERS = {'archive': write_archive, 'stream': write_stream}


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_these_opcodes_are_a_state_dict(tmp_path, write):
    """Whole, transposed, one row of it, one number for all; what the attacks below change."""
    views = [
        tensor_of(storage()),
        tensor_of(storage(), 0, (3, 2), (1, 3)),
        tensor_of(storage(), 3, (3,), (1,)),
        tensor_of(storage(), 5, (4, 4), (0, 0)),
        tensor_of(storage(), 0, (), ()),
        tensor_of(storage(), 9, (0, 3), (3, 1)),
    ]
    write(tmp_path / 'w.pth', program(*views), DATA)
    found = weights.read_arrays(tmp_path / 'w.pth')
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = [whole, whole.T, whole[1], np.full((4, 4), 5), np.float32(0), np.zeros((0, 3))]
    assert list(found) == list('abcdef')
    for array, right in zip(found.values(), expected, strict=True):
        np.testing.assert_array_equal(array, right)
        assert array.dtype == np.float32


HUGE = 2**40
TIED = b'}q\x01)q\x00' + b'h\x00h\x00\x86q\x00' * 200 + b'h\x01h\x00'  # 2**200 empty tuples in one
PICKLES = {
    'shell': (program(named('os', 'system') + group(text('touch x')) + b'R'), "names 'os.system'"),
    'shell by its stack': (
        program(text('os') + text('system') + b'\x93' + group(text('touch x')) + b'R'),
        'the opcode STACK_GLOBAL',
    ),
    'import alone': (program(named('os', 'system')), "names 'os.system'"),
    'eval': (program(named('builtins', 'eval') + group(text('1')) + b'R'), "names 'builtins.eval'"),
    'torch itself': (program(named('torch.hub', 'load')), "names 'torch.hub.load'"),
    'by dots': (program(named('torch', 'FloatStorage.__init__')), 'which is never run'),
    'instance': (program(b'(' + text('x') + b'ios\nsystem\n'), 'the opcode INST'),
    'object': (program(b'(' + named('collections', 'OrderedDict') + b'o'), 'the opcode OBJ'),
    'new object': (program(named('torch', 'FloatStorage') + b')\x81'), 'the opcode NEWOBJ'),
    'extension': (program(b'\x82\x01'), 'the opcode EXT1'),
    'persistent text': (program(b'Pos.system\n'), 'the opcode PERSID'),
    'a call of a type': (program(named('torch', 'FloatStorage') + b')R'), 'it is corrupted'),
    'a call of a text': (program(text('os system') + b')R'), 'it is corrupted'),
    'a call with items': (
        program(named('collections', 'OrderedDict') + group(b']') + b'R'), 'it is corrupted',
    ),
    'attributes of a tensor': (program(tensor_of(storage()) + b'}b'), 'it is corrupted'),
    'a long name': (program(named('x' * 300_000, 'x')), 'which is never run'),
    'terminal': (program(named('\x1b[2J', 'x')), 'which is never run'),
    'no state dict': (b'\x80\x02' + number(1) + b'.', 'holds no state dict'),
    'text in it': (program(text('x')), 'holds no state dict'),
    'a storage alone': (program(storage()), 'holds no state dict'),
    'itself': (b'\x80\x02}q\x00' + text('model') + b'h\x00s.', 'holds no state dict'),
    'offset': (program(tensor_of(storage(), 1)), 'outside its storage'),
    'stride': (program(tensor_of(storage(), 0, (2, 3), (4, 1))), 'outside its storage'),
    'negative offset': (program(tensor_of(storage(), -1)), 'an impossible size'),
    'negative stride': (program(tensor_of(storage(), 5, (2, 3), (-3, 1))), 'an impossible size'),
    'negative shape': (program(tensor_of(storage(), 0, (-2, -3))), 'an impossible size'),
    'shape of text': (
        program(named('torch._utils', '_rebuild_tensor_v2') + group(
            storage(), number(0), group(text('2')), group(number(1))) + b'R'),
        'an impossible size',
    ),
    'no stride': (program(tensor_of(storage(), 0, (2, 3), (3,))), 'an impossible shape'),
    'axes': (program(tensor_of(storage(), 0, (1,) * 60, (1,) * 60)), 'an impossible shape'),
    'overflow': (program(tensor_of(storage(), 0, (2**63, 2), (1, 1))), 'an impossible size'),
    'one number for many': (
        program(tensor_of(storage(), 0, (HUGE, HUGE), (0, 0))), 'claims to hold',
    ),
    'many of one number': (
        program(*[tensor_of(storage(), 0, (2**29,), (0,))] * 2), 'claims to hold',
    ),
    'a long storage': (program(tensor_of(storage(numel=7))), 'longer or shorter'),
    'a short storage': (program(tensor_of(storage(numel=5), 0, (5,), (1,))), 'longer or shorter'),
    'a huge storage': (program(tensor_of(storage(numel=HUGE))), 'longer or shorter'),
    'another type': (program(tensor_of(storage(kind='DoubleStorage'))), 'longer or shorter'),
    'a complex type': (program(tensor_of(storage(kind='ComplexFloatStorage'))), 'never run'),
    'a view of a storage': (program(tensor_of(storage('0', 6, 'FloatStorage', group()))), 'again'),
    'a place outside': (
        program(tensor_of(storage('../../etc/passwd'))), 'no item named|it is corrupted',
    ),
    'a key of tuples': (b'\x80\x02' + TIED + text('x') + b's.', 'it is corrupted'),
    'no mark': (b'\x80\x02t.', 'it is corrupted'),
    'nothing to take': (b'\x80\x02R.', 'it is corrupted'),
    'half a pair': (b'\x80\x02}(' + text('a') + b'u.', 'is not a readable weight file'),
    'what was not kept': (program(b'h\x07'), 'it is corrupted'),
    'kept far away': (program(b']r\xff\xff\xff\xff'), 'holds no state dict'),
    'no end': (b'\x80\x02}', 'is not a readable weight file'),
    'deep': (b'\x80\x02' + b'(' * 10**5 + b't' * 10**5 + b'.', 'holds no state dict'),
    'long': (b'\x80\x02' + b'N' * (10**6 + 1) + b'.', 'more than 1000000 opcodes'),
    'digits': (b'\x80\x02I' + b'9' * 10**6 + b'\n.', 'is not a readable weight file'),
}  # fmt: skip


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize('name', PICKLES)
def test_a_pickle_that_torch_would_not_write_is_refused(tmp_path, name, write):
    content, words = PICKLES[name]
    write(tmp_path / 'w.pth', content, DATA)
    refused(weights.read_arrays, tmp_path / 'w.pth', match=words, kind=PretrainedError)


STREAMS = {
    'another number': ({'magic': 7}, 'PyTorch did not write it'),
    'big-endian': ({'order': False}, 'a big-endian machine'),
    'no order': ({'order': None}, 'a big-endian machine'),
    'negative length': ({'count': -1}, 'longer or shorter'),
    'too long': ({'count': 2**62}, 'longer or shorter'),
}


@pytest.mark.parametrize('name', STREAMS)
def test_an_older_file_is_as_long_as_it_states(tmp_path, name):
    options, words = STREAMS[name]
    write_stream(tmp_path / 'w.pth', program(tensor_of(storage())), DATA, **options)
    refused(weights.read_arrays, tmp_path / 'w.pth', match=words, kind=PretrainedError)


def test_an_archive_is_no_larger_than_its_file_and_of_this_order(tmp_path):
    content, path = program(tensor_of(storage())), tmp_path / 'w.pth'
    write_archive(path, content, DATA, byteorder=b'big')
    refused(weights.read_arrays, path, match='a big-endian machine', kind=PretrainedError)
    write_archive(path, content, {**DATA, '1': b''}, **{'code/data.pkl': content})
    refused(weights.read_arrays, path, match=r'without a data\.pkl', kind=PretrainedError)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('w/data.pkl', program(tensor_of(storage(numel=2**25))))
        file.writestr('w/data/0', bytes(2**27))
    refused(weights.read_arrays, path, match='claims to hold', kind=PretrainedError)


@pytest.mark.stress
@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_a_file_that_is_cut_or_changed_anywhere_is_read_or_refused(tmp_path, write):
    path = tmp_path / 'w.pth'
    write(path, program(tensor_of(storage()), tensor_of(storage(), 3, (3,), (1,))), DATA)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(weights.read_arrays, path, kind=PretrainedError)
    rng = np.random.default_rng(0)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        with contextlib.suppress(PretrainedError):
            weights.read_arrays(path)


def tensor(shape, start, end):
    return json.dumps({'dtype': 'F32', 'shape': shape, 'data_offsets': [start, end]})


HEADERS = {
    'overlap': f'{{"a": {tensor([2], 0, 8)}, "b": {tensor([2], 4, 12)}}}',
    'out of range': f'{{"a": {tensor([10**6], 0, 4 * 10**6)}}}',
    'negative': f'{{"a": {tensor([-2], 0, 8)}}}',
    'huge': f'{{"a": {tensor([2**62, 4], 0, 16)}}}',
    'deep': '[' * 10**5 + ']' * 10**5,
}


@pytest.mark.parametrize('name', [*HEADERS, 'length'])
def test_a_safetensors_header_is_not_believed(tmp_path, name):
    head = HEADERS.get(name, '{}').encode()
    size = 2**60 if name == 'length' else len(head)
    path = tmp_path / 'w.safetensors'
    path.write_bytes(struct.pack('<Q', size) + head + bytes(16))
    refused(weights.read_arrays, path, match='readable weight file', kind=PretrainedError)


@pytest.mark.parametrize('kind', ['external', 'soft', 'loop', 'huge', 'raw', 'virtual', 'many'])
def test_an_h5_leads_to_no_other_file_and_no_larger_one(tmp_path, kind):
    h5py = pytest.importorskip('h5py', reason='h5py reads .h5')
    with h5py.File(tmp_path / 'secret.h5', 'w') as file:
        file['x'] = np.zeros((3, 3, 3, 64), np.float32)
    (tmp_path / 'secret').write_bytes(bytes(6912))
    with h5py.File(tmp_path / 'w.h5', 'w') as file:
        file.attrs['layer_names'] = ['l']
        group, name = file.create_group('l'), 'l/kernel:0'
        group.attrs['weight_names'] = [name]
        inner = group.create_group('l')
        shape, dtype = (3, 3, 3, 64), np.float32
        if kind == 'external':
            inner['kernel:0'] = h5py.ExternalLink(str(tmp_path / 'secret.h5'), '/x')
        elif kind == 'soft':
            inner['kernel:0'] = h5py.SoftLink('/l')
        elif kind == 'loop':
            inner['kernel:0'] = h5py.SoftLink('/l/l/kernel:0')
        elif kind == 'huge':
            inner.create_dataset('kernel:0', (10**6, 10**6), dtype, chunks=(10, 10))
        elif kind == 'raw':
            where = [(str(tmp_path / 'secret'), 0, 6912)]
            inner.create_dataset('kernel:0', shape, dtype, external=where)
        elif kind == 'virtual':
            layout = h5py.VirtualLayout(shape, dtype)
            layout[:] = h5py.VirtualSource(str(tmp_path / 'secret.h5'), 'x', shape)
            inner.create_virtual_dataset('kernel:0', layout)
        else:  # one dataset under many names
            inner.create_dataset('0', (10**6,), dtype, chunks=True, compression='gzip')
            for i in range(1, 100):
                inner[f'{i}'] = inner['0']
            group.attrs['weight_names'] = [f'l/{i}' for i in range(100)]
    words = {'raw': 'other files', 'virtual': 'other files'} | dict.fromkeys(
        ('external', 'soft', 'loop'), 'is a link'
    )
    told = refused(weights.read_arrays, tmp_path / 'w.h5', kind=PretrainedError)
    assert words.get(kind, 'claims to hold') in told


NAMES = [
    *(f'features.{n}.{kind}' for n in (0, 2, 5) for kind in ('weight', 'bias', 'running_mean')),
    'conv1.weight', 'bn1.weight', 'layer1.0.conv1.weight', 'layer1.0.conv1.num', 'fc.weight',
    'block1_conv1/kernel', 'block1_conv1/bias', 'block1_conv1/gamma', 'conv1_conv/kernel',
    'conv1_conv/bias', 'conv1_bn/moving_mean', 'conv1_bn/gamma', 'Conv1/kernel', 'conv6/kernel',
    'conv5_4/kernel', 'conv1_1_3x3_s2/kernel', 'expanded_conv_depthwise/depthwise_kernel',
    'layer9.0.conv1.weight', 'layer1.99999999.conv1.weight', 'encoder.conv1.weight', '', '/', '.',
]  # fmt: skip
KINDS = (
    'vgg16', 'resnet', 'resnet of Keras', 'mobilenet_v2 of Keras', 'pspnet of semseg',
    'pspnet of image-segmentation-keras',
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 5), max_size=5).map(tuple)


@settings(
    max_examples=100, derandomize=True, database=None, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.dictionaries(st.sampled_from(NAMES), SHAPES, max_size=8))
def test_arrays_of_any_shape_under_known_names_fit_or_are_refused(shapes):
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    variables = fuzz_state._network()[0]
    for kind in KINDS:
        with contextlib.suppress(PretrainedError):
            weights.load_network(variables, arrays, weights.TABLES[kind])
        with contextlib.suppress(PretrainedError):
            weights.network_options(arrays, kind)
