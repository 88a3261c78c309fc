"""Finds out what the values of masks mean, from all files, and describes it in one line.

If that is ambiguous, an error lists the choices, the likeliest first.
"""

import collections
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from pspnet_jax.data.formats import Picture, read_labels, read_palette
from pspnet_jax.data.volumes import IGNORE_LABEL
from pspnet_jax.runtime.errors import DataError, some

FORMATS = ('auto', 'index', 'binary', 'color')
COLORED = 1 << 24  # marks a number that is a colour
WHITE = (1, 255, 65535)  # foreground of masks with two values, by the bits of a pixel
MANY = 20  # more values than this in a file are unlikely to be classes
COMPARISONS = {
    '': operator.eq,
    '>': operator.gt,
    '>=': operator.ge,
    '<': operator.lt,
    '<=': operator.le,
}


class Found(NamedTuple):
    """A mask file's distinct values (`as_numbers`), in order, and the palette's colours 0xRRGGBB of
    each used index (several if pages differ).
    """

    values: list[int]
    palette: dict[int, set[int]]


class Code(NamedTuple):
    """What the values mean: {file: {value: class}}, a description, and whether values are colours.

    `num_classes` is the model's, or if that is open the masks'. `colors` holds the colour '#rrggbb'
    of a class in palettes or `data.mask_colors`.
    """

    tables: dict[Path, dict[int, int]]
    meaning: str
    by_color: bool = False
    num_classes: int = 2
    colors: Mapping[int, str] = MappingProxyType({})


def look(path: Path) -> Found:
    """Read a mask file's values and palette. Raises DataError."""
    labels = read_labels(path)
    colors, palette = read_palette(path), collections.defaultdict(set)
    if colors is not None:
        for pair in np.unique(labels.astype(np.int64) << 24 | as_colors(colors)).tolist():
            palette[pair >> 24].add(pair & 0xFFFFFF)
    return Found(np.unique(as_numbers(labels)).tolist(), dict(palette))


def read_classes(path: Path, like: Picture, code: Code) -> np.ndarray:
    """D H W uint8 classes of a mask that `code` knows, on the grid of its picture."""
    mask = read_labels(path, like)
    if code.by_color:
        colors = read_palette(path)
        return _look_up(code.tables[path], as_colors(mask if colors is None else colors), path)
    return _look_up(code.tables[path], as_numbers(mask), path)


def _look_up(table: Mapping[int, int], numbers: np.ndarray, path: Path) -> np.ndarray:
    known = np.array(sorted(table), np.int64)
    labels = np.array([table[value] for value in known.tolist()], np.uint8)
    if known[0] >= 0 and known[-1] < 2**16 and 0 <= numbers.min() <= numbers.max() <= known[-1]:
        there, label_of = np.zeros((2, known[-1] + 1), np.uint8)  # faster than to search
        there[known], label_of[known] = 1, labels
        same, found = there[numbers], label_of[numbers]
    else:
        at = np.searchsorted(known, numbers).clip(max=len(known) - 1)
        same, found = known[at] == numbers, labels[at]
    if not same.all():
        raise DataError(f'{path} changed since it was first read: start again')
    return found


def merged(labels: Sequence[np.ndarray], paths: Sequence[Path]) -> np.ndarray:
    """The union of several masks of one picture. Raises DataError if two of them mark a pixel as
    different classes.
    """
    if len(labels) == 1:
        return labels[0]
    whole = labels[0].copy()
    for mask, path in zip(labels[1:], paths[1:], strict=True):
        both = (whole != 0) & (mask != 0) & (whole != mask)
        if both.any():
            one, other = whole[both][0], mask[both][0]
            raise DataError(
                f'{paths[0]} and {path} mark {np.count_nonzero(both)} of the same pixels as '
                f'classes {one} and {other}: make one mask of them'
            )
        np.copyto(whole, mask, where=mask != 0)
    return whole


# Pixels as numbers.


def as_numbers(mask: np.ndarray) -> np.ndarray:
    """D H W integers; D H W 3 colours become marked 0xRRGGBB, or grey values if all are grey."""
    if mask.ndim == 3:
        return mask
    colors = as_colors(mask)
    grey = colors & 0xFF
    return grey if (colors == grey * 0x010101).all() else COLORED | colors


