"""What values mean: decided file by file, never half right, and every remedy keeps every class."""

import re
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.data import formats, masks
from pspnet_jax.runtime.errors import DataError

RED = 0xC80000


def found(**values):
    """{'a.png': what is in it} of lists of values."""
    return {Path(f'{name}.png'): masks.Found(sorted(some), {}) for name, some in values.items()}


def tables(code):
    return {path.stem: table for path, table in code.tables.items()}


# 0/1 and 0/255.


@pytest.mark.parametrize('mask_format', ['auto', 'binary'])
def test_0_1_and_0_255_mean_the_same_file_by_file(mask_format):
    code = masks.understand(found(a=[0, 1], b=[0, 255], c=[0], d=[255], e=[1]), mask_format)
    assert tables(code) == {'a': {0: 0, 1: 1}, 'b': {0: 0, 255: 1}, 'c': {0: 0}, 'd': {255: 1},
                            'e': {1: 1}}  # fmt: skip
    assert '0.5 in 2 files, 127.5 in 2 files' in code.meaning


def test_white_of_16_bits_is_class_1_too():
    code = masks.understand(found(a=[0, 1], b=[0, 65535], c=[0, 255]))
    assert {max(table) for table in code.tables.values()} == {1, 255, 65535}
    assert all(table[max(table)] == 1 for table in code.tables.values())


def test_other_values_in_other_files_are_one_structure_or_several():
    with pytest.raises(
        DataError, match=r'no file has two of them besides 0.*="binary"; else'
    ) as told:
        masks.understand(found(a=[0, 1], b=[0, 128], c=[0]))
    code = masks.understand(found(a=[0, 1], b=[0, 128], c=[0]), 'binary')
    assert tables(code) == {'a': {0: 0, 1: 1}, 'b': {0: 0, 128: 1}, 'c': {0: 0}}
    given = literal_eval(re.search(r'label_map="(.+?)"', str(told.value))[1])
    code = masks.understand(found(a=[0, 1], b=[0, 128], c=[0]), label_map=given, num_classes=3)
    assert tables(code) == {'a': {0: 0, 1: 1}, 'b': {0: 0, 128: 2}, 'c': {0: 0}}


def test_255_beside_class_1_is_ignored_unless_another_file_makes_it_doubtful():
    both = found(a=[0, 1, 255], b=[0, 1], c=[0])
    code = masks.understand(both)
    assert tables(code)['a'] == {0: 0, 1: 1, 255: 255}
    assert '255 is ignored' in code.meaning
    doubtful = both | found(d=[0, 255])
    with pytest.raises(DataError, match=r'255 is ambiguous: a\.png.*ignored there; d\.png') as told:
        masks.understand(doubtful)
    assert '--config.data.mask_format="index" ignores' in str(told.value)
    assert tables(masks.understand(doubtful, 'index'))['d'] == {0: 0, 255: 255}
    chosen = masks.understand(doubtful, label_map={255: 1})
    assert tables(chosen)['a'] == {0: 0, 1: 1, 255: 1}


def test_255_alone_is_no_ignored_class_of_several():
    with pytest.raises(
        DataError, match=r'255 is the ignored label.*--config\.model\.num_classes=2; if'
    ):
        masks.understand(found(a=[0, 255], b=[0]), num_classes=3)
    code = masks.understand(found(a=[0, 2, 255], b=[0, 255]), num_classes=3)  # a shows it is
    assert tables(code)['b'] == {0: 0, 255: 255}


def test_shades_are_split_where_the_brightest_is_not_within_an_empty_file():
    shades = {Path(f'{name}.jpg'): one for name, one in zip(
        'ab', found(a=[0, 3, 250, 255], b=[0, 1, 2]).values(), strict=True)}  # fmt: skip
    deep = found(c=[0, 30000, 65535], d=[0, 1])
    code = tables(masks.understand(shades | deep, 'binary'))
    assert code['a'] == {0: 0, 3: 0, 250: 1, 255: 1}
    assert set(code['b'].values()) == {0}
    assert code['c'] == {0: 0, 30000: 0, 65535: 1}
    assert code['d'] == {0: 0, 1: 1}


