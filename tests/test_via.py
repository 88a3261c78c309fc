"""Annotation files of every tool to masks: the same drawing, the same mask; and hostile ones."""

import copy
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pspnet_jax import text
from pspnet_jax.data import annotations, files, via
from pspnet_jax.errors import ConfigError, DataError
from tests.conftest import ROOT

SIZE = (20, 24)  # H, W

# One drawing: shape, its numbers and its class, in order; the second covers part of the first.
DRAWING = {
    'a.png': [
        ('polygon', [(3, 2), (9, 2), (9, 8), (3, 8)], 'tumor'),
        ('rect', [(5, 5), (12, 10)], 'edema'),
        ('polyline', [(15, 2), (20, 2), (20, 6), (15, 6), (15, 2)], 'tumor'),
    ],
    'b.png': [('polygon', [(1, 1), (20, 3), (7, 18)], 'tumor')],
    'c.png': [],
}


def expected_masks():
    """By hand; edema is 1, tumor 2."""
    a, c = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    a[2:8, 3:9] = 2
    a[5:10, 5:12] = 1
    a[2:6, 15:20] = 2
    x, y = np.meshgrid(np.arange(24) + 0.5, np.arange(20) + 0.5)

    def right_of(p, q):  # no centre is on a line of b
        return (q[0] - p[0]) * (y - p[1]) - (q[1] - p[1]) * (x - p[0]) > 0

    b = right_of((1, 1), (20, 3)) & right_of((20, 3), (7, 18)) & right_of((7, 18), (1, 1))
    return {'a.png': a, 'b.png': 2 * b.astype(np.uint8), 'c.png': c}


def via_shape(kind, points):
    if kind == 'rect':
        (x0, y0), (x1, y1) = points
        return {'name': 'rect', 'x': x0, 'y': y0, 'width': x1 - x0, 'height': y1 - y0}
    return {
        'name': kind,
        'all_points_x': [x for x, _ in points],
        'all_points_y': [y for _, y in points],
    }


def via_export(version, drawing):
    """The annotations alone; VIA 1 numbers its regions, and repeats a polygon's first point."""
    tree = {}
    for name, shapes in drawing.items():
        regions = [
            {
                'shape_attributes': via_shape(
                    kind, [*points, points[0]] if version == 1 and kind == 'polygon' else points
                ),
                'region_attributes': {'type': value, 'remark': ''},
            }
            for kind, points, value in shapes
        ]
        tree[f'{name}1234'] = {
            'filename': name,
            'size': 1234,
            'regions': dict(zip(map(str, range(99)), regions, strict=False))
            if version == 1
            else regions,
            'file_attributes': {},
        }
    return tree


def via_project(drawing):
    return {
        '_via_settings': {'ui': {}, 'core': {}, 'project': {'name': 'p'}},
        '_via_img_metadata': via_export(2, drawing),
        '_via_attributes': {'region': {'type': {'type': 'dropdown'}}, 'file': {}},
        '_via_data_format_version': '2.0.10',
        '_via_image_id_list': [f'{name}1234' for name in drawing],
    }


def via_csv(drawing):
    def quoted(value):
        return '"' + json.dumps(value).replace('"', '""') + '"'

    lines = [annotations.CSV_HEADER]
    for name, entry in zip(drawing, via_export(2, drawing).values(), strict=True):
        regions = entry['regions'] or [{'shape_attributes': {}, 'region_attributes': {}}]
        for n, region in enumerate(regions):
            cells = [name, '1234', '"{}"', str(len(entry['regions'])), str(n)]
            cells += [quoted(region['shape_attributes']), quoted(region['region_attributes'])]
            lines.append(','.join(cells))
    return '\n'.join(lines)


def corners(kind, points):
    if kind == 'rect':
        (x0, y0), (x1, y1) = points
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    return points


