"""What training prints: on a terminal, on a console that is none, and when it is resumed."""

import json
import logging
import math
import os
import pty
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from pspnet_jax.config import base
from pspnet_jax.data import lgg, phantom
from pspnet_jax.models import create
from pspnet_jax.training import loop, progress
from tests.conftest import ROOT, TINY, tiny_config

STEPS = {'train.steps': 6, 'train.validate_every': 3, 'train.accumulate': 2}


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


def pace(clock, **changes):
    return progress.Pace(**{'total': 10, 'validate_every': 4, 'step': 0, 'clock': clock} | changes)


def test_the_time_left_is_of_updates_and_of_validations_to_come():
    clock = Clock()
    ours = pace(clock)
    assert math.isnan(ours.left())
    clock.now = 50.0  # compiling
    ours.skip(0)
    clock.now += 8.0
    ours.finish(4)
    assert ours.left() == 6 * 2.0  # 2 s an update; nobody knows what a validation takes
    clock.now += 5.0
    ours.finish_validation()
    assert ours.left() == 6 * 2.0 + 2 * 5.0  # at steps 8 and 10
    clock.now += 100.0  # saving
    ours.skip(4)
    clock.now += 8.0
    ours.finish(8)
    assert ours.left() == 2 * 2.0 + 1 * 5.0


def test_a_resumed_run_counts_what_is_left_of_it():
    clock = Clock()
    ours = pace(clock, step=8)
    clock.now = 3.0
    ours.finish(9)
    assert ours.left() == 3.0


@pytest.mark.parametrize(
    ('seconds', 'words'),
    [(0.2, '0 s'), (99.4, '99 s'), (99.6, '2 minutes'), (5960, '99 minutes'), (5971, '1.7 hours')],
)
def test_durations_have_two_digits(seconds, words):
    assert progress.duration(seconds) == words


@pytest.mark.parametrize(
    ('steps', 'epochs'), [(3, '0.429'), (40, '5.71'), (1000, '143'), (100_000, '14,286')]
)
def test_the_plan_has_epochs_that_can_be_read(told, steps, epochs):
    config = base.get_config()
    config.train.batch_size = 4
    progress.tell_plan(config, 28, steps, 20)
    assert told() == [
        f'plan: {steps} steps of 4 images, {epochs} epochs, validation every {min(steps, 20)} steps'
    ]


@pytest.fixture
def told(caplog):
    caplog.set_level('INFO')
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_console_that_is_no_terminal_gets_a_line_a_minute(told, capsys):
    """An update takes 7 s: lines come after the third one and at the first of each minute."""
    clock = Clock()
    with progress.Progress(pace(clock, total=30, validate_every=30), batch_size=14) as shown:
        for step in range(1, 22):
            clock.now += 7.0
            shown.update(step, 1 / step)
    assert told() == [
        'time: 3 minutes left, 7 s per step, without validations',
        'step 12 of 30: loss 0.0833, 2 images/s, 2 minutes left',
        'step 21 of 30: loss 0.0476, 2 images/s, 63 s left',
    ]
    assert capsys.readouterr().err == ''


def test_a_validation_is_a_line_with_the_best_so_far(told):
    clock = Clock()
    shown = progress.Progress(pace(clock, total=4, validate_every=1), batch_size=1)
    state = {'best_dice': None, 'best_step': None, 'stale': 0}
    for step, dice in enumerate([-1.0, 0.5, 0.25, 0.5], start=1):
        clock.now += 10.0
        shown.update(step, 1.0)
        state = loop.ranked(state, dice, step)
        shown.tell_validation(step, dice, state)
    shown.tell_validation(4, 0.25, {'best_dice': 0.5, 'stale': 1})  # of an older version
    lines = [line for line in told() if 'validation Dice' in line]
    assert lines == [
        'step 1 of 4: validation Dice undefined: no case has a structure; 30 s left',
        'step 2 of 4: validation Dice 0.5000, the best so far; 20 s left',
        'step 3 of 4: validation Dice 0.2500, best 0.5000 at step 2; 10 s left',
        'step 4 of 4: validation Dice 0.5000, the best so far',
        'step 4 of 4: validation Dice 0.2500, best 0.5000',
    ]


def test_an_undefined_dice_after_a_dice_of_0_is_not_better():
    state = loop.ranked({'best_dice': 0.0, 'best_step': 1, 'stale': 0}, -1.0, 2)
    assert state == {'best_dice': 0.0, 'best_step': 1, 'stale': 1}


def test_the_config_is_told_by_its_differences_from_the_defaults(told, tmp_path):
    config = base.get_config()
    progress.tell_config(config, str(tmp_path))
    config.update_from_flattened_dict(
        {'data.name': 'lgg', 'predict.scales': (0.5, 1.0), 'predict.threshold': 0.3, 'seed': 7}
    )
    progress.tell_config(config, str(tmp_path))
    rest = f'(full config in {tmp_path}/config.json)'
    assert told() == [
        f'config: all defaults {rest}',
        'config: data.name=lgg, predict.scales=(0.5, 1.0), predict.threshold=0.3, seed=7 ' + rest,
    ]


def test_a_data_set_is_built_with_one_line_and_no_bar(kaggle, tmp_path, told, capfd):
    """Also where tfds warns of a folder that it passes over."""
    (tmp_path / 'built' / 'lgg' / '2.0.0').mkdir(parents=True)
    lgg.build(kaggle, tmp_path / 'built')
    assert told() == [
        f'building the LGG data set from {kaggle} (6 cases): about half a minute',
    ]
    assert capfd.readouterr() == ('', '')
    assert logging.getLogger('absl').getEffectiveLevel() == logging.INFO


