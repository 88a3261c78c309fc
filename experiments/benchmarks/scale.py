"""Measures the costs that grow with hosts: the bytes of a step's all-reduce, and checkpoints.

  python -m experiments.benchmarks.scale

For each network of `CASES` on LGG's slices: the bytes of every all-reduce in XLA's program of the
training step for two devices, the state's size, and the seconds until a save returns to the loop,
until it is written, and until it is read and checked. One line per network is added to
experiments/results/scale.jsonl; the input's rate is in input.jsonl.
"""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pspnet_jax.training import placement, update

RESULTS = Path('experiments/results/scale.jsonl')
CASES = ('pspnet_resnet50', 'vgg_pspnet', 'unet', 'unet_mini')
COLLECTIVES = 'all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter'
WIDTHS = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'f16': 2, 'pred': 1, 's8': 1, 'u8': 1}


def moved_bytes(program: str) -> dict[str, int]:
    """{collective: bytes of its results on one device, summed over a program's HLO}."""
    moved = {}
    for results, name in re.findall(rf'= (.*?) ({COLLECTIVES})(?:-start)?\(', program):
        for kind, shape in re.findall(r'(\w+)\[([\d,]*)\]', results):
            count = math.prod(int(length) for length in shape.split(',') if length)
            moved[name] = moved.get(name, 0) + WIDTHS[kind] * count
    return moved


def measure(name: str) -> dict[str, Any]:
    """Measure configs/lgg.py:NAME on two devices."""
    import jax
    import numpy as np

    from pspnet_jax import models
    from pspnet_jax.config import lgg, to_dict
    from pspnet_jax.runtime import checkpoint
    from pspnet_jax.training import optim

    config = lgg.get_config(name)
    model = models.create(**config.model)
    tx, _ = optim.create(config.optim, steps=10)
    ema = config.train.ema_decay > 0
    state = update.create_state(model, tx, seed=0, channels=3, ema=ema)
    rng = np.random.default_rng(0)  # zeros, such as Adam's means, would be compressed
    state = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), state)
    size, batch_size = config.augment.crop or 256, 2
    batch = {
        'image': np.zeros((batch_size, size, size, 3), np.float32),
        'mask': np.zeros((batch_size, size, size), np.int32),
    }
    placed = placement.over_mesh(update.bind_step(config, model, tx))
    placed_state = placed.put_state(state)
    program, _ = placed.compile(placed_state, placed.put_batch(batch))
    sizes = {
        f'{part}_mb': sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree)) / 1e6
        for part, tree in (('parameters', state.params), ('state', state))
    }

    taken = {'save_returns_s': [], 'save_written_s': [], 'restore_s': []}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(checkpoint.Writer(folder)) as writer:
            for step in (1, 2, 3):
                inputs = {'channels': 3, 'normalization': None}
                start = time.perf_counter()
                checkpoint.save(
                    writer, step, state, config=to_dict(config), progress={}, inputs=inputs,
                    dice=None,
                )  # fmt: skip
                taken['save_returns_s'].append(time.perf_counter() - start)
                writer.wait()
                taken['save_written_s'].append(time.perf_counter() - start)
        files = [path for path in Path(folder).rglob('*') if path.is_file()]
        written_mb = sum(path.stat().st_size for path in files) / 1e6
        for _ in range(3):
            start = time.perf_counter()
            checkpoint.restore(folder, state, to_dict(config))
            taken['restore_s'].append(time.perf_counter() - start)
    return {
        'moved_mb': {name: n / 1e6 for name, n in moved_bytes(program.as_text()).items()},
        **sizes,
        'checkpoint_mb': written_mb,
        **{key: float(np.median(seconds)) for key, seconds in taken.items()},
    }


def main() -> None:
    import jax

    from experiments.provenance import commit, device

    for name in CASES:
        environment = {**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
        done = subprocess.run(
            [sys.executable, '-m', 'experiments.benchmarks.scale', name],
            check=True, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        line = {
            'case': f'configs/lgg:{name}',
            **json.loads(done.stdout.splitlines()[-1]),
            'device': device(),
            'versions': {'jax': jax.__version__},
            'commit': commit(),
        }
        print(line, flush=True)
        with RESULTS.open('a') as file:
            file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