# Values that are no classes.

REMEDIES = [  # values, classes of the model, changes that are proposed first, of the values classes
    ([0, 1, 2], 2, {'num_classes': 3}, {0: 0, 1: 1, 2: 2}),
    ([0, 128], 2, {'label_map': {128: 1}}, {0: 0, 128: 1}),
    ([0, 128, 255], 3, {'label_map': {128: 1, 255: 2}}, {0: 0, 128: 1, 255: 2}),
    ([0, 128, 255], 2, {'num_classes': 3, 'label_map': {128: 1, 255: 2}},
     {0: 0, 128: 1, 255: 2}),
    ([0, 1, 2, 4], 4, {'label_map': {4: 3}}, {0: 0, 1: 1, 2: 2, 4: 3}),
    ([0, 1, 2, 4, 255], 4, {'label_map': {4: 3}}, {0: 0, 1: 1, 2: 2, 4: 3, 255: 255}),
    ([0, 1, 2, 3, 255], 2, {'num_classes': 4}, {0: 0, 1: 1, 2: 2, 3: 3, 255: 255}),
    ([1, 2], 2, {'label_map': {1: 0, 2: 1}}, {1: 0, 2: 1}),
    ([-1, 0, 1], 2, {'label_map': {-1: 255}}, {-1: 255, 0: 0, 1: 1}),
    ([0, 10, 20], 2, {'num_classes': 3, 'label_map': {10: 1, 20: 2}}, {0: 0, 10: 1, 20: 2}),
]  # fmt: skip


@pytest.mark.parametrize(('values', 'classes', 'first', 'expected'), REMEDIES)
def test_the_first_remedy_keeps_every_class(values, classes, first, expected):
    """And it works when it is pasted."""
    there = found(a=values[:2], b=values)
    with pytest.raises(DataError, match=f'but model.num_classes is {classes}') as told:
        masks.understand(there, num_classes=classes)
    flags, _, _ = str(told.value).partition('; ')
    proposed = {}
    if number := re.search(r'--config\.model\.num_classes=(\d+)', flags):
        proposed['num_classes'] = int(number[1])
    if mapped := re.search(r'--config\.data\.label_map="(.+?)"', flags):
        proposed['label_map'] = literal_eval(mapped[1])
    assert proposed == first
    code = masks.understand(there, **{'num_classes': classes} | proposed)
    assert tables(code)['b'] == expected


@pytest.mark.parametrize(
    ('files', 'classes'),
    [
        ({'a': [0, 1, 2], 'b': [0, 2]}, 3),
        ({'a': [0, 1], 'b': [0, 2], 'c': [0, 3]}, 4),  # one structure a picture
        ({'a': [0, 255], 'b': [0]}, 2),
        ({'a': [0, 1, 255], 'b': [0, 1]}, 2),  # 255 is ignored
        ({'a': [0, 1, 2, 255], 'b': [0, 1, 2]}, 3),
        ({'a': [0]}, 2),  # the fewest
        ({'a': list(range(20))}, 20),
        ({'a': list(range(19)), 'b': list(range(30, 41)), 'c': list(range(18, 31))}, 41),
    ],
)
def test_classes_that_are_not_given_are_counted(files, classes):
    code = masks.understand(found(**files), num_classes=None)
    labels = {label for table in code.tables.values() for label in table.values()} - {255}
    assert code.num_classes == classes
    assert len(labels) == (classes if classes > 2 or len(labels) == 2 else 1)


