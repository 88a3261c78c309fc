"""Compares our speed with PyTorch's on one GPU, in minutes; gpu_speed.sh runs it.

  python -m experiments.benchmarks.gpu_speed --results=FILE [--seconds=440] [--case=PATTERN ...]
      [--tiny]

First every network's forward pass and one training step are compared with the CPU, in float32 with
TF32 off, and checked to be finite in bfloat16; batches from the device cache are compared with the
host's. Then each case runs in a separate process: 3 steps, then 20 timed ones, started without
waiting for each other, as in the training loop. A timed process has the GPU to itself; meanwhile
the next one imports, traces and lowers. Lines are written immediately; after --seconds the rest is
stopped. --tiny runs the same with small sizes on any machine, as a rehearsal.
"""

import collections
import contextlib
import fcntl
import functools
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.benchmarks import speed
from pspnet_jax.training import placement, update

RESULTS = flags.DEFINE_string('results', 'experiments/results/gpu.jsonl', 'gets the lines')
SECONDS = flags.DEFINE_float('seconds', 440, 'no case starts after this')
CASES = flags.DEFINE_multi_string('case', [], 'pattern of the cases to run; default: all')
CHECK = flags.DEFINE_bool('check', True, 'compare with the CPU first')
TINY = flags.DEFINE_bool('tiny', False, 'small sizes, to rehearse')

WARM, TIMED, BLOCK = 3, 20, 5  # steps; a block of steps is started at once
PROCESSES = min(8, os.cpu_count() or 1)  # that check networks in parallel
LOGITS = 1e-4  # allowed relative difference from the CPU
UPDATE = 1e-2  # likewise; rounding can cross the kinks of ReLU and max pooling


# The timed cases, in order: (side, network, size, batch, dtype, trains, variant).
PSPNET_50 = ('pspnet_resnet50', speed.PSPNET_50)
PSPNET_101 = ('pspnet_resnet101', speed.PSPNET_101)
UNET = ('unet_resnet34', speed.UNET)
DEEPLAB = ('deeplabv3_resnet50', speed.DEEPLAB)
PLAN = (
    ('torch', PSPNET_50, 473, 16, 'bfloat16', True, 'compile channels_last'),
    ('ours', PSPNET_50, 473, 16, 'bfloat16', True, 'as it is'),
    ('ours', PSPNET_50, 473, 16, 'bfloat16', True, 'remat none'),
    ('ours', PSPNET_50, 473, 16, 'bfloat16', True, 'remat none, one-pass statistics'),
    ('ours', PSPNET_50, 473, 16, 'bfloat16', True, "remat none, XLA's gradients"),
    ('torch', PSPNET_50, 473, 16, 'bfloat16', False, 'compile channels_last'),
    ('ours', PSPNET_50, 473, 16, 'bfloat16', False, 'as it is'),
    ('ours', PSPNET_50, 473, 16, 'bfloat16', True, 'remat none, no command buffers'),
    ('ours', PSPNET_50, 473, 16, 'bfloat16', True, 'remat none, latency hiding'),
    ('ours', PSPNET_50, 256, 64, 'bfloat16', True, 'remat none'),
    ('torch', PSPNET_50, 256, 64, 'bfloat16', True, 'compile channels_last'),
    ('ours', UNET, 256, 64, 'bfloat16', True, 'remat none'),
    ('torch', UNET, 256, 64, 'bfloat16', True, 'compile channels_last'),
    ('ours', PSPNET_50, 473, 16, 'float32', True, 'remat none'),
    ('torch', PSPNET_50, 473, 16, 'float32', True, 'compile channels_last'),
    ('ours', DEEPLAB, 256, 64, 'bfloat16', True, 'remat none'),
    ('torch', DEEPLAB, 256, 64, 'bfloat16', True, 'compile channels_last'),
    ('ours', PSPNET_101, 473, 16, 'bfloat16', True, 'remat none'),
    ('torch', PSPNET_101, 473, 16, 'bfloat16', True, 'compile channels_last'),
)


