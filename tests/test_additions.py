"""A loss, a backbone, a network, a data set and a weight table from outside the package: a row
each, in a file of one's own, which CONTRIBUTING.md shows.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pspnet_jax import config as rules
from pspnet_jax import models
from pspnet_jax.data import sources
from pspnet_jax.inference.runs import open_run
from pspnet_jax.models import weights
from pspnet_jax.models.backbones import BACKBONES
from pspnet_jax.runtime import log
from pspnet_jax.runtime.errors import ConfigError, PretrainedError
from pspnet_jax.training import loop, losses, update
from tests.conftest import ROOT, tiny_config

# The python blocks of CONTRIBUTING.md, one after the other, are a config page.
PAGE = '\n\n'.join(
    re.findall(r'```python\n(.*?)```', (ROOT / 'CONTRIBUTING.md').read_text(), re.DOTALL)
)


@pytest.fixture
def page(tmp_path):
    """The page's path, and a function that imports it; what it adds is taken away at the end."""
    tables = (losses.TERMS, BACKBONES, models.MODELS, sources.SOURCES, weights.TABLES)
    before = [dict(table) for table in tables]
    path = tmp_path / 'mine.py'
    path.write_text(PAGE)

    def load():
        spec = importlib.util.spec_from_file_location('mine', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield path, load
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.slow
def test_a_page_brings_its_own_loss_network_and_data(page, tmp_path):
    """Trained by the command for two steps, resumed for one, restored where the page is known."""
    path, load = page
    for steps in (2, 3):
        done = subprocess.run(
            [
                sys.executable, '-m', 'pspnet_jax.main', f'--config={path}', '--workdir=run',
                f'--config.train.steps={steps}', "--config.loss.extra={'brier': 0.25}",
            ],
            cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True,
            text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    records = [line for line in log.read(tmp_path / 'run') if 'loss' in line]
    assert [line['step'] for line in records] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"model\.name is 'one_layer': it must be one of 'fcn"):
        open_run(tmp_path / 'run', 'last')
    load()
    run = open_run(tmp_path / 'run', 'last')
    assert (run.step, run.model.gain, run.config.loss.extra['brier']) == (3, 2.0, 0.25)
    assert run.variables['params']['backbone']['stem']['kernel'].shape == (4, 4, 1, 8)


def test_rules_read_the_dictionaries_when_they_are_asked(page):
    _, load = page
    own = {'model.name': 'one_layer', 'model.backbone': 'plain', 'data.name': 'squares'}
    for key, value in own.items():
        with pytest.raises(ConfigError, match=f"{key} is '{value}': it must be .*one of '"):
            rules.validate(tiny_config(**{key: value}))
        assert value not in str(rules.RULES[key][1])
    config = load().get_config()
    rules.validate(config)
    config.model.backbone = 'plain'
    rules.validate(config)
    assert all(repr(value) in str(rules.RULES[key][1]) for key, value in own.items())
    config.model.backbone = 'vgg11'
    with pytest.raises(ConfigError, match=r"None .* or one of 'vgg16', .*, 'plain'"):
        rules.validate(config)


@pytest.mark.parametrize(
    'extra',
    [
        {'brier': -1.0},
        {'brier': '1'},
        {'a b': 1.0},
        {'items': 1.0},
        {'__class__': 1.0},
        {'_fields': 1.0},
        {'a.b': 1.0},
        {'x' * 101: 1.0},
        [1.0],
        0.5,
    ],
)
def test_weights_of_own_losses_are_numbers_by_name(extra):
    tree = rules.to_dict(tiny_config())
    tree['loss']['extra'] = extra
    with pytest.raises(
        ConfigError, match=r'loss\.extra is .* it must be None or a mapping from your own'
    ):
        rules.from_dict(tree)


@pytest.mark.slow
def test_a_loss_is_known_where_it_is_trained_and_needs_not_be_where_it_is_not(page, tmp_path):
    alone = {'loss.cross_entropy': 0.0, 'loss.dice': 0.0, 'loss.extra': {'brier': 1.0}}
    config = tiny_config(**alone)
    rules.validate(config)
    back = rules.from_dict(json.loads(json.dumps(rules.to_dict(config))))
    assert back.loss.to_dict()['extra'] == {'brier': 1.0}
    with pytest.raises(ConfigError, match=r"losses\.TERMS\['brier'\] = \(function, \{\}\)"):
        loop.train_and_evaluate(config, str(tmp_path))


def test_the_sum_has_the_losses_that_were_added(page, rng):
    module = page[1]()
    logits = jnp.asarray(rng.standard_normal((2, 8, 8, 2)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 2, (2, 8, 8)), jnp.int32)
    options = tiny_config().loss.to_dict() | {'axis_name': None}
    out = {'logits': logits, 'aux': logits}

    def total(**changes):
        return float(update.segmentation_loss(out, labels, **{**options, **changes}))

    own = float(module.brier(logits, labels, ignore_label=255, axis_name=None))
    prob = np.asarray(jax.nn.softmax(logits), np.float64)
    assert own == pytest.approx(((prob - np.eye(2)[labels]) ** 2).sum(-1).mean(), rel=1e-5)
    aux, plain = options['aux'], total()
    assert total(extra={'brier': 0.5}) == pytest.approx(plain + (1 + aux) * 0.5 * own, rel=1e-5)
    one = total(loss_fn=lambda logits, labels: (logits.argmax(-1) == labels).mean())
    agreement = (np.argmax(logits, -1) == labels).mean()
    assert one == pytest.approx(plain + (1 + aux) * float(agreement), rel=1e-5)
    nothing = dict.fromkeys(('cross_entropy', 'dice'), 0.0)
    assert total(loss_fn=lambda *_: 2.0, **nothing, aux=0.0) == 2.0


def test_a_file_of_weights_is_read_by_a_table_of_ones_own(page, tmp_path, rng):
    """OIHW of RGB as HWIO of one grey channel, which gets the three filters' red one times 3."""
    kernel = rng.standard_normal((8, 3, 4, 4)).astype(np.float32)
    arrays = {'net.0.weight': kernel, 'net.0.bias': np.arange(8, dtype=np.float32)}
    save_file(arrays | {'fc.weight': np.zeros((10, 8), np.float32)}, tmp_path / 'a.safetensors')
    where = str(tmp_path / 'a.safetensors')
    module = page[1]()
    net = models.create('one_layer', num_classes=2)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    loaded, normalization, report = weights.load_backbone(zeros, where)
    stem = loaded['params']['backbone']['stem']
    np.testing.assert_allclose(stem['kernel'][:, :, 0], 3 * kernel[:, 0].transpose(1, 2, 0))
    np.testing.assert_array_equal(stem['bias'], np.arange(8))
    assert normalization == weights.IMAGENET
    assert 'plain of our lab' in report
    assert module.get_config().model.name == 'one_layer'
    del weights.TABLES['plain of our lab']
    with pytest.raises(PretrainedError, match='no known source has these names'):
        weights.load_backbone(zeros, where)


def test_one_loss_has_a_weight():
    none = {'loss.cross_entropy': 0.0, 'loss.dice': 0.0}
    words = r'loss.cross_entropy, loss.dice, loss.focal, .* are all 0: .*--config.loss.dice=1'
    with pytest.raises(ConfigError, match=words):
        loop.check_losses(tiny_config(**none), own_loss=False)
    loop.check_losses(tiny_config(**none), own_loss=True)
    for name in losses.TERMS:
        if name in tiny_config().loss:
            loop.check_losses(tiny_config(**none | {f'loss.{name}': 0.1}), own_loss=False)


@pytest.mark.slow
def test_a_hook_is_a_loss(tmp_path):
    """Of any size, and alone where the config's are 0; they are not for the run's evaluation."""
    config = tiny_config(**{'loss.cross_entropy': 0.0, 'loss.dice': 0.0, 'train.steps': 2})
    with pytest.raises(ConfigError, match='are all 0'):
        loop.train_and_evaluate(config, str(tmp_path))
    seen = []

    def far(logits_BHWK, labels_BHW):
        seen.append((logits_BHWK.shape, labels_BHW.shape))
        return 7.0 + 0.0 * logits_BHWK.mean()

    result = loop.train_and_evaluate(config, str(tmp_path), loss_fn=far)
    assert set(seen) == {((4, 32, 32, 2), (4, 32, 32))}
    assert [line['loss'] for line in log.read(tmp_path) if 'loss' in line] == [7.0, 7.0]
    assert result['summary']['dice']['n'] >= 0
