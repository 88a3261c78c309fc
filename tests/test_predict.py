"""Prediction: files of the right size and values, and one bad picture stops no other."""

import collections
import contextlib
import json
import os
import resource
import tracemalloc
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pspnet_jax import models
from pspnet_jax.config import to_dict
from pspnet_jax.data import folder, formats, sources, splits, volumes
from pspnet_jax.data.formats import files, limits
from pspnet_jax.evaluation import protocol, visualize
from pspnet_jax.inference import infer, predictors
from pspnet_jax.inference.runs import open_run
from pspnet_jax.models.weights import IMAGENET
from pspnet_jax.prediction import folders, inputs, manifest, results
from pspnet_jax.runtime import checkpoint, paths, threads
from pspnet_jax.runtime.errors import CheckpointError, ConfigError, DataError
from pspnet_jax.training import loop
from tests.conftest import tiny_config, write_case


@pytest.fixture(scope='module')
def predictor(trained):
    return predictors.load(trained[0])


@contextlib.contextmanager
def full_disk(size):
    """Files can not grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def written(folder):
    files = [path for path in folder.rglob('*') if path.is_file() and path.name != manifest.NAME]
    return {str(path.relative_to(folder)) for path in files}


def noise(path, size, seed=0, dtype=np.uint8, high=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, high, size, dtype)).save(path)


def test_a_folder_becomes_masks_overlays_and_panels(trained, tmp_path):
    write_case(tmp_path / 'in', 'case', slices=3)
    Image.new('L', (50, 37), 90).save(tmp_path / 'in' / 'photo.jpg')
    assert folders.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out') == []
    names = written(tmp_path / 'out')
    stems = ['case/case_1', 'case/case_2', 'case/case_3', 'photo']
    assert names == {f'{s}_{k}.png' for s in stems for k in ('mask', 'overlay', 'panels')}
    mask = np.array(Image.open(tmp_path / 'out' / 'photo_mask.png'))
    assert mask.shape == (37, 50)
    assert set(np.unique(mask)) <= {0, 255}
    panels = Image.open(tmp_path / 'out' / 'photo_panels.png')
    assert panels.width == 3 * 4 * 50 + 8  # enlarged, so that there is room for captions


def test_one_slice_alone_is_predicted_as_within_its_volume(trained, tmp_path):
    folder = write_case(tmp_path / 'in', 'case', slices=4)
    folders.predict_files(trained[0], folder, tmp_path / 'all')
    folders.predict_files(trained[0], folder / 'case_2.tif', tmp_path / 'one')
    assert written(tmp_path / 'one') == {
        f'case_2_{kind}.png' for kind in ('mask', 'overlay', 'panels')
    }
    one, among = (
        np.array(Image.open(tmp_path / name / 'case_2_mask.png')) for name in ('one', 'all')
    )
    assert (one == among).mean() > 0.999  # the same scale; batches of another size round otherwise


def test_a_bad_picture_is_reported_and_the_others_done(trained, tmp_path):
    folder = write_case(tmp_path / 'in', 'case', slices=2)
    (folder / 'case_1.tif').write_bytes(b'no tiff')
    faults = folders.predict_files(trained[0], folder, tmp_path / 'out')
    assert len(faults) == 1
    assert 'case_1.tif is not a readable picture' in faults[0]
    assert (tmp_path / 'out' / 'case_2_mask.png').exists()
    assert not list((tmp_path / 'out').glob('*case_1*'))
    assert not list((tmp_path / 'out').glob('.*'))


@pytest.mark.parametrize('kind', ['missing', 'empty'])
def test_no_pictures_is_an_error_before_anything_is_written(trained, tmp_path, kind):
    source = tmp_path / 'in'
    if kind == 'empty':
        source.mkdir()
    with pytest.raises(DataError, match=str(source)):
        folders.predict_files(trained[0], source, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


NUMBERED = '(.+)_(?P<slice>[0-9]+)'


def test_slices_are_grouped_in_the_order_of_their_numbers():
    names = ['b_10.tif', 'b_9.tif', 'b_1.tif', 'a.png', 'c_1.png']
    paths = [Path(name) for name in names]
    groups, told = inputs.group_files(paths, NUMBERED)
    assert [[p.name for p in group.paths] for group in groups] == [
        ['b_1.tif', 'b_9.tif', 'b_10.tif'], ['a.png'], ['c_1.png']
    ]  # fmt: skip
    assert [list(group.numbers.values()) for group in groups] == [[1, 9, 10], [], [1]]
    assert told == (
        f'4 files belong to 2 patients by the group {NUMBERED!r}: files of one patient share '
        'an intensity scale; numbered slices form a volume (2 of 2); 1 file(s) without a '
        'patient are separate cases; --group= makes each file a separate case'
    )
    groups, told = inputs.group_files(paths, '')
    assert [list(group.paths) for group in groups] == [[path] for path in paths]
    assert told == (
        'each of 5 files is a separate case, as in evaluation; if NAME_1, NAME_2 ... are slices: '
        "--group='(.+)_(?P<slice>[0-9]+)'"
    )
    assert (
        inputs.group_files(paths[2:4])[1] == 'each of 2 files is a separate case, as in evaluation'
    )
    assert inputs.group_files(paths[:1])[1] == ''


def test_slices_that_are_no_neighbours_have_no_component_in_common(bright_run, tmp_path):
    """Of slices 1, 2 and 4 the fourth has a component of its own, whatever is not asked for."""
    root = save_scenes(tmp_path, [f'case_{n}' for n in range(1, 5)], [1.0] * 4)
    workdir = bright_run(**{'data.name': 'lgg'})
    source, changes = root / 'images' / 'case_[124].png', {'largest_component': True}
    folders.predict_files(workdir, source, tmp_path / 'out', save=['mask'], changes=changes)
    alone = folders.predict_files(
        workdir, root / 'images' / 'case_4.png', tmp_path / 'alone', save=['mask'], changes=changes
    )
    assert alone == []
    np.testing.assert_array_equal(
        *(Image.open(tmp_path / name / 'case_4_mask.png') for name in ('out', 'alone'))
    )
    assert (np.array(Image.open(tmp_path / 'out' / 'case_4_mask.png')) > 0).sum() == 14 * 14


@pytest.mark.parametrize('how', [NUMBERED, '(.+)_', '(scan)', ''])
@pytest.mark.parametrize('second', [(1, 2), (3, 4)], ids=['same names', 'others'])
def test_files_of_sub_folders_belong_together_as_in_training(tmp_path, how, second):
    for kind in ('images', 'masks'):
        for name, numbers in (('a', (1, 2)), ('b', second)):
            for n in numbers:
                noise(tmp_path / kind / name / f'scan_{n}.png', (8, 8), high=2)
    cases, faults, *_ = folder.scan([tmp_path / 'images'], tmp_path / 'masks', group=how)
    assert not faults
    trained = collections.defaultdict(dict)
    for case in cases:
        trained[case.patient][case.images[0]] = case.slice
    groups, _ = inputs.group_files(sorted((tmp_path / 'images').rglob('*.png')), how)
    found = [{path: group.numbers.get(path) for path in group.paths} for group in groups]
    assert sorted(found, key=str) == sorted(trained.values(), key=str)


def bright(variables, images):
    """A network that takes for class 1 what is bright; stands for what `compile_predict` makes."""
    assert images.shape[-1] == 3, 'it would be the shape of its first kernel'
    share = 1 / (1 + np.exp(-4 * (images.mean(-1) - 0.5)))
    return np.stack([1 - share, share], axis=-1).astype(np.float32)


@pytest.fixture
def bright_run(tmp_path, monkeypatch):
    """`bright_run(**changes)`: a workdir of such a network."""
    monkeypatch.setattr(infer, 'compile_predict', lambda model, **options: bright)

    def make(normalization=None, scale=None, **changes):
        config = tiny_config(**{'model.width': 4, **changes})
        return save_run(tmp_path / 'run', config, normalization, scale)

    return make


def scene(seed, gain=1.0, stray=True):
    """(image 48 x 48 uint8, mask) of a bright square and a smaller stray one, both lesion."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(20, 60, (48, 48))
    mask = np.zeros((48, 48), np.uint8)
    top, left = rng.integers(4, 24, 2)
    mask[top : top + 14, left : left + 14] = 1
    if stray:
        mask[40 + seed % 4 : 46, 40:46] = 1
    image[mask > 0] = 200
    return np.rint(gain * image).astype(np.uint8), mask


