"""One step on 1 device equals one step on 8, by jit over a mesh and by pmap."""

import os
import subprocess
import sys

from tests.conftest import ROOT

SCRIPT = """
import functools, jax, jax.numpy as jnp, numpy as np
from pspnet_jax import models, optim, train
from tests.conftest import tiny_config

assert jax.device_count() == 8
config = tiny_config(**{'augment.noise': 0.1, 'augment.elastic': 1.0, 'model.dropout': 0.3})
rng = np.random.default_rng(0)
mask = rng.integers(0, 2, (16, 33, 33)).astype(np.int32)
mask[3, :20] = 255  # an uneven share of ignored pixels
batch = {'image': rng.standard_normal((16, 33, 33, 3)).astype(np.float32), 'mask': mask}

def run(place, axis_name, accumulate=1, steps=2):
    model = models.create(**config.model, axis_name=axis_name)
    tx, _ = optim.create(steps=10, **{**config.optim, 'name': 'sgd', 'learning_rate': 0.01})
    step = functools.partial(
        train.train_step, model=model, tx=tx, seed=0, loss_options=config.loss.to_dict(),
        augment_options=config.augment.to_dict(), accumulate=accumulate, ema_decay=0.9,
    )
    state = train.create_state(
        models.create(**config.model), tx, seed=0, channels=3, ema=True
    )
    placed = place(step)
    state = placed.put_state(state)
    for _ in range(steps):
        state, metrics = placed.step(state, placed.put_batch(batch))
    return jax.device_get((placed.get_state(state), metrics))

def one_device(step):
    return train.Placed(jax.jit(step), lambda s: s, lambda b: b, lambda s: s)

def compare(name, a, b):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        scale = max(float(np.abs(x).max()), 1e-3)
        worst = float(np.abs(x - y).max()) / scale
        assert worst < 2e-4, (name, jax.tree_util.keystr(path), worst)
    print(name, 'equal')

alone = run(one_device, None)
compare('mesh', alone, run(train.over_mesh, None))
compare('pmap', alone, run(train.under_pmap, 'data'))
"""


def test_one_device_eight_by_jit_and_eight_by_pmap_agree():
    environment = {
        **os.environ,
        'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
        'JAX_PLATFORMS': 'cpu',
    }
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ['mesh', 'equal', 'pmap', 'equal']
