"""State from a stranger, checkpoints and exports and a run's own files: as data, or refused."""

import contextlib
import copy
import io
import json
import os
import random
import re
import shutil

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pspnet_jax import config
from pspnet_jax.data import lgg
from pspnet_jax.evaluation import charts
from pspnet_jax.inference import calibration
from pspnet_jax.runtime import checkpoint, faults, log
from pspnet_jax.runtime.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    PspnetError,
)
from pspnet_jax.serving import read, stablehlo
from tests.conftest import refused
from tests.stress import fuzz, fuzz_state, mutate

often = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


# Nothing is run.


def test_a_checkpoint_names_code_in_vain(stranger, tmp_path, monkeypatch):
    marker = tmp_path / 'marker'
    (tmp_path / 'harm.py').write_text(f'open({str(marker)!r}, "w")')
    monkeypatch.syspath_prepend(tmp_path)
    for path in stranger.rglob('*METADATA'):
        text = re.sub(r'"orbax[^"]*Handler"', '"harm.Handler"', path.read_text())
        path.write_text(text.replace('"np.ndarray"', '"harm.Array"'))
    with contextlib.suppress(PspnetError):
        fuzz_state.read_checkpoint(stranger)
    assert not marker.exists()


def test_a_program_that_calls_out_is_refused():
    """XLA calls what a custom call names, such as a Python callback at an address."""

    def calls_out(image):
        return jax.ffi.ffi_call('harm', jax.ShapeDtypeStruct((1, 32, 32, 2), np.float32))(image)

    shape = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    allowed = [jax.export.DisabledSafetyCheck.custom_call('harm')]
    for function, foreign in ((fuzz_state._tiny, set()), (calls_out, {'harm'})):
        exported = jax.export.export(jax.jit(function), disabled_checks=allowed)(shape)
        assert stablehlo.foreign_operations(exported.mlir_module_serialized) == foreign


@pytest.mark.parametrize('fate', ['os.abort()', 'time.sleep(60)'])
def test_a_program_that_ends_or_stops_the_parser_is_refused(monkeypatch, fate):
    """As damaged ones do to MLIR's; the next one is read as if nothing had happened."""
    exported = jax.export.export(jax.jit(fuzz_state._tiny))(
        jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    )
    stablehlo._stop()
    fatal = f'import os, sys, time; print("ready", flush=True); sys.stdin.read(1); {fate}'
    with monkeypatch.context() as patch:
        patch.setattr(stablehlo, 'ANSWER', fatal)
        patch.setattr(stablehlo, 'SECONDS', 0.2)
        with pytest.raises(ExportError, match='StableHLO program can not be parsed'):
            stablehlo.check(exported.mlir_module_serialized)
    stablehlo.check(exported.mlir_module_serialized)
    with pytest.raises(ExportError, match='StableHLO program can not be parsed'):
        stablehlo.check(b'ML\xefR' + bytes(100))


# Checkpoints and configs.


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return fuzz_state._checkpoints(tmp_path_factory.mktemp('saved'))[0]


@pytest.fixture
def stranger(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / 'stranger')


def test_the_names_of_steps_are_plain_numbers(stranger):
    folder = stranger / 'checkpoints'
    for name in ('³', '٣', '9' * 200, '007', '-1', '5000000000', '1e3', ' 3'):
        (folder / name).mkdir()
    assert checkpoint.steps(stranger) == [7]
    fuzz_state.read_checkpoint(stranger)
    for which in ('³', '٣', '9' * 5000, '007'):
        refused(checkpoint.candidates, stranger, which, kind=CheckpointError)


def test_links_and_pipes_in_a_checkpoint_are_refused(stranger):
    folder = stranger / 'checkpoints' / '7'
    places = [folder / '_CHECKPOINT_METADATA', folder / 'params' / 'manifest.ocdbt']
    for path in places:
        for instead in (os.mkfifo, lambda path: path.symlink_to('/dev/zero')):
            os.rename(path, stranger / 'kept')
            instead(path)
            refused(fuzz_state.read_checkpoint, stranger, match='a link or device')
            path.unlink()
            os.rename(stranger / 'kept', path)
    fuzz_state.read_checkpoint(stranger)


def change_array(folder, change):
    """Rewrite the first array's description in a part of a checkpoint."""
    import tensorstore

    kept = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': folder.as_uri()}).result()
    (name,) = [name for name in kept.list().result() if name.endswith(b'zarr.json')]
    tree = json.loads(kept.read(name).result().value)
    change(tree)
    kept.write(name, json.dumps(tree).encode()).result()


