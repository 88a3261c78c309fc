"""Exported files give what the model gives, elsewhere, at sizes it was not exported at."""

import functools
import json
import os
import re
import subprocess
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import pspnet_jax
from pspnet_jax import models
from pspnet_jax.config import to_dict
from pspnet_jax.data import volumes
from pspnet_jax.inference import infer, predictors, saved
from pspnet_jax.inference.runs import open_run
from pspnet_jax.models import layers
from pspnet_jax.models.weights import IMAGENET
from pspnet_jax.runtime import checkpoint
from pspnet_jax.runtime.compilation import jit
from pspnet_jax.runtime.errors import CheckpointError, ConfigError, DataError, ExportError
from pspnet_jax.serving import export, onnx_graph, read
from tests.conftest import ROOT, random_variables, slow_but, tiny_config

# Every network, and what makes it small. All are exported with symbols for batch, height and
# width; a network that can not be is to be listed here with what it can.
SMALL = {
    'fcn32s': {'fc_features': 8},
    'fcn16s': {'fc_features': 8},
    'fcn8s': {'backbone': 'mobilenet_v2'},
    'fcn': {'backbone': 'resnet18'},
    'unet': {},
    'unet_mini': {},
    'segnet': {},
    'dilated': {'fc_features': 8},
    'deeplab_v1': {'fc_features': 8},
    'deeplab_v2': {'backbone': 'resnet18', 'rates': (2, 3)},
    'refinenet': {'backbone': 'resnet18'},
    'pspnet': {'backbone': 'resnet18'},
    'deeplab_v3': {'backbone': 'resnet18'},
    'deeplab_v3plus': {'backbone': 'resnet18'},
    'vgg_pspnet_blog': {},
}
VARIANTS = {
    'unet on a backbone': ('unet', {'backbone': 'resnet18'}),
    'segnet without indices': ('segnet', {'backbone': 'resnet18'}),
    'deeplab_v3 of torchvision': ('deeplab_v3', {'backbone': 'resnet18', 'variant': 'torchvision'}),
}
CASES = {name: (name, options) for name, options in SMALL.items()} | VARIANTS
FIXED = IMAGENET.intensity(3)


def small(case):
    name, options = CASES[case]
    return models.create(name, num_classes=3, width=4, **options)


def images(*shape):
    return export.sample_images(shape[3], shape[1:3], shape[0])


@functools.cache
def served(case):
    """(function to export, images at an odd size, what the model gives for them)."""
    model = small(case)
    # refinenet has no BatchNorm in its units: with a gain of 2 nothing is left to be unsure of.
    variables = random_variables(model, gain=1.0 if case == 'refinenet' else 2.0)
    function = functools.partial(
        export.serve, variables=variables, model=model, intensity=FIXED, crf_options=None
    )
    image = images(2, 45, 52, 3)
    predict = jit(functools.partial(infer.probabilities, model=model))
    expected = np.asarray(predict(variables, volumes.normalize(image, FIXED)))
    assert expected.std(axis=(0, 1, 2)).min() > 1e-4, expected.std(axis=(0, 1, 2))
    return function, image, expected


def onnx_session(model):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime runs the file')
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=['CPUExecutionProvider']
    )


def test_every_network_is_in_the_table():
    assert list(SMALL) == list(models.MODELS)


@pytest.mark.parametrize('case', slow_but(CASES, 'unet_mini'))
def test_stablehlo_is_the_network_at_any_size(case):
    function, image, expected = served(case)
    exported = export.to_stablehlo(function, 3)
    assert exported.platforms == ('cpu', 'cuda', 'tpu')
    np.testing.assert_allclose(exported.call(image), expected, atol=2e-5)