def save_scenes(root, names, gains, suffix='png', save=Image.fromarray):
    """root/images and root/masks: under each name a picture of another exposure."""
    for n, (name, gain) in enumerate(zip(names, gains, strict=True)):
        image, mask = scene(n, gain)
        for kind, pixels in (('images', save(image)), ('masks', Image.fromarray(255 * mask))):
            path = root / kind / f'{name}.{suffix if kind == "images" else "png"}'
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels.save(path)
    return root


GAINS = [1.0, 0.3, 0.6, 0.2, 1.0, 0.4, 0.8, 0.25]


@pytest.mark.parametrize(
    'names',
    [
        [f'img_{n}' for n in range(1, 9)],
        [f'IMG_{n:04}' for n in range(1, 9)],
        [f'frame_00{n}' for n in range(1, 9)],
        [f'{n}' for n in range(1, 9)],
    ],
    ids=lambda names: names[0],
)
@pytest.mark.parametrize('changes', [{}, {'largest_component': True}], ids=['', 'component'])
def test_what_a_picture_is_called_changes_nothing(bright_run, tmp_path, names, changes):
    workdir = bright_run()
    masks = []
    for way, stems in (('named', names), ('plain', 'abcdefgh')):
        save_scenes(tmp_path / way, stems, GAINS)
        out = tmp_path / f'out_{way}'
        source = tmp_path / way / 'images'
        assert folders.predict_files(workdir, source, out, save=['mask'], changes=changes) == []
        masks.append([np.array(Image.open(out / f'{stem}_mask.png')) > 0 for stem in stems])
    for n, (named, plain) in enumerate(zip(*masks, strict=True)):
        np.testing.assert_array_equal(named, plain)
        assert (named <= (scene(n)[1] > 0)).all()
        assert named.sum() >= 14 * 14


def dice_by_hand(out, masks, patient_of):
    """{patient: Dice over all its files} of what `predict` wrote and of the true masks."""
    sums = collections.defaultdict(lambda: np.zeros(3))
    for path in masks:
        truth = formats.read_labels(path) > 0
        found = next(out.rglob(f'{files.stem(path).removesuffix("_mask")}_mask.*'))
        ours = formats.read_labels(found) > 0
        name = patient_of(files.stem(path))
        sums[name] += [(ours & truth).sum(), ours.sum(), truth.sum()]
    return {name: 2 * both / (ours + theirs) for name, (both, ours, theirs) in sums.items()}


def evaluated_and_predicted(workdir, data, images, masks, patient_of, group=None):
    """Assert that the figures of `evaluate` are those of the files of `predict`; gives them."""
    changes = {'largest_component': True}
    result = protocol.evaluate_checkpoint(workdir, data=str(data), changes=changes, group=group)
    out = data / 'out'
    assert not folders.predict_files(
        workdir, images, out, save=['mask'], changes=changes, group=group, overwrite=True
    )
    expected = dice_by_hand(out, masks, patient_of)
    rows = {row['patient']: row['dice'] for row in result['patients']}
    assert rows == pytest.approx(expected)
    return rows


def test_a_strangers_run_makes_evaluation_read_no_folder(bright_run, tmp_path):
    root = save_scenes(tmp_path / 'data', 'abcd', [1.0] * 4)
    workdir = bright_run(**{'data.name': 'folder', 'data.source': str(root)})
    parts = {'train': ['a'], 'validation': ['b'], 'test': ['c', 'd']}
    config = open_run(workdir).config
    splits.write(workdir / splits.KEPT, parts, sources.read(config))
    moved = root.rename(tmp_path / 'moved')

    def patients(**how):
        result = protocol.evaluate_checkpoint(workdir, **how)
        return [row['patient'] for row in result['patients']], result['data']['split']

    with pytest.raises(DataError, match=rf'add --data={root} --split=test'):
        patients()
    with pytest.raises(DataError, match=rf'add --data={root} --split=validation'):
        patients(split='validation')
    assert patients(data=str(moved)) == (list('abcd'), '')
    assert patients(data=str(moved), split='test') == (['c', 'd'], 'test')
    moved.rename(root)
    assert patients(trusted=True) == (['c', 'd'], 'test')
    paths.remember(sources.places(config))  # as training does
    assert patients() == (['c', 'd'], 'test')
    paths.remember([str(n) for n in range(paths.MOST_KNOWN)])
    with pytest.raises(DataError, match='you have not used for training on this machine: if'):
        patients()