def plan(tiny: bool) -> list[dict[str, Any]]:
    """The cases in the order in which they run; the first two of ours are profiled."""
    found = []
    for side, (name, network), size, batch, dtype, train, variant in PLAN:
        if tiny:
            size, batch, variant = 65, 2, variant.replace('compile', 'eager')
        mode = 'train' if train else 'inference'
        found.append({
            **network,
            'name': f'{side} {mode} {name} {size}x{size} batch {batch} {dtype}, {variant}',
            'number': len(found), 'side': side, 'size': size, 'batch': batch, 'dtype': dtype,
            'train': train, 'variant': variant, 'classes': 2, 'profile': len(found) in (1, 2),
        })  # fmt: skip
    return found


# The variants: changes before the step is made, and options of XLA.
def one_pass_statistics() -> None:
    """Mean and mean square in one pass over x; `layers.normalize` takes two."""
    import jax
    import jax.numpy as jnp

    from pspnet_jax.models import layers

    def forward(x, scale, bias, epsilon, axis_name):
        wide = x.astype(jnp.float32)
        mean, square = layers._means(axis_name, wide, jnp.square(wide))
        var = jnp.maximum(square - jnp.square(mean), 0)
        inverse = jax.lax.rsqrt(var + epsilon)
        y = (wide - layers._wide(mean, x)) * layers._wide(inverse * scale, x)
        return (y + layers._wide(bias, x), mean, var), (x, mean, inverse, scale)

    layers._normalize_forward = forward
    layers.normalize.defvjp(forward, layers._normalize_backward)


def xlas_gradients() -> None:
    """JAX's own gradients of dilated 3x3s and of max pooling."""
    import jax

    from pspnet_jax.models import convolution

    def forward(x, window, pad):
        return convolution._max_pool(x, window, pad), x

    def backward(window, pad, x, grad):
        return jax.vjp(lambda x: convolution._max_pool(x, window, pad), x)[1](grad)

    convolution.max_pool.defvjp(forward, backward)
    convolution.conv3x3 = convolution.plain_3x3


CHANGES = {'one-pass statistics': one_pass_statistics, "XLA's gradients": xlas_gradients}
XLA_OPTIONS = {
    'no command buffers': {'xla_gpu_enable_command_buffer': ''},
    'latency hiding': {'xla_gpu_enable_latency_hiding_scheduler': True},
}


@contextlib.contextmanager
def on_gpu(case: dict[str, Any], alone: bool = True) -> Iterator[None]:
    """Wait until no other process of this run uses the GPU, or (not `alone`) none that times."""
    with open(case['lock'], 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def timed(step: Callable[[], Any], wait: Callable[[], Any]) -> dict[str, float]:
    """Median, smallest and largest seconds per step, over blocks of `BLOCK`."""
    for _ in range(WARM):
        step()
    wait()
    seconds = []
    for _ in range(TIMED // BLOCK):
        start = time.perf_counter()
        for _ in range(BLOCK):
            step()
        wait()
        seconds.append((time.perf_counter() - start) / BLOCK)
    return {'seconds': statistics.median(seconds), 'least': min(seconds), 'most': max(seconds)}


def random_variables(model, channels: int = 3) -> Any:
    """He-normal kernels, scales and variances of one, the rest zeros; nothing is compiled."""
    import jax
    import jax.numpy as jnp

    image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)
    rng = np.random.default_rng(0)

    def draw(path, shape):
        if path[-1].key in ('scale', 'var'):
            return np.ones(shape.shape, np.float32)
        if len(shape.shape) < 2:
            return np.zeros(shape.shape, np.float32)
        deviation = np.sqrt(2 / np.prod(shape.shape[:-1]))
        return rng.standard_normal(shape.shape, np.float32) * np.float32(deviation)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def our_program(case: dict[str, Any]):
    """(jitted, its arguments): a training step with SGD and momentum, or the logits."""
    import jax
    import optax

    from pspnet_jax import models
    from pspnet_jax.config import base
    from pspnet_jax.runtime import compilation

    model = models.create(num_classes=case['classes'], dtype=case['dtype'], **case['model'])
    variables = random_variables(model)
    rng = np.random.default_rng(0)
    shape = (case['batch'], case['size'], case['size'])
    image = rng.standard_normal((*shape, 3), np.float32)
    if not case['train']:
        predict = compilation.jit(lambda v, x: model.apply(v, x, train=False)['logits'])
        return predict, (variables, image)
    batch = {'image': image, 'mask': rng.integers(0, case['classes'], shape).astype(np.int32)}
    tx = optax.sgd(1e-3, momentum=0.9)
    params, stats = variables['params'], variables.get('batch_stats', {})
    momentum = jax.eval_shape(tx.init, params)
    momentum = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), momentum)
    state = update.TrainState(np.zeros((), np.int32), params, stats, momentum, None)
    config = base.get_config()
    options = {
        'loss': {**config.loss.to_dict(), 'dice': 0.0},
        'augment': {},
        'remat': 'none' if 'remat none' in case['variant'] else config.train.remat,
    }
    step = update.bind_step(config, model, tx, **options)
    return compilation.jit(step, donate_argnums=0), (state, batch)


