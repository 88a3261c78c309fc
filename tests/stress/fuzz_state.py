"""Readers of state for fuzz.py: weights, checkpoints, configs, exports, a run's own files.

Changes that keep their digests, lengths and checksums right are in mutate_state.
"""

import contextlib
import functools
import json
import types
import zipfile
from pathlib import Path

import numpy as np

from pspnet_jax.inference import choice, saved
from pspnet_jax.serving import export, read
from pspnet_jax.training import update
from tests.stress import mutate, mutate_state

CHANNELS = 3


# Weights.


@functools.cache
def _network():
    """(shapes, arrays by torchvision's names) of the smallest network on a VGG16."""
    import jax

    from pspnet_jax import models
    from pspnet_jax.inference.networks import abstract_variables
    from pspnet_jax.models import weights

    model = models.create('unet', num_classes=2, backbone='vgg16', width=4)
    shapes = abstract_variables(model, CHANNELS)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    backbone = {'params': {'backbone': values['params']['backbone']}}
    return shapes, weights.to_torch(backbone, weights.TABLES['vgg16'])


def read_weights(path: Path) -> None:
    from pspnet_jax.models import weights

    weights.load_backbone(_network()[0], str(path))


def read_network(path: Path) -> None:
    """As `convert` does, as far as the config."""
    from pspnet_jax.models import weights

    arrays = weights.read_arrays(path)
    kind = weights.detect(arrays, weights.NETWORKS)
    weights.network_options(arrays, kind)
    weights.load_network(_whole()[0], arrays, weights.TABLES[kind])


@functools.cache
def _whole():
    """(shapes, arrays) of segmentation_models_pytorch's U-Net on a ResNet-18."""
    import jax

    from pspnet_jax import models
    from pspnet_jax.inference.networks import abstract_variables
    from pspnet_jax.models import weights

    model = models.create('unet', num_classes=2, backbone='resnet18', width=4)
    shapes = abstract_variables(model, CHANNELS)
    values = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    source = weights.TABLES['unet on resnet of segmentation_models_pytorch']
    return shapes, weights.to_torch(values, source)


def _safetensors(folder: Path) -> list[Path]:
    from safetensors.numpy import save_file

    arrays = _network()[1]
    save_file(arrays, folder / 'a.safetensors', metadata={'format': 'pt'})
    save_file(
        {f'module.{name}': x.astype(np.float16) for name, x in arrays.items()},
        folder / 'b.safetensors',
    )
    return [folder / 'a.safetensors', folder / 'b.safetensors']


def _whole_network(folder: Path) -> list[Path]:
    from safetensors.numpy import save_file

    save_file(_whole()[1], folder / 'a.safetensors')
    return [folder / 'a.safetensors']


def _npz(folder: Path) -> list[Path]:
    np.savez(folder / 'a.npz', **_network()[1])
    np.savez_compressed(folder / 'b.npz', **_network()[1])
    return [folder / 'a.npz', folder / 'b.npz']


def _pth(folder: Path) -> list[Path]:
    import torch

    state = {name: torch.from_numpy(x) for name, x in _network()[1].items()}
    torch.save(state, folder / 'a.pth')
    torch.save({'state_dict': state, 'epoch': 3}, folder / 'b.pt')
    torch.save(state, folder / 'c.pth', _use_new_zipfile_serialization=False)
    return [folder / name for name in ('a.pth', 'b.pt', 'c.pth')]


def _h5(folder: Path) -> list[Path]:
    """As Keras 2 and 3 lay out their VGG16."""
    import h5py

    blocks = [
        f'block{b}_conv{i}' for b, n in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, n + 1)
    ]
    arrays = list(_network()[1].items())
    kernels = [x.transpose(2, 3, 1, 0) for name, x in arrays if name.endswith('weight')]
    biases = [x for name, x in arrays if name.endswith('bias')]
    layers = dict(zip(blocks, zip(kernels, biases, strict=True), strict=True))
    with h5py.File(folder / 'a.h5', 'w') as file:
        file.attrs['layer_names'] = [name.encode() for name in layers]
        for name, pair in layers.items():
            group = file.create_group(name)
            names = [f'{name}/kernel:0', f'{name}/bias:0']
            group.attrs['weight_names'] = [each.encode() for each in names]
            for each, x in zip(names, pair, strict=True):
                group[each] = x
    with h5py.File(folder / 'b.h5', 'w') as file:
        for name, pair in layers.items():
            group = file.create_group(f'layers/{name}/vars')
            group.attrs['name'] = name
            for i, x in enumerate(pair):
                group.create_dataset(str(i), data=x, chunks=x.shape, compression='gzip')
    return [folder / 'a.h5', folder / 'b.h5']