def as_deep(image):
    """12 bits, from 900 up."""
    return Image.fromarray(900 + 12 * image.astype(np.uint16))


def first_part(stem):
    return stem.split('_')[0]


@pytest.mark.parametrize(
    ('run', 'names', 'group', 'patient_of', 'patients'),
    [
        ({}, [f'img_{n}' for n in range(8)], None, str, 8),
        ({'data.name': 'folder'}, [f'img_{n}' for n in range(8)], None, str, 8),
        ({'data.name': 'folder', 'data.group': '(.+)_'},
         ['p1_a', 'p1_b', 'p1_c', 'p2_a', 'p2_b', 'p3_a', 'p3_b', 'p3_c'], None, first_part, 3),
        ({'data.name': 'folder', 'data.group': NUMBERED},
         ['p1_1', 'p1_2', 'p1_10', 'p1_9', 'p2_4', 'p2_5', 'p2_6', 'p3_1'], None, first_part, 3),
        ({'data.name': 'lgg'},
         ['case_1', 'case_2', 'case_10', 'case_3', 'other_1', 'other_2', 'a', 'b'],
         None, first_part, 4),
        ({}, ['p1_1', 'p1_2', 'p1_3', 'p2_1', 'p2_2', 'p2_3', 'p3_1', 'p3_2'],
         NUMBERED, first_part, 3),
        ({'data.name': 'folder', 'data.group': '(.+)_'},
         ['p1_a', 'p1_b', 'p1_c', 'p2_a', 'p2_b', 'p3_a', 'p3_b', 'p3_c'], '', str, 8),
    ],
    ids=['phantom', 'folder', 'group', 'numbered group', 'LGG', '--group', '--group='],
)  # fmt: skip
@pytest.mark.parametrize('kind', ['8 bits', '12 bits', '12 bits by weights', 'grey, 3 channels'])
def test_evaluation_scores_the_masks_that_prediction_writes(
    bright_run, tmp_path, run, names, group, patient_of, patients, kind
):
    weights = {}
    if 'weights' in kind:
        weights = {'normalization': IMAGENET._asdict(), 'scale': [[900.0] * 3, [900 + 2400.0] * 3]}
    workdir = bright_run(**run, **weights)
    save = as_deep if '12' in kind else Image.fromarray
    if kind == '8 bits':
        save = lambda image: Image.fromarray(image).convert('RGB')  # noqa: E731
    root = save_scenes(tmp_path / 'data', names, GAINS, save=save)
    masks = sorted((root / 'masks').iterdir())
    rows = evaluated_and_predicted(workdir, root, root / 'images', masks, patient_of, group)
    assert len(rows) == patients


@pytest.mark.slow
def test_a_folder_in_kaggles_layout_is_of_volumes_whatever_the_run(bright_run, tmp_path, caplog):
    for name in ('TCGA_CS_4941_19960909', 'TCGA_DU_5849_19950405'):
        write_case(tmp_path / 'data' / 'kaggle_3m', name, slices=11)
    masks = sorted((tmp_path / 'data').rglob('*_mask.tif'))
    with caplog.at_level('INFO'):
        rows = evaluated_and_predicted(
            bright_run(), tmp_path / 'data', tmp_path / 'data' / 'kaggle_3m', masks,
            lambda stem: stem.rsplit('_', 2)[0],
        )  # fmt: skip
    assert len(rows) == 2
    assert "22 files belong to 2 patients by Kaggle's layout" in caplog.text
    assert 'numbered slices form a volume (2 of 2)' in caplog.text


def test_volumes_of_one_patient_share_their_scale_as_in_training(bright_run, tmp_path):
    nibabel = pytest.importorskip('nibabel', reason='volumes are read by nibabel')
    root, stems = tmp_path / 'data', ('p1_a', 'p1_b', 'p2_a')
    for n, (stem, gain) in enumerate(zip(stems, (1.0, 0.2, 1.0), strict=True)):
        scenes = [scene(n, gain, stray=False)] * 4
        for kind, part, dtype in (('images', 0, np.int16), ('masks', 1, np.uint8)):
            values = np.stack([pair[part] for pair in scenes], axis=-1).astype(dtype)
            (root / kind).mkdir(parents=True, exist_ok=True)
            path = root / kind / f'{stem}.nii.gz'
            nibabel.save(nibabel.Nifti1Image(values, np.diag([-1, -1, 2, 1.0])), path)
    workdir = bright_run(**{'data.name': 'folder', 'data.group': '(.+)_'})
    masks = sorted((root / 'masks').iterdir())
    rows = evaluated_and_predicted(workdir, root, root / 'images', masks, first_part)
    assert rows.keys() == {'p1', 'p2'}
    assert rows['p1'] < 0.8  # what is dim beside what is bright is not seen
    rows = evaluated_and_predicted(workdir, root, root / 'images', masks, str, '')
    assert min(rows.values()) > 0.95


def test_some_slices_of_a_volume_are_predicted_as_among_all(bright_run, tmp_path):
    names = [f'case_{n}' for n in range(1, 9)]
    root = save_scenes(tmp_path, names, [1.0, 0.2, 0.5, 0.5, 1.0, 1.0, 0.9, 0.3])
    workdir = bright_run(**{'data.name': 'lgg'})
    folders.predict_files(workdir, root / 'images', tmp_path / 'all', save=['mask'])
    for source in ('case_3.png', 'case_[348].png'):
        out = tmp_path / source
        folders.predict_files(workdir, root / 'images' / source, out, save=['mask'])
        for path in out.glob('*.png'):
            np.testing.assert_array_equal(
                Image.open(path), Image.open(tmp_path / 'all' / path.name)
            )
    alone = tmp_path / 'alone'
    folders.predict_files(workdir, root / 'images' / 'case_2.png', alone, save=['mask'], group='')
    assert (np.array(Image.open(alone / 'case_2_mask.png')) > 0).sum() > 0
    assert not np.array(Image.open(tmp_path / 'all' / 'case_2_mask.png')).any()


