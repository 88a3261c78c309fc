"""Profiles a training step of PSPNet-50 at 256x256, batch 4, float32, on a CPU.

  python -m experiments.benchmarks.profile

It runs one step under JAX's profiler and adds each operation's time to the stage of the network
that its module belongs to; parallel operations both count. It also computes the roofline: the
step's operations and bytes, as XLA counts them, and the machine's two limits. A line is added to
experiments/results/profile.jsonl.
"""

import collections
import gzip
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app

from experiments.benchmarks import forms
from experiments.provenance import commit, device
from pspnet_jax.runtime import compilation

STAGES = ('layer1', 'layer2', 'layer3', 'layer4', 'pyramid', 'head', 'aux')


def stage_of(op_name: str) -> str:
    """'stem', one of STAGES, or the part outside the network."""
    inside = re.search(r'PSPNet\)*/(.*)', op_name)
    if not inside:
        return 'loss, optimiser, augmentation'
    return next((s for s in STAGES if re.search(rf'\b{s}(_\d+)?/', inside[1])), 'stem')


def best(function: Callable, *arrays: jax.Array) -> float:
    """Seconds of the fastest of five calls, after one to warm up."""
    run, seconds = compilation.jit(function), []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def roofline(cost: dict[str, float]) -> dict[str, float]:
    """GFLOP and GB of a program, GFLOP/s and GB/s of the machine, and the resulting seconds.

    The machine's limits are measured by a product of two 2048 x 2048 matrices and by reading 1 GB;
    writing would measure how fast the system allocates pages.
    """
    matrix, long = jnp.ones((2048, 2048)), jnp.ones(2**28)
    facts = {
        'gflop': cost['flops'] / 1e9,
        'gigabytes': cost['bytes accessed'] / 1e9,
        'gflop_per_second': 2 * 2048**3 / best(jnp.dot, matrix, matrix) / 1e9,
        'gigabytes_per_second': long.nbytes / best(jnp.sum, long) / 1e9,
    }
    return facts | {
        'seconds_of_flops': facts['gflop'] / facts['gflop_per_second'],
        'seconds_of_bytes': facts['gigabytes'] / facts['gigabytes_per_second'],
    }


def main(_) -> None:
    compiled, state, batch, _ = forms.compile_step('all of them')
    state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(state, batch))
        (path,) = Path(folder).rglob('*.trace.json.gz')
        events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
    op_names = dict(
        re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', compiled.as_text(), re.M)
    )
    stages = collections.defaultdict(lambda: {'forward': 0.0, 'backward': 0.0})
    for event in events:
        op_name = op_names.get(event.get('name'))
        if event.get('ph') == 'X' and op_name is not None:
            direction = 'backward' if 'transpose(' in op_name else 'forward'
            stages[stage_of(op_name)][direction] += event['dur'] / 1000
    order = ('stem', *STAGES, 'loss, optimiser, augmentation')
    line = {
        'stages': {stage: stages[stage] for stage in order},
        'roofline': roofline(compiled.cost_analysis()),
        'device': device(),
        'versions': {'jax': jax.__version__},
        'commit': commit(),
    }
    for stage, found in line['stages'].items():
        print(f'{stage:30} {found["forward"]:8.0f} {found["backward"]:8.0f} ms')
    print(line['roofline'])
    with open('experiments/results/profile.jsonl', 'a') as file:
        file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
    app.run(main)
