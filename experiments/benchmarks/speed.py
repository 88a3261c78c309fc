"""Compares our speed with the peers', in one run with alternating turns.

  python -m experiments.benchmarks.speed [--cases=PART_OF_A_NAME,...] [--modes=eager,...]
      [--repeats=3]
  python -m experiments.benchmarks.speed --cases=blog --keras_python=ENVIRONMENT/bin/python

Each contender is a separate process that runs one step on request. PyTorch is tried eager and
compiled, channels last and not; the fastest of the four is the peer. First it checks that both
networks are the same: equal numbers of parameters, and equal outputs with the peer's weights. Then
ours and the peer take turns; a line with both medians is added to experiments/results/speed.jsonl.
In training both run forward, backward and SGD with momentum, or the whole update of a recipe; ours
uses `training.update.train_step` unchanged.
"""

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from pspnet_jax.config import lgg
from pspnet_jax.training import update

STEPS = 3  # timed steps in a turn, after one to warm up
FLAGS = flags.FLAGS

PSPNET_50 = {'model': {'name': 'pspnet', 'deep_stem': True}, 'peer': 'pspnet_resnet50'}
PSPNET_101 = {
    'model': {'name': 'pspnet', 'backbone': 'resnet101', 'deep_stem': True},
    'peer': 'pspnet_resnet101',
}
PSPNET_18 = {'model': {'name': 'pspnet', 'backbone': 'resnet18'}, 'peer': 'pspnet_resnet18'}
VGG = {'model': {'name': 'pspnet', 'backbone': 'vgg16'}, 'peer': 'pspnet_vgg16'}
UNET = {'model': {'name': 'unet', 'backbone': 'resnet34'}, 'peer': 'unet_resnet34'}
DEEPLAB = {
    'model': {
        'name': 'deeplab_v3', 'variant': 'torchvision', 'output_stride': 8,
        'rates': (12, 24, 36), 'multi_grid': (1,), 'dilate_first_block': False,
    },
    'peer': 'deeplabv3_resnet50',
}  # fmt: skip
MOBILE_UNET = {
    'model': {'name': 'unet', 'backbone': 'mobilenet_v2'}, 'peer': 'unet_mobilenet_v2',
}  # fmt: skip
BLOG = {'model': {'name': 'vgg_pspnet_blog'}, 'peer': 'keras'}
# Its whole update: augmentation with crops of 192, losses, AdamW, average of the parameters.
RECIPE = lgg.get_config('mobilenet_unet').to_dict()


def cases(on_cpu: bool) -> dict[str, dict[str, Any]]:
    """{name: network, size, batch, precision, whether it trains}."""
    found = {}

    def add(name, network, size, batch, dtype='float32', modes=('train', 'inference')):
        for mode in modes:
            found[f'{mode} {name} {size}x{size} batch {batch} {dtype}'] = {
                **network, 'size': size, 'batch': batch, 'dtype': dtype, 'classes': 2,
                'train': mode == 'train',
            }  # fmt: skip

    if on_cpu:
        add('pspnet_resnet50', PSPNET_50, 256, 4)
        add('pspnet_resnet18', PSPNET_18, 256, 4)
        add('pspnet_vgg16', VGG, 384, 2)
        add('vgg_pspnet_blog', BLOG, 384, 2)
        add('unet_resnet34', UNET, 256, 4)
        add('unet_mobilenet_v2', MOBILE_UNET, 256, 4)
        add('LGG recipe', {**MOBILE_UNET, 'recipe': RECIPE}, 256, 16, modes=('train',))
        add('deeplabv3_resnet50', DEEPLAB, 256, 4)
        add('pspnet_resnet50', PSPNET_50, 256, 1, modes=('inference',))
        add('pspnet_resnet50', PSPNET_50, 473, 1, modes=('inference',))
        add('pspnet_resnet50', PSPNET_50, 256, 4, 'bfloat16')
    else:
        for dtype in ('float32', 'bfloat16'):
            add('pspnet_resnet50', PSPNET_50, 473, 16, dtype)
            add('pspnet_resnet101', PSPNET_101, 473, 16, dtype)
            add('pspnet_resnet50', PSPNET_50, 256, 64, dtype)
    return found


def load(case: dict[str, Any]):
    """Our model in float32 and in the case's precision, and the peer's weights in our layout."""
    import jax
    import jax.numpy as jnp

    from pspnet_jax import models
    from pspnet_jax.models import weights
    from pspnet_jax.models.weights import tables

    exact, model = (
        models.create(num_classes=case['classes'], dtype=dtype, **case['model'])
        for dtype in ('float32', case['dtype'])
    )
    shapes = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    )
    keras = case['peer'] == 'keras'
    arrays = weights.read_arrays(case['exchange'] + ('.h5' if keras else '.weights.npz'))
    sources = {
        **weights.NETWORKS,
        'pspnet_vgg16': weights.Table(
            (*tables.SEMSEG, *tables.under('', 'backbone/', tables.vgg(False)))
        ),
    }
    source = sources[weights.detect(arrays, sources)]
    return exact, model, jax.device_put(weights.load_network(shapes, arrays, source))


