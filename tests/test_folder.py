"""Folders of pictures and masks: what masks mean, whose picture it is, every fault at once."""

import json
import re
import signal
import unicodedata
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.config import folder as own_pictures
from pspnet_jax.config import from_dict, to_dict, validate
from pspnet_jax.data import folder, sources, volumes
from pspnet_jax.evaluation import visualize
from pspnet_jax.runtime.errors import ConfigError, DataError
from pspnet_jax.training import check, start
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
        ((LABELS > 0) * np.uint8(128), 2, 'values 0, 128, but model.num_classes is 2'),
        (LABELS, 2, r'have 3 classes \(0, 1, 2\) but .* is 2: add --config.model.num_classes=3'),
        ((LABELS > 0) * np.uint8(255), 4, 'data.mask_format="binary"'),
        (TABLE[LABELS], 3, r'the masks have 3 colours.*data.mask_colors=.\("#000000", "#00ff80"'),
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
    for words in ('a.png has no mask', 'z.png has no image', 'b.png', 'c.png have different sizes'):
        assert words in message


def test_a_fault_in_the_values_hides_no_other(tmp_path):
    for name in 'abcde':
        write(tmp_path, name)
    Image.fromarray((LABELS == 1) * np.uint8(7)).save(tmp_path / 'masks' / 'a.png')
    (tmp_path / 'masks' / 'b.png').write_bytes(b'')
    path = tmp_path / 'images' / 'c.png'
    path.write_bytes(path.read_bytes()[:60])
    Image.new('L', (20, 40)).save(tmp_path / 'masks' / 'd.png')
    (tmp_path / 'masks' / 'e.png').unlink()
    with pytest.raises(DataError) as caught:
        folder.load(tmp_path)
    assert len(caught.value.faults) == 5
    for words in (
        'masks have the values 0, 7, 255',
        'b.png is not a readable picture',
        'c.png is not a readable picture',
        'd.png have different sizes',
        'e.png has no mask',
    ):
        assert words in str(caught.value)


def test_masks_of_0_and_1_beside_masks_of_0_and_255(tmp_path, caplog):
    for n, name in enumerate('abcd'):
        write(tmp_path, name, mask=(LABELS == 1) * np.uint8(255 if n % 2 else 1))
    with caplog.at_level('INFO'):
        slices = folder.load(tmp_path)
    assert 'above 0.5 in 2 files, 127.5 in 2 files' in caplog.text
    for mask in masks_of(slices):
        np.testing.assert_array_equal(mask, LABELS == 1)


def test_a_label_map_reaches_the_masks(tmp_path):
    write(tmp_path, 'a', mask=LABELS * np.uint8(2))
    config = config_of(tmp_path, **{'data.label_map': {2: 1, 4: 2}, 'model.num_classes': 3})
    validate(config)
    for kept in (config, from_dict(to_dict(config))):  # as a checkpoint keeps it
        (mask,) = masks_of(sources.read_folder(kept))
        np.testing.assert_array_equal(mask, LABELS)
    config = config_of(tmp_path, **{'data.label_map': {'>0': 1}})
    (mask,) = masks_of(sources.read_folder(config))
    np.testing.assert_array_equal(mask, LABELS > 0)


def test_one_name_in_several_folders_is_several_pictures(tmp_path, rng):
    for patient, part in (('p1', LABELS == 1), ('p2', LABELS == 2)):
        write(tmp_path, f'{patient}', mask=part * np.uint8(255))
        for kind in ('images', 'masks'):
            (tmp_path / kind / patient).mkdir()
            (tmp_path / kind / f'{patient}.png').rename(tmp_path / kind / patient / '1.png')
    slices = folder.load(tmp_path)
    assert slices.patient.tolist() == ['p1_1', 'p2_1']
    for mask, label in zip(masks_of(slices), (1, 2), strict=True):
        np.testing.assert_array_equal(mask, label == LABELS)
    slices = folder.load(tmp_path, group='(.+)/')
    assert slices.patient.tolist() == ['p1', 'p2']
    write(tmp_path, 'p1_1')
    with pytest.raises(DataError, match='p1/1 and p1_1 would both be the patient p1_1'):
        folder.load(tmp_path)


def test_names_that_differ_in_their_composition_pair(tmp_path):
    write(tmp_path, 'Läsion')
    for kind, form in (('images', 'NFD'), ('masks', 'NFC')):
        path = tmp_path / kind / 'Läsion.png'
        path.rename(path.with_name(unicodedata.normalize(form, path.name)))
    table = tmp_path / 'patients.csv'
    table.write_text(unicodedata.normalize('NFD', 'stem,patient\nLäsion,x\n'), encoding='utf-8')
    assert folder.load(tmp_path, group=str(table)).patient.tolist() == ['x']