def test_an_array_of_absurd_pieces_or_shape_is_refused_before_it_is_made(stranger):
    """TensorStore makes a piece whole before it reads: of 320 TB, it ends the process."""

    def pieces(tree):
        tree['chunk_grid']['configuration']['chunk_shape'] = [10**4, 10**4, 10**3, 800]
        tree['codecs'] = tree['codecs'][0]['configuration']['codecs']

    def shape(tree):
        tree['shape'] = [10**5, 10**5, 3, 4]

    meta = checkpoint.metadata(stranger, 7)
    here = {'params': {'conv': {'kernel': jax.ShapeDtypeStruct((10**5, 10**5, 3, 4), np.float32)}}}
    refused(checkpoint.restore_variables, stranger, 7, here, meta, match='a file of its size')
    shapes = {'params': fuzz_state.TREE}
    for change, words in (
        (shape, 'can not be read'),
        (pieces, 'in pieces that pspnet_jax never writes'),
    ):
        change_array(stranger / 'checkpoints' / '7' / 'params', change)
        refused(checkpoint.restore_variables, stranger, 7, shapes, meta, match=words)


def test_a_strangers_config_is_held_to_its_ranges():
    whole = fuzz_state._config()
    for section, knob, value in (
        ('eval', 'batch_size', 10**9), ('eval', 'bootstrap', 10**9), ('predict', 'window', 10**9),
        ('phantom', 'size', 10**6), ('data', 'size', [10**6, 10**6]), ('crf', 'window', 10**6),
        ('predict', 'scales', [1e9]), ('predict', 'scales', [1.0] * 10**6), ('model', 'bins', [0]),
        ('model', 'output_stride', 8.0), ('model', 'width', 10**300), ('model', 'name', ['unet']),
        ('loss', 'dice', float('inf')), ('model', 'class_names', ['x' * 10**6, 'b']),
        ('model', 'class_names', ['a\nb', 'b']), ('data', 'source', 'a\0b'),
        ('model', '__class__', 'os.system'), ('model', 'scales', {'a': {'b': 1}}),
    ):  # fmt: skip
        tree = copy.deepcopy(whole)
        tree[section][knob] = value
        with pytest.raises(ConfigError) as told:
            config.from_dict(tree)
        assert not fuzz.fault_of(told.value)
        assert f'{section}.{knob} is' in str(told.value)
    for key in ('__class__', 'model.name', 'x'):
        with pytest.raises(ConfigError):
            config.from_dict({**whole, key: 'unet'})
    for tree in ([], None, 'x', {**whole, 'model': []}, {**whole, 'seed': {}}):
        refused(config.from_dict, tree, kind=ConfigError)


# A run's own files.


@pytest.mark.parametrize(
    'text',
    ['NaN', '{"step": 7, "temperature": NaN}', '{"step": 7, "temperature": -1}', '[1, 2]', '{}',
     '{"step": 7, "temperature": 1e400}', '{"step": 1e400, "temperature": 1.0}', '"\ud800"', '',
     '{"step": "7", "temperature": 1.0}', '{"step": 7, "temperature": true}', '[' * 50_000, '\0',
     '{"step": 7, "temperature": ' + '9' * 5000 + '}'],
)  # fmt: skip
def test_a_temperature_is_a_number_of_its_range(tmp_path, text):
    path = tmp_path / calibration.KEPT
    path.write_bytes(text.encode('utf-8', 'surrogatepass'))
    refused(calibration.load, tmp_path, 7, kind=DataError, match='delete it|is not UTF-8')
    path.unlink()
    os.mkfifo(path)
    refused(
        calibration.load,
        tmp_path,
        7,
        kind=DataError,
        match='is not a file: delete it, or make it again with',
    )


LINES = [b'{"step": 3, "lo', b'\xff\xfe\x00', b'[' * 50_000, b'[]', b'3', b'{"loss": 1.0}', b'',
         b'{"step": "3"}', b'{"step": 3, "loss": 1e999}', b'{"step": 3, "loss": NaN}',
         b'{"step": 3, "loss": "<script>"}', b'{"step": -1}', b'{"step": 1e3}', b'x' * 10**6,
         b'{"step": ' + b'9' * 5000 + b'}', b'{"step": 3, "loss": [1]}']  # fmt: skip


def test_of_metrics_only_records_are_taken(tmp_path):
    """Between the lines that are none, too."""
    good = [b'{"step": 1, "loss": 0.5}', b'{"step": 2, "loss": null}']
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'\n'.join([good[0], *LINES, good[1]]))
    assert log.read(tmp_path) == [{'step': 1, 'loss': 0.5}, {'step': 2, 'loss': None}]
    target = tmp_path / 'target'
    target.write_text('mine')
    (tmp_path / 'metrics.tmp').symlink_to(target)
    log.MetricLog(tmp_path, 1).close()
    assert path.read_bytes() == good[0] + b'\n'
    assert target.read_text() == 'mine'
    path.unlink()
    os.mkfifo(path)
    assert log.read(tmp_path) == []


