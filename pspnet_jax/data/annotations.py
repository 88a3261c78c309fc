"""What annotation tools write, read as shapes with class numbers.

VGG Image Annotator 1 and 2 (JSON of the whole project or of the annotations only, and CSV),
COCO (polygons; run-length encoded masks are refused) and labelme (a file, or a folder of them).

The files are not trusted: their size is limited before they are parsed, every value is checked,
and the picture names in them are only ever compared with names that are there.
"""

import contextlib
import csv
import io
import math
import os
import re
import reprlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pspnet_jax import text
from pspnet_jax.data.outlines import MAX_SIDE, Shape
from pspnet_jax.errors import ConfigError, DataError

MAX_FAULTS = 1000  # of a file, after which it is not read on
CSV_HEADER = (
    'filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,'
    'region_attributes'
)
AGAIN = 'export the annotations again'
REDRAW = 'draw it again'


class Annotations(NamedTuple):
    """What a file says: {picture name: shapes in file order}, {class name: number}, {picture
    name: (H, W)} where it tells, and notes for a person.
    """

    shapes: dict[str, list[Shape]]
    classes: dict[str, int]
    sizes: dict[str, tuple[int, int]]
    notes: list[str]


class Region(NamedTuple):
    """Shapes, several where COCO has one annotation in parts, before they have a class.

    `attributes` holds a text for each, or a tuple where several boxes are ticked.
    """

    where: str
    shapes: list[Shape]
    attributes: dict[str, str | tuple[str, ...]]


class Picture(NamedTuple):
    """A picture as the file names it, its (H, W) where the file tells, and its regions."""

    name: str
    size: tuple[int, int] | None
    regions: list[Region]


def read_annotations(
    path: str | Path, *, classes: Mapping[str, int] | None = None, attribute: str = ''
) -> Annotations:
    """The regions of every picture that a file names, whichever tool wrote it.

    Without `classes`, the values of the attribute are numbered 1, 2, ... in sorted order
    ('background' is 0), and where regions have no attribute all are class 1. `attribute` is
    needed where regions have several; COCO's is called category, labelme's label. Raises one
    DataError that lists every fault, ConfigError for classes that no mask can hold.
    """
    annotations, faults = read_with_faults(path, classes, attribute)
    if faults:
        raise all_faults(path, faults)
    return annotations


def read_with_faults(
    path: str | Path, classes: Mapping[str, int] | None = None, attribute: str = ''
) -> tuple[Annotations, list[str]]:
    """As `read_annotations`, for a caller that has further faults to list."""
    for name, number in (classes or {}).items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= 255:
            raise ConfigError(f'class {show(name)} is {show(number)}: give a number 0 to 255')
    path, faults = Path(path).expanduser(), []
    tool, shapes, sizes, regions = '', {}, {}, []
    with contextlib.suppress(_TooManyFaultsError):
        if os.path.isdir(path):
            tool, pictures = 'labelme', _read_labelme_folder(path, faults)
        else:
            tool, pictures = _read_file(path, faults)
        for picture in pictures:
            if picture.name in shapes:
                faults.append(f'{show(picture.name)} is there twice: keep one, or rename a picture')
            shapes.setdefault(picture.name, [])
            regions += [(picture.name, region) for region in picture.regions]
            if picture.size:
                sizes[picture.name] = picture.size
    if not shapes and not faults:
        faults.append(f'no picture is named: {AGAIN}')
    found = f'{tool}: {count(len(shapes), "picture")}, {count(len(regions), "region")}'
    numbers, labels, note, wrong = _number_classes(
        [region for _, region in regions], classes, attribute
    )
    for (name, region), label in zip(regions, labels, strict=True):
        shapes[name] += [shape._replace(label=label, where=region.where) for shape in region.shapes]
    return Annotations(shapes, numbers, sizes, [found, note]), faults + wrong


# What messages are made of.

_shorten = reprlib.Repr()
_shorten.maxlevel, _shorten.maxstring, _shorten.maxother = 2, 120, 80


def show(value: Any) -> str:
    """One short printable line, whatever the value."""
    return _shorten.repr(value)


def some(items: Sequence[str], most: int = 8) -> str:
    """'a, b and 3 more'."""
    rest = len(items) - most
    return ', '.join(items[:most]) + (f' and {rest} more' if rest > 0 else '')


def count(number: int, noun: str) -> str:
    return f'{number} {noun}{"" if number == 1 else "s"}'


