"""Temperature: the softmax it stands for, the minimum it is at, and the file it is kept in."""

import json

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from pspnet_jax.inference import calibration
from pspnet_jax.runtime.errors import DataError


@pytest.fixture
def overconfident(rng):
    """(prob, labels): labels are drawn from softmax(z), the network says softmax(2.5 z)."""
    logits = rng.normal(0, 1.5, (40_000, 3))
    draws = rng.random((len(logits), 1))
    labels = (softmax(logits, -1).cumsum(-1) < draws).sum(-1)
    return softmax(2.5 * logits, -1).astype(np.float32), labels


def test_tempered_probabilities_are_the_softmax_of_logits_over_t(rng):
    logits = rng.normal(0, 4, (5, 7, 3)).astype(np.float32)
    prob = softmax(logits, -1)
    for temperature in (0.5, 1.0, 3.0):
        tempered = calibration.temper(prob, temperature)
        assert tempered.dtype == np.float32
        np.testing.assert_allclose(tempered, softmax(logits / temperature, -1), atol=1e-6)
        assert (tempered.argmax(-1) == logits.argmax(-1)).all()
    certain = np.array([[1.0, 0.0]], np.float32)
    assert np.isfinite(calibration.temper(certain, 20.0)).all()


def test_the_fit_undoes_an_overconfidence(overconfident):
    prob, labels = overconfident
    assert calibration.fit(prob, labels) == pytest.approx(2.5, rel=0.03)


def test_no_other_temperature_is_likelier(overconfident):
    prob, labels = overconfident
    fitted = calibration.fit(prob, labels)
    others = np.geomspace(*calibration.BOUNDS, 40)

    def loss(temperature):  # by scipy's log_softmax, of the logarithms as logits
        log_prob = log_softmax(np.log(prob.astype(np.float64)) / temperature, axis=-1)
        return -log_prob[np.arange(len(labels)), labels].mean()

    best = calibration.negative_log_likelihood(prob, labels, fitted)
    assert best == pytest.approx(loss(fitted))
    assert best <= min(map(loss, others)) + 1e-6


def test_where_all_is_right_the_fit_is_the_lower_bound():
    prob = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    assert calibration.fit(prob, np.array([0, 1])) == pytest.approx(0.05, rel=0.02)


def test_a_sample_is_of_counted_pixels_alone_and_the_same_again():
    labels = np.arange(60).reshape(3, 20) % 5
    labels[:, 10:] = 255
    prob = np.stack([labels, -labels], axis=-1)
    for count, size in ((7, 7), (1000, 30)):
        found, chosen = calibration.sample(prob, labels, 255, count, [0, 1])
        assert len(chosen) == len(found) == size
        assert (found[:, 0] == chosen).all()
        assert chosen.max() < 5
        assert (calibration.sample(prob, labels, 255, count, [0, 1])[1] == chosen).all()


def test_a_temperature_is_of_one_checkpoint(tmp_path):
    assert calibration.load(tmp_path, 8) == 1.0
    calibration.save(tmp_path, {'step': 8, 'temperature': 1.7})
    assert [path.name for path in tmp_path.iterdir()] == ['temperature.json']
    assert calibration.load(tmp_path, 8) == 1.7
    assert calibration.load(tmp_path, 9) == 1.0


def test_a_temperature_is_of_the_views_that_it_was_fitted_for(tmp_path, caplog):
    views = {'scales': [1.0], 'flip': False, 'window': 0}
    calibration.save(tmp_path, {'step': 8, 'views': views, 'temperature': 1.7})
    assert calibration.load(tmp_path, 8, views) == 1.7
    assert not caplog.messages
    assert calibration.load(tmp_path, 8, {**views, 'flip': True}) == 1.0
    assert 'was fitted with other prediction settings (flip): not applied' in caplog.messages[-1]
    assert calibration.load(tmp_path, 8, {**views, 'window': 64, 'overlap': 0.5}) == 1.0
    assert '(overlap, window)' in caplog.messages[-1]
    calibration.save(tmp_path, {'step': 8, 'temperature': 1.7})  # as it was written before
    assert calibration.load(tmp_path, 8, views) == 1.0
    assert 'has no prediction settings' in caplog.messages[-1]


@pytest.mark.parametrize(
    'text',
    ['', 'no', '[]', '{"step": 8}', '{"step": 8, "temperature": 1.5, "views": 3}', *(
        json.dumps({'step': 8, 'temperature': t}) for t in (0, -1, 1e9, 'x', None, float('nan'))
    )],
)  # fmt: skip
def test_a_file_that_is_not_ours_is_an_error(tmp_path, text):
    (tmp_path / 'temperature.json').write_text(text)
    with pytest.raises(
        DataError, match=r'temperature\.json is not (a file of --fit_temperature|readable as JSON)'
    ):
        calibration.load(tmp_path, 8)
