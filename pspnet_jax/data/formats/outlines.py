"""Regions given by outlines or run lengths: makes their masks and finds their faults.

Coordinates are x to the right and y down in pixels; (0, 0) is the upper left corner of the image.
Pixel (row r, column c) is in a region if its centre (c + 0.5, r + 0.5) is.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pspnet_jax.runtime.errors import DataError

MAX_SIDE = 2**16  # of an image; coordinates may be up to twice that
MAX_PIXELS = 2**29  # a slide of 20,000 x 20,000 has 2**28.6
MAX_WORK = 2**32  # visits to pixels for one image's regions: under a minute
MAX_PAIRS = 2**26  # of edges per image that are searched for crossings
ONE = 2**13  # grid steps per pixel: products of two differences stay below 2**62
HALF = ONE // 2
BAND = 2**22  # pixels that are filled at a time


class Shape(NamedTuple):
    """A 'polygon' or 'polyline' of points (N, 2) x y, an 'ellipse' around points[0], or a 'mask' of
    `size` H W whose upper left corner is points[0], in whole pixels.

    An ellipse's `radii` are along its own axes; the first is rotated by `theta` radians from x
    towards y. A mask's `runs` (N, 2) hold the first pixel of each run and the one after its last,
    counted down the columns as in COCO. `where` names the region in messages.
    """

    kind: str
    points: np.ndarray
    label: int = 1
    radii: tuple[float, float] = (0.0, 0.0)
    theta: float = 0.0
    where: str = 'region'
    size: tuple[int, int] = (0, 0)
    runs: np.ndarray | None = None


def rasterize(
    shapes: Sequence[Shape], size: tuple[int, int], *, line_width: float = 1.0
) -> np.ndarray:
    """H W uint8: the label of the last shape that contains a pixel's centre, else 0.

    Polygons follow the even-odd rule exactly, with points rounded to 1/8192 of a pixel. A centre on
    an edge is inside if the region is to its right, or below a horizontal edge, so two neighbouring
    regions never share or miss a pixel. Ellipses exclude their edge. A polyline is a line of
    `line_width` pixels with round ends and joints. Raises DataError for an excessive size or
    number of shapes.
    """
    check_size('a picture', size)
    if fault := _out_of_proportion(shapes, size):
        raise DataError(fault)
    mask_HW = np.zeros(size, np.uint8)
    for shape in shapes:
        for part in _parts(shape, line_width):
            for window, inside in _fill(part, size):
                mask_HW[window][inside] = shape.label
    return mask_HW


def check_size(what: object, size: tuple[int, int]) -> None:
    H, W = size
    if not (0 < H < MAX_SIDE and 0 < W < MAX_SIDE and H * W <= MAX_PIXELS):
        raise DataError(f'{what} of {W} x {H} pixels is too large for a mask: cut it into pieces')


def _parts(shape: Shape, line_width: float) -> Iterator[Shape]:
    """The shape itself; for a polyline, one rectangle per segment and one disc per point."""
    if shape.kind != 'polyline':
        yield shape
        return
    radius = line_width / 2
    for point in shape.points:
        yield Shape('ellipse', point[None], radii=(radius, radius))
    for a, b in zip(shape.points[:-1], shape.points[1:], strict=True):
        along = b - a
        if length := math.hypot(*along):
            side = np.array([-along[1], along[0]]) * (radius / length)
            yield Shape('polygon', np.stack([a + side, b + side, b - side, a - side]))


def _bounds(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest x y."""
    if shape.kind == 'ellipse':
        cos, sin = math.cos(shape.theta), math.sin(shape.theta)
        rx, ry = shape.radii
        reach = np.array([math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)])
        return shape.points[0] - reach, shape.points[0] + reach
    if shape.kind == 'mask':
        return shape.points[0], shape.points[0] + shape.size[::-1]
    return shape.points.min(0), shape.points.max(0)


