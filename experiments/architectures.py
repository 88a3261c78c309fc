"""Trains every network by the same protocol, and measures its cost.

  python -m experiments.architectures --quick            on the phantoms, minutes each
  python -m experiments.architectures --config.data.source=FOLDER ...   on LGG
  python -m experiments.architectures --cost             parameters, FLOPs, ms per slice

Each training is `experiments.run` with configs/phantom.py:NAME or configs/lgg.py:NAME in a separate
process, which gets all unknown flags. Lines are added to experiments/results/architectures.jsonl
and costs.jsonl; names that are listed there are not run again.
"""

import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.provenance import commit, device
from pspnet_jax import models
from pspnet_jax.runtime import compilation

QUICK = flags.DEFINE_bool('quick', False, 'on the phantoms')
COST = flags.DEFINE_bool('cost', False, 'measure parameters, FLOPs and time, train nothing')
NAMES = flags.DEFINE_list('names', list(models.MODELS), 'which networks')
RESULTS = Path('experiments/results')


def done(path: Path, key: str) -> set[str]:
    """The values of `key` in the existing lines."""
    return (
        {json.loads(line)[key] for line in path.read_text().splitlines()}
        if path.exists()
        else set()
    )


def train(name: str, passed_on: list[str]) -> None:
    family = 'phantom' if QUICK.value else 'lgg'
    experiment = f'{family}_{name}'
    path = RESULTS / 'architectures.jsonl'
    if experiment in done(path, 'experiment'):
        return
    subprocess.run(
        [
            sys.executable, '-m', 'experiments.run', f'--config=configs/{family}.py:{name}',
            f'--workdir=runs/{experiment}', f'--results={path}', *passed_on,
        ],
        check=True,
    )  # fmt: skip


def cost(name: str, *, size: int = 256, batch: int = 4, repeats: int = 5) -> dict[str, Any]:
    """Parameters for 2 and 21 classes; FLOPs and milliseconds per slice of inference.

    The FLOPs are those of the plain convolutions, which platforms other than the CPU use.
    """
    image = jnp.zeros((batch, size, size, 3))
    counts = {}
    for num_classes in (21, 2):
        model = models.create(name, num_classes=num_classes)
        shapes = jax.eval_shape(
            functools.partial(model.init, train=False), jax.random.key(0), image
        )
        counts[num_classes] = sum(leaf.size for leaf in jax.tree.leaves(shapes['params']))
    init = compilation.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), image)
    traced = compilation.jit(model.apply).trace(variables, image)
    compiled = traced.lower().compile()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(variables, image))
        seconds.append(time.perf_counter() - start)
    return {
        'name': name,
        'backbone': models.resolve(name)[1] or 'its own',
        'parameters': counts,
        'gflop': traced.lower(lowering_platforms=('cuda',)).cost_analysis()['flops'] / batch / 1e9,
        'ms': 1000 * statistics.median(seconds[1:]) / batch,
        'size': size,
        'batch': batch,
        'device': device(),
        'commit': commit(),
        'versions': {'jax': jax.__version__},
    }


def main(argv: list[str]) -> None:
    for name in NAMES.value:
        if not COST.value:
            train(name, argv[1:])
        elif name not in done(RESULTS / 'costs.jsonl', 'name'):
            line = cost(name)
            print(f'{name:18} {line["gflop"]:8.1f} GFLOP {line["ms"]:8.1f} ms/slice', flush=True)
            with open(RESULTS / 'costs.jsonl', 'a') as file:
                file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
    app.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
