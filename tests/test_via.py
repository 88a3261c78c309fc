"""Annotation files of every tool to masks: the same drawing, the same mask; and hostile ones."""

import base64
import copy
import io
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pspnet_jax import rasterize
from pspnet_jax.data import formats
from pspnet_jax.data.formats import annotations, flat, outlines, via
from pspnet_jax.runtime import text
from pspnet_jax.runtime.errors import ConfigError, DataError
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


def read_annotations(path, **options):
    read, faults = annotations.read(path, **options)
    if faults:
        raise annotations.all_faults(path, faults)
    return read


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

    read = read_annotations(path, classes={'tumor': 5, 'edema': 255})
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
    read = read_annotations(via_file(tmp_path, *regions)).shapes['a.png']
    circle, level, upright = (outlines.rasterize([shape], SIZE) for shape in read)
    x, y = np.meshgrid(np.arange(24) + 0.5, np.arange(20) + 0.5)
    assert (circle == ((x - 8) ** 2 + (y - 9) ** 2 < 25)).all()
    assert (level == ((x - 8) ** 2 / 36 + (y - 9) ** 2 / 9 < 1)).all()
    assert (upright == ((x - 8) ** 2 / 9 + (y - 9) ** 2 / 36 < 1)).all()

    path = write(tmp_path / 'l.json', labelme('a.png', [('circle', [(8, 9), (11, 5)], 'x')]))
    (shape,) = read_annotations(path).shapes['a.png']
    assert (outlines.rasterize([shape], SIZE) == circle).all()


def test_the_parts_of_a_coco_annotation_are_united(tmp_path):
    tree = coco({'a.png': [('rect', [(2, 2), (8, 8)], 'tumor')]})
    tree['annotations'][0]['segmentation'].append([5, 5, 12, 5, 12, 12, 5, 12])
    read = read_annotations(write(tmp_path / 'c.json', tree))
    expected = np.zeros(SIZE, np.uint8)
    expected[2:8, 2:8] = expected[5:12, 5:12] = 2  # the second of the categories
    assert (outlines.rasterize(read.shapes['a.png'], SIZE) == expected).all()


def coco_of(*used, categories=((7, 'tumor'), (3, 'edema'), (12, 'bone'))):
    """A square of each of the used categories on a.png."""
    tree = coco({'a.png': [('rect', [(2, 2), (8, 8)], 'tumor')] * len(used)})
    tree['categories'] = [{'id': key, 'name': name} for key, name in categories]
    for item, category in zip(tree['annotations'], used, strict=True):
        item['category_id'] = category
    return tree


def labels_of(path, **options):
    read = read_annotations(path, **options)
    return [shape.label for shapes in read.shapes.values() for shape in shapes]


def test_coco_has_the_numbers_of_its_categories_whichever_of_them_occur(tmp_path):
    def labels(*used, **more):
        return labels_of(write(tmp_path / 'c.json', coco_of(*used, **more)))

    assert labels(3, 7, 12) == [1, 2, 3]  # by id: edema, tumor, bone
    assert labels(7) == [2]
    assert labels(12, 7) == [3, 2]
    assert labels() == []
    assert labels('12', 7.0) == [3, 2]
    text = (('10', 'ten'), ('9', 'nine'), ('b', 'B'), ('a', 'A'))
    assert labels(9, 10, 'a', 'b', categories=text) == [1, 2, 3, 4]
    zero = ((0, 'tumor'), (1, 'edema'))
    assert labels(0, 1, categories=zero) == [1, 2]
    for name in ('background', '_background_', '__background__', 'Background'):
        assert labels(0, 2, categories=((0, name), (2, 'tumor'))) == [0, 1]
        assert labels(9, 2, categories=((9, name), (2, 'tumor'))) == [0, 1]
    read = read_annotations(write(tmp_path / 'c.json', coco_of(7)))
    assert read.classes == {'background': 0, 'edema': 1, 'tumor': 2, 'bone': 3}
    assert (
        "classes by 'category': 'background' = 0, 'edema' = 1, 'tumor' = 2, 'bone' = 3 "
        '(in the order of their ids)' in read.notes
    )


