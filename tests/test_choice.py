"""Post-processing chosen on validation: each Dice is evaluation's own, the choice the highest of
them, the file of one checkpoint and its views.
"""

import itertools
import json
import logging
import shutil

import numpy as np
import pytest

from pspnet_jax import api
from pspnet_jax.config import from_dict, with_prediction
from pspnet_jax.data.volumes import Volume
from pspnet_jax.evaluation import fitting, protocol, scores
from pspnet_jax.inference import calibration, choice, postprocess, predictors, settings
from pspnet_jax.prediction import folders, manifest
from pspnet_jax.runtime.errors import ConfigError, DataError
from pspnet_jax.serving import export, read
from tests.conftest import refused, tiny_config
from tests.test_evaluate import BATCHING, OPTIONS, options_with

OWN = {'flip': False, 'threshold': None, 'largest_component': False, 'min_size': 0}


def patients(rng, num_classes, ignore_label=255):
    """Blobs under noise, an ignored corner; two scans, a patient with no structure, one ignored."""
    for n in range(4):
        mask = np.zeros((5, 14, 12), np.uint8)
        for label in range(1, num_classes):
            z, y, x = rng.integers(0, (3, 9, 7))
            mask[z : z + 2, y : y + 4, x : x + 5] = label
        mask *= n != 2
        mask[0, :3] = ignore_label
        image = rng.integers(0, 256, (*mask.shape, num_classes), np.uint8)
        image[np.arange(num_classes) == mask[..., None]] |= 150
        intensity = np.repeat(np.array([[0], [255], [0], [60]], np.float32), num_classes, 1)
        scan = np.array([0, 0, 0, 1, 1]) if n == 1 else None
        yield Volume(f'p{n}', image, mask, np.arange(5), intensity, None, scan)


def network(flip):
    """Class probabilities from the channels; another network where `flip`."""

    def predict_fn(image):
        exponent = np.exp(image * (0.7 if flip else 1.0) + (0.2 * np.roll(image, 1, 1)) * flip)
        return (exponent / exponent.sum(-1, keepdims=True)).astype(np.float32)

    return predict_fn


@pytest.mark.parametrize(('num_classes', 'ignore_label'), [(2, 255), (4, 255), (4, 2)])
def test_each_dice_tried_is_that_of_evaluation_with_these_options(
    rng, monkeypatch, num_classes, ignore_label
):
    data = list(patients(rng, num_classes, ignore_label))
    tried = fitting.grid(OWN, num_classes, given=())
    given = options_with(num_classes=num_classes, ignore_label=ignore_label, bootstrap=10)
    kept = []
    monkeypatch.setattr(fitting, 'choose', lambda *found: kept.append(fitting.combinations(*found)))
    fitting.choose_postprocessing(network, data, tried=tried, **given)
    (rows,) = kept
    assert len(rows) == 2 * (18 if num_classes == 2 else 1) * 2 * 6
    assert len({row['dice'] for row in rows}) > 10
    for row in rng.permutation(rows)[:40]:
        options = {key: row[key] for key in choice.OPTIONS}
        found = scores.evaluate_volumes(
            network(options.pop('flip')), data, label_options=options, **given
        )
        dice = found['summary']['dice']
        assert (dice['mean'], dice['n']) == (pytest.approx(row['dice'], abs=1e-12), row['n'])


def test_what_is_kept_of_components_is_one_rule(rng):
    """`clean` by it, against scipy's labels in turn: the largest first, then its size."""
    labels = (rng.random((4, 9, 9)) < 0.2).astype(np.uint8)
    for largest, size in itertools.product((False, True), (0, 3, 12)):
        one = postprocess.clean(labels, largest_component=largest)
        expected = postprocess.clean(one, min_size=size)
        found = postprocess.clean(labels, largest_component=largest, min_size=size)
        np.testing.assert_array_equal(found, expected)


