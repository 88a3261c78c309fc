"""Paths and small things that several tests share."""

import atexit
import fcntl
import functools
import os
import pickle
import shutil
import tempfile
from pathlib import Path

# Most of a test's time is compilation, so it is asked to optimise less. Read when JAX first
# meets a device, and inherited by the commands that tests start.
os.environ['XLA_FLAGS'] = ' '.join(
    (
        os.environ.get('XLA_FLAGS', ''),
        '--xla_backend_optimization_level=0',
        '--xla_llvm_disable_expensive_passes=true',
        '--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters',
    )
)

# There is a test process for each core: threads of PyTorch would wait for one another.
os.environ['OMP_NUM_THREADS'] = '1'

# Many tests, and the commands that they start, compile the same tiny programs: once for all
# processes of xdist is enough, and never in the user's own cache. JAX reads this when it is
# imported.
os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='pspnet_jax_tests_')  # which data is known
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ.get(
    'JAX_COMPILATION_CACHE_DIR' if 'PYTEST_XDIST_WORKER' in os.environ else 'PSPNET_TESTS_CACHE',
    os.environ['XDG_CACHE_HOME'],
)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from pspnet_jax.runtime.errors import PspnetError
from pspnet_jax.training import loop

jax.config.update('jax_numpy_rank_promotion', 'raise')
atexit.register(shutil.rmtree, os.environ['XDG_CACHE_HOME'], ignore_errors=True)

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get('PSPNET_SHARED', ROOT.parent / 'shared'))

needs_shared = pytest.mark.skipif(
    not (SHARED / 'weights').is_dir(), reason=f'the shared data is not at {SHARED}'
)


def slow_but(values, *fast):
    """Parameters that are slow, all but these."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if value in fast else pytest.mark.slow,
        )
        for value in values
    ]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def write_case(root: Path, patient: str, slices: int = 4, first: int = 1, lesion: int = 2) -> Path:
    """A case in the Kaggle layout: noise, and a square lesion in `lesion` of the slices."""
    rng = np.random.default_rng(sum(map(ord, patient)))
    folder = root / patient
    folder.mkdir(parents=True)
    for n in range(first, first + slices):
        image = rng.integers(0, 60, (256, 256, 3), np.uint8)
        mask = np.zeros((256, 256), np.uint8)
        if n < first + lesion:
            mask[100:140, 90:150] = 255
            image[mask > 0] += 150
        Image.fromarray(image).save(folder / f'{patient}_{n}.tif')
        Image.fromarray(mask).save(folder / f'{patient}_{n}_mask.tif')
    return folder


@pytest.fixture
def kaggle(tmp_path):
    """A folder with kaggle_3m of six small cases of three sites, one of them held out."""
    root = tmp_path / 'raw' / 'kaggle_3m'
    for patient in (
        'TCGA_CS_4941_19960909',
        'TCGA_CS_4944_20010208',  # of the public hold-out
        'TCGA_DU_5849_19950405',
        'TCGA_DU_5852_19950709',
        'TCGA_HT_7473_19970826',
        'TCGA_HT_7475_19970918',
    ):
        write_case(root, patient)
    return tmp_path / 'raw'


def refused(read, *arguments, match=None, kind=PspnetError):
    """The message of a refusal: one line that quotes no more than it must."""
    with pytest.raises(kind, match=match) as told:
        read(*arguments)
    assert len(str(told.value).splitlines()) == 1
    assert str(told.value).isprintable()
    return str(told.value)


def random_variables(model, channels=3, gain=2.0):
    """Of the right shapes, none of them zero: a branch that is lost shows. Nothing is compiled."""
    rng = np.random.default_rng(3)
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    tree = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)

    def draw(name, leaf):
        if name.endswith('kernel'):
            deviation = np.sqrt(gain / np.prod(leaf.shape[:-1]))
            return rng.normal(0, deviation, leaf.shape).astype(np.float32)
        if name.endswith(('scale', 'var')):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0, 0.1, leaf.shape).astype(np.float32)

    flat = flatten_dict(tree, sep='/')
    return unflatten_dict({name: draw(name, leaf) for name, leaf in flat.items()}, sep='/')


# A run that takes seconds, and its network: in half of PSPNet's time traced and compiled.
TINY = {
    'config': 'configs/phantom.py:unet_mini',
    'model.width': 16,
    'phantom.volumes': 6,
    'phantom.slices': 4,
    'phantom.size': 32,
    'train.batch_size': 4,
    'train.steps': 4,
    'train.log_every': 1,
    'train.validate_every': 2,
    'train.checkpoint_every': 1,
    'train.ema_decay': 0.9,
    'optim.warmup_steps': 1,
    'eval.batch_size': 4,
    'eval.bootstrap': 50,
}
PSPNET = {'model.name': 'pspnet', 'model.backbone': 'resnet18'}


def tiny_config(**changes):
    """The config of TINY; `changes` by dotted key, such as PSPNET."""
    from pspnet_jax.config import phantom

    tiny = {key: value for key, value in TINY.items() if key != 'config'}
    config = phantom.get_config('unet_mini')
    config.update_from_flattened_dict({**tiny, **changes})
    return config


@pytest.fixture
def power_cut(monkeypatch):
    """`power_cut(config, workdir, steps)` trains until the batch behind `steps` is asked for."""
    from pspnet_jax.data import pipeline

    def run(config, workdir, steps):
        real = pipeline.batches

        def broken_off(*args, first_step, **options):
            batches = real(*args, first_step=first_step, **options)
            yield from (next(batches) for _ in range(steps - first_step))
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, 'batches', broken_off)
            with pytest.raises(KeyboardInterrupt):
                loop.train_and_evaluate(config, str(workdir))

    return run


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """(workdir, evaluation) of one tiny run; tests must not change it.

    It is trained once: the processes of xdist have copies.
    """
    base, workdir = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp('run')
    shared = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'trained'
    with open(f'{shared}.pickle', 'a+b') as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        if not file.tell():
            pickle.dump(loop.train_and_evaluate(tiny_config(), str(shared)), file)
        file.seek(0)
        evaluation = pickle.load(file)
    shutil.copytree(shared, workdir, dirs_exist_ok=True)
    return workdir, evaluation
