"""Reads the files of annotation tools as shapes with class numbers.

VGG Image Annotator 1 and 2 (JSON of the whole project or only of the annotations, and CSV), COCO
(polygons and run-length masks), and labelme and similar tools (a file, or a folder of files).

The files are not trusted: their size is limited before they are parsed, every value is checked, and
the image names in them are only compared with existing names.
"""

import base64
import contextlib
import csv
import io
import math
import os
import re
import reprlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pspnet_jax.data.formats import files
from pspnet_jax.data.formats.outlines import MAX_PIXELS, MAX_SIDE, Shape, has_area
from pspnet_jax.runtime import text
from pspnet_jax.runtime.errors import ConfigError, DataError, first_line, some

MAX_FAULTS = 1000  # after which reading of a file stops
CSV_HEADER = (
    'filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,'
    'region_attributes'
)
AGAIN = 'export the annotations again'
REDRAW = 'draw it again'
# What is skipped, as named in notes.
POINTS = 'points, which have no area'
NO_OUTLINE = 'annotations without an outline (a box is not an outline)'
NO_AREA = 'outlines with fewer than three points or without area'
NO_SIZE = 'the check of image sizes, which the file does not have'


class Annotations(NamedTuple):
    """A file's content: {image name: shapes in file order}, {class name: number}, {image name:
    (H, W)} if it has sizes, and notes for the user.

    `attribute` is the one that distinguishes the classes, or ''. With `loose`, images may be in
    another folder: labelme files do not tell in which one.
    """

    shapes: dict[str, list[Shape]]
    classes: dict[str, int]
    sizes: dict[str, tuple[int, int]]
    notes: list[str]
    attribute: str = ''
    loose: bool = False


class Region(NamedTuple):
    """Shapes without a class yet; several if a COCO annotation has parts.

    `attributes` holds a text for each attribute, or a tuple if several boxes are ticked.
    """

    where: str
    shapes: list[Shape]
    attributes: dict[str, str | tuple[str, ...]]


class Picture(NamedTuple):
    """An image: its name in the file, its (H, W) or None, and its regions."""

    name: str
    size: tuple[int, int] | None
    regions: list[Region]


class Findings(NamedTuple):
    """What reading finds besides the images: faults, {reason: where} of what is skipped, and the
    names of all classes in order if the file lists them.
    """

    faults: list[str]
    passed_over: dict[str, list[str]]
    declared: list[str]


def read(
    path: str | Path, classes: Mapping[str, int] | None = None, attribute: str = ''
) -> tuple[Annotations, list[str]]:
    """(the regions of every image in a file of any tool, its faults).

    Without `classes`, COCO's categories are numbered 1, 2, ... in the order of their ids, used or
    not. The values of other attributes are numbered in sorted order if they are used. 'background'
    and '_background_' are 0; if regions have no attribute, all are class 1. With `classes`, other
    names are a fault. `attribute` is needed if regions have several; COCO's is named category,
    labelme's label. Raises DataError if it is not an annotation file, ConfigError for classes that
    no mask can hold.
    """
    for name, number in (classes or {}).items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= 255:
            raise ConfigError(f'class {show(name)} is {show(number)}: give a number 0 to 255')
    path, findings = Path(path).expanduser(), Findings([], defaultdict(list), [])
    faults, passed = findings.faults, findings.passed_over
    tool, shapes, sizes, regions = '', {}, {}, []
    with contextlib.suppress(_TooManyFaultsError):
        tool, pictures = (_open_folder if os.path.isdir(path) else _open)(path, findings)
        for picture in pictures:
            if picture.name in shapes:
                faults.append(f'{show(picture.name)} is listed twice: keep one, or rename an image')
            shapes.setdefault(picture.name, [])
            regions += [(picture.name, region) for region in picture.regions]
            if picture.size:
                sizes[picture.name] = picture.size
    if not shapes and not faults:
        faults.append(f'it names no image: {AGAIN}')
    without_area = len(passed[POINTS]) + len(passed[NO_OUTLINE])
    if without_area and not regions and not faults:
        told = count(without_area, 'region')
        faults.append(
            f'none of its {told} has an outline (points and boxes have none): draw outlines'
        )
    numbers, labels, attribute, note = _number_classes(
        [region for _, region in regions], classes, attribute, findings
    )
    for (name, region), label in zip(regions, labels, strict=True):
        shapes[name] += [shape._replace(label=label, where=region.where) for shape in region.shapes]
    found = f'{tool}: {count(len(shapes), "picture")}, {count(len(regions), "region")}'
    left = [
        f'skipped: {reason} ({len(places)}): {some(places, separator="; ")}'
        for reason, places in passed.items()
        if places
    ]
    notes, loose = [found, note, *left], tool == 'labelme'
    return Annotations(shapes, numbers, sizes, notes, attribute, loose), faults


