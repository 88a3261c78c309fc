"""Weights from another run, a teacher, and hooks: what they add, and that they add nothing else."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import models
from pspnet_jax.config import to_dict, validate
from pspnet_jax.inference.runs import open_run
from pspnet_jax.models import weights
from pspnet_jax.models.weights import tables
from pspnet_jax.runtime import checkpoint
from pspnet_jax.runtime.compilation import jit
from pspnet_jax.runtime.errors import CheckpointError, ConfigError
from pspnet_jax.training import loop, optim, start, transfer, update
from tests.conftest import PSPNET, tiny_config
from tests.test_train import CE_ONLY, Pixelwise, batch_of, sgd


def new_state(config, channels=3, seed=7):
    model = models.create(**config.model)
    tx, _ = optim.create(config.optim, steps=4)
    return update.create_state(model, tx, seed=seed, channels=channels, ema=False)


def write_run(workdir, channels=3, normalization=None, scale=None, **changes):
    """A workdir with one checkpoint of random weights; returns its variables."""
    config = tiny_config(**changes)
    state = new_state(config, channels)
    inputs = {'channels': channels, 'normalization': normalization}
    inputs |= {'range': scale} if scale else {}
    progress = {'best_dice': None, 'stale': 0}
    writer = checkpoint.Writer(workdir)
    about = {'config': to_dict(config), 'progress': progress, 'inputs': inputs, 'dice': None}
    checkpoint.save(writer, 1, state, **about)
    writer.close()
    return {'params': state.params, 'batch_stats': state.batch_stats}


def started(workdir, channels=3, **changes):
    """What `start.start_or_resume` makes of a config: (state, inputs)."""
    config = tiny_config(**changes)
    model = models.create(**config.model)
    tx, _ = optim.create(config.optim, steps=4)
    state, _, inputs, _ = start.start_or_resume(config, model, tx, channels, str(workdir))
    return state, inputs


def flat(tree):
    return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}


# ---- train.init_from --------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_starts_from_another_has_its_evaluated_weights(trained, tmp_path):
    """Those are the averaged parameters of the best step; the average begins there too."""
    workdir, _ = trained
    state, _ = started(tmp_path, **{'train.init_from': str(workdir)})
    theirs = open_run(workdir, 'best').variables
    ours = {'params': state.params, 'batch_stats': state.batch_stats}
    for key, x in flat(theirs).items():
        np.testing.assert_array_equal(flat(ours)[key], x, err_msg=key)
    for a, b in zip(*map(jax.tree.leaves, (state.params, state.ema_params)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(state.step) == 0


@pytest.mark.slow
def test_a_classifier_of_other_classes_starts_anew_and_is_named(tmp_path):
    theirs = write_run(tmp_path, **PSPNET)
    fresh = new_state(tiny_config(**PSPNET, **{'model.num_classes': 3}), seed=8)
    variables = {'params': fresh.params, 'batch_stats': fresh.batch_stats}
    merged, _, report = transfer.first_weights(variables, str(tmp_path), channels=3, stem='cycle')
    ours, theirs, fresh = flat(merged), flat(theirs), flat(variables)
    new = [key for key in ours if 'classifier' in key]
    assert len(new) == 4  # kernel and bias, of the head and of the auxiliary one
    for key in ours:
        np.testing.assert_array_equal(ours[key], (fresh if key in new else theirs)[key])
    assert 'params/head/classifier/kernel is (1, 1, 128, 2) there, (1, 1, 128, 3) here' in report
    assert 'params/aux/classifier/bias is (2,) there, (3,) here' in report
    taken = sum(ours[key].size for key in ours if key not in new)
    assert f'{taken:,} of {sum(x.size for x in ours.values()):,} values' in report
    assert '2 classes' in report


def test_both_sides_are_listed_and_a_module_is_whole_or_new(rng):
    def conv(channels, features):
        kernel = rng.standard_normal((3, 3, channels, features)).astype(np.float32)
        return {'kernel': kernel, 'bias': rng.standard_normal(features).astype(np.float32)}

    ours = {'a': conv(4, 5), 'b': conv(5, 5), 'c': conv(5, 2), 'new': conv(2, 2)}
    theirs = {'a': conv(4, 5), 'b': conv(6, 5), 'old': conv(2, 2)}
    merged, report = transfer.merge(
        {'params': ours}, {'params': theirs}, channels=3, their_channels=3
    )
    expected = {**ours, 'a': theirs['a']}  # b's bias would fit, its kernel does not
    for key, x in flat(merged['params']).items():
        np.testing.assert_array_equal(x, flat(expected)[key], err_msg=key)
    assert 'copied 185 of 545 values (2 of 8 arrays)' in report
    assert 'only in that run, not used: old (2 arrays)' in report
    assert 'initialised afresh: c (2 arrays), new (2 arrays)' in report
    assert 'params/b/kernel is (3, 3, 6, 5) there, (3, 3, 5, 5) here' in report


@pytest.mark.parametrize(('here', 'there'), [(4, 3), (1, 4), (3, 1)])
def test_the_first_kernel_takes_other_channels(rng, here, there):
    kernel = rng.standard_normal((3, 3, there, 8)).astype(np.float32)
    inner = rng.standard_normal((3, 3, 8, 8)).astype(np.float32)
    ours = {'first': {'kernel': np.zeros((3, 3, here, 8))}, 'inner': {'kernel': 0 * inner}}
    theirs = {'first': {'kernel': kernel}, 'inner': {'kernel': inner}}
    merged, report = transfer.merge(
        {'params': ours}, {'params': theirs}, channels=here, their_channels=there
    )
    expected = np.stack([kernel[:, :, c % there] for c in range(here)], axis=2) * there / here
    np.testing.assert_allclose(merged['params']['first']['kernel'], expected, rtol=1e-6)
    np.testing.assert_array_equal(merged['params']['inner']['kernel'], inner)
    assert f'params/first/kernel from {there} to {here} channels by cycle' in report
    assert 'another shape, initialised afresh: none' in report


def test_nothing_that_fits_is_an_error_with_both_sides(trained, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        started(tmp_path, **PSPNET, **{'train.init_from': str(trained[0])})
    for words in (
        'no weights of',
        str(trained[0]),
        'only in that run',
        'initialised afresh: aux (',
    ):
        assert words in str(caught.value)


def test_a_run_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match='nowhere holds no checkpoint'):
        started(tmp_path, **{'train.init_from': str(tmp_path / 'nowhere')})


@pytest.mark.parametrize(
    ('where', 'parts'),
    [
        ('runs/a', ('runs/a', 'best')),
        ('runs/a@last', ('runs/a', 'last')),
        ('runs/a@260', ('runs/a', '260')),
        ('me@home/a', ('me@home/a', 'best')),
    ],
)
def test_a_checkpoint_is_named_by_folder_and_step(where, parts):
    assert checkpoint.locate(where) == parts


CAFFE = tables.CAFFE._asdict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('there', 'asked', 'here', 'warned'),
    [
        (None, None, None, False),
        (CAFFE, None, CAFFE, False),
        (CAFFE, 'weights', CAFFE, False),
        (CAFFE, 'volume', None, True),
        (None, 'weights', weights.IMAGENET._asdict(), True),
        ('buda', None, 'buda', False),
        ('buda', 'buda', 'buda', False),
        ('buda', 'volume', None, True),
        ('buda', 'weights', weights.IMAGENET._asdict(), True),
        (CAFFE, 'buda', 'buda', True),
        (None, 'buda', 'buda', True),
    ],
)
def test_normalisation_comes_along_and_a_contradiction_is_said(
    tmp_path, monkeypatch, there, asked, here, warned
):
    write_run(tmp_path / 'a', normalization=there)
    said = []
    monkeypatch.setattr(start.logger, 'warning', lambda *words: said.append(words))
    changes = {'train.init_from': str(tmp_path / 'a'), 'data.normalize': asked}
    _, inputs = started(tmp_path / 'b', **changes)
    assert json.loads(json.dumps(inputs)) == json.loads(
        json.dumps({'channels': 3, 'normalization': here})
    )
    assert bool(said) == warned


@pytest.mark.slow
def test_the_scale_of_the_training_images_is_kept_with_the_run(tmp_path, caplog):
    config = tiny_config(**{'data.normalize': 'weights'})
    model = models.create(**config.model)
    tx, _ = optim.create(config.optim, steps=4)
    scale = np.float32([[-1000] * 3, [1200] * 3])
    with caplog.at_level('INFO'):
        state, _, inputs, _ = start.start_or_resume(
            config, model, tx, 3, str(tmp_path), lambda: scale
        )
    assert 'after -1000 to 1200, measured over the training images, became 0 to 255' in caplog.text
    about = {'config': to_dict(config), 'progress': {}, 'inputs': inputs, 'dice': None}
    writer = checkpoint.Writer(tmp_path)
    checkpoint.save(writer, 1, state, **about)
    writer.close()
    np.testing.assert_array_equal(
        open_run(tmp_path).intensity, weights.IMAGENET.intensity(3, scale)
    )
    # Going on keeps it, whatever the images would give now.
    _, _, again, _ = start.start_or_resume(config, model, tx, 3, str(tmp_path), lambda: 9 * scale)
    np.testing.assert_array_equal(again['range'], scale)
    # By volume there is none to keep.
    config.data.normalize = 'volume'
    _, _, inputs, _ = start.start_or_resume(
        config, model, tx, 3, str(tmp_path / 'b'), lambda: scale
    )
    assert 'range' not in inputs


@pytest.mark.parametrize(
    'scale',
    [[[0.0]], [[0.0], [0.0]], [[0, 0], [1, 1]], [['0'], [1]], [[0], [1e31]], 3, [[0, 0], [1]]],
)
def test_a_strangers_scale_is_held_to_what_it_can_be(scale):
    inputs = {'channels': 1, 'normalization': weights.IMAGENET._asdict()}
    checkpoint.check_inputs({**inputs, 'range': [[0.0], [4095.0]]}, 'run')
    with pytest.raises(
        CheckpointError, match='is not a checkpoint of pspnet_jax: its network takes'
    ):
        checkpoint.check_inputs({**inputs, 'range': scale}, 'run')
    checkpoint.check_inputs({'channels': 1, 'normalization': 'buda'}, 'run')
    for how, more in (
        (None, {'range': [[0], [1]]}),
        ('buda', {'range': [[0], [1]]}),
        ('other', {}),
    ):
        with pytest.raises(
            CheckpointError, match='is not a checkpoint of pspnet_jax: its network takes'
        ):
            checkpoint.check_inputs({'channels': 1, 'normalization': how, **more}, 'run')


def test_two_first_weights_are_refused():
    config = tiny_config(**{'train.init_from': 'a', 'model.pretrained': 'b'})
    with pytest.raises(ConfigError, match=r'init_from and model\.pretrained both give'):
        loop.train_and_evaluate(config, 'never')


# ---- a teacher --------------------------------------------------------------------------

DISTILL = {'loss': 'kl', 'weight': 1.0, 'temperature': 2.0, 'pairwise': 0.0, 'nodes': 4}
NO_TRUTH = {**CE_ONLY, 'cross_entropy': 0.0}


def teach(batch, *, teacher_seed, teacher=None, **options):
    """One step of SGD of `Pixelwise` under a teacher of the same kind."""
    model = Pixelwise()
    tx, _ = sgd(learning_rate=0.1)
    state = update.create_state(model, tx, seed=0, channels=3, ema=False)
    taught = model.init(jax.random.key(teacher_seed), batch['image'])
    options = update.StepOptions(0, augment={}, **{'loss': NO_TRUTH, 'distill': DISTILL, **options})
    step = functools.partial(
        update.train_step, model=model, tx=tx, options=options, teacher=teacher or Pixelwise()
    )
    state = state.replace(teacher=taught)
    return state, *jit(step)(state, batch)


class OtherInTraining(Pixelwise):
    """Its logits have the other sign in training mode."""

    def __call__(self, x, train=False):
        return {'logits': (-1 if train else 1) * super().__call__(x)['logits']}


def test_a_student_that_is_its_teacher_in_inference_has_nothing_to_learn(rng):
    before, after, metrics = teach(batch_of(rng), teacher_seed=0, teacher=OtherInTraining())
    assert float(metrics['loss']) == pytest.approx(0, abs=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_teacher_is_an_argument_that_comes_back_as_it_is(rng):
    """One program for two teachers; the loss is the truth's and the teacher's."""
    batch = batch_of(rng)
    _, _, truth = teach(batch, teacher_seed=0, loss=CE_ONLY)
    before, after, metrics = teach(batch, teacher_seed=1, loss=CE_ONLY)
    for a, b in zip(*map(jax.tree.leaves, (before.teacher, after.teacher)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(metrics['distillation']) > 0.01
    assert float(metrics['loss']) == pytest.approx(
        float(truth['loss'] + metrics['distillation']), rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize('change', [{'accumulate': 4}, {'remat': 'pointwise'}])
def test_the_same_step_in_micro_batches_and_computed_again(rng, change):
    batch = batch_of(rng)
    batch['mask'] = jnp.asarray(rng.integers(0, 3, batch['mask'].shape), jnp.int32)
    _, one, metrics = teach(batch, teacher_seed=1, loss=CE_ONLY)
    _, other, others = teach(batch, teacher_seed=1, loss=CE_ONLY, **change)
    for a, b in zip(*map(jax.tree.leaves, ((one, metrics), (other, others))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_coarse_students_meet_a_teacher_of_full_size(rng):
    """Its logits are interpolated at the centres of their cells, whose labels say what counts."""
    labels = np.full((1, 16, 16), 255)
    labels[:, 8:] = 1
    fine = jnp.asarray(rng.standard_normal((1, 16, 16, 2)), jnp.float32)
    coarse = jnp.asarray(rng.standard_normal((1, 4, 4, 2)), jnp.float32)
    seen, shared = ((coarse, None), (fine, None)), {'ignore_label': 255, 'axis_name': None}
    options = {**DISTILL, 'loss': 'l2'}
    loss = update.teacher_losses(*seen, jnp.asarray(labels), options, **shared)
    # The four pixels in the middle of 4 x 4.
    middle = fine.reshape(1, 4, 4, 4, 4, 2)[:, :, 1:3, :, 1:3].mean((2, 4))
    goal = jax.nn.softmax(middle)
    gap = (jax.nn.softmax(coarse) - goal)[:, 2:]
    assert float(loss['distillation']) == pytest.approx(float((gap**2).mean()), rel=1e-5)


@pytest.mark.slow
def test_teacher_and_affinities_resume_to_the_bit(tmp_path, power_cut):
    """The teacher is read anew, and in no checkpoint."""
    write_run(tmp_path / 'teacher', **PSPNET)
    config = tiny_config(
        **PSPNET,
        **{
            'distill.teacher': str(tmp_path / 'teacher'),
            'distill.pairwise': 0.5,
            'train.steps': 2,
            'train.ema_decay': 0.0,
        },
    )
    whole, halves = tmp_path / 'whole', tmp_path / 'halves'
    loop.train_and_evaluate(config, str(whole))
    power_cut(config, halves, steps=1)
    assert checkpoint.steps(halves)[-1] == 1
    loop.train_and_evaluate(config, str(halves))
    digests = [checkpoint.metadata(folder, 2)['sha256'] for folder in (whole, halves)]
    assert digests[0] == digests[1]
    assert set(digests[0]) == {'params', 'batch_stats', 'opt_state'}
    lines = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
    for line in (line for line in lines if 'loss' in line):
        assert line['distillation'] > 0
        assert line['pairwise'] > 0
        assert line['loss'] > line['distillation'] + line['pairwise']


@pytest.mark.parametrize(
    ('run', 'changes', 'words'),
    [
        (
            {'normalization': weights.IMAGENET._asdict(), 'scale': [[0.0] * 3, [4095.0] * 3]},
            {'data.normalize': 'weights'},
            r'after 0 to 4095, .* became 0 to 255, but this run normalises them by mean',
        ),
        (
            {'model.num_classes': 3},
            {},
            r'has 3 classes, but this run has 2: give --config.model.num_classes=3 or another',
        ),
        (
            {'model.class_names': ('background', 'tumor')},
            {'model.class_names': ('background', 'edema')},
            r"names its classes \('background', 'tumor'\), this run \('background', 'edema'\)",
        ),
        ({'channels': 4}, {}, 'takes 4 channels, but the images here have 3'),
        (
            {'normalization': CAFFE},
            {},
            r'normalised by mean \(123\.68, .*but this run normalises them volume by volume',
        ),
        (
            {'normalization': 'buda'},
            {},
            "volume by volume as Buda's code does, but this run normalises them volume by volume",
        ),
        (
            {},
            {'distill.pairwise': 1.0},
            r'the teacher \(UNet\) has none: set --config.distill.pairwise=0',
        ),
    ],
)
def test_a_teacher_of_another_kind_is_refused(tmp_path, run, changes, words):
    write_run(tmp_path / 'teacher', **run)
    config = tiny_config(**{'distill.teacher': str(tmp_path / 'teacher'), **changes})
    with pytest.raises(ConfigError, match=words):
        loop.train_and_evaluate(config, str(tmp_path / 'run'))


def test_a_teacher_alone_is_enough_and_without_weight_too_little(trained):
    alone = {'distill.teacher': 'runs/a', 'loss.cross_entropy': 0.0, 'loss.dice': 0.0}
    validate(tiny_config(**alone))
    with pytest.raises(ConfigError, match=r'distill\.weight and distill\.pairwise are both 0'):
        validate(tiny_config(**alone, **{'distill.weight': 0.0}))


# ---- hooks ------------------------------------------------------------------------------


@pytest.mark.slow
def test_hooks_hear_everything_and_take_nothing_away(trained, tmp_path):
    """The run with them is, to the bit, the one without."""
    records, validated = [], []
    loop.train_and_evaluate(
        tiny_config(),
        str(tmp_path),
        augment_fn=lambda key, image_HWC, mask_HW: (image_HWC, mask_HW),
        on_log=lambda step, values: records.append({'step': step, **values}),
        on_validation=lambda step, dice, state: validated.append((step, dice, int(state.step))),
    )
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert records == lines
    dice = {x['step']: x['validation/dice'] for x in lines if 'validation/dice' in x}
    assert validated == [(step, dice[step], step) for step in (2, 4)]
    ours, theirs = (checkpoint.metadata(folder, 4)['sha256'] for folder in (tmp_path, trained[0]))
    assert ours == theirs


def test_a_function_of_ones_own_comes_behind_the_crop_with_a_key_an_example(rng):
    batch, seen, lifts = batch_of(rng), [], []

    def own(key, image_HWC, mask_HW):
        seen.append((image_HWC.shape, mask_HW.shape))
        lift = jax.random.uniform(key)
        jax.debug.callback(lifts.append, lift)
        return jnp.full_like(image_HWC, lift), mask_HW

    def loss(augment_fn, seed=0):
        model = Pixelwise()
        tx, _ = sgd(learning_rate=0.1)
        state = update.create_state(model, tx, seed=0, channels=3, ema=False)
        options = update.StepOptions(seed, CE_ONLY, {'crop': 4})
        step = functools.partial(
            update.train_step, model=model, tx=tx, options=options, augment_fn=augment_fn
        )
        return float(jit(step)(state, batch)[1]['loss'])

    first, again, other = loss(own), loss(own), loss(own, seed=1)
    jax.effects_barrier()
    assert first == again != other
    assert set(seen) == {((4, 4, 3), (4, 4))}
    assert len({float(lift) for lift in lifts}) == 2 * len(batch['image'])
    assert loss(lambda key, image, mask: (image, jnp.full_like(mask, 255))) == 0
