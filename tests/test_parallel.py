"""One step on 1 device equals one step on 8, by jit over a mesh and by pmap."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from pspnet_jax.runtime import log
from tests.conftest import ROOT

SCRIPT = """
import functools, os, re
flags = os.environ['XLA_FLAGS']
import jax, jax.numpy as jnp, numpy as np
from pspnet_jax import models
from pspnet_jax.models.convolution import Window, conv3x3, depthwise
from pspnet_jax.runtime import compilation
from pspnet_jax.training import losses, optim, placement, update
from tests.conftest import PSPNET, tiny_config

os.environ['XLA_FLAGS'] = flags  # without the older emitters, which tests.conftest asks for
assert jax.device_count() == 8
noisy = {'augment.noise': 0.1, 'augment.elastic': 1.0, 'model.dropout': 0.3, 'model.width': 4}
noisy |= {'augment.blur': 1.0, 'augment.low_resolution': 0.5, 'augment.gamma': 0.5}
terms = {f'loss.{name}': 0.01 if name == 'boundary' else 0.5 for name in losses.TERMS}
config = tiny_config(**PSPNET, **noisy, **terms)
rng = np.random.default_rng(3)
mask = rng.integers(0, 2, (16, 33, 33)).astype(np.int32)
mask[3, :20] = 255  # an uneven share of ignored pixels
batch = {'image': rng.standard_normal((16, 33, 33, 3)).astype(np.float32), 'mask': mask}

def run(place):
    model = models.create(**config.model)
    teacher = models.create(**{**config.model, 'backbone': 'resnet34'})
    taught = teacher.init(jax.random.key(1), batch['image'][:1])
    distill = {'loss': 'kl', 'weight': 1.0, 'temperature': 2.0, 'pairwise': 1.0, 'nodes': 3}
    tx, _ = optim.create({**config.optim, 'name': 'sgd', 'learning_rate': 0.01}, steps=10)
    step = update.bind_step(
        config, model, tx, teacher=teacher, loss_fn=losses.soft_dice, distill=distill, remat='none'
    )
    state = update.create_state(model, tx, seed=0, channels=3, ema=True).replace(teacher=taught)
    placed = place(step)
    state = placed.put_state(state)
    step, _ = placed.compile(state, placed.put_batch(batch))
    # One update: a second one hangs on whether a ReLU's input is above 0 by rounding.
    state, metrics = step(state, placed.put_batch(batch))
    return jax.device_get((placed.get_state(state), metrics))

def one_device(step):
    jitted = compilation.jit(step)
    return placement.Placed(lambda s, b: (jitted, {}), lambda s: s, lambda b: b, lambda s: s)

def compare(name, a, b):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        scale = max(float(np.abs(x).max()), 1e-3)
        worst = float(np.abs(x - y).max()) / scale
        assert worst < 2e-4, (name, jax.tree_util.keystr(path), worst)
    print(name, 'equal')

def collectives(form, channels, inputs):
    # Of a 3x3 and its gradients, the batch over all devices.
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ('data',)))
    x = jax.ShapeDtypeStruct((8, 16, 16, channels), np.float32, sharding=split)
    kernel = jax.ShapeDtypeStruct((3, 3, inputs, channels), np.float32, sharding=whole)
    def gradients(x, kernel):
        out, back = jax.vjp(form, x, kernel)
        return out, back(jnp.sin(out))
    shardings = (split, (split, whole))
    compiled = compilation.jit(gradients, out_shardings=shardings).lower(x, kernel)
    names = r' (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)[(]'
    return set(re.findall(names, compiled.compile().as_text()))

for channels, dilation in ((64, (1, 1)), (256, (1, 1)), (256, (2, 2)), (256, (4, 4))):
    found = collectives(functools.partial(conv3x3, dilation=dilation), channels, channels)
    assert found == {'all-reduce'}, (channels, dilation, found)

for strides, dilation in (((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2))):
    window = Window(strides, (dilation, dilation), dilation)
    found = collectives(functools.partial(depthwise, window=window), 64, 1)
    assert found == {'all-reduce'}, (window, found)

alone = run(one_device)
compare('mesh', alone, run(placement.over_mesh))
compare('pmap', alone, run(placement.under_pmap))
"""


def on_eight_devices(script, flags=''):
    environment = {
        **os.environ,
        # Eight devices share the cores with other tests: XLA gives up on a late one after 40 s.
        'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8 '
        '--xla_cpu_collective_call_terminate_timeout_seconds=400',
        'JAX_PLATFORMS': 'cpu',
    }
    done = subprocess.run(
        [sys.executable, '-c', script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.newest
def test_one_device_eight_by_jit_and_eight_by_pmap_agree():
    """With a teacher and a loss from outside, which are then of the whole batch too."""
    flags = [flag for flag in os.environ['XLA_FLAGS'].split() if 'emitters' not in flag]
    assert on_eight_devices(SCRIPT, ' '.join(flags)).split() == ['mesh', 'equal', 'pmap', 'equal']


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_and_gone_on_with_on_any_device_count(trained, tmp_path):
    """Trained on one device: on eight the same figures; the next step is one on 1, 2, 4 and 8."""
    workdir, evaluation = trained
    for n in (1, 2, 4, 8):
        shutil.copytree(workdir, tmp_path / f'on{n}')
    script = f"""
import jax, json
from pspnet_jax.evaluation.protocol import evaluate_checkpoint
from pspnet_jax.training.loop import train_and_evaluate
from tests.conftest import tiny_config
print(json.dumps(evaluate_checkpoint({str(tmp_path / 'on8')!r})['patients']))
make_mesh = jax.make_mesh
for n in (1, 2, 4, 8):
    jax.make_mesh = lambda _, names, **options: make_mesh(
        (n,), names, **{{**options, 'devices': jax.devices()[:n]}}
    )
    config = tiny_config(**{{'train.steps': 5, 'train.batch_size': 8}})
    train_and_evaluate(config, f'{tmp_path}/on{{n}}')
"""
    told = on_eight_devices(script, flags=os.environ['XLA_FLAGS'])
    patients = json.loads(next(line for line in told.splitlines() if line.startswith('[')))
    for ours, theirs in zip(patients, evaluation['patients'], strict=True):
        assert ours['patient'] == theirs['patient']
        assert ours['dice'] == pytest.approx(theirs['dice'], rel=0.02)
        assert ours['predicted_voxels'] == pytest.approx(theirs['predicted_voxels'], rel=0.02)
    last = [log.read(tmp_path / f'on{n}')[-2] for n in (1, 2, 4, 8)]
    assert [record['step'] for record in last] == [5] * 4
    for record in last[1:]:
        assert record['loss'] == pytest.approx(last[0]['loss'], rel=1e-4)
        assert record['gradient_norm'] == pytest.approx(last[0]['gradient_norm'], rel=1e-3)
