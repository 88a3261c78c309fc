"""Folders of pictures and masks: what masks mean, whose picture it is, every fault at once."""

import json

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.data import check, folder, volumes
from pspnet_jax.errors import DataError
from tests.conftest import tiny_config

LABELS = np.zeros((40, 48), np.uint8)
LABELS[5:15, 6:20] = 1
LABELS[20:30, 30:40] = 2


def write(root, name, image=None, mask=None, suffix='png'):
    """images/NAME.png and masks/NAME.png; noise, and a square of class 1 where nothing is given."""
    rng = np.random.default_rng(sum(map(ord, name)))
    if image is None:
        image = rng.integers(0, 255, (40, 48, 3), np.uint8)
    if mask is None:
        mask = (LABELS == 1) * np.uint8(255)
    for kind, pixels, ending in (('images', image, suffix), ('masks', mask, 'png')):
        path = root / kind / f'{name}.{ending}'
        path.parent.mkdir(parents=True, exist_ok=True)
        (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path)


def masks_of(slices):
    return [slices.read(int(key))[1] for key in slices.key]


def indexed(labels, palette):
    picture = Image.fromarray(labels, 'P')
    picture.putpalette(palette)
    return picture


COLORS = ('#000000', '#ff0000', '#00ff80')
TABLE = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 128]], np.uint8)


@pytest.mark.parametrize(
    ('mask', 'classes', 'options', 'expected'),
    [
        (LABELS, 3, {}, LABELS),
        ((LABELS == 1) * np.uint8(255), 2, {}, LABELS == 1),
        (np.where(LABELS == 2, 255, LABELS).astype(np.uint8), 2, {},
         np.where(LABELS == 2, 255, LABELS)),
        (indexed(LABELS, [0, 0, 0, 200, 0, 0, 0, 0, 200]), 3, {}, LABELS),
        (TABLE[LABELS], 3, {'mask_colors': COLORS}, LABELS),
        (np.dstack([TABLE[LABELS], np.full((40, 48), 255, np.uint8)]), 3,
         {'mask_colors': COLORS}, LABELS),
        (np.repeat(LABELS[..., None], 3, -1), 3, {}, LABELS),
        (LABELS.astype(np.uint16), 3, {}, LABELS),
        ((LABELS > 0) * np.uint8(128), 2, {'mask_format': 'binary'}, LABELS > 0),
        ((LABELS > 0).astype(np.uint16) * 65535, 2, {'mask_format': 'binary'}, LABELS > 0),
    ],
    ids=['index', '0/255', 'ignored', 'palette', 'RGB', 'RGBA', 'grey RGB', '16 bit', 'binary',
         'binary 16'],
)  # fmt: skip
def test_every_kind_of_mask_becomes_the_same_classes(tmp_path, mask, classes, options, expected):
    for name in ('a', 'b'):
        write(tmp_path, name, mask=mask)
    slices = folder.load(tmp_path, num_classes=classes, **options)
    for labels in masks_of(slices):
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(
    ('mask', 'classes', 'words'),
    [
        ((LABELS > 0) * np.uint8(128), 2, 'values 0, 128, the model has classes 0 to 1'),
        (LABELS, 2, 'model.num_classes must be 3'),
        ((LABELS > 0) * np.uint8(255), 4, 'data.mask_format="binary"'),
        (TABLE[LABELS], 3, 'the masks have colours .*#00ff80.*data.mask_colors'),
    ],
)
def test_what_could_mean_two_things_is_refused_with_the_choices(tmp_path, mask, classes, words):
    write(tmp_path, 'a', mask=mask)
    with pytest.raises(DataError, match=words):
        folder.load(tmp_path, num_classes=classes, ignore_label=254)


def test_a_colour_that_the_table_lacks_and_one_that_is_none_are_named(tmp_path):
    write(tmp_path, 'a', mask=TABLE[LABELS])
    with pytest.raises(DataError, match=r'#00ff80, which data\.mask_colors does not name'):
        folder.load(tmp_path, num_classes=3, mask_colors=COLORS[:2])
    with pytest.raises(DataError, match="'red': a colour is written #rrggbb"):
        folder.load(tmp_path, num_classes=3, mask_colors=('#000000', 'red'))


