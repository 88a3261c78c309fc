"""Measures the gain of each optimised form: the training step with and without it.

  python -m experiments.benchmarks.forms ['--names=all of them,no Winograd'] [--rounds=3]

Each variant is a training step at 256x256, batch 4, in a separate process; they take turns. It is
PSPNet-50's in float32, or by its prefix U-Net's (`unet:`), that of PSPNet on VGG16 (`vgg:`) or of
U-Net on MobileNetV2 (`mobilenet_unet:`), or PSPNet-50's in bfloat16 (`bfloat16:`). One line per
variant is added to experiments/results/forms.jsonl: the seconds of a step and of compilation, the
GFLOP as XLA counts them, and the temporaries in MB.
"""

import atexit
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from pspnet_jax.training import update

NAMES = flags.DEFINE_list('names', [], 'which variants; default: all')
ROUNDS = flags.DEFINE_integer('rounds', 3, 'processes per variant')
RESULTS = Path('experiments/results/forms.jsonl')


def without_winograd():
    from pspnet_jax.models import convolution

    convolution.WINOGRAD_CHANNELS = 10**9


def winograd_from_128():
    from pspnet_jax.models import convolution

    convolution.WINOGRAD_CHANNELS = 128


def without_products():
    """Only XLA's 3x3s, forward and backward."""
    from pspnet_jax.models import convolution

    convolution.conv3x3 = convolution.plain_3x3


def without_pyramid_conv():
    """The pyramid's maps are resized and concatenated before the head."""
    import jax.numpy as jnp

    from pspnet_jax.models import layers

    single = layers.ConvNorm.__call__

    def concatenated(self, x, train):
        if isinstance(x, tuple):
            x = jnp.concatenate([layers.resize(y, x[0].shape[1:3]) for y in x], axis=-1)
        return single(self, x, train)

    layers.ConvNorm.__call__ = concatenated


def without_batch_norm():
    """Flax's BatchNorm with JAX's gradient."""
    import flax.linen as nn

    from pspnet_jax.models import backbones, layers

    def flaxs(train, dtype, axis_name, name=None):
        return nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False,
            dtype=dtype, axis_name=axis_name, name=name,
        )  # fmt: skip

    layers.batch_norm = backbones.batch_norm = flaxs


def without_max_pool():
    """JAX's gradient of max pooling."""
    from pspnet_jax.models import backbones, convolution

    backbones.max_pool = convolution._max_pool


def without_transposed_2x2():
    import flax.linen as nn

    from pspnet_jax.models import unet

    unet.DoubleSize = lambda features, dtype, name: nn.ConvTranspose(
        features, (2, 2), (2, 2), 'VALID', dtype=dtype, name=name
    )


def without_depthwise():
    from pspnet_jax.models import convolution

    convolution.depthwise = convolution.plain


def without_option(name):
    def change():
        from pspnet_jax.runtime import compilation

        chosen = compilation.options()
        del chosen[name]
        compilation.options = chosen.copy

    return change


def with_doubled_maps():
    from pspnet_jax.models import unet
    from pspnet_jax.models.convolution import _of_doubled_by_repeating

    unet.conv3x3_of_doubled = _of_doubled_by_repeating


def without_thin_forms():
    from pspnet_jax.models import convolution

    convolution.THIN = 0


def without_bfloat16_products():
    import jax.numpy as jnp

    from pspnet_jax.models import convolution

    single = convolution.cpu_dot
    convolution.cpu_dot = lambda x, y, contracted: single(
        x.astype(jnp.float32), y.astype(jnp.float32), contracted
    )


def second_start():
    """Trace and lower, but take the compiled program from the cache."""
    import jax

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    jax.config.update('jax_compilation_cache_dir', folder)
    compile_step('all of them')
    jax.clear_caches()


