"""Networks that come with the package: what they are, and that nothing is written to them."""

import json
import re

import numpy as np
import pytest
from safetensors import safe_open

import pspnet_jax
from experiments import tables
from pspnet_jax.evaluation.protocol import evaluate_checkpoint
from pspnet_jax.inference import choice, saved
from pspnet_jax.inference.runs import open_run
from pspnet_jax.runtime import paths
from pspnet_jax.runtime.errors import ConfigError
from pspnet_jax.serving import export
from pspnet_jax.training.loop import train_and_evaluate
from tests.conftest import tiny_config

NAMES = paths.zoo()


def test_there_is_one_for_lgg():
    assert 'lgg' in NAMES


@pytest.mark.parametrize('name', NAMES)
def test_its_folder_has_a_small_model_a_card_and_no_path_of_a_machine(name):
    place = paths.ZOO / name
    assert (place / saved.NAME).stat().st_size <= 15e6
    card = (place / 'README.md').read_text()
    for words in ('Not for diagnosis', 'CC BY-NC-SA', 'Limits', 'commit', '--workdir=zoo:'):
        assert words in card, words
    with safe_open(place / saved.NAME, 'numpy') as file:
        metadata = file.metadata()[saved.KEY]
    for told in (metadata, *(path.read_text() for path in place.glob('*.json'))):
        assert not re.search(r'"/|"[A-Z]:\\', told)


@pytest.mark.parametrize('name', NAMES)
def test_its_postprocessing_is_of_its_step_and_is_applied(name):
    kept = json.loads((paths.ZOO / name / choice.KEPT).read_text())
    run = open_run(f'zoo:{name}')
    assert kept['step'] == run.step
    model = pspnet_jax.load(name)
    assert {key: model.config.predict[key] for key in kept['options']} == kept['options']


@pytest.mark.slow
def test_it_is_loaded_by_name_and_predicts_a_volume():
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 255, (3, 64, 64, 3), np.uint8)
    mask = pspnet_jax.load('lgg').predict_volume(volume)
    assert mask.shape == (3, 64, 64)
    np.testing.assert_array_equal(pspnet_jax.load('zoo:lgg').predict_volume(volume), mask)


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'lgg').mkdir()
    with pytest.raises(Exception, match='lgg holds no checkpoint'):
        pspnet_jax.load('lgg')


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r'zoo:brain is not one of .*zoo:lgg'):
        paths.local('zoo:brain')


def test_nothing_is_written_to_it(tmp_path):
    with pytest.raises(ConfigError, match='give --out'):
        evaluate_checkpoint('zoo:lgg', data=str(tmp_path))
    with pytest.raises(ConfigError, match='give a run of your own'):
        evaluate_checkpoint('zoo:lgg', split='validation', fit=['temperature'], out=tmp_path)
    with pytest.raises(ConfigError, match='give --output'):
        export.export_checkpoint('zoo:lgg', 'onnx')
    with pytest.raises(ConfigError, match='give a folder'):
        train_and_evaluate(tiny_config(), 'zoo:lgg')


@pytest.mark.parametrize('name', NAMES)
def test_the_cards_table_is_that_of_the_committed_line(name):
    page = f'experiments/zoo/{name}/README.md'
    text = (paths.ZOO / name / 'README.md').read_text()
    assert tables.fill(page, text) == text, 'run python -m experiments.tables'