def test_jpeg_masks_are_refused_and_binary_repairs_them(tmp_path):
    write(tmp_path, 'a')
    Image.fromarray((LABELS == 1) * np.uint8(255)).save(tmp_path / 'masks' / 'a.jpg', quality=60)
    (tmp_path / 'masks' / 'a.png').unlink()
    with pytest.raises(DataError, match='a mask saved as JPEG'):
        folder.load(tmp_path)
    (mask,) = masks_of(folder.load(tmp_path, mask_format='binary'))
    assert (mask == (LABELS == 1)).mean() > 0.98


def test_every_fault_is_listed_at_once(tmp_path):
    for name in 'abcd':
        write(tmp_path, name)
    (tmp_path / 'masks' / 'a.png').unlink()
    Image.new('L', (48, 40)).save(tmp_path / 'masks' / 'z.png')
    path = tmp_path / 'images' / 'b.png'
    path.write_bytes(path.read_bytes()[:60])
    Image.new('L', (20, 40)).save(tmp_path / 'masks' / 'c.png')
    with pytest.raises(DataError) as caught:
        folder.load(tmp_path)
    message = str(caught.value)
    assert message.startswith('4 fault(s)')
    for words in ('a.png has no mask', 'z.png has no image', 'b.png', 'c.png are not of one size'):
        assert words in message


def test_pictures_without_patients_are_warned_of(tmp_path, caplog):
    for name in ('p1_a', 'p1_b'):
        write(tmp_path, name)
    with caplog.at_level('WARNING'):
        folder.load(tmp_path, group='(.+)_')
        assert not caplog.records
        folder.load(tmp_path)
    assert 'no data.group: each of 2 pictures counts as a patient of its own' in caplog.text
    assert 'the figures will be too good' in caplog.text


def scans_of(slices):
    return {
        volume.patient: [rows.tolist() for rows in volumes.scans(volume.scan, len(volume.mask))]
        for volume in volumes.iterate_volumes(slices)
    }


def test_pictures_of_a_patient_are_a_volume_where_their_slices_are_numbered(tmp_path, caplog):
    caplog.set_level('INFO')
    for name in ('p_2', 'p_10', 'p_1', 'q_7', 'q_8', 'q_20'):
        write(tmp_path, name, image=np.full((40, 48, 3), int(name[2:]), np.uint8))
    apart = folder.load(tmp_path, group='(.)_')
    assert scans_of(apart) == {'p': [[0], [1], [2]], 'q': [[0], [1], [2]]}
    assert '2 of 2 patients have several files; distances and components are of each' in caplog.text
    assert 'data.group="(.+)_(?P<slice>[0-9]+)"' in caplog.text
    alone = folder.load(tmp_path)
    assert all(rows == [[0]] for rows in scans_of(alone).values())

    caplog.clear()
    numbered = folder.load(tmp_path, group='(.)_(?P<slice>[0-9]+)')
    p, q = volumes.iterate_volumes(numbered)
    assert p.image[:, 0, 0, 0].tolist() == [1, 2, 10]  # in the order of their numbers
    assert scans_of(numbered) == {'p': [[0, 1], [2]], 'q': [[0, 1], [2]]}  # gaps part them
    assert q.mask.shape[0] == 3
    assert 'slices of 2 volumes, by their numbers; 2 lack some' in caplog.text

    table = tmp_path / 'patients.csv'
    rows = [f'{patient}_{n},{patient},{i}' for patient, numbers in
            {'p': (2, 10, 1), 'q': (7, 8, 20)}.items() for i, n in enumerate(numbers)]  # fmt: skip
    table.write_text('\n'.join(['stem,patient,slice', *rows]))
    p, _ = volumes.iterate_volumes(folder.load(tmp_path, group=str(table)))
    assert p.image[:, 0, 0, 0].tolist() == [2, 10, 1]
    assert [len(rows) for rows in volumes.scans(p.scan, 3)] == [3]


def test_slices_that_are_no_number_or_there_twice_are_named(tmp_path):
    for name in ('p_1', 'p_01', 'p_x'):
        write(tmp_path, name)
    with pytest.raises(DataError) as caught:
        folder.load(tmp_path, group='(.)_(?P<slice>.+)')
    assert 'p_01 and p_1 are both slice 1' in str(caught.value)
    assert "p_x is slice 'x' by data.group: it must be a number" in str(caught.value)