def test_the_group_that_roboflow_writes_as_category_0_is_no_class(tmp_path):
    tree = coco_of(1, 2, categories=((0, 'cells'), (1, 'red'), (2, 'white')))
    for category, group in zip(tree['categories'], ('none', 'cells', 'cells'), strict=True):
        category['supercategory'] = group
    path = write(tmp_path / 'c.json', tree)
    assert labels_of(path) == [1, 2]
    tree['annotations'][0]['category_id'] = 0
    told = fault(read_annotations, write(path, tree))
    assert "not classes: 'cells' (1 region); the classes are 'background', 'red', 'white'" in told


def test_coco_without_categories_is_one_class_or_refused(tmp_path):
    tree = coco_of(4, 4)
    del tree['categories']
    assert labels_of(write(tmp_path / 'c.json', tree)) == [1, 1]
    tree['annotations'][0]['category_id'] = 5
    told = fault(read_annotations, write(tmp_path / 'c.json', tree))
    assert 'have category_id 4, 5, but it has no categories: add them, "categories": [' in told


def test_regions_of_via_1_are_in_the_order_of_their_numbers(tmp_path):
    regions = {str(n): region(x=n, type=f'{n:02d}') for n in (10, 2, 0, 11)}
    tree = {'k': {'filename': 'a.png', 'regions': regions}}
    read = read_annotations(write(tmp_path / 'v.json', tree))
    assert [shape.points[0, 0] for shape in read.shapes['a.png']] == [0, 2, 10, 11]
    assert [shape.label for shape in read.shapes['a.png']] == [1, 2, 3, 4]


def test_how_regions_get_their_class(tmp_path):
    def labels(*regions, **options):
        read = read_annotations(via_file(tmp_path, *regions), **options)
        return [shape.label for shape in read.shapes['a.png']], read.classes

    assert labels(region(), region()) == ([1, 1], {'background': 0, 'region': 1})
    assert labels(region(), classes={'tumor': 4}) == ([4], {'background': 0, 'tumor': 4})
    assert labels(region(t='x'), region(t='x')) == ([1, 1], {'background': 0, 'x': 1})
    assert labels(region(t='b'), region(t=' a ')) == ([2, 1], {'background': 0, 'a': 1, 'b': 2})
    for name in ('background', '_background_', 'Background'):
        assert labels(region(t='x'), region(t=name))[0] == [1, 0]
        assert labels(region(t='x'), region(t=name), classes={'x': 5})[0] == [5, 0]
        assert labels(region(t=name), classes={'background': 0, name: 5})[0] == [5]
    assert labels(region(t=3), region(t=2.5))[1] == {'background': 0, '2.5': 1, '3': 2}
    ticked = {'t': {'x': True, 'y': False}}
    assert labels(region(**ticked))[1] == {'background': 0, 'x': 1}
    assert labels(region(t='x', u='y'), attribute='u')[1] == {'background': 0, 'y': 1}
    assert labels(region(t='x', u=''), region(t='y'))[0] == [1, 2]  # u has no value anywhere


def test_regions_without_a_class_are_refused_with_what_there_is(tmp_path):
    def message(*regions, **options):
        return fault(read_annotations, via_file(tmp_path, *regions), **options)

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
    assert "the classes are 'background', 'tumor': rename or remove the values" in unknown
    assert 'model.class_names, or --classes' in unknown
    assert 'values that are not names' in message(region(t='a\nb'))
    assert 'values that are not names' in message(region(t='a' * 201))
    assert 'distinguishes a, b' in message(region(), classes={'a': 1, 'b': 2})
    assert '254' in message(*(region(t=str(n)) for n in range(255)))
    for number in (256, -1, True, 1.0, '1'):
        with pytest.raises(ConfigError, match='0 to 255'):
            read_annotations(via_file(tmp_path, region()), classes={'a': number})


@pytest.mark.parametrize(
    'name',
    ['/home/ann/images/a.png', 'C:\\Users\\ann\\a.png', 'c:/a.png', '\\\\host\\share\\a.png',
     '../images/a.png', '..\\a.png', 'x/../../a.png', 'https://host/a.png', 'file:///a.png'],
)  # fmt: skip
@pytest.mark.parametrize('tool', ['VIA', 'COCO', 'labelme'])
def test_a_whole_path_is_the_picture_of_its_name_below_the_folder(tmp_path, tool, name):
    """And nothing else is read or written: see test_hostile_text."""
    save_picture(tmp_path / 'images' / 'a.png')
    tree = {
        'VIA': {'k': {'filename': name, 'regions': [region()]}},
        'COCO': coco({name: [('rect', [(2, 2), (6, 6)], 'tumor')]}),
        'labelme': labelme(name, [('rect', [(2, 2), (6, 6)], 'tumor')]),
    }[tool]
    via.write_masks(write(tmp_path / 'f.json', tree), tmp_path / 'images', tmp_path / 'masks')
    expected = np.zeros(SIZE, bool)
    expected[2:6, 2:6] = True
    assert ((np.array(Image.open(tmp_path / 'masks' / 'a.png')) > 0) == expected).all()


