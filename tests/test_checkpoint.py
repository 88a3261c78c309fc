"""Checkpoints: what comes back is what was saved, or it is not taken."""

import contextlib
import functools
import itertools
import os
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import models
from pspnet_jax.config import from_dict, to_dict
from pspnet_jax.inference.runs import open_run
from pspnet_jax.runtime import checkpoint
from pspnet_jax.runtime.errors import CheckpointError
from pspnet_jax.training import optim, update
from tests.conftest import tiny_config


def new_state(config):
    model = models.create(**config.model)
    tx, _ = optim.create(config.optim, steps=4)
    return update.create_state(model, tx, seed=9, channels=3, ema=True)


@pytest.fixture
def copy(trained, tmp_path):
    """The tiny run's folder, to be damaged."""
    return shutil.copytree(trained[0], tmp_path / 'copy')


def flip_a_byte(folder):
    """Of the arrays: in a small tree they lie in the merged index, `d/`, whose copy under
    `ocdbt.process_0/`, of the same size, is not read again."""
    path = max(
        folder.rglob('d/*'), key=lambda p: (p.stat().st_size // 100, p.parent.parent == folder)
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_best_and_last_are_kept(trained):
    workdir, evaluation = trained
    found = checkpoint.steps(workdir)
    assert found[-1] == 4
    assert checkpoint.candidates(workdir, 'last')[0] == 4
    best = checkpoint.candidates(workdir, 'best')[0]
    dice = {step: checkpoint.metadata(workdir, step)['dice'] for step in found}
    assert dice[best] == max(value for value in dice.values() if value is not None)
    assert evaluation['checkpoint']['step'] == best
    assert checkpoint.candidates(workdir, str(best)) == [best]


def test_the_whole_state_comes_back(trained):
    workdir, _ = trained
    config = tiny_config()
    state, meta = checkpoint.restore(workdir, new_state(config), to_dict(config))
    saved = checkpoint.metadata(workdir, 4)['sha256']
    for name, digest in saved.items():
        assert checkpoint.digest(jax.device_get(getattr(state, name))) == digest
    assert int(state.step) == 4
    assert meta['progress']['best_dice'] is not None
    assert meta['inputs'] == {'channels': 3, 'normalization': None}


@pytest.mark.slow
def test_the_newest_sound_step_is_taken(copy):
    folder = copy / 'checkpoints'
    for path in folder.iterdir():
        if path.name != '4':
            shutil.rmtree(path)
    shutil.copytree(folder / '4', folder / '3')
    config = tiny_config()
    for expected in (4, 3):
        state, _ = checkpoint.restore(copy, new_state(config), to_dict(config))
        assert int(state.step) == expected
        flip_a_byte(folder / '4' / 'params')


def test_best_is_by_dice_and_last_where_none_was_measured(monkeypatch):
    dice = {1: 0.3, 2: 0.7, 3: 0.5, 4: None}
    monkeypatch.setattr(checkpoint, 'steps', lambda _: list(dice))
    monkeypatch.setattr(checkpoint, 'metadata', lambda _, step: {'dice': dice[step]})
    assert checkpoint.candidates('run', 'best') == [2, 3, 1, 4]
    dice.update(dict.fromkeys(dice))
    assert checkpoint.candidates('run', 'best') == [4, 3, 2, 1]


def test_inference_takes_the_averaged_parameters(trained):
    workdir, _ = trained
    config = tiny_config()
    state, _ = checkpoint.restore(workdir, new_state(config), to_dict(config))
    model = models.create(**config.model)
    shapes = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    )
    variables = checkpoint.restore_variables(workdir, 4, shapes, checkpoint.metadata(workdir, 4))
    for a, b in zip(
        jax.tree.leaves(variables['params']), jax.tree.leaves(state.ema_params), strict=True
    ):
        assert (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.parametrize('part', ['params', 'opt_state', 'batch_stats'])
def test_a_flipped_byte_is_noticed(copy, part):
    """In the newest step: it is passed over where there is another, else it is an error."""
    config, found = tiny_config(), checkpoint.steps(copy)
    for count, step in enumerate(reversed(found), start=1):
        flip_a_byte(copy / 'checkpoints' / str(step) / part)
        if count < len(found):
            state, _ = checkpoint.restore(copy, new_state(config), to_dict(config))
            assert int(state.step) < step
    with pytest.raises(CheckpointError, match='are corrupted'):
        checkpoint.restore(copy, new_state(config), to_dict(config))
    assert checkpoint.steps(copy) == found  # nothing was deleted


def largest(folder):
    return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    os.truncate(largest(folder), largest(folder).stat().st_size // 2)


def lose_a_file(folder):
    largest(folder).unlink()


def half_delete(folder):
    shutil.rmtree(folder / 'opt_state')


def lose_the_metadata(folder):
    (folder / '_CHECKPOINT_METADATA').unlink()


def forge_the_config(folder):
    path = folder / '_CHECKPOINT_METADATA'
    text = path.read_text()
    assert '"width": 16' in text
    path.write_text(text.replace('"width": 16', '"width": 8'))


@pytest.mark.slow
@pytest.mark.parametrize(
    'damage', [truncate, lose_a_file, half_delete, lose_the_metadata, forge_the_config]
)
def test_damage_is_passed_over_and_nothing_is_deleted(copy, monkeypatch, damage):
    folder, config, told = copy / 'checkpoints', tiny_config(), []
    for path in folder.iterdir():
        if path.name != '4':
            shutil.rmtree(path)
    shutil.copytree(folder / '4', folder / '3')
    monkeypatch.setattr(checkpoint.logger, 'warning', lambda text, *rest: told.append(text % rest))
    damage(folder / '4')
    state, _ = checkpoint.restore(copy, new_state(config), to_dict(config))
    assert int(state.step) == 3
    (ours,) = told
    assert ours.startswith(f'{folder}/4')
    damage(folder / '3')
    there = set(folder.rglob('*'))
    with pytest.raises(CheckpointError, match=r'all checkpoints \[3, 4\] in .* are corrupted'):
        checkpoint.restore(copy, new_state(config), to_dict(config))
    assert set(folder.rglob('*')) == there


def test_metadata_of_another_run_does_not_vouch_for_these_arrays(copy):
    """Of the same network: its digests are others. Of another one: the difference is named."""
    folder, config = copy / 'checkpoints', tiny_config()
    state, meta = checkpoint.restore(copy, new_state(config), to_dict(config))
    others = {}
    for name, width in (('same', 16), ('wide', 32)):
        other = to_dict(tiny_config(**{'model.width': width}))
        facts = {k: meta[k] for k in ('progress', 'inputs', 'dice')}
        changed = state.replace(ema_params=jax.tree.map(lambda x: x + 1, state.ema_params))
        with contextlib.closing(checkpoint.Writer(copy / name)) as writer:
            checkpoint.save(writer, 4, changed, config=other, **facts)
        others[name] = copy / name / 'checkpoints' / '4' / '_CHECKPOINT_METADATA'
    shutil.copy(others['same'], folder / '4')
    with pytest.raises(CheckpointError, match='sha256 differs'):
        checkpoint.restore_variables(
            copy, 4, {'params': state.params}, checkpoint.metadata(copy, 4)
        )
    shutil.copy(others['wide'], folder / '4')
    with pytest.raises(
        CheckpointError, match=r'can not resume \(model.width is 32 there, 16 here\)'
    ):
        checkpoint.restore(copy, new_state(config), to_dict(config))


def test_an_empty_newer_step_is_passed_over(copy):
    (copy / 'checkpoints' / '99').mkdir()
    config = tiny_config()
    state, _ = checkpoint.restore(copy, new_state(config), to_dict(config))
    assert int(state.step) == 4


def test_the_digest_sees_values_names_shapes_and_types():
    tree = {'a': np.arange(6.0), 'b': np.ones(2)}
    others = [
        {'a': np.arange(6.0), 'b': np.array([1, 1 + 1e-15])},
        {'a': np.arange(6.0), 'c': np.ones(2)},
        {'a': np.arange(6.0).reshape(2, 3), 'b': np.ones(2)},
        {'a': np.arange(6.0).astype(np.float32), 'b': np.ones(2)},
    ]
    assert checkpoint.digest(tree) == checkpoint.digest(jax.tree.map(np.copy, tree))
    assert len({checkpoint.digest(tree), *map(checkpoint.digest, others)}) == 5


@pytest.mark.parametrize('which', ['best', 'last', '7'])
def test_a_folder_without_checkpoints_says_what_was_expected(tmp_path, which):
    with pytest.raises(
        CheckpointError, match=r'holds no checkpoint: expected .*/checkpoints/<step>'
    ):
        checkpoint.candidates(tmp_path, which)


def test_an_unknown_step_lists_those_there(trained):
    with pytest.raises(CheckpointError, match=r"'7' is not one of 'best', 'last', \[.*4\]"):
        checkpoint.candidates(trained[0], '7')


def test_the_config_of_a_run_with_a_label_map_is_read_back(tmp_path):
    """The one knob that is a mapping; deeper ones are no config of ours."""
    config = tiny_config(**{'data.label_map': {4: 1, '>5': 255}})
    facts = {
        'config': to_dict(config),
        'progress': {},
        'inputs': {'channels': 3, 'normalization': None},
    }
    for depth, saved in enumerate(({'4': 1, '>5': 255}, {'4': {'4': 1}}), 1):
        facts['config']['data']['label_map'] = saved
        with contextlib.closing(checkpoint.Writer(tmp_path / str(depth))) as writer:
            checkpoint.save(writer, 1, new_state(config), **facts, dice=None)
    restored = from_dict(checkpoint.metadata(tmp_path / '1', 1)['config'])
    assert restored.data.to_dict()['label_map'] == {'4': 1, '>5': 255}
    with pytest.raises(
        CheckpointError, match='is not a checkpoint of pspnet_jax: its metadata has config'
    ):
        checkpoint.metadata(tmp_path / '2', 1)


@pytest.mark.slow
def test_saves_leave_no_thread_or_open_file_behind(tmp_path):
    """Orbax's thread and event loop of each save end with the next."""
    state, facts = new_state(tiny_config()), {'config': {}, 'progress': {}, 'inputs': {}}
    with contextlib.closing(checkpoint.Writer(tmp_path)) as writer:
        for step in range(1, 7):
            checkpoint.save(writer, step, state, **facts, dice=None)
            loops = [t for t in threading.enumerate() if '_run_loop' in t.name]
            assert len(loops) <= 1
    assert not [t for t in threading.enumerate() if '_run_loop' in t.name]


def with_steps(copy, **dice):
    """The tiny run's folder with the steps 1, 2, 3 ... of these Dice, by the names a, b, c."""
    folder, config = copy / 'checkpoints', to_dict(tiny_config())
    state, meta = checkpoint.restore(copy, new_state(tiny_config()), config)
    shutil.rmtree(folder)
    for step, value in enumerate(dice.values(), start=1):
        with contextlib.closing(checkpoint.Writer(copy / str(step))) as writer:
            facts = {'config': config, 'progress': {}, 'inputs': meta['inputs']}
            checkpoint.save(writer, step, state, **facts, dice=value)
        folder.mkdir(exist_ok=True)
        (copy / str(step) / 'checkpoints' / str(step)).rename(folder / str(step))
    return folder, functools.partial(
        checkpoint.save, state=state, config=config, progress={}, inputs=meta['inputs']
    )


@pytest.mark.slow
def test_the_last_and_the_best_are_kept_whatever_orbaxs_file_says(copy):
    """Its file of metrics, which earlier versions had written, has no digest."""
    folder, save = with_steps(copy, a=0.6, b=0.2)
    for step, text in ((1, '{"dice": 0.0351}'), (2, '{"dice": 4.0351}')):
        (folder / str(step) / 'metrics').mkdir()
        (folder / str(step) / 'metrics' / 'metrics').write_text(text)
    with contextlib.closing(checkpoint.Writer(copy)) as writer:
        save(writer, 3, dice=0.1)
    assert checkpoint.steps(copy) == [1, 3]
    assert (folder / '1' / 'metrics' / 'metrics').read_text() == '{"dice": 0.6}'
    (folder / '1' / 'metrics' / 'metrics').write_bytes(b'{"di\xff')
    with contextlib.closing(checkpoint.Writer(copy)) as writer:  # as Orbax would not start
        save(writer, 4, dice=0.6)
    assert checkpoint.steps(copy) == [4]  # of equal ones the newest


@pytest.mark.slow
def test_a_damaged_best_step_is_set_aside_and_the_next_best_kept(copy):
    folder, save = with_steps(copy, a=0.9, b=0.5, c=0.1)
    flip_a_byte(folder / '1' / 'params')
    damaged = checkpoint.find_damaged(copy, new_state(tiny_config()))
    assert damaged == [1]
    checkpoint.set_aside(copy, damaged)
    with contextlib.closing(checkpoint.Writer(copy)) as writer:
        save(writer, 4, dice=0.2)
    assert checkpoint.steps(copy) == [2, 4]
    assert (copy / 'damaged' / '1').is_dir()


@pytest.mark.slow
@pytest.mark.parametrize('damage', [lose_the_metadata, lambda f: flip_a_byte(f / 'ema_params')])
@pytest.mark.parametrize(('which', 'taken'), [('best', 3), ('last', 2), ('', 3)])
def test_a_reader_takes_the_next_sound_step_and_says_so(copy, damage, which, taken):
    """`which` '' is the config's, 'best'."""
    folder, _ = with_steps(copy, a=0.1, b=0.2, c=0.5, d=0.9)
    if which == 'last':
        shutil.rmtree(folder / '3')
    damage(folder / '4')
    run = open_run(copy, which)
    assert run.step == taken
    assert list(run.passed_over) == [4]
    assert str(folder / '4') in run.passed_over[4]
    with pytest.raises(CheckpointError, match=str(folder / '4')):
        open_run(copy, '4')  # which was asked for
    for step in (1, 2, 3):
        shutil.rmtree(folder / str(step), ignore_errors=True)
    with pytest.raises(CheckpointError, match=str(folder / '4')):
        open_run(copy, which)


@pytest.mark.slow
def test_a_step_that_is_replaced_while_it_is_read_is_no_damage(copy, monkeypatch):
    """As a run that is still training does between any two looks at its folder."""
    folder, _ = with_steps(copy, a=0.5)
    restore, moves = checkpoint.restore_variables, iter([(1, 2), (2, 3)])

    def replaced_meanwhile(*given):
        for old, new in itertools.islice(moves, 1):
            (folder / str(old)).rename(folder / str(new))
        return restore(*given)

    monkeypatch.setattr(checkpoint, 'restore_variables', replaced_meanwhile)
    run = open_run(copy)
    assert (run.step, run.passed_over) == (3, {})


def test_the_metadata_of_the_step_that_is_taken_is_read_once(copy, monkeypatch):
    read, seen = checkpoint.metadata, []
    monkeypatch.setattr(
        checkpoint, 'metadata', lambda *given: seen.append(given[1]) or read(*given)
    )
    open_run(copy, '4')
    assert seen == [4]


@pytest.mark.slow
def test_a_step_that_is_half_deleted_while_it_is_read_is_no_damage(copy, monkeypatch):
    """It is listed until its last file is gone, and another one can be read meanwhile."""
    folder, _ = with_steps(copy, a=0.5, b=0.9, c=0.95)
    (folder / '3').rename(copy / 'next')
    restore, reads = checkpoint.restore_variables, []

    def deleted_meanwhile(workdir, step, *given):
        reads.append(step)
        if len(reads) == 1:
            for part in filter(Path.is_dir, (folder / '2').iterdir()):
                shutil.rmtree(part)
        if len(reads) == 3:
            shutil.rmtree(folder / '2')
            (copy / 'next').rename(folder / '3')
        return restore(workdir, step, *given)

    monkeypatch.setattr(checkpoint, 'restore_variables', deleted_meanwhile)
    run = open_run(copy)
    assert (run.step, run.passed_over) == (3, {})
    assert reads == [2, 1, 2, 1, 3]
