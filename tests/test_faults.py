"""What reaches a run from outside: it loses nothing, and says what happened."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from pspnet_jax import models
from pspnet_jax.config import to_dict
from pspnet_jax.data import pipeline, volumes
from pspnet_jax.evaluation.protocol import evaluate_checkpoint
from pspnet_jax.prediction import folders, manifest
from pspnet_jax.runtime import checkpoint, faults, log
from pspnet_jax.runtime.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteLossError,
    OutOfMemoryError,
    StoppedError,
)
from pspnet_jax.training import loop, optim, update
from tests.conftest import ROOT, tiny_config
from tests.stress import chaos


def state_of(workdir, step=4):
    return checkpoint.metadata(workdir, step)['sha256']


def records(workdir):
    return (workdir / 'metrics.jsonl').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_behind_a_checkpoint_and_it_goes_on_to_the_bit(
    trained, tmp_path, number
):
    def at_step_1(step, _):
        if step == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(StoppedError, match=f'{number.name}: stopped after the checkpoint') as told:
        loop.train_and_evaluate(tiny_config(), str(tmp_path), on_log=at_step_1)
    assert told.value.signum == number
    assert signal.getsignal(number) == before
    assert checkpoint.steps(tmp_path)[-1] < 4
    loop.train_and_evaluate(tiny_config(), str(tmp_path))
    assert state_of(tmp_path) == state_of(trained[0])
    assert records(tmp_path) == records(trained[0])


@pytest.mark.parametrize('code', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_trained_on(tmp_path, monkeypatch, caplog, code):
    """As Lustre and some NFS are; that another run holds the lock is another error."""
    import fcntl

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    workdir = tmp_path / 'run'
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, 'flock', refuse)
        with faults.locked(workdir), faults.locked(workdir):
            pass
    assert caplog.text.count(f'can not be locked ({os.strerror(code)})') == 2
    assert not workdir.exists()
    with faults.locked(workdir), pytest.raises(ConfigError, match='is in use by process'):
        faults.locked(workdir).__enter__()


@pytest.mark.slow
def test_a_resumed_run_says_what_changed_and_keeps_the_config_before(trained, tmp_path, caplog):
    workdir = shutil.copytree(trained[0], tmp_path / 'run')
    before = json.loads((workdir / 'config.json').read_text())
    changes = {'train.steps': 6, 'optim.learning_rate': 5e-4, 'model.stem': 'mean'}
    loop.train_and_evaluate(tiny_config(**changes), str(workdir))
    assert 'the config changed, from step 4 on: ' in caplog.text
    assert 'optim.learning_rate from 0.001 to 0.0005' in caplog.text
    assert 'model.stem changed, which has no effect on a resumed run' in caplog.text
    assert {'step': 4, 'config_changes': 3} in log.read(workdir)
    assert json.loads((workdir / 'config_until_step_4.json').read_text()) == before
    assert json.loads((workdir / 'config.json').read_text())['train']['steps'] == 6


@pytest.mark.parametrize(
    ('key', 'value', 'there'),
    [
        ('optim.name', 'sgd', "'adamw' there, 'sgd' here"),
        ('optim.clip_norm', 0.0, '1.0 there, 0.0 here'),
        ('train.ema_decay', 0.0, '0.9 there, 0.0 here'),
        ('model.width', 8, '16 there, 8 here'),
    ],
)
def test_a_change_that_the_arrays_do_not_fit_is_refused_by_its_name(trained, key, value, there):
    with pytest.raises(CheckpointError, match='can not resume') as told:
        loop.train_and_evaluate(tiny_config(**{key: value}), str(trained[0]))
    assert f'{key} is {there}' in str(told.value)
    assert f'--config.train.init_from={trained[0]}' in str(told.value)


@pytest.mark.slow
def test_training_on_all_data_ends_without_an_evaluation(tmp_path):
    config = tiny_config(**{'data.test_fraction': 0.0, 'data.validation_fraction': 0.0})
    assert loop.train_and_evaluate(config, str(tmp_path)) == {}
    assert checkpoint.steps(tmp_path)[-1] == 4


def test_damaged_lines_of_the_log_are_counted_and_named(trained, tmp_path, caplog):
    path = tmp_path / 'metrics.jsonl'
    lines = (trained[0] / 'metrics.jsonl').read_text().splitlines()
    path.write_text('\n'.join([lines[0], lines[1][:-9], *lines[2:], 'x']) + '\n')
    assert len(log.read(tmp_path)) == len(lines) - 1
    assert f'{path}: 2 line(s) are corrupted and ignored, the first is line 2' in caplog.text


@pytest.mark.slow
def test_two_runs_on_one_folder(tmp_path):
    code = f'with faults.locked({str(tmp_path)!r}): print("in")'
    other = [sys.executable, '-c', f'from pspnet_jax.runtime import faults\n{code}']
    with faults.locked(tmp_path):
        done = subprocess.run(other, capture_output=True, text=True, cwd=ROOT, timeout=100)
        assert f'is in use by process {os.getpid()} on' in done.stderr
        with pytest.raises(ConfigError, match='is in use'), faults.locked(tmp_path):
            pass
    assert not (tmp_path / faults.LOCK).exists()
    done = subprocess.run(other, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.stdout == 'in\n'


@pytest.mark.slow
def test_the_lock_of_a_run_that_was_killed_is_no_hindrance(tmp_path, caplog):
    held = f'with faults.locked({str(tmp_path)!r}): os._exit(9)'
    killed = f'import os\nfrom pspnet_jax.runtime import faults\n{held}'
    subprocess.run([sys.executable, '-c', killed], cwd=ROOT, timeout=100, check=False)
    owner = json.loads((tmp_path / faults.LOCK).read_text())
    caplog.set_level('INFO')
    with faults.locked(tmp_path):
        assert json.loads((tmp_path / faults.LOCK).read_text())['process'] == os.getpid()
    previous = f'the previous run (process {owner["process"]} on {owner["host"]}, 0.'
    assert f'starting again: {previous}' in caplog.text
    assert 'minutes) was interrupted' in caplog.text
    assert not (tmp_path / faults.LOCK).exists()


@pytest.mark.slow
@pytest.mark.parametrize('cache', ['memory', 'device'])
def test_an_update_of_no_number_is_skipped_and_counted(tmp_path, monkeypatch, cache):
    def broken(key, image, mask):
        """NaN in one slice of three or so."""
        return jnp.where(jax.random.uniform(key) < 0.1, jnp.nan, image), mask

    changes = {'train.nan_policy': 'skip', 'train.steps': 12, 'train.max_skipped': 12,
               'train.steps_per_call': 2,
               'data.cache': cache}  # fmt: skip
    config = tiny_config(**changes)
    loop.train_and_evaluate(config, str(tmp_path / 'a'), augment_fn=broken)
    found = [r for r in log.read(tmp_path / 'a') if 'loss' in r]
    skipped = [r for r in found if 'skipped' in r]
    assert [r['step'] for r in found] == list(range(1, 13))
    assert 0 < len(skipped) < 12
    assert [r['skipped'] for r in skipped] == list(range(1, len(skipped) + 1))
    assert all(r['loss'] is None or r['gradient_norm'] is None for r in skipped)
    progress = checkpoint.metadata(tmp_path / 'a', 12)['progress']
    assert progress['skipped'] == len(skipped)
    config.train.max_skipped = len(skipped) - 1
    last = rf'step {skipped[-1]["step"]}: .* update {len(skipped)} of this kind'
    with pytest.raises(NonFiniteLossError, match=last):
        loop.train_and_evaluate(config, str(tmp_path / 'b'), augment_fn=broken)


def slices_with(bad):
    """Twenty slices whose image is their number, of which `bad` can't be read."""

    def read(key):
        if key in bad:
            raise DataError(f'slice {key} is damaged')
        return np.full((4, 4, 1), key, np.uint8), np.zeros((4, 4), np.uint8)

    return volumes.Slices(
        read=read,
        key=np.arange(20),
        patient=np.repeat(['a', 'b'], 10),
        slice=np.tile(np.arange(10), 2),
        lesion_pixels=np.zeros(20, int),
        intensity={p: np.array([[0], [255], [0], [1]], np.float32) for p in 'ab'},
    )