def test_whole_paths_of_two_pictures_are_not_taken_for_one(tmp_path, images):
    tree = coco({'/home/ann/train/a.png': [], '/home/ann/test/a.png': []})
    told = fault(via.write_masks, write(tmp_path / 'c.json', tree), images, tmp_path / 'masks')
    assert "'a.png' is listed as" in told
    save_picture(images / 'train' / 'a.png')
    save_picture(images / 'test' / 'a.png')
    (images / 'a.png').unlink()
    via.write_masks(write(tmp_path / 'c.json', tree), images, tmp_path / 'masks')
    for name in ('/', '..', '.', ' '):
        path = via_file(tmp_path, region(), name=name)
        told = fault(via.write_masks, path, images, tmp_path / 'masks')
        words = "lacks 1 picture of the annotations: '..'", 'write the name of the file'
        assert any(word in told for word in words)


def test_every_fault_is_listed_at_once_and_nothing_is_written(tmp_path, images):
    tree = via_export(2, DRAWING)
    tree['missing'] = {'filename': 'missing.png', 'regions': []}
    tree['up'] = {'filename': '', 'regions': []}
    shapes = tree['a.png1234']['regions']
    for shape in (
        {'name': 'polygon', 'all_points_x': [100, 110, 100], 'all_points_y': [1, 1, 9]},
        {'name': 'polygon', 'all_points_x': [1, 5], 'all_points_y': [1, 5]},
        {'name': 'circle', 'cx': 5, 'cy': 5, 'r': 0},
        {'name': 'bezier', 'cx': 5, 'cy': 5},
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
        'missing.png', "the image name is ''", 'region 4 is outside', 'region 5 has only 2',
        'region 6 has no area', "its shape 'bezier'", "y is 'left'", 'width is -3',
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
        read = annotations.Annotations(shapes, {}, {}, [])
        matched, faults, _ = via.match_pictures(read, images, leave_out=images / 'masks')
        assert len(matched) == 5
        there = {path.relative_to(images).as_posix(): s[0] for path, s in matched.items() if s}
        return there, faults

    names = ('b.png', 'two/a.png', 'train/one/a.png', './e\u0301.png', '\xfc.png')
    ways = ('one/b.png', 'two/a.png', 'one/a.png', 'é.png', 'u\u0308.png')
    assert match(*names) == (dict(zip(ways, names, strict=True)), [])
    assert "may be 'one/a.png', 'two/a.png'" in match('a.png')[1][0]
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
    (out / 'b.png').symlink_to(victim / 'file')
    via.write_masks(path, tmp_path / 'images', out)
    assert tree_of(victim) == {'file': b'untouched'}
    assert not (out / 'b.png').is_symlink()
    assert sorted(tree_of(out)) == ['b.png', 'sub/a.png']


def test_masks_never_replace_pictures(tmp_path, images):
    path = via_file(tmp_path, region())
    before = tree_of(images)
    assert 'the images themselves' in fault(via.write_masks, path, images, images)
    assert 'the images themselves' in fault(via.write_masks, path, images, images / 'x' / '..')
    # The folder of pictures is in that of masks: theirs would be images/d.png.
    save_picture(images / 'images' / 'd.png')
    assert 'among the images' in fault(via.write_masks, path, images, tmp_path)
    assert sorted(tree_of(images)) == ['a.png', 'b.png', 'c.png', 'images/d.png']
    # A picture that is a link to where its mask would be.
    (images / 'images' / 'd.png').unlink()
    (images / 'masks').mkdir()
    (images / 'a.png').rename(images / 'masks' / 'a.png')
    (images / 'a.png').symlink_to(images / 'masks' / 'a.png')
    kept = tree_of(tmp_path)
    assert 'among the images' in fault(via.write_masks, path, images, images / 'masks')
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
    assert "'a.png' is 48 x 40 pixels, but its annotations are for 24 x 20" in message
    assert '\n' not in message


def test_a_picture_that_is_stored_turned_was_annotated_upright(tmp_path, images):
    (images / 'a.png').unlink()
    exif = Image.Exif()
    exif[flat.ORIENTATION] = 6
    save_picture(images / 'a.jpg', (20, 24), exif=exif)
    path = via_file(tmp_path, region(), name='a.jpg')
    via.write_masks(path, images, tmp_path / 'masks')
    assert np.array(Image.open(tmp_path / 'masks' / 'a.png')).shape == (24, 20)
    assert formats.read(images / 'a.jpg').image.shape[:3] == (1, 24, 20)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('', 'not readable as JSON'),
        ('[]', 'is not VIA'),
        ('3', 'is not VIA'),
        ('{}', 'is not VIA'),
        ('{"a": 1, "a": 2}', "key 'a' is there twice"),
        ('{"a": NaN}', 'NaN is not a number'),
        ('{"a": -Infinity}', '-Infinity is not a number'),
        ('{"a": ' + '9' * 5000 + '}', 'not readable as JSON'),
        ('[' * 10**6, 'nested too deeply'),
        ('{"a":' * 10**5 + '1' + '}' * 10**5, 'nested too deeply'),
        ('\xff\xfe', 'not readable as JSON'),
        ('{"_via_img_metadata": {}}', 'it names no image'),
        ('{"images": [], "annotations": []}', 'it names no image'),
    ],
)
def test_files_that_are_no_annotations(tmp_path, text, words):
    message = fault(read_annotations, write(tmp_path / 'f.json', text))
    assert words in message
    assert message.startswith(str(tmp_path / 'f.json'))
    assert '\n' not in message