def test_each_volume_of_a_patient_is_a_scan(tmp_path):
    for kind, ending in (('images', (4, 6, 5, 1)), ('masks', (4, 6, 5))):
        (tmp_path / kind).mkdir()
        for name in ('p_before', 'p_after'):
            np.save(tmp_path / kind / f'{name}.npy', np.zeros(ending, np.uint8))
    slices = folder.load(tmp_path, group='(.)_')
    assert scans_of(slices) == {'p': [[0, 1, 2, 3], [4, 5, 6, 7]]}


def test_the_label_that_is_ignored_is_no_lesion(tmp_path):
    write(tmp_path, 'a', mask=LABELS)
    plain, ignoring = (
        folder.load(tmp_path, num_classes=3, ignore_label=label) for label in (255, 2)
    )
    assert plain.lesion_pixels.tolist() == [(LABELS > 0).sum()]
    assert ignoring.lesion_pixels.tolist() == [(LABELS == 1).sum()]


def test_patients_by_expression_and_by_table(tmp_path):
    for name in ('p1_a', 'p1_b', 'p2_a'):
        write(tmp_path, name)
    slices = folder.load(tmp_path, group='(.+)_')
    assert slices.patient.tolist() == ['p1', 'p1', 'p2']
    assert slices.slice.tolist() == [0, 1, 0]
    table = tmp_path / 'patients.csv'
    table.write_text('stem,patient\np1_a,x\np1_b,y\np2_a,x\n')
    slices = folder.load(tmp_path, group=str(table))
    assert slices.patient.tolist() == ['x', 'x', 'y']
    both = np.concatenate([np.array(Image.open(tmp_path / 'images' / f'{n}.png')).reshape(-1, 3)
                           for n in ('p1_a', 'p2_a')])  # fmt: skip
    np.testing.assert_array_equal(slices.intensity['x'], volumes.measure_intensity(both))
    table.write_text('stem,patient\np1_a,x\n')
    with pytest.raises(DataError, match='p1_b has no patient'):
        folder.load(tmp_path, group=str(table))
    for group, words in (('(', 'no regular expression'), ('p', 'has no group')):
        with pytest.raises(DataError, match=words):
            folder.load(tmp_path, group=group)


def test_folders_stack_as_channels(tmp_path, rng):
    images = {kind: rng.integers(0, 255, (40, 48), np.uint8) for kind in ('t1', 'flair')}
    for kind, image in images.items():
        write(tmp_path, 'a', image=image)
        (tmp_path / 'images').rename(tmp_path / kind)
    image, _ = folder.load(tmp_path, images=('flair', 't1')).read(0)
    np.testing.assert_array_equal(image, np.dstack([images['flair'], images['t1']]))
    Image.new('L', (48, 40)).save(tmp_path / 't1' / 'b.png')
    with pytest.raises(DataError, match=r'b is in .*t1 and not in .*flair'):
        folder.load(tmp_path, images=('flair', 't1'))


def test_a_file_of_annotations_stands_for_the_masks(tmp_path):
    write(tmp_path, 'a')
    region = {
        'shape_attributes': {'name': 'rect', 'x': 6, 'y': 5, 'width': 14, 'height': 10},
        'region_attributes': {'type': 'tumor'},
    }
    entry = {'filename': 'a.png', 'size': 1, 'regions': [region], 'file_attributes': {}}
    (tmp_path / 'via.json').write_text(json.dumps({'a.png1': entry}))
    (mask,) = masks_of(folder.load(tmp_path, masks='via.json'))
    np.testing.assert_array_equal(mask, LABELS == 1)