def test_the_grid_has_the_configs_own_first_and_what_was_given_alone():
    tried = fitting.grid(OWN, 2, given=())
    assert {key: values[0] for key, values in tried.items()} == OWN
    assert 0.5 in tried['threshold']
    steps = np.diff([0.1, *tried['threshold'][2:]])
    np.testing.assert_allclose(steps, 0.05)
    assert tried['threshold'][-1] == 0.9
    assert fitting.grid(OWN, 3, given=())['threshold'] == [None]
    other = OWN | {'threshold': 0.42, 'min_size': 7}
    tried = fitting.grid(other, 2, given=('min_size', 'flip', 'window'))
    assert (tried['min_size'], tried['flip'], tried['threshold'][0]) == ([7], [False], 0.42)


def test_the_highest_mean_is_chosen_and_of_equal_ones_the_nearest_to_the_config():
    tried = {'flip': [False, True], 'min_size': [0, 10, 30]}

    def chosen(*dice):
        found = fitting.choose(tried, np.array(dice))
        return [*found['options'].values()], found

    assert chosen([0.5, 0.6, 0.7, 0.9, 0.1, 0.2])[0] == [True, 0]
    assert chosen([0.5, 0.9, 0.7, 0.9, 0.9 + 1e-12, 0.2])[0] == [False, 10]
    assert chosen([0.9, 0.9 + 5e-10, 0.9, 0.9, 0.9, 0.9])[0] == [False, 0]
    options, found = chosen([0.5, 0.6, 0, 0, 0, 0], [np.nan, 0.2, 0, 0, 0, 0.0])
    assert options == [False, 0]  # over one of two patients, as evaluation has it
    assert (found['dice'], found['without'], found['patients'], found['n']) == (0.5, 0.5, 2, 1)
    assert [row['of'] for row in found['best']] == ['flip'] * 2 + ['min_size'] * 3
    assert [row['dice'] for row in found['best']] == [0.5, 0, 0.5, pytest.approx(0.4), 0]
    with pytest.raises(DataError, match='no validation case has an object'):
        chosen([np.nan] * 6)


VIEWS = {'scales': [1.0], 'window': 0, 'crf': {'kernel': 'none'}}
FACTS = {
    'step': 8, 'views': VIEWS, 'split': 'validation', 'dice': 0.8, 'without': 0.7, 'patients': 3,
    'options': {'flip': True, 'threshold': 0.4, 'largest_component': False, 'min_size': 30},
}  # fmt: skip