def test_pictures_show_the_mask_and_keep_the_rest():
    image = np.full((8, 8, 3), 100, np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 1
    for draw, reach in ((visualize.overlay, 0), (visualize.outline, 1)):
        picture, far = draw(image, mask), np.ones((8, 8), bool)
        far[2 - reach : 6 + reach, 2 - reach : 6 + reach] = False
        assert (picture[far] == 100).all()
        assert (picture[2, 2] != 100).any()
    assert (visualize.outline(image, mask)[3:5, 3:5] == 100).all()  # a line, not a filling
    assert (image == 100).all()  # the input is left alone
    panels = visualize.three_panels(image, mask)
    assert (panels[:, :8] == image).all()
    assert ((panels[:, 12:20] == visualize.class_color(1)).all(-1) == (mask == 1)).all()


def test_what_is_finished_is_skipped_and_what_is_not_is_done(trained, tmp_path):
    for i, name in enumerate(('a', 'b', 'sub/c')):
        noise(tmp_path / 'in' / f'{name}.png', (32, 32), i)
    out = tmp_path / 'out'
    folders.predict_files(trained[0], tmp_path / 'in', out)
    for name in written(out):
        (out / name).write_bytes(b'finished')
    (out / 'sub' / 'c_panels.png').unlink()
    folders.predict_files(trained[0], tmp_path / 'in', out)
    again = {name for name in written(out) if (out / name).read_bytes() != b'finished'}
    assert again == {f'sub/c_{kind}.png' for kind in ('mask', 'overlay', 'panels')}
    folders.predict_files(trained[0], tmp_path / 'in', out, overwrite=True)
    assert not [name for name in written(out) if (out / name).read_bytes() == b'finished']


def everything(root):
    """A folder with one of each that can lie in one, as {why or what becomes of it: names}."""
    there = {
        'predicted': ['a.png', 'sub/b.png', 'linked.png'],
        'failed': ['empty.png', 'sub/broken.jpg'],
        'named like results': [
            'nurse_with_mask.png', 'scan_overlay.png', 'face_mask.jpg', 'a_probability_2.png'
        ],
        'unknown endings': ['b.heic', 'c.nrrd', 'notes.txt', 'Thumbs.db', 'noending'],
        'hidden': ['.DS_Store', '.git/', 'sub/._b.png'],
        'neither files nor folders': ['pipe.png', 'gone.png'],
        'links to folders': ['elsewhere'],
        'in --output': ['out/'],
    }  # fmt: skip
    for name in (*there['predicted'][:2], *there['named like results']):
        noise(root / name, (32, 32))
    for name in there['failed']:
        (root / name).write_bytes(b'')
    for name in there['unknown endings']:
        (root / name).write_bytes(b'12345678')
    noise(root / '.git' / 'x.png', (32, 32))
    for name in ('.DS_Store', 'sub/._b.png'):
        (root / name).write_bytes(b'1')
    (root / 'linked.png').symlink_to(root / 'a.png')
    os.mkfifo(root / 'pipe.png')
    (root / 'gone.png').symlink_to('nowhere.png')
    (root / 'elsewhere').symlink_to(root.parent)
    noise(root / 'out' / 'before.png', (32, 32))
    return there


def test_the_summary_accounts_for_every_file(bright_run, tmp_path, capsys):
    root = tmp_path / 'in'
    there = everything(root)
    workdir = bright_run()
    faults = folders.predict_files(workdir, root, root / 'out', save=['mask'])
    assert len(faults) == 2
    summary = capsys.readouterr().out.splitlines()
    total = sum(map(len, there.values()))
    over = total - 3 - 2
    assert summary.pop(0) == f'mask are in {root / "out"}'
    assert summary[0] == (
        f'{total} files and folders in {root}: 3 predicted, 2 failed, {over} skipped'
    )
    lines = {why: line for line in summary[1:] for why in there if f'skipped, {why}' in line}
    assert lines.keys() == there.keys() - {'predicted', 'failed'}
    for why, line in lines.items():
        names = sorted(name.rstrip('/').rsplit('/', 1)[-1] for name in there[why])
        assert line.strip().startswith(f'{len(names)} skipped')
        listed = line.rsplit(': ', 1)[1].split(' and ')[0].split(', ')
        assert len(listed) == min(len(names), 3)
        assert set(listed) <= set(names)
        assert (' and 1 more' in line) == (len(names) == 4)
    # Again: what was predicted is finished, a fault is tried again.
    folders.predict_files(workdir, root, root / 'out', save=['mask'])
    first = capsys.readouterr().out.splitlines()[2]
    assert first.endswith(f': 0 predicted, 3 finished before, 2 failed, {over} skipped')
    # What is skipped by its name is predicted by that name.
    one = root / 'nurse_with_mask.png'
    assert folders.predict_files(workdir, one, tmp_path / 'one', save=['mask']) == []
    assert capsys.readouterr().out.splitlines()[-1] == f'1 file in {one}: 1 predicted'
    assert written(tmp_path / 'one') == {'nurse_with_mask_mask.png'}


def test_a_folder_of_nothing_but_others_names_them(bright_run, tmp_path):
    for name in ('scan.heic', 'b_mask.png'):
        (tmp_path / name).write_bytes(b'1')
    with pytest.raises(DataError) as caught:
        inputs.find_files(tmp_path)
    assert '1 skipped, unknown endings: scan.heic' in str(caught.value)
    assert '1 skipped, named like results or masks' in str(caught.value)


def test_hidden_folders_are_as_hidden_as_in_training(tmp_path):
    for name in ('a.png', '.ipynb_checkpoints/a-checkpoint.png', 'sub/.cache/b.png'):
        noise(tmp_path / name, (4, 4))
    assert inputs.find_files(tmp_path)[1] == list(files.find(tmp_path).values())


def test_a_folder_that_can_not_be_listed_is_a_fault(bright_run, tmp_path, monkeypatch, capsys):
    noise(tmp_path / 'in' / 'a.png', (32, 32))
    closed = tmp_path / 'in' / 'closed'
    closed.mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path) == closed:
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    faults = folders.predict_files(bright_run(), tmp_path / 'in', tmp_path / 'out', save=['mask'])
    assert faults == [f'{closed} can not be listed: check its permissions']
    assert 'folders that can not be listed: closed' in capsys.readouterr().out