def rename_masks(root, pattern):
    for path in list((root / 'masks').iterdir()):
        path.rename(path.with_name(pattern.format(path.stem) + path.suffix))


@pytest.mark.parametrize('rule', ['{stem}_segmentation', 'seg_{stem}', '{stem}_mask.png'])
def test_masks_of_other_names_are_hinted_at_and_paired_by_the_rule(tmp_path, rule):
    for name in ('a1', 'b2', 'c3'):
        write(tmp_path, name)
    rename_masks(tmp_path, rule.removesuffix('.png').replace('{stem}', '{}'))
    with pytest.raises(DataError) as caught:
        folder.load(tmp_path)
    (fault,) = caught.value.faults
    assert 'no image in' in fault
    assert f'{rule.removesuffix(".png")}' in fault
    slices = folder.load(tmp_path, mask_name=rule)
    assert slices.patient.tolist() == ['a1', 'b2', 'c3']


def test_pictures_and_masks_in_one_folder(tmp_path):
    for name in ('a1', 'b2'):
        write(tmp_path, name)
    rename_masks(tmp_path, '{}_mask')
    for path in (tmp_path / 'masks').iterdir():
        path.rename(tmp_path / 'images' / path.name)
    options = {'images': ('.',), 'masks': '.'}
    with pytest.raises(DataError, match=r'holds both images and masks: tell how.*{stem}_mask'):
        folder.load(tmp_path / 'images', **options)
    slices = folder.load(tmp_path / 'images', **options, mask_name='{stem}_mask')
    assert slices.patient.tolist() == ['a1', 'b2']
    for mask in masks_of(slices):
        np.testing.assert_array_equal(mask, LABELS == 1)
    nested = folder.load(tmp_path, images=('.',), masks='.', mask_name='{stem}_mask')
    assert nested.patient.tolist() == ['a1', 'b2']


def test_masks_below_the_pictures_are_no_pictures(tmp_path):
    write(tmp_path, 'a')
    (tmp_path / 'masks').rename(tmp_path / 'images' / 'truth')
    slices = folder.load(tmp_path, masks='images/truth')
    assert slices.patient.tolist() == ['a']


def test_channels_in_one_folder_by_their_names(tmp_path, rng):
    """nnU-Net's layout."""
    images = {}
    for case in ('liver_1', 'liver_2'):
        for channel in range(2):
            name = f'{case}_{channel:04}'
            images[name] = rng.integers(0, 255, (40, 48), np.uint8)
            write(tmp_path, name, image=images[name])
        (tmp_path / 'masks' / f'{case}_0000.png').rename(tmp_path / 'masks' / f'{case}.png')
        (tmp_path / 'masks' / f'{case}_0001.png').unlink()
    with pytest.raises(DataError) as caught:
        folder.load(tmp_path)
    (fault,) = caught.value.faults
    given = re.search(r"--config\.data\.images='(.+?)' pairs 2 of 2", fault)[1]
    slices = folder.load(tmp_path, images=literal_eval(given))
    assert slices.patient.tolist() == ['liver_1', 'liver_2']
    both = np.dstack([images['liver_2_0000'], images['liver_2_0001']])
    np.testing.assert_array_equal(slices.read(1)[0], both)
    with pytest.raises(DataError, match=r'{stem}_x matches no image in .*images'):
        folder.load(tmp_path, images=('images/{stem}_x',))


def test_several_masks_of_a_picture_are_laid_over_one_another(tmp_path):
    write(tmp_path, 'a', mask=(LABELS == 1) * np.uint8(255))
    write(tmp_path, 'a_2', mask=(LABELS == 2) * np.uint8(1))
    (tmp_path / 'images' / 'a_2.png').unlink()
    (tmp_path / 'masks' / 'a.png').rename(tmp_path / 'masks' / 'a_1.png')
    with pytest.raises(DataError, match=re.escape("--config.data.mask_name='{stem}_*'")):
        folder.load(tmp_path)
    (mask,) = masks_of(folder.load(tmp_path, mask_name='{stem}_*'))
    np.testing.assert_array_equal(mask, LABELS > 0)