@pytest.mark.parametrize('case', slow_but(CASES, 'unet_mini'))
def test_onnx_is_the_network_at_any_batch(case):
    pytest.importorskip('onnx', reason='onnx writes the file')
    function, image, expected = served(case)
    session = onnx_session(export.to_onnx(function, 3, (45, 52), {}))
    for batch in (2, 1):
        (prob,) = session.run(None, {'image': image[:batch]})
        np.testing.assert_allclose(prob, expected[:batch], atol=2e-5)


# ---- sizes that are symbols -----------------------------------------------------------------


def at_sizes(function, sizes):
    """`function` of two symbols, evaluated at each pair of sizes."""
    a, b = jax.export.symbolic_shape('a, b')
    spec = jax.ShapeDtypeStruct((a, b), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: function(*x.shape)))(spec)
    return [np.asarray(exported.call(np.zeros(size, np.float32))) for size in sizes]


@pytest.mark.newest
@pytest.mark.parametrize('align_corners', [True, False])
def test_a_resize_matrix_of_symbols_is_that_of_numbers(align_corners):
    sizes = [(1, 4), (5, 1), (3, 17), (9, 4), (60, 473), (473, 60), (128, 2048)]
    resize_matrix = functools.partial(layers.resize_matrix, align_corners=align_corners)
    for size, matrix in zip(sizes, at_sizes(resize_matrix, sizes), strict=True):
        np.testing.assert_allclose(matrix, resize_matrix(*size), atol=1e-6)


@pytest.mark.newest
@pytest.mark.parametrize('bins', [1, 3, 6])
def test_a_pooling_matrix_of_symbols_is_that_of_numbers(bins):
    sizes = [(1, 1), (5, 1), (17, 1), (60, 1)]
    matrices = at_sizes(lambda a, b: layers.adaptive_pool_matrix(a, bins), sizes)
    for (size, _), matrix in zip(sizes, matrices, strict=True):
        np.testing.assert_array_equal(matrix, layers.adaptive_pool_matrix(size, bins))


@pytest.mark.newest
@pytest.mark.parametrize('scale', [0.5, 0.75, 1.25])
def test_a_scaled_symbol_is_rounded_as_a_number(scale):
    sizes = [(size, 1) for size in range(1, 13)]
    found = at_sizes(lambda a, b: jnp.asarray(layers.scaled(a, scale)), sizes)
    assert [int(n) for n in found] == [round(size * scale) for size, _ in sizes]


# ---- intensities in the graph ---------------------------------------------------------------


def some_volumes():
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 256, (3, 9, 11, 2), np.uint8)
    mostly_black = np.where(rng.random((2, 40, 30, 1)) < 0.3, 200, 0).astype(np.uint8)
    hardly_any = np.where(rng.random((2, 40, 30, 1)) < 0.004, 255, 7).astype(np.uint8)
    yield 'noise', noise
    yield 'two values', mostly_black
    yield 'all but constant', hardly_any
    yield 'constant', np.full((1, 8, 8, 3), 93, np.uint8)
    yield 'blocks', export.sample_images(3, (50, 37), 4)
    yield 'one pixel', np.array([[[[3, 250]]]], np.uint8)


@pytest.mark.parametrize(('name', 'volume'), [*some_volumes()])
def test_intensity_in_the_graph_is_that_of_numpy(name, volume):
    measured = jit(export.measure_intensity)(volume)
    np.testing.assert_allclose(measured, volumes.measure_intensity(volume), rtol=2e-6, atol=1e-5)


def test_a_volume_measured_by_onnx_is_that_of_numpy():
    pytest.importorskip('onnx', reason='onnx writes the file')

    def spread(image):
        return jnp.broadcast_to(
            export.measure_intensity(image)[None], (image.shape[0], 4, image.shape[3])
        )

    session = onnx_session(export.to_onnx(spread, 3, (50, 37), {}))
    for batch in (4, 1):
        volume = images(batch, 50, 37, 3)
        (measured,) = session.run(None, {'image': volume})
        expected = np.broadcast_to(volumes.measure_intensity(volume), measured.shape)
        np.testing.assert_allclose(measured, expected, rtol=2e-6, atol=1e-5)