def test_results_in_the_input_folder_are_not_input(trained, tmp_path):
    noise(tmp_path / 'a.png', (32, 32))
    save = ('mask', 'probability', 'overlay', 'outline', 'panels')
    folders.predict_files(trained[0], tmp_path, tmp_path / 'below', save=save)
    assert len(written(tmp_path)) == 1 + len(save)
    noise(tmp_path / 'below' / 'x.png', (32, 32))  # whatever is in the output folder
    assert inputs.find_files(tmp_path, tmp_path / 'below') == (tmp_path, [tmp_path / 'a.png'])


def test_patterns_name_files_and_folders(tmp_path):
    for name in ('p1/a.png', 'p1/b.jpg', 'p2/a.png', 'p2/deep/c.png', 'other.png'):
        noise(tmp_path / name, (4, 4))

    def found(pattern):
        root, paths = inputs.find_files(f'{tmp_path}/{pattern}')
        return root, [str(path.relative_to(tmp_path)) for path in paths]

    assert found('p*/*.png') == (tmp_path, ['p1/a.png', 'p2/a.png'])
    assert found('p2/**/*.png') == (tmp_path / 'p2', ['p2/a.png', 'p2/deep/c.png'])
    assert found('p[2]') == (tmp_path, ['p2/a.png', 'p2/deep/c.png'])
    with pytest.raises(DataError, match='holds no images'):
        found('*.gif')


def test_a_folder_of_dicom_files_is_one_volume_and_keeps_its_name(tmp_path):
    for name in ('p1/1.dcm', 'p1/2.dcm', 'p2/1.DCM', 'p2/beside.png', '.hidden.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    root, found = inputs.find_files(tmp_path)
    assert (root, found) == (tmp_path, [tmp_path / name for name in ('p1', 'p2', 'p2/beside.png')])
    stems, _ = results.name_results(root, found)
    assert [str(stem) for stem in stems.values()] == ['p1', 'p2', 'p2/beside']
    root, found = inputs.find_files(tmp_path / 'p1')  # the series itself
    assert results.name_results(root, found) == ({tmp_path / 'p1': Path('p1')}, [])


def test_channels_are_stacked_as_the_run_reads_them(predictor, tmp_path, rng):
    """nnU-Net's names: what trains can be predicted, a picture a case."""
    channels = rng.integers(0, 255, (2, 2, 40, 48), np.uint8)
    for case, several in zip('ab', channels, strict=True):
        for n, pixels in enumerate(several):
            Image.fromarray(pixels).save(tmp_path / f'{case}_{n:04}.png')
    images = ('in/{stem}_0000', 'in/{stem}_0001')
    found = sorted(tmp_path.iterdir())
    stacks = inputs.stack_channels(found, images)
    first = [tmp_path / 'a_0000.png', tmp_path / 'b_0000.png']
    assert list(stacks) == first
    assert inputs.stack_channels(first[:1], images) == {first[0]: (first[0], found[1])}
    assert list(inputs.stack_channels(found, ('in',))) == found
    two = predictor._replace(channels=2)
    _, cases, faults = folders.read_cases(
        inputs.Group(first[1:]),
        predictor=two,
        stems={path: path for path in first},
        channels=stacks,
    )
    assert not faults
    np.testing.assert_array_equal(cases[0].image[0], np.moveaxis(channels[1], 0, -1))
    (tmp_path / 'b_0001.png').unlink()
    stacks = inputs.stack_channels(first[1:], images)
    _, _, (fault,) = folders.read_cases(
        inputs.Group(first[1:]),
        predictor=two,
        stems={path: path for path in first},
        channels=stacks,
    )
    assert 'has 1 channels, but the network takes 2' in fault


def test_channels_by_name_are_grouped_by_the_cases_name_and_counted(bright_run, tmp_path, capsys):
    """p1_3_0000 is slice 3 of p1 in training, and no slice 0 of p1_3."""
    names = ('{stem}_0000', '{stem}_0001', '{stem}_0002')
    for n, (stem, gain) in enumerate(zip(('p1_1', 'p1_2', 'p2_1'), (1.0, 0.3, 1.0), strict=True)):
        image, mask = scene(n, gain)
        for name in names:
            path = tmp_path / 'imagesTr' / f'{name.replace("{stem}", stem)}.png'
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
        (tmp_path / 'labelsTr').mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / 'labelsTr' / f'{stem}.png')
    images = tuple(f'imagesTr/{name}' for name in names)
    workdir = bright_run(
        **{'data.name': 'folder', 'data.images': images, 'data.masks': 'labelsTr',
           'data.group': NUMBERED}
    )  # fmt: skip
    changes = {'largest_component': True}
    result = protocol.evaluate_checkpoint(workdir, data=str(tmp_path), changes=changes)
    capsys.readouterr()
    faults = folders.predict_files(
        workdir, tmp_path / 'imagesTr', tmp_path / 'out', save=['mask'], changes=changes
    )
    assert faults == []
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith('imagesTr: 3 predicted, 6 further channels of these')
    sums = collections.defaultdict(lambda: np.zeros(3))
    for stem in ('p1_1', 'p1_2', 'p2_1'):
        ours = np.array(Image.open(tmp_path / 'out' / f'{stem}_0000_mask.png')) > 0
        truth = np.array(Image.open(tmp_path / 'labelsTr' / f'{stem}.png')) > 0
        sums[stem[:2]] += [(ours & truth).sum(), ours.sum(), truth.sum()]
    rows = {row['patient']: row['dice'] for row in result['patients']}
    assert rows == pytest.approx({name: 2 * a / (b + c) for name, (a, b, c) in sums.items()})


def test_two_inputs_of_one_name_do_not_overwrite_each_other(trained, tmp_path):
    for name in ('a.png', 'a.jpg'):
        noise(tmp_path / 'in' / name, (32, 32))
    (fault,) = folders.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out')
    assert 'a.png would overwrite the results of' in fault
    assert 'a.jpg: rename one' in fault


