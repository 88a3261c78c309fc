"""Prediction: files of the right size and values, and one bad picture stops no other."""

import contextlib
import resource
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pspnet_jax import checkpoint, models, predict, visualize
from pspnet_jax.config import to_dict
from pspnet_jax.data import files
from pspnet_jax.errors import CheckpointError, ConfigError, DataError
from tests.conftest import tiny_config, write_case


@pytest.fixture(scope='module')
def predictor(trained):
    return predict.load(trained[0])


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
    return {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}


def noise(path, size, seed=0, dtype=np.uint8, high=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, high, size, dtype)).save(path)


def test_a_folder_becomes_masks_overlays_and_panels(trained, tmp_path):
    write_case(tmp_path / 'in', 'case', slices=3)
    Image.new('L', (50, 37), 90).save(tmp_path / 'in' / 'photo.jpg')
    assert predict.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out') == []
    names = {str(path.relative_to(tmp_path / 'out')) for path in (tmp_path / 'out').rglob('*.*')}
    stems = ['case/case_1', 'case/case_2', 'case/case_3', 'photo']
    assert names == {f'{s}_{k}.png' for s in stems for k in ('mask', 'overlay', 'panels')}
    mask = np.array(Image.open(tmp_path / 'out' / 'photo_mask.png'))
    assert mask.shape == (37, 50)
    assert set(np.unique(mask)) <= {0, 255}
    assert Image.open(tmp_path / 'out' / 'photo_panels.png').size == (3 * 50 + 8, 37)


def test_one_slice_alone_is_predicted_as_within_its_volume(trained, tmp_path):
    folder = write_case(tmp_path / 'in', 'case', slices=4)
    predict.predict_files(trained[0], folder, tmp_path / 'all')
    predict.predict_files(trained[0], folder / 'case_2.tif', tmp_path / 'one')
    assert {path.name for path in (tmp_path / 'one').iterdir()} == {
        f'case_2_{kind}.png' for kind in ('mask', 'overlay', 'panels')
    }
    one, among = (
        np.array(Image.open(tmp_path / name / 'case_2_mask.png')) for name in ('one', 'all')
    )
    assert (one == among).mean() > 0.999  # the same scale; batches of another size round otherwise