def as_colors(mask: np.ndarray) -> np.ndarray:
    """0xRRGGBB of D H W 3 colours or D H W grey values."""
    if mask.min() < 0 or mask.max() > 255:
        if mask.min() < 0 or (mask % 257).any() or mask.max() > 65535:
            most = mask.max()
            raise DataError(f'a mask has colour values up to {most}: save it with 8 bits a channel')
        mask = mask // 257
    if mask.ndim == 3:
        return mask.astype(np.int64) * 0x010101
    red, green, blue = (mask[..., c].astype(np.int64) for c in range(3))
    return (red << 16) | (green << 8) | blue


# What they mean.


def understand(
    found: Mapping[Path, Found],
    mask_format: str = 'auto',
    colors: Sequence[str] = (),
    label_map: Mapping[int | str, int] | None = None,
    num_classes: int | None = 2,
    ignore_label: int = IGNORE_LABEL,
) -> Code:
    """Decide what the masks' values mean, from all masks.

    'auto' takes values as class numbers if all are valid ones, 255 as class 1 of two in files with
    only 0 and 255, and colours as listed in `colors` ('#rrggbb', in the order of the classes).
    `label_map` maps single values; others stay. Without `num_classes` the classes are counted,
    if their numbers go from 0 without a gap. Raises DataError if the meaning stays ambiguous.
    """
    code = _understand(found, mask_format, colors, label_map, num_classes, ignore_label)
    if num_classes is None:
        used = {label for table in code.tables.values() for label in table.values()}
        highest = max(used - {ignore_label}, default=0)
        num_classes = max(2, len(colors) if code.by_color else 0, highest + 1)
    if code.by_color:
        shown = {label: value for table in code.tables.values() for value, label in table.items()}
    else:
        shown = {
            code.tables[path][index]: min(several)
            for path, file in found.items()
            for index, several in file.palette.items()
            if any(color != index * 0x010101 for color in several)  # greys tell nothing
        }
    by_label = {label: _hex(color) for label, color in shown.items()}
    return code._replace(num_classes=num_classes, colors=by_label)


def _understand(
    found: Mapping[Path, Found],
    mask_format: str,
    colors: Sequence[str],
    label_map: Mapping[int | str, int] | None,
    num_classes: int | None,
    ignore_label: int,
) -> Code:
    classes = {*range(256 if num_classes is None else num_classes), ignore_label}
    if mask_format == 'color' or (mask_format == 'auto' and colors):
        return _by_color(found, colors)
    if mask_format != 'index' and (doubt := _doubt_of_palettes(found)):
        return _by_palette(found, doubt, 0 if label_map else num_classes or 2)
    values = sorted({value for file in found.values() for value in file.values})
    colored = [value for value in values if value >= COLORED]
    if len(colored) > MANY:
        raise DataError(
            f'the masks have {len(colored)} colours ({_shown(colored)}), so they are images, or '
            'masks saved as JPEG. If the mask is the alpha channel, save only that: '
            "PIL.Image.open(MASK).getchannel('A').save(MASK)"
        )
    if colored:
        names = sorted({_hex(_color_of(value, Path())) for value in values})
        listed = ', '.join(f'"{name}"' for name in names)
        raise DataError(
            f'the masks have {len(names)} colours, but their classes are not given: list them in '
            f"the order of the classes, background first: --config.data.mask_colors='({listed})'"
        )
    if label_map:
        return _by_map(found, label_map, classes)
    if mask_format == 'binary':
        return _binary(found)
    if mask_format == 'index':
        return _as_they_are(found, ignore_label)
    both = _files_with(found, {1, 255})
    if num_classes in (None, 2) and set(values) <= {0, *WHITE} and max(values, default=0) > 1:
        if _one_of_each(found):
            return _binary(found)
        alone = [path for path in _files_with(found, {255}) if path not in both]
        if both and alone and ignore_label == 255:
            raise DataError(
                f'255 is ambiguous: {some(both, 1)} has it together with class 1, so it is '
                f'ignored there; {some(alone, 1)} has it without class 1, so it may be class 1: '
                '--config.data.mask_format="index" ignores it in all files, '
                '--config.data.label_map="{255: 1}" makes it class 1 in all files'
            )
    if num_classes is None:
        num_classes = _count(found, values, ignore_label)
    elif not classes.issuperset(values):
        raise _no_classes(found, values, num_classes, ignore_label)
    ignored = _files_with(found, {ignore_label}) if ignore_label >= num_classes > 2 else []
    if ignored and all(set(found[path].values) <= {0, ignore_label} for path in ignored):
        raise DataError(
            f'{ignore_label} is the ignored label, but {some(ignored, 1)} has no class of 1 to '
            f'{num_classes - 1} besides it: if it is the only structure, add '
            f'--config.model.num_classes=2; if it is one of several, map it to its class, '
            f'--config.data.label_map="{{{ignore_label}: 1}}"; if it is to be ignored, '
            '--config.data.mask_format="index"'
        )
    return _as_they_are(found, ignore_label)