def test_a_slice_that_can_not_be_read_gives_way_to_the_next_and_is_listed():
    slices, unread = slices_with({3, 4, 19}), {}
    values = [pipeline.read_row(slices, row, None, unread)[0][0, 0, 0].item() for row in range(20)]
    assert values == [0, 1, 2, 5, 5, *range(5, 19), 0]
    assert unread == {n: f'slice {n} is damaged' for n in (3, 4, 19)}
    with pytest.raises(DataError, match='slice 3 is damaged'):
        pipeline.read_row(slices, 3, None, None)
    with pytest.raises(DataError, match='none of 20 slices can be read'):
        pipeline.read_row(slices_with(set(range(20))), 3, None, {})


def test_exhausted_memory_is_explained():
    config = tiny_config()
    with (
        pytest.raises(
            OutOfMemoryError, match=r'out of memory.*train\.batch_size=4.*7 MB.*accumulate'
        ),
        faults.memory_explained(lambda: loop.what_takes_memory(config, 7.0)),
    ):
        jnp.zeros(2**46, jnp.float32).block_until_ready()  # 256 TiB
    with pytest.raises(ZeroDivisionError), faults.memory_explained(str):
        raise ZeroDivisionError


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / 'copy')


def test_metadata_that_changed_is_not_believed(copy):
    (path,) = [
        p for p in (copy / 'checkpoints' / '4').rglob('*')
        if p.is_file() and b'best_dice' in p.read_bytes()
    ]  # fmt: skip
    text = path.read_text()
    path.write_text(text.replace('"stale": 0', '"stale": 7').replace('"stale": 1', '"stale": 7'))
    assert path.read_text() != text
    with pytest.raises(CheckpointError, match='corrupted metadata: its sha256 differs'):
        checkpoint.metadata(copy, 4)