@pytest.mark.parametrize(
    ('values', 'options', 'expected'),
    [
        ([0, 128], {'label_map': {128: 1}}, {0: 0, 128: 1}),
        ([0, 128, 255], {'label_map': {128: 1, 255: 2}}, {0: 0, 128: 1, 255: 2}),
        ([0, 1, 2, 4], {'label_map': {4: 3}}, {0: 0, 1: 1, 2: 2, 4: 3}),
        ([1, 2, 3], {'label_map': {1: 0, 2: 1, 3: 2}}, {1: 0, 2: 1, 3: 2}),
        ([-1, 0, 1], {'label_map': {-1: 255}}, {-1: 255, 0: 0, 1: 1}),
    ],
)
def test_values_with_a_gap_are_not_counted_and_the_remedy_needs_no_number(
    values, options, expected
):
    there = found(a=values[:2], b=values)
    with pytest.raises(DataError, match='not class numbers from 0 on without a gap') as told:
        masks.understand(there, num_classes=None)
    first, _, _ = str(told.value).partition('; ')
    assert 'num_classes' not in first
    assert literal_eval(re.search(r'label_map="(.+?)"', first)[1]) == options['label_map']
    code = masks.understand(there, num_classes=None, **options)
    assert tables(code)['b'] == expected
    assert code.num_classes == len(set(expected.values()) - {255})


def test_a_gap_may_be_a_class_that_does_not_occur():
    there = found(a=[0, 2], b=[0, 1, 2, 4])
    with pytest.raises(DataError, match=r'--config\.model\.num_classes=5 keeps the numbers'):
        masks.understand(there, num_classes=None)
    assert masks.understand(there, num_classes=5).num_classes == 5


def test_shades_are_not_counted_as_classes():
    shades = found(a=list(range(200)))
    with pytest.raises(
        DataError, match=r'--config\.model\.num_classes=200; if all that is not 0 is one'
    ):
        masks.understand(shades, num_classes=None)
    with pytest.raises(DataError, match='a mask saved as JPEG'):
        masks.understand(found(a=[*range(30), *range(220, 256)]), num_classes=None)


def test_colours_are_counted_once_they_are_listed():
    there = found(a=[0, masks.COLORED | 0xFF0000], b=[masks.COLORED, masks.COLORED | 0x00FF80])
    with pytest.raises(DataError, match='have 3 colours, but their classes are not given') as told:
        masks.understand(there, num_classes=None)
    colors = literal_eval(re.search(r"mask_colors='(.+?)'", str(told.value))[1])
    assert colors == ('#000000', '#00ff80', '#ff0000')
    code = masks.understand(there, colors=colors, num_classes=None)
    assert code.num_classes == 3
    assert dict(code.colors) == dict(enumerate(colors))


def test_too_few_classes_are_one_flag_to_paste():
    with pytest.raises(DataError) as told:
        masks.understand(found(a=[0, 1, 2], b=[0, 1]))
    assert str(told.value).startswith(
        'the masks have 3 classes (0, 1, 2) but model.num_classes is 2: '
        'add --config.model.num_classes=3; '
    )


def test_a_second_remedy_makes_one_class_of_all_and_leaves_what_is_ignored():
    there = found(a=[0, 1, 2, 255])
    with pytest.raises(DataError) as told:
        masks.understand(there)
    given = re.findall(r'--config\.data\.label_map="(.+?)" makes one class', str(told.value))[0]
    code = masks.understand(there, label_map=literal_eval(given))
    assert tables(code)['a'] == {0: 0, 1: 1, 2: 1, 255: 255}


def test_the_files_with_odd_values_are_named():
    with pytest.raises(DataError, match=r'\(7 is in b\.png and 1 more\)'):
        masks.understand(found(a=[0, 1], b=[0, 7], c=[7]))


# data.label_map.


def test_a_label_map_names_values_or_compares_them_and_others_stay():
    there = found(a=[0, 1, 2, 4, 9])
    code = masks.understand(there, label_map={4: 3, '>=5': 2}, num_classes=4)
    assert tables(code)['a'] == {0: 0, 1: 1, 2: 2, 4: 3, 9: 2}
    as_json = masks.understand(there, label_map={'4': 3, '>=5': 2}, num_classes=4)
    assert tables(as_json) == tables(code)
    assert tables(masks.understand(there, label_map={'>0': 1}))['a'] == {
        0: 0,
        1: 1,
        2: 1,
        4: 1,
        9: 1,
    }
    negative = masks.understand(found(a=[-1000, 5]), label_map={'<0': 0, '>0': 1})
    assert tables(negative)['a'] == {-1000: 0, 5: 1}
    with pytest.raises(DataError, match=r'the value 9 in a\.png becomes 9'):
        masks.understand(there, label_map={4: 3}, num_classes=4)