def all_faults(source: str | Path, faults: Sequence[str]) -> DataError:
    """One line where there is one fault, else a list."""
    if len(faults) == 1:
        return DataError(f'{source}: {faults[0]}')
    more = ['and there may be more'] if len(faults) >= MAX_FAULTS else []
    return DataError(f'{len(faults)} faults in {source}:', [*faults[:MAX_FAULTS], *more])


@contextlib.contextmanager
def listed(faults: list[str], where: str = '') -> Iterator[None]:
    """A DataError inside becomes a line of `faults`."""
    try:
        yield
    except DataError as error:
        faults.append(f'{where}: {error}' if where else str(error))


class _TooManyFaultsError(Exception):
    pass


@contextlib.contextmanager
def _listed(faults: list[str], where: str = '') -> Iterator[None]:
    with listed(faults, where):
        yield
    if len(faults) >= MAX_FAULTS:
        raise _TooManyFaultsError


# Files and values.


def _read_file(path: Path, faults: list[str]) -> tuple[str, Iterator[Picture]]:
    """The tool that wrote the file, and its pictures."""
    content = text.read(path, AGAIN)
    header = content.partition('\n')[0].strip().lstrip('#').replace('"', '')
    if header == CSV_HEADER:
        return 'VIA CSV', _read_via_csv(content, faults)
    if path.suffix.lower() == '.csv':
        raise DataError(f'{path} does not begin with {CSV_HEADER}: export it from VIA')
    try:
        tree = text.parse_json(content, AGAIN)
    except DataError as error:
        raise DataError(f'{path} is {error}') from error
    if isinstance(tree, dict):
        if '_via_img_metadata' in tree:
            return 'VIA 2 project', _read_via(tree['_via_img_metadata'], faults)
        if 'annotations' in tree and 'images' in tree:
            return 'COCO', _read_coco(tree, faults)
        if 'shapes' in tree and 'imagePath' in tree:
            return 'labelme', iter([_read_labelme(tree, faults)])
        if any(isinstance(item, dict) and 'filename' in item for item in tree.values()):
            return 'VIA', _read_via(tree, faults)
    raise DataError(
        f'{path} is none of VIA 1 or 2 (JSON or CSV), COCO (images and annotations) and labelme '
        '(shapes and imagePath): export the annotations as one of these'
    )


def _object(value: Any, what: str = 'it') -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{what} is {show(value)}, not an object: {AGAIN}')
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f'{what} is {show(value)}, not a list: {AGAIN}')
    return value


def _name(value: Any) -> str:
    """The picture's way below the folder of pictures, whichever way its slashes lean."""
    if not isinstance(value, str):
        raise DataError(f'the picture name is {show(value)}: write the name of the file')
    name = unicodedata.normalize('NFC', value).replace('\\', '/')
    parts = name.split('/')
    if name.startswith('/') or '..' in parts or re.match('[A-Za-z]:', name) or '://' in name:
        raise DataError(
            f'the picture name {show(value)} leads elsewhere: write it as it is below the folder '
            'of pictures, without ../, drive or leading /'
        )
    name = '/'.join(part for part in parts if part not in ('', '.'))
    if not name.strip():
        raise DataError(f'the picture name is {show(value)}: write the name of the file')
    return name


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    """(H, W), or None where the file has none."""
    if height is None and width is None:
        return None
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, int) or not 0 < side < MAX_SIDE:
            raise DataError(f'{show(width)} x {show(height)} is no size of a picture: {AGAIN}')
    return height, width


def _attributes(value: Any) -> dict[str, str | tuple[str, ...]]:
    """Attribute -> value, those without one left out; VIA's checkboxes are {value: ticked}."""
    found = {}
    for key, item in _object({} if value is None else value, 'its region_attributes').items():
        if isinstance(item, dict):
            ticked = tuple(sorted(name for name, on in item.items() if on is True))
            item = ticked[0] if len(ticked) == 1 else ticked
        elif isinstance(item, int | float) and not isinstance(item, bool):
            item = str(item)
        if isinstance(item, str):
            item = item.strip()
        if item and isinstance(item, str | tuple):
            found[key] = item
    return found