def test_further_masks_beside_those_that_pair_are_hinted_at(tmp_path):
    for name, label in (('a', 1), ('a_2', 2), ('b', 1)):
        write(tmp_path, name, mask=(label == LABELS) * np.uint8(255))
    (tmp_path / 'images' / 'a_2.png').unlink()
    with pytest.raises(DataError, match=re.escape("--config.data.mask_name='{stem}*'")):
        folder.load(tmp_path)
    a, b = masks_of(folder.load(tmp_path, mask_name='{stem}*'))
    np.testing.assert_array_equal(a, LABELS > 0)
    np.testing.assert_array_equal(b, LABELS == 1)


@pytest.mark.parametrize('group', ['', '(.)'])
def test_grey_pictures_among_rgb_ones_have_three_equal_channels(tmp_path, rng, caplog, group):
    grey, colour = rng.integers(0, 255, (40, 48), np.uint8), rng.integers(0, 255, (40, 48, 3))
    write(tmp_path, 'p1', image=grey)
    write(tmp_path, 'p2', image=colour.astype(np.uint8))
    with caplog.at_level('INFO'):
        slices = folder.load(tmp_path, group=group)
    assert 'grey becomes three equal channels' in caplog.text
    assert slices.channels == 3
    np.testing.assert_array_equal(slices.read(0)[0], np.dstack([grey] * 3))
    np.testing.assert_array_equal(slices.read(1)[0], colour)
    shown = [np.dstack([grey] * 3), colour]
    for patient, measured in slices.intensity.items():
        own = shown if group else [shown[int(patient[1]) - 1]]
        expected = volumes.measure_intensity(np.stack(own))
        np.testing.assert_allclose(measured, expected, rtol=1e-6)