def time_ours(case: dict[str, Any]) -> dict[str, Any]:
    import jax

    from pspnet_jax.runtime import compilation

    for words, change in CHANGES.items():
        if words in case['variant']:
            change()
    jitted, arguments = our_program(case)
    parameters = jax.tree.leaves(arguments[0].params if case['train'] else arguments[0]['params'])
    lowered, lower_seconds = clocked(lambda: jitted.lower(*arguments))
    options = dict(compilation.options())
    if jax.default_backend() == 'gpu':
        for words, more in XLA_OPTIONS.items():
            options |= more if words in case['variant'] else {}
    with on_gpu(case):
        compiled, compile_seconds = clocked(lambda: lowered.compile(options))
        first, batch = jax.device_put(arguments)
        kept = {'state': first, 'out': None}

        def step():
            if case['train']:
                kept['state'], kept['out'] = compiled(kept['state'], batch)
            else:
                kept['out'] = compiled(first, batch)

        def wait():
            jax.block_until_ready(kept['out'])

        line = timed(step, wait)
        memory = jax.devices()[0].memory_stats() or {}
        operations = profile(step, wait) if case['profile'] else {}
    text = compiled.as_text()
    if case['profile']:
        with gzip.open(f'{case["results"]}.{case["number"]}.hlo.gz', 'wt') as file:
            file.write(text)
    out = jax.tree.leaves(jax.device_get(kept['out']))
    return line | {
        'lower_seconds': lower_seconds,
        'compile_seconds': compile_seconds,
        'peak_memory_mb': round(memory.get('peak_bytes_in_use', 0) / 2**20),
        'parameters': sum(x.size for x in parameters),
        'finite': all(bool(np.isfinite(x).all()) for x in out),
        'hlo': count_operations(text),
        'operations_ms': operations,
        'versions': {'jax': jax.__version__},
    }


def clocked(function: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds) of a call."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def count_operations(text: str) -> dict[str, int]:
    """Counts in an optimised program: transposes, cuDNN's convolutions, dilated windows, ..."""
    convolutions = [line for line in text.splitlines() if '__cudnn$conv' in line]
    return {
        'transposes': len(re.findall(r'= \S+ transpose\(', text)),
        'cudnn_convolutions': len(convolutions),
        'dilated_windows': sum('_dilate=' in line for line in convolutions),
        'fusions': len(re.findall(r'= .* fusion\(', text)),
    }