def test_a_choice_is_of_one_checkpoint_and_its_views(tmp_path, caplog):
    config = from_dict({})
    assert choice.load(tmp_path, config, 8, VIEWS) is None
    choice.save(tmp_path, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ['postprocessing.json']
    assert choice.load(tmp_path, config, 8, VIEWS) == FACTS
    assert not caplog.messages
    assert choice.load(tmp_path, config, 9, VIEWS) is None
    assert 'is for step 8, this is step 9: not applied' in caplog.messages[-1]
    assert choice.load(tmp_path, config, 8, VIEWS | {'window': 64, 'overlap': 0.5}) is None
    assert (
        'was chosen with other prediction settings (overlap, window): not applied'
        in caplog.messages[-1]
    )
    assert 'to make it again, add the same flags to python -m' in caplog.messages[-1]


@pytest.mark.parametrize(
    'changes',
    [{'step': '8'}, {'step': True}, {'views': 3}, {'options': {}}, {'options': [1]}, {'dice': 2},
     {'dice': 'x'}, {'without': -1}, {'patients': None},
     *({'options': FACTS['options'] | wrong} for wrong in (
         {'threshold': 7}, {'threshold': '<b>'}, {'min_size': -1}, {'min_size': 10**12},
         {'flip': 'yes'}, {'window': 64}, {'largest_component': [[]]})),
     'NaN', '[]', '', '[' * 50_000, '\0', '"\\ud800"'],
    ids=lambda changes: repr(changes)[:40],
)  # fmt: skip
def test_a_file_that_is_not_ours_is_an_error(tmp_path, changes):
    text = changes if isinstance(changes, str) else json.dumps(FACTS | changes)
    (tmp_path / choice.KEPT).write_text(text)
    match = r'postprocessing\.json.*delete it, or make it again with python'
    refused(choice.load, tmp_path, from_dict({}), 8, VIEWS, match=match, kind=DataError)


def test_a_threshold_is_refused_for_more_than_two_classes(tmp_path):
    choice.save(tmp_path, FACTS)
    config = from_dict({'model': {'num_classes': 3}})
    refused(choice.load, tmp_path, config, 8, VIEWS, match='is for two classes', kind=DataError)


@pytest.fixture
def chosen(trained, tmp_path, monkeypatch):
    """(workdir, evaluation, postprocessing.json) of a run whose choice departs from the config."""
    workdir = shutil.copytree(trained[0], tmp_path / 'run')
    result = protocol.evaluate_checkpoint(workdir, split='validation', fit=['postprocessing'])
    return workdir, result, json.loads((workdir / choice.KEPT).read_text())


@pytest.mark.slow
def test_a_choice_is_kept_with_the_run_applied_and_reported(chosen, capsys, caplog):
    workdir, result, kept = chosen
    assert kept['step'] == result['checkpoint']['step']
    assert kept['dice'] == pytest.approx(result['summary']['dice']['mean'], abs=1e-12)
    used = result['checkpoint']['config']['predict']
    assert {key: used[key] for key in choice.OPTIONS} == kept['options'] != OWN
    plain = protocol.evaluate_checkpoint(workdir, split='validation', changes=OWN)
    assert plain['postprocessing'] is None
    assert plain['summary']['dice']['mean'] == pytest.approx(kept['without'], abs=1e-12)
    assert kept['dice'] > kept['without']

    capsys.readouterr()
    with caplog.at_level(logging.INFO):
        test = protocol.evaluate_checkpoint(workdir)
    assert test['postprocessing'] == {
        'options': kept['options'], 'given': [],
        **{key: kept[key] for key in ('dice', 'without', 'patients')},
    }  # fmt: skip
    words = f'chosen on {kept["patients"]} validation cases (their Dice {kept["dice"]:.3f}, '
    assert sum(words in line for line in caplog.messages) == 1
    assert f'{workdir / choice.KEPT}: ' in caplog.text
    assert words in capsys.readouterr().out.splitlines()[-2]
    assert words in (workdir / 'report.html').read_text()
    assert 'too optimistic' not in (workdir / 'report.html').read_text()
    written = json.loads((workdir / 'evaluation.json').read_text())
    assert written['postprocessing'] == test['postprocessing']


@pytest.mark.slow
def test_flags_win_one_by_one(chosen, caplog):
    workdir, _, kept = chosen
    options = kept['options']
    given = {'flip': False, 'min_size': 3}
    with caplog.at_level(logging.INFO):
        predictor = predictors.load(workdir, changes=given)
    used = {key: predictor.config.predict[key] for key in choice.OPTIONS}
    assert used == options | given
    assert predictor.chosen['given'] == ['flip', 'min_size']
    assert 'flip, min_size as given' in caplog.text
    model = api.load(workdir, threshold=0.25)
    assert model.config.predict.threshold == 0.25
    assert model.config.predict.min_size == options['min_size']


@pytest.mark.slow
def test_prediction_and_its_manifest_have_what_was_chosen(chosen, tmp_path, rng):
    workdir, _, kept = chosen
    predictor = predictors.load(workdir)
    image = rng.integers(0, 255, (3, 32, 32, 3), np.uint8)
    labels, _ = predictors.predict_array(predictor, image)
    same = predictors.load(workdir, changes=kept['options'])
    np.testing.assert_array_equal(labels, predictors.predict_array(same, image)[0])

    def digest(predictor):
        return folders.open_manifest(predictor, tmp_path / 'out', None).digest

    assert digest(predictor) == digest(same)
    assert digest(predictor) != digest(predictors.load(workdir, changes=OWN))
    book = folders.open_manifest(predictor, tmp_path / 'out', None)
    folders.begin_manifest(predictor, book, None)
    line = json.loads((tmp_path / 'out' / manifest.NAME).read_text())
    assert {key: line['options'][key] for key in choice.OPTIONS} == kept['options']


@pytest.mark.slow
def test_a_choice_of_other_views_or_another_step_is_not_applied(chosen, caplog):
    workdir, _, kept = chosen
    predictor = predictors.load(workdir, changes={'window': 32})
    assert predictor.chosen is None
    assert predictor.config == with_prediction(predictors.load(workdir, changes=OWN).config,
                                               {'window': 32})  # fmt: skip
    assert 'was chosen with other prediction settings (overlap, window): not applied' in caplog.text
    choice.save(workdir, kept | {'step': 3})
    assert predictors.load(workdir).chosen is None
    assert f'is for step 3, this is step {kept["step"]}: not applied' in caplog.text


@pytest.mark.slow
def test_a_choice_of_one_run_is_not_applied_to_a_mean(chosen, trained, caplog):
    workdir, _, _ = chosen
    with caplog.at_level(logging.INFO):
        predictor = predictors.load([trained[0], workdir])
    assert {key: predictor.config.predict[key] for key in choice.OPTIONS} == OWN
    assert 'postprocessing.json was chosen for a single run: not applied' in caplog.text


@pytest.mark.slow
def test_an_exported_file_says_what_was_chosen_and_is_not_in_it(chosen):
    workdir, _, kept = chosen
    _, metadata = read.read(export.export_checkpoint(workdir, 'savedparams', size=(32, 32)))
    own = from_dict({}).predict
    expected = {
        f'predict.{key} = {value!r}' for key, value in kept['options'].items() if value != own[key]
    }
    assert {*metadata['left_out']} == expected != set()


@pytest.mark.slow
def test_options_that_are_given_are_not_chosen(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / 'run')
    given = {'flip': True, 'threshold': 0.35, 'largest_component': True}
    result = protocol.evaluate_checkpoint(
        workdir, split='validation', fit=['postprocessing'], changes=given
    )
    kept = json.loads((workdir / choice.KEPT).read_text())
    assert kept['options'] == given | {'min_size': kept['options']['min_size']}
    assert {row['of'] for row in kept['best']} == {'min_size'}
    assert result['postprocessing']['given'] == [*given]


@pytest.mark.slow
def test_a_temperature_fitted_without_the_chosen_flip_is_not_applied(trained, tmp_path, caplog):
    workdir = shutil.copytree(trained[0], tmp_path / 'run')
    protocol.evaluate_checkpoint(workdir, split='validation', fit=['temperature'])
    step = json.loads((workdir / calibration.KEPT).read_text())['step']
    views = settings.choice_views(tiny_config())
    options = OWN | {'flip': True}
    choice.save(workdir, FACTS | {'step': step, 'views': views, 'options': options})
    predictor = predictors.load(workdir)
    assert predictor.config.predict.flip
    assert predictor.temperature == 1
    assert 'was fitted with other prediction settings (flip): not applied' in caplog.text
    protocol.evaluate_checkpoint(workdir, split='validation', fit=['temperature'])  # chosen flip
    assert json.loads((workdir / calibration.KEPT).read_text())['views']['flip']
    assert predictors.load(workdir).temperature != 1


def test_the_network_sees_each_slice_once_a_flip(rng):
    seen, data = [], list(patients(rng, 2))

    def program(flip):
        return lambda image: seen.append((flip, len(image))) or network(flip)(image)

    fitting.choose_postprocessing(
        program,
        data,
        tried=fitting.grid(OWN, 2, given=()),
        **OPTIONS | {'batching': BATCHING._replace(batch_size=5)},
    )
    assert seen == [(False, 5), (True, 5)] * len(data)


@pytest.mark.parametrize('where', [{'split': 'test'}, {'split': 'validation', 'data': 'folder'}])
def test_post_processing_is_chosen_on_validation_only(tmp_path, where):
    with pytest.raises(ConfigError, match='--choose_postprocessing is for'):
        protocol.evaluate_checkpoint(tmp_path, fit=['postprocessing'], **where)