def is_labelme(path: Path) -> bool:
    with contextlib.suppress(DataError):
        tree = text.read_json(path)
        return isinstance(tree, dict) and {'shapes', 'imagePath'} <= tree.keys()
    return False


# Messages.

_shorten = reprlib.Repr()
_shorten.maxlevel, _shorten.maxstring, _shorten.maxother = 2, 120, 80


def show(value: Any) -> str:
    """One short printable line for any value."""
    return _shorten.repr(value)


def count(number: int, noun: str) -> str:
    return f'{number} {noun}{"" if number == 1 else "s"}'


def all_faults(source: str | Path, faults: Sequence[str]) -> DataError:
    """A DataError with one line for a single fault, else a list."""
    if len(faults) == 1:
        return DataError(f'{source}: {faults[0]}')
    more = ['and there may be more'] * (len(faults) >= MAX_FAULTS)
    return DataError(f'{len(faults)} faults in {source}:', [*faults[:MAX_FAULTS], *more])


@contextlib.contextmanager
def listed(faults: list[str], where: str = '') -> Iterator[None]:
    """Append a DataError to `faults` instead of raising it."""
    try:
        yield
    except DataError as error:
        faults.append(f'{where}: {error}' if where else str(error))


class _TooManyFaultsError(Exception):
    pass


class _PassedOverError(Exception):
    """Something is skipped for a reason that is noted; it is not a fault."""


@contextlib.contextmanager
def _listed(findings: Findings, where: str = '') -> Iterator[None]:
    try:
        with listed(findings.faults, where):
            yield
    except _PassedOverError as reason:
        findings.passed_over[str(reason)].append(where)
    if len(findings.faults) >= MAX_FAULTS:
        raise _TooManyFaultsError


# Files and values.