def profile(step: Callable[[], Any], wait: Callable[[], Any], steps: int = 3) -> dict[str, float]:
    """Milliseconds per step of the program's 40 longest operations, by name."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step()
            wait()
        found = list(Path(folder).rglob('*.trace.json.gz'))
        events = json.loads(gzip.decompress(found[0].read_bytes()))['traceEvents'] if found else []
    names = {
        event['pid']: event['args']['name']
        for event in events
        if event.get('name') == 'process_name'
    }
    spent = collections.Counter()
    for event in events:
        if event.get('ph') == 'X' and 'GPU' in names.get(event.get('pid'), ''):
            arguments = event.get('args', {})
            if name := arguments.get('hlo_op'):
                spent[name] += event['dur'] / 1000 / steps
    return dict(spent.most_common(40))


def time_torch(case: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from experiments.benchmarks import peers

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.backends.cudnn.benchmark = True
    peers.use_tf32(True)
    module = peers.create(case['peer'], case['classes']).to(device)
    shape = (case['batch'], case['size'], case['size'])
    image = torch.randn((shape[0], 3, *shape[1:]), device=device)
    labels = torch.randint(0, case['classes'], shape, device=device)
    options = {'train': case['train'], 'dtype': case['dtype'], 'mode': case['variant']}
    step, uncompiled = peers.make_step(module, image, labels, **options)
    with on_gpu(case, alone=case['number'] > 0):  # the first compiles during the checks
        _, compile_seconds = clocked(lambda: (step(), peers.synchronize()))
    with on_gpu(case):
        line = timed(step, peers.synchronize)
    peak = torch.cuda.max_memory_allocated() if device == 'cuda' else 0
    with FlopCounterMode(display=False) as counter:
        uncompiled()
    return line | {
        'compile_seconds': compile_seconds,
        'peak_memory_mb': round(peak / 2**20),
        'parameters': sum(p.numel() for p in module.parameters()),
        'gflop': counter.get_total_flops() / 1e9,
        'matmul_tflop_per_second': peers.matmul_peak(device, case['dtype']) / 1e12,
        'versions': {'torch': torch.__version__},
    }


def one_step(name: str, dtype: str, device, compiler_options: dict[str, Any]):
    """(inference logits, the update of all parameters in one vector, the loss) on `device`."""
    import jax
    import optax

    from pspnet_jax import models
    from pspnet_jax.config import base
    from pspnet_jax.runtime import compilation

    rng = np.random.default_rng(0)
    batch = {
        'image': rng.standard_normal((2, 64, 64, 3), np.float32),
        'mask': rng.integers(0, 2, (2, 64, 64)).astype(np.int32),
    }
    own = models.MODELS[name][1]
    options = {'width': 8, 'fc_features': 32, 'dtype': dtype}
    if own and own.startswith('resnet'):
        options['backbone'] = 'resnet18'  # which has all that deeper ones have, but compiles soon
    model = models.create(name, num_classes=2, **options)
    variables = random_variables(model)
    params, stats = variables['params'], variables.get('batch_stats', {})
    tx, config = optax.sgd(1e-3, momentum=0.9), base.get_config()
    state = update.TrainState(np.zeros((), np.int32), params, stats, tx.init(params), None)
    step = update.bind_step(config, model, tx, augment={}, remat='none')

    def both(state, batch):
        values = {'params': state.params, 'batch_stats': state.batch_stats}
        logits = model.apply(values, batch['image'], train=False)['logits']
        return logits, step(state, batch)

    arguments = jax.device_put((state, batch), device)
    with jax.default_matmul_precision('highest' if dtype == 'float32' else 'default'):
        compiled = compilation.jit(both).lower(*arguments).compile(compiler_options)
    logits, (after, metrics) = jax.device_get(compiled(*arguments))
    pairs = zip(jax.tree.leaves(after.params), jax.tree.leaves(params), strict=True)
    change = np.concatenate([np.ravel(new - old) for new, old in pairs])
    return np.asarray(logits, np.float32), change, float(metrics['loss'])


def check_networks(number: int) -> list[dict[str, Any]]:
    """This process's share of the networks: how far a step on the GPU is from the CPU's.

    Differences are norms, relative to that of the reference.
    """
    import jax

    from pspnet_jax import models

    accelerator, cpu = jax.devices()[0], jax.devices('cpu')[0]
    quick = {'xla_gpu_autotune_level': 0} if accelerator.platform == 'gpu' else {}
    lines = [check_cache()] if number == 0 else []
    for name in tuple(models.MODELS)[number::PROCESSES]:
        ours = one_step(name, 'float32', accelerator, quick)
        reference = one_step(name, 'float32', cpu, {})
        half = one_step(name, 'bfloat16', accelerator, quick)
        logits, update = (
            float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for a, b in zip(ours[:2], reference[:2], strict=True)
        )
        finite = all(bool(np.isfinite(x).all()) for x in half)
        lines.append({'check': name, 'logits': logits, 'update': update, 'bfloat16_finite': finite})
        lines[-1]['same'] = logits < LOGITS and update < UPDATE
        print(json.dumps(lines[-1]), flush=True)
    return lines


def check_cache() -> dict[str, Any]:
    """Compare three updates from the device cache with those from the host's batches."""
    import itertools

    import jax
    import jax.numpy as jnp
    import optax

    from pspnet_jax import models
    from pspnet_jax.config import base
    from pspnet_jax.data import phantom, pipeline

    slices = phantom.load(volumes=3, slices=4, size=32, seed=0)
    drawn = pipeline.draws(slices, seed=0, sampling='lesion', lesion_floor=0.1)
    places = {'batch_size': 4, 'first_step': 0}
    rows = np.stack(list(itertools.islice(pipeline.rows(drawn, **places), 3)))
    batches = pipeline.batches(slices, drawn, intensity=None, threads=1, **places)
    model, tx = models.create('unet_mini', num_classes=2, width=4), optax.sgd(0.01)
    state = update.create_state(model, tx, seed=0, channels=3, ema=False)
    step = update.bind_step(base.get_config(), model, tx)
    one, three = (jax.tree.map(jnp.copy, state) for _ in range(2))
    with jax.default_matmul_precision('highest'):
        alone = placement.over_mesh(step)
        together = placement.over_mesh_cached(step, pipeline.store(slices, None))
        for _ in range(3):
            batch = next(batches)
            one = alone.compile(one, batch)[0](one, batch)[0]
        three = together.compile(three, rows)[0](three, rows)[0]
    differences = [
        float(np.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(three.params), strict=True)
    ]
    return {
        'check': 'device cache',
        'parameters': max(differences),
        'same': max(differences) < LOGITS,
    }


