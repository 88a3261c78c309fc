"""experiments.score: a line for an evaluation of a finished run."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_it_chooses_on_validation_and_adds_the_line_of_the_test_part(trained, tmp_path):
    workdir, result = shutil.copytree(trained[0], tmp_path / 'run'), trained[1]
    command = [sys.executable, '-m', 'experiments.score', f'--workdir={workdir}', '--split=test',
               '--choose_postprocessing', f'--results={tmp_path / "lines.jsonl"}',
               '--trained=lines.jsonl, experiment a']  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, (tmp_path / 'lines.jsonl').read_text().splitlines())
    assert line['data']['split'] == 'test'
    assert line['trained'] == 'lines.jsonl, experiment a'
    assert line['postprocessing']['patients'] == 1
    theirs = [row['patient'] for row in result['patients']]
    assert [row['patient'] for row in line['patients']] == theirs
    assert {'commit', 'device', 'seed', 'step', 'summary', 'versions'} <= line.keys()