@pytest.mark.parametrize('wrong', [{'x': 1}, {4: 'a'}, {4: -1}, {4: 256}, {4.5: 1}, {4: True}])
def test_what_is_no_label_map(wrong):
    with pytest.raises(ValueError, match=':'):
        masks.parse_map(wrong)


# Colours and palettes.


def save_indexed(path, labels, palette):
    picture = Image.frombytes('P', labels.shape[::-1], labels.tobytes())
    picture.putpalette([part for color in palette for part in color])
    picture.save(path)
    return path


@pytest.fixture
def labels(rng):
    return rng.integers(0, 3, (6, 7)).astype(np.uint8)


BLACK, GREEN = (0, 0, 0), (0, 200, 0)
REDS = (200, 0, 0)


@pytest.mark.parametrize('ending', ['png', 'bmp', 'tif'])
def test_masks_whose_palettes_are_in_another_order_are_the_same(tmp_path, rng, ending):
    mask = rng.integers(0, 2, (6, 7)).astype(np.uint8)
    one = save_indexed(tmp_path / f'a.{ending}', mask, [BLACK, REDS])
    other = save_indexed(tmp_path / f'b.{ending}', 1 - mask, [REDS, BLACK])
    there = {path: masks.look(path) for path in (one, other)}
    for options in ({}, {'mask_format': 'binary'}, {'colors': ('#000000', '#c80000')}):
        code = masks.understand(there, **options)
        for path in there:
            picture = formats.read(path)
            np.testing.assert_array_equal(masks.read_classes(path, picture, code), mask[None])
    by_index = masks.understand(there, 'index')
    assert (masks.read_classes(other, formats.read(other), by_index) == 1 - mask).all()


def test_black_is_background_where_all_palettes_begin_with_the_object(tmp_path, rng):
    mask = rng.integers(0, 2, (6, 7)).astype(np.uint8)
    path = save_indexed(tmp_path / 'a.png', 1 - mask, [REDS, BLACK])
    code = masks.understand({path: masks.look(path)})
    assert 'black is 1' in code.meaning
    np.testing.assert_array_equal(masks.read_classes(path, formats.read(path), code), mask[None])


def test_three_colours_out_of_order_are_refused_and_named(tmp_path, labels):
    one = save_indexed(tmp_path / 'a.png', labels, [BLACK, REDS, GREEN])
    swapped = np.array([0, 2, 1], np.uint8)[labels]
    other = save_indexed(tmp_path / 'b.png', swapped, [BLACK, GREEN, REDS])
    there = {path: masks.look(path) for path in (one, other)}
    with pytest.raises(DataError, match=r'palettes of the masks do not agree') as told:
        masks.understand(there, num_classes=3)
    colors = re.search(r"--config\.data\.mask_colors='(.+?)'", str(told.value))[1]
    assert set(literal_eval(colors)) == {'#000000', '#c80000', '#00c800'}
    assert colors.startswith('("#000000"')
    code = masks.understand(there, colors=('#000000', '#c80000', '#00c800'), num_classes=3)
    for path in there:
        np.testing.assert_array_equal(
            masks.read_classes(path, formats.read(path), code), labels[None]
        )


@pytest.mark.parametrize(
    'palette',
    [[BLACK, (1, 1, 1), (2, 2, 2)], [BLACK, GREEN, GREEN], [BLACK, REDS, BLACK]],
    ids=['greys', 'two alike', 'black twice'],
)
def test_palettes_that_say_nothing_are_no_reason_to_doubt(tmp_path, labels, palette):
    one = save_indexed(tmp_path / 'a.png', labels, [BLACK, REDS, GREEN])
    other = save_indexed(tmp_path / 'b.png', labels, palette)
    there = {path: masks.look(path) for path in (one, other)}
    code = masks.understand(there, num_classes=3)
    np.testing.assert_array_equal(
        masks.read_classes(other, formats.read(other), code), labels[None]
    )


