"""The devices that JAX uses, and why it does not use the GPU."""

import importlib.util
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import jax

from pspnet_jax.runtime.errors import ConfigError, first_line

NVIDIA = ('/dev/nvidiactl', '/dev/nvidia0')
PLUGINS = ('jax_cuda13_plugin', 'jax_cuda12_plugin')


def describe() -> str:
    """'1 device: gpu, NVIDIA H100 80GB HBM3, jax 0.12.0'. Raises ConfigError without a device."""
    try:
        first, count, processes = jax.devices()[0], jax.device_count(), jax.process_count()
    except (RuntimeError, AssertionError) as error:
        asked = f'JAX_PLATFORMS={jax.config.jax_platforms}: ' if jax.config.jax_platforms else ''
        reason = first_line(error) if str(error) else 'the machine has no such device'
        raise ConfigError(f'{asked}{reason}. JAX_PLATFORMS=cpu uses the CPU') from error
    kind = _processor() if first.platform == 'cpu' else first.device_kind
    number = f'{count} device{"s" * (count > 1)}'
    number += f' in {processes} processes' if processes > 1 else ''
    return f'{number}: {first.platform}, {kind}, jax {jax.__version__}'


def idle_gpu(nodes: Sequence[str] = NVIDIA) -> str | None:
    """What to do about an NVIDIA GPU that JAX does not use; `nodes` are the GPU's device files.

    None if there is no such GPU or the user asked for the CPU.
    """
    asked = jax.config.jax_platforms or os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1')
    if asked or jax.default_backend() != 'cpu' or not any(map(os.path.exists, nodes)):
        return None
    if plugin := next(filter(importlib.util.find_spec, PLUGINS), None):
        remedy = (
            f'{plugin} is installed, but JAX reports: {_refusal()}. nvidia-smi shows whether '
            'another program uses the GPU or the driver is too old'
        )
    else:
        remedy = f'pip install "jax[cuda13]=={jax.__version__}"'
    return (
        f'this machine has an NVIDIA GPU but JAX runs on the CPU: {remedy}. If you want the CPU, '
        'set JAX_PLATFORMS=cpu'
    )


def _refusal() -> str:
    """JAX's reason why CUDA is unavailable."""
    try:
        jax.devices('cuda')
    except RuntimeError as error:
        return first_line(error).rstrip('.')
    return 'the CPU is preferred'


def _processor() -> str:
    """'Intel(R) Xeon(R) CPU @ 2.20GHz', or the architecture if the model is unknown."""
    info = Path('/proc/cpuinfo')
    name = re.search(r'model name\s*: (.*)', info.read_text()) if info.exists() else None
    return name[1] if name else platform.processor() or platform.machine()
