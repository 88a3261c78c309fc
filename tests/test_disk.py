"""A disk that is full or read-only: one line says so, and what was there before is whole."""

import contextlib
import json
import os
import re
import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.data.formats import video
from pspnet_jax.evaluation.protocol import evaluate_checkpoint
from pspnet_jax.prediction import folders, manifest
from pspnet_jax.runtime import checkpoint, faults, log
from pspnet_jax.runtime.errors import ConfigError, DataError, LogError, PspnetError
from pspnet_jax.serving import export
from pspnet_jax.training import loop
from tests.conftest import ROOT, TINY, tiny_config
from tests.stress import chaos

FULL, READ_ONLY = 'No space left on device', 'Read-only file system'
STATES = {'full': FULL, 'read-only': READ_ONLY}


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB that is mounted for the test."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(folder)]
    if not shutil.which('mount') or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('only root may mount a file system, and not in every container')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


def fill(disk, *, free=0):
    """Take all space but `free` bytes, by disk/ballast."""
    taken = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - free
    (disk / 'ballast').write_bytes(bytes(max(taken, 0)))


def remount(disk, how):
    subprocess.run(['mount', '-o', f'remount,{how}', str(disk)], check=True)


def spoil(disk, state, *, free=0):
    """Make it 'full' or 'read-only'."""
    if state == 'full':
        fill(disk, free=free)
    else:
        remount(disk, 'ro')


def repair(disk):
    remount(disk, 'rw')
    (disk / 'ballast').unlink(missing_ok=True)