def test_palettes_of_pages_are_their_own(tmp_path, rng):
    mask = rng.integers(0, 2, (6, 7)).astype(np.uint8)
    for name, values, palette in (('a', mask, [BLACK, REDS]), ('b', 1 - mask, [REDS, BLACK])):
        save_indexed(tmp_path / f'{name}.tif', values, palette)
    with Image.open(tmp_path / 'a.tif') as first, Image.open(tmp_path / 'b.tif') as second:
        first.save(tmp_path / 'c.tif', save_all=True, append_images=[second])
    there = {tmp_path / 'c.tif': masks.look(tmp_path / 'c.tif')}
    code = masks.understand(there)
    picture = formats.read(tmp_path / 'c.tif')
    got = masks.read_classes(tmp_path / 'c.tif', picture, code)
    np.testing.assert_array_equal(got, np.stack([mask, mask]))


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.int64])
def test_grey_levels_are_colours_too(tmp_path, dtype, rng):
    """In whatever type they come: 0xRRGGBB of 8 bits does not fit into 8 bits."""
    classes = rng.integers(0, 3, (2, 6, 7))
    levels = np.array([0, 128, 255], dtype)[classes]
    np.save(tmp_path / 'a.npy', levels)
    path = tmp_path / 'a.npy'
    code = masks.understand(
        {path: masks.look(path)}, colors=('#000000', '#808080', '#ffffff'), num_classes=3
    )
    like = formats.Picture(levels[..., None], None, None, path)
    np.testing.assert_array_equal(masks.read_classes(path, like, code), classes)


def test_grey_levels_of_16_bits_are_those_of_8_where_they_are_multiples(tmp_path):
    level = np.array([[0, 128 * 257, 65535]], np.uint16)
    Image.fromarray(level).save(tmp_path / 'a.png')
    path = tmp_path / 'a.png'
    colors = ('#000000', '#808080', '#ffffff')
    code = masks.understand({path: masks.look(path)}, colors=colors, num_classes=3)
    got = masks.read_classes(path, formats.read(path), code)
    np.testing.assert_array_equal(got, [[[0, 1, 2]]])
    with pytest.raises(DataError, match='has the value 1000: save it with 8 bits a channel'):
        masks.understand(found(a=[0, 1000]), colors=colors)


def test_a_picture_with_its_mask_as_alpha_is_no_list_of_colours(tmp_path, rng):
    values = rng.integers(0, 255, (9, 9, 4), np.uint8)
    Image.fromarray(values).save(tmp_path / 'a.png')
    there = {tmp_path / 'a.png': masks.look(tmp_path / 'a.png')}
    with pytest.raises(DataError, match=r"so they are images.*alpha channel.*getchannel\('A'\)"):
        masks.understand(there)


# Several masks of one picture.


def test_several_masks_mark_what_any_of_them_marks():
    a, b = np.zeros((2, 1, 4, 4), np.uint8)
    a[0, :2, :2], b[0, 1:, 1:] = 1, 1
    a[0, 3, 0] = 255
    expected = np.where((a == 1) | (b == 1), 1, a)
    np.testing.assert_array_equal(masks.merged([a, b], [Path('a'), Path('b')]), expected)
    b[0, 1, 1] = 2
    with pytest.raises(DataError, match='a and b mark 1 of the same pixels as classes 1 and 2'):
        masks.merged([a, b], [Path('a'), Path('b')])


def test_a_mask_that_changed_since_it_was_looked_at_is_refused(tmp_path):
    path = tmp_path / 'a.png'
    for values, table in (([0, 1], {0: 0, 1: 1}), ([0, 70000], {0: 0, 70000: 1})):
        code = masks.Code({path: table}, '')
        for wrong in (2, 300, -1, 10**6):
            with pytest.raises(DataError, match='changed since it was first read'):
                masks._look_up(code.tables[path], np.array([[[values[1], wrong]]]), path)