# ---- files ----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A workdir whose checkpoint has a fixed normalisation, as converted weights have."""
    return save_published(tmp_path_factory.mktemp('published'))


def save_published(workdir, **more):
    config = tiny_config(**{'model.num_classes': 4, 'model.width': 4})
    variables = random_variables(models.create(**config.model))
    state = types.SimpleNamespace(**variables, ema_params=None, opt_state=None)
    writer = checkpoint.Writer(workdir)
    inputs = {'channels': 3, 'normalization': IMAGENET._asdict(), **more}
    progress = {'best_dice': None, 'stale': 0}
    checkpoint.save(
        writer, 7, state, config=to_dict(config), progress=progress, inputs=inputs, dice=None
    )
    writer.close()
    return workdir


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
    """{format: file} of the tiny run, whose volumes each have their own intensity."""
    folder = tmp_path_factory.mktemp('exported')

    @functools.cache
    def file(fmt):
        if fmt == 'onnx':
            pytest.importorskip('onnx', reason='onnx writes the file')
            pytest.importorskip('onnxruntime', reason='onnxruntime reads it again')
        output = folder / export.FILES[fmt]
        return export.export_checkpoint(trained[0], fmt, output=output, size=(40, 48))

    return file


def expected_of(workdir, image):
    """As `evaluate` predicts a volume, in numpy but for the network."""
    run = open_run(workdir)
    intensity = run.intensity
    if intensity is None:
        intensity = volumes.measure_intensity(image)
    predict = infer.compile_predict(run.model, crf_options=run.config.crf)
    return predict(run.variables, volumes.normalize(image, intensity))


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.parametrize('fmt', export.FILES)
def test_a_file_read_here_is_the_model(exported, trained, fmt):
    predict, metadata = read.read(exported(fmt))
    image = images(3, 40, 48, 3)
    np.testing.assert_allclose(predict(image), expected_of(trained[0], image), atol=1e-5)
    assert metadata['format'] == fmt
    assert metadata['classes'] == 2
    assert metadata['pspnet_jax'] == pspnet_jax.__version__
    assert metadata['normalization']['kind'] == 'volume'
    assert metadata['step'] in checkpoint.steps(trained[0])
    assert metadata['config'] == checkpoint.metadata(trained[0], metadata['step'])['config']
    assert metadata['sizes']['height'] == (40 if fmt == 'onnx' else 'any from 32')


@pytest.mark.slow
@pytest.mark.parametrize('fmt', export.FILES)
def test_a_fixed_normalisation_makes_images_independent(published, tmp_path, fmt):
    if fmt == 'onnx':
        pytest.importorskip('onnx', reason='onnx writes the file')
        pytest.importorskip('onnxruntime', reason='onnxruntime reads it again')
    output = tmp_path / export.FILES[fmt]
    export.export_checkpoint(published, fmt, output=output, size=(32, 48))
    predict, metadata = read.read(output)
    image = images(2, 32, 48, 3)
    prob = predict(image)
    assert prob.shape == (2, 32, 48, 4)
    np.testing.assert_allclose(prob, expected_of(published, image), atol=1e-5)
    np.testing.assert_allclose(prob[:1], predict(image[:1]), atol=1e-5)
    assert metadata['normalization']['kind'] == 'fixed'
    np.testing.assert_allclose(metadata['normalization']['mean'], IMAGENET.mean, rtol=1e-6)
    assert metadata['step'] == 7


