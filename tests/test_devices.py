"""The line that names the devices, and the GPU that is left idle."""

import importlib.util
import logging
import os
import re
import subprocess
import sys

import jax
import pytest

from pspnet_jax import cli
from pspnet_jax.runtime import devices
from pspnet_jax.runtime.errors import ConfigError
from tests.conftest import ROOT

pytestmark = pytest.mark.newest
LINE = r'\d+ devices?: \w+, .+, jax ' + re.escape(jax.__version__)


@pytest.fixture
def on_cpu(monkeypatch):
    """JAX fell back to the CPU, which nobody asked for."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    before = jax.config.jax_platforms
    jax.config.update('jax_platforms', None)
    yield
    jax.config.update('jax_platforms', before)


@pytest.fixture
def gpu(tmp_path):
    """The files of a GPU."""
    (tmp_path / 'nvidiactl').touch()
    return [str(tmp_path / 'nvidiactl'), str(tmp_path / 'nvidia0')]


def plugin(monkeypatch, *names):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name in names or None)


def test_the_line_says_platform_kind_number_and_version():
    assert re.fullmatch(LINE, devices.describe())
    assert devices.describe().startswith(f'{jax.device_count()} device')


def test_a_platform_that_is_not_there_is_one_line(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'\nand a stack")

    monkeypatch.setattr(jax, 'devices', fail)
    with pytest.raises(ConfigError, match=r"initialize backend 'cuda'\. JAX_PLATFORMS=cpu") as told:
        devices.describe()
    assert 'a stack' not in str(told.value)


def test_a_gpu_without_its_plugin_is_idle(monkeypatch, on_cpu, gpu):
    plugin(monkeypatch)
    advice = devices.idle_gpu(gpu)
    assert f'pip install "jax[cuda13]=={jax.__version__}"' in advice
    assert 'JAX_PLATFORMS=cpu' in advice


def test_a_gpu_that_its_plugin_cannot_use_is_idle_for_jaxs_reason(monkeypatch, on_cpu, gpu):
    def fail(platform):
        raise RuntimeError(f'{platform}: no supported devices found.')

    plugin(monkeypatch, 'jax_cuda12_plugin')
    monkeypatch.setattr(jax, 'devices', fail)
    advice = devices.idle_gpu(gpu)
    assert (
        'jax_cuda12_plugin is installed, but JAX reports: cuda: no supported devices found. '
        in advice
    )
    assert 'pip install' not in advice


def test_nothing_is_said_where_nothing_is_wrong(monkeypatch, on_cpu, gpu, tmp_path):
    assert devices.idle_gpu(gpu)
    assert devices.idle_gpu([str(tmp_path / 'none')]) is None
    for hidden in ('', '-1'):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', hidden)
        assert devices.idle_gpu(gpu) is None
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
    assert devices.idle_gpu(gpu)
    jax.config.update('jax_platforms', 'cpu')
    assert devices.idle_gpu(gpu) is None
    jax.config.update('jax_platforms', None)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert devices.idle_gpu(gpu) is None


COMMAND = """
import functools, logging, sys
from pspnet_jax import cli
from pspnet_jax.runtime import devices

devices.idle_gpu = functools.partial(devices.idle_gpu, [sys.argv.pop()])

def main():
    logging.getLogger('jax._src.xla_bridge').warning('what JAX warns of')
    logging.getLogger('absl').warning('what Orbax warns of')
    logging.getLogger('asyncio').error('what Orbax raises')
    logging.getLogger('some.library').info('what it does')
    logging.getLogger('some.library').warning('what it warns of')

cli.run(main)
"""


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='here JAX uses the GPU')
def test_a_command_on_a_machine_whose_gpu_jax_cannot_use(gpu):
    """The devices, the remedy, and all that JAX warns of."""
    settings = ('JAX_PLATFORMS', 'CUDA_VISIBLE_DEVICES', 'JAX_LOGGING_LEVEL')
    keep = {name: value for name, value in os.environ.items() if name not in settings}
    done = subprocess.run(
        [sys.executable, '-c', COMMAND, gpu[0]], cwd=ROOT, env=keep, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second, *rest = done.stderr.splitlines()
    assert re.fullmatch(LINE, first)
    assert second.startswith('warning: this machine has an NVIDIA GPU but JAX runs on the CPU: ')
    assert rest == ['warning: what JAX warns of', 'warning: what it warns of']


@pytest.mark.parametrize(
    ('name', 'level', 'shown'),
    [
        ('pspnet_jax.train', 'INFO', True),
        ('__main__', 'INFO', True),
        ('jax._src.xla_bridge', 'INFO', False),
        ('jax._src.xla_bridge', 'WARNING', True),
        ('jax', 'ERROR', True),
        ('absl', 'WARNING', False),
        ('absl', 'ERROR', False),  # Orbax's tracebacks, above the line that says it
        ('absl', 'CRITICAL', True),
        ('asyncio', 'CRITICAL', False),
        ('pspnet_jax_of_others', 'INFO', False),
    ],
)
@pytest.mark.parametrize('path', ['/x/site-packages/y.py', '/x/y.py'])
def test_records_are_shown_by_logger_and_level_wherever_the_file_lies(name, level, shown, path):
    levelno = getattr(logging, level)
    record = logging.LogRecord(name, levelno, path, 1, 'words', (), None)
    assert cli._is_shown(record) == shown