def turn(root, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = root / 'images' / f'{name}.png'
    with Image.open(path) as picture:
        picture.load()
    picture.save(path, exif=exif)


def test_a_mask_that_is_not_turned_as_its_picture_names_exif(tmp_path):
    write(tmp_path, 'a')
    turn(tmp_path, 'a', 6)
    with pytest.raises(DataError, match=r'a\.png is rotated by its EXIF orientation \(6\)') as told:
        folder.load(tmp_path)
    assert 'exiftool -Orientation=' in str(told.value)
    upright = np.rot90(LABELS == 1, -1) * np.uint8(255)
    Image.fromarray(upright).save(tmp_path / 'masks' / 'a.png')
    (mask,) = masks_of(folder.load(tmp_path))
    np.testing.assert_array_equal(mask, upright > 0)


def test_where_turned_and_unturned_are_of_one_size_it_is_said(tmp_path, caplog):
    for name in ('a', 'b'):
        write(tmp_path, name)
    turn(tmp_path, 'a', 3)
    folder.load(tmp_path)
    assert '1 images' in caplog.text
    assert 'rotated or mirrored by their EXIF orientation and read upright' in caplog.text


def test_pictures_without_patients_are_warned_of(tmp_path, caplog):
    for name in ('p1_a', 'p1_b'):
        write(tmp_path, name)
    with caplog.at_level('WARNING'):
        folder.load(tmp_path, group='(.+)_')
        assert not caplog.records
        folder.load(tmp_path)
    assert 'no data.group: each of 2 images counts as a separate patient' in caplog.text
    assert 'results will be too optimistic' in caplog.text


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
    assert '2 of 2 patients have several files; distances and components are per' in caplog.text
    assert 'data.group="(.+)_(?P<slice>[0-9]+)"' in caplog.text
    alone = folder.load(tmp_path)
    assert all(rows == [[0]] for rows in scans_of(alone).values())

    caplog.clear()
    numbered = folder.load(tmp_path, group='(.)_(?P<slice>[0-9]+)')
    p, q = volumes.iterate_volumes(numbered)
    assert p.image[:, 0, 0, 0].tolist() == [1, 2, 10]  # in the order of their numbers
    assert scans_of(numbered) == {'p': [[0, 1], [2]], 'q': [[0, 1], [2]]}  # gaps part them
    assert q.mask.shape[0] == 3
    assert 'numbered slices of 2 volumes; 2 of them have gaps' in caplog.text

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
    assert "p_x has the slice number 'x' by data.group, which is not a number" in str(caught.value)


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
    for group, words in (('(', 'is not a regular expression'), ('p', 'has no group')):
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
    with pytest.raises(DataError, match=r'b is in .*t1 but not in .*flair'):
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


BOXES = {'bone': (2, 2), 'muscle': (20, 2), 'tumor': (2, 20)}  # x, y of squares of 10 pixels


def squares(*names):
    """The mask of these classes, numbered as in BOXES."""
    mask = np.zeros((40, 48), np.uint8)
    for name in names:
        x, y = BOXES[name]
        mask[y : y + 10, x : x + 10] = list(BOXES).index(name) + 1
    return mask


def annotate(root, tool, names, pictures='abcdef'):
    """images/, and annotations of these classes on each picture: what data.masks is then."""
    outlines = {}
    for name in names:
        x, y = BOXES[name]
        outlines[name] = [(x, y), (x + 10, y), (x + 10, y + 10), (x, y + 10)]
    for stem in pictures:
        write(root, stem, mask=np.zeros((40, 48), np.uint8))
    if tool == 'labelme':
        for stem in pictures:
            shapes = [
                {'label': name, 'points': points, 'shape_type': 'polygon'}
                for name, points in outlines.items()
            ]
            tree = {'shapes': shapes, 'imagePath': f'../images/{stem}.png'}
            (root / 'drawn' / 'reader').mkdir(parents=True, exist_ok=True)
            (root / 'drawn' / 'reader' / f'{stem}.json').write_text(json.dumps(tree))
        return 'drawn'
    if tool == 'COCO':
        tree = {'images': [], 'annotations': [], 'categories': []}
        tree['categories'] = [{'id': 3 * n, 'name': name} for n, name in enumerate(BOXES, 1)]
        for n, stem in enumerate(pictures):
            tree['images'].append({'id': n, 'file_name': f'{stem}.png', 'height': 40, 'width': 48})
            for name, points in outlines.items():
                item = {'image_id': n, 'category_id': 3 * (list(BOXES).index(name) + 1)}
                item['segmentation'] = [[number for point in points for number in point]]
                tree['annotations'].append(item)
    else:
        tree = {}
        for stem in pictures:
            regions = [
                {
                    'shape_attributes': {
                        'name': 'polygon',
                        'all_points_x': [x for x, _ in points],
                        'all_points_y': [y for _, y in points],
                    },
                    'region_attributes': {'type': name} if tool == 'VIA' else {},
                }
                for name, points in outlines.items()
            ]
            tree[stem] = {'filename': f'{stem}.png', 'regions': regions}
    (root / 'drawn.json').write_text(json.dumps(tree))
    return 'drawn.json'


RUN = ('background', *BOXES)


@pytest.mark.parametrize('tool', ['COCO', 'VIA', 'labelme'])
def test_the_numbers_of_classes_do_not_depend_on_which_of_them_occur(tmp_path, tool):
    classes = {name: number for number, name in enumerate(RUN)}
    masks = annotate(tmp_path / 'train', tool, BOXES)
    slices = folder.load(tmp_path / 'train', masks=masks, num_classes=4)
    assert slices.class_names == RUN
    assert volumes.select(slices, ['a']).class_names == RUN
    np.testing.assert_array_equal(masks_of(slices)[0], squares(*BOXES))

    annotate(tmp_path / 'test', tool, ['muscle', 'tumor'])
    given = folder.load(tmp_path / 'test', masks=masks, num_classes=4, classes=classes)
    assert given.class_names == RUN
    np.testing.assert_array_equal(masks_of(given)[0], squares('muscle', 'tumor'))
    alone = folder.load(tmp_path / 'test', masks=masks, num_classes=4)
    if tool == 'COCO':  # its categories say it
        np.testing.assert_array_equal(masks_of(alone)[0], squares('muscle', 'tumor'))
    else:
        assert alone.class_names == ('background', 'muscle', 'tumor', 'class 3')
    with pytest.raises(DataError, match=r"not classes: 'tumor' \(6 regions\); the classes are "
                       "'background', 'bone', 'muscle': rename or remove"):  # fmt: skip
        folder.load(tmp_path / 'test', masks=masks, classes={'bone': 1, 'muscle': 2}, num_classes=3)


def test_a_run_that_does_not_name_its_classes_is_not_evaluated_on_annotations_of_several(tmp_path):
    masks = annotate(tmp_path, 'VIA', BOXES)
    config = config_of(tmp_path, **{'data.masks': masks, 'model.num_classes': 4})
    slices = sources.read_folder(config)
    with pytest.raises(DataError, match=r'--classes=bone=NUMBER,muscle=NUMBER,tumor=NUMBER'):
        sources.check_class_names(slices, config)
    config.model.class_names = RUN
    sources.check_class_names(sources.read_folder(config), config)
    annotate(tmp_path, 'VIA', ['tumor'])  # one structure can only be class 1
    config = config_of(tmp_path, **{'data.masks': masks})
    sources.check_class_names(sources.read_folder(config), config)


def test_regions_without_a_class_give_no_name(tmp_path):
    masks = annotate(tmp_path, 'nameless VIA', ['tumor'])
    slices = folder.load(tmp_path, masks=masks)
    assert slices.class_names == ()
    np.testing.assert_array_equal(masks_of(slices)[0], squares('tumor') > 0)


def test_too_few_classes_for_the_annotations_are_one_line(tmp_path):
    masks = annotate(tmp_path, 'COCO', ['bone', 'tumor'])
    with pytest.raises(DataError) as caught:
        folder.load(tmp_path, masks=masks)
    (told,) = caught.value.faults
    assert told == (
        "the annotations have 4 classes ('background' = 0, 'bone' = 1, 'muscle' = 2, 'tumor' = 3) "
        'but model.num_classes is 2: add --config.model.num_classes=4; or for those that are drawn '
        "--config.model.class_names='background,bone,tumor' --config.model.num_classes=3"
    )
    classes = {'background': 0, 'bone': 1, 'tumor': 2}  # which is what that remedy does
    slices = folder.load(tmp_path, masks=masks, classes=classes, num_classes=3)
    np.testing.assert_array_equal(
        masks_of(slices)[0], np.array([0, 1, 0, 2])[squares('bone', 'tumor')]
    )
    annotate(tmp_path, 'COCO', ['bone'])  # the others are only listed
    assert folder.load(tmp_path, masks=masks).class_names == ('background', 'bone')


def test_a_json_beside_masks_is_not_taken_for_annotations(tmp_path, caplog):
    write(tmp_path, 'a')
    for name in ('dataset.json', 'a.json', '.hidden.json'):
        (tmp_path / 'masks' / name).write_text('{"EchoTime": 0.03}')
    with caplog.at_level('INFO'):
        (mask,) = masks_of(folder.load(tmp_path))
    np.testing.assert_array_equal(mask, LABELS == 1)
    assert "skipped: other .json files among masks (2): 'a.json', 'dataset.json'" in caplog.text
    (tmp_path / 'masks' / 'a.png').unlink()
    with pytest.raises(DataError, match='is not VIA 1 or 2'):
        folder.load(tmp_path)


def test_pictures_beside_labelme_files_are_counted_unless_they_are_the_images(tmp_path, caplog):
    annotate(tmp_path, 'labelme', ['tumor'])
    for path in (tmp_path / 'drawn').rglob('*.json'):
        (tmp_path / 'images' / path.name).write_text(path.read_text())
    with caplog.at_level('INFO'):
        slices = folder.load(tmp_path, masks='images')
    np.testing.assert_array_equal(masks_of(slices)[0], squares('tumor') > 0)
    assert 'skipped: images' not in caplog.text
    Image.new('L', (48, 40)).save(tmp_path / 'drawn' / 'reader' / 'a.png')
    with caplog.at_level('INFO'):
        folder.load(tmp_path, masks='drawn')
    assert "skipped: images among labelme files (1): 'a.png'" in caplog.text


def test_what_is_odd_in_a_drawing_is_in_the_log(tmp_path, caplog):
    masks = annotate(tmp_path, 'COCO', ['tumor'])
    tree = json.loads((tmp_path / masks).read_text())
    tree['annotations'][0]['segmentation'] = [[-9, 2, 10, 2, 10, 9, -9, 9], [1, 1, 5, 5]]
    tree['annotations'][1]['segmentation'] = []
    (tmp_path / masks).write_text(json.dumps(tree))
    with caplog.at_level('INFO'):
        folder.load(tmp_path, masks=masks, num_classes=4)
    for words in (
        "'a.png', annotation 1 reaches 9.0 pixels out of the image: clipped",
        "or without area (1): 'a.png', annotation 1",
        "without an outline (a box is not an outline) (1): 'b.png', annotation 2",
    ):
        assert words in caplog.text


def test_regions_on_a_stack_of_pages_are_refused(tmp_path):
    masks = annotate(tmp_path, 'COCO', ['tumor'], 'a')
    pages = [Image.new('L', (48, 40), n) for n in range(3)]
    (tmp_path / 'images' / 'a.png').unlink()
    pages[0].save(tmp_path / 'images' / 'a.tif', save_all=True, append_images=pages[1:])
    text = (tmp_path / masks).read_text()
    (tmp_path / masks).write_text(text.replace('a.png', 'a.tif'))
    with pytest.raises(DataError, match=r'a\.tif has 3 slices, but regions are drawn on one'):
        folder.load(tmp_path, masks=masks, num_classes=4)


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


def test_the_range_of_what_has_not_8_bits_is_measured(tmp_path, rng):
    deep = rng.integers(0, 4096, (40, 48)).astype(np.uint16)
    write(tmp_path, 'deep', deep)
    write(tmp_path, 'eight', rng.integers(0, 255, (40, 48)).astype(np.uint8))
    real = rng.random((40, 48)).astype(np.float32)
    write(tmp_path, 'real', real, suffix='tif')
    slices = folder.load(tmp_path)
    assert slices.ranges.keys() == {'deep', 'real'}
    for name, image in (('deep', deep), ('real', real)):
        expected = np.percentile(image, (0.5, 99.5))[:, None]
        np.testing.assert_allclose(slices.ranges[name], expected, rtol=1e-6)


def test_missing_folders_and_empty_ones_are_named(tmp_path):
    with pytest.raises(DataError, match='put the images into'):
        folder.load(tmp_path)
    (tmp_path / 'images').mkdir()
    with pytest.raises(DataError, match='neither a folder of masks nor a file'):
        folder.load(tmp_path)
    (tmp_path / 'masks').mkdir()
    with pytest.raises(DataError, match='holds no images'):
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


def test_other_data_of_a_run_is_not_the_data_that_it_was_trained_on(tmp_path):
    """The Python interface gives whole paths, which must not lead back from --data=FOLDER."""
    for place, label in (('own', 1), ('other', 2)):
        write(tmp_path / place, f'{place}_0000', mask=(label == LABELS) * np.uint8(255))
        mask = tmp_path / place / 'masks' / f'{place}_0000.png'
        mask.rename(mask.with_name(f'{place}.png'))
    for place in (tmp_path / 'own', Path()):
        config = config_of(
            tmp_path / 'own',
            **{'data.images': (str(place / 'images' / '{stem}_0000'),)},
            **{'data.masks': str(place / 'masks')},
        )
        where = sources.elsewhere(config, str(tmp_path / 'other'))
        slices = sources.read_folder(config, **where)
        assert slices.patient.tolist() == ['other']
        np.testing.assert_array_equal(masks_of(slices)[0], LABELS == 2)


def test_check_finds_the_same_picture_in_two_parts(tmp_path, capsys, rng):
    for n in range(8):
        write(tmp_path, f'p{n}')
    check.check(config_of(tmp_path), tmp_path / 'out')
    printed = capsys.readouterr().out
    assert 'no faults found' in printed
    assert '40x48x3 uint8: 8' in printed
    sheet = np.array(Image.open(tmp_path / 'out' / 'contact_sheet.png'))
    assert sheet.shape[0] > 3 * (check.CELL + check.NAME)
    split = sources.load(config_of(tmp_path))[1]
    (a, *_), (b, *_) = split['train'], split['test']
    image = np.array(Image.open(tmp_path / 'images' / f'{a}.png')).astype(int)
    noisy = np.clip(image + rng.integers(-3, 4, image.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(tmp_path / 'images' / f'{b}.png')
    with pytest.raises(DataError, match=f'{a} and {b} are in different parts'):
        check.check(config_of(tmp_path), tmp_path / 'out')


def test_the_contact_sheet_shows_each_part_under_its_name(tmp_path):
    """Every picture is of one colour, by which the sheet tells where it stands."""
    shades = {f'p{n}': 21 + 10 * n for n in range(20)}
    for name, shade in shades.items():
        write(tmp_path, name, np.full((40, 48), shade, np.uint8))
    slices, parts = sources.load(config_of(tmp_path))
    still = {
        'crop': 0, 'flip': 0.0, 'flip_vertical': 0.0, 'scale': 0.0, 'rotate': 0.0, 'elastic': 0.0,
        'gamma': 0.0, 'gain': 0.0, 'bias': 0.0, 'noise': 0.0, 'blur': 0.0, 'low_resolution': 0.0,
    }  # fmt: skip
    still = config_of(tmp_path).augment.to_dict() | still
    sheet = check.contact_sheet(slices, parts, still, 0, names=('background', 'core'))
    columns = {'train': 8, 'validation': 1, 'test': 2}  # three pictures each but for train
    step = check.CELL + visualize.GAP
    assert sheet.shape[1] == sum(columns.values()) * step - visualize.GAP
    shown = {part: set() for part in parts}
    place = iter(range(0, sheet.shape[1], step))
    for part, many in columns.items():
        for left in (next(place) for _ in range(many)):
            column = sheet[:, left : left + check.CELL].reshape(-1, 3)
            shown[part] |= {n for n, v in shades.items() if (column == v).all(-1).sum() > 500}
    assert shown['validation'] == set(parts['validation'])
    assert shown['test'] == set(parts['test'])
    assert len(shown['train']) == 8
    assert shown['train'] <= set(parts['train'])
    legend = {tuple(color) for color in sheet[-18:].reshape(-1, 3).tolist()}
    assert tuple(visualize.class_color(1).tolist()) in legend
    assert tuple(visualize.class_color(2).tolist()) not in legend  # no picture has it


def test_mixed_sizes_get_one_near_their_median(tmp_path, caplog):
    for n in range(6):
        write(tmp_path, f'p{n}')
    write(tmp_path, 'wide', np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), np.uint8))
    with caplog.at_level('INFO'):
        check.check(config_of(tmp_path), tmp_path / 'out')
    assert 'images of 2 sizes are resized to 32x64 for the network, keeping their' in caplog.text
    caplog.clear()
    check.check(config_of(tmp_path, **{'data.size': (32, 32)}), tmp_path / 'out')
    assert 'sizes are resized' not in caplog.text
    with pytest.raises(ConfigError, match=r'add --config\.predict\.window=0'):
        check.check(config_of(tmp_path, **{'predict.window': 32}), tmp_path / 'out')


@pytest.mark.parametrize(
    ('sizes', 'expected'),
    [
        ([(96, 128), (112, 80)], (96, 96)),  # medians 104 and 104
        ([(10, 20), (20, 10)], (32, 32)),
        ([(3000, 2000)] * 3 + [(100, 100)], (512, 352)),  # 341.3 is nearer to 352 than to 320
        ([(40, 4000), (40, 2000), (41, 3000)], (32, 512)),
    ],
)
def test_a_size_that_is_chosen_is_a_multiple_of_32_near_the_median(sizes, expected):
    assert volumes.common_size(np.array(sizes)) == expected


@pytest.mark.parametrize('options', [{}, {'group': '(.)'}])
def test_the_number_of_classes_is_that_of_all_values_of_all_masks(tmp_path, caplog, options):
    rng = np.random.default_rng(0)
    for n in range(6):
        write(tmp_path, f'{n % 2}{n}', mask=rng.choice([0, n % 5, 3], (40, 48)).astype(np.uint8))
    with caplog.at_level('INFO'):
        slices = folder.load(tmp_path, num_classes=None, **options)
    every = [np.array(Image.open(path)) for path in (tmp_path / 'masks').iterdir()]
    assert slices.num_classes == len(np.unique(every)) == 5
    assert '5 classes, from the masks: background, 1, 2, 3, 4' in caplog.text
    given = folder.load(tmp_path, num_classes=5, **options)
    for one, other in zip(masks_of(slices), masks_of(given), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_line_of_classes_shows_the_palettes_colours(tmp_path, caplog):
    write(tmp_path, 'a', mask=indexed(LABELS, [0, 0, 0, 200, 0, 0, 0, 0, 200]))
    with caplog.at_level('INFO'):
        assert folder.load(tmp_path, num_classes=None).num_classes == 3
    assert '3 classes, from the masks: background, 1 (#c80000), 2 (#0000c8)' in caplog.text


@pytest.mark.parametrize('tool', ['COCO', 'VIA', 'labelme'])
def test_classes_of_annotations_are_those_that_are_drawn(tmp_path, caplog, tool):
    masks = annotate(tmp_path, tool, ['bone', 'tumor'])
    with caplog.at_level('INFO'):
        slices = folder.load(tmp_path, masks=masks, num_classes=None)
    assert slices.num_classes == 3
    assert slices.class_names == ('background', 'bone', 'tumor')
    assert '3 classes, from the annotations: background, bone, tumor' in caplog.text
    expected = np.array([0, 1, 0, 2])[squares('bone', 'tumor')]
    np.testing.assert_array_equal(masks_of(slices)[0], expected)
    assert ('never drawn are left out: muscle' in caplog.text) == (tool == 'COCO')


def own_config(root, **changes):
    config = own_pictures.get_config('unet_mini')
    changes = {'data.source': str(root), 'model.width': 4, **changes}
    config.update_from_flattened_dict(changes)
    return config


def test_three_classes_and_two_sizes_pass_the_check_with_no_option(tmp_path, capsys):
    for n in range(12):
        size = (40, 48) if n % 2 else (48, 40)
        image = np.random.default_rng(n).integers(0, 255, (*size, 3)).astype(np.uint8)
        write(tmp_path, f'p{n:02}', image, LABELS if n % 2 else LABELS.T)
    check.check(own_config(tmp_path), tmp_path / 'out')
    assert 'no faults found' in capsys.readouterr().out


def test_what_the_config_leaves_open_is_found_out_and_kept(tmp_path, caplog):
    for n in range(12):
        write(tmp_path, f'p{n:02}', mask=LABELS)
    config = own_config(tmp_path)
    validate(config)
    slices, _ = sources.load(config)
    with caplog.at_level('INFO'):
        found = start.complete(config, slices, 9)
    assert (found.model.num_classes, found.data.size, found.data.fit) == (3, (), 'letterbox')
    assert (found.optim.learning_rate, found.optim.new_layer_factor) == (start.RANDOM_RATE, 1.0)
    assert found.train.steps == start.FEWEST_STEPS
    assert 'passes over 9 slices, as neither train.epochs nor train.steps' in caplog.text
    assert start.complete(found, slices, 9) == found  # nothing is open any more
    assert from_dict(to_dict(found)) == found
    given = own_config(tmp_path, **{'train.epochs': 2.0, 'optim.learning_rate': 0.5})
    assert start.complete(given, slices, 9).train.steps == 0
    assert start.complete(given, slices, 9).optim.learning_rate == 0.5
    pretrained = own_pictures.get_config('pspnet_resnet18')
    assert start.complete(pretrained, slices, 9).optim.learning_rate == start.PRETRAINED_RATE
    assert start.complete(pretrained, slices, 9).optim.new_layer_factor == start.NEW_LAYERS


@pytest.mark.parametrize(
    ('slices', 'steps'),
    [(1, 400), (9, 400), (96, 600), (400, 2500), (9000, 10_000), (10**6, 10_000)],
)
def test_a_run_is_long_enough_for_few_pictures_and_bounded_for_many(slices, steps):
    assert start.steps_for(slices, 8) == steps


def test_images_of_two_kinds_have_no_one_scale(tmp_path, rng):
    for n in range(6):
        write(tmp_path, f'p{n}', rng.integers(0, 255, (40, 48)).astype(np.uint8))
    write(tmp_path, 'deep', rng.integers(0, 4096, (40, 48)).astype(np.uint16))
    check.check(config_of(tmp_path), tmp_path / 'out')
    with pytest.raises(DataError, match=r'6 of 7 patients have 8-bit images \(p0\), the others'):
        check.check(config_of(tmp_path, **{'data.normalize': 'weights'}), tmp_path / 'out')


def test_a_class_that_no_pixel_has_is_named(tmp_path):
    for n in range(6):
        write(tmp_path, f'p{n}', mask=(LABELS == 1).astype(np.uint8))
    with pytest.raises(DataError, match=r'no pixel is of class 2: lower model\.num_classes to 2'):
        check.check(config_of(tmp_path, **{'model.num_classes': 3}), tmp_path / 'out')


def test_an_expression_that_never_ends_is_refused(monkeypatch):
    """As a run from elsewhere may bring: its config is untrusted."""
    monkeypatch.setattr(folder, 'EXPRESSION_SECONDS', 0.2)
    with pytest.raises(DataError, match=r'takes more than 0\.2 seconds: write it in a simpler way'):
        folder.group_stems(['a' * 60 + 'b'], '((a+)+)$')
    assert folder.group_stems(['aab'], '(a+)') == ({'aab': 'aa'}, [])
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ('pixels', 'classes', 'words'),
    [
        ({0: 9}, 2, 'all pixels are of class 0: look at a mask, and describe its values'),
        ({0: 9, 2: 1}, 3, 'class 1: if there is no such class, number the others without a gap: '
         'data.label_map="{2: 1}" with model.num_classes=2'),
        ({0: 9, 1: 1, 255: 3}, 3, 'class 2: lower model.num_classes to 2'),
    ],
)  # fmt: skip
def test_a_remedy_for_a_missing_class_can_be_followed(pixels, classes, words):
    """Two classes are the fewest, and what lies above must not be lost."""
    (fault,) = check._missing(pixels, classes)
    assert words in fault
    assert check._missing(dict.fromkeys(range(classes), 1), classes) == []