def test_pictures_of_many_sizes_are_predicted_as_each_alone(trained, predictor, tmp_path):
    sizes = {'a': (40, 32), 'b': (32, 40), 'c': (40, 32), 'd': (36, 36), 'e': (32, 40)}
    for i, (name, size) in enumerate(sizes.items()):
        noise(tmp_path / 'in' / f'{name}.png', size, i)
    folders.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out', save=['probability'])
    for name, size in sizes.items():
        _, prob = predictors.predict_array(
            predictor, np.array(Image.open(tmp_path / f'in/{name}.png'))
        )
        picture = np.array(Image.open(tmp_path / 'out' / f'{name}_probability.png'))
        assert picture.shape == size
        np.testing.assert_allclose(picture / 65535, prob[..., 1], atol=1e-4)


def test_deep_pictures_are_predicted_as_they_are_and_shown_in_8_bits(trained, predictor, tmp_path):
    noise(tmp_path / 'in' / 'deep.png', (40, 32), dtype=np.uint16, high=4000)
    folders.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out', save=['mask', 'panels'])
    pixels = formats.read(tmp_path / 'in' / 'deep.png').image[0]
    assert pixels.max() > 3000
    labels, _ = predictors.predict_array(predictor, pixels)
    np.testing.assert_array_equal(Image.open(tmp_path / 'out' / 'deep_mask.png'), 255 * labels)
    shown = np.array(Image.open(tmp_path / 'out' / 'deep_panels.png'))
    assert shown.shape[1] == 3 * 160 + 8
    top = int(1.6 * 12)  # the captions; the legend is below
    shown = shown[top : top + 5 * 40 : 5, : 5 * 32 : 5, 0]
    low, high = np.percentile(pixels, (10, 99))
    np.testing.assert_allclose(shown, np.clip((pixels[..., 0] - low) / (high - low), 0, 1) * 255,
                               atol=1)  # fmt: skip


def test_nifti_in_gives_nifti_out_on_the_same_grid(trained, predictor, tmp_path, rng):
    nibabel = pytest.importorskip('nibabel', reason='volumes are read by nibabel')
    affine = np.array([[0, -0.9, 0, 5], [0, 0, 2.5, -3], [1.1, 0, 0, 7], [0, 0, 0, 1.0]])
    voxels = rng.normal(100, 40, (24, 32, 5)).astype(np.float32)
    source = tmp_path / 'in' / 'scan.nii.gz'
    source.parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(voxels, affine), source)
    save = ['mask', 'probability', 'overlay']
    assert folders.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out', save=save) == []
    assert written(tmp_path / 'out') == {
        'scan_mask.nii.gz', 'scan_probability.nii.gz', 'scan_overlay.png'
    }  # fmt: skip
    mask = nibabel.load(tmp_path / 'out' / 'scan_mask.nii.gz')
    prob = nibabel.load(tmp_path / 'out' / 'scan_probability.nii.gz').get_fdata()
    np.testing.assert_allclose(mask.affine, affine)
    assert mask.shape == prob.shape == voxels.shape
    np.testing.assert_array_equal(np.asarray(mask.dataobj), prob > 0.5)
    # The network saw slices from feet to head: the file's second axis is the third here.
    _, expected = predictors.predict_array(predictor, formats.read(source).image)
    ours = formats.read(tmp_path / 'out' / 'scan_probability.nii.gz').image[..., 0]
    np.testing.assert_allclose(ours, expected[..., 1], atol=1e-4)


def test_pages_and_arrays_give_pages_and_arrays(trained, tmp_path, rng):
    pages = rng.integers(0, 255, (3, 32, 40), np.uint8)
    (tmp_path / 'in').mkdir()
    first, *others = map(Image.fromarray, pages)
    first.save(tmp_path / 'in' / 'pages.tif', save_all=True, append_images=others)
    np.save(tmp_path / 'in' / 'array.npy', pages[..., None])
    folders.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out', save=['mask'])
    mask = np.load(tmp_path / 'out' / 'array_mask.npy')
    assert mask.shape == pages.shape
    with Image.open(tmp_path / 'out' / 'pages_mask.tif') as picture:
        for d in range(3):
            picture.seek(d)
            np.testing.assert_array_equal(picture, 255 * mask[d])


def test_a_full_disk_stops_it_with_one_line_and_leaves_nothing_half_written(trained, tmp_path):
    for name in ('a', 'b'):
        noise(tmp_path / 'in' / f'{name}.png', (64, 64, 3))
    folders.predict_files(trained[0], tmp_path / 'in', tmp_path / 'compiled')
    with full_disk(2000), pytest.raises(DataError, match=r'can not be written .*: free some space'):
        folders.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out')
    for name in written(tmp_path / 'out'):  # a small mask may be whole
        Image.open(tmp_path / 'out' / name).load()
        assert not Path(name).name.startswith('.')
    assert written(tmp_path) - {f'out/{name}' for name in written(tmp_path / 'out')} == {
        'in/a.png', 'in/b.png', *(f'compiled/{n}' for n in written(tmp_path / 'compiled'))
    }  # fmt: skip
    assert folders.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out') == []  # goes on
    for name in written(tmp_path / 'compiled'):
        ours, theirs = ((tmp_path / k / name).read_bytes() for k in ('out', 'compiled'))
        assert ours == theirs


def test_options_of_the_config_and_of_the_call(trained, tmp_path):
    noise(tmp_path / 'in' / 'a.png', (48, 40, 3), high=200)

    def mask(**changes):
        out = tmp_path / 'out'
        folders.predict_files(
            trained[0], tmp_path / 'in', out, save=['mask'], overwrite=True, changes=changes
        )
        return np.array(Image.open(out / 'a_mask.png')) > 0

    assert mask(threshold=0.0).all()
    assert not mask(threshold=1.0).any()
    assert not mask(threshold=0.0, min_size=48 * 40 + 1).any()
    many = mask(threshold=0.3)
    assert (mask(threshold=0.3, largest_component=True) <= many).all()
    with pytest.raises(ConfigError, match=r'predict.overlap is 1.0: it must be a number from 0'):
        mask(overlap=1.0)