def coco(drawing):
    tree = {
        'images': [
            {'id': 10 + i, 'file_name': name, 'height': SIZE[0], 'width': SIZE[1]}
            for i, name in enumerate(drawing)
        ],
        'categories': [{'id': 7, 'name': 'tumor'}, {'id': 3, 'name': 'edema'}],
        'annotations': [],
    }
    for i, shapes in enumerate(drawing.values()):
        for kind, points, value in shapes:
            tree['annotations'].append(
                {
                    'id': len(tree['annotations']),
                    'image_id': 10 + i,
                    'category_id': {'tumor': 7, 'edema': 3}[value],
                    'segmentation': [[n for point in corners(kind, points) for n in point]],
                    'iscrowd': 0,
                }
            )
    return tree


def labelme(name, shapes):
    kinds = {'rect': 'rectangle', 'polyline': 'linestrip'}
    return {
        'version': '5.4.1',
        'flags': {},
        'shapes': [
            {
                'label': value,
                'points': [list(map(float, point)) for point in points],
                'group_id': None,
                'shape_type': kinds.get(kind, kind),
                'flags': {},
            }
            for kind, points, value in shapes
        ],
        'imagePath': name,
        'imageData': None,
        'imageHeight': SIZE[0],
        'imageWidth': SIZE[1],
    }


def write(path, tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding='utf-8')
    return path


def write_labelme(folder, drawing):
    for name, shapes in drawing.items():
        write(folder / f'{name[:-4]}.json', labelme(f'..\\images\\{name}', shapes))
    return folder


WRITERS = {
    'VIA 1': lambda path, drawing: write(path / 'f.json', via_export(1, drawing)),
    'VIA 2': lambda path, drawing: write(path / 'f.json', via_export(2, drawing)),
    'project': lambda path, drawing: write(path / 'f.json', via_project(drawing)),
    'CSV': lambda path, drawing: write(path / 'f.csv', via_csv(drawing)),
    'COCO': lambda path, drawing: write(path / 'f.json', coco(drawing)),
    'labelme': lambda path, drawing: write_labelme(path / 'labels', drawing),
}


@pytest.fixture
def images(tmp_path):
    for name in DRAWING:
        save_picture(tmp_path / 'images' / name)
    return tmp_path / 'images'