def _box(shape: Shape, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(first row, row after the last, first column, column after the last) within the image."""
    if not len(shape.points):
        return 0, 0, 0, 0
    (x0, y0), (x1, y1) = _bounds(shape)
    H, W = size
    top, left = max(0, math.floor(y0)), max(0, math.floor(x0))
    return top, max(top, min(H, math.ceil(y1))), left, max(left, min(W, math.ceil(x1)))


def _fill(shape: Shape, size: tuple[int, int]) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield (window of the image, where in it the shape is) for bands of rows, or of columns if the
    shape is a mask.
    """
    top, bottom, left, right = _box(shape, size)
    if bottom == top or right == left:
        return
    down = shape.kind == 'mask'
    first, last, breadth = (left, right, shape.size[0]) if down else (top, bottom, right - left)
    inside = {'mask': _in_mask, 'ellipse': _in_ellipse}.get(shape.kind, _in_polygon)
    step = max(1, BAND // breadth)
    for at in range(first, last, step):
        band = slice(at, min(at + step, last))
        window = (slice(top, bottom), band) if down else (band, slice(left, right))
        yield window, inside(shape, *window)


def _grid(points_N2: np.ndarray) -> np.ndarray:
    return np.rint(points_N2 * ONE).astype(np.int64)


def _in_polygon(shape: Shape, rows: slice, columns: slice) -> np.ndarray:
    """Where the number of edges to the left of, or at, a pixel's centre is odd.

    Each edge toggles a row from the first centre that is not left of it. Integers avoid rounding,
    so an edge that two polygons share is the same for both.
    """
    start = _grid(shape.points)
    end = np.roll(start, -1, axis=0)
    down = (start[:, 1] < end[:, 1])[:, None]
    (x0, y0), (x1, y1) = np.where(down, start, end).T, np.where(down, end, start).T
    # An edge covers the rows with centres in y0 <= y < y1, so two edges that meet share no row.
    first = np.clip(-((HALF - y0) // ONE), rows.start, rows.stop)
    count = np.clip(-((HALF - y1) // ONE), rows.start, rows.stop) - first
    kept = np.flatnonzero(count)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    toggle = np.zeros(height * (width + 1), np.uint8)
    for part in _batches(count[kept]):
        edges = kept[part]
        edge = np.repeat(edges, count[edges])
        row = first[edge] + _ranks(count[edges])
        steps = (row * ONE + HALF - y0[edge]) * (x1 - x0)[edge]
        whole, rest = np.divmod(steps, (y1 - y0)[edge])
        column = (x0[edge] + whole - HALF + ONE - 1 + (rest > 0)) // ONE
        column = np.clip(column, columns.start, columns.stop) - columns.start
        np.add.at(toggle, (row - rows.start) * (width + 1) + column, np.uint8(1))
    toggle = toggle.reshape(height, width + 1)[:, :-1]
    return (np.cumsum(toggle, axis=1, dtype=np.uint8) & 1).astype(bool)


def _ranks(counts: np.ndarray) -> np.ndarray:
    """0 .. n-1 for each n in counts, concatenated."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _batches(counts: np.ndarray, most: int = 2**20) -> Iterator[slice]:
    """Slices of `counts` with a sum of about `most`."""
    batch = np.cumsum(counts) // most
    ends = np.flatnonzero(np.diff(batch)) + 1
    for first, last in zip([0, *ends], [*ends, len(counts)], strict=True):
        if last > first:
            yield slice(first, last)


def _in_ellipse(shape: Shape, rows: slice, columns: slice) -> np.ndarray:
    (x, y), (rx, ry) = shape.points[0], shape.radii
    dx = np.arange(columns.start, columns.stop) + 0.5 - x
    dy = (np.arange(rows.start, rows.stop) + 0.5 - y)[:, None]
    cos, sin = math.cos(shape.theta), math.sin(shape.theta)
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    # Without a division: integer centres and radii stay exact.
    return (u * ry) ** 2 + (v * rx) ** 2 < (rx * ry) ** 2


def _in_mask(shape: Shape, rows: slice, columns: slice) -> np.ndarray:
    """Where the number of run boundaries before or at a pixel is odd."""
    (x, y), height = shape.points[0].astype(int), shape.size[0]
    first, last = (columns.start - x) * height, (columns.stop - x) * height
    begin = np.searchsorted(shape.runs[:, 1], first)
    end = np.searchsorted(shape.runs[:, 0], last)
    ends = np.clip(shape.runs[begin:end].ravel(), first, last) - first
    toggle = np.bincount(ends, minlength=last - first + 1)[:-1].astype(np.uint8)
    inside = np.cumsum(toggle, dtype=np.uint8) & 1
    return inside.reshape(-1, height).T[rows.start - y : rows.stop - y].astype(bool)


def _out_of_proportion(shapes: Sequence[Shape], size: tuple[int, int]) -> str:
    """A fault if a coordinate is excessive or filling would take minutes; else ''."""
    (H, W), work = size, 0
    for shape in shapes:
        if not len(shape.points):
            continue
        numbers = np.append(shape.points, [*shape.radii, shape.theta])
        if not (np.abs(numbers) <= 2 * MAX_SIDE).all():  # True for NaN too
            return f'{shape.where} has coordinates beyond {2 * MAX_SIDE} pixels: draw it again'
        top, bottom, left, right = _box(shape, size)
        area = (bottom - top) * (right - left) * (4 if shape.kind == 'ellipse' else 1)
        parts = 1
        if shape.kind == 'mask':
            area += 16 * len(shape.runs)
        elif shape.kind != 'ellipse':
            x, y = np.clip(shape.points, 0, (W, H)).T
            dx, dy = np.abs(np.diff(x)), np.abs(np.diff(y))
            if shape.kind == 'polyline':
                area, parts = (dx * dy).sum(), 2 * len(x)
            else:
                area += 16 * dy.sum()  # rows of the edges
        work += area + parts * 2**16
    if work <= MAX_WORK:
        return ''
    return (
        f'the {len(shapes)} regions from {shapes[0].where} on cover {work / MAX_WORK:.0f} times '
        'the limit: remove those that are not intended'
    )


def check_shapes(shapes: Sequence[Shape], size: tuple[int, int]) -> tuple[list[str], list[str]]:
    """(faults, notes) about the shapes on an image of size H W.

    Faults: too few points, no area (the mask would lack that structure), outside the image. Notes:
    clipped, crosses itself, contains no pixel's centre, an open line.
    """
    faults, notes, pairs = [], [], MAX_PAIRS
    if fault := _out_of_proportion(shapes, size):
        return [fault], []
    H, W = size
    for shape in shapes:
        least = {'polygon': 3, 'polyline': 2, 'ellipse': 1, 'mask': 1}[shape.kind]
        if len(shape.points) < least:
            faults.append(
                f'{shape.where} has only {len(shape.points)} points, but a {shape.kind} needs '
                f'{least}: draw it again or delete it'
            )
            continue
        if not has_area(shape):
            faults.append(f'{shape.where} has no area: draw it again or delete it')
            continue
        (x0, y0), (x1, y1) = _bounds(shape)
        beyond = max(-x0, -y0, x1 - W, y1 - H)
        small = (x1 - x0) * (y1 - y0) < 16
        empty = (beyond > 0 or small) and not any(
            inside.any() for part in _parts(shape, 1.0) for _, inside in _fill(part, size)
        )
        if empty and beyond > 0:
            faults.append(
                f'{shape.where} is outside the image ({W} x {H} pixels; it spans x {x0:.1f} to '
                f'{x1:.1f}, y {y0:.1f} to {y1:.1f}): does it belong to another image or size?'
            )
            continue
        if empty:
            notes.append(f"{shape.where} is so small that it contains no pixel's centre")
        if beyond >= 1:
            notes.append(f'{shape.where} reaches {beyond:.1f} pixels out of the image: clipped')
        if shape.kind == 'polyline':
            notes.append(f'{shape.where} is an open line: drawn as a line, not as an area')
        if shape.kind == 'polygon':
            crosses, used = _crosses_itself(_grid(shape.points), pairs)
            pairs -= used
            if crosses:
                notes.append(
                    f'{shape.where} crosses itself: areas that it encloses twice are outside; draw '
                    'it again if that is not intended'
                )
    if pairs <= 0:
        notes.append('not all outlines were searched for crossings: they have too many points')
    return faults, notes


def has_area(shape: Shape) -> bool:
    """Whether a shape with enough points is more than a point or a line."""
    if shape.kind == 'mask':
        return bool((shape.runs[:, 1] > shape.runs[:, 0]).any())
    if shape.kind == 'ellipse':
        return min(shape.radii) > 0
    away = _grid(shape.points) - _grid(shape.points[:1])
    if shape.kind == 'polyline':
        return bool(away.any())
    x, y = away[np.abs(away).sum(1).argmax()]
    return bool((away[:, 0] * y != away[:, 1] * x).any())


def _crosses_itself(points_N2: np.ndarray, most: int) -> tuple[bool, int]:
    """(whether two edges cross (touching does not count), number of pairs).

    Only edges that share rows are compared. With more than `most` pairs there is no search.
    """
    start, end = points_N2, np.roll(points_N2, -1, axis=0)
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    order = np.argsort(low, kind='stable')
    start, end, low, high = start[order], end[order], low[order], high[order]
    counts = np.maximum(np.searchsorted(low, high) - np.arange(1, len(low) + 1), 0)
    if counts.sum() > most:
        return False, most
    for part in _batches(counts):
        i = np.repeat(np.arange(part.start, part.stop), counts[part])
        j = i + 1 + _ranks(counts[part])
        apart = _side(start[i], end[i], start[j]) * _side(start[i], end[i], end[j]) < 0
        i, j = i[apart], j[apart]
        if (_side(start[j], end[j], start[i]) * _side(start[j], end[j], end[i]) < 0).any():
            return True, int(counts.sum())
    return False, int(counts.sum())


def _side(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    """1, 0 or -1: the side of the line from a to b on which p is."""
    ab, ap = b - a, p - a
    return np.sign(ab[:, 0] * ap[:, 1] - ab[:, 1] * ap[:, 0])