@pytest.mark.slow
def test_a_damaged_newer_step_is_set_aside_and_saved_again(trained, power_cut, tmp_path):
    power_cut(tiny_config(), tmp_path, 3)
    folder = tmp_path / 'checkpoints'
    shutil.copytree(folder / '3', folder / '4')
    largest = max((folder / '4').rglob('*'), key=lambda p: p.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    (folder / '99').mkdir()  # as a cut off deletion leaves it
    loop.train_and_evaluate(tiny_config(), str(tmp_path))
    assert {p.name for p in (tmp_path / checkpoint.ASIDE).iterdir()} == {'4', '99'}
    assert state_of(tmp_path) == state_of(trained[0])
    assert records(tmp_path) == records(trained[0])


def flip(path, place, mask=1):
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


def bytes_of(state, meta):
    return json.dumps(meta, sort_keys=True), [
        np.asarray(x).tobytes() for x in jax.tree.leaves(state)
    ]


def small_run(folder, *dice):
    """Steps 7, 8 ... of a few small arrays with these Dice in `folder`; gives state and config."""
    rng, tx = np.random.default_rng(0), optax.adam(0.1)
    params = {'kernel': rng.normal(size=(3, 3, 8, 8)).astype(np.float32)}
    stats = {'mean': rng.normal(size=8).astype(np.float32)}
    state = update.TrainState(jnp.asarray(7), params, stats, tx.init(params), params)
    config = to_dict(tiny_config())
    with contextlib.closing(checkpoint.Writer(folder)) as writer:
        for step, value in enumerate(dice, start=7):
            save(writer, step, state, config, value)
    return state, config


def save(writer, step, state, config, dice):
    facts = {'progress': {'stale': 1}, 'inputs': {'channels': 3, 'normalization': None}}
    checkpoint.save(writer, step, state, config=config, dice=dice, **facts)


@pytest.mark.stress
def test_no_flipped_byte_is_loaded_in_silence(tmp_path):
    """Of 200 bytes of all files, one at a time: an error, or what was saved, to the bit."""
    state, config = small_run(tmp_path, 0.5)
    rng = np.random.default_rng(1)
    whole = bytes_of(*checkpoint.restore(tmp_path, state, config))
    folder = tmp_path / 'checkpoints' / '7'
    paths = sorted(p for p in folder.rglob('*') if p.is_file() and p.stat().st_size)
    refused = 0
    for n in range(200):
        path = paths[n % len(paths)]  # small files as often as large ones
        place, mask = int(rng.integers(path.stat().st_size)), int(1 << rng.integers(8))
        flip(path, place, mask)
        try:
            assert bytes_of(*checkpoint.restore(tmp_path, state, config)) == whole, path
        except CheckpointError:
            refused += 1
        flip(path, place, mask)
    assert refused > 50  # the rest is in what is not needed to load
    assert bytes_of(*checkpoint.restore(tmp_path, state, config)) == whole


def metrics_of(folder, step, dice):
    """The file by which earlier versions ranked a step."""
    path = folder / 'checkpoints' / str(step) / 'metrics' / 'metrics'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({'dice': dice}))
    return path


