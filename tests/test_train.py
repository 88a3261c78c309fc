"""The step and the loop: resume is exact, micro-batches add up, nonsense stops it."""

import dataclasses
import functools
import itertools
import json
import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import models
from pspnet_jax.config import base, to_dict
from pspnet_jax.data import phantom, pipeline, sources, volumes
from pspnet_jax.evaluation import protocol
from pspnet_jax.inference import infer
from pspnet_jax.inference.runs import open_run
from pspnet_jax.models import convolution, unet
from pspnet_jax.runtime import checkpoint, compilation, log
from pspnet_jax.runtime.errors import CheckpointError, ConfigError, NonFiniteLossError
from pspnet_jax.training import loop, losses, optim, placement, start, update
from tests.conftest import PSPNET, tiny_config
from tests.test_folder import BOXES, annotate, squares


@pytest.mark.slow
@pytest.mark.newest
def test_resume_equals_uninterrupted_bit_for_bit(trained, tmp_path, power_cut):
    workdir, evaluation = trained
    power_cut(tiny_config(), tmp_path, steps=3)
    assert checkpoint.steps(tmp_path)[-1] == 3
    resumed = loop.train_and_evaluate(tiny_config(), str(tmp_path))

    # The digests cover parameters, batch statistics, their average and the optimiser's state.
    parts = {'params', 'batch_stats', 'ema_params', 'opt_state'}
    ours, theirs = (checkpoint.metadata(folder, 4)['sha256'] for folder in (tmp_path, workdir))
    assert ours == theirs
    assert set(ours) == parts
    logs = [(folder / 'metrics.jsonl').read_text() for folder in (tmp_path, workdir)]
    assert logs[0] == logs[1]
    assert resumed['patients'] == evaluation['patients']


@pytest.mark.slow
@pytest.mark.parametrize('tool', ['COCO', 'labelme'])
def test_the_classes_that_annotations_name_are_kept_with_the_run(tmp_path, monkeypatch, tool):
    """A file in which one of them does not occur has the same numbers: when the run goes on, and
    when it is evaluated on other data.
    """
    masks = annotate(tmp_path / 'train', tool, BOXES)
    annotate(tmp_path / 'test', tool, ['muscle', 'tumor'])
    config = tiny_config(
        **{
            'data.name': 'folder', 'data.source': str(tmp_path / 'train'), 'data.masks': masks,
            'data.test_fraction': 0.2, 'data.validation_fraction': 0.2, 'model.num_classes': 4,
            'model.width': 4, 'train.steps': 1,
        }
    )  # fmt: skip
    run, named, seen, read_with = str(tmp_path / 'run'), ('background', *BOXES), [], []

    def load(config, *arguments, load=sources.load):
        read_with.append(config.model.class_names)
        return load(config, *arguments)

    monkeypatch.setattr(sources, 'load', load)
    evaluation = loop.train_and_evaluate(config, run)
    assert read_with == [()]  # to train, and handed on to evaluate
    assert config.model.class_names == ()  # the caller's own
    assert open_run(run).config.model.class_names == named
    assert protocol.evaluate_checkpoint(run) == evaluation
    monkeypatch.setattr(loop, 'evaluate_checkpoint', lambda *_, **__: None)
    config.train.steps = 2
    loop.train_and_evaluate(config, run)
    assert read_with == [(), named, named]  # then to evaluate, and to go on

    def see(predict_fn, data, **options):
        seen.extend(data)
        raise KeyboardInterrupt

    monkeypatch.setattr(protocol, 'evaluate_volumes', see)
    with pytest.raises(KeyboardInterrupt):
        protocol.evaluate_checkpoint(run, data=str(tmp_path / 'test'))
    for volume in seen:
        np.testing.assert_array_equal(volume.mask[0], squares('muscle', 'tumor'))
    assert len(seen) == 6


def test_names_that_a_run_has_stay(tmp_path):
    slices = phantom.load(volumes=3, slices=4, size=32, seed=0)

    def named(config, *names):
        return start.complete(config, dataclasses.replace(slices, class_names=names), 9)

    config = tiny_config(**{'model.class_names': ('background', 'lesion')})
    assert named(config, 'background', 'tumor').model.class_names == ('background', 'lesion')
    config = tiny_config()
    assert named(config).model.class_names == ()
    assert named(config, 'a', 'b', 'c').model.class_names == ()  # of another model
    assert named(config, 'a', 'b').model.class_names == ('a', 'b')
    with pytest.raises(ConfigError, match='in one line'):
        named(config, 'a', 'b\n')
    assert start.as_before(config, str(tmp_path)) == config


