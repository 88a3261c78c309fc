"""The calls for scripts: what the commands give, without the commands."""

import dataclasses
import inspect
import json
import pydoc
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import pspnet_jax
from pspnet_jax.inference import predictors
from pspnet_jax.runtime.errors import ConfigError
from tests.conftest import ROOT, tiny_config

PYTHON = [  # test_export.py runs those that serve
    block
    for block in re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    if 'train' in block
]

TINY = {
    'model.width': 4,
    'model.backbone': 'resnet18',
    'train.batch_size': 2,
    'train.steps': 2,
    'train.validate_every': 2,
    'optim.warmup_steps': 1,
    'eval.bootstrap': 50,
    'eval.batch_size': 2,
    'data.test_fraction': 0.25,
    'data.size': (32, 32),
}


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """A folder of ten pictures of two sizes and their masks."""
    root, rng = tmp_path_factory.mktemp('own'), np.random.default_rng(0)
    for kind in ('images', 'masks'):
        (root / kind).mkdir()
    for n in range(10):
        image = rng.integers(0, 120, (40, 48 + 4 * (n % 2), 3), np.uint8)
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[10 + n : 25 + n, 8:30] = 255
        image[mask > 0] += 100
        Image.fromarray(image).save(root / 'images' / f'p{n}.png')
        Image.fromarray(mask).save(root / 'masks' / f'p{n}.png')
    return root


@pytest.fixture(scope='module')
def model(own, tmp_path_factory):
    return pspnet_jax.train(
        'pspnet', images=own / 'images', masks=own / 'masks',
        workdir=tmp_path_factory.mktemp('run'), changes=TINY,
    )  # fmt: skip