@pytest.mark.slow
def test_a_measure_of_the_head_is_left_to_those_who_read_the_parameters(tmp_path):
    workdir = save_published(tmp_path, normalization='buda')
    for fmt in ('stablehlo', 'onnx'):
        with pytest.raises(
            ConfigError, match=r"'buda' can not be exported as .* --format=savedparams"
        ):
            export.export_checkpoint(workdir, fmt)
    export.export_checkpoint(workdir, 'savedparams', size=(32, 48))
    predict, metadata = read.read(workdir / export.FILES['savedparams'])
    assert metadata['normalization']['kind'] == 'buda'
    image = images(2, 32, 48, 3)
    image[:, :9] = 4  # dark: outside the head
    run = open_run(workdir)
    normal = volumes.normalize(image, volumes.measure_head([image]))
    expected = infer.compile_predict(run.model)(run.variables, normal)
    np.testing.assert_allclose(predict(image), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('fmt', export.FILES)
def test_a_run_on_images_of_more_than_8_bits_takes_them_as_they_are(tmp_path, fmt):
    if fmt == 'onnx':
        pytest.importorskip('onnx', reason='onnx writes the file')
        pytest.importorskip('onnxruntime', reason='onnxruntime reads it again')
    workdir = save_published(tmp_path, range=[[-1000.0] * 3, [3080.0] * 3])
    export.export_checkpoint(workdir, fmt, size=(32, 48))
    predict, metadata = read.read(workdir / export.FILES[fmt])
    assert metadata['input']['dtype'] == 'float32'
    eight = images(2, 32, 48, 3)
    deep = (-1000 + 16 * eight.astype(np.float32)).astype(np.float32)
    expected = expected_of(workdir, deep)
    np.testing.assert_allclose(predict(deep), expected, atol=1e-5)
    # What the network sees is what one on 8 bits sees of the picture with 8.
    save_published(tmp_path / 'eight')
    np.testing.assert_allclose(expected_of(tmp_path / 'eight', eight), expected, atol=1e-4)
    if fmt == 'savedparams':
        with pytest.raises(DataError, match='the image has 8 bits, but the run was trained on'):
            predict(eight)


ONLY_JAX = """
import sys, zipfile
for name in ('pspnet_jax', 'flax', 'safetensors', 'ml_collections'):
    sys.modules[name] = None  # an import of it fails
import numpy as np
from jax import export
with zipfile.ZipFile(sys.argv[1]) as file:
    exported = export.deserialize(bytearray(file.read('model.stablehlo')))
assert exported.platforms == ('cpu', 'cuda', 'tpu'), exported.platforms
images = np.load(sys.argv[2])
np.savez(sys.argv[3], **{name: exported.call(images[name]) for name in images.files})
"""


@pytest.mark.slow
@pytest.mark.newest
def test_stablehlo_needs_nothing_but_jax(exported, trained, tmp_path):
    shapes = [(1, 40, 48, 3), (3, 65, 33, 3)]
    np.savez(tmp_path / 'in.npz', **{str(i): images(*shape) for i, shape in enumerate(shapes)})
    paths = [exported('stablehlo'), tmp_path / 'in.npz', tmp_path / 'out.npz']
    command = [sys.executable, '-c', ONLY_JAX, *map(str, paths)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / 'out.npz') as out:
        for i, shape in enumerate(shapes):
            expected = expected_of(trained[0], images(*shape))
            np.testing.assert_allclose(out[str(i)], expected, atol=1e-5)


@pytest.mark.slow
def test_metadata_is_plain_json_in_each_format(exported):
    with zipfile.ZipFile(exported('stablehlo')) as file:
        assert json.loads(file.read('metadata.json'))['classes'] == 2
    raw = exported('savedparams').read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], 'little')])
    assert json.loads(header['__metadata__']['pspnet_jax'])['classes'] == 2
    onnx = pytest.importorskip('onnx', reason='onnx reads the file')
    properties = {p.key: p.value for p in onnx.load(exported('onnx')).metadata_props}
    assert json.loads(properties['pspnet_jax'])['classes'] == 2


def test_saved_parameters_are_the_checkpoints_to_the_bit(exported, trained):
    variables, _ = saved.read_params(exported('savedparams'))
    expected = open_run(trained[0]).variables
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


