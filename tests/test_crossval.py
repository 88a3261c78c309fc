"""Cross-validation by one command: every patient once, the figure over patients."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments import crossval
from tests.conftest import ROOT


@pytest.mark.slow
def test_two_folds_test_every_patient_once_and_a_second_call_runs_nothing(tmp_path):
    command = [
        sys.executable, '-m', 'experiments.crossval', '--config=configs/phantom.py:unet_mini',
        '--folds=2', f'--workdir={tmp_path / "cv"}', f'--results={tmp_path / "lines.jsonl"}',
        '--config.model.width=4', '--config.phantom.volumes=6', '--config.phantom.slices=4',
        '--config.phantom.size=32', '--config.train.steps=2', '--config.train.validate_every=2',
        '--config.train.batch_size=8', '--config.optim.warmup_steps=1', '--choose_postprocessing',
    ]  # fmt: skip
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert first.returncode == 0, first.stderr
    (line,) = map(json.loads, (tmp_path / 'lines.jsonl').read_text().splitlines())
    assert sorted(p['patient'] for p in line['patients']) == [f'phantom_{n:03d}' for n in range(6)]
    dice = [p['dice'] for p in line['patients']]
    assert line['summary']['dice']['mean'] == np.mean(dice)
    assert line['summary']['dice']['n'] == 6
    parts = [json.loads((tmp_path / f'cv/fold_{n}/splits.json').read_text()) for n in range(2)]
    assert not set(parts[0]['test']) & set(parts[1]['test'])
    for n, part in enumerate(parts):
        chosen = json.loads((tmp_path / f'cv/fold_{n}/postprocessing.json').read_text())
        assert line['postprocessing'][n]['options'] == chosen['options']
        assert chosen['patients'] == len(part['validation'])
        assert not set(part['test']) & set(part['train'] + part['validation'])
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert 'fold 0 of 2' not in again.stdout
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


def test_one_patient_has_no_interval_and_older_lines_no_joined_hd95():
    same = ('config', 'overrides', 'commit', 'seed', 'device', 'versions')
    row = {'patient': 'a', 'dice': 0.5, 'dice_largest': 0.5, 'iou': 0.4, 'hd95': None}
    line = dict.fromkeys(same, '')
    line |= {'seconds': 1.0, 'summary': {'dice': {'mean': 0.5}}, 'patients': [row]}
    summary = crossval.over_patients([line])['summary']
    assert summary['dice'] == {'mean': 0.5, 'median': 0.5, 'ci95': None, 'n': 1}
    assert summary['hd95']['n'] == summary['hd95_joined']['n'] == 0


@pytest.mark.slow
def test_a_fold_that_fails_ends_the_command(tmp_path):
    done = subprocess.run(
        [
            sys.executable, '-m', 'experiments.crossval', '--config=configs/lgg.py',
            f'--workdir={tmp_path}', f'--config.data.source={tmp_path / "nowhere"}',
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1
    assert 'is not a folder' in done.stderr
    assert 'fold 1 of' not in done.stdout