FIGURE = st.none() | st.floats(-1e39, 1e39, allow_nan=False) | st.integers(-(10**38), 10**38)


@settings(often, max_examples=50)
@given(st.lists(st.fixed_dictionaries({'step': st.integers(0, 2**31 - 1), 'loss': FIGURE})))
def test_every_record_can_be_drawn(records):
    for each in charts.run_charts(records):
        charts.svg(each)


def test_a_lock_that_leads_elsewhere_is_not_written_to(tmp_path):
    target = tmp_path / 'target'
    target.write_text('mine')
    (tmp_path / faults.LOCK).symlink_to(target)
    with pytest.raises(ConfigError, match='a link or device'), faults.locked(tmp_path):
        pass
    assert target.read_text() == 'mine'
    (tmp_path / faults.LOCK).unlink()
    for text in ('[' * 9000, '{"process": 1e999}', '{"process": 1, "host": "\\n", "since": 1}'):
        (tmp_path / faults.LOCK).write_text(text)
        assert faults._owner(tmp_path / faults.LOCK) == ''
        with faults.locked(tmp_path):
            pass


# Exported files.


def test_an_onnx_file_reaches_no_other(tmp_path):
    onnx = pytest.importorskip('onnx', reason='onnx writes .onnx')
    pytest.importorskip('onnxruntime', reason='onnxruntime reads .onnx')
    (path,) = fuzz_state._onnx(tmp_path)
    read.read(path)
    model = onnx.load(path)
    weights = max(model.graph.initializer, key=lambda x: len(x.raw_data))
    (tmp_path / 'secret').write_bytes(weights.raw_data)
    weights.ClearField('raw_data')
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key='location', value='secret')
    path.write_bytes(model.SerializeToString())
    refused(read.read, path, kind=ExportError)


# A built data set.


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp('built')
    (folder / 'seeds').mkdir()
    return fuzz_state._built(folder / 'seeds')[0]


def test_a_built_data_set_names_code_in_vain_and_is_refused_where_damaged(
    built, tmp_path, monkeypatch
):
    copied = shutil.copytree(built, tmp_path / 'built')
    marker = tmp_path / 'marker'
    (tmp_path / 'harm.py').write_text(f'open({str(marker)!r}, "w")')
    monkeypatch.syspath_prepend(tmp_path)
    (features,) = copied.rglob('features.json')
    features.write_text(
        re.sub(r'"tensorflow_datasets[^"]*"', '"harm.Feature"', features.read_text())
    )
    slices = lgg.load('', str(copied))
    assert not marker.exists()
    assert len(slices.key) == 4
    (record,) = copied.rglob('*test*.array_record*')
    data = record.read_bytes()
    record.write_bytes(data[:-20])
    refused(lgg.load, '', str(copied), kind=DataError, match='remove the folder')
    record.write_bytes(data)
    os.mkfifo(features.with_name('pipe'))
    refused(lgg.load, '', str(copied), kind=DataError, match='pipe is not a file')


@pytest.mark.parametrize(
    ('kind', 'size', 'mode'),
    [('EPS', lgg.SIZE, 'RGB'), ('PNG', (9, 9), 'RGB'), ('PNG', lgg.SIZE, 'L')],
)
def test_a_record_is_a_png_of_its_size(kind, size, mode):
    """Pillow gives EPS to another program, and a size is believed."""
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    with pytest.raises((DataError, OSError)):
        lgg._decode(file.getvalue(), 'RGB')


# Anything else.


@pytest.mark.stress
@pytest.mark.parametrize('name', fuzz_state.READERS)
def test_mutated_files_are_read_or_refused(name, tmp_path):
    """tests.stress.fuzz has thousands each, in a process of its own with limits."""
    for module in {'onnx': ('onnx', 'onnxruntime'), 'pth': ('torch',), 'h5': ('h5py',)}.get(
        name, ()
    ):
        pytest.importorskip(module, reason=f'{module} reads them')
    seeds, read = fuzz_state.READERS[name]
    (tmp_path / 'seeds').mkdir()
    valid = mutate.load(seeds(tmp_path / 'seeds'))
    for number in range(200):
        rng = random.Random(f'test {name} {number}')
        path = mutate.write(mutate.change(valid, rng), fuzz.fresh(tmp_path / 'case'))
        kind, wrong = fuzz.attempt(read, path)
        assert kind in ('accepted', 'refused'), f'input {number}: {wrong}'