PSPNET, UNET = {'name': 'pspnet', 'deep_stem': True}, {'name': 'unet'}
VGG = {'name': 'pspnet', 'backbone': 'vgg16'}
MOBILENET = {'name': 'unet', 'backbone': 'mobilenet_v2'}
BFLOAT16 = {**PSPNET, 'dtype': 'bfloat16'}
# {name: (network, options of the step, a change before the model is made)}.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    'all of them': (PSPNET, {}, None),
    'no Winograd': (PSPNET, {}, without_winograd),
    'Winograd from 128 channels': (PSPNET, {}, winograd_from_128),
    "no 3x3 but XLA's": (PSPNET, {}, without_products),
    'pyramid concatenated': (PSPNET, {}, without_pyramid_conv),
    "Flax's BatchNorm": (PSPNET, {}, without_batch_norm),
    "XLA's max pooling gradient": (PSPNET, {}, without_max_pool),
    'vgg: all of them': (VGG, {}, None),
    "vgg: XLA's max pooling gradient": (VGG, {}, without_max_pool),
    'default schedule': (PSPNET, {}, without_option('xla_cpu_scheduler_type')),
    'second start': (PSPNET, {}, second_start),
    'remat none': (PSPNET, {'remat': 'none'}, None),
    'accumulate 2': (PSPNET, {'accumulate': 2}, None),
    'accumulate 4': (PSPNET, {'accumulate': 4}, None),
    'unet: all of them': (UNET, {}, None),
    'unet: transposed convolutions': (UNET, {}, without_transposed_2x2),
    'mobilenet_unet: all of them': (MOBILENET, {}, None),
    "mobilenet_unet: XLA's depthwise": (MOBILENET, {}, without_depthwise),
    'mobilenet_unet: doubled maps': (MOBILENET, {}, with_doubled_maps),
    'mobilenet_unet: no thin forms': (MOBILENET, {}, without_thin_forms),
    "mobilenet_unet: YNN's convolutions": (
        MOBILENET,
        {},
        without_option('xla_cpu_experimental_ynn_fusion_type'),
    ),
    'bfloat16: all of them': (BFLOAT16, {}, None),
    'bfloat16: products in float32': (BFLOAT16, {}, without_bfloat16_products),
}


def compile_step(name: str):
    """(the variant's compiled step, a state, a batch, the cost of compiling)."""
    import jax.numpy as jnp
    import numpy as np
    import optax

    from pspnet_jax import models
    from pspnet_jax.config import base
    from pspnet_jax.runtime import compilation

    network, options, change = VARIANTS[name]
    if change:
        change()
    model = models.create(num_classes=2, **network)
    tx = optax.sgd(1e-3, momentum=0.9)
    state = update.create_state(model, tx, seed=0, channels=3, ema=False)
    rng = np.random.default_rng(0)
    batch = {
        'image': jnp.asarray(rng.standard_normal((4, 256, 256, 3)), jnp.float32),
        'mask': jnp.asarray(rng.integers(0, 2, (4, 256, 256)), jnp.int32),
    }
    step = update.bind_step(base.get_config(), model, tx, **options)
    jitted = compilation.jit(step, donate_argnums=0)
    compiled, facts = compilation.compile_now(jitted, state, batch)
    return compiled, state, batch, facts


def measure(name: str) -> dict[str, float]:
    """Seconds of a step (median of three after one) and of compilation, GFLOP, temporaries."""
    import jax

    compiled, state, batch, facts = compile_step(name)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return {
        'seconds': statistics.median(seconds[1:]),
        'compile_seconds': facts['seconds'],
        'gflop': facts['gflop'],
        'temporary_mb': facts['temporary_mb'],
    }


def main(_) -> None:
    import jax

    from experiments.provenance import commit, device

    names = NAMES.value or list(VARIANTS)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(ROUNDS.value):
        for name in names:
            command = [sys.executable, '-m', 'experiments.benchmarks.forms', '--measure', name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f'{name:32} {rounds[name][-1]}', flush=True)
    with open(RESULTS, 'a') as file:
        for name, found in rounds.items():
            line = {
                'variant': name,
                **{key: statistics.median(one[key] for one in found) for key in found[0]},
                'rounds': found,
                'device': device(),
                'versions': {'jax': jax.__version__},
                'commit': commit(),
            }
            file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--measure']:
        print(json.dumps(measure(sys.argv[2])))
    else:
        app.run(main)