def test_files_that_can_not_be_read(tmp_path, monkeypatch):
    for encoding, at in (('gbk', 2), ('utf-16', 0), ('cp1252', 2)):
        (tmp_path / 'f.json').write_bytes('{"\xd7": 1}'.encode(encoding))
        told = fault(read_annotations, tmp_path / 'f.json')
        assert f'is not UTF-8 text (byte {at}): save it as UTF-8' in told
        assert 'iconv -f GBK -t UTF-8' in told
    assert 'not a file' in fault(read_annotations, tmp_path / 'none.json')
    assert 'not a file' in fault(read_annotations, tmp_path / ('x' * 300))
    assert 'not a file' in fault(read_annotations, '/dev/null')
    (tmp_path / 'empty').mkdir()
    assert 'no .json' in fault(read_annotations, tmp_path / 'empty')
    assert 'does not begin with filename' in fault(
        read_annotations, write(tmp_path / 'f.csv', 'name;size\n')
    )
    path = via_file(tmp_path, region())
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())  # as some editors on Windows save it
    assert list(read_annotations(path).shapes) == ['a.png']
    monkeypatch.setattr(text, 'MAX_BYTES', path.stat().st_size - 1)
    assert 'split it' in fault(read_annotations, path)


def test_damaged_csv_is_said_by_line(tmp_path):
    good = via_csv(DRAWING)
    for line, words in (
        ('a,b.png,1,"{}",0,0,"{}","{}"', 'line 7: it has 8 fields, not 7'),
        ('a.png,99,"{}",0,0,"{}","{}"', "line 7: 'a.png' has two file sizes"),
        ('d.png,1,"{}",0,0,"{","{}"', 'line 7: not readable as JSON'),
        ('d.png,1,"{}",1,0,"[1]","{}"', 'line 7: its shape_attributes is [1]'),
        ('d.png,1,"{}",0,0,"{}"x,"{}"', 'line 7 is corrupted'),
        ('d.png,1,"{}",0,0,"{}","{}', 'line 7 is corrupted'),
    ):
        message = fault(read_annotations, write(tmp_path / 'f.csv', f'{good}\n{line}\n'))
        assert words in message
    crlf = good.replace('\n', '\r\n').replace('filename', '#filename', 1)  # VIA 1.0, Windows
    read = read_annotations(write(tmp_path / 'f.csv', crlf))
    assert [len(shapes) for shapes in read.shapes.values()] == [3, 1, 0]