def check(case: dict[str, Any]) -> None:
    """A process that prints how far our output is from the peer's with the same weights."""
    import jax

    from pspnet_jax.runtime import compilation

    exact, _, variables = load(case)
    peer = np.load(case['exchange'] + '.out.npz')
    with jax.default_matmul_precision('highest'):
        out = compilation.jit(exact.apply)(variables, peer['image'])['logits']
    print(json.dumps(float(np.abs(out - peer['out']).max() / np.abs(peer['out']).max())))


def ours(case: dict[str, Any]) -> None:
    """Our side of a case: a process that `serve`s."""
    import jax
    import jax.numpy as jnp
    import optax
    from ml_collections import ConfigDict

    from experiments.benchmarks.serve import serve
    from pspnet_jax.config import base
    from pspnet_jax.runtime import compilation
    from pspnet_jax.training import optim

    _, model, variables = load(case)
    image = jnp.asarray(np.load(case['exchange'] + '.out.npz')['image'])
    if case['train']:
        params = variables['params']
        if recipe := case.get('recipe'):
            config, changes = ConfigDict(recipe), {}
            tx, _ = optim.create(recipe['optim'], steps=recipe['train']['steps'])
        else:
            config, tx = base.get_config(), optax.sgd(1e-3, momentum=0.9)
            changes = {'loss': {**config.loss.to_dict(), 'dice': 0.0}, 'augment': {}}
        average = jax.tree.map(jnp.copy, params) if config.train.ema_decay else None
        state = update.TrainState(
            jnp.zeros((), jnp.int32), params, variables['batch_stats'], tx.init(params), average
        )
        step_fn = update.bind_step(config, model, tx, **changes)
        small = case['size'] // 4 if case['peer'] == 'keras' else case['size']  # of its labels
        rng = np.random.default_rng(0)
        labels = rng.integers(0, case['classes'], (case['batch'], small, small))
        labels = labels.repeat(case['size'] // small, 1).repeat(case['size'] // small, 2)
        batch = {'image': image, 'mask': jnp.asarray(labels, jnp.int32)}
        jitted = compilation.jit(step_fn, donate_argnums=0)
        compiled, facts = compilation.compile_now(jitted, state, batch)
        kept = [state]

        def step():
            kept[0], metrics = compiled(kept[0], batch)
            jax.block_until_ready(metrics)

    else:
        predict = compilation.jit(lambda variables, image: model.apply(variables, image)['logits'])
        compiled, facts = compilation.compile_now(predict, variables, image)

        def step():
            compiled(variables, image).block_until_ready()

    first = jax.devices()[0]
    info = {
        'parameters': sum(x.size for x in jax.tree.leaves(variables['params'])),
        'compile_seconds': facts['seconds'],
        'temporary_mb': facts['temporary_mb'],
        'versions': {'jax': jax.__version__},
    }
    peak = None if first.platform == 'cpu' else lambda: first.memory_stats()['peak_bytes_in_use']
    serve(step, info, peak)


class Contender:
    """A process that runs `serve`: it gives `info`, seconds for each `go`, then its peak memory."""

    def __init__(self, command: list[str], case: dict[str, Any]):
        self.process = subprocess.Popen(
            [*command, json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                'PYTHONPATH': os.getcwd(),
                'TF_CPP_MIN_LOG_LEVEL': '3',
                'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # the peer is on the same GPU
            },
        )
        self.info = self._hear()

    def _hear(self) -> Any:
        for line in self.process.stdout:
            try:
                return json.loads(line)
            except ValueError:
                print(line, end='', file=sys.stderr)
        raise RuntimeError(f'{self.process.args[:3]} ended with status {self.process.wait()}')

    def go(self) -> float:
        self.process.stdin.write('go\n')
        self.process.stdin.flush()
        return self._hear()

    def end(self) -> dict[str, int]:
        self.process.stdin.write('end\n')
        self.process.stdin.flush()
        peak = self._hear()
        self.process.wait()
        return peak


def peer_command(case: dict[str, Any]) -> list[str]:
    if case['peer'] == 'keras':
        return [FLAGS.keras_python, '-m', 'experiments.benchmarks.keras_peer']
    return [sys.executable, '-m', 'experiments.benchmarks.peers']


def fastest_mode(case: dict[str, Any]) -> str:
    """The mode of PyTorch with the smallest median of two steps."""
    if case['peer'] == 'keras':
        return 'keras'
    medians = {}
    for mode in FLAGS.modes if len(FLAGS.modes) > 1 else ():
        contender = Contender(peer_command(case), {**case, 'mode': mode})
        medians[mode] = statistics.median([contender.go() for _ in range(3)][1:])
        contender.end()
        print(f'  torch {mode}: {medians[mode]:.3f} s', flush=True)
    return min(medians, key=medians.get) if medians else FLAGS.modes[0]


def compare(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Compare ours and the peer in one case; return its line."""
    from experiments.provenance import commit, device

    with tempfile.TemporaryDirectory() as folder:
        case = {**case, 'exchange': f'{folder}/peer'}
        mode = fastest_mode(case)
        peer = Contender(peer_command(case), {**case, 'mode': mode})
        us = [sys.executable, '-m', 'experiments.benchmarks.speed']
        difference = Contender([*us, '--check'], case).info
        ours_ = Contender([*us, '--worker'], case)
        if ours_.info['parameters'] != peer.info['parameters']:
            raise RuntimeError(f'not the same network: {ours_.info}, {peer.info}')
        if difference > 1e-4:
            raise RuntimeError(f'not the same output: {difference}')
        seconds = {'ours': [], 'peer': []}
        for _ in range(FLAGS.repeats):
            for key, contender in (('ours', ours_), ('peer', peer)):
                contender.go()  # during the pause the system reclaimed some of its memory
                seconds[key] += [contender.go() for _ in range(STEPS)]
        memory = {'ours': ours_.end(), 'peer': peer.end()}
    median = {key: statistics.median(values) for key, values in seconds.items()}
    flops, peak = peer.info.get('flops'), peer.info.get('matmul_peak')
    return {
        'case': name,
        'device': device(),
        'ours': case['batch'] / median['ours'],
        'peer': case['batch'] / median['peer'],
        'ratio': median['peer'] / median['ours'],
        'unit': 'images/s',
        'peer_is': 'image-segmentation-keras' if mode == 'keras' else f'PyTorch {mode}',
        'seconds': seconds,
        'p95': {key: float(np.percentile(values, 95)) for key, values in seconds.items()},
        'flops': flops,
        'gflop_per_second': flops and flops / median['ours'] / 1e9,
        'matmul_peak': peak and peak / 1e9,
        'share_of_peak': flops and flops / median['ours'] / peak,
        'peak_memory_mb': {
            key: round(value['steps'] / 2**20) for key, value in memory.items()
        },
        'peak_process_mb': {
            key: round(value['process'] / 2**20) for key, value in memory.items()
        },
        'compile_seconds': {
            'ours': ours_.info['compile_seconds'], 'peer': peer.info['compile_seconds']
        },
        'parameters': ours_.info['parameters'],
        'difference': difference,
        'machine': platform.platform(),
        'versions': {**ours_.info['versions'], **peer.info['versions']},
        'commit': commit(),
    }  # fmt: skip


def main(argv: list[str]) -> None:
    import jax

    on_cpu = jax.default_backend() == 'cpu'
    for name, case in cases(on_cpu).items():
        wanted = not FLAGS.cases or any(part in name for part in FLAGS.cases)
        if not wanted or (case['peer'] == 'keras' and not FLAGS.keras_python):
            continue
        print(name, flush=True)
        line = compare(name, case)
        memory, compile_seconds = line['peak_memory_mb'], line['compile_seconds']
        print(
            f'  ours {line["ours"]:.3f} images/s, {line["peer_is"]} {line["peer"]:.3f}: '
            f'{line["ratio"]:.2f}x; memory {memory["ours"]} against {memory["peer"]} MB; '
            f'compiled in {compile_seconds["ours"]:.1f} s',
            flush=True,
        )
        Path(FLAGS.results).parent.mkdir(exist_ok=True)
        with open(FLAGS.results, 'a') as file:
            file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
    if sys.argv[1:] and sys.argv[1] in ('--check', '--worker'):
        {'--check': check, '--worker': ours}[sys.argv[1]](json.loads(sys.argv[2]))
    else:
        flags.DEFINE_list('cases', [], 'parts of the names of the cases to run; default: all')
        flags.DEFINE_list(
            'modes',
            ['eager', 'eager channels_last', 'compile', 'compile channels_last'],
            'of PyTorch',
        )
        flags.DEFINE_integer('repeats', 3, f'turns of each contender, of {STEPS} steps')
        flags.DEFINE_string('keras_python', '', 'Python of the Keras environment')
        flags.DEFINE_string('results', 'experiments/results/speed.jsonl', 'gets the lines')
        app.run(main)