@pytest.mark.parametrize(('dtype', 'error'), [('float32', 0.0), ('float16', 2e-3)])
def test_a_folder_with_saved_parameters_alone_is_a_run(exported, trained, tmp_path, dtype, error):
    export.export_checkpoint(
        trained[0], 'savedparams', output=tmp_path / 'model.safetensors', size=(32, 32), dtype=dtype
    )
    there, here = open_run(trained[0]), open_run(tmp_path)
    assert (here.step, here.inputs, here.passed_over) == (there.step, there.inputs, {})
    assert to_dict(here.config) == to_dict(there.config)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=error, atol=error / 16),
        here.variables, there.variables,
    )  # fmt: skip
    sizes = [p.stat().st_size for p in (exported('savedparams'), tmp_path / 'model.safetensors')]
    assert sizes[1] < sizes[0] * (1.01 if dtype == 'float32' else 0.7)
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    masks = [
        predictors.predict_array(predictors.load(run), image)[1] for run in (trained[0], tmp_path)
    ]
    np.testing.assert_allclose(*masks, atol=max(error * 10, 1e-6))
    with pytest.raises(CheckpointError, match='leave out --checkpoint=77'):
        open_run(tmp_path, '77')


def test_float16_is_for_saved_parameters_that_it_can_hold(trained, tmp_path):
    with pytest.raises(
        ConfigError, match='--dtype=float16 is only for savedparams, onnx has float32'
    ):
        export.export_checkpoint(trained[0], 'onnx', output=tmp_path / 'x', dtype='float16')
    with pytest.raises(ExportError, match='a/b has values that float16 can not hold'):
        saved.write(tmp_path / 'x', {'a': {'b': np.float32([7e4])}}, {}, 'float16')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        ('missing', 'params/classifier/bias is missing'),
        ('too many', 'params/other is (2,), it should be left out'),
        ('reshaped', 'params/classifier/bias is (3,), it should be (2,)'),
        ('without metadata', 'is not an exported savedparams'),
        ('another file', 'is not an exported savedparams'),
    ],
)
def test_saved_parameters_that_do_not_fit_are_refused(exported, tmp_path, damage, words):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = tmp_path / 'model.safetensors'
    arrays = load_file(exported('savedparams'))
    with safe_open(exported('savedparams'), 'numpy') as file:
        metadata = file.metadata()
    bias = 'params/classifier/bias'
    if damage == 'missing':
        del arrays[bias]
    elif damage == 'too many':
        arrays['params/other'] = np.zeros(2, np.float32)
    elif damage == 'reshaped':
        arrays[bias] = np.zeros(3, np.float32)
    save_file(arrays, path, metadata=None if damage == 'without metadata' else metadata)
    if damage == 'another file':
        path.write_bytes(b'no file of ours')
    with pytest.raises(CheckpointError, match=re.escape(words)):
        saved.read_params(path)


@pytest.mark.parametrize('name', [*export.FILES.values(), 'model.zip'])
def test_a_file_of_something_else_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'something else')
    with pytest.raises((CheckpointError, ExportError), match=re.escape(str(path))):
        read.read(path)


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_kept(published, tmp_path, monkeypatch):
    serve = export.serve
    monkeypatch.setattr(
        export, 'serve', lambda image, **options: serve(image[:, :, ::-1], **options)
    )
    output = tmp_path / 'new' / 'model.stablehlo.zip'
    with pytest.raises(ExportError, match='does not compute the same as the model'):
        export.export_checkpoint(published, 'stablehlo', output=output, size=(32, 32))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_that_is_there_survives_a_failure(published, tmp_path, monkeypatch):
    output = tmp_path / 'model.safetensors'
    output.write_bytes(b'older')
    monkeypatch.setattr(export, 'TOLERANCE', {'float32': -1.0})
    with pytest.raises(ExportError):
        export.export_checkpoint(published, 'savedparams', output=output, size=(32, 32))
    assert output.read_bytes() == b'older'
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