def parse_map(label_map: Mapping[int | str, int]) -> dict[tuple[str, int], int]:
    """{('', 4) or ('>', 0): class} of {4: 3, '>0': 1}. Raises ValueError."""
    rules = {}
    for key, label in label_map.items():
        parts = re.fullmatch(r'\s*(>=|<=|>|<)?\s*(-?[0-9]{1,9})\s*', str(key))
        whole = isinstance(label, int) and not isinstance(label, bool)
        if not parts or not whole or not 0 <= label <= 255:
            raise ValueError(f'{key}: {label}')
        rules[parts[1] or '', int(parts[2])] = label
    return rules


def _by_map(
    found: Mapping[Path, Found], label_map: Mapping[int | str, int], classes: set[int]
) -> Code:
    rules = sorted(parse_map(label_map).items(), key=lambda rule: rule[0][0] != '')

    def label_of(value: int) -> int:
        return next((label for (sign, n), label in rules if COMPARISONS[sign](value, n)), value)

    tables = {path: {v: label_of(v) for v in file.values} for path, file in found.items()}
    both = {pair for table in tables.values() for pair in table.items()}
    for value, label in sorted(both):
        if label not in classes:
            where = some([path for path, table in tables.items() if value in table], 1)
            raise DataError(
                f'with data.label_map, the value {value} in {where} becomes {label}, but the model '
                f'has classes {_shown(sorted(classes))}: map {value} to one of them'
            )
    told = ', '.join(f'{value} is {label}' for value, label in sorted(both)[:8])
    return Code(tables, f'by data.label_map, {told}')


def _as_they_are(found: Mapping[Path, Found], ignore_label: int) -> Code:
    tables = {}
    for path, file in found.items():
        low, *_, high = [*file.values, file.values[-1]]
        if low < 0 or high > 255:
            raise DataError(f'{path}: labels go from {low} to {high}: 0 to 255 are classes')
        tables[path] = {value: value for value in file.values}
    values = _all_of(tables)
    ignored = f', {ignore_label} is ignored' * (ignore_label in values)
    return Code(tables, f'values {_shown(values)} are class numbers{ignored}')


def _binary(found: Mapping[Path, Found]) -> Code:
    """Class 1 is what is above half of a file's largest value.

    Files with shades (JPEG, resized) share the largest value of all such files, since an empty one
    may hold a few dark pixels.
    """
    shaded = {
        path: file.values[-1]
        for path, file in found.items()
        if len(file.values) > 2 or path.suffix.lower() in ('.jpg', '.jpeg')
    }
    largest = {top > 255: top for top in sorted(shaded.values())}  # of 8 bits, and of more
    tables, halves = {}, collections.Counter()
    for path, file in found.items():
        top = file.values[-1]
        half = (largest[top > 255] if path in shaded else top) / 2
        tables[path] = {value: int(value > half) for value in file.values}
        halves.update([half] * (top > 0))
    told = f'{next(iter(halves), 0):g}'
    if len(halves) > 1:
        told = ', '.join(f'{half:g} in {count} files' for half, count in sorted(halves.items()))
    return Code(tables, f'values {_shown(_all_of(tables))}; class 1 is what is above {told}')


# Colours.