@pytest.mark.slow
def test_an_ensemble_of_a_run_and_itself_is_the_run(trained, predictor, rng):
    image = rng.integers(0, 255, (40, 32, 3), np.uint8)
    _, alone = predictors.predict_array(predictor, image)
    _, twice = predictors.predict_array(predictors.load([trained[0], trained[0]]), image)
    np.testing.assert_allclose(twice, alone, atol=1e-5)


def save_run(workdir, config, normalization=None, scale=None):
    """A checkpoint of zeros."""
    inputs = {'channels': 3, 'normalization': normalization}
    inputs |= {'range': scale} if scale else {}
    model = models.create(**config.model)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    state = types.SimpleNamespace(ema_params={}, opt_state={}, **jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), shapes))  # fmt: skip
    with contextlib.closing(checkpoint.Writer(workdir)) as writer:
        checkpoint.save(
            writer, 1, state, config=to_dict(config), progress={}, dice=None, inputs=inputs
        )
    return workdir


@pytest.mark.slow
def test_runs_of_different_networks_are_refused_by_the_keys_that_differ(trained, tmp_path):
    other = save_run(tmp_path / 'wide', tiny_config(**{'model.width': 8, 'model.aux_head': False}))
    with pytest.raises(
        CheckpointError, match=r'aux_head is True there, False here; model.width is'
    ):
        predictors.load([trained[0], other])
    imagenet = {'mean': [1.0] * 3, 'std': [1.0] * 3, 'trained_order': 'RGB'}
    other = save_run(tmp_path / 'weights', tiny_config(), imagenet)
    with pytest.raises(CheckpointError, match='normalised differently'):
        predictors.load([trained[0], other])
    other = save_run(tmp_path / 'buda', tiny_config(), 'buda')
    with pytest.raises(CheckpointError, match='normalised differently'):
        predictors.load([trained[0], other])
    names = tiny_config(**{'model.class_names': ('background', 'lesion')})
    named = save_run(tmp_path / 'names', names)
    predictors.load([trained[0], named])  # not part of the network
    names.model.class_names = ('lesion', 'background')
    other = save_run(tmp_path / 'turned', names)
    with pytest.raises(CheckpointError, match=r"class_names is \('background', .* here"):
        predictors.load([named, other])


def test_channels_that_do_not_fit_are_named(trained, tmp_path, predictor):
    np.save(tmp_path / 'four.npy', np.zeros((1, 32, 32, 4), np.uint8))
    (fault,) = folders.predict_files(trained[0], tmp_path, tmp_path / 'out')
    assert 'four.npy has 4 channels, but the network takes 3' in fault
    grey = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    colour = volumes.fit_channels(grey, 3, 'x')
    assert (colour == grey).all()
    np.testing.assert_array_equal(volumes.fit_channels(colour, 1, 'x'), grey)
    with pytest.raises(DataError, match='x has 3 channels, but the network takes 1'):
        volumes.fit_channels(colour * np.uint8([1, 2, 1]), 1, 'x')
    with pytest.raises(DataError, match='is not an image'):
        predictors.predict_array(predictor, np.zeros(5))


def test_pictures_of_one_patient_that_do_not_fit_the_memory_are_refused(
    bright_run, tmp_path, monkeypatch
):
    root = save_scenes(tmp_path, ['a_1', 'a_2', 'b_1'], [1.0, 1.0, 1.0])
    monkeypatch.setattr(limits, 'SMALL', 0)
    monkeypatch.setattr(folders, 'free_memory', lambda: 4 * 48 * 48 - 1)
    monkeypatch.setattr(limits, 'free_memory', lambda: 2**30)
    faults = folders.predict_files(
        bright_run(), root / 'images', tmp_path / 'out', save=['mask'], group=NUMBERED
    )
    assert len(faults) == 2
    assert 'a_1.png: the 2 images of its patient' in faults[0]
    assert '--group= to predict each image separately' in faults[0]
    assert written(tmp_path / 'out') == {'b_1_mask.png'}


