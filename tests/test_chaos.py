"""A run that is killed and started again is the run that was never stopped."""

import functools
import os
import re
import shutil
import subprocess
import sys

import pytest

from pspnet_jax.runtime import checkpoint
from tests.conftest import ROOT, TINY
from tests.stress import chaos, faults, soak


@pytest.mark.stress
def test_three_kills_change_nothing(trained, tmp_path):
    """While it compiles or loads what was compiled, while it saves, and while it validates."""
    moments = ('compile', 0.1), ('save', 0.05), ('validation', 0.0)
    run = functools.partial(
        chaos.run_until, workdir=tmp_path / 'run', config=TINY, environment=os.environ
    )
    phases, dice = [], chaos.dice_of(trained[0])
    for aim, delay in moments:
        phases.append(run(aim, delay, 1))
        assert chaos.faults_of_the_best(tmp_path / 'run', dice) == []
        chaos.damage_metrics(tmp_path / 'run')
    assert all(phases[:2])  # the last is short: on a busy machine it may be missed
    run('', 0, 0)
    assert chaos.differences(tmp_path / 'run', trained[0]) == []
    assert chaos.faults_of_metrics(tmp_path / 'run') == []


@pytest.mark.stress
def test_differences_are_seen(trained, tmp_path):
    theirs = trained[0]
    copy = shutil.copytree(theirs, tmp_path / 'copy')
    assert chaos.differences(copy, theirs) == []
    lines = (copy / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (copy / 'metrics.jsonl').write_text(''.join([*lines, lines[-1]]))
    (copy / 'checkpoints' / '5.tmp').mkdir()
    (copy / 'half').touch()
    expected = ['5.tmp is left', 'half is in one only', 'metrics.jsonl differs']
    assert chaos.differences(copy, theirs) == expected
    arrays = chaos.read_arrays(theirs, 4)
    assert {name.split("'")[1] for name in arrays} == {
        'params', 'batch_stats', 'ema_params', 'opt_state',
    }  # fmt: skip
    assert sum(array.nbytes for array in arrays.values()) > 10**5
    shutil.rmtree(copy / 'checkpoints' / '4')
    assert any(fault.startswith('steps [') for fault in chaos.differences(copy, theirs))


@pytest.mark.stress
def test_a_best_step_that_is_lost_or_misjudged_is_seen(trained, tmp_path):
    copy, dice = shutil.copytree(trained[0], tmp_path / 'copy'), chaos.dice_of(trained[0])
    assert (dice.keys(), checkpoint.steps(copy)) == ({2, 4}, [4])
    assert chaos.faults_of_the_best(copy, dice) == []
    lost, misjudged = {**dice, 2: 1.0}, {**dice, 4: 1.0}
    assert chaos.faults_of_the_best(copy, lost) == ['of [4] the best is 2, and 4 is taken']
    (fault,) = chaos.faults_of_the_best(copy, misjudged)
    assert fault == f'step 4 has Dice {dice[4]}, not 1.0'
    chaos.damage_metrics(copy)
    assert len(chaos.faults_of_metrics(copy)) == 1


CACHED = """
import sys, warnings
from pathlib import Path
import jax, jax.numpy as jnp
from pspnet_jax.runtime import compilation

warnings.simplefilter('always')
compilation.use_cache()
program = compilation.jit(lambda x: jnp.sin(x) + 1)
program(0.0)
(path,) = Path(sys.argv[1]).glob('jit__lambda*-cache')
for part in (path.read_bytes()[:-9], b''):
    path.write_bytes(part)
    for _ in range(2):
        jax.clear_caches()
        assert program(0.0) == 1
        print('compiled', file=sys.stderr)
"""


@pytest.mark.stress
def test_half_an_entry_of_the_compilation_cache_is_replaced(tmp_path):
    """JAX warns of it and compiles; the next time there is nothing to warn of."""
    environment = os.environ | {
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    done = subprocess.run(
        [sys.executable, '-c', CACHED, str(tmp_path)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    told = re.findall('Error reading|compiled', done.stderr)
    assert told == ['Error reading', 'compiled', 'compiled'] * 2, done.stderr


def run_of(rss_kb, **grown):
    """Samples of 100 steps, by functions of the step."""
    usual = {'threads': lambda _: 40, 'fds': lambda _: 9, 'children': lambda _: 0}
    usual |= {'pool': lambda n: 12 + n // 50} | grown
    return [
        soak.Sample(step, rss_kb(step), *(usual[name](step) for name in usual))
        for step in range(1, 101)
    ]


def test_what_grows_is_found():
    """Memory by its medians, the rest by the fewest there are: a save has threads for a moment."""
    flat = soak.judge(run_of(lambda n: 10**6 + n % 7, threads=lambda n: 40 + 9 * (n % 3)), 100)
    assert flat['constant']
    assert abs(flat['kb_per_1000_steps']) < 50
    assert flat['threads'] == [40, 40]
    slow = soak.judge(run_of(lambda n: 10**6 + 1000 * n), 100)
    assert not slow['constant']
    assert slow['kb_per_1000_steps'] == pytest.approx(10**6)
    assert slow['rss_grown'] == pytest.approx(0.07 / 1.025, abs=1e-3)
    assert not soak.judge(run_of(lambda _: 10**6, fds=lambda n: n), 100)['constant']


def test_every_fault_names_tests_that_are_there():
    for fault in faults.FAULTS:
        for name in fault.names():
            file, test = name.split('::')
            assert f'def {test.split("[")[0]}(' in (ROOT / file).read_text(), name