def _doubt_of_palettes(found: Mapping[Path, Found]) -> str:
    """How the colours and indices of palettes contradict each other; '' if they do not.

    A palette of greys, or one that shows two classes alike, tells nothing.
    """
    index_of, color_of = {}, {}  # each with the file that has it
    for path, file in found.items():
        shown = [(index, color) for index, own in file.palette.items() for color in own]
        greys = all(color == index * 0x010101 for index, color in shown)
        if greys or len({color for _, color in shown}) < len(file.palette):
            continue
        for index, color in sorted(shown):
            if len(file.palette[index]) > 1:
                return f'{index} has different colours in the pages of {path}'
            if color == 0 and index:
                return f'black is {index} in {path}'
            other, where = index_of.setdefault(color, (index, path))
            if other != index:
                return f'{_hex(color)} is {other} in {where} and {index} in {path}'
            other, where = color_of.setdefault(index, (color, path))
            if other != color:
                return f'{index} is {_hex(other)} in {where} and {_hex(color)} in {path}'
    return ''


def _by_palette(found: Mapping[Path, Found], doubt: str, num_classes: int) -> Code:
    """Decide by colour if palettes do not agree and the background is clear."""
    index_of = collections.defaultdict(collections.Counter)
    for file in found.values():
        for index, colors in file.palette.items():
            for color in colors:
                index_of[color][index] += 1
    in_turn = sorted(index_of, key=lambda color: (color != 0, index_of[color].most_common(1)[0][0]))
    names = [_hex(color) for color in in_turn]
    black_and_one = num_classes == 2 and in_turn[0] == 0 and len(in_turn) <= 2
    if not black_and_one or not all(file.palette for file in found.values()):
        listed = ', '.join(f'"{name}"' for name in names[:8])
        raise DataError(
            f'the palettes of the masks do not agree ({doubt}): name the colours in the order of '
            f"the classes, --config.data.mask_colors='({listed})'; or take the stored numbers, "
            '--config.data.mask_format="index"'
        )
    told = ', '.join(f'{name} is {label}' for label, name in enumerate(names))
    meaning = f'palettes do not agree ({doubt}), so colours decide: {told}'
    return _by_color(found, names)._replace(meaning=meaning)


def _by_color(found: Mapping[Path, Found], colors: Sequence[str]) -> Code:
    for name in colors:
        if not re.fullmatch('#[0-9a-fA-F]{6}', name):
            raise DataError(f'data.mask_colors has {name!r}: a colour is written #rrggbb')
    label_of = {int(name[1:], 16): label for label, name in enumerate(colors)}
    tables, unknown, where = {}, set(), []
    for path, file in found.items():
        used = {color for several in file.palette.values() for color in several}
        used = used or {_color_of(value, path) for value in file.values}
        if odd := used - label_of.keys():
            unknown |= odd
            where.append(path)
        tables[path] = {color: label_of[color] for color in used - odd}
    if unknown:
        told = some([_hex(color) for color in sorted(unknown)])
        raise DataError(
            f'the masks have {told}, which data.mask_colors does not name ({some(where, 1)}): '
            'add them'
        )
    shown = some([_hex(color) for color in _all_of(tables)])
    meaning = f'colours {shown} are the classes in the order of data.mask_colors'
    return Code(tables, meaning, by_color=True)


def _color_of(value: int, path: Path) -> int:
    """A value's colour; a grey value v has the colour #vvvvvv."""
    if value >= COLORED:
        return value & 0xFFFFFF
    value = value // 257 if value > 255 and value % 257 == 0 else value
    if not 0 <= value <= 255:
        raise DataError(f'{path} has the value {value}: save it with 8 bits a channel')
    return value * 0x010101


# Messages.


def _count(found: Mapping[Path, Found], values: Sequence[int], ignore_label: int) -> int:
    """The number of classes of masks that hold class numbers; at least 2.

    Raises DataError for values with a gap, and for so many that they may be shades of a JPEG.
    """
    numbers = [v for v in values if v != ignore_label or v < values[-1]]
    shaded = any(len(file.values) > MANY for file in found.values())
    if numbers == list(range(len(numbers))) and not shaded:
        return max(2, len(numbers))
    if numbers == list(range(len(numbers))):
        raise DataError(
            f'the masks have the values 0 to {numbers[-1]}, which may be classes, shades of a JPEG '
            f'or numbers of objects: for {len(numbers)} classes add '
            f'--config.model.num_classes={len(numbers)}; if all that is not 0 is one class, add '
            '--config.data.label_map="{\'>0\': 1}"'
        )
    raise _no_classes(found, values, None, ignore_label)