def _number(value: Any, what: str, low: float = -MAX_SIDE) -> float:
    """A coordinate, or with `low` 0 a length, in pixels."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f'its {what} is {show(value)}, not a number: {REDRAW}')
    if not low <= value <= MAX_SIDE:  # as NaN is not
        raise DataError(f'its {what} is {show(value)}, not from {low} to {MAX_SIDE}: {REDRAW}')
    return float(value)


def _points(xs: Any, ys: Any) -> np.ndarray:
    """(N, 2) of two lists."""
    xs, ys = _list(xs, 'its list of x'), _list(ys, 'its list of y')
    if len(xs) != len(ys):
        raise DataError(f'it has {len(xs)} x and {len(ys)} y: {REDRAW}')
    pairs = [(_number(x, 'x'), _number(y, 'y')) for x, y in zip(xs, ys, strict=True)]
    return np.array(pairs, np.float64).reshape(-1, 2)


def _polygon(points_N2: np.ndarray) -> Shape:
    """A closed outline; VIA 1 repeats the first point at the end."""
    if len(points_N2) > 1 and (points_N2[0] == points_N2[-1]).all():
        points_N2 = points_N2[:-1]
    return Shape('polygon', points_N2)


def _polyline(points_N2: np.ndarray) -> Shape:
    """An open line; one whose ends meet is the region that it encloses."""
    if len(points_N2) > 3 and (points_N2[0] == points_N2[-1]).all():
        return _polygon(points_N2)
    return Shape('polyline', points_N2)


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> Shape:
    return Shape('polygon', np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], np.float64))


def _ellipse(x: float, y: float, rx: float, ry: float, theta: float = 0.0) -> Shape:
    return Shape('ellipse', np.array([(x, y)], np.float64), radii=(rx, ry), theta=theta)


def _unknown_shape(name: Any) -> DataError:
    if name in ('point', 'points'):
        return DataError('it is a point, which has no area: draw its outline or delete it')
    return DataError(f'its shape is {show(name)}, which is not known here: draw its outline')


# VIA


def _read_via(entries: Any, faults: list[str]) -> Iterator[Picture]:
    """VIA 1 and 2: {key: {filename, regions: a list, or {'0': ...} in version 1}}."""
    with _listed(faults):
        entries = _object(entries, '_via_img_metadata')
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        with _listed(faults, f'entry {show(key)}'):
            entry = _object(entry)
            name = _name(entry.get('filename'))
            found = []
            for n, region in enumerate(_via_regions(entry.get('regions')), 1):
                where = f'{show(name)}, region {n}'
                with _listed(faults, where):
                    region = _object(region)
                    shape = _via_shape(region.get('shape_attributes'))
                    attributes = _attributes(region.get('region_attributes'))
                    found.append(Region(where, [shape], attributes))
            yield Picture(name, None, found)


def _via_regions(regions: Any) -> list[Any]:
    if not isinstance(regions, dict):
        return _list(regions, 'its regions')
    # As JavaScript, and so VIA, goes through them: numbers first, in their order.
    numbers = {key for key in regions if re.fullmatch('[0-9]{1,9}', key)}
    order = [*sorted(numbers, key=int), *(key for key in regions if key not in numbers)]
    return [regions[key] for key in order]


def _via_shape(value: Any) -> Shape:
    item = _object(value, 'its shape_attributes')
    name = item.get('name')

    def at(*keys):
        return [_number(item.get(key), key) for key in keys]

    def long(*keys):
        return [_number(item.get(key), key, 0) for key in keys]

    if name in ('polygon', 'polyline'):
        points = _points(item.get('all_points_x'), item.get('all_points_y'))
        return _polygon(points) if name == 'polygon' else _polyline(points)
    if name == 'rect':
        (x, y), (width, height) = at('x', 'y'), long('width', 'height')
        return _rectangle(x, y, x + width, y + height)
    if name == 'circle':
        return _ellipse(*at('cx', 'cy'), *long('r', 'r'))
    if name == 'ellipse':
        theta = _number(item.get('theta', 0), 'theta')
        return _ellipse(*at('cx', 'cy'), *long('rx', 'ry'), theta)
    raise _unknown_shape(name)


def _read_via_csv(content: str, faults: list[str]) -> Iterator[Picture]:
    """A line for each region, or one with the shape {} for a picture that has none."""
    regions, bytes_of = defaultdict(list), {}
    before = csv.field_size_limit(text.MAX_BYTES)  # an outline of many points is a long field
    try:
        lines = csv.reader(io.StringIO(content, newline=''), strict=True)
        columns = len(next(lines))
        for row in filter(None, lines):
            with _listed(faults, f'line {lines.line_num}'):
                if len(row) != columns:
                    raise DataError(
                        f'it has {len(row)} fields, not {columns}: put a name with a comma in '
                        'quotes'
                    )
                name = _name(row[0])
                if bytes_of.setdefault(name, row[1]) != row[1]:
                    raise DataError(f'{show(name)} is of two sizes: rename one of the pictures')
                shape, attributes = _via_field(row[5]), _attributes(_via_field(row[6]))
                found = regions[name]
                if shape != {} or attributes:
                    where = f'{show(name)}, region {len(found) + 1}'
                    found.append(Region(where, [_via_shape(shape)], attributes))
    except csv.Error as error:
        faults.append(f'line {lines.line_num} is damaged ({error}): {AGAIN}')
    finally:
        csv.field_size_limit(before)
    for name, found in regions.items():
        yield Picture(name, None, found)


def _via_field(value: str) -> Any:
    return text.parse_json(value, AGAIN)


# COCO


def _read_coco(tree: dict[str, Any], faults: list[str]) -> Iterator[Picture]:
    images = _coco_table(tree, 'images', _coco_image, faults)
    categories = _coco_table(tree, 'categories', _coco_category, faults)
    damaged = bool(faults)  # then what an annotation refers to may be what could not be read
    items = []
    with _listed(faults):
        items = _list(tree['annotations'], 'annotations')
    for n, item in enumerate(items, 1):
        where = f'annotation {n}'
        with _listed(faults, where):
            item = _object(item)
            shapes, attributes = _coco_shapes(item.get('segmentation')), {}
            if (category := _find(categories, item, 'category_id', damaged)) is not None:
                attributes['category'] = category
            if (picture := _find(images, item, 'image_id', damaged)) is not None:
                where = f'{show(picture.name)}, {where}'
                picture.regions.append(Region(where, shapes, attributes))
    yield from images.values()


def _coco_table(tree: dict[str, Any], key: str, read: Any, faults: list[str]) -> dict[Any, Any]:
    """{id: what `read` makes of the item}."""
    items, found = [], {}
    with _listed(faults):
        items = _list(tree.get(key, []), key)
    for n, item in enumerate(items, 1):
        with _listed(faults, f'{key} {n}'):
            identity = _object(item).get('id')
            if isinstance(identity, bool) or not isinstance(identity, int | str):
                raise DataError(f'its id is {show(identity)}: give it a number')
            if identity in found:
                raise DataError(f'its id {show(identity)} is there twice: give it another')
            found[identity] = read(item)
    return found


def _coco_image(item: dict[str, Any]) -> Picture:
    return Picture(_name(item.get('file_name')), _size(item.get('height'), item.get('width')), [])


def _coco_category(item: dict[str, Any]) -> str:
    if not isinstance(item.get('name'), str) or not item['name'].strip():
        raise DataError(f'its name is {show(item.get("name"))}: give it one')
    return item['name'].strip()


def _find(table: dict[Any, Any], item: dict[str, Any], key: str, damaged: bool) -> Any:
    """What item[key] refers to; None where the file has no such table."""
    identity = item.get(key)
    if isinstance(identity, int | str) and not isinstance(identity, bool) and identity in table:
        return table[identity]
    if damaged or (not table and key == 'category_id'):
        return None
    raise DataError(f'its {key} {show(identity)} is not in the file: add it, or remove this')


def _coco_shapes(parts: Any) -> list[Shape]:
    """The parts, whose union the annotation is: one after the other they give that."""
    if isinstance(parts, dict):
        raise DataError('it is a run-length encoded mask (a crowd): export it as polygons')
    if not _list(parts, 'its segmentation'):
        raise DataError('it has no polygon: draw its outline')
    shapes = []
    for part in parts:
        if len(_list(part, 'a part of its segmentation')) % 2:
            raise DataError(f'a part of it has {len(part)} numbers, not x y x y ...: {REDRAW}')
        shapes.append(_polygon(_points(part[0::2], part[1::2])))
    return shapes


# labelme


def _read_labelme_folder(folder: Path, faults: list[str]) -> Iterator[Picture]:
    """Every labelme file in the folder and below, in the order of their names."""
    files = [path for path in sorted(folder.rglob('*.json')) if not hidden(path, folder)]
    if not files:
        raise DataError(f'{folder} holds no .json: give the annotation file, or labelme files')
    for path in files:
        inner = []
        try:
            with _listed(faults):
                tool, pictures = _read_file(path, inner)
                if tool != 'labelme':
                    raise DataError(f'{path} is of {tool}, not of labelme: give that file alone')
                yield from pictures
        finally:
            faults += [f'{path}: {fault}' for fault in inner]


def hidden(path: Path, folder: Path) -> bool:
    """Is there a leading dot below the folder, as in what systems and editors leave behind?"""
    return any(part.startswith('.') for part in path.relative_to(folder).parts)


def _read_labelme(tree: dict[str, Any], faults: list[str]) -> Picture:
    """labelme writes the way from its file to the picture: of that, the last name is taken."""
    value, name, size, items, regions = tree['imagePath'], 'imagePath', None, [], []
    with _listed(faults):
        name = _name(re.split(r'[/\\]', value)[-1] if isinstance(value, str) else value)
    with _listed(faults, show(name)):
        size = _size(tree.get('imageHeight'), tree.get('imageWidth'))
    with _listed(faults, show(name)):
        items = _list(tree['shapes'], 'its list of shapes')
    for n, item in enumerate(items, 1):
        where = f'{show(name)}, region {n}'
        with _listed(faults, where):
            attributes = _attributes({'label': _object(item).get('label')})
            regions.append(Region(where, [_labelme_shape(item)], attributes))
    return Picture(name, size, regions)


def _labelme_shape(item: dict[str, Any]) -> Shape:
    kind = item.get('shape_type') or 'polygon'
    pairs = _list(item.get('points'), 'its list of points')
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(f'its points are not all pairs of x and y: {REDRAW}')
    points = _points([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    if kind in ('polygon', 'oriented_rectangle'):
        return _polygon(points)
    if kind in ('line', 'linestrip'):
        return _polyline(points)
    if kind not in ('rectangle', 'circle'):
        raise _unknown_shape(kind)
    if len(points) != 2:
        raise DataError(f'it is a {kind} of {count(len(points), "point")}, not two: {REDRAW}')
    (x0, y0), (x1, y1) = points.tolist()
    if kind == 'circle':  # its centre and a point on it
        radius = math.hypot(x1 - x0, y1 - y0)
        return _ellipse(x0, y0, radius, radius)
    return _rectangle(x0, y0, x1, y1)


# Classes


def _choose_attribute(regions: Sequence[Region], attribute: str) -> tuple[str, list[str]]:
    """(the attribute that tells the classes apart, '' where there is none; faults)."""
    values = defaultdict(set)
    for region in regions:
        for key, value in region.attributes.items():
            values[key].add(show(value))
    choices = '; '.join(f'{show(key)} ({some(sorted(found), 5)})' for key, found in values.items())
    if attribute and attribute not in values and regions:
        there = f'they have {choices}' if values else 'they have none: leave it out'
        return '', [f'no region has the attribute {show(attribute)}: {there}']
    if not attribute and len(values) > 1:
        return '', [f'regions have several attributes, choose the one with the class: {choices}']
    return attribute or next(iter(values), ''), []


def _number_classes(
    regions: Sequence[Region], classes: Mapping[str, int] | None, attribute: str
) -> tuple[dict[str, int], list[int], str, list[str]]:
    """({class name: number}, each region's number, a note that says both, faults)."""
    numbers = {'background': 0, **(classes or {})}
    attribute, faults = _choose_attribute(regions, attribute)
    if faults:
        return numbers, [0] * len(regions), '', faults
    if not attribute:
        names = [name for name in classes or ['region'] if numbers.get(name, 1)]
        if len(names) > 1 and regions:
            faults.append(f'no region has an attribute that tells {some(names)} apart: give one')
        name = names[0] if names else 'region'
        number = numbers.setdefault(name, 1)
        return numbers, [number] * len(regions), f'every region is {show(name)} = {number}', faults
    found = Counter()
    for region in regions:
        value = region.attributes.get(attribute)
        if value is None:
            faults.append(f'{region.where} has no {show(attribute)}: fill it in, or delete it')
        elif isinstance(value, tuple):
            faults.append(f'{region.where} has {show(attribute)} {show(value)}: leave one ticked')
        else:
            found[value] += 1
    new = sorted(value for value in found if value not in numbers)
    if classes and new:
        told = some([f'{show(value)} ({count(found[value], "region")})' for value in new], 254)
        known = some([show(name) for name in numbers], 254)
        faults.append(f'{show(attribute)} has values that are no class: {told}; known are {known}')
    elif len(new) > 254:
        faults.append(
            f'{show(attribute)} has {len(new)} values, a mask holds 254: give the classes, or '
            'another attribute'
        )
    else:
        numbers |= {value: number for number, value in enumerate(new, 1)}
    told = some([f'{show(name)} = {number}' for name, number in numbers.items()], 254)
    how = 'as given' if classes else 'numbered in sorted order, unless classes are given'
    values = [region.attributes.get(attribute) for region in regions]
    labels = [numbers.get(value, 0) if isinstance(value, str) else 0 for value in values]
    return numbers, labels, f'classes by {show(attribute)}: {told} ({how})', faults