@pytest.mark.slow
def test_a_crf_is_in_the_file_or_refused():
    for fmt, kernel in (('onnx', 'windowed'), ('stablehlo', 'exact')):
        with pytest.raises(ConfigError, match='--nocrf'):
            export.check_crf(fmt, kernel)
    crf = tiny_config().crf.to_dict() | {'kernel': 'windowed', 'window': 2, 'iterations': 2}
    model = small('unet_mini')
    variables = random_variables(model)
    function = functools.partial(
        export.serve, variables=variables, model=model, intensity=FIXED, crf_options=crf
    )
    image = images(2, 35, 33, 3)
    normal = volumes.normalize(image, FIXED)
    expected = infer.probabilities(variables, normal, model=model, crf_options=crf)
    plain = infer.probabilities(variables, normal, model=model)
    prob = export.to_stablehlo(function, 3).call(image)
    np.testing.assert_allclose(prob, expected, atol=1e-5)
    assert np.abs(expected - plain).max() > 1e-2


def test_a_primitive_without_a_rule_is_named():
    pytest.importorskip('onnx', reason='onnx writes the file')
    with pytest.raises(ExportError, match='erf_inv has no rule'):
        export.to_onnx(lambda x: jax.lax.erf_inv(x.astype(jnp.float32)), 3, (4, 4), {})


def test_onnx_missing_is_an_error_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ExportError, match='pip install'):
        export.to_onnx(lambda x: x, 3, (4, 4), {})
    with pytest.raises(ExportError, match='pip install'):
        read.read_onnx(tmp_path / 'model.onnx')
    for line in re.findall(r'"(\w+)>=', onnx_graph.NEED):
        assert line in (ROOT / 'requirements-dev.txt').read_text()


# ---- the page -------------------------------------------------------------------------------


SERVING = (ROOT / 'docs/export.md').read_text()
SNIPPETS = re.findall(r'```python\n(.*?)```', SERVING, re.DOTALL)


def test_the_readme_serves_from_each_format_in_under_ten_lines():
    for name in export.FILES.values():
        assert sum(f"'{name}'" in snippet for snippet in SNIPPETS) == 1
    for snippet in SNIPPETS:
        assert len([line for line in snippet.splitlines() if line.strip()]) < 10


@pytest.mark.slow
@pytest.mark.parametrize('fmt', export.FILES)
def test_the_readmes_snippet_serves(exported, trained, tmp_path, fmt):
    name = export.FILES[fmt]
    (snippet,) = (snippet for snippet in SNIPPETS if f"'{name}'" in snippet)
    (tmp_path / name).symlink_to(exported(fmt))
    image = images(1, 40, 48, 3)
    Image.fromarray(image[0]).save(tmp_path / 'slice.png')
    if fmt != 'savedparams':
        snippet = 'import sys\nsys.modules["pspnet_jax"] = sys.modules["flax"] = None\n' + snippet
    snippet += '\nnp.save("out.npy", prob_BHWK)\n'
    done = subprocess.run(
        [sys.executable, '-c', snippet],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected = expected_of(trained[0], image)
    np.testing.assert_allclose(np.load(tmp_path / 'out.npy'), expected, atol=1e-5)


@pytest.mark.parametrize('fit', ['letterbox', 'stretch'])
def test_the_metadata_say_how_images_are_resized(fit):
    inputs = {'channels': 3, 'normalization': None}
    config = tiny_config(**{'data.size': (32, 48), 'data.fit': fit})
    found = export.describe('onnx', config, inputs, 0, (64, 64), 'none')['trained_size']
    assert (found['height'], found['width'], found['fit']) == (32, 48, fit)
    assert ('in proportion' in found['how']) == (fit == 'letterbox')
    assert (
        export.describe('onnx', tiny_config(), inputs, 0, (64, 64), 'none')['trained_size'] is None
    )