# Checkpoints and configs.


def _config() -> dict:
    from pspnet_jax.config import phantom, to_dict

    config = phantom.get_config('unet_mini')
    config.model.width = 4
    return to_dict(config)


def _configs(folder: Path) -> list[Path]:
    (folder / 'config.json').write_text(json.dumps(_config()))
    return [folder / 'config.json']


def read_config(path: Path) -> None:
    """A config as it stands in a checkpoint, and the network that it asks for."""
    from pspnet_jax import models
    from pspnet_jax.config import from_dict
    from pspnet_jax.inference import runs
    from pspnet_jax.runtime.errors import ConfigError

    try:
        tree = json.loads(path.read_bytes() if path.is_file() else '')
    except (OSError, ValueError, RecursionError):  # the checkpoint's reader sees to these
        raise ConfigError('no JSON') from None
    with _traced_once():
        config = from_dict(tree)
        runs.abstract_variables(models.create(**config.model), CHANNELS)


@contextlib.contextmanager
def _traced_once():
    """One network is traced once, not for every input."""
    from pspnet_jax.inference import runs, saved

    before = runs.abstract_variables
    runs.abstract_variables = saved.abstract_variables = _shapes(before)
    try:
        yield
    finally:
        runs.abstract_variables = saved.abstract_variables = before


@functools.cache
def _shapes(abstract_variables):
    return functools.lru_cache(1000)(abstract_variables)


TREE = {'conv': {'kernel': np.arange(48, dtype=np.float32).reshape(2, 2, 3, 4)}}


def _state():

    return update.TrainState(np.int32(0), TREE, {}, {'mu': TREE}, None)


def _checkpoints(folder: Path) -> list[Path]:
    from pspnet_jax.models import weights
    from pspnet_jax.runtime import checkpoint

    inputs = {'channels': CHANNELS, 'normalization': weights.IMAGENET._asdict()}
    for name, averaged in (('a', None), ('b', TREE)):
        with contextlib.closing(checkpoint.Writer(folder / name)) as writer:
            checkpoint.save(
                writer,
                7,
                types.SimpleNamespace(
                    params=TREE, batch_stats={}, ema_params=averaged, opt_state={'mu': TREE}
                ),
                config=_config(),
                progress={'best_dice': 0.5, 'stale': 1, 'skipped': 0},
                inputs=inputs,
                dice=0.5,
            )
    return [folder / 'a', folder / 'b']


def read_checkpoint(path: Path) -> None:
    """As `runs.open_run` does."""
    from pspnet_jax.config import from_dict
    from pspnet_jax.models.weights import fixed_intensity
    from pspnet_jax.runtime import checkpoint

    step = checkpoint.candidates(path, 'last')[0]
    meta = checkpoint.metadata(path, step)
    from_dict(meta['config'])
    fixed_intensity(meta['inputs'])
    checkpoint.restore_variables(path, step, {'params': TREE}, meta)


def read_resume(path: Path) -> None:
    """As training does that goes on."""
    from pspnet_jax.runtime import checkpoint

    checkpoint.restore(path, _state(), _config())


# Exported files.


def _tiny(image):
    import jax

    x = jax.nn.relu(image.astype('float32')[..., :2] * np.full((1, 1, 1, 2), 2, np.float32))
    return jax.nn.softmax(x, axis=-1)


def _stablehlo(folder: Path) -> list[Path]:

    with zipfile.ZipFile(folder / 'a.stablehlo.zip', 'w') as archive:
        archive.writestr(export.PROGRAM, export.to_stablehlo(_tiny, CHANNELS).serialize())
        archive.writestr(export.METADATA, '{"format": "stablehlo"}')
    return [folder / 'a.stablehlo.zip']