@pytest.mark.stress
@pytest.mark.parametrize(('which', 'step', 'next_one'), [('best', 7, 8), ('last', 8, 7)])
def test_damage_anywhere_in_the_step_to_take_leads_to_the_other(tmp_path, which, step, next_one):
    """60 flipped bits and 40 cuts of its files, one at a time: itself to the bit, or the other
    one and the reason.
    """
    state, _ = small_run(tmp_path, 0.9, 0.1)
    rng, variables = np.random.default_rng(step), {'params': state.params}
    variables['batch_stats'] = state.batch_stats
    metrics_of(tmp_path, 7, 0.9), metrics_of(tmp_path, 8, 0.1)
    folder, passed = tmp_path / 'checkpoints' / str(step), 0

    def read(step):
        meta = checkpoint.metadata(tmp_path, step)
        return bytes_of(checkpoint.restore_variables(tmp_path, step, variables, meta), {})

    def taken():
        return checkpoint.first_sound(tmp_path, which, read)

    whole = taken()
    assert (whole[0], whole[2]) == (step, {})
    paths = sorted(p for p in folder.rglob('*') if p.is_file() and p.stat().st_size)
    assert folder / 'metrics' / 'metrics' in paths
    for n in range(100):
        path = paths[n % len(paths)]
        data = path.read_bytes()
        if n < 60:
            flip(path, int(rng.integers(len(data))), int(1 << rng.integers(8)))
        else:
            os.truncate(path, int(rng.integers(len(data))))
        found = taken()
        assert found[1] == whole[1], path
        if found[0] != step:
            passed += 1
            assert found[0] == next_one
            assert str(folder) in found[2][step]
        path.write_bytes(data)
    assert 20 < passed < 90  # the rest is in what is not needed to load
    assert taken() == whole


@pytest.mark.stress
def test_no_flipped_bit_of_the_metrics_has_the_best_step_deleted(tmp_path):
    """Of 0.0351, which one bit makes 4.0351, and all else in the file; then cut and emptied."""
    state, config = small_run(tmp_path, 0.9, 0.0351)
    path = metrics_of(tmp_path, 8, 0.0351)
    metrics_of(tmp_path, 7, 0.9)
    sound = path.read_bytes()
    flipped = [sound[:n] + bytes([sound[n] ^ 1 << k]) + sound[n + 1 :]
               for n in range(len(sound)) for k in range(8)]  # fmt: skip
    assert b'{"dice": 4.0351}' in flipped
    for data in (*flipped, sound[:9], b''):
        path.write_bytes(data)
        checkpoint.Writer(tmp_path).close()
        assert checkpoint.steps(tmp_path) == [7, 8]
        assert path.read_bytes() == sound, data
    path.write_text('{"dice": 4.0351}')
    with contextlib.closing(checkpoint.Writer(tmp_path)) as writer:
        save(writer, 9, state, config, 0.2)
    assert checkpoint.steps(tmp_path) == [7, 9]


@pytest.fixture(scope='module')
def cut_off(tmp_path_factory):
    """A tiny run that was cut off after step 3: the best step is 2, the newest 3."""

    def cut(step, _):
        if step == 4:
            raise KeyboardInterrupt

    workdir = tmp_path_factory.mktemp('cut_off')
    config = tiny_config(**{'train.steps': 6})
    with pytest.raises(KeyboardInterrupt):
        loop.train_and_evaluate(config, str(workdir), on_log=cut)
    assert checkpoint.steps(workdir) == [2, 3]
    return workdir, config


