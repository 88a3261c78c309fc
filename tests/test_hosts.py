"""Two processes of two devices each, on this machine, as two hosts: what they do is one run."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from pspnet_jax.evaluation.protocol import evaluate_checkpoint
from pspnet_jax.evaluation.scores import in_order, table
from pspnet_jax.prediction.folders import predict_files
from pspnet_jax.runtime import checkpoint, hosts, log
from pspnet_jax.runtime.errors import CheckpointError, ConfigError, HostError
from pspnet_jax.training.loop import train_and_evaluate
from tests.conftest import ROOT, tiny_config

STEPS = 16
CHANGES = {
    'phantom.volumes': 12,
    'optim.schedule': 'constant',  # so that a short run is the begin of a long one
    'train.steps': STEPS,
    'train.validate_every': 8,
}
GO_ON = f"""
import contextlib, sys
from pspnet_jax.evaluation.protocol import evaluate_checkpoint
from pspnet_jax.prediction.folders import predict_files
from pspnet_jax.runtime import errors, hosts
from pspnet_jax.training.loop import train_and_evaluate
from tests.conftest import tiny_config

hosts.start(f'localhost:{{sys.argv[1]}}', 2, int(sys.argv[2]), 60)
run, folder = sys.argv[3:]
changes = {CHANGES}
train_and_evaluate(tiny_config(**changes), run)
evaluate_checkpoint(run, split='train')
predict_files(run, f'{{folder}}/in', f'{{folder}}/two', save=('mask',))
changes |= {{'train.steps': 4, 'train.validate_every': 4, 'train.steps_per_call': 2}}
for name, more in (('pmap', {{'parallel': 'pmap'}}), ('device', {{'data.cache': 'device'}})):
    config = tiny_config(**changes, **more)
    train_and_evaluate(config, f'{{folder}}/{{name}}')
with contextlib.suppress(errors.HostError):
    hosts.check_same({{'a': {{'same': 1, 'b': hosts.is_first()}}}})
    raise AssertionError('a.b differs')
"""


def two(command):
    """Both processes, started; `command(port, n)` is their arguments."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=2',
    }
    return [
        subprocess.Popen(
            [sys.executable, *command(port, n)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]


def ends(processes, timeout=200):
    """[(exit status, stderr)] of both; none is left, whatever happens."""
    with contextlib.ExitStack() as end:
        for process in processes:
            end.callback(process.kill)
        said = [process.communicate(timeout=timeout)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """What happened to one run in three starts: SIGTERM to one process, SIGKILL to one, nothing."""
    folder = tmp_path_factory.mktemp('hosts')
    config, workdir = folder / 'config.py', folder / 'run'
    config.write_text(
        'from tests.conftest import tiny_config\n\n\n'
        f'def get_config():\n    return tiny_config(**{CHANGES})\n'
    )

    def train(port, n):
        return [
            *('-m', 'pspnet_jax.main', f'--config={config}', f'--workdir={workdir}'),
            *(f'--coordinator=localhost:{port}', '--num_processes=2', f'--process_id={n}'),
            '--host_timeout=5',
        ]

    def until(step, processes):
        """Waits until a checkpoint of `step` or later is there."""
        while max(checkpoint.steps(workdir), default=0) < step:
            assert all(process.poll() is None for process in processes), ends(processes)
            time.sleep(0.02)

    processes = two(train)
    until(1, processes)
    processes[1].send_signal(signal.SIGTERM)
    asked = ends(processes), checkpoint.steps(workdir)[-1]

    processes = two(train)
    until(asked[1] + 2, processes)
    processes[1].kill()
    killed_at = time.monotonic()
    killed = ends(processes), time.monotonic() - killed_at, checkpoint.steps(workdir)[-1]

    rng = np.random.default_rng(0)
    (folder / 'in').mkdir()
    for name in 'abc':
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / 'in' / f'{name}.png')
    ended = ends(two(lambda port, n: ['-c', GO_ON, str(port), str(n), str(workdir), str(folder)]))
    return SimpleNamespace(folder=folder, workdir=workdir, asked=asked, killed=killed, ended=ended)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """The same run in one process on one device."""
    workdir = tmp_path_factory.mktemp('alone')
    train_and_evaluate(tiny_config(**CHANGES), str(workdir))
    return workdir


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_behind_the_same_checkpoint(runs):
    said, step = runs.asked
    for status, text in said:
        assert status == 128 + signal.SIGTERM
        assert f'SIGTERM: stopped after the checkpoint of step {step} of {STEPS}' in text
    assert step < STEPS


@pytest.mark.slow
def test_where_one_process_is_killed_the_others_say_so_and_stop(runs):
    ((killed, _), (other, text)) = runs.killed[0][::-1]
    assert killed == -signal.SIGKILL
    assert other not in (0, None)
    assert text.splitlines()[-1].startswith('error: process 0 of 2')
    assert 'resumes from its last checkpoint' in text.splitlines()[-1]
    assert runs.killed[1] < 60
    assert runs.asked[1] < runs.killed[2] < STEPS


@pytest.mark.slow
@pytest.mark.parametrize('aborts', [False, True])
def test_the_reason_is_the_last_line_where_the_runtime_aborts_meanwhile(aborts):
    """As Python and JAX list the stacks then, from another thread; and it is said once if not."""
    code = f"""
import os, sys, threading, time
from pspnet_jax.runtime import hosts

class Told:
    def write(self, text):
        os.write(2, text.encode())
        if {aborts}:
            threading.Thread(target=abort, daemon=True).start()

    def flush(self):
        pass

def abort():
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        os.write(2, b'File "a.py", line 1' + bytes([10]))
    os.abort()

hosts._watch()
sys.stderr = Told()
hosts.leave_after_an_error('error: why, in "a b" of C:' + chr(92) + 'new')
"""
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == (-signal.SIGABRT if aborts else 1)
    assert done.stderr.splitlines()[-1] == 'error: why, in "a b" of C:\\new'
    assert done.stderr.count('error: why') == 1 + aborts


@pytest.mark.slow
@pytest.mark.parametrize(
    ('count', 'kind', 'said'),
    [(2, HostError, 'process 1 of 2 has lost another'), (1, CheckpointError, 'can not be written')],
)
def test_a_save_that_waits_in_vain_for_another_process_is_no_fault_of_the_disk(
    monkeypatch, tmp_path, count, kind, said
):
    def saving():
        raise TimeoutError('ChainedFuture completed 0/2 futures but timed out after 5 seconds.')

    monkeypatch.setattr(hosts, 'several', lambda: count > 1)
    monkeypatch.setattr(jax, 'process_count', lambda: count)
    monkeypatch.setattr(jax, 'process_index', lambda: count - 1)
    with pytest.raises(kind, match=said), checkpoint._writing(tmp_path):
        saving()


def losses(workdir):
    return [r['loss'] for r in log.read(workdir) if 'loss' in r]


@pytest.mark.slow
def test_started_again_the_run_ends_as_in_one_process(runs, alone):
    for status, text in runs.ended:
        assert status == 0, text[-3000:]
    ours, theirs = log.read(runs.workdir), log.read(alone)
    assert [(r['step'], sorted(r)) for r in ours] == [(r['step'], sorted(r)) for r in theirs]
    assert len(losses(runs.workdir)) == STEPS
    np.testing.assert_allclose(losses(runs.workdir)[:4], losses(alone)[:4], rtol=1e-5)
    np.testing.assert_allclose(losses(runs.workdir), losses(alone), rtol=2e-3)


@pytest.mark.slow
def test_evaluation_gives_the_table_of_one_process(runs):
    folder = runs.workdir / 'evaluation' / 'train'
    together = json.loads((folder / 'evaluation.json').read_text())
    assert len(together['patients']) == 9
    assert table(evaluate_checkpoint(runs.workdir, split='train')) == table(together)


@pytest.mark.slow
def test_prediction_gives_the_files_of_one_process(runs):
    predict_files(runs.workdir, runs.folder / 'in', runs.folder / 'one', save=('mask',))
    for name in 'abc':
        one, two = (Image.open(runs.folder / n / f'{name}_mask.png') for n in ('one', 'two'))
        assert (np.asarray(one) == np.asarray(two)).all()


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.parametrize('how', ['pmap', 'device'])
def test_pmap_and_slices_on_the_devices_do_the_same(runs, alone, how):
    np.testing.assert_allclose(losses(runs.folder / how), losses(alone)[:4], rtol=1e-5)


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        (('h:1', 2, None, 60), 'belong together'),
        ((None, 2, 0, 60), 'belong together'),
        (('h', 2, 0, 60), 'is not the HOST:PORT'),
        (('h:1', 2, 2, 60), '--process_id=2 is not one of 0 to 1'),
        (('h:1', 2, -1, 60), '--process_id=-1 is not one of'),
        (('h:1', 2, 0, 4), '--host_timeout=4 is too short'),
    ],
)
def test_what_does_not_belong_together_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        hosts.start(*given)
    assert not hosts.several()


