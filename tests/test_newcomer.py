"""The commands of the README and of docs/, run word for word in a folder with the data they name.

Its configs are forks of ours that train a tiny network for two steps from random weights.
"""

import importlib.util
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.data.formats import video
from tests import test_via as via
from tests.conftest import ROOT, write_case
from tests.test_readme import PAGES, commands_of

FORK = """
from pspnet_jax.config import {page}


def get_config(arg=''):
    config = {page}.get_config('unet_mini')
    config.model.width, config.model.pretrained = 4, ''
    config.train.steps = config.train.validate_every = 2
    config.train.batch_size, config.eval.bootstrap = 2, 50
    {more}
    return config
"""


def write_pictures(folder, seed):
    """Twelve pictures of two sizes, with masks of three classes."""
    rng = np.random.default_rng(seed)
    for kind in ('images', 'masks'):
        (folder / kind).mkdir(parents=True)
    for n, stem in enumerate('abcdefghijkl'):
        mask = np.zeros((48, 40 + 8 * (n % 2)), np.uint8)
        mask[8 + n : 24 + n, 4:30], mask[12 + n : 18 + n, 8:20] = 1, 2
        image = rng.integers(0, 60, (*mask.shape, 3), np.uint8) + 80 * mask[..., None]
        Image.fromarray(image).save(folder / f'images/{stem}.png')
        Image.fromarray(mask).save(folder / f'masks/{stem}.png')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """(the folder, what runs a line of the shell there)."""
    place = tmp_path_factory.mktemp('newcomer')
    for seed, name in enumerate(('own', 'other', 'OTHER_FOLDER')):
        write_pictures(place / name, seed)
    shutil.copytree(place / 'own/images', place / 'PICTURES')
    for patient in (
        'TCGA_CS_4941_19960909',
        'TCGA_CS_4944_20010208',  # of the public hold-out
        'TCGA_DU_5849_19950405',
        'TCGA_DU_5852_19950709',
    ):
        write_case(place / 'FOLDER/kaggle_3m', patient, slices=2, lesion=1)
    (place / 'configs').mkdir()
    for page, more in (('folder', 'pass'), ('lgg', "config.data.root = 'tfds'")):
        (place / f'configs/{page}.py').write_text(FORK.format(page=page, more=more))
    (place / 'bin').mkdir()
    (place / 'bin/python').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (place / 'bin/python').chmod(0o755)
    path = f'{place / "bin"}:{os.environ["PATH"]}'
    environment = os.environ | {'PATH': path, 'PYTHONPATH': str(ROOT), 'HOME': str(place)}

    def type_in(line):
        done = subprocess.run(
            ['bash', '-euo', 'pipefail', '-c', line],
            cwd=place, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f'{line}\n{done.stdout}{done.stderr}'
        return done.stdout + done.stderr

    return place, type_in


def commands(page):
    """Those that follow the two of the set-up, which .ci/run runs, and install nothing."""
    return [line for line in commands_of(PAGES[page]) if line.startswith('python -m pspnet_jax')]


@pytest.mark.slow
def test_the_commands_of_the_readme(place):
    place, type_in = place
    told = {line: type_in(line) for line in commands('README.md')}
    check, train, predict, evaluate, *_, lgg = told.values()
    assert 'no faults found' in check
    assert '3 classes, from the masks: background, 1, 2' in train
    assert '12 predicted' in predict
    assert 'truth' in evaluate
    assert 'class 2' in evaluate
    assert '2 predicted' in lgg
    for stem, size in (('a', (40, 48)), ('b', (48, 48))):
        assert Image.open(place / f'runs/own/out/{stem}_mask.png').size == size
    for path in ('runs/own/report.html', 'runs/own/evaluation/other/report.html'):
        assert (place / path).stat().st_size
    for name in ('checkpoints', 'evaluation/test', 'report.html', 'metrics.jsonl', 'curves.png',
                 'config.json', 'splits.json'):  # fmt: skip
        assert (place / 'runs/own' / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize('page', ['docs/prediction.md', 'docs/export.md', 'docs/metrics.md',
                                  'docs/training.md', 'docs/data.md'])  # fmt: skip
def test_the_commands_of_a_page(place, page):
    place, type_in = place
    if not (place / 'runs/own').exists():  # this test alone
        for line in commands('README.md'):
            type_in(line)
    lines = [line for line in commands(page) if '--input=0 ' not in line]  # a camera
    if page == 'docs/prediction.md' and not importlib.util.find_spec('av'):
        lines = [line for line in lines if 'clip.mp4' not in line]
    elif page == 'docs/prediction.md':
        with video.writing(place / 'clip.mp4', 25, exact=False) as write:
            for _ in range(3):
                write(np.zeros((48, 40, 3), np.uint8))
    if page == 'docs/export.md' and not importlib.util.find_spec('onnx'):
        lines = [line for line in lines if 'onnx' not in line]
    for line in lines:
        if 'rasterize' in line:  # writes the masks that are not there yet
            box = [('rect', ((2, 2), (20, 30)), 'cell')]
            drawing = {f'{stem}.png': box for stem in 'abcdefghijkl'}
            via.write(place / 'annotations.json', via.via_export(1, drawing))
            shutil.rmtree(place / 'own/masks')
        type_in(line)