def command(workdir, **changes):
    values = {**TINY, **STEPS, **changes}
    given = [f'--config.{key}={value}' for key, value in values.items() if key != 'config']
    main = [sys.executable, '-m', 'pspnet_jax.main', f'--config={values["config"]}']
    return [*main, *given, f'--workdir={workdir}']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(workdir, what was printed) of a run whose output is no terminal, and of it resumed."""
    workdir, done = tmp_path_factory.mktemp('printed') / 'run', []
    for steps in (3, 6):
        given = command(workdir, **{'train.steps': steps})
        done.append(subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=500))
        assert done[-1].returncode == 0, done[-1].stderr
    return workdir, done


def lines_of(done, start):
    return [line for line in done.stderr.splitlines() if line.startswith(start)]


@pytest.mark.slow
def test_a_run_is_a_page_of_whole_lines(run):
    for one in run[1]:
        assert len(one.stderr.splitlines()) < 20
        assert '\r' not in one.stderr + one.stdout
        assert 'it/s' not in one.stderr
        assert 'tfds' not in one.stderr + one.stdout
        assert all(line[0].islower() or line[0].isdigit() for line in one.stderr.splitlines())
        assert len(lines_of(one, '1 device: ')) == 1


@pytest.mark.slow
def test_the_data_is_told_by_part_as_counted_by_hand(run):
    workdir, done = run
    made = {v.patient: v for v in (phantom.make_volume(0, i, 4, 32) for i in range(6))}
    parts = json.loads((workdir / 'splits.json').read_text())
    told = []
    for part in ('train', 'validation', 'test'):
        masks = np.concatenate([made[name].mask for name in parts[part]])
        cases = f'{len(parts[part])} case' + 's' * (len(parts[part]) > 1)
        positive = sum(mask.any() for mask in masks)
        told.append(f'{part} {cases}, {len(masks)} images, {positive} with a structure')
    assert lines_of(done[0], 'data: ') == ['data: ' + '; '.join(told)]


@pytest.mark.slow
def test_the_network_and_the_plan_are_told_with_their_numbers(run):
    """Of 16 training images in batches of 4, the first run makes 3 updates and the second 6."""
    workdir, done = run
    config = tiny_config()
    model = create(**config.model)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    size = sum(leaf.size for leaf in jax.tree.leaves(tree['params']))
    (line,) = lines_of(done[0], 'network: ')
    found = re.fullmatch(
        r'network: unet_mini, 2 classes, ([\d,]+) parameters; compiled in \d+ s', line
    )
    assert found[1] == f'{size:,}'
    part = json.loads((workdir / 'splits.json').read_text())['train']
    epochs = [f'{steps * 4 / (4 * len(part)):.3g}' for steps in (3, 6)]
    for one, steps, count in zip(done, (3, 6), epochs, strict=True):
        assert lines_of(one, 'plan: ') == [
            f'plan: {steps} steps of 4 images, {count} epochs, validation every 3 steps'
        ]
        (line,) = lines_of(one, 'time: ')
        assert re.fullmatch(r'time: \d+ s left, [\d.e-]+ s per step(, without validations)?', line)


@pytest.mark.slow
def test_validations_and_the_resumed_run_are_a_line_each(run):
    _, (first, second) = run
    value = r'validation Dice 0\.\d{4}, the best so far'
    assert re.search(rf'^step 3 of 3: {value}$', first.stderr, re.MULTILINE)
    assert 'resuming' not in first.stderr
    assert lines_of(second, 'resuming') == ['resuming at step 3 of 6']
    assert 'warning: the config changed, from step 3 on: train.steps from 3 to 6' in second.stderr
    assert re.search(r'^step 6 of 6: validation Dice 0\.\d{4}, (the best so far|best 0\.\d{4} at '
                     r'step 3)$', second.stderr, re.MULTILINE)  # fmt: skip


@pytest.mark.slow
def test_the_table_of_the_test_cases_comes_once_and_then_where_the_report_is(run):
    workdir, done = run
    tested = json.loads((workdir / 'splits.json').read_text())['test']
    for one in done:
        assert lines_of(one, 'evaluating') == [f'evaluating the test cases ({len(tested)})']
        *table, last = one.stdout.splitlines()
        assert all(any(name in line for line in table) for name in tested)
        assert sum('report.html' in line for line in one.stdout.splitlines()) == 1
        assert f'{workdir}' in last
        assert 'report.html' in last
        assert 'pictures' in last


@pytest.mark.slow
def test_a_terminal_has_a_bar_below_the_lines(run, tmp_path):
    """With loss, speed and time left; whole lines are above it. Its size is 0 x 0, as docker's."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs
    ) as process:
        os.close(theirs)
        told = b''
        try:
            while part := os.read(ours, 4096):
                told += part
        except OSError:  # how Linux says that the other side is closed
            pass
        os.close(ours)
    assert process.returncode == 0, told
    told = told.decode()
    assert re.search(r'\r +0% \|.+\| step 0 of 6', told)
    assert re.search(
        r'\r100% \|.+\| step 6 of 6, loss \d+\.\d{4}, [\d.e+]+ images/s, \d+ s left', told
    )
    assert re.search(
        r'\rstep 3 of 6: validation Dice 0\.\d{4}, the best so far; \d+ s left\r\n', told
    )