def test_one_process_needs_no_other():
    hosts.start('localhost:1', 1, 0, 60)
    hosts.start(None, None, None, 60)
    assert not hosts.several()
    assert hosts.gather([1, 'a']) == [1, 'a']
    assert hosts.share('abc') == ['a', 'b', 'c']


@pytest.mark.slow
def test_processes_that_do_not_come_are_not_waited_for():
    code = (
        'from pspnet_jax.runtime import hosts\nhosts.START_SECONDS = 1\n'
        "hosts.start('localhost:9', 2, 1, 10)"
    )
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith('error: the processes did not connect within')


SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_PROCID': '1',
         'SLURM_LOCALID': '0'}  # fmt: skip


@pytest.mark.parametrize(
    ('environment', 'found'),
    [
        ({'JAX_PLATFORMS': 'cpu'}, None),
        ({**SLURM, 'SLURM_NTASKS': '2'}, 'slurm'),
        ({**SLURM, 'SLURM_NTASKS': '1', 'JAX_PLATFORMS': 'cpu'}, None),
        ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '2', 'JAX_PLATFORMS': 'cpu'}, None),  # no srun
        ({'OMPI_COMM_WORLD_SIZE': '4'}, 'ompi'),
        ({'OMPI_COMM_WORLD_SIZE': '1', 'JAX_PLATFORMS': 'cpu'}, None),
    ],
)
def test_the_cluster_is_found_in_the_environment(environment, found):
    assert hosts.find_cluster(environment) == found


@pytest.mark.parametrize(
    ('batch_size', 'devices', 'near'), [(10, 8, [8, 16]), (7, 8, [8]), (17, 4, [16, 20])]
)
def test_the_nearest_batch_sizes_that_divide(batch_size, devices, near):
    assert hosts.nearest_batches(batch_size, devices) == near


def test_rows_come_in_the_order_of_one_host():
    rows = [[{'patient': name}] for name in ('c', 'a', 'b 32x40', 'b 64x64')]
    order = ['a', 'b', 'c']
    assert [r[0]['patient'] for r in in_order(rows, order)] == ['a', 'b 32x40', 'b 64x64', 'c']
    assert in_order(rows, ()) == rows