def arrays(folder):
    """The file that holds most of the averaged parameters."""
    return max((folder / 'ema_params').rglob('d/*'), key=lambda p: p.stat().st_size)


def raise_the_dice(folder):
    """From 0.02 to 1.02."""
    path = folder / '_CHECKPOINT_METADATA'
    flip(path, path.read_bytes().index(b'"dice": 0.') + len('"dice": '))


@pytest.mark.slow
@pytest.mark.parametrize(
    'damage',
    [
        lambda folder: flip(arrays(folder), arrays(folder).stat().st_size // 2),
        lambda folder: os.truncate(arrays(folder), 1000),
        raise_the_dice,
        lambda folder: os.truncate(folder / '_CHECKPOINT_METADATA', 1000),
    ],
    ids=['arrays flipped', 'arrays cut', 'metadata flipped', 'metadata cut'],
)
def test_a_run_whose_best_step_is_damaged_trains_on_and_is_evaluated(cut_off, tmp_path, damage):
    """The damaged one is not kept in the place of a sound one, and not evaluated."""
    workdir, config = shutil.copytree(cut_off[0], tmp_path / 'run'), cut_off[1]
    damage(workdir / 'checkpoints' / '2')
    evaluation = loop.train_and_evaluate(config, str(workdir))
    dice = {step: checkpoint.metadata(workdir, step)['dice'] for step in checkpoint.steps(workdir)}
    assert max(dice) == 6
    assert evaluation['checkpoint']['step'] == checkpoint.best(dice)
    assert evaluation['checkpoint']['passed_over'] == {}
    assert [path.name for path in (workdir / checkpoint.ASIDE).iterdir()] == ['2']


@pytest.mark.slow
def test_the_step_that_was_passed_over_stands_in_every_output(cut_off, tmp_path):
    workdir = shutil.copytree(cut_off[0], tmp_path / 'run')
    os.truncate(workdir / 'checkpoints' / '2' / '_CHECKPOINT_METADATA', 1000)
    said = evaluate_checkpoint(workdir)['checkpoint']
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / 'a.png')
    folders.predict_files(workdir, tmp_path / 'a.png', tmp_path / 'out', save=['mask'])
    (run,) = json.loads((tmp_path / 'out' / manifest.NAME).read_text().splitlines()[0])['runs']
    for output in (said, run):
        assert (output['step'], list(output['passed_over'])) == (3, ['2'])
        assert str(workdir / 'checkpoints' / '2') in output['passed_over']['2']


@pytest.mark.stress
def test_forty_loads_of_a_run_that_is_being_written(tmp_path):
    """By two other processes; after each load a step is saved, and others are deleted meanwhile."""
    config = tiny_config(**{'model.width': 4})
    model, (tx, _) = models.create(**config.model), optim.create(config.optim, steps=4)
    state = update.create_state(model, tx, seed=9, channels=3, ema=True)

    def save_next(writer, step):
        """Each even one is the best so far."""
        save(writer, step, state, to_dict(config), None if step % 2 else 1 - 1 / step)

    told, end = os.pipe()
    command, lines = [sys.executable, '-c', chaos.READER, tmp_path, '20'], []
    with open(told) as file, contextlib.closing(checkpoint.Writer(tmp_path)) as writer:
        save_next(writer, 1)
        save_next(writer, 2)
        readers = [
            subprocess.Popen(command, stdout=end, stderr=subprocess.DEVNULL, cwd=ROOT)
            for _ in range(2)
        ]
        os.close(end)
        for step, line in enumerate(file, start=3):
            lines.append(json.loads(line))
            save_next(writer, step)
    assert [reader.wait() for reader in readers] == [0, 0]
    assert [line['fault'] for line in lines] == [''] * 40
    assert all(line['step'] % 2 == 0 for line in lines if line['which'] == 'best')
    assert len({line['step'] for line in lines}) > 10