def work(case: dict[str, Any]) -> None:
    """A process for a case or a share of the checks. The last that it prints are its lines."""
    from experiments.provenance import commit, device

    if case['side'] == 'check':
        with on_gpu(case, alone=False):
            lines = check_networks(case['number'])
    else:
        line = {'ours': time_ours, 'torch': time_torch}[case['side']](case)
        lines = [
            {'case': case['name'], 'images_per_second': case['batch'] / line['seconds']} | line
        ]
    made_by = {'device': device(), 'commit': commit()}
    print(json.dumps([line | made_by for line in lines]), flush=True)


def start(case: dict[str, Any], log) -> subprocess.Popen:
    environment = {
        **os.environ,
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
        'TF_CPP_MIN_LOG_LEVEL': '3',
        'JAX_COMPILATION_CACHE_DIR': case['cache'],  # XLA keeps what it measured there too
    }
    return subprocess.Popen(
        [sys.executable, '-m', 'experiments.benchmarks.gpu_speed', '--work', json.dumps(case)],
        stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
    )  # fmt: skip


def main(_) -> None:
    end = time.monotonic() + SECONDS.value
    results = Path(RESULTS.value).absolute()
    results.parent.mkdir(parents=True, exist_ok=True)
    waiting = [
        case
        for case in plan(TINY.value)
        if not CASES.value or any(re.search(part, case['name']) for part in CASES.value)
    ]
    failed = False
    with tempfile.TemporaryDirectory() as folder, open(f'{results}.log', 'w') as log:
        shared = {'lock': f'{folder}/lock', 'cache': f'{folder}/cache', 'results': str(results)}
        processes = range(PROCESSES if CHECK.value else 0)
        checks = [{'side': 'check', 'name': f'check {n}', 'number': n} for n in processes]
        running = {case['name']: start(case | shared, log) for case in checks}
        while running or waiting:
            timing = sum(not name.startswith('check') for name in running)
            if waiting and timing < 2 and time.monotonic() < end:  # one is timed, the next traces
                case = waiting.pop(0)
                running[case['name']] = start(case | shared, log)
                continue
            if time.monotonic() > end:
                for name, process in running.items():
                    print(f'{name}: no time left', flush=True)
                    process.kill()
                break
            done = [name for name, process in running.items() if process.poll() is not None]
            for name in done:
                failed |= not write(name, running.pop(name), results)
            if not done:
                time.sleep(0.2)
    sys.exit(failed)


def write(name: str, process: subprocess.Popen, results: Path) -> bool:
    """Add the lines of an ended process; return whether there are any and the checks pass."""
    printed = process.stdout.read().splitlines()
    if process.returncode or not printed:
        print(f'{name}: failed with status {process.returncode}, see {results}.log', flush=True)
        return False
    lines = json.loads(printed[-1])
    with open(results, 'a') as file:
        for line in lines:
            file.write(json.dumps(line) + '\n')
            short = {k: v for k, v in line.items() if k not in ('case', 'operations_ms', 'hlo')}
            print(name, json.dumps(short), flush=True)
    return all(line.get('same', True) and line.get('bfloat16_finite', True) for line in lines)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--work']:
        work(json.loads(sys.argv[2]))
    else:
        app.run(main)