def test_a_bad_picture_is_reported_and_the_others_done(trained, tmp_path):
    folder = write_case(tmp_path / 'in', 'case', slices=2)
    (folder / 'case_1.tif').write_bytes(b'no tiff')
    faults = predict.predict_files(trained[0], folder, tmp_path / 'out')
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
        predict.predict_files(trained[0], source, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_slices_are_grouped_in_the_order_of_their_numbers():
    names = ['b_10.tif', 'b_9.tif', 'b_1.tif', 'a.png', 'c_1.png']
    groups = predict.group_slices([Path(name) for name in names])
    assert [[p.name for p in group] for group in groups] == [
        ['b_1.tif', 'b_9.tif', 'b_10.tif'], ['a.png'], ['c_1.png']
    ]  # fmt: skip


def test_pictures_show_the_mask_and_keep_the_rest():
    image = np.full((8, 8, 3), 100, np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 1
    for draw in (visualize.overlay, visualize.outline):
        picture = draw(image, mask)
        assert (picture[mask == 0] == 100).all()
        assert (picture[2, 2] != 100).any()
    assert (visualize.outline(image, mask)[3:5, 3:5] == 100).all()  # a line, not a filling
    assert (image == 100).all()  # the input is left alone
    panels = visualize.three_panels(image, mask)
    assert (panels[:, :8] == image).all()
    assert ((panels[:, 12:20] == 255).all(-1) == (mask == 1)).all()


def test_what_is_finished_is_skipped_and_what_is_not_is_done(trained, tmp_path):
    for i, name in enumerate(('a', 'b', 'sub/c')):
        noise(tmp_path / 'in' / f'{name}.png', (32, 32), i)
    out = tmp_path / 'out'
    predict.predict_files(trained[0], tmp_path / 'in', out)
    for name in written(out):
        (out / name).write_bytes(b'finished')
    (out / 'sub' / 'c_panels.png').unlink()
    predict.predict_files(trained[0], tmp_path / 'in', out)
    again = {name for name in written(out) if (out / name).read_bytes() != b'finished'}
    assert again == {f'sub/c_{kind}.png' for kind in ('mask', 'overlay', 'panels')}
    predict.predict_files(trained[0], tmp_path / 'in', out, overwrite=True)
    assert not [name for name in written(out) if (out / name).read_bytes() == b'finished']


def test_results_in_the_input_folder_are_not_input(trained, tmp_path):
    noise(tmp_path / 'a.png', (32, 32))
    save = ('mask', 'probability', 'overlay', 'outline', 'panels')
    predict.predict_files(trained[0], tmp_path, tmp_path, save=save)
    predict.predict_files(trained[0], tmp_path, tmp_path / 'below', save=save)
    assert len(written(tmp_path)) == 1 + 2 * len(save)
    noise(tmp_path / 'below' / 'x.png', (32, 32))  # whatever is in the output folder
    assert predict.find_files(tmp_path, tmp_path / 'below') == (tmp_path, [tmp_path / 'a.png'])


def test_patterns_name_files_and_folders(tmp_path):
    for name in ('p1/a.png', 'p1/b.jpg', 'p2/a.png', 'p2/deep/c.png', 'other.png'):
        noise(tmp_path / name, (4, 4))

    def found(pattern):
        root, paths = predict.find_files(f'{tmp_path}/{pattern}')
        return root, [str(path.relative_to(tmp_path)) for path in paths]

    assert found('p*/*.png') == (tmp_path, ['p1/a.png', 'p2/a.png'])
    assert found('p2/**/*.png') == (tmp_path / 'p2', ['p2/a.png', 'p2/deep/c.png'])
    assert found('p[2]') == (tmp_path, ['p2/a.png', 'p2/deep/c.png'])
    with pytest.raises(DataError, match='holds no picture'):
        found('*.gif')


def test_a_folder_of_dicom_files_is_one_volume_and_keeps_its_name(tmp_path):
    for name in ('p1/1.dcm', 'p1/2.dcm', 'p2/1.DCM', 'p2/beside.png', '.hidden.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    root, found = predict.find_files(tmp_path)
    assert (root, found) == (tmp_path, [tmp_path / name for name in ('p1', 'p2', 'p2/beside.png')])
    stems, _ = predict.name_results(root, found)
    assert [str(stem) for stem in stems.values()] == ['p1', 'p2', 'p2/beside']
    root, found = predict.find_files(tmp_path / 'p1')  # the series itself
    assert predict.name_results(root, found) == ({tmp_path / 'p1': Path('p1')}, [])


def test_channels_are_stacked_as_the_run_reads_them(predictor, tmp_path, rng):
    """nnU-Net's names: what trains can be predicted, a picture a case."""
    channels = rng.integers(0, 255, (2, 2, 40, 48), np.uint8)
    for case, several in zip('ab', channels, strict=True):
        for n, pixels in enumerate(several):
            Image.fromarray(pixels).save(tmp_path / f'{case}_{n:04}.png')
    images = ('in/{stem}_0000', 'in/{stem}_0001')
    found = sorted(tmp_path.iterdir())
    stacks = predict.stack_channels(found, images)
    first = [tmp_path / 'a_0000.png', tmp_path / 'b_0000.png']
    assert list(stacks) == first
    assert predict.stack_channels(first[:1], images) == {first[0]: (first[0], found[1])}
    assert list(predict.stack_channels(found, ('in',))) == found
    two = predictor._replace(channels=2)
    _, cases, faults = predict.read_cases(
        first[1:], predictor=two, stems={path: path for path in first}, channels=stacks
    )
    assert not faults
    np.testing.assert_array_equal(cases[0].image[0], np.moveaxis(channels[1], 0, -1))
    (tmp_path / 'b_0001.png').unlink()
    stacks = predict.stack_channels(first[1:], images)
    _, _, (fault,) = predict.read_cases(
        first[1:], predictor=two, stems={path: path for path in first}, channels=stacks
    )
    assert 'has 1 channels, the network takes 2' in fault


def test_two_inputs_of_one_name_do_not_overwrite_each_other(trained, tmp_path):
    for name in ('a.png', 'a.jpg'):
        noise(tmp_path / 'in' / name, (32, 32))
    (fault,) = predict.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out')
    assert 'a.png would overwrite the results of' in fault
    assert 'a.jpg: rename one' in fault


def test_pictures_of_many_sizes_are_predicted_as_each_alone(trained, predictor, tmp_path):
    sizes = {'a': (40, 32), 'b': (32, 40), 'c': (40, 32), 'd': (36, 36), 'e': (32, 40)}
    for i, (name, size) in enumerate(sizes.items()):
        noise(tmp_path / 'in' / f'{name}.png', size, i)
    predict.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out', save=['probability'])
    for name, size in sizes.items():
        _, prob = predict.predict_array(
            predictor, np.array(Image.open(tmp_path / f'in/{name}.png'))
        )
        picture = np.array(Image.open(tmp_path / 'out' / f'{name}_probability.png'))
        assert picture.shape == size
        np.testing.assert_allclose(picture / 65535, prob[..., 1], atol=1e-4)


def test_deep_pictures_are_predicted_as_they_are_and_shown_in_8_bits(trained, predictor, tmp_path):
    noise(tmp_path / 'in' / 'deep.png', (40, 32), dtype=np.uint16, high=4000)
    predict.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out', save=['mask', 'panels'])
    pixels = files.read(tmp_path / 'in' / 'deep.png').image[0]
    assert pixels.max() > 3000
    labels, _ = predict.predict_array(predictor, pixels)
    np.testing.assert_array_equal(Image.open(tmp_path / 'out' / 'deep_mask.png'), 255 * labels)
    shown = np.array(Image.open(tmp_path / 'out' / 'deep_panels.png'))[:, :32, 0]
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
    assert predict.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out', save=save) == []
    assert written(tmp_path / 'out') == {
        'scan_mask.nii.gz', 'scan_probability.nii.gz', 'scan_overlay.png'
    }  # fmt: skip
    mask = nibabel.load(tmp_path / 'out' / 'scan_mask.nii.gz')
    prob = nibabel.load(tmp_path / 'out' / 'scan_probability.nii.gz').get_fdata()
    np.testing.assert_allclose(mask.affine, affine)
    assert mask.shape == prob.shape == voxels.shape
    np.testing.assert_array_equal(np.asarray(mask.dataobj), prob > 0.5)
    # The network saw slices from feet to head: the file's second axis is the third here.
    _, expected = predict.predict_array(predictor, files.read(source).image)
    ours = files.read(tmp_path / 'out' / 'scan_probability.nii.gz').image[..., 0]
    np.testing.assert_allclose(ours, expected[..., 1], atol=1e-4)


def test_pages_and_arrays_give_pages_and_arrays(trained, tmp_path, rng):
    pages = rng.integers(0, 255, (3, 32, 40), np.uint8)
    (tmp_path / 'in').mkdir()
    first, *others = map(Image.fromarray, pages)
    first.save(tmp_path / 'in' / 'pages.tif', save_all=True, append_images=others)
    np.save(tmp_path / 'in' / 'array.npy', pages[..., None])
    predict.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out', save=['mask'])
    mask = np.load(tmp_path / 'out' / 'array_mask.npy')
    assert mask.shape == pages.shape
    with Image.open(tmp_path / 'out' / 'pages_mask.tif') as picture:
        for d in range(3):
            picture.seek(d)
            np.testing.assert_array_equal(picture, 255 * mask[d])


def test_a_full_disk_stops_it_with_one_line_and_leaves_nothing_half_written(trained, tmp_path):
    for name in ('a', 'b'):
        noise(tmp_path / 'in' / f'{name}.png', (64, 64, 3))
    predict.predict_files(trained[0], tmp_path / 'in', tmp_path / 'compiled')
    with full_disk(2000), pytest.raises(DataError, match=r'can not be written .*: free some space'):
        predict.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out')
    for name in written(tmp_path / 'out'):  # a small mask may be whole
        Image.open(tmp_path / 'out' / name).load()
        assert not Path(name).name.startswith('.')
    assert written(tmp_path) - {f'out/{name}' for name in written(tmp_path / 'out')} == {
        'in/a.png', 'in/b.png', *(f'compiled/{n}' for n in written(tmp_path / 'compiled'))
    }  # fmt: skip
    assert predict.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out') == []  # goes on
    for name in written(tmp_path / 'compiled'):
        ours, theirs = ((tmp_path / k / name).read_bytes() for k in ('out', 'compiled'))
        assert ours == theirs


def test_options_of_the_config_and_of_the_call(trained, tmp_path):
    noise(tmp_path / 'in' / 'a.png', (48, 40, 3), high=200)

    def mask(**changes):
        out = tmp_path / 'out'
        predict.predict_files(
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


def test_an_ensemble_of_a_run_and_itself_is_the_run(trained, predictor, rng):
    image = rng.integers(0, 255, (40, 32, 3), np.uint8)
    _, alone = predict.predict_array(predictor, image)
    _, twice = predict.predict_array(predict.load([trained[0], trained[0]]), image)
    np.testing.assert_allclose(twice, alone, atol=1e-5)


def save_run(workdir, config, normalization=None):
    """A checkpoint of zeros."""
    model = models.create(**config.model)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    state = types.SimpleNamespace(ema_params={}, opt_state={}, **jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), shapes))  # fmt: skip
    with contextlib.closing(checkpoint.Writer(workdir)) as writer:
        checkpoint.save(
            writer, 1, state, config=to_dict(config), progress={}, dice=None,
            inputs={'channels': 3, 'normalization': normalization},
        )  # fmt: skip
    return workdir


def test_runs_of_different_networks_are_refused_by_the_keys_that_differ(trained, tmp_path):
    other = save_run(tmp_path / 'wide', tiny_config(**{'model.width': 8, 'model.aux_head': False}))
    with pytest.raises(
        CheckpointError, match=r'aux_head is True there, False here; model.width is'
    ):
        predict.load([trained[0], other])
    imagenet = {'mean': [1.0] * 3, 'std': [1.0] * 3, 'trained_order': 'RGB'}
    other = save_run(tmp_path / 'weights', tiny_config(), imagenet)
    with pytest.raises(CheckpointError, match='normalised in two ways'):
        predict.load([trained[0], other])
    names = tiny_config(**{'model.class_names': ('background', 'lesion')})
    predict.load([trained[0], save_run(tmp_path / 'names', names)])  # not part of the network


def test_channels_that_do_not_fit_are_named(trained, tmp_path, predictor):
    np.save(tmp_path / 'four.npy', np.zeros((1, 32, 32, 4), np.uint8))
    (fault,) = predict.predict_files(trained[0], tmp_path, tmp_path / 'out')
    assert 'four.npy has 4 channels, the network takes 3' in fault
    grey = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    colour = predict.fit_channels(grey, 3, 'x')
    assert (colour == grey).all()
    np.testing.assert_array_equal(predict.fit_channels(colour, 1, 'x'), grey)
    with pytest.raises(DataError, match='x has 3 channels, the network takes 1'):
        predict.fit_channels(colour * np.uint8([1, 2, 1]), 1, 'x')
    with pytest.raises(DataError, match='is no image'):
        predict.predict_array(predictor, np.zeros(5))


def test_an_album_is_no_volume(tmp_path, monkeypatch):
    groups = [[tmp_path / f'a_{i}.png' for i in (1, 2)], [tmp_path / f'b_{i}.png' for i in (1, 2)]]
    noise(groups[0][0], (20, 20, 3))
    noise(groups[1][0], (10, 10, 3))
    monkeypatch.setattr(predict, 'VOLUME_BYTES', 2 * 20 * 20 * 3 - 1)
    assert predict.split_albums(groups) == [[groups[0][0]], [groups[0][1]], groups[1]]


def test_threads_keep_the_order_and_pass_errors_on():
    assert list(predict.in_threads(lambda x: x * x, range(20), 3)) == [x * x for x in range(20)]
    assert list(predict.ahead(iter('abc'))) == ['a', 'b', 'c']
    inverses = predict.in_threads(lambda x: 1 / (3 - x), range(10), 1)
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