def test_a_picture_gets_the_mask_that_the_command_writes(own, model, tmp_path):
    path = own / 'images' / 'p1.png'
    mask = model.predict(path)
    assert mask.shape == (40, 52)
    np.testing.assert_array_equal(mask, model.predict(np.array(Image.open(path))))
    prob = model.predict_probabilities(path)
    assert prob.shape == (40, 52, 2)
    np.testing.assert_allclose(prob.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(mask, prob.argmax(-1))


def test_a_model_is_one_line(model):
    line = repr(model)
    assert len(line.splitlines()) == 1
    assert line.startswith('<Model pspnet on resnet18, 2 classes: step 2 of ')


@pytest.mark.slow
def test_a_volume_is_its_slices_with_one_scale(model, rng):
    volume = rng.integers(0, 255, (3, 32, 32, 3), np.uint8)
    labels = model.predict_volume(volume)
    assert labels.shape == (3, 32, 32)
    np.testing.assert_array_equal(labels, predictors.predict_array(model.predictor, volume)[0])


@pytest.mark.slow
def test_evaluation_of_folders_is_a_row_a_picture(own, model):
    figures = model.evaluate(own / 'images', own / 'masks')
    assert [row['patient'] for row in figures['patients']] == [f'p{n}' for n in range(10)]
    mask = model.predict(own / 'images' / 'p3.png')
    truth = np.array(Image.open(own / 'masks' / 'p3.png')) > 0
    both, total = (mask.astype(bool) & truth).sum(), mask.sum(dtype=int) + truth.sum()
    assert figures['patients'][3]['dice'] == pytest.approx(2 * both / total)


@pytest.mark.slow
def test_evaluation_tells_which_pictures_it_was_trained_on_and_groups_them(own, model):
    parts = json.loads((model.workdir / 'splits.json').read_text())
    figures = model.evaluate(own / 'images', own / 'masks')
    assert figures['data']['overlap'] == {
        'train': sorted(parts['train']), 'validation': sorted(parts['validation']), 'same_name': []
    }  # fmt: skip
    figures = model.evaluate(own / 'images', own / 'masks', group='(p)')
    names = [row['patient'] for row in figures['patients']]
    assert {name.split()[0] for name in names} == {'p'}
    assert figures['data']['overlap']['train'] == names


@pytest.mark.slow
def test_a_temperature_is_in_the_figures_as_in_the_probabilities(own, model):
    hot = dataclasses.replace(model, predictor=model.predictor._replace(temperature=3.0))
    plain, tempered = (m.evaluate(own / 'images', own / 'masks') for m in (model, hot))
    assert tempered['calibration']['temperature'] == 3.0
    assert tempered['summary'] == plain['summary']
    prob = np.concatenate(
        [hot.predict_probabilities(own / 'images' / f'p{n}.png')[..., 1].ravel() for n in range(10)]
    )
    bins = np.minimum((prob.astype(np.float64) * 15).astype(int), 14)
    found = [b['voxels'] for b in tempered['calibration']['bins']]
    assert np.abs(np.bincount(bins, minlength=15) - found).sum() < 0.01 * len(prob)
    assert [b['voxels'] for b in plain['calibration']['bins']] != found


@pytest.mark.slow
def test_a_run_is_loaded_with_other_options_of_prediction(model, own):
    again = pspnet_jax.load(model.workdir, threshold=1.0)
    assert not again.predict(own / 'images' / 'p1.png').any()
    with pytest.raises(ConfigError, match=r'predict\.flop is not a key'):
        pspnet_jax.load(model.workdir, flop=True)


def test_what_is_missing_or_unknown_is_said(own):
    with pytest.raises(ConfigError, match='no images: give'):
        pspnet_jax.train('unet')
    with pytest.raises(ConfigError, match='changes'):
        pspnet_jax.train('unet', images=own / 'images', masks=own / 'masks',
                         changes={'train.stepz': 3})  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('block', PYTHON, ids=lambda block: block.splitlines()[0])
def test_the_readmes_examples_run(own, tmp_path, monkeypatch, capsys, block):
    """With a tiny network in place of those that the configs describe."""
    shutil.copytree(own, tmp_path / 'own')
    (tmp_path / 'own/images/p1.png').rename(tmp_path / 'own/images/a.png')
    (tmp_path / 'own/masks/p1.png').rename(tmp_path / 'own/masks/a.png')

    def tiny(_=''):
        return tiny_config(**{'train.steps': 2, 'data.size': (32, 32)})

    for module in ('pspnet_jax.config.folder', 'pspnet_jax.config.lgg'):
        monkeypatch.setattr(f'{module}.get_config', tiny)
    monkeypatch.chdir(tmp_path)
    exec(block, {'__name__': 'example'})
    assert capsys.readouterr().out
    assert list(tmp_path.glob('runs/*/evaluation.json'))


def test_the_package_shows_its_three_names():
    assert {'Model', 'load', 'train'} <= set(dir(pspnet_jax))
    text = pydoc.render_doc(pspnet_jax, renderer=pydoc.plaintext)
    for line in ('load(workdir:', 'train(', 'class Model(', 'predict(self, image:'):
        assert line in text
    assert list(inspect.signature(pspnet_jax.train).parameters)[:4] == [
        'config', 'images', 'masks', 'workdir',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('before', 'told'),
    [
        ('', {'out': 0, 'error': 0}),  # a library says nothing by itself
        ("sys.modules['ipykernel'] = sys", {'out': 1, 'error': 0}),
        ("sys.modules['ipykernel'] = sys; logging.basicConfig()", {'out': 0, 'error': 1}),
    ],
    ids=['script', 'notebook', 'notebook with logging'],
)
def test_what_is_logged_appears_in_a_notebook(before, told):
    code = f'import sys, logging; {before}\nimport pspnet_jax\n'
    code += "logging.getLogger('pspnet_jax.train').info('train: 50 patients')\n"
    code += "logging.getLogger('another').info('its inner workings')"
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.count('train: 50 patients') == told['out']
    assert done.stderr.count('train: 50 patients') == told['error']
    assert 'inner workings' not in done.stdout + done.stderr