def _open(path: Path, findings: Findings) -> tuple[str, Iterator[Picture]]:
    """The tool that wrote the file, and its pictures."""
    content = text.read(path, AGAIN)
    header = content.partition('\n')[0].strip().lstrip('#').replace('"', '')
    if header == CSV_HEADER:
        return 'VIA CSV', _read_via_csv(content, findings)
    if path.suffix.lower() == '.csv':
        raise DataError(f'{path} does not begin with {CSV_HEADER}: export it from VIA')
    try:
        tree = text.parse_json(content, AGAIN)
    except DataError as error:
        raise DataError(f'{path} is {error}') from error
    if isinstance(tree, dict):
        if '_via_img_metadata' in tree:
            return 'VIA 2 project', _read_via(tree['_via_img_metadata'], findings)
        if {'annotations', 'images'} <= tree.keys():
            return 'COCO', _read_coco(tree, findings)
        if {'shapes', 'imagePath'} <= tree.keys():
            return 'labelme', iter([_read_labelme(tree, findings)])
        if any(isinstance(item, dict) and 'filename' in item for item in tree.values()):
            return 'VIA', _read_via(tree, findings)
    raise DataError(
        f'{path} is not VIA 1 or 2 (JSON or CSV), COCO (images and annotations) or labelme '
        '(shapes and imagePath): export the annotations in one of these formats'
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
    """The image's path below some folder, with forward slashes.

    An absolute path, too, is only compared with existing images.
    """
    name = unicodedata.normalize('NFC', value if isinstance(value, str) else '')
    parts = name.replace('\\', '/').split('/')
    name = '/'.join(part for part in parts if part not in ('', '.'))
    if not name.strip():
        raise DataError(f'the image name is {show(value)}: write the name of the file')
    return name


def _whole(value: Any) -> Any:
    """An int for a whole number written as 7, 7.0 or '7'; else the value."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch('0|-?[1-9][0-9]{0,17}', value):
        return int(value)
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    """(H, W), or None if the file has none or 0."""
    sides = _whole(height), _whole(width)
    known = [side for side in sides if side is not None]
    if all(_is_int(side) and 0 <= side < MAX_SIDE for side in known):
        return sides if all(sides) else None
    raise DataError(f'{show(width)} x {show(height)} is not a valid image size: {AGAIN}')


def _attributes(value: Any) -> dict[str, str | tuple[str, ...]]:
    """{attribute: value}, without empty ones; VIA's checkboxes are {value: ticked}."""
    found = {}
    for key, item in _object({} if value is None else value, 'its region_attributes').items():
        if isinstance(item, dict):
            ticked = tuple(sorted(name for name, on in item.items() if on is True))
            item = ticked[0] if len(ticked) == 1 else ticked
        elif isinstance(item, float) or _is_int(item):
            item = str(item)
        if isinstance(item, str):
            item = item.strip()
        if item and isinstance(item, str | tuple):
            found[key] = item
    return found


def _number(value: Any, what: str, low: float = -MAX_SIDE) -> float:
    """A coordinate in pixels, or a length with `low` 0."""
    if not isinstance(value, float) and not _is_int(value):
        raise DataError(f'its {what} is {show(value)}, not a number: {REDRAW}')
    if not low <= value <= MAX_SIDE:  # True for NaN too
        raise DataError(f'its {what} is {show(value)}, not from {low} to {MAX_SIDE}: {REDRAW}')
    return float(value)


def _points(xs: Any, ys: Any) -> np.ndarray:
    """(N, 2) from two lists."""
    xs, ys = _list(xs, 'its list of x'), _list(ys, 'its list of y')
    if len(xs) != len(ys):
        raise DataError(f'it has {len(xs)} x and {len(ys)} y: {REDRAW}')
    pairs = [(_number(x, 'x'), _number(y, 'y')) for x, y in zip(xs, ys, strict=True)]
    return np.array(pairs, np.float64).reshape(-1, 2)


def _outline(points: Any, open_line: bool = False) -> Shape:
    """A closed outline; VIA 1 repeats the first point at the end.

    An open line whose ends meet is the region that it encloses.
    """
    points_N2 = np.array(points, np.float64).reshape(-1, 2)
    meets = len(points_N2) > (3 if open_line else 1) and (points_N2[0] == points_N2[-1]).all()
    kind = 'polyline' if open_line and not meets else 'polygon'
    return Shape(kind, points_N2[:-1] if meets else points_N2)


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> Shape:
    return _outline([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _ellipse(x: float, y: float, rx: float, ry: float, theta: float = 0.0) -> Shape:
    return Shape('ellipse', np.array([(x, y)], np.float64), radii=(rx, ry), theta=theta)


def _unknown_shape(name: Any) -> Exception:
    if name in ('point', 'points'):
        return _PassedOverError(POINTS)
    return DataError(f'its shape {show(name)} is unknown: draw its outline')


# VIA


def _read_via(entries: Any, findings: Findings) -> Iterator[Picture]:
    """VIA 1 and 2: {key: {filename, regions: a list, or {'0': ...} in version 1}}."""
    with _listed(findings):
        entries = _object(entries, '_via_img_metadata')
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        with _listed(findings, f'entry {show(key)}'):
            name, found = _name(_object(entry).get('filename')), []
            for n, region in enumerate(_via_regions(entry.get('regions')), 1):
                where = f'{show(name)}, region {n}'
                with _listed(findings, where):
                    shape = _via_shape(_object(region).get('shape_attributes'))
                    attributes = _attributes(region.get('region_attributes'))
                    found.append(Region(where, [shape], attributes))
            yield Picture(name, None, found)


def _via_regions(regions: Any) -> list[Any]:
    if not isinstance(regions, dict):
        return _list(regions, 'its regions')
    # In the order of JavaScript, and so of VIA: numbers first, in ascending order.
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
        return _outline(points, name == 'polyline')
    if name == 'rect':
        (x, y), (width, height) = at('x', 'y'), long('width', 'height')
        return _rectangle(x, y, x + width, y + height)
    if name == 'circle':
        return _ellipse(*at('cx', 'cy'), *long('r', 'r'))
    if name == 'ellipse':
        theta = _number(item.get('theta', 0), 'theta')
        return _ellipse(*at('cx', 'cy'), *long('rx', 'ry'), theta)
    raise _unknown_shape(name)


def _read_via_csv(content: str, findings: Findings) -> Iterator[Picture]:
    """One line per region, or one with the shape {} for an image without regions."""
    regions, bytes_of, numbers = defaultdict(list), {}, Counter()
    before = csv.field_size_limit(text.MAX_BYTES)  # an outline of many points is a long field
    try:
        lines = csv.reader(io.StringIO(content, newline=''), strict=True)
        columns = len(next(lines))
        for row in filter(None, lines):
            with _listed(findings, f'line {lines.line_num}'):
                if len(row) != columns:
                    raise DataError(
                        f'it has {len(row)} fields, not {columns}: put names with commas in quotes'
                    )
                name = _name(row[0])
                if bytes_of.setdefault(name, row[1]) != row[1]:
                    raise DataError(f'{show(name)} has two file sizes: rename one of the images')
                shape, attributes = (text.parse_json(field, AGAIN) for field in row[5:7])
                attributes, found = _attributes(attributes), regions[name]
                if shape != {} or attributes:
                    numbers[name] += 1
                    where = f'{show(name)}, region {numbers[name]}'
                    found.append(Region(where, [_via_shape(shape)], attributes))
    except csv.Error as error:
        findings.faults.append(f'line {lines.line_num} is corrupted ({error}): {AGAIN}')
    finally:
        csv.field_size_limit(before)
    for name, found in regions.items():
        yield Picture(name, None, found)


# COCO


def _read_coco(tree: dict[str, Any], findings: Findings) -> Iterator[Picture]:
    images = _coco_table(tree, 'images', findings, _coco_image)
    categories = _coco_table(tree, 'categories', findings, _coco_category)
    # Roboflow writes a category 0 that is only the group of the others: leave it out.
    groups = {group for name, group in categories.values() if group != name}
    ids = sorted(categories, key=lambda key: (isinstance(key, str), key))
    names = [categories[key][0] for key in ids if key != 0 or categories[key][0] not in groups]
    findings.declared.extend('background' if is_background(name) else name for name in names)
    items, unnamed = [], set()
    with _listed(findings):
        items = _list(tree['annotations'], 'annotations')
    if findings.faults:  # annotations may refer to items that could not be read
        items = []
    for n, item in enumerate(items, 1):
        where = f'annotation {n}'
        with _listed(findings, where):
            picture, attributes = _find(images, _object(item), 'image_id'), {}
            if categories:
                attributes['category'], _ = _find(categories, item, 'category_id')
            else:
                unnamed.add(show(item.get('category_id')))
            where = f'{show(picture.name)}, {where}'
            with _listed(findings, where):
                shapes = _coco_shapes(item.get('segmentation'), picture, findings, where)
                picture.regions.append(Region(where, shapes, attributes))
                if picture.size is None and shapes[0].kind == 'mask':
                    images[_whole(item['image_id'])] = picture._replace(size=shapes[0].size)
    if len(unnamed) > 1:
        findings.faults.append(
            f'its annotations have category_id {some(sorted(unnamed))}, but it has no categories: '
            'add them, "categories": [{"id": 1, "name": "..."}, ...]'
        )
    for picture in images.values():
        if picture.size is None:
            findings.passed_over[NO_SIZE].append(show(picture.name))
        yield picture


def _coco_table(tree: dict[str, Any], key: str, findings: Findings, make: Callable) -> dict:
    """{id: `make(item)`}."""
    items, found = [], {}
    with _listed(findings):
        items = _list(tree.get(key, []), key)
    for n, item in enumerate(items, 1):
        with _listed(findings, f'{key} {n}'):
            identity = _whole(_object(item).get('id'))
            if not _is_int(identity) and not isinstance(identity, str):
                raise DataError(f'its id is {show(identity)}: give it a number')
            if identity in found:
                raise DataError(f'its id {show(identity)} is used twice: give it another')
            found[identity] = make(item)
    return found


def _coco_image(item: dict[str, Any]) -> Picture:
    return Picture(_name(item.get('file_name')), _size(item.get('height'), item.get('width')), [])


def _coco_category(item: dict[str, Any]) -> tuple[str, str]:
    """(name, name of its group)."""
    if not isinstance(item.get('name'), str) or not item['name'].strip():
        raise DataError(f'its name is {show(item.get("name"))}: give it one')
    return item['name'].strip(), str(item.get('supercategory') or '').strip()


def _find(table: dict[Any, Any], item: dict[str, Any], key: str) -> Any:
    """The item to which item[key] refers."""
    identity = _whole(item.get(key))
    if (_is_int(identity) or isinstance(identity, str)) and identity in table:
        return table[identity]
    raise DataError(f'its {key} {show(item.get(key))} is not in the file: add it, or remove this')


def _coco_shapes(parts: Any, picture: Picture, findings: Findings, where: str) -> list[Shape]:
    """The parts of an annotation, which is their union."""
    shapes = [_coco_mask(parts, picture)] if isinstance(parts, dict) else []
    for part in _list(parts or [], 'its segmentation') if not shapes else ():
        if len(_list(part, 'a part of its segmentation')) % 2:
            raise DataError(f'a part of it has {len(part)} numbers, not x y x y ...: {REDRAW}')
        shapes.append(_outline(_points(part[0::2], part[1::2])))
    sound = [s for s in shapes if (s.kind == 'mask' or len(s.points) > 2) and has_area(s)]
    if not sound:
        raise _PassedOverError(NO_OUTLINE)
    findings.passed_over[NO_AREA] += [where] * (len(shapes) - len(sound))
    return sound


def _coco_mask(item: dict[str, Any], picture: Picture) -> Shape:
    """A mask from run lengths, alternately outside and inside, down the columns.

    Compressed ones are unpacked here instead of by pycocotools (2.0.11), which reads beyond the end
    of a truncated text and fills missing runs with uninitialised memory.
    """
    sides = _list(item.get('size'), 'the size of its mask')
    size = _size(*sides) if len(sides) == 2 else None
    if not size or math.prod(size) > MAX_PIXELS:
        raise DataError(f'the size of its mask is {show(sides)}, not height and width: {AGAIN}')
    if picture.size and size != picture.size:
        raise DataError(
            f'its mask is {size[1]} x {size[0]} pixels, but the image is {picture.size[1]} x '
            f'{picture.size[0]}: {AGAIN}'
        )
    counts, whole = item.get('counts'), math.prod(size)
    if isinstance(counts, str):
        counts = _unpack(counts)
    for number in _list(counts, 'its run lengths'):
        if not _is_int(number) or not 0 <= number <= whole:
            raise DataError(f'one of its run lengths is {show(number)}: {AGAIN}')
    if (total := sum(counts)) != whole:
        raise DataError(f'its run lengths add up to {total}, not {size[0]} x {size[1]}: {AGAIN}')
    runs = np.cumsum(counts)[: len(counts) // 2 * 2].reshape(-1, 2)
    return Shape('mask', np.zeros((1, 2)), size=size, runs=runs)


def _unpack(counts: str) -> list[int]:
    """Unpack COCO's compressed run lengths.

    Each character has five bits, low ones first, and a sixth if more follow. From the fourth number
    on, it is the difference from the last but one.
    """
    found, value, bits = [], 0, 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or bits > 30:
            raise DataError(f'its run lengths have {show(character)}: {AGAIN}')
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            if code & 16:
                value -= 1 << bits
            found.append(value + (found[-2] if len(found) > 2 else 0))
            value = bits = 0
    if bits:
        raise DataError(f'its run lengths are cut off: {AGAIN}')
    return found


# labelme


def _open_folder(folder: Path, findings: Findings) -> tuple[str, Iterator[Picture]]:
    """Every labelme file in the folder and its subfolders, sorted by name.

    If several images share a name, the image is in the same subfolder as its file.
    """
    paths = files.below(folder, ('.json',))
    if not paths:
        raise DataError(f'{folder} holds no .json: give an annotation file, or labelme files')

    def pictures() -> Iterator[Picture]:
        for path in paths:
            inner = findings._replace(faults=[])
            try:
                with _listed(findings):
                    tool, found = _open(path, inner)
                    if tool != 'labelme':
                        raise DataError(f'{path} is {tool}, not labelme: give only that file')
                    below = path.parent.relative_to(folder).as_posix()
                    for picture in found:
                        yield picture._replace(name=_name(f'{below}/{picture.name}'))
            finally:
                findings.faults.extend(f'{path}: {fault}' for fault in inner.faults)

    return 'labelme', pictures()


def _read_labelme(tree: dict[str, Any], findings: Findings) -> Picture:
    """Read one file; labelme stores the path to the image, of which the last name is used."""
    value, name, size, items, regions = tree['imagePath'], 'imagePath', None, [], []
    with _listed(findings):
        name = _name(re.split(r'[/\\]', value)[-1] if isinstance(value, str) else value)
    with _listed(findings, show(name)):
        items = _list(tree['shapes'], 'its list of shapes')
        size = _size(tree.get('imageHeight'), tree.get('imageWidth'))
        if size is None:
            raise _PassedOverError(NO_SIZE)
    for n, item in enumerate(items, 1):
        where = f'{show(name)}, region {n}'
        with _listed(findings, where):
            attributes = _attributes({'label': _object(item).get('label')})
            regions.append(Region(where, [_labelme_shape(item)], attributes))
    return Picture(name, size, regions)


def _labelme_shape(item: dict[str, Any]) -> Shape:
    """A shape of labelme or X-AnyLabeling ('rotation', 'quadrilateral', four-corner rectangles)."""
    kind = item.get('shape_type') or 'polygon'
    pairs = _list(item.get('points'), 'its list of points')
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(f'its points are not all pairs of x and y: {REDRAW}')
    points = _points([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    if kind == 'rectangle' and len(points) == 4:
        low, high = points.min(0), points.max(0)
        level = ((points == low) | (points == high)).all()  # corners may be in any order
        return _rectangle(*low, *high) if level else _outline(points)
    if kind in ('polygon', 'oriented_rectangle', 'rotation', 'quadrilateral'):
        return _outline(points)
    if kind in ('line', 'linestrip'):
        return _outline(points, open_line=True)
    if kind not in ('rectangle', 'circle', 'mask'):
        raise _unknown_shape(kind)
    if len(points) != 2:
        raise DataError(f'it is a {kind} with {count(len(points), "point")}, not two: {REDRAW}')
    (x0, y0), (x1, y1) = points.tolist()
    if kind == 'circle':  # its centre and a point on it
        return _ellipse(x0, y0, *[math.hypot(x1 - x0, y1 - y0)] * 2)
    if kind == 'mask':
        return _labelme_mask(item.get('mask'), points)
    return _rectangle(x0, y0, x1, y1)


def _labelme_mask(value: Any, corners: np.ndarray) -> Shape:
    """A mask from a base64 PNG, nonzero inside; its first and last pixel are the corners."""
    (x0, y0), (x1, y1) = np.rint([corners.min(0), corners.max(0)]).astype(int).tolist()
    try:
        content = io.BytesIO(base64.b64decode(value, validate=True))
        with Image.open(content, formats=('PNG',)) as picture:
            width, height = picture.size
            if abs(width - (x1 - x0 + 1)) > 1 or abs(height - (y1 - y0 + 1)) > 1:
                raise DataError(
                    f'its mask is {width} x {height} pixels, but its corners span '
                    f'{x1 - x0 + 1} x {y1 - y0 + 1}: {REDRAW}'
                )
            if width * height > MAX_PIXELS:
                raise DataError(f'its mask is {width} x {height} pixels, too large: {REDRAW}')
            inside = np.asarray(picture) > 0
    except DataError:
        raise
    except Exception as error:  # base64 and Pillow's parser raise their own
        raise DataError(f'its mask is not a PNG ({first_line(error)}): {REDRAW}') from error
    if inside.ndim != 2:
        raise DataError(f'its mask is in colour: {REDRAW}')
    flat = np.pad(inside.ravel(order='F'), 1)
    runs = np.flatnonzero(flat[1:] != flat[:-1]).reshape(-1, 2)
    return Shape('mask', np.array([(x0, y0)], np.float64), size=inside.shape, runs=runs)


# Classes


def is_background(name: str) -> bool:
    """Whether a tool's name means background: 'background', '_background_', '__background__'."""
    return name.strip('_').lower() == 'background'


def _choose_attribute(regions: Sequence[Region], attribute: str) -> str:
    """The attribute that distinguishes the classes, or ''."""
    values = defaultdict(set)
    for region in regions:
        for key, value in region.attributes.items():
            values[key].add(show(value))
    choices = '; '.join(f'{show(key)} ({some(sorted(found), 5)})' for key, found in values.items())
    if attribute and attribute not in values and regions:
        there = f'they have {choices}' if values else 'they have none: leave it out'
        raise DataError(f'no region has the attribute {show(attribute)}: {there}')
    if not attribute and len(values) > 1:
        raise DataError(
            f'regions have several attributes: choose the one with the class: {choices}'
        )
    return attribute or next(iter(values), '')


def _number_classes(
    regions: Sequence[Region], classes: Mapping[str, int] | None, attribute: str, findings: Findings
) -> tuple[dict[str, int], list[int], str, str]:
    """({class name: number}, each region's number, the attribute with the class, a note)."""
    faults, declared = findings.faults, findings.declared
    numbers = {'background': 0, **(classes or {})}
    try:
        attribute = _choose_attribute(regions, attribute)
    except DataError as error:
        faults.append(str(error))
        return numbers, [0] * len(regions), '', ''
    if not attribute and not declared:
        names = [name for name in classes or () if numbers[name]] or ['region']
        if len(names) > 1 and regions:
            faults.append(f'no region has an attribute that distinguishes {some(names)}: add one')
        number = numbers.setdefault(names[0], 1)
        note = f'every region is {show(names[0])} = {number}'
        return numbers, [number] * len(regions), '', note
    attribute, values = attribute or 'category', []
    for region in regions:
        value = region.attributes.get(attribute, '')
        if not value:
            faults.append(f'{region.where} has no {show(attribute)}: fill it in, or delete it')
        elif isinstance(value, tuple):
            faults.append(f'{region.where} has {show(attribute)} {show(value)}: tick only one')
        elif value not in numbers and is_background(value):
            value = 'background'
        values.append(value)
    found = Counter(value for value in values if value and isinstance(value, str))
    # Numbers of listed classes do not depend on regions, so files of some classes agree.
    listed = () if classes else declared or sorted(found)
    new = [name for name in dict.fromkeys(listed) if name != 'background']
    odd = [show(name) for name in new if len(name) > 200 or not name.isprintable()]
    if len(new) > 254:
        told = f'{len(new)} values, but a mask holds 254: give the classes, or another attribute'
        faults.append(f'{show(attribute)} has {told}')
    elif odd:
        told = f'not names of at most 200 printable characters: {some(odd)}'
        faults.append(f'{show(attribute)} has values that are {told}')
    else:
        numbers |= {name: number for number, name in enumerate(new, 1)}
        if unknown := sorted(found.keys() - numbers.keys()):
            told = some([f'{show(name)} ({count(found[name], "region")})' for name in unknown], 254)
            faults.append(
                f'{show(attribute)} has values that are not classes: {told}; the classes are '
                f'{some([show(name) for name in numbers], 254)}: rename or remove the values, or '
                'before training add them to the classes (model.class_names, or --classes)'
            )
    told = some([f'{show(name)} = {number}' for name, number in numbers.items()], 254)
    how = 'in the order of their ids' if declared else 'those found, in sorted order'
    note = f'classes by {show(attribute)}: {told} ({"as given" if classes else how})'
    return numbers, [numbers.get(value, 0) for value in values], attribute, note