@pytest.mark.parametrize(
    ('key', 'value', 'words'),
    [
        ('segmentation', {'counts': [1, 2], 'size': [20, 24]}, 'add up to 3, not 20 x 24'),
        (
            'segmentation',
            {'counts': [480], 'size': [24, 20]},
            'its mask is 20 x 24 pixels, but the',
        ),
        ('segmentation', {'counts': [481], 'size': [20, 24]}, 'one of its run lengths is 481'),
        ('segmentation', {'counts': 'P', 'size': [20, 24]}, 'its run lengths are cut off'),
        ('segmentation', {'counts': ' ', 'size': [20, 24]}, "its run lengths have ' '"),
        ('segmentation', {'counts': 'x', 'size': [20]}, 'size of its mask is [20], not height'),
        ('segmentation', [[1, 2, 3]], '3 numbers, not x y'),
        ('image_id', 99, 'image_id 99 is not in the file'),
        ('image_id', [1], 'image_id [1] is not in the file'),
        ('category_id', True, 'category_id True is not in the file'),
    ],
)
def test_coco_that_is_no_outline_or_refers_to_nothing(tmp_path, key, value, words):
    tree = coco(DRAWING)
    tree['annotations'][1][key] = value
    message = fault(read_annotations, write(tmp_path / 'c.json', tree))
    assert 'annotation 2: ' in message
    assert words in message


@pytest.mark.parametrize('value', [[], [[]], None, [[1, 2, 3, 4]], [[1, 1, 5, 5, 9, 9]], 'lacking'])
def test_coco_annotations_without_an_outline_are_passed_over_and_counted(tmp_path, value):
    tree = coco(DRAWING)
    tree['annotations'][1] |= {'segmentation': value, 'bbox': [1, 1, 5, 5]}
    if value == 'lacking':
        del tree['annotations'][1]['segmentation']
    read = read_annotations(write(tmp_path / 'c.json', tree))
    assert [shape.label for shape in read.shapes['a.png']] == [2, 2]
    (note,) = (note for note in read.notes if note.startswith('skipped'))
    assert note.endswith("without an outline (a box is not an outline) (1): 'a.png', annotation 2")
    assert [shape.where for shape in read.shapes['a.png']][1] == "'a.png', annotation 3"


def test_parts_of_coco_annotations_without_area_are_passed_over_and_counted(tmp_path):
    tree = coco(DRAWING)
    tree['annotations'][0]['segmentation'] += [[5, 5, 9, 9], [], [2, 2, 2, 2, 2, 2]]
    read = read_annotations(write(tmp_path / 'c.json', tree))
    assert (outlines.rasterize(read.shapes['a.png'], SIZE) == expected_masks()['a.png']).all()
    (note,) = (note for note in read.notes if note.startswith('skipped'))
    assert 'without area (3)' in note
    assert note.count("'a.png', annotation 1") == 3


def test_a_file_of_nothing_but_boxes_or_points_is_refused(tmp_path):
    tree = coco(DRAWING)
    for item in tree['annotations']:
        item['segmentation'] = []
    told = fault(read_annotations, write(tmp_path / 'c.json', tree))
    assert (
        'none of its 4 regions has an outline (points and boxes have none): draw outlines' in told
    )
    tree = labelme('a.png', [('point', [(3, 3)], 'seed')] * 2)
    told = fault(read_annotations, write(tmp_path / 'l.json', tree))
    assert 'none of its 2 regions has an outline' in told


@pytest.mark.parametrize('tool', ['VIA 1', 'VIA 2', 'project', 'CSV', 'labelme'])
def test_points_are_passed_over_and_counted(tmp_path, images, tool):
    """Whatever they are called: 'seed' is no class."""
    drawing = {name: list(shapes) for name, shapes in DRAWING.items()}
    drawing['a.png'].insert(1, ('point', [(3, 3)], 'seed'))
    drawing['c.png'].append(('point', [(3, 3)], 'seed'))
    path = WRITERS[tool](tmp_path, drawing)
    notes = via.write_masks(path, images, tmp_path / 'masks', classes={'tumor': 2, 'edema': 1})
    for name, expected in expected_masks().items():
        assert (np.array(Image.open(tmp_path / 'masks' / name)) == expected).all(), name
    (note,) = (note for note in notes if note.startswith('skipped'))
    assert note.startswith('skipped: points, which have no area (2): ')
    places = ('line 3', 'line 7') if tool == 'CSV' else ("'a.png', region 2", "'c.png', region 1")
    assert all(place in note for place in places)


def run_lengths(mask):
    """Pixels outside and inside in turn, column by column: by hand."""
    lengths, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            lengths.append(0)
            value = pixel
        lengths[-1] += 1
    return lengths