def test_volumes_bring_their_slices_and_their_spacing(tmp_path, rng):
    nibabel = pytest.importorskip('nibabel')
    affine = np.diag([-0.9, -0.8, 3.0, 1.0])  # already in the order in which slices are taken
    for name in ('a', 'b'):
        for kind, values in (
            ('images', rng.integers(0, 900, (24, 20, 5)).astype(np.int16)),
            ('masks', (rng.random((24, 20, 5)) > 0.5).astype(np.uint8)),
        ):
            (tmp_path / kind).mkdir(exist_ok=True)
            nibabel.Nifti1Image(values, affine).to_filename(tmp_path / kind / f'{name}.nii.gz')
    slices = folder.load(tmp_path)
    assert slices.patient.tolist() == ['a'] * 5 + ['b'] * 5
    np.testing.assert_allclose(slices.spacing['a'], (3.0, 0.8, 0.9), rtol=1e-6)
    for volume, name in zip(volumes.iterate_volumes(slices), 'ab', strict=True):
        stored = nibabel.load(tmp_path / 'images' / f'{name}.nii.gz').get_fdata()
        np.testing.assert_array_equal(volume.image[..., 0], stored.transpose(2, 1, 0))
        truth = nibabel.load(tmp_path / 'masks' / f'{name}.nii.gz').get_fdata()
        np.testing.assert_array_equal(volume.mask, truth.transpose(2, 1, 0))
        assert volume.spacing == slices.spacing[name]


def test_missing_folders_and_empty_ones_are_named(tmp_path):
    with pytest.raises(DataError, match='put the pictures into'):
        folder.load(tmp_path)
    (tmp_path / 'images').mkdir()
    with pytest.raises(DataError, match='neither a folder of masks nor a file'):
        folder.load(tmp_path)
    (tmp_path / 'masks').mkdir()
    with pytest.raises(DataError, match='holds no picture'):
        folder.load(tmp_path)


def test_labels_keep_their_values_when_slices_are_resized(tmp_path):
    write(tmp_path, 'a', mask=LABELS)
    slices = folder.load(tmp_path, num_classes=3)
    image, mask = volumes.resized(slices, (20, 24)).read(0)
    assert image.shape == (20, 24, 3)
    assert image.dtype == np.uint8
    rows, columns = (np.arange(n) * 2 + np.arange(n) % 2 for n in (20, 24))  # of two, in turn
    np.testing.assert_array_equal(mask, LABELS[rows][:, columns])
    before = slices.read(0)[0].astype(np.float64)
    assert abs(image.mean() - before.mean()) < 1  # averaged, not sampled
    assert image.std() < 0.7 * before.std()


def config_of(root, **changes):
    small = {'data.name': 'folder', 'data.source': str(root), 'data.test_fraction': 0.25}
    return tiny_config(**{**small, **changes})


def test_check_finds_the_same_picture_in_two_parts(tmp_path, capsys, rng):
    for n in range(8):
        write(tmp_path, f'p{n}')
    check.check(config_of(tmp_path), tmp_path / 'out')
    printed = capsys.readouterr().out
    assert 'no fault found' in printed
    assert '40x48x3 uint8: 8' in printed
    sheet = np.array(Image.open(tmp_path / 'out' / 'contact_sheet.png'))
    assert sheet.shape[0] == 3 * check.CELL
    split = check.sources.load(config_of(tmp_path))[1]
    (a, *_), (b, *_) = split['train'], split['test']
    image = np.array(Image.open(tmp_path / 'images' / f'{a}.png')).astype(int)
    noisy = np.clip(image + rng.integers(-3, 4, image.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(tmp_path / 'images' / f'{b}.png')
    with pytest.raises(DataError, match=f'{a} and {b} are in two parts'):
        check.check(config_of(tmp_path), tmp_path / 'out')


def test_mixed_sizes_need_one_to_train_at(tmp_path):
    for n in range(6):
        write(tmp_path, f'p{n}')
    write(tmp_path, 'wide', np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), np.uint8))
    with pytest.raises(DataError, match=r'images are of 2 sizes .*set data\.size'):
        check.check(config_of(tmp_path), tmp_path / 'out')
    check.check(config_of(tmp_path, **{'data.size': (32, 32)}), tmp_path / 'out')


def test_a_class_that_no_pixel_has_is_named(tmp_path):
    for n in range(6):
        write(tmp_path, f'p{n}', mask=(LABELS == 1).astype(np.uint8))
    with pytest.raises(DataError, match=r'no pixel is of class 2: lower model\.num_classes'):
        check.check(config_of(tmp_path, **{'model.num_classes': 3}), tmp_path / 'out')