def save_picture(path, size=SIZE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', size[::-1], 9).save(path, **options)


def tree_of(folder):
    """{path: bytes} of everything below."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def region(x=2, y=2, **attributes):
    """A square of VIA."""
    return {
        'shape_attributes': via_shape('rect', [(x, y), (x + 4, y + 4)]),
        'region_attributes': attributes,
    }


def via_file(path, *regions, name='a.png'):
    return write(path / 'via.json', {name: {'filename': name, 'size': 1, 'regions': [*regions]}})


def fault(function, *args, **options):
    """The message, every line of which is short enough to read."""
    with pytest.raises(DataError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert all(len(line) < 1000 and line.isprintable() for line in message.split('\n')), message
    return message


@pytest.mark.parametrize('tool', WRITERS)
def test_the_same_drawing_gives_the_same_masks_from_every_tool(tmp_path, images, tool):
    path = WRITERS[tool](tmp_path, DRAWING)
    notes = via.write_masks(path, images, tmp_path / 'masks')
    for name, expected in expected_masks().items():
        with Image.open(tmp_path / 'masks' / name) as picture:
            assert picture.mode == 'L'
            assert (np.array(picture) == expected).all(), name
    assert sorted(tree_of(tmp_path / 'masks')) == ['a.png', 'b.png', 'c.png']
    assert any("'edema' = 1, 'tumor' = 2" in note for note in notes)
    assert any("all background: 'c.png'" in note for note in notes)
    assert not any('b.png' in note for note in notes)

    read = via.read_annotations(path, classes={'tumor': 5, 'edema': 255})
    assert read.classes == {'background': 0, 'tumor': 5, 'edema': 255}
    assert [shape.label for shape in read.shapes['a.png']] == [5, 255, 5]
    told = dict.fromkeys(DRAWING, SIZE) if tool in ('COCO', 'labelme') else {}
    assert read.sizes == told


def test_circles_and_turned_ellipses_of_via_and_labelme(tmp_path):
    shapes = [
        {'name': 'circle', 'cx': 8, 'cy': 9, 'r': 5},
        {'name': 'ellipse', 'cx': 8, 'cy': 9, 'rx': 6, 'ry': 3},  # VIA 1 has no theta
        {'name': 'ellipse', 'cx': 8, 'cy': 9, 'rx': 6, 'ry': 3, 'theta': np.pi / 2},
    ]
    regions = [{'shape_attributes': shape, 'region_attributes': {}} for shape in shapes]
    read = via.read_annotations(via_file(tmp_path, *regions)).shapes['a.png']
    circle, level, upright = (via.rasterize([shape], SIZE) for shape in read)
    x, y = np.meshgrid(np.arange(24) + 0.5, np.arange(20) + 0.5)
    assert (circle == ((x - 8) ** 2 + (y - 9) ** 2 < 25)).all()
    assert (level == ((x - 8) ** 2 / 36 + (y - 9) ** 2 / 9 < 1)).all()
    assert (upright == ((x - 8) ** 2 / 9 + (y - 9) ** 2 / 36 < 1)).all()

    path = write(tmp_path / 'l.json', labelme('a.png', [('circle', [(8, 9), (11, 5)], 'x')]))
    (shape,) = via.read_annotations(path).shapes['a.png']
    assert (via.rasterize([shape], SIZE) == circle).all()


def test_the_parts_of_a_coco_annotation_are_united(tmp_path):
    tree = coco({'a.png': [('rect', [(2, 2), (8, 8)], 'tumor')]})
    tree['annotations'][0]['segmentation'].append([5, 5, 12, 5, 12, 12, 5, 12])
    read = via.read_annotations(write(tmp_path / 'c.json', tree))
    expected = np.zeros(SIZE, np.uint8)
    expected[2:8, 2:8] = expected[5:12, 5:12] = 1
    assert (via.rasterize(read.shapes['a.png'], SIZE) == expected).all()


def test_regions_of_via_1_are_in_the_order_of_their_numbers(tmp_path):
    regions = {str(n): region(x=n, type=f'{n:02d}') for n in (10, 2, 0, 11)}
    tree = {'k': {'filename': 'a.png', 'regions': regions}}
    read = via.read_annotations(write(tmp_path / 'v.json', tree))
    assert [shape.points[0, 0] for shape in read.shapes['a.png']] == [0, 2, 10, 11]
    assert [shape.label for shape in read.shapes['a.png']] == [1, 2, 3, 4]


def test_how_regions_get_their_class(tmp_path):
    def labels(*regions, **options):
        read = via.read_annotations(via_file(tmp_path, *regions), **options)
        return [shape.label for shape in read.shapes['a.png']], read.classes

    assert labels(region(), region()) == ([1, 1], {'background': 0, 'region': 1})
    assert labels(region(), classes={'tumor': 4}) == ([4], {'background': 0, 'tumor': 4})
    assert labels(region(t='x'), region(t='x')) == ([1, 1], {'background': 0, 'x': 1})
    assert labels(region(t='b'), region(t=' a ')) == ([2, 1], {'background': 0, 'a': 1, 'b': 2})
    assert labels(region(t='x'), region(t='background'))[0] == [1, 0]
    assert labels(region(t=3), region(t=2.5))[1] == {'background': 0, '2.5': 1, '3': 2}
    ticked = {'t': {'x': True, 'y': False}}
    assert labels(region(**ticked))[1] == {'background': 0, 'x': 1}
    assert labels(region(t='x', u='y'), attribute='u')[1] == {'background': 0, 'y': 1}
    assert labels(region(t='x', u=''), region(t='y'))[0] == [1, 2]  # u has no value anywhere


def test_regions_without_a_class_are_refused_with_what_there_is(tmp_path):
    def message(*regions, **options):
        return fault(via.read_annotations, via_file(tmp_path, *regions), **options)

    several = message(region(kind='tumor', side='left'), region(kind='edema', side='left'))
    for word in ("'kind' ('edema', 'tumor')", "'side' ('left')"):
        assert word in several.replace('"', '')
    assert "'type'" in message(region(kind='x'), attribute='type')
    lacking = message(region(t='x'), region(), region(t=''), region(t={'x': True, 'y': True}))
    for n in (2, 3, 4):
        assert f"'a.png', region {n} has " in lacking
    unknown = message(region(t='x'), region(t='y'), region(t='y'), classes={'tumor': 1})
    assert "'x' (1 region)" in unknown
    assert "'y' (2 regions)" in unknown
    assert "'tumor'" in unknown
    assert 'apart' in message(region(), classes={'a': 1, 'b': 2})
    assert '254' in message(*(region(t=str(n)) for n in range(255)))
    for number in (256, -1, True, 1.0, '1'):
        with pytest.raises(ConfigError, match='0 to 255'):
            via.read_annotations(via_file(tmp_path, region()), classes={'a': number})


@pytest.mark.parametrize(
    'name',
    ['../a.png', 'x/../../a.png', '/etc/a.png', '\\\\host\\a.png', 'C:\\a.png', '..\\a.png',
     'c:a.png', 'https://host/a.png', 'file:///a.png', '..', '/'],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_one_clear_line(tmp_path, images, name):
    before = tree_of(tmp_path)
    path = via_file(tmp_path, region(), name=name)
    message = fault(via.write_masks, path, images, tmp_path / 'masks')
    assert '\n' not in message
    assert message.startswith(str(path))
    assert 'leads elsewhere: write it' in message
    path.unlink()
    assert tree_of(tmp_path) == before
    assert not (tmp_path / 'masks').exists()


def test_every_fault_is_listed_at_once_and_nothing_is_written(tmp_path, images):
    tree = via_export(2, DRAWING)
    tree['missing'] = {'filename': 'missing.png', 'regions': []}
    tree['up'] = {'filename': '../a.png', 'regions': []}
    shapes = tree['a.png1234']['regions']
    for shape in (
        {'name': 'polygon', 'all_points_x': [100, 110, 100], 'all_points_y': [1, 1, 9]},
        {'name': 'polygon', 'all_points_x': [1, 5], 'all_points_y': [1, 5]},
        {'name': 'circle', 'cx': 5, 'cy': 5, 'r': 0},
        {'name': 'point', 'cx': 5, 'cy': 5},
        {'name': 'rect', 'x': 1, 'y': 'left', 'width': 3, 'height': 3},
        {'name': 'rect', 'x': 1, 'y': 1, 'width': -3, 'height': 3},
    ):
        shapes.append({'shape_attributes': shape, 'region_attributes': {'type': 'tumor'}})
    save_picture(images / 'b.jpg')
    (images / 'broken.png').write_bytes(b'not a picture')
    message = fault(
        via.write_masks, write(tmp_path / 'v.json', tree), images, tmp_path / 'out' / 'masks'
    )
    for words in (
        'missing.png', "'../a.png' leads elsewhere", 'region 4 is outside', 'region 5 has only 2',
        'region 6 has no area', 'region 7: it is a point', "y is 'left'", 'width is -3',
        'share the mask', 'not a readable picture',
    ):  # fmt: skip
        assert sum(words in line for line in message.split('\n')) == 1, (words, message)
    assert message.startswith('10 faults')
    assert not (tmp_path / 'out').exists()


def test_a_name_is_matched_with_the_pictures_that_are_there(tmp_path):
    images = tmp_path / 'train'
    for way in (
        'one/a.png',
        'two/a.png',
        'one/b.png',
        'é.png',
        'u\u0308.png',
        '.hidden/c.png',
        'masks/a.png',
    ):
        save_picture(images / way)

    def match(*names):
        shapes = {annotations._name(name): [name] for name in names}
        read = via.Annotations(shapes, {}, {}, [])
        matched, faults, _ = via.match_pictures(read, images, leave_out=images / 'masks')
        assert len(matched) == 5
        there = {path.relative_to(images).as_posix(): s[0] for path, s in matched.items() if s}
        return there, faults

    names = ('b.png', 'two/a.png', 'train/one/a.png', './e\u0301.png', '\xfc.png')
    ways = ('one/b.png', 'two/a.png', 'one/a.png', 'é.png', 'u\u0308.png')
    assert match(*names) == (dict(zip(ways, names, strict=True)), [])
    assert "can be 'one/a.png', 'two/a.png'" in match('a.png')[1][0]
    assert 'keep one' in match('b.png', 'one/b.png')[1][0]
    for name in ('c.png', 'three/b.png', 'xb.png', 'png'):
        assert f"lacks 1 picture of the annotations: '{name}'" in match(name)[1][0]


def test_pictures_in_folders_keep_their_place_and_unnamed_ones_are_background(tmp_path):
    for way in ('one/a.png', 'two/a.tif'):
        save_picture(tmp_path / 'images' / way)
    path = via_file(tmp_path, region(), name='one/a.png')
    notes = via.write_masks(path, tmp_path / 'images', tmp_path / 'images' / 'masks')
    assert any("not in the annotations, so all background: 'two/a.tif'" in n for n in notes)
    first = tree_of(tmp_path / 'images' / 'masks')
    assert sorted(first) == ['one/a.png', 'two/a.png']
    with Image.open(tmp_path / 'images' / 'masks' / 'two' / 'a.png') as picture:
        assert picture.size == SIZE[::-1]
        assert not np.array(picture).any()
    # Again: masks below the folder of pictures are not taken for pictures.
    assert via.write_masks(path, tmp_path / 'images', tmp_path / 'images' / 'masks') == notes
    assert tree_of(tmp_path / 'images' / 'masks') == first


def test_links_lead_nothing_out_of_the_output_folder(tmp_path):
    save_picture(tmp_path / 'images' / 'sub' / 'a.png')
    save_picture(tmp_path / 'images' / 'b.png')
    path = via_file(tmp_path, region(), name='a.png')
    out, victim = tmp_path / 'masks', tmp_path / 'victim'
    (victim / 'inside').mkdir(parents=True)
    (victim / 'file').write_text('untouched')
    out.mkdir()
    (out / 'sub').symlink_to(victim / 'inside')
    assert 'remove the link' in fault(via.write_masks, path, tmp_path / 'images', out)
    assert tree_of(victim) == {'file': b'untouched'}
    assert not (out / 'b.png').exists()

    (out / 'sub').unlink()
    (out / '.b.png.tmp').symlink_to(victim / 'file')
    (out / 'b.png').symlink_to(victim / 'file')
    via.write_masks(path, tmp_path / 'images', out)
    assert tree_of(victim) == {'file': b'untouched'}
    assert not (out / 'b.png').is_symlink()
    assert sorted(tree_of(out)) == ['b.png', 'sub/a.png']


def test_masks_never_replace_pictures(tmp_path, images):
    path = via_file(tmp_path, region())
    before = tree_of(images)
    assert 'the pictures themselves' in fault(via.write_masks, path, images, images)
    assert 'the pictures themselves' in fault(via.write_masks, path, images, images / 'x' / '..')
    # The folder of pictures is in that of masks: theirs would be images/d.png.
    save_picture(images / 'images' / 'd.png')
    assert 'among the pictures' in fault(via.write_masks, path, images, tmp_path)
    assert sorted(tree_of(images)) == ['a.png', 'b.png', 'c.png', 'images/d.png']
    # A picture that is a link to where its mask would be.
    (images / 'images' / 'd.png').unlink()
    (images / 'masks').mkdir()
    (images / 'a.png').rename(images / 'masks' / 'a.png')
    (images / 'a.png').symlink_to(images / 'masks' / 'a.png')
    kept = tree_of(tmp_path)
    assert 'among the pictures' in fault(via.write_masks, path, images, images / 'masks')
    assert tree_of(tmp_path) == kept
    # Beside the pictures is no harm.
    (images / 'a.png').unlink()
    (images / 'masks' / 'a.png').rename(images / 'a.png')
    via.write_masks(path, images, tmp_path)
    assert tree_of(images) == before


def test_what_can_not_be_written_is_one_line_and_leaves_nothing_aside(tmp_path, images):
    path = via_file(tmp_path, region())
    (tmp_path / 'file').write_text('here')
    message = fault(via.write_masks, path, images, tmp_path / 'file')
    assert 'can not be written' in message
    assert (tmp_path / 'file').read_text() == 'here'
    (tmp_path / 'masks' / 'b.png').mkdir(parents=True)
    assert 'can not be written' in fault(via.write_masks, path, images, tmp_path / 'masks')
    assert not list((tmp_path / 'masks').glob('.*'))


def test_the_picture_must_be_the_one_that_was_annotated(tmp_path, images):
    path = write(tmp_path / 'c.json', coco(DRAWING))
    save_picture(images / 'a.png', (40, 48))
    message = fault(via.write_masks, path, images, tmp_path / 'masks')
    assert "'a.png' is 48 x 40 pixels, the annotations are of 24 x 20" in message
    assert '\n' not in message


def test_a_picture_that_is_stored_turned_was_annotated_upright(tmp_path, images):
    (images / 'a.png').unlink()
    exif = Image.Exif()
    exif[files.ORIENTATION] = 6
    save_picture(images / 'a.jpg', (20, 24), exif=exif)
    path = via_file(tmp_path, region(), name='a.jpg')
    via.write_masks(path, images, tmp_path / 'masks')
    assert np.array(Image.open(tmp_path / 'masks' / 'a.png')).shape == (24, 20)
    assert files.read(images / 'a.jpg').image.shape[:3] == (1, 24, 20)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('', 'not readable as JSON'),
        ('[]', 'none of VIA'),
        ('3', 'none of VIA'),
        ('{}', 'none of VIA'),
        ('{"a": 1, "a": 2}', "key 'a' is there twice"),
        ('{"a": NaN}', 'NaN is not a number'),
        ('{"a": -Infinity}', '-Infinity is not a number'),
        ('{"a": ' + '9' * 5000 + '}', 'not readable as JSON'),
        ('[' * 10**6, 'nested too deeply'),
        ('{"a":' * 10**5 + '1' + '}' * 10**5, 'nested too deeply'),
        ('\xff\xfe', 'not readable as JSON'),
        ('{"_via_img_metadata": {}}', 'no picture is named'),
        ('{"images": [], "annotations": []}', 'no picture is named'),
    ],
)
def test_files_that_are_no_annotations(tmp_path, text, words):
    message = fault(via.read_annotations, write(tmp_path / 'f.json', text))
    assert words in message
    assert message.startswith(str(tmp_path / 'f.json'))
    assert '\n' not in message


def test_files_that_can_not_be_read(tmp_path, monkeypatch):
    (tmp_path / 'f.json').write_bytes(b'{"\xff": 1}')
    assert 'not UTF-8' in fault(via.read_annotations, tmp_path / 'f.json')
    assert 'not a file' in fault(via.read_annotations, tmp_path / 'none.json')
    assert 'not a file' in fault(via.read_annotations, tmp_path / ('x' * 300))
    assert 'not a file' in fault(via.read_annotations, '/dev/null')
    (tmp_path / 'empty').mkdir()
    assert 'no .json' in fault(via.read_annotations, tmp_path / 'empty')
    assert 'does not begin with filename' in fault(
        via.read_annotations, write(tmp_path / 'f.csv', 'name;size\n')
    )
    path = via_file(tmp_path, region())
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())  # as some editors on Windows save it
    assert list(via.read_annotations(path).shapes) == ['a.png']
    monkeypatch.setattr(text, 'MAX_BYTES', path.stat().st_size - 1)
    assert 'split it' in fault(via.read_annotations, path)


def test_damaged_csv_is_said_by_line(tmp_path):
    good = via_csv(DRAWING)
    for line, words in (
        ('a,b.png,1,"{}",0,0,"{}","{}"', 'line 7: it has 8 fields, not 7'),
        ('a.png,99,"{}",0,0,"{}","{}"', "line 7: 'a.png' is of two sizes"),
        ('d.png,1,"{}",0,0,"{","{}"', 'line 7: not readable as JSON'),
        ('d.png,1,"{}",1,0,"[1]","{}"', 'line 7: its shape_attributes is [1]'),
        ('d.png,1,"{}",0,0,"{}"x,"{}"', 'line 7 is damaged'),
        ('d.png,1,"{}",0,0,"{}","{}', 'line 7 is damaged'),
    ):
        message = fault(via.read_annotations, write(tmp_path / 'f.csv', f'{good}\n{line}\n'))
        assert words in message
    crlf = good.replace('\n', '\r\n').replace('filename', '#filename', 1)  # VIA 1.0, Windows
    read = via.read_annotations(write(tmp_path / 'f.csv', crlf))
    assert [len(shapes) for shapes in read.shapes.values()] == [3, 1, 0]


@pytest.mark.parametrize(
    ('key', 'value', 'words'),
    [
        ('segmentation', {'counts': [1, 2], 'size': [20, 24]}, 'run-length encoded'),
        ('segmentation', [], 'no polygon'),
        ('segmentation', [[1, 2, 3]], '3 numbers, not x y'),
        ('segmentation', [[1, 2, 3, 4]], None),  # too few points: said with the picture
        ('image_id', 99, 'image_id 99 is not in the file'),
        ('image_id', [1], 'image_id [1] is not in the file'),
        ('category_id', True, 'category_id True is not in the file'),
    ],
)
def test_coco_that_is_no_polygon_or_refers_to_nothing(tmp_path, key, value, words):
    tree = coco(DRAWING)
    tree['annotations'][1][key] = value
    path = write(tmp_path / 'c.json', tree)
    if words:
        message = fault(via.read_annotations, path)
        assert 'annotation 2: ' in message
        assert words in message
    else:
        shapes = via.read_annotations(path).shapes['a.png']
        assert 'only 2 points' in via.check_shapes(shapes, SIZE)[0][0]


def test_coco_that_has_an_id_or_a_picture_twice_is_refused(tmp_path):
    for key, value, words in (
        ('id', 11, 'images 3: its id 11 is there twice'),
        ('file_name', 'b.png', "'b.png' is there twice"),
    ):
        tree = coco(DRAWING)
        tree['images'][2][key] = value
        assert words in fault(via.read_annotations, write(tmp_path / 'c.json', tree))


@pytest.mark.parametrize('size', [10**9, 0, -5, 20.5, '20', True, [20], 10**400])
def test_absurd_sizes_are_refused(tmp_path, size):
    tree = coco(DRAWING)
    tree['images'][0]['height'] = size
    assert 'no size of a picture' in fault(via.read_annotations, write(tmp_path / 'c.json', tree))
    tree = labelme('a.png', []) | {'imageWidth': size}
    assert 'no size of a picture' in fault(via.read_annotations, write(tmp_path / 'l.json', tree))


@pytest.mark.parametrize(
    'start', ['{"images": [], "annotations": [', '{"a": {"filename": "a", "regions": [']
)
def test_a_file_of_faults_is_not_read_to_its_end(tmp_path, start):
    end = ']}' if 'images' in start else ']}}'
    message = fault(
        via.read_annotations, write(tmp_path / 'f.json', start + '{},' * 50_000 + '{}' + end)
    )
    assert len(message.split('\n')) == annotations.MAX_FAULTS + 2
    assert message.endswith('and there may be more')


HOSTILE = [
    None, True, False, 0, -1, 7, 1e308, -1e-308, 10**30, '', 'x', '../x', '\ud800\n\x1b[2J', [], {},
    [[]], [None], [[1, 2], [3]], {'a': {'b': [1]}}, [1e400, 2], 'polygon', 'ellipse', 'NaN',
]  # fmt: skip


def mutate(tree, rng):
    """A copy of which a few nodes are replaced, removed, moved or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        nodes, found = [tree], []
        while nodes:
            node = nodes.pop()
            children = list(node) if isinstance(node, dict) else list(range(len(node)))
            for key in children:
                found.append((node, key))
                if isinstance(node[key], dict | list):
                    nodes.append(node[key])
        if not found:
            break
        node, key = rng.choice(found)
        action = rng.randrange(4)
        if action == 0:
            del node[key]
        elif action == 1:
            other, other_key = rng.choice(found)
            node[key] = copy.deepcopy(other.get(other_key) if isinstance(other, dict) else other)
        elif action == 2 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[key] = copy.deepcopy(rng.choice(HOSTILE))
    return tree


@pytest.mark.parametrize('tool', ['VIA 1', 'project', 'COCO', 'labelme', 'CSV'])
def test_mutated_files_give_masks_or_a_message(tmp_path, tool):
    for name in DRAWING:
        save_picture(tmp_path / 'images' / name)
    tree = {
        'VIA 1': via_export(1, DRAWING),
        'project': via_project(DRAWING),
        'COCO': coco(DRAWING),
        'labelme': labelme('a.png', DRAWING['a.png']),
        'CSV': [line.split(',', 5) for line in via_csv(DRAWING).split('\n')],
    }[tool]
    outcomes = set()
    for seed in range(120):
        mutant = mutate(tree, random.Random(seed))
        if tool == 'CSV':
            rows = mutant if isinstance(mutant, list) else []
            mutant = (
                '\n'.join(
                    ','.join(map(str, row)) if isinstance(row, list) else str(row) for row in rows
                )
                .encode('utf-8', 'replace')
                .decode()
            )
        path = write(tmp_path / 'f.json', mutant)
        try:
            read = via.read_annotations(path)
            matched, faults, notes = via.match_pictures(read, tmp_path / 'images')
            for shapes in matched.values():
                wrong, odd = via.check_shapes(shapes, SIZE)
                faults, notes = faults + wrong, notes + odd
                mask = via.rasterize(shapes, SIZE)
                assert mask.shape == SIZE
            outcomes.add('fault' if faults else 'mask')
            lines = [*faults, *read.notes, *notes]
        except DataError as error:
            lines = str(error).split('\n')
            outcomes.add('refused')
        for line in lines:
            assert line.isprintable(), (seed, line)
            assert len(line) < 2000
    assert {'mask', 'refused'} <= outcomes


def test_the_command_writes_masks_or_one_line(tmp_path, images):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, '-m', 'pspnet_jax.data.via', *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    path = write(tmp_path / 'v.json', via_export(2, DRAWING))
    given = [f'--annotations={path}', f'--images={images}', f'--out={tmp_path / "masks"}']
    done = command(*given, '--classes=tumor=3, edema=1', '--attribute=type')
    assert done.returncode == 0, done.stderr
    for words in ('3 pictures, 4 regions', "'tumor' = 3, 'edema' = 1", "'c.png'"):
        assert words in done.stdout
    with Image.open(tmp_path / 'masks' / 'a.png') as picture:
        assert set(np.unique(picture).tolist()) == {0, 1, 3}

    refused = command(*given[:2], f'--out={tmp_path / "other"}', '--classes=tumor=3')
    assert refused.returncode == 1
    assert refused.stderr.strip().split('\n')[-1].startswith('error: ')
    assert "'edema' (1 region)" in refused.stderr
    assert 'Traceback' not in refused.stderr
    assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize('text', ['tumor', '=1', 'a=1,a=2', 'a=x', 'a=1=', 'a=1000'])
def test_classes_of_the_command_line(text):
    assert via.parse_classes('a=1,b c=2,') == {'a': 1, 'b c': 2}
    with pytest.raises(ConfigError, match='--classes'):
        via.parse_classes(text)
