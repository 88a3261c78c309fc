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

from experiments import fuzz_state
from pspnet_jax.errors import PretrainedError
from pspnet_jax.models import pretrained
from tests.conftest import ROOT, refused


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
            if name == 'importlib.import_module' or (name, path.name) == ('_imported', 'files.py'):
                assert constant or path.name == 'files.py', where
                assert constant or ast.unparse(node.args[0]) == 'name', where
            if name == 'torch.load':
                assert ast.unparse(given_by['weights_only']) == 'True', where
            if name == 'np.load':
                assert ast.unparse(given_by['allow_pickle']) == 'False', where


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'npz', 'npz of pickles'])
def test_a_pickle_that_calls_the_shell_is_not_run(tmp_path, kind):
    marker, content = tmp_path / 'marker', io.BytesIO()
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
        torch = pytest.importorskip('torch', reason='PyTorch reads .pth')
        path, state = tmp_path / 'w.pth', {'a': torch.zeros(2), 'b': Harm(marker)}
        torch.save(state, content, _use_new_zipfile_serialization=kind == 'zip')
        path.write_bytes(content.getvalue())
    told = refused(pretrained.read_arrays, path, kind=PretrainedError)
    assert 'weights_only' not in told  # PyTorch's words say how to run it all the same
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
    'absurd shape': (lambda: {'a': npy((10**6, 10**6), bytes(8))}, 'not the size of its shape'),
    'negative shape': (lambda: {'a': npy((-2, -2), bytes(16))}, 'readable weight file'),
    'names': (lambda: {f'a{i}': npy((), bytes(4)) for i in range(101)}, 'at most 100 are read'),
    'terminal': (lambda: {'\x1b[2J': npy((), bytes(4))}, 'not a named array'),
}


@pytest.mark.parametrize('name', NPZ)
def test_an_npz_is_no_larger_than_its_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(pretrained, 'MOST_ARRAYS', 100)
    make, words = NPZ[name]
    archive(tmp_path / 'w.npz', **make())
    refused(pretrained.read_arrays, tmp_path / 'w.npz', match=words, kind=PretrainedError)


def test_a_long_name_of_code_is_refused_at_once(tmp_path):
    """PyTorch 2.13 searches its own message for it in the square of its length: hours."""
    torch = pytest.importorskip('torch', reason='PyTorch reads .pth')
    torch.save({'a': torch.zeros(1)}, tmp_path / 'good.pth')
    assert list(pretrained.read_arrays(tmp_path / 'good.pth')) == ['a']
    with (
        zipfile.ZipFile(tmp_path / 'good.pth') as good,
        zipfile.ZipFile(tmp_path / 'w.pth', 'w') as bad,
    ):
        for name in good.namelist():
            long = b'\x80\x02c' + b'x' * 300_000 + b'\nx\n.'
            bad.writestr(name, long if name.endswith('.pkl') else good.read(name))
    refused(pretrained.read_arrays, tmp_path / 'w.pth', match='it names code')


def test_one_number_of_a_pth_is_not_taken_for_a_million_millions(tmp_path):
    torch = pytest.importorskip('torch', reason='PyTorch writes .pth')
    torch.save({'a': torch.zeros(1, dtype=torch.half).expand(10**6, 10**6)}, tmp_path / 'w.pth')
    refused(pretrained.read_arrays, tmp_path / 'w.pth', match='claims to hold')


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
    refused(pretrained.read_arrays, path, match='readable weight file', kind=PretrainedError)


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
    told = refused(pretrained.read_arrays, tmp_path / 'w.h5', kind=PretrainedError)
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
            pretrained.load_network(variables, arrays, pretrained.SOURCES[kind])
        with contextlib.suppress(PretrainedError):
            pretrained.network_options(arrays, kind)