def test_threads_keep_the_order_and_pass_errors_on():
    assert list(threads.in_threads(lambda x: x * x, range(20), 3)) == [x * x for x in range(20)]
    assert list(threads.prefetched(iter('abc'))) == ['a', 'b', 'c']
    inverses = threads.in_threads(lambda x: 1 / (3 - x), range(10), 1)
    assert [next(inverses) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(inverses)


def test_the_legend_names_the_classes_that_are_there():
    picture = np.full((120, 200, 3), 77, np.uint8)
    mask = np.zeros((120, 200), np.uint8)
    assert (visualize.legend(picture, mask, ()) == 77).all()
    mask[100:, 100:] = 2
    drawn = visualize.legend(picture, mask, ('background', 'oedema', 'core'))
    colors = {tuple(color) for color in drawn.reshape(-1, 3).tolist()}
    assert tuple(visualize.class_color(2).tolist()) in colors
    assert tuple(visualize.class_color(1).tolist()) not in colors
    assert (drawn[60:] == 77).all()
    assert (drawn[:, 100:] == 77).all()
    wide = visualize.legend(picture, mask, ('background', 'oedema', 'the core that is enhancing'))
    assert (wide[:, :100] != drawn[:, :100]).any()  # another name is another picture
    small = np.full((16, 16, 3), 77, np.uint8)
    assert (visualize.legend(small, mask[-16:, -16:], ()) == 77).all()  # no room


def test_a_run_on_12_bits_by_weights_keeps_their_range_and_takes_no_others(tmp_path):
    """Trained, validated and evaluated with it; then what it can not know is refused."""
    names = [f'p{n}' for n in range(8)]
    root = save_scenes(tmp_path / 'data', names, GAINS, save=as_deep)
    config = tiny_config(
        **{
            'model.width': 4, 'train.steps': 2, 'train.validate_every': 2, 'data.name': 'folder',
            'data.source': str(root), 'data.normalize': 'weights', 'data.test_fraction': 0.25,
        }
    )  # fmt: skip
    workdir = tmp_path / 'run'
    loop.train_and_evaluate(config, str(workdir))
    parts = json.loads((workdir / 'splits.json').read_text())
    pixels = [np.array(Image.open(root / 'images' / f'{n}.png')) for n in parts['train']]
    expected = np.median([np.percentile(image, (0.5, 99.5)) for image in pixels], axis=0)
    inputs = open_run(workdir, 'best').inputs
    np.testing.assert_allclose(np.ravel(inputs['range']), expected, rtol=1e-6)
    predictor = predictors.load(workdir)
    scale = np.array(inputs['range'])
    np.testing.assert_array_equal(predictor.intensity, IMAGENET.intensity(1, scale))
    noise(tmp_path / 'eight.png', (48, 48))
    (fault,) = folders.predict_files(workdir, tmp_path / 'eight.png', tmp_path / 'out')
    assert 'eight.png has 8 bits, but the run was trained on images with values of about' in fault
    with pytest.raises(DataError, match=r'an array of shape \(48, 48\) has 8 bits'):
        predictors.predict_array(predictor, np.zeros((48, 48), np.uint8))
    for n in range(3):
        (root / 'images' / f'p{n}.png').unlink()
        noise(root / 'images' / f'p{n}.png', (48, 48))
    with pytest.raises(DataError, match=r'3 of 8 patients have 8-bit images \(p'):
        loop.train_and_evaluate(config, str(tmp_path / 'mixed'))


def a_ct(path, shape=(96, 96, 40), kind=np.int16):
    nibabel = pytest.importorskip('nibabel', reason='NIfTI is read by nibabel')
    values = np.random.default_rng(0).integers(-1000, 1500, shape).astype(kind)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return path


def blind(images):
    """As quick as `bright`, and nothing for a component to be found in but noise."""
    share = (images.mean(-1) > 0.9).astype(np.float32)
    return np.stack([1 - share, share], axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize('kind', [np.int16, np.float32, np.uint8])
@pytest.mark.parametrize(
    ('changes', 'save', 'most'),
    [({}, ['mask', 'overlay'], 11), ({'predict.largest_component': True}, ['mask'], 18),
     ({'predict.min_size': 3}, ['mask'], 18), ({}, ['mask', 'probability'], 22)],
    ids=['mask', 'largest', 'smallest', 'probability'],
)  # fmt: skip
def test_a_volume_takes_no_more_memory_than_is_asked_for(
    tmp_path, monkeypatch, kind, changes, save, most
):
    """A CT of 512 x 512 x 300 in 0.7 GB, where it was 5 GB: 9 bytes a voxel for its mask."""
    path = a_ct(tmp_path / 'ct.nii.gz', kind=kind)
    predictor = predictors.Predictor(
        tiny_config(**{'eval.batch_size': 1, **changes}), blind, None, 3
    )
    asked, voxels, how = [], 96 * 96 * 40, {'predictor': predictor, 'save': save}
    monkeypatch.setattr(limits, 'check_room', lambda _, needed: asked.append(needed))
    stems = {path: tmp_path / 'out' / 'ct'}
    Image.init()
    tracemalloc.start()
    try:
        _, cases, faults = folders.read_cases(inputs.Group([path]), stems=stems, **how)
        assert not faults
        reading = tracemalloc.get_traced_memory()[1]
        held = cases[0].pictures[0].image.nbytes
        tracemalloc.reset_peak()
        masks = predictors.segment(predictor, cases, probabilities='probability' in save)
        predicted = [(case, *mask) for case, mask in zip(cases, masks, strict=True)]
        note_of = {stem: lambda state: None for stem in stems.values()}
        results.write_results((1, predicted, []), note_of=note_of, **how)
        working = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    little = 2**20  # of tables, of one slice, of what encoders hold
    assert reading < max(asked[0], held + asked[1]) + little
    assert working < held + asked[1] + little
    assert max(reading, working) < most * voxels + little


def test_what_does_not_fit_is_refused_before_it_is_read(bright_run, tmp_path, monkeypatch):
    noise(tmp_path / 'in' / 'a.png', (48, 48))
    a_ct(tmp_path / 'in' / 'ct.nii.gz')
    monkeypatch.setattr(limits, 'SMALL', 2**18)
    monkeypatch.setattr(limits, 'free_memory', lambda: 2**20)
    (fault,) = folders.predict_files(bright_run(), tmp_path / 'in', tmp_path / 'out', save=['mask'])
    assert 'ct.nii.gz needs 3 MB and 1 MB are free: close other programs or cut it up' in fault
    assert written(tmp_path / 'out') == {'a_mask.png'}


def test_what_does_not_fit_beside_others_is_done_by_itself(bright_run, tmp_path, monkeypatch):
    (tmp_path / 'in').mkdir()
    for name in 'abc':
        a_ct(tmp_path / 'in' / f'{name}.nii.gz', (16, 16, 4))
    free = iter([0, 2**30, 0])  # of a, b and c while others are in work; then there is room
    monkeypatch.setattr(limits, 'SMALL', 0)
    monkeypatch.setattr(limits, 'free_memory', lambda: next(free, 2**30))
    workdir, out = bright_run(), tmp_path / 'out'
    assert folders.predict_files(workdir, tmp_path / 'in', out, save=['mask']) == []
    assert written(out) == {f'{name}_mask.nii.gz' for name in 'abc'}


def test_the_slices_of_a_patient_are_measured_together_as_the_run_measures(tmp_path, rng):
    images = {}
    for name, shape in (('a_1', (20, 24)), ('a_2', (20, 24)), ('a_3', (24, 20))):
        images[tmp_path / f'{name}.png'] = rng.integers(0, 256, (*shape, 3), np.uint8)
        images[tmp_path / f'{name}.png'][:5] = 3  # dark: outside the head
    for path, image in images.items():
        Image.fromarray(image).save(path)
    paths, stems = [*images], {path: path.with_suffix('') for path in images}
    group = inputs.Group(paths[:2], paths[2:])
    predictor = predictors.Predictor(tiny_config(), None, None, 3, measured='buda')
    _, cases, faults = folders.read_cases(group, predictor=predictor, stems=stems)
    assert not faults
    first, second, third = images.values()
    expected = volumes.measure_head([np.stack([first, second]), third[None]])
    for case in cases:
        np.testing.assert_array_equal(case.intensity, expected)
    by_itself = inputs.Group(paths[:1])
    _, (alone,), _ = folders.read_cases(by_itself, predictor=predictor, stems=stems)
    np.testing.assert_array_equal(alone.intensity, volumes.measure_head([first[None]]))