def test_a_run_that_is_resumed_keeps_what_was_found_out(tmp_path, monkeypatch):
    """Also where the data have changed since, and one from before there was data.fit stretches."""
    open_ = {'model.num_classes': None, 'train.epochs': None, 'train.steps': 0,
             'optim.learning_rate': None}  # fmt: skip
    slices = dataclasses.replace(
        phantom.load(volumes=3, slices=4, size=32, seed=0),
        num_classes=3, class_names=('background', 'a', 'b'),
        sizes=np.array([(64, 40), (40, 64)] * 6),
    )  # fmt: skip
    before = start.complete(tiny_config(**open_), slices, 9)
    assert before.data.size == (64, 64)
    kept = to_dict(before)
    del kept['data']['fit']
    monkeypatch.setattr(checkpoint, 'steps', lambda _: [4])
    monkeypatch.setattr(checkpoint, 'metadata', lambda *_: {'config': kept})
    again = start.as_before(tiny_config(**open_), str(tmp_path))
    assert again.data.fit == 'stretch'
    again.data.fit = before.data.fit
    assert again == before
    other = start.as_before(tiny_config(**open_ | {'model.num_classes': 2}), str(tmp_path))
    assert (other.model.num_classes, other.model.class_names) == (2, ())


@pytest.mark.slow
def test_slices_on_the_device_train_as_from_the_host(tmp_path, monkeypatch):
    """Two updates in one program, stopped after the first two and gone on with: the same run.

    By SGD: Adam divides small gradients, with their rounding, by themselves.
    """
    workdir, host = tmp_path / 'device', tmp_path / 'host'
    config = tiny_config(**{'optim.name': 'sgd'})
    evaluation = loop.train_and_evaluate(config, str(host))
    config.data.cache, config.train.steps_per_call, config.train.checkpoint_every = 'device', 2, 2
    real = pipeline.rows

    def power_cut(*args, **options):
        yield from itertools.islice(real(*args, **options), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, 'rows', power_cut)
    with pytest.raises(KeyboardInterrupt):
        loop.train_and_evaluate(config, str(workdir))
    monkeypatch.undo()
    assert checkpoint.steps(workdir)[-1] == 2
    result = loop.train_and_evaluate(config, str(workdir))
    for mine, other in zip(result['patients'], evaluation['patients'], strict=True):
        assert mine['dice'] == pytest.approx(other['dice'], abs=1e-3)
    ours, theirs = (
        [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        for folder in (workdir, host)
    )
    assert [line['step'] for line in ours] == [line['step'] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if 'loss' in other:
            assert mine == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
@pytest.mark.newest
def test_three_updates_in_one_program_equal_three_programs(rng):
    """And a slice gathered on the device is, to the bit, the one that the host normalises."""
    # Of seed 0, rounding decides on which side of 0 a ReLU's input is.
    slices = phantom.load(volumes=3, slices=4, size=32, seed=1)
    drawn = pipeline.draws(slices, seed=0, sampling='lesion', lesion_floor=0.1)
    places = {'batch_size': 4, 'first_step': 0}
    rows = list(itertools.islice(pipeline.rows(drawn, **places), 3))
    batches = pipeline.batches(slices, drawn, intensity=None, threads=1, **places)
    store = pipeline.store(slices, None)
    model = models.create('unet_mini', num_classes=2, width=4)
    state, step = sgd_step(model)
    alone, together = placement.over_mesh(step), placement.over_mesh_cached(step, store)
    one, three = (jax.tree.map(jnp.copy, state) for _ in range(2))
    losses = []
    for batch_rows in rows:
        batch = next(batches)
        gathered = compilation.jit(placement.gather)(store, batch_rows)
        for key in batch:
            np.testing.assert_array_equal(gathered[key], batch[key])
        one, metrics = alone.compile(one, batch)[0](one, batch)
        losses.append(metrics['loss'][0])
    three, metrics = together.compile(three, np.stack(rows))[0](three, np.stack(rows))
    np.testing.assert_allclose(metrics['loss'], losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(three), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_no_window_of_max_pooling_loses_its_gradient(monkeypatch):
    """Updates are those with XLA's own, where XLA rounds the pooled features otherwise when it
    computes them again for the gradient, as its older emitters do here.
    """
    slices = phantom.load(volumes=3, slices=4, size=32, seed=0)
    drawn = pipeline.draws(slices, seed=0, sampling='lesion', lesion_floor=0.1)
    places = {'batch_size': 4, 'first_step': 0}
    batch = next(pipeline.batches(slices, drawn, intensity=None, threads=1, **places))
    config, norms = tiny_config(), []
    for max_pool in (convolution.max_pool, convolution._max_pool):
        monkeypatch.setattr(unet, 'max_pool', max_pool)
        model = models.create(**config.model)
        tx, _ = optim.create(config.optim, steps=4)
        state = update.create_state(model, tx, seed=0, channels=3, ema=False)
        step = functools.partial(
            update.train_step, model=model, tx=tx, options=update.StepOptions(
                seed=0, loss=config.loss.to_dict(), augment={}, remat='pointwise'
            ),
        )  # fmt: skip
        compiled, _ = placement.over_mesh(step).compile(state, batch)
        for _ in range(3):
            state, metrics = compiled(state, batch)
            norms.append(float(metrics['gradient_norm'][0]))
    assert norms[:3] == pytest.approx(norms[3:], rel=1e-5)
    assert len(set(norms[:3])) == 3


@pytest.mark.slow
def test_rematerialised_gradients_are_the_same(rng):
    """And the temporaries are fewer."""
    model = models.create('pspnet', num_classes=2, backbone='resnet18', width=8)
    batch = {
        'image': jnp.asarray(rng.standard_normal((4, 64, 64, 3)), jnp.float32),
        'mask': jnp.asarray(rng.integers(0, 2, (4, 64, 64))),
    }
    results, memory = [], []
    for remat in ('none', 'pointwise'):
        state, step = sgd_step(model, remat=remat)
        compiled = compilation.jit(step).lower(state, batch).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        results.append(compiled(state, batch))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert memory[1] < 0.9 * memory[0]


def test_a_finished_run_is_evaluated_again_and_not_trained(trained, tmp_path):
    workdir, evaluation = trained
    before = (workdir / 'metrics.jsonl').read_text()
    again = loop.train_and_evaluate(tiny_config(), str(workdir))
    assert again['patients'] == evaluation['patients']
    assert (workdir / 'metrics.jsonl').read_text() == before


def test_the_log_has_each_step_once(trained):
    workdir, _ = trained
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    losses = [line for line in lines if 'loss' in line]
    assert [line['step'] for line in losses] == [1, 2, 3, 4]
    assert all(line['learning_rate'] > 0 and line['gradient_norm'] > 0 for line in losses)
    assert [line['step'] for line in lines if 'validation/dice' in line] == [2, 4]


def test_tensorboard_gets_the_same_figures_and_pictures(trained):
    """Its file by the format's own rule: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    workdir, _ = trained
    path = min((workdir / 'tensorboard').iterdir())  # later ones are of tests that went on
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack('<Q', data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert [e.step for e in events if e.session_log.status == SessionLog.START] == [1]
    values = [(event.step, value) for event in events for value in event.summary.value]
    shown = {(step, value.tag): value.simple_value for step, value in values}
    for record in log.read(workdir):
        step = record.pop('step')
        for name, value in record.items():
            if value is not None:
                assert shown[step, name] == pytest.approx(value, rel=1e-6)
    pictures = [(step, value.image.width) for step, value in values if value.HasField('image')]
    assert [step for step, _ in pictures] == [2, 4]
    assert all(width > 0 for _, width in pictures)


def test_another_models_workdir_is_refused(trained):
    workdir, _ = trained
    config = tiny_config(**PSPNET, **{'model.width': 8})
    with pytest.raises(CheckpointError) as caught:
        loop.train_and_evaluate(config, str(workdir))
    assert "model.backbone is None there, 'resnet18' here" in str(caught.value)
    assert 'model.width is 16 there, 8 here' in str(caught.value)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    config = tiny_config(**{'optim.learning_rate': 1e30, 'optim.clip_norm': 0.0})
    with pytest.raises(NonFiniteLossError, match=r'step \d: .*optim\.learning_rate'):
        loop.train_and_evaluate(config, str(tmp_path))
    for step in checkpoint.steps(tmp_path):
        lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
        assert step <= max(json.loads(line)['step'] for line in lines)


def test_a_batch_that_does_not_divide_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 3)
    with pytest.raises(ConfigError, match='batch_size 4 is not a multiple of 3 devices'):
        loop.train_and_evaluate(tiny_config(), str(tmp_path))


@pytest.mark.slow
def test_it_stops_when_the_dice_stays(tmp_path, monkeypatch):
    """Two validations without a better Dice: the best is kept, and the run stays stopped."""
    dice = iter([0.5, 0.6, 0.6, 0.4, 0.9])
    monkeypatch.setattr(loop, 'validate_volumes', lambda *_: next(dice))
    changes = {'train.patience': 2, 'train.validate_every': 1, 'train.steps': 9}
    for _ in range(2):
        loop.train_and_evaluate(tiny_config(**changes), str(tmp_path))
        assert checkpoint.steps(tmp_path)[-1] == 4
        assert checkpoint.metadata(tmp_path, 4)['progress'] == {
            'best_dice': 0.6,
            'best_step': 3,  # of equal ones the newest
            'stale': 2,
            'skipped': 0,
        }
        assert checkpoint.candidates(tmp_path, 'best')[0] in (2, 3)  # of equal Dice


@pytest.mark.slow
@pytest.mark.newest
def test_pmap_trains_and_checkpoints_like_jit(trained, tmp_path):
    """On one device: the same run to rounding (tests/test_parallel.py has eight)."""
    loop.train_and_evaluate(tiny_config(parallel='pmap'), str(tmp_path))
    ours, theirs = (
        [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        for folder in (tmp_path, trained[0])
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a['step'] == b['step']
        if 'loss' in a:
            assert a['loss'] == pytest.approx(b['loss'], rel=1e-3)


class Pixelwise(nn.Module):
    """A network without BatchNorm: a 3x3 and a 1x1."""

    @nn.compact
    def __call__(self, x, train=False):
        return {'logits': nn.Dense(3)(nn.relu(nn.Conv(8, (3, 3))(x)))}


def sgd(**changes):
    """Plain but for momentum, and of one rate."""
    plain = {'name': 'sgd', 'schedule': 'constant', 'warmup': 0.0, 'weight_decay': 0.0}
    others = {'new_layer_factor': 1.0, 'clip_norm': 0.0}
    return optim.create({**base.get_config().optim, **plain, **others, **changes}, steps=9)


def one_step(accumulate, loss_options, batch):
    model = Pixelwise()
    tx, _ = sgd(learning_rate=0.1)
    state = update.create_state(model, tx, seed=0, channels=3, ema=False)
    options = update.StepOptions(0, loss_options, {}, accumulate=accumulate)
    step = functools.partial(update.train_step, model=model, tx=tx, options=options)
    return compilation.jit(step)(state, batch)


CE_ONLY = {**base.get_config().loss.to_dict(), 'dice': 0.0}


def sgd_step(model, **options):
    """A state of `model`, and its step with cross-entropy, without dropout's noise."""
    tx, _ = sgd(learning_rate=0.01)
    state = update.create_state(model, tx, seed=0, channels=3, ema=False)
    options = update.StepOptions(0, CE_ONLY, {'flip': 0.5}, **options)
    step = functools.partial(update.train_step, model=model, tx=tx, options=options)
    return state, step


def batch_of(rng):
    return {
        'image': jnp.asarray(rng.standard_normal((8, 6, 6, 3)), jnp.float32),
        'mask': jnp.asarray(rng.integers(0, 3, (8, 6, 6)), jnp.int32),
    }


@pytest.mark.parametrize('k', [2, 4])
def test_k_micro_batches_equal_one_big_batch(rng, k):
    batch = batch_of(rng)
    big, big_metrics = one_step(1, CE_ONLY, batch)
    small, small_metrics = one_step(k, CE_ONLY, batch)
    assert float(big_metrics['loss']) == pytest.approx(float(small_metrics['loss']), rel=1e-5)
    for a, b in zip(jax.tree.leaves(big.params), jax.tree.leaves(small.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_randomness_is_of_the_seed_and_the_step(rng):
    """The same state and batch: the same noise at the same step, another at the next."""
    batch = batch_of(rng)

    def loss(step, seed):
        model = Pixelwise()
        tx, _ = sgd(learning_rate=0.1)
        state = update.create_state(model, tx, seed=0, channels=3, ema=False)
        options = update.StepOptions(seed, CE_ONLY, {'noise': 0.5})
        run = functools.partial(update.train_step, model=model, tx=tx, options=options)
        return float(compilation.jit(run)(state.replace(step=jnp.int32(step)), batch)[1]['loss'])

    assert loss(3, 0) == loss(3, 0)
    assert len({loss(3, 0), loss(4, 0), loss(3, 1)}) == 3


def test_the_average_of_the_parameters_warms_up_with_the_number_of_updates(rng):
    """As TensorFlow's ExponentialMovingAverage with num_updates, whatever run made the first."""
    batch, model, (tx, _) = batch_of(rng), Pixelwise(), sgd(learning_rate=0.1)
    options = update.StepOptions(0, CE_ONLY, {}, ema_decay=0.8)
    step = functools.partial(update.train_step, model=model, tx=tx, options=options)
    step, state = (
        compilation.jit(step),
        update.create_state(model, tx, seed=0, channels=3, ema=True),
    )
    for n, decay in ((0, 1 / 10), (1, 2 / 11), (2, 3 / 12), (34, 35 / 44), (35, 0.8), (900, 0.8)):
        before = state.ema_params
        state, _ = step(state.replace(step=jnp.int32(n)), batch)
        leaves = map(jax.tree.leaves, (before, state.params, state.ema_params))
        for average, new, averaged in zip(*leaves, strict=True):
            np.testing.assert_allclose(averaged, decay * average + (1 - decay) * new, atol=1e-7)


def test_the_loss_is_the_weighted_sum_and_the_auxiliary(rng):
    batch = batch_of(rng)
    logits = jnp.asarray(rng.standard_normal((8, 6, 6, 3)), jnp.float32)
    nothing = {**base.get_config().loss.to_dict(), **dict.fromkeys(losses.TERMS, 0.0)}

    def loss(out, **weights):
        options = {**nothing, **weights}
        return float(update.segmentation_loss(out, batch['mask'], axis_name=None, **options))

    alone = {name: loss({'logits': logits}, **{name: 1.0}) for name in losses.TERMS}
    assert len({round(value, 6) for value in alone.values()} | {0.0}) == len(losses.TERMS) + 1
    weights = {name: weight for weight, name in enumerate(losses.TERMS, start=2)}
    expected = sum(weights[name] * alone[name] for name in losses.TERMS)
    assert loss({'logits': logits}, **weights) == pytest.approx(expected, rel=1e-5)
    both = loss({'logits': logits, 'aux': logits}, **weights, aux=0.4)
    assert both == pytest.approx(1.4 * expected, rel=1e-5)


def test_quarter_size_logits_meet_the_labels_at_the_centres_of_their_cells(rng):
    labels = rng.integers(0, 2, (2, 16, 20))
    small = np.stack([volumes.resize_labels(mask, (4, 5)) for mask in labels])
    logits = 100.0 * jax.nn.one_hot(small, 2)
    options = {**CE_ONLY, 'axis_name': None}
    out = {'logits': logits}
    assert float(update.segmentation_loss(out, jnp.asarray(labels), **options)) < 1e-6


class Constant:
    """A network that gives these logits for every image."""

    def __init__(self, logits):
        self.logits = logits

    def apply(self, variables, image, train):
        return {'logits': self.logits}


@pytest.mark.parametrize('size', [(128, 128), (100, 120)])
def test_a_perfect_map_at_a_quarter_of_the_size_is_enlarged_to_where_it_belongs(size):
    """The label of each cell, predicted with certainty: discs score 0.91. By each fourth pixel and
    aligned corners, as it was, they scored 0.84.
    """
    rows, columns = np.indices(size)
    rng, scores = np.random.default_rng(0), []
    for _ in range(30):
        place = rng.uniform(12, np.array(size) - 12)
        mask = ((rows - place[0]) ** 2 + (columns - place[1]) ** 2 < 10**2).astype(np.int32)
        cells = [n // 4 for n in size]

        labels = update.labels_at(jnp.asarray(mask[None]), cells)
        model = Constant(100.0 * jax.nn.one_hot(labels, 2))
        image = np.zeros((1, *size, 1), np.float32)
        prob = infer.probabilities({}, jnp.asarray(image), model=model)
        pred = np.asarray(prob[0, ..., 1] > 0.5)
        scores.append(2 * (pred & (mask > 0)).sum() / (pred.sum() + mask.sum()))
    assert np.mean(scores) > 0.9


@pytest.mark.parametrize('ignore_label', [0, 2, 254])
def test_what_augmentation_fills_in_counts_in_no_loss(rng, ignore_label):
    """Whichever label is ignored: 255 is no class, and its cross-entropy no number."""
    batch = batch_of(rng)
    options = {**CE_ONLY, 'dice': 1.0, 'ignore_label': ignore_label}
    model, (tx, _) = Pixelwise(), sgd(learning_rate=0.1)
    state = update.create_state(model, tx, seed=0, channels=3, ema=False)
    options = update.StepOptions(0, options, {'rotate': 45.0, 'scale': 0.5})
    step = functools.partial(update.train_step, model=model, tx=tx, options=options)
    _, metrics = compilation.jit(step)(state, batch)
    assert np.isfinite(float(metrics['loss']))
    assert np.isfinite(float(metrics['gradient_norm']))