def _onnx(folder: Path) -> list[Path]:

    proto = export.to_onnx(_tiny, CHANNELS, (32, 32), {'format': 'onnx'})
    (folder / 'a.onnx').write_bytes(proto.SerializeToString())
    return [folder / 'a.onnx']


def _savedparams(folder: Path) -> list[Path]:
    import jax

    from pspnet_jax import models
    from pspnet_jax.config import from_dict
    from pspnet_jax.inference.networks import abstract_variables

    config = _config()
    shapes = abstract_variables(models.create(**from_dict(config).model), CHANNELS)
    values = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    inputs = {'channels': CHANNELS, 'normalization': None}
    metadata = {'config': config, 'inputs': inputs, 'crf': 'none', 'step': 0}
    saved.write(folder / 'a.safetensors', values, metadata)
    return [folder / 'a.safetensors']


def read_export(path: Path) -> None:

    with _traced_once():
        read.read(path)


# A run's own files, and a built data set.


def _run(folder: Path) -> list[Path]:
    from pspnet_jax.inference import calibration
    from pspnet_jax.runtime import faults

    workdir = folder / 'run'
    workdir.mkdir()
    calibration.save(workdir, {'step': 7, 'temperature': 1.25, 'patients': 3})
    options = {'flip': True, 'threshold': 0.4, 'largest_component': False, 'min_size': 30}
    dice = {'dice': 0.8, 'without': None, 'patients': 3}
    choice.save(workdir, {'step': 7, 'views': {'window': 0}, 'options': options, **dice})
    record = {'loss': 0.5, 'learning_rate': 1e-4, 'validation/dice': 0.1, 'validation/hd95': None}
    lines = [json.dumps({'step': step, **record}) for step in (1, 2, 3)]
    (workdir / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
    owner = {'process': 12, 'host': 'h', 'since': 1.7e9}
    (workdir / faults.LOCK).write_text(json.dumps(owner))
    return [workdir]


def read_run(path: Path) -> None:
    from pspnet_jax.config import from_dict
    from pspnet_jax.evaluation import charts
    from pspnet_jax.inference import calibration
    from pspnet_jax.runtime import faults, log

    for each in charts.run_charts(log.read(path)):
        charts.svg(each)
    with faults.locked(path):
        calibration.load(path, 7)
        if kept := choice.load(path, from_dict({}), 7, {'window': 0}):
            choice.describe(kept)


def _built(folder: Path) -> list[Path]:
    """A data set of four patients with one slice each."""
    from PIL import Image

    from pspnet_jax.data import lgg, splits

    raw = folder.parent / 'tmp' / 'raw'
    for patient in (splits.LGG_HOLDOUT[0], 'TCGA_CS_4941_1', 'TCGA_DU_5849_2', 'TCGA_HT_7473_3'):
        (raw / patient).mkdir(parents=True)
        Image.new('RGB', lgg.SIZE, (9, 9, 9)).save(raw / patient / f'{patient}_1.tif')
        Image.new('L', lgg.SIZE, 255).save(raw / patient / f'{patient}_1_mask.tif')
    lgg.build(raw, folder / 'built')
    return [folder / 'built']


def read_built(path: Path) -> None:
    from pspnet_jax.data import lgg
    from pspnet_jax.runtime.errors import DataError

    before, lgg.fetch = lgg.fetch, _no_network
    try:
        slices = lgg.load('', str(path))
        for key in slices.key:
            with contextlib.suppress(DataError):
                slices.read(int(key))
    finally:
        lgg.fetch = before


def _no_network():
    from pspnet_jax.runtime.errors import DataError

    raise DataError('nothing is built here')


mutate.STRUCTURED |= mutate_state.STRUCTURED

READERS = {
    'safetensors': (_safetensors, read_weights),
    'npz': (_npz, read_weights),
    'pth': (_pth, read_weights),
    'h5': (_h5, read_weights),
    'network': (_whole_network, read_network),
    'config': (_configs, read_config),
    'checkpoint': (_checkpoints, read_checkpoint),
    'resume': (_checkpoints, read_resume),
    'stablehlo': (_stablehlo, read_export),
    'onnx': (_onnx, read_export),
    'savedparams': (_savedparams, read_export),
    'run': (_run, read_run),
    'built': (_built, read_built),
}