def masks_of_many_kinds():
    rng = np.random.default_rng(0)
    yield from (rng.random(SIZE) < share for share in (0.05, 0.5, 0.9))
    yield from (np.ones(SIZE, bool), np.eye(*SIZE, dtype=bool))
    for rows in (slice(0, 3), slice(17, 20), slice(4, 9)):
        mask = np.zeros(SIZE, bool)
        mask[rows, 3:20] = True
        yield mask


@pytest.mark.parametrize('compressed', [False, True])
def test_run_lengths_of_coco_are_the_pixels(tmp_path, compressed):
    for mask in masks_of_many_kinds():
        tree = coco_of(7)
        del tree['images'][0]['height']  # the mask has it too
        counts = run_lengths(mask)
        if compressed:
            coder = pytest.importorskip(
                'pycocotools.mask', reason='the reference for compressed run lengths'
            )
            (coded,) = coder.encode(np.asfortranarray(mask[..., None].astype(np.uint8)))
            assert coded['size'] == [*SIZE]
            counts = coded['counts'].decode()
        tree['annotations'][0]['segmentation'] = {'counts': counts, 'size': [*SIZE]}
        read = read_annotations(write(tmp_path / 'c.json', tree))
        assert (outlines.rasterize(read.shapes['a.png'], SIZE) == 2 * mask).all()
        assert read.sizes == {'a.png': SIZE}


def test_compressed_run_lengths_of_large_masks():
    """Numbers of several characters, and differences of either sign: written by hand."""
    rng = np.random.default_rng(1)
    for most in (20, 1000, 2**20):
        counts = rng.integers(0, most, 40).tolist()
        text = ''
        for n, number in enumerate(counts):
            number -= counts[n - 2] if n > 2 else 0
            while True:
                bits, number = number & 31, number >> 5
                last = number == (-1 if bits & 16 else 0)
                text += chr(48 + bits + (0 if last else 32))
                if last:
                    break
        assert annotations._unpack(text) == counts


def test_coco_masks_that_are_empty_are_passed_over(tmp_path):
    tree = coco_of(7, 7)
    tree['annotations'][0]['segmentation'] = {'counts': [480], 'size': [*SIZE]}
    read = read_annotations(write(tmp_path / 'c.json', tree))
    assert len(read.shapes['a.png']) == 1
    assert any('without an outline (a box is not an outline) (1)' in note for note in read.notes)


def test_coco_has_two_masks_of_one_size(tmp_path):
    tree = coco_of(7, 7)
    del tree['images'][0]['height']
    for item, size in zip(tree['annotations'], ([20, 24], [24, 20]), strict=True):
        item['segmentation'] = {'counts': [100, 80, 300], 'size': size}
    told = fault(read_annotations, write(tmp_path / 'c.json', tree))
    assert "'a.png', annotation 2: its mask is 20 x 24 pixels, but the image is 24 x 20" in told


def png(mask):
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, 'png')
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize('kind', [np.uint8, bool, 'of 255', 'palette', 'fractions', 'exclusive'])
def test_masks_of_labelme_lie_at_their_corner(tmp_path, kind):
    """The corners are the first and the last pixel: labelme/_utils/shape.py, shapes_to_label."""
    inside = np.random.default_rng(2).random((7, 9)) < 0.5
    expected = np.zeros(SIZE, bool)
    expected[4:11, 6:15] = inside
    pixels = inside.astype(kind if kind in (np.uint8, bool) else np.uint8)
    if kind == 'of 255':
        pixels *= 255
    if kind == 'palette':
        pixels = Image.fromarray(pixels, 'P')
        pixels.putpalette([0, 0, 0, 128, 0, 0])
    else:
        pixels = Image.fromarray(pixels)
    buffer = io.BytesIO()
    pixels.save(buffer, 'png')
    tree = labelme('a.png', [('mask', [(6, 4), (14, 10)], 'tumor')])
    tree['shapes'][0]['mask'] = base64.b64encode(buffer.getvalue()).decode()
    if kind == 'fractions':
        tree['shapes'][0]['points'] = [[6.2, 3.7], [14.4, 10.3]]
    if kind == 'exclusive':
        tree['shapes'][0]['points'] = [[6, 4], [15, 11]]
    read = read_annotations(write(tmp_path / 'l.json', tree))
    assert (outlines.rasterize(read.shapes['a.png'], SIZE) == expected).all()