def _no_classes(
    found: Mapping[Path, Found], values: Sequence[int], num_classes: int | None, ignore_label: int
) -> DataError:
    """The error for values that are not class numbers, with ways to map each of them to one."""
    # Among grey levels 255 is one of them, among class numbers it is the ignored label.
    numbers = [value for value in values if value >= 0 and value != ignore_label]
    kept = numbers if max(numbers, default=0) <= MANY else [value for value in values if value >= 0]
    if num_classes is None:
        odd = next(v for rank, v in enumerate(values) if v != rank)
    else:
        odd = next(v for v in values if v not in range(num_classes) and v != ignore_label)
    where = some(_files_with(found, {odd}), 1)
    if num_classes is None:
        told = (
            f'the masks have the values {_shown(values)}, which are not class numbers from 0 on '
            f'without a gap ({odd} is in {where})'
        )
    else:
        told = (
            f'the masks have the values {_shown(values)}, but model.num_classes is {num_classes}, '
            f'that is classes 0 to {num_classes - 1} ({odd} is in {where})'
        )
    if any(len(file.values) > MANY for file in found.values()):
        return DataError(
            f'{told}: so many are usually a mask saved as JPEG, or one that was resized: save it '
            f'as PNG; --config.data.mask_format="binary" makes what is above {values[-1] / 2:g} '
            'class 1'
        )
    enough = num_classes is None or len(kept) <= num_classes
    flag = '' if num_classes is None else f'--config.model.num_classes={len(kept)} '
    if num_classes in (None, 2) and len(found) > 1 and len(values) > 2 and _one_of_each(found):
        flag = '' if num_classes is None else f'--config.model.num_classes={len(values)} '
        return DataError(
            f'{told}, and no file has two of them besides 0: if all are the same structure, add '
            f'--config.data.mask_format="binary"; else {flag}'
            f'--config.data.label_map="{ {value: rank for rank, value in enumerate(values)} }"'
        )
    if num_classes is not None and len(kept) == 2 < num_classes and kept != [0, 1]:
        return DataError(
            f'{told}: if there is only one structure, add --config.model.num_classes=2 '
            f'--config.data.mask_format="binary"; if it is one of several, map it to its class, '
            f'--config.data.label_map="{{{kept[1]}: 1}}"'
        )
    places = {value: rank for rank, value in enumerate(kept) if value != rank}
    places |= {value: ignore_label for value in values if value < 0}
    mapped = f'--config.data.label_map="{places}"'
    rest = f', {ignore_label}: {ignore_label}' * (ignore_label in values and kept == numbers)
    one_class = f'--config.data.label_map="{{\'>0\': 1{rest}}}" makes one class of all but 0'
    if num_classes is None:
        made = f'{mapped} makes {len(kept)} classes of them'
        if len(kept) > 2:
            made += f'; {one_class}'
        if kept and kept == numbers and kept[-1] <= MANY and min(values) >= 0:
            count = kept[-1] + 1
            made += f'; --config.model.num_classes={count} keeps the numbers as they are'
        return DataError(f'{told}: {made}')
    if enough and places:
        return DataError(f'{told}: {mapped} makes classes of them')
    if places:
        return DataError(f'{told}: {flag}{mapped} makes classes of them; {one_class}')
    there = f'({_shown(kept)})' + f', and {ignore_label} to ignore' * (ignore_label in values)
    return DataError(
        f'the masks have {len(kept)} classes {there} but model.num_classes is {num_classes}: add '
        f'--config.model.num_classes={len(kept)}; {one_class}'
    )


def _one_of_each(found: Mapping[Path, Found]) -> bool:
    """Whether every file holds at most one value besides 0."""
    return all(np.count_nonzero(file.values) <= 1 for file in found.values())


def _files_with(found: Mapping[Path, Found], values: set[int]) -> list[Path]:
    return [path for path, file in found.items() if values <= set(file.values)]


def _all_of(tables: Mapping[Path, Mapping[int, int]]) -> list[int]:
    return sorted({value for table in tables.values() for value in table})


def _hex(color: int) -> str:
    return f'#{color:06x}'


def _shown(values: Sequence[int]) -> str:
    return some([_hex(v & 0xFFFFFF) if v >= COLORED else v for v in values])