def content(folder):
    """{path: bytes} of all but the manifest, which only grows, and the time in a report."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob('*') if p.is_file()}
    return {name: chaos.timeless(p) for name, p in files.items() if p.name != manifest.NAME}


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    """A tiny run that was cut off behind its first two steps."""

    def cut(step, _):
        if step == 2:
            raise KeyboardInterrupt

    workdir = tmp_path_factory.mktemp('stopped')
    with pytest.raises(KeyboardInterrupt):
        loop.train_and_evaluate(tiny_config(), str(workdir), on_log=cut)
    assert checkpoint.steps(workdir) == [1]
    return workdir


def goes_on_to_the_bit(workdir, trained):
    loop.train_and_evaluate(tiny_config(), str(workdir))
    ours, theirs = (checkpoint.metadata(folder, 4)['sha256'] for folder in (workdir, trained[0]))
    assert ours == theirs
    assert (workdir / 'metrics.jsonl').read_bytes() == (trained[0] / 'metrics.jsonl').read_bytes()
    assert all(name.isdigit() for name in os.listdir(workdir / 'checkpoints'))


def last_line_of_a_run(workdir):
    """The training command's last words; its status is 1, and nothing keeps it from ending."""
    done = subprocess.run(
        chaos.command(workdir, TINY),
        cwd=ROOT, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert 'Traceback' not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_checkpoint_is_saved(stopped, trained, disk):
    """With space again it goes on to the bit."""
    workdir = shutil.copytree(stopped, disk / 'run')
    before = content(workdir / 'checkpoints')
    fill(disk, free=2**19)
    why = rf'error: {workdir}/checkpoints\S* can not be written \({FULL}\): free some space'
    assert re.match(why, last_line_of_a_run(workdir))
    assert content(workdir / 'checkpoints').items() >= before.items()
    assert checkpoint.steps(workdir) == [1]
    repair(disk)
    goes_on_to_the_bit(workdir, trained)


@pytest.mark.slow
def test_a_read_only_folder_of_checkpoints(stopped, trained, disk, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / 'run')
    shutil.move(workdir / 'checkpoints', disk / 'checkpoints')
    (workdir / 'checkpoints').symlink_to(disk / 'checkpoints')
    before = content(disk)
    remount(disk, 'ro')
    why = rf'error: {workdir}/checkpoints\S* can not be written \({READ_ONLY}\)'
    assert re.match(why, last_line_of_a_run(workdir))
    assert content(disk) == before
    repair(disk)
    goes_on_to_the_bit(workdir, trained)


@pytest.mark.slow
@pytest.mark.parametrize('state', STATES)
def test_a_run_on_such_a_disk_does_not_start(stopped, disk, state):
    workdir = shutil.copytree(stopped, disk / 'run')
    before = content(workdir)
    spoil(disk, state)
    with pytest.raises((ConfigError, DataError, LogError), match=STATES[state]):
        loop.train_and_evaluate(tiny_config(), str(workdir))
    assert content(workdir) == before


def test_metrics_end_in_a_whole_line_and_go_on(disk):
    """Until the disk is full, which keeps nobody waiting; then from the last record on."""
    records = [{'loss': 0.1 * step, 'learning_rate': None} for step in range(1, 1000)]
    fill(disk, free=2**14)
    done = []

    def write(after):
        with contextlib.closing(log.MetricLog(disk, after, lambda n, _: done.append(n))) as writer:
            for step, values in enumerate(records[after:], start=after + 1):
                writer.scalars(step, values)

    with pytest.raises(LogError, match=FULL):
        write(0)
    text = (disk / 'metrics.jsonl').read_text()
    found = [json.loads(line)['step'] for line in text.splitlines()]
    assert text.endswith('\n')
    assert found == list(range(1, len(found) + 1))
    assert len(found) - len(done) in (0, 1)
    repair(disk)
    write(len(done))
    assert [r['step'] for r in log.read(disk)] == list(range(1, 1000))


def test_half_a_line_is_taken_back(disk):
    """A long record, of which the disk takes a part."""
    with contextlib.closing(log.MetricLog(disk, 0)) as writer:
        writer.scalars(1, {'loss': 1.0})
        fill(disk)
        with pytest.raises(LogError, match=FULL):
            writer.scalars(2, {f'loss {n}': 1.0 for n in range(2000)})
        assert [record['step'] for record in log.read(disk)] == [1]
        assert (disk / 'metrics.jsonl').read_text().endswith('}\n')
        repair(disk)
        writer.scalars(2, {'loss': 2.0})
    assert [record['step'] for record in log.read(disk)] == [1, 2]


def test_metrics_on_a_read_only_disk(disk):
    log.MetricLog(disk, 0).close()
    remount(disk, 'ro')
    with pytest.raises(LogError, match=READ_ONLY):
        log.MetricLog(disk, 0)


@pytest.mark.slow
@pytest.mark.parametrize('state', STATES)
def test_reports_of_before_stay(trained, disk, state):
    workdir = shutil.copytree(trained[0], disk / 'run')
    evaluate_checkpoint(workdir)
    before = content(workdir)
    spoil(disk, state)
    with pytest.raises(DataError, match=rf'can not be written \({STATES[state]}\): free'):
        evaluate_checkpoint(workdir)
    assert content(workdir) == before
    repair(disk)
    evaluate_checkpoint(workdir)
    assert content(workdir) == before


@pytest.mark.slow
@pytest.mark.parametrize('state', STATES)
def test_predictions_of_before_stay_and_the_rest_is_done_later(trained, disk, tmp_path, state):
    rng, source, output = np.random.default_rng(0), tmp_path / 'pictures', disk / 'out'
    source.mkdir()
    for name in 'abc':
        pixels = rng.integers(0, 255, (96, 96, 3), np.uint8)
        Image.fromarray(pixels).save(source / f'{name}.png')
    folders.predict_files(trained[0], source, tmp_path / 'expected')
    expected = content(tmp_path / 'expected')
    folders.predict_files(trained[0], source / 'a.png', output)
    spoil(disk, state, free=2**13)
    with pytest.raises(DataError, match=rf'can not be written \({STATES[state]}\): free'):
        folders.predict_files(trained[0], source, output)
    found = content(output)
    assert found.items() <= expected.items()  # each is whole, none is there by halves
    assert sum(name.startswith('a_') for name in found) == 3
    repair(disk)
    assert folders.predict_files(trained[0], source, output) == []
    assert content(output) == expected


@pytest.mark.parametrize('state', STATES)
def test_a_video_is_there_whole_or_not_at_all(disk, state):
    pytest.importorskip('av')
    frames = np.random.default_rng(0).integers(0, 255, (20, 128, 128, 3), np.uint8)

    def write():
        with video.writing(disk / 'a.mkv', Fraction(5), exact=True) as each:
            for frame in frames:
                each(frame)

    spoil(disk, state, free=2**15)
    with pytest.raises(DataError, match=STATES[state]):
        write()
    assert content(disk).keys() <= {'ballast'}


@pytest.mark.slow
@pytest.mark.parametrize('state', STATES)
def test_an_export_of_before_stays(trained, disk, state):
    target = disk / 'model.safetensors'
    target.write_bytes(b'before')
    spoil(disk, state)
    with pytest.raises(DataError, match=STATES[state]):
        export.export_checkpoint(trained[0], 'savedparams', output=target)
    assert target.read_bytes() == b'before'
    assert content(disk).keys() <= {'ballast', target.name}


def test_what_locks_a_full_disk_needs_no_space(disk):
    fill(disk)
    with faults.locked(disk), pytest.raises(PspnetError, match='is in use'), faults.locked(disk):
        pass
    assert content(disk).keys() == {'ballast'}