def test_a_mask_of_labelme_that_leaves_the_picture_is_clipped_and_named(tmp_path, images):
    tree = labelme('a.png', [('mask', [(20, 15), (26, 21)], 'tumor')])
    tree['shapes'][0]['mask'] = png(np.ones((7, 7), np.uint8))
    path = write(tmp_path / 'l.json', tree)
    notes = via.write_masks(path, images, tmp_path / 'masks')
    assert "'a.png', region 1 reaches 3.0 pixels out of the image: clipped" in notes
    expected = np.zeros(SIZE, bool)
    expected[15:, 20:] = True
    assert (np.array(Image.open(tmp_path / 'masks' / 'a.png')) == expected).all()


def test_rectangles_of_four_corners_and_turned_ones(tmp_path):
    def drawn(kind, *points):
        tree = labelme('a.png', [(kind, points, 'x')])
        tree['shapes'][0] |= {'shape_type': kind, 'direction': 0.3}
        read = read_annotations(write(tmp_path / 'l.json', tree))
        return outlines.rasterize(read.shapes['a.png'], SIZE)

    level = np.zeros(SIZE, bool)
    level[3:9, 5:15] = True
    corners = [(5, 3), (15, 3), (15, 9), (5, 9)]
    for order in itertools.permutations(corners):
        assert (drawn('rectangle', *order) == level).all()
    assert (drawn('rectangle', corners[0], corners[2]) == level).all()
    for kind in ('rotation', 'quadrilateral', 'oriented_rectangle'):
        assert (drawn(kind, *corners) == level).all()
    x, y = np.meshgrid(np.arange(24) + 0.5, np.arange(20) + 0.5)
    turned = np.abs(x - 11.2) + np.abs(y - 9.3) < 6
    diamond = [(11.2, 3.3), (17.2, 9.3), (11.2, 15.3), (5.2, 9.3)]
    for kind in ('rotation', 'rectangle'):
        assert (drawn(kind, *diamond) == turned).all()
    path = write(tmp_path / 'l.json', labelme('a.png', [('rectangle', corners[:3], 'x')]))
    assert 'it is a rectangle with 3 points, not two' in fault(read_annotations, path)


def test_labelme_files_in_sub_folders_belong_to_the_pictures_of_theirs(tmp_path):
    """Or to the only picture of the name, wherever it is."""
    for way in ('p1/a.png', 'p2/a.png', 'c.png'):
        save_picture(tmp_path / 'images' / way)
    for n, way in enumerate(('p1/a', 'p2/a', 'reader/c'), 1):
        square = ('rect', [(n, n), (n + 4, n + 4)], 'tumor')
        tree = labelme(f'{way.rpartition("/")[2]}.png', [square])
        write(tmp_path / 'labels' / f'{way}.json', tree)
    via.write_masks(tmp_path / 'labels', tmp_path / 'images', tmp_path / 'masks')
    for n, way in enumerate(('p1/a.png', 'p2/a.png', 'c.png'), 1):
        expected = np.zeros(SIZE, bool)
        expected[n : n + 4, n : n + 4] = True
        assert (np.array(Image.open(tmp_path / 'masks' / way)) == expected).all(), way
    write(tmp_path / 'labels' / 'other' / 'c.json', labelme('c.png', []))
    told = fault(via.write_masks, tmp_path / 'labels', tmp_path / 'images', tmp_path / 'masks')
    assert "'c.png' is listed as 'other/c.png' and as 'reader/c.png': keep one" in told
    (tmp_path / 'labels' / 'other' / 'c.json').rename(tmp_path / 'labels' / 'a.json')
    write(tmp_path / 'labels' / 'a.json', labelme('a.png', []))
    told = fault(via.write_masks, tmp_path / 'labels', tmp_path / 'images', tmp_path / 'masks')
    assert "'a.png' may be 'p1/a.png', 'p2/a.png': add the folder to its name" in told


def test_coco_that_has_an_id_or_a_picture_twice_is_refused(tmp_path):
    for key, value, words in (
        ('id', 11, 'images 3: its id 11 is used twice'),
        ('file_name', 'b.png', "'b.png' is listed twice"),
    ):
        tree = coco(DRAWING)
        tree['images'][2][key] = value
        assert words in fault(read_annotations, write(tmp_path / 'c.json', tree))


