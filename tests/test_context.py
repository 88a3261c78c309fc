"""2.5D: the network sees each slice between its neighbours, everywhere as stacked by hand here."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from pspnet_jax import api, models
from pspnet_jax.config import to_dict
from pspnet_jax.data import phantom, pipeline, sources, volumes
from pspnet_jax.data.formats import video
from pspnet_jax.evaluation import fitting, protocol, scores
from pspnet_jax.inference import infer, predictors
from pspnet_jax.inference.runs import open_run
from pspnet_jax.models import weights
from pspnet_jax.models.weights import IMAGENET
from pspnet_jax.prediction import folders, videos
from pspnet_jax.runtime import checkpoint, compilation
from pspnet_jax.runtime.errors import CheckpointError, ConfigError
from pspnet_jax.serving import export, read
from pspnet_jax.training import loop, optim, placement, transfer, update
from tests.conftest import random_variables, tiny_config, write_case
from tests.test_evaluate import OPTIONS
from tests.test_predict import (
    GAINS,
    NUMBERED,
    evaluated_and_predicted,
    first_part,
    save_scenes,
    scene,
)
from tests.test_transfer import started, write_run
from tests.test_video import make

FIXED = IMAGENET.intensity(3)


def by_hand(parts, context):
    """Each slice of a volume between its neighbours; `parts` are its scans, D H W C each."""
    found = []
    for part in parts:
        for d in range(len(part)):
            around = []
            for e in range(d - context, d + context + 1):
                around.append(part[min(max(e, 0), len(part) - 1)])
            found.append(np.concatenate(around, axis=2))
    return np.stack(found)


def case(name, rng, *depths, size=(8, 6), dtype=np.uint8):
    """(volume of noise of so many scans, their images)."""
    parts = [rng.integers(0, 255, (depth, *size, 3)).astype(dtype) for depth in depths]
    image = np.concatenate(parts)
    volume = volumes.Volume(
        name,
        image,
        rng.integers(0, 2, image.shape[:3]).astype(np.uint8),
        np.arange(len(image)),
        volumes.measure_intensity(image),
        scan=np.repeat(np.arange(len(depths)), depths),
    )
    return volume, parts


# ---- training -------------------------------------------------------------------------------


@pytest.mark.parametrize('context', [0, 1, 2, 5])
def test_slices_stand_between_their_neighbours_of_the_same_scan(rng, context):
    """Of two patients whose scans have the same numbers, of a scan of two and of one alone."""
    cases = [case('a', rng, 4, 2), case('b', rng, 1, 7), case('c', rng, 1)]
    plain = volumes.from_volumes([volume for volume, _ in cases])
    slices = volumes.with_context(volumes.select(plain, ['a', 'b', 'c']), context)
    expected = np.concatenate([by_hand(parts, context) for _, parts in cases])
    for row, key in enumerate(slices.key.tolist()):
        image, mask = slices.read(key)
        np.testing.assert_array_equal(image, expected[row])
        np.testing.assert_array_equal(mask, plain.read(key)[1])
    assert slices.channels == volumes.channels_seen(3, context) == expected.shape[-1]
    for volume, _ in cases:
        seen = slices.intensity[volume.patient].reshape(4, -1, 3)
        np.testing.assert_array_equal(seen, volume.intensity[:, None].repeat(2 * context + 1, 1))
    (row,) = volumes.neighbours(None, 1, context)
    assert row.tolist() == [0] * (2 * context + 1)


def lgg(root):
    root = root / 'kaggle_3m'
    for name in ('TCGA_CS_4941_19960909', 'TCGA_DU_5849_19950405', 'TCGA_HT_7473_19970826'):
        write_case(root, name, slices=3)
    return {'data.name': 'lgg', 'data.source': str(root.parent), 'data.root': str(root / 'built')}


def numbered(root):
    names = ['p1_1', 'p1_2', 'p1_9', 'p1_10', 'p1_11', 'p2_7', 'p3_1', 'p3_3']
    save_scenes(root, names, GAINS)
    return {'data.name': 'folder', 'data.source': str(root), 'data.group': NUMBERED}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('make_data', 'scans'),
    [(lgg, [[3], [3], [3]]), (numbered, [[2, 3], [1], [1, 1]])],
    ids=['LGG', 'folder'],
)
@pytest.mark.parametrize('intensity', [None, 'fixed'])
def test_training_batches_are_the_stacks_whatever_keeps_the_slices(
    tmp_path, monkeypatch, make_data, scans, intensity
):
    config = tiny_config(**make_data(tmp_path), **{'data.context': 1})
    slices = sources.read(config)
    scale = None if intensity is None else IMAGENET.intensity(slices.channels)
    expected = {}
    for volume, depths in zip(volumes.iterate_volumes(slices), scans, strict=True):
        parts = np.split(volume.image, np.cumsum(depths)[:-1])
        own = volume.intensity if scale is None else scale
        for row, image in enumerate(by_hand([volumes.normalize(x, own) for x in parts], 1)):
            expected[image.tobytes()] = volume.mask[row]
    stores = []
    monkeypatch.setattr(loop, 'over_mesh_cached', lambda step, store: stores.append(store))
    seen = []
    for cache in ('none', 'memory', 'device'):
        config.data.cache = cache
        kept = volumes.in_memory(slices) if cache == 'memory' else slices
        _, next_batch = loop.loader(config, kept, update.train_step, scale, 0, {})
        for _ in range(3):
            batch = next_batch(1)
            if cache == 'device':
                batch = compilation.jit(placement.gather)(stores[0], batch[0])
            images, masks = (np.asarray(batch[name]) for name in ('image', 'mask'))
            for image, mask in zip(images, masks, strict=True):
                np.testing.assert_array_equal(expected[image.tobytes()], mask)
            seen.append(images)
    np.testing.assert_array_equal(seen[:3], seen[3:6])
    np.testing.assert_array_equal(seen[:3], seen[6:])


def test_a_slice_is_decoded_no_more_often_than_it_must(rng):
    reads = []

    def counted(slices):
        def read(key):
            reads.append(key)
            return slices.read(key)

        return dataclasses.replace(slices, read=read)

    plain = volumes.from_volumes([case('a', rng, 9)[0], case('b', rng, 8)[0]])
    pipeline.store(volumes.with_context(counted(plain), 1), None)
    assert sorted(reads) == list(range(17))
    reads.clear()
    slices = volumes.with_context(volumes.in_memory(counted(plain)), 2)
    for key in rng.integers(0, 17, 200).tolist():
        slices.read(key)
    assert sorted(reads[1:]) == list(range(17))  # the first is for its size
    reads.clear()
    volumes.with_context(counted(plain), 5).read(0)
    assert sorted(reads) == [0, 1, 2, 3, 4, 5]  # which stand there eleven times


def test_a_context_without_any_neighbour_is_told_with_a_remedy(rng, caplog):
    alone = volumes.from_volumes([case('a', rng, 1, 1)[0], case('b', rng, 1)[0]])
    volumes.with_context(alone, 1)
    assert 'data.context=1, but no slice has a neighbour' in caplog.text
    assert 'data.group="(.+)_(?P<slice>[0-9]+)", or set data.context=0' in caplog.text
    caplog.clear()
    volumes.with_context(volumes.from_volumes([case('a', rng, 1, 2)[0]]), 1)
    volumes.with_context(alone, 0)
    assert not caplog.text


def widened(tree, model, context, channels=3):
    """Variables of the same network with `context`, that sees nothing of the neighbours."""
    seen = volumes.channels_seen(channels, context)
    shapes = flatten_dict(
        jax.eval_shape(
            functools.partial(model.init, train=False),
            jax.random.key(0), jnp.zeros((1, 64, 64, seen)),
        ), sep='/',
    )  # fmt: skip
    flat, changed = flatten_dict(tree, sep='/'), []
    for name, x in flat.items():
        if shapes[name].shape != x.shape:
            flat[name] = np.zeros(shapes[name].shape, np.float32)
            flat[name][:, :, context * channels : (context + 1) * channels] = x
            changed.append(name)
    assert len(changed) == 1, changed
    return unflatten_dict(flat, sep='/'), changed[0]


@pytest.mark.slow
def test_a_step_without_weight_on_the_neighbours_is_the_one_of_the_slice_alone(rng):
    """Augmentation included: what is drawn for a channel holds for the neighbours' too."""
    slices = phantom.load(volumes=3, slices=4, size=32, seed=1)
    model = models.create('unet_mini', num_classes=2, width=4)
    plain = random_variables(model)
    wide, stem = widened(plain, model, 1)
    results = []
    for context, tree in ((0, plain), (1, wide)):
        config = tiny_config(
            **{
                'data.context': context, 'data.cache': 'memory', 'model.width': 4,
                'augment.gain': 0.3, 'augment.bias': 0.5, 'augment.rotate': 20.0,
                'augment.flip': 0.5, 'augment.crop': 24, 'optim.name': 'sgd',
                'optim.clip_norm': 0.0, 'optim.weight_decay': 0.0, 'optim.momentum': 0.0,
                'optim.schedule': 'constant', 'train.ema_decay': 0.0,
            }
        )  # fmt: skip
        tx, _ = optim.create(config.optim, steps=4)
        state = update.TrainState(
            jnp.zeros((), jnp.int32), tree['params'], tree['batch_stats'],
            tx.init(tree['params']), None,
        )  # fmt: skip
        step = update.bind_step(config, model, tx)
        _, next_batch = loop.loader(config, slices, step, None, 0, {})
        state, metrics = compilation.jit(step)(state, next_batch(1))
        after = {'params': state.params, 'batch_stats': state.batch_stats}
        results.append((float(metrics['loss']), flatten_dict(after, sep='/')))
    (loss, after), (other_loss, other) = results
    assert loss == pytest.approx(other_loss, rel=1e-5)
    moved = np.asarray(other[stem])[:, :, :3]
    assert np.abs(moved).max() > 0, 'neighbours have a gradient'
    other[stem] = other[stem][:, :, 3:6]
    for name, x in after.items():
        np.testing.assert_allclose(x, other[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_runs_with_context_are_the_same_however_the_slices_are_kept(tmp_path):
    """And a run goes on, is evaluated and tested with it."""
    losses, dice = [], []
    for cache in ('none', 'memory', 'device'):
        config = tiny_config(
            **{
                'data.cache': cache, 'data.context': 1, 'optim.name': 'sgd', 'model.width': 4,
                'train.steps': 2, 'train.steps_per_call': 1,
            }
        )  # fmt: skip
        result = loop.train_and_evaluate(config, str(tmp_path / cache))
        lines = (tmp_path / cache / 'metrics.jsonl').read_text().splitlines()
        losses.append([line['loss'] for line in map(json.loads, lines) if 'loss' in line])
        dice.append([row['dice'] for row in result['patients']])
    assert len(losses[0]) == 2
    for other in (1, 2):
        np.testing.assert_allclose(losses[other], losses[0], rtol=1e-4)
        np.testing.assert_allclose(dice[other], dice[0], atol=1e-3)
    run = open_run(tmp_path / 'none')
    assert (run.channels, run.context, run.inputs['channels']) == (3, 1, 3)
    kernels = [x.shape[2] for x in jax.tree.leaves(run.variables) if x.ndim == 4]
    assert 9 in kernels
    changed = tiny_config(**{'model.width': 4, 'optim.name': 'sgd', 'data.context': 2})
    words = r'can not resume \(data.context is 1 there, 2 here\)'
    with pytest.raises(CheckpointError, match=words):
        loop.train_and_evaluate(changed, str(tmp_path / 'none'))


def test_a_config_from_before_the_knob_has_none():
    config = to_dict(tiny_config())
    older = {**config, 'data': {k: x for k, x in config['data'].items() if k != 'context'}}
    newer = to_dict(tiny_config(**{'data.context': 1}))
    assert checkpoint.config_changes(older, config) == {}
    assert checkpoint.config_changes(older, newer) == {'data.context': (0, 1)}
    assert checkpoint.model_differences(older, newer) == ['data.context is 0 there, 1 here']
    assert checkpoint.model_differences(older, config) == []


# ---- first kernels --------------------------------------------------------------------------


def response(kernel, image_HWC):
    return np.einsum('hwco,hwc->o', kernel, image_HWC)


@pytest.mark.parametrize('how', ['cycle', 'mean'])
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('theirs', [0, 1, 2])
def test_of_equal_slices_comes_out_what_came_out_of_one(rng, channels, how, theirs):
    rgb = rng.standard_normal((3, 3, 3 * (2 * theirs + 1), 5)).astype(np.float32)
    image = rng.standard_normal((3, 3, channels)).astype(np.float32)
    parts = np.split(rgb, 2 * theirs + 1, axis=2)
    alone = [weights.adapt_stem(part, channels, how) for part in parts]
    expected = sum(response(part, image) for part in alone)
    for context in (0, 1, 2, 5):
        kernel = weights.adapt_stem(rgb, channels, how, context=context, their_context=theirs)
        slices = np.split(kernel, 2 * context + 1, axis=2)
        found = response(kernel, np.tile(image, (1, 1, 2 * context + 1)))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        if context == theirs:
            np.testing.assert_array_equal(slices, alone)
        else:  # a channel of the picture has its filter in every slice
            assert all((part == slices[0]).all() for part in slices)


@pytest.mark.slow
def test_a_run_starts_from_one_that_saw_single_slices(tmp_path):
    theirs = write_run(tmp_path / 'theirs', **{'model.width': 4})
    options = {'model.width': 4, 'train.init_from': str(tmp_path / 'theirs')}
    state, inputs = started(tmp_path / 'ours', **options, **{'data.context': 1})
    assert inputs['channels'] == 3
    ours, theirs = (flatten_dict(tree, sep='/') for tree in (state.params, theirs['params']))
    changed = [name for name in ours if ours[name].shape != theirs[name].shape]
    assert len(changed) == 1
    for name in ours.keys() - changed:
        np.testing.assert_array_equal(ours[name], theirs[name])
    (stem,) = changed
    parts = np.split(np.asarray(ours[stem]), 3, axis=2)
    np.testing.assert_allclose(parts, [theirs[stem] / 3] * 3, rtol=1e-5)


@pytest.mark.slow
def test_a_teacher_sees_as_many_slices(tmp_path):
    save(tmp_path / 'teacher', tiny_config(**{'model.width': 4, 'data.context': 2}))
    model = models.create(**tiny_config(**{'model.width': 4}).model)
    inputs = {'channels': 3, 'normalization': None}
    teach = functools.partial(
        transfer.load_teacher, str(tmp_path / 'teacher'), model, inputs, features=False
    )
    teach(context=2)
    words = 'has data.context=2, but this run has 1: set --config.data.context=2, or use a teacher'
    with pytest.raises(ConfigError, match=words):
        teach(context=1)
    config = tiny_config(
        **{'model.width': 4, 'data.context': 1, 'distill.teacher': str(tmp_path / 'teacher')}
    )
    with pytest.raises(ConfigError, match=words):
        loop.train_and_evaluate(config, str(tmp_path / 'run'))


# ---- evaluation and prediction --------------------------------------------------------------


def save(workdir, config, tree=None, normalization=None, scale=None):
    """A run's checkpoint with these variables, else random ones."""
    model = models.create(**config.model)
    seen = volumes.channels_seen(3, config.data.context)
    tree = random_variables(model, seen) if tree is None else tree
    state = update.TrainState(None, tree['params'], tree['batch_stats'], {}, {})
    inputs = {'channels': 3, 'normalization': normalization}
    inputs |= {'range': scale} if scale else {}
    writer = checkpoint.Writer(workdir)
    about = {'config': to_dict(config), 'progress': {}, 'inputs': inputs, 'dice': None}
    checkpoint.save(writer, 1, state, **about)
    writer.close()
    return workdir


def leaning(batch):
    """Brightness of the slice before, the slice and the one after it, unevenly: what is stacked in
    another order, or with another slice, is another mask.
    """
    assert batch.shape[-1] == 9
    value = sum(w * batch[..., 3 * n] for n, w in enumerate((0.5, 0.3, 0.2)))
    share = 1 / (1 + np.exp(-4 * (value - 0.5)))
    return np.stack([1 - share, share], axis=-1).astype(np.float32)


@pytest.fixture
def leaning_run(tmp_path, monkeypatch):
    """`leaning_run(**changes)`: a workdir of such a network."""
    monkeypatch.setattr(
        infer, 'compile_predict', lambda model, **options: lambda variables, batch: leaning(batch)
    )

    def make_run(normalization=None, scale=None, **changes):
        config = tiny_config(**{'model.width': 4, 'data.context': 1, **changes})
        return save(tmp_path / 'run', config, None, normalization, scale)

    return make_run


@pytest.mark.parametrize('context', [0, 1, 2])
@pytest.mark.parametrize('intensity', [None, FIXED])
def test_evaluation_and_the_temperature_see_the_stacks(rng, context, intensity):
    data = [case('a', rng, 5, 1, 2), case('b', rng, 3)]
    seen = []

    def record(batch):
        seen.extend(batch)
        return np.full((*batch.shape[:3], 2), 0.5, np.float32)

    options = OPTIONS | {'batching': scores.Batching(11, intensity, context)}
    expected = []
    for volume, parts in data:
        scale = volume.intensity if intensity is None else intensity
        found = by_hand([volumes.normalize(part, scale) for part in parts], context)
        expected += [*found, *np.zeros((11 - len(found), *found.shape[1:]))]  # fills the batch
    whole = [volume for volume, _ in data]
    scores.evaluate_volumes(record, whole, **options)
    np.testing.assert_array_equal(seen, expected)
    seen.clear()
    fitting.fit_temperature(record, whole, **options)
    np.testing.assert_array_equal(seen, expected)
    small = list(pipeline.eval_batches(whole[0], 3, intensity, context))
    np.testing.assert_array_equal(np.concatenate(small)[:8], expected[:8])


@pytest.mark.slow
@pytest.mark.parametrize(
    ('run', 'names', 'group', 'patient_of', 'patients'),
    [
        ({}, [f'img_{n}' for n in range(8)], None, str, 8),
        ({'data.name': 'folder', 'data.group': '(.+)_'},
         ['p1_a', 'p1_b', 'p1_c', 'p2_a', 'p2_b', 'p3_a', 'p3_b', 'p3_c'], None, first_part, 3),
        ({'data.name': 'folder', 'data.group': NUMBERED},
         ['p1_1', 'p1_2', 'p1_10', 'p1_9', 'p2_4', 'p2_5', 'p2_6', 'p3_1'], None, first_part, 3),
        ({'data.name': 'lgg'},
         ['case_1', 'case_2', 'case_10', 'case_3', 'other_1', 'other_2', 'a', 'b'],
         None, first_part, 4),
        ({}, ['p1_1', 'p1_2', 'p1_3', 'p2_1', 'p2_2', 'p2_3', 'p3_1', 'p3_2'],
         NUMBERED, first_part, 3),
    ],
    ids=['alone', 'group', 'numbered group', 'LGG', '--group'],
)  # fmt: skip
@pytest.mark.parametrize('kind', ['by volume', 'by weights'])
def test_evaluation_scores_the_masks_that_prediction_writes(
    leaning_run, tmp_path, run, names, group, patient_of, patients, kind
):
    weights = {'normalization': IMAGENET._asdict()} if kind == 'by weights' else {}
    workdir = leaning_run(**run, **weights)
    root = save_scenes(tmp_path / 'data', names, GAINS)
    masks = sorted((root / 'masks').iterdir())
    rows = evaluated_and_predicted(workdir, root, root / 'images', masks, patient_of, group)
    assert len(rows) == patients
    assert len(set(rows.values())) > 1


@pytest.mark.slow
def test_volumes_of_one_patient_are_evaluated_as_predicted(leaning_run, tmp_path):
    nibabel = pytest.importorskip('nibabel', reason='volumes are read by nibabel')
    root, stems = tmp_path / 'data', ('p1_a', 'p1_b', 'p2_a')
    for n, stem in enumerate(stems):
        scenes = [scene(3 * n + d, 1 - 0.2 * d) for d in range(4)]
        for kind, part, dtype in (('images', 0, np.int16), ('masks', 1, np.uint8)):
            values = np.stack([pair[part] for pair in scenes], axis=-1).astype(dtype)
            (root / kind).mkdir(parents=True, exist_ok=True)
            path = root / kind / f'{stem}.nii.gz'
            nibabel.save(nibabel.Nifti1Image(values, np.diag([-1, -1, 2, 1.0])), path)
    workdir = leaning_run(**{'data.name': 'folder', 'data.group': '(.+)_'})
    masks = sorted((root / 'masks').iterdir())
    rows = evaluated_and_predicted(workdir, root, root / 'images', masks, first_part)
    assert len(rows) == 2


@pytest.mark.slow
def test_kaggles_layout_is_evaluated_as_predicted(leaning_run, tmp_path):
    for name in ('TCGA_CS_4941_19960909', 'TCGA_DU_5849_19950405'):
        write_case(tmp_path / 'lgg' / 'kaggle_3m', name, slices=11)
    masks = sorted((tmp_path / 'lgg').rglob('*_mask.tif'))
    rows = evaluated_and_predicted(
        leaning_run(), tmp_path / 'lgg', tmp_path / 'lgg' / 'kaggle_3m', masks,
        lambda stem: stem.rsplit('_', 2)[0],
    )  # fmt: skip
    assert len(rows) == 2


@pytest.mark.slow
@pytest.mark.parametrize('weights', [None, IMAGENET._asdict()])
def test_some_slices_of_a_volume_are_predicted_as_among_all(leaning_run, tmp_path, weights):
    """Their neighbours are read, though no result of them is asked for; but not across a gap."""
    names = [f'case_{n}' for n in (1, 2, 3, 4, 6, 7)]
    root = save_scenes(tmp_path, names, [1.0, 0.2, 0.5, 0.9, 1.0, 0.3])
    workdir = leaning_run(weights, **{'data.name': 'lgg'})
    folders.predict_files(workdir, root / 'images', tmp_path / 'all', save=['probability'])
    images = [np.array(Image.open(root / 'images' / f'{name}.png')) for name in names]
    images = np.repeat(np.stack(images)[..., None], 3, axis=-1)
    scale = FIXED if weights else volumes.measure_intensity(images)
    images = volumes.normalize(images, scale)
    expected = leaning(by_hand([images[:4], images[4:]], 1))[..., 1]
    assert np.abs(expected - leaning(by_hand([images], 1))[..., 1]).max() > 0.1
    for name, prob in zip(names, expected, strict=True):
        found = np.array(Image.open(tmp_path / 'all' / f'{name}_probability.png')) / 65535
        np.testing.assert_allclose(found, prob, atol=1e-4)
    for source in ('case_2.png', 'case_[134].png', 'case_[16].png'):
        out = tmp_path / source
        folders.predict_files(workdir, root / 'images' / source, out, save=['probability'])
        for path in out.glob('*.png'):
            both = [np.array(Image.open(p)) for p in (path, tmp_path / 'all' / path.name)]
            np.testing.assert_array_equal(*both)
    assert len(list(tmp_path.rglob('case_1_probability.png'))) == 3


@pytest.mark.slow
def test_arrays_are_volumes_or_slices_alone(leaning_run, rng):
    model = api.load(leaning_run())
    volume = rng.integers(0, 255, (5, 9, 7, 3), np.uint8)
    scale = volumes.measure_intensity(volume)
    normal = volumes.normalize(volume, scale)
    expected = leaning(by_hand([normal], 1)).argmax(-1)
    np.testing.assert_array_equal(model.predict_volume(volume), expected)
    alone = volumes.normalize(volume[0], volumes.measure_intensity(volume[:1]))
    (expected,) = leaning(np.tile(alone, (1, 1, 3))[None])
    np.testing.assert_allclose(model.predict_probabilities(volume[0]), expected, rtol=1e-5)


@pytest.mark.parametrize('context', [0, 1, 3])
@pytest.mark.parametrize('count', [0, 1, 2, 9])
def test_frames_stand_between_those_before_and_after(context, count):
    found = videos._windows(iter(range(count)), context)
    rows = volumes.neighbours(None, count, context) if count else np.zeros((0, 1))
    assert list(found) == rows.tolist()


@pytest.mark.slow
def test_a_video_is_seen_with_neighbouring_frames(tmp_path, rng):
    pytest.importorskip('av', reason='videos are read and written by PyAV')
    config = tiny_config(**{'data.context': 1, 'eval.batch_size': 4})
    predictor = predictors.Predictor(config, leaning, FIXED, 3)
    frames = rng.integers(0, 255, (10, 32, 40, 3), np.uint8)
    source = make(tmp_path / 'in.mkv', frames, exact=True)
    videos.predict_video(predictor, source, tmp_path / 'out', save=['mask'])
    with video.reading(tmp_path / 'out_mask.mkv') as (_, _, pictures):
        found = np.stack(list(pictures))[..., 0] > 0
    expected = leaning(by_hand([volumes.normalize(frames, FIXED)], 1)).argmax(-1)
    np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """(folder of two numbered volumes, a run, the same that sees neighbours without any weight)."""
    folder = tmp_path_factory.mktemp('pair')
    names = ['p1_1', 'p1_2', 'p1_3', 'p1_5', 'p2_4', 'p2_5', 'p2_6', 'p2_7']
    save_scenes(folder / 'data', names, GAINS)
    options = {
        'model.width': 4, 'data.name': 'folder', 'data.group': NUMBERED, 'crf.kernel': 'windowed',
        'crf.window': 2, 'crf.iterations': 2, 'predict.flip': True,
    }  # fmt: skip
    config = tiny_config(**options)
    model = models.create(**config.model)
    plain = random_variables(model)
    wide, _ = widened(plain, model, 1)
    runs = [save(folder / 'plain', config, plain)]
    runs += [save(folder / 'wide', tiny_config(**options, **{'data.context': 1}), wide)]
    return folder, *runs


@pytest.mark.slow
@pytest.mark.parametrize('changes', [{}, {'window': 32}], ids=['whole', 'tiles'])
def test_without_weight_on_the_neighbours_all_is_as_of_the_slices_alone(pair, tmp_path, changes):
    """The CRF looks at the slice alone, too."""
    folder, *workdirs = pair
    results = []
    for workdir in workdirs:
        result = protocol.evaluate_checkpoint(workdir, data=str(folder / 'data'), changes=changes)
        out = tmp_path / workdir.name
        folders.predict_files(
            workdir, folder / 'data' / 'images', out, save=['probability'], changes=changes
        )
        pictures = [np.array(Image.open(path)) for path in sorted(out.glob('*.png'))]
        results.append((result, np.stack(pictures) / 65535))
    (one, probs), (other, other_probs) = results
    assert len(probs) == 8
    assert probs.std() > 1e-3
    np.testing.assert_allclose(other_probs, probs, atol=1e-4)
    for mine, theirs in zip(one['patients'], other['patients'], strict=True):
        assert mine['dice'] == pytest.approx(theirs['dice'], abs=2e-3)


@pytest.mark.slow
def test_runs_of_several_contexts_are_no_ensemble(pair):
    _, plain, wide = pair
    with pytest.raises(CheckpointError, match=r'data\.context is 0 there, 1 here'):
        predictors.load([plain, wide])


# ---- export ---------------------------------------------------------------------------------


@pytest.mark.parametrize('context', [1, 3])
@pytest.mark.parametrize('fmt', ['stablehlo', 'onnx'])
def test_the_graph_stacks_batches_of_any_size(rng, fmt, context):
    function = functools.partial(export.stack_neighbours, context=context)
    if fmt == 'onnx':
        pytest.importorskip('onnx', reason='onnx writes the file')
        from tests.test_export import onnx_session

        session = onnx_session(export.to_onnx(function, 3, (5, 4), {}, 'float32'))

        def call(image):
            return session.run(None, {'image': image})[0]
    else:
        call = export.to_stablehlo(function, 3, 'float32').call
    size = (5, 4) if fmt == 'onnx' else (33, 40)
    for batch in (1, 2, 3, 8):
        image = rng.standard_normal((batch, *size, 3)).astype(np.float32)
        np.testing.assert_array_equal(call(image), by_hand([image], context))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('fmt', 'normalization'),
    [('stablehlo', None), ('stablehlo', IMAGENET._asdict()), ('onnx', None), ('savedparams', None)],
)
def test_exported_files_take_a_volume_and_stack_it_themselves(tmp_path, rng, fmt, normalization):
    if fmt == 'onnx':
        pytest.importorskip('onnx', reason='onnx writes the file')
        pytest.importorskip('onnxruntime', reason='onnxruntime reads it again')
    config = tiny_config(**{'model.width': 4, 'data.context': 1})
    workdir = save(tmp_path / 'run', config, None, normalization)
    path = export.export_checkpoint(workdir, fmt, size=(32, 40))
    call, metadata = read.read(path)
    assert metadata['context']['slices'] == 1
    assert 'slices of one volume in order' in metadata['context']['how']
    assert metadata['sizes']['channels'] == 3
    predictor = predictors.load(workdir)
    for depth in (5, 1):
        volume = rng.integers(0, 255, (depth, 32, 40, 3), np.uint8)
        _, expected = predictors.predict_array(predictor, volume)
        np.testing.assert_allclose(call(volume), expected, atol=1e-4)
    _, apart = predictors.predict_array(predictor, volume[0])
    np.testing.assert_allclose(apart, expected[0], atol=1e-6)


@pytest.mark.slow
def test_an_export_without_weight_on_the_neighbours_is_that_of_the_slices(pair, tmp_path, rng):
    _, plain, wide = pair
    image = rng.integers(0, 255, (4, 48, 48, 3), np.uint8)
    found = []
    for workdir in (plain, wide):
        path = tmp_path / f'{workdir.name}.stablehlo.zip'
        call, _ = read.read(export.export_checkpoint(workdir, 'stablehlo', output=path))
        found.append(call(image))
    np.testing.assert_allclose(*found, atol=1e-4)
    assert found[0].std() > 1e-3