def test_ids_are_the_same_as_numbers_and_as_text(tmp_path):
    tree = coco(DRAWING)
    for n, item in enumerate(tree['annotations']):
        item['image_id'] = (str, float, int, str)[n](item['image_id'])
        item['category_id'] = (float, str, str, int)[n](item['category_id'])
    read = read_annotations(write(tmp_path / 'c.json', tree))
    for name, expected in expected_masks().items():
        assert (outlines.rasterize(read.shapes[name], SIZE) == expected).all(), name
    tree['images'][0]['id'] = str(tree['images'][1]['id'])
    told = fault(read_annotations, write(tmp_path / 'c.json', tree))
    assert 'its id 11 is used twice' in told


@pytest.mark.parametrize('size', [(20.0, 24.0), ('20', '24'), (20, 24.0)])
def test_sizes_are_the_same_as_numbers_and_as_text(tmp_path, size):
    trees = coco(DRAWING), labelme('a.png', DRAWING['a.png'])
    for picture in trees[0]['images']:
        picture['height'], picture['width'] = size
    trees[1]['imageHeight'], trees[1]['imageWidth'] = size
    for tree in trees:
        read = read_annotations(write(tmp_path / 'f.json', tree))
        assert set(read.sizes.values()) == {SIZE}


@pytest.mark.parametrize('size', [(0, 0), (None, None), (20, None), (0, 24), (0.0, 0.0)])
def test_sizes_that_a_file_lacks_are_not_compared_and_counted(tmp_path, images, size):
    tree = coco(DRAWING)
    tree['images'][1]['height'], tree['images'][1]['width'] = size
    save_picture(images / 'b.png', (30, 30))
    notes = via.write_masks(write(tmp_path / 'c.json', tree), images, tmp_path / 'masks')
    assert "skipped: the check of image sizes, which the file does not have (1): 'b.png'" in notes
    assert Image.open(tmp_path / 'masks' / 'b.png').size == (30, 30)
    one = labelme('a.png', DRAWING['a.png'])
    one['imageHeight'], one['imageWidth'] = size
    read = read_annotations(write(tmp_path / 'l.json', one))
    assert not read.sizes
    assert any('does not have (1)' in note for note in read.notes)


@pytest.mark.parametrize('size', [10**9, -5, 20.5, '20 px', '', True, False, [20], 10**400])
def test_absurd_sizes_are_refused(tmp_path, size):
    tree = coco(DRAWING)
    tree['images'][0]['height'] = size
    assert 'not a valid image size' in fault(read_annotations, write(tmp_path / 'c.json', tree))
    tree = labelme('a.png', []) | {'imageWidth': size}
    assert 'not a valid image size' in fault(read_annotations, write(tmp_path / 'l.json', tree))


@pytest.mark.parametrize(
    'start', ['{"images": [], "annotations": [', '{"a": {"filename": "a", "regions": [']
)
def test_a_file_of_faults_is_not_read_to_its_end(tmp_path, start):
    end = ']}' if 'images' in start else ']}}'
    message = fault(
        read_annotations, write(tmp_path / 'f.json', start + '{},' * 50_000 + '{}' + end)
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


@pytest.mark.stress
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
            read = read_annotations(path)
            matched, faults, notes = via.match_pictures(read, tmp_path / 'images')
            for shapes in matched.values():
                wrong, odd = outlines.check_shapes(shapes, SIZE)
                faults, notes = faults + wrong, notes + odd
                mask = outlines.rasterize(shapes, SIZE)
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


@pytest.mark.slow
def test_the_command_writes_masks_or_one_line(tmp_path, images):
    def command(*arguments, module='pspnet_jax.rasterize'):
        return subprocess.run(
            [sys.executable, '-m', module, *arguments],
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

    before = tree_of(tmp_path / 'masks')
    done = command(*given, '--classes=tumor=3, edema=1', module='pspnet_jax.data.via')
    assert 'pspnet_jax.data.via is now pspnet_jax.rasterize' in done.stderr
    assert (done.returncode, tree_of(tmp_path / 'masks')) == (0, before)

    refused = command(*given[:2], f'--out={tmp_path / "other"}', '--classes=tumor=3')
    assert refused.returncode == 1
    assert refused.stderr.strip().split('\n')[-1].startswith('error: ')
    assert "'edema' (1 region)" in refused.stderr
    assert 'Traceback' not in refused.stderr
    assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize('text', ['tumor', '=1', 'a=1,a=2', 'a=x', 'a=1=', 'a=1000'])
def test_classes_of_the_command_line(text):
    assert rasterize.parse_classes('a=1,b c=2,') == {'a': 1, 'b c': 2}
    with pytest.raises(ConfigError, match='--classes'):
        rasterize.parse_classes(text)
