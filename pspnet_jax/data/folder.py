"""Reads a folder of images and a folder of masks or annotations as slices.

  FOLDER/images/a.png  FOLDER/masks/a.png     paired by name, in any format

A volume (NIfTI, multi-page TIFF, DICOM) is a patient; 2D images are grouped into patients by
`data.group`, and are slices of a volume if it gives their numbers. Several image folders are
stacked as channels. The meaning of the masks' values is found out from all masks and logged in one
line; if it is ambiguous, reading stops with the choices.
"""

import collections
import csv
import dataclasses
import functools
import io
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pspnet_jax.data import formats, pairing, volumes
from pspnet_jax.data.formats import annotations, files, flat, via
from pspnet_jax.data.formats.outlines import Shape, rasterize
from pspnet_jax.data.masks import Code, Found, look, merged, read_classes, understand
from pspnet_jax.data.volumes import IGNORE_LABEL, Slices
from pspnet_jax.runtime import text
from pspnet_jax.runtime.errors import DataError, all_faults, some

logger = logging.getLogger(__name__)

MOST_LISTED = 50  # faults in one error
EXPRESSION_SECONDS = 10  # for all names: a run's expression may be untrusted
MAX_NAME = 200  # characters of a patient's name: file systems allow 255 bytes with our endings


class Case(NamedTuple):
    """One image or volume: its patient, one file per image folder, its masks (which are united) or
    the shapes drawn on it, and its slice number if `group` gives one.
    """

    patient: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    shapes: Sequence[Shape]
    slice: int | None


class Meaning(NamedTuple):
    """The config's options for the masks' values: the arguments of `masks.understand`."""

    mask_format: str = 'auto'
    mask_colors: Sequence[str] = ()
    label_map: Mapping[int | str, int] | None = None
    num_classes: int | None = 2  # None: as many as the masks have
    ignore_label: int = IGNORE_LABEL


class Patient(NamedTuple):
    """A patient's cases, lesion pixels of each case's slices, {(H, W, C): a file of that shape},
    height and width of each slice, spacing if all have the same, (4, C) intensity scale, (2, C)
    range if an image is not 8-bit, and each slice's digest.
    """

    cases: list[Case]
    lesion: list[list[int]]
    shapes: dict[tuple[int, ...], Path]
    sizes: list[tuple[int, int]]
    spacing: tuple[float, float, float] | None
    intensity: np.ndarray | None
    range: np.ndarray | None
    digest: list[str]


def scan(
    places: Sequence[Path],
    masks: Path,
    *,
    group: str = '',
    classes: Mapping[str, int] | None = None,
    attribute: str = '',
    mask_name: str = pairing.STEM,
    root: Path | None = None,
) -> tuple[list[Case], list[str], list[str], dict[str, int]]:
    """(cases in the folders, their faults, notes about annotations, {class name: number}).

    `places` are folders of images or FOLDER/RULE, and `mask_name` is the rule of the masks (see
    `pairing`); suggested rules are relative to `root`. If two images share a name, their subfolders
    are part of it. `masks` is a folder of masks, an annotation file (for `annotations.read` with
    `classes` and `attribute`) or a folder of labelme files.

    `group` is a regular expression that is searched in the stem and whose first group is the
    patient, or a .csv with the columns stem and patient; '' makes each image a patient. A group
    (?P<slice>[0-9]+) or a column slice makes a patient's images the slices of a volume; otherwise
    each image stands alone.
    """
    stacks, ways = _find_pictures(places, masks)
    (first, images), faults, names = stacks[0], [], {}
    for stack, folder in stacks[1:]:
        for stem in sorted(first.keys() ^ stack.keys()):
            here, there = (folder, images) if stem in stack else (images, folder)
            faults.append(f'{stem} is in {here} but not in {there}: every channel needs it')
    drawn, notes = via.holds_annotations(masks, images)
    masks_of, shapes = {}, {}
    if drawn:
        shapes, names, told = _find_shapes(masks, images, classes, attribute, faults)
        notes = told + notes
    else:
        masks_of = _find_masks(images, first, ways, masks, mask_name, root, faults)
    known = first if drawn else masks_of
    whole = [s for s in sorted(known) if all(s in stack for stack, _ in stacks)]
    patients, wrong = group_stems(whole, group)
    numbers, more = slice_numbers(patients, group)
    cases = [
        Case(
            patients[stem],
            tuple(stack[stem] for stack, _ in stacks),
            masks_of.get(stem, ()),
            shapes.get(first[stem], ()),
            numbers.get(stem),
        )
        for stem in sorted(patients, key=lambda stem: (numbers.get(stem, 0), stem))
    ]
    return cases, faults + wrong + more, notes, names


def _find_shapes(
    masks: Path,
    images: Path,
    classes: Mapping[str, int] | None,
    attribute: str,
    faults: list[str],
) -> tuple[dict[Path, list[Shape]], dict[str, int], list[str]]:
    """({image: its shapes}, {class name: number} if regions name their class, notes)."""
    drawn, damaged = annotations.read(masks, classes, attribute)
    shapes, wrong, notes = via.match_pictures(drawn, images)
    _, odd, small = via.check_drawn({path: found for path, found in shapes.items() if found})
    faults += damaged + wrong + odd
    if rest := small[MOST_LISTED:]:
        more = f'and {len(rest)} more such lines: python -m pspnet_jax.rasterize prints all'
        small = [*small[:MOST_LISTED], more]
    names = dict(classes or drawn.classes) if drawn.attribute else {}
    return shapes, names, drawn.notes + notes + small


def _find_pictures(
    places: Sequence[Path], masks: Path
) -> tuple[list[tuple[dict[str, Path], Path]], dict[str, str]]:
    """(({name: file}, folder) for each of `places`, {name: path below the first folder}).

    Raises DataError for a rule that matches no image.
    """
    stacks = []
    for folder, rule in map(pairing.split, places):
        found, inner = files.find(folder), masks.resolve()
        if inner != folder.resolve() and inner.is_relative_to(folder.resolve()):
            found = {way: p for way, p in found.items() if not p.resolve().is_relative_to(inner)}
        stacks.append((pairing.named(found, files.stem(rule)), folder))
        if not stacks[-1][0]:
            raise DataError(
                f'data.images: {rule} matches no image in {folder}, which holds '
                f'{some(list(found), 3)}: write {pairing.STEM} for what differs in their names'
            )
    ways = {way: way for way in stacks[0][0]}
    if all(pairing.are_unique(stack) for stack, _ in stacks):
        ways = {pairing.last(way): way for way in ways}
        stacks = [
            ({pairing.last(way): path for way, path in stack.items()}, folder)
            for stack, folder in stacks
        ]
    return stacks, ways


def _find_masks(
    images: Path,
    pictures: dict[str, Path],
    ways: Mapping[str, str],
    masks: Path,
    rule: str,
    root: Path | None,
    faults: list[str],
) -> dict[str, tuple[Path, ...]]:
    """{image's name: its masks}.

    If a folder holds both, the masks are removed from `pictures`.
    """
    found, rule = files.find(masks), files.stem(rule)  # the rule may have an ending
    together = masks.resolve() == images.resolve()
    place = images.relative_to(root) if root and images.is_relative_to(root) else images
    if together and rule == pairing.STEM:
        hint = pairing.suggest(place, list(found), list(found))
        faults.append(
            f'{masks} holds both images and masks: tell how masks are named, such as '
            f'--config.data.mask_name={{stem}}_mask{hint and f" ({hint})"}'
        )
        return {}
    if not together and images.resolve().is_relative_to(masks.resolve()):
        found = {way: path for way, path in found.items() if path not in pictures.values()}
    pairs = pairing.match([ways[name] for name in pictures], list(found), rule, together=together)
    used = {way for own in pairs.values() for way in own}
    if together:
        files_used = {found[way] for way in used}
        for name in [name for name, path in pictures.items() if path in files_used]:
            del pictures[name]
    masks_of = {
        name: tuple(found[way] for way in sorted(pairs[ways[name]]))
        for name in sorted(pictures)
        if pairs.get(ways[name])
    }
    lost = [name for name in sorted(pictures) if name not in masks_of]
    idle = [] if together else sorted(found.keys() - used)
    several = f'{pairing.STEM}*'
    further = pairing.match([ways[name] for name in pictures], idle, several).values()
    if idle and not lost and {way for own in further for way in own}.issuperset(idle):
        faults.append(
            f'{found[idle[0]]} and {len(idle) - 1} more masks have no image of their own: if they '
            f"are further masks of other images, add --config.data.mask_name='{several}'; else "
            'remove them'
        )
        return masks_of
    hint = lost and idle and pairing.suggest(place, [ways[name] for name in lost], idle)
    if hint and not masks_of:
        faults.append(
            f'no image in {images} has a mask in {masks}: images are named {some(lost, 3)}, masks '
            f'{some(idle, 3)}: {hint}'
        )
        return masks_of
    if hint:
        faults.append(f'names differ: {hint} of those below')
    for name in lost:
        mask = rule.replace(pairing.STEM, pairing.last(name))
        faults.append(f'{pictures[name]} has no mask: add {masks / mask}.png or remove it')
    faults += [f'{found[way]} has no image: add it or remove the mask' for way in idle]
    return masks_of


def group_stems(stems: Sequence[str], group: str) -> tuple[dict[str, str], list[str]]:
    """Stem -> patient, and the faults: stems that the expression or the table leaves out."""
    faults = []
    if not group:
        table, remedy = {stem: stem.replace('/', '_') for stem in stems}, ''
        for name, times in collections.Counter(table.values()).items():
            if times > 1:
                both = ' and '.join(stem for stem in stems if table[stem] == name)
                faults.append(f'{both} would both be the patient {name}: rename one')
    elif group.endswith('.csv'):
        table, remedy = read_table(Path(group)), f'add it to {group}'
    else:
        try:
            expression = re.compile(group)
        except re.error as error:
            raise DataError(f'data.group {group!r} is not a regular expression: {error}') from error
        number = expression.groupindex.get('slice')
        patient = next((n for n in range(1, expression.groups + 1) if n != number), 0)
        if not patient:
            raise DataError(f'data.group {group!r} has no group: put the patient in (), as "(.+)_"')
        with text.within(EXPRESSION_SECONDS, f'data.group {group!r}'):
            found = {stem: expression.search(stem) for stem in stems}
        table = {
            s: match[patient].replace('/', '_')
            for s, match in found.items()
            if match and match[patient]
        }
        remedy = f'data.group {group!r} must find one in it'
    faults += [f'{stem} has no patient: {remedy}' for stem in stems if not table.get(stem)]
    patients = {stem: table[stem] for stem in stems if table.get(stem)}
    for name in sorted(set(patients.values())):
        bad = re.search(r'[/\\]', name) or name.startswith('.') or not name.isprintable()
        if bad or len(name) > MAX_NAME:
            faults.append(f'patient {name!r} can not be a file name, which results take: rename it')
    return patients, faults


def slice_numbers(patients: Mapping[str, str], group: str) -> tuple[dict[str, int], list[str]]:
    """({stem: slice number}, faults), for the stems whose number `group` gives.

    Without numbers, the images are not slices of a volume.
    """
    found = {}
    if group.endswith('.csv'):
        found = read_table(Path(group), 'slice')
    elif group and 'slice' in (expression := re.compile(group)).groupindex:
        found = {stem: expression.search(stem)['slice'] for stem in patients}
    numbers, faults, taken = {}, [], {}
    for stem in sorted(stem for stem in patients if found.get(stem) is not None):
        if not re.fullmatch(r'[0-9]{1,9}', found[stem]):
            faults.append(
                f'{stem} has the slice number {found[stem]!r} by data.group, which is not a number'
            )
            continue
        numbers[stem] = int(found[stem])
        other = taken.setdefault((patients[stem], numbers[stem]), stem)
        if other != stem:
            faults.append(f'{other} and {stem} are both slice {numbers[stem]}: rename one')
    return numbers, faults


def read_table(path: Path, column: str = 'patient') -> dict[str, str]:
    """{stem: patient} of a .csv with these columns, or {stem: value} of another column."""
    has = 'it must have a line "stem,patient" and one such line per image'
    try:
        rows = csv.DictReader(io.StringIO(text.read(path, has), newline=''))
        if column != 'patient' and column not in (rows.fieldnames or ()):
            return {}
        pairs = [(row['stem'].strip(), row[column].strip()) for row in rows]
    except (KeyError, AttributeError, csv.Error) as error:
        reason = f'{type(error).__name__}: {error}'
        raise DataError(f'{path} is not a table of patients ({reason}): {has}') from error
    return {unicodedata.normalize('NFC', stem): value for stem, value in pairs}


def load(
    source: str | Path,
    *,
    images: Sequence[str] = ('images',),
    masks: str = 'masks',
    group: str = '',
    classes: Mapping[str, int] | None = None,
    attribute: str = '',
    mask_name: str = pairing.STEM,
    threads: int = 4,
    **meaning: Any,
) -> Slices:
    """Every slice in the folders `images` and `masks`, which are relative to `source` or absolute.

    `meaning` are the fields of `Meaning`, the other options those of `scan`. Every image is read
    once here, every mask twice. Raises one DataError that lists all faults.
    """
    given = Meaning(**meaning)
    root = Path(source).expanduser()
    places = _find_folders(root, images, masks)
    cases, faults, notes, names = scan(
        places, root / masks, group=group, classes=classes, attribute=attribute,
        mask_name=mask_name, root=root,
    )  # fmt: skip
    if not cases and not faults:
        raise DataError(f'{places[0]} holds no images: {", ".join(files.SUFFIXES)} can be read')
    for note in notes:
        logger.info('annotations: %s', note)
    if cases and not group and not any(volumes_by_name(case.images[0]) for case in cases):
        logger.warning(
            'no data.group: each of %d images counts as a separate patient; if several show the '
            'same patient, results will be too optimistic', len(cases),
        )  # fmt: skip

    counted = given.num_classes is None
    drawn = {shape.label for case in cases for shape in case.shapes}
    if drawn and counted:
        if names and not classes:
            cases, names = _only_drawn(cases, names, drawn)
            drawn = {shape.label for case in cases for shape in case.shapes}
        highest = max(names.values()) if names else max(drawn)
        given = given._replace(num_classes=max(2, highest + 1))
    if names and max(drawn, default=0) >= given.num_classes:
        faults.append(_too_many(names, drawn, given.num_classes))
    with ThreadPoolExecutor(threads) as pool:
        cases, code = _look_at_masks(cases, given, pool.map, faults)
        known = code.num_classes if code else 256  # an ambiguity is reported as a fault
        given = given._replace(num_classes=given.num_classes or known)
        of = collections.defaultdict(list)
        for case in cases:
            of[case.patient].append(case)
        # Read a patient's images in parallel, or patients in parallel if each has one image.
        alone = all(len(own) == 1 and not volumes_by_name(own[0].images[0]) for own in of.values())
        maps = (map, pool.map) if alone else (pool.map, map)

        def survey(name: str) -> tuple[Patient, list[str]]:
            wrong: list[str] = []
            return _survey(of[name], code, maps[0], given, wrong), wrong

        patients = {}
        for name, (patient, wrong) in zip(sorted(of), maps[1](survey, sorted(of)), strict=True):
            patients[name] = patient
            faults += wrong
    faults += _disagreements(patients.values())
    if faults:
        raise all_faults(source, faults, MOST_LISTED)

    class_names = _in_turn(names, given.num_classes)
    if counted:
        where = 'annotations' if drawn else 'masks'
        logger.info('%s', _tell_classes(given.num_classes, where, class_names, code))
    slices = _as_slices(patients, code, bool(group), class_names)
    return dataclasses.replace(slices, num_classes=given.num_classes)


def _only_drawn(
    cases: Sequence[Case], names: Mapping[str, int], drawn: set[int]
) -> tuple[list[Case], dict[str, int]]:
    """(cases, names) without classes that are listed but never drawn, which is logged.

    The order stays. If no class is drawn, all are kept.
    """
    kept = sorted(drawn | {0})
    idle = sorted(name for name, number in names.items() if number not in kept)
    if not idle:
        return list(cases), dict(names)
    logger.info('annotations: classes that are listed but never drawn are left out: %s', some(idle))
    number_of = {old: new for new, old in enumerate(kept)}
    names = {name: number_of[old] for name, old in names.items() if old in number_of}
    return [
        case._replace(shapes=[s._replace(label=number_of[s.label]) for s in case.shapes])
        for case in cases
    ], names


def _tell_classes(count: int, where: str, names: Sequence[str], code: Code | None) -> str:
    """'3 classes, from the masks: background, 1, 2', with colours if the masks have a palette."""
    told = list(names) or ['background', *map(str, range(1, count))]
    colors = code.colors if code and not names else {}
    told = [f'{name} ({colors[n]})' if n and n in colors else name for n, name in enumerate(told)]
    return f'{count} classes, from the {where}: {", ".join(told)}'


def _find_folders(root: Path, images: Sequence[str], masks: str) -> list[Path]:
    """The folders of images, with their rules."""
    places = [root / name for name in images]
    for folder, _ in map(pairing.split, places):
        if not folder.is_dir():
            raise DataError(
                f'{folder} is not a folder: put the images into {root / "images"} and the masks '
                f'into {root / "masks"}, or set data.images and data.masks'
            )
    if not (root / masks).exists():
        raise DataError(f'{root / masks} is neither a folder of masks nor a file of annotations')
    return places


def _as_slices(
    patients: Mapping[str, Patient], code: Code | None, grouped: bool, class_names: tuple[str, ...]
) -> Slices:
    in_order = [case for patient in patients.values() for case in patient.cases]
    depths = [len(lesion) for patient in patients.values() for lesion in patient.lesion]
    places = [(number, d) for number, depth in enumerate(depths) for d in range(depth)]
    channels = {shape[2]: path for p in patients.values() for shape, path in p.shapes.items()}
    wide = max(channels)
    if len(channels) > 1:
        logger.info(
            'some images are grey (%s) and some RGB (%s): grey becomes three equal channels',
            channels[1], channels[3],
        )  # fmt: skip

    @functools.lru_cache(maxsize=8)  # a volume's slices are asked for one by one
    def read_case(number: int) -> tuple[np.ndarray, np.ndarray]:
        picture, labels = _read_case(in_order[number], code)
        return _widened(picture.image, wide), labels

    def read(key: int) -> tuple[np.ndarray, np.ndarray]:
        number, d = places[key]
        image, labels = read_case(number)
        return image[d], labels[d]

    lesion = [np.concatenate(patient.lesion) for patient in patients.values()]
    scans = [_scans(patient) for patient in patients.values()]
    several = sum(bool(numbers.any()) for numbers in scans)
    if grouped and in_order[0].slice is not None:
        logger.info(
            'data.group: the images are numbered slices of %d volumes; %d of them have gaps, and '
            'their distances and components are per part', len(scans), several,
        )  # fmt: skip
    elif grouped and several:
        logger.info(
            'data.group: %d of %d patients have several files; distances and components are per '
            'file. If the files are slices of one volume, add their numbers: '
            'data.group="(.+)_(?P<slice>[0-9]+)"', several, len(scans),
        )  # fmt: skip
    deep = {name: p.range for name, p in patients.items() if p.range is not None}
    return Slices(
        read=read,
        key=np.arange(len(places)),
        patient=np.repeat(list(patients), [len(pixels) for pixels in lesion]),
        slice=np.concatenate([np.arange(len(pixels)) for pixels in lesion]),
        lesion_pixels=np.concatenate(lesion),
        intensity={name: _widened(p.intensity, wide) for name, p in patients.items()},
        spacing={name: p.spacing for name, p in patients.items() if p.spacing is not None},
        ranges={name: _widened(measured, wide) for name, measured in deep.items()},
        digest=np.concatenate([patient.digest for patient in patients.values()]),
        sizes=np.array([size for patient in patients.values() for size in patient.sizes]),
        scan=np.concatenate(scans),
        class_names=class_names,
    )


def _too_many(names: Mapping[str, int], drawn: set[int], num_classes: int) -> str:
    """The fault for annotations with more classes than the model."""
    told = ', '.join(f'{name!r} = {number}' for name, number in names.items())
    remedy = f'add --config.model.num_classes={max(names.values()) + 1}'
    chosen = [name for name, number in names.items() if number in drawn | {0}]
    if len(chosen) < len(set(names.values())):  # the others have no region
        remedy += (
            f"; or for those that are drawn --config.model.class_names='{','.join(chosen)}' "
            f'--config.model.num_classes={len(chosen)}'
        )
    told = f'the annotations have {len(names)} classes ({told})'
    return f'{told} but model.num_classes is {num_classes}: {remedy}'


def _in_turn(names: Mapping[str, int], num_classes: int) -> tuple[str, ...]:
    """The names of all classes in the order of their numbers; () without names."""
    name_of = {number: name for name, number in names.items()}
    return tuple(name_of.get(n, f'class {n}') for n in range(num_classes)) if names else ()


def _widened(values: np.ndarray, channels: int) -> np.ndarray:
    """... C: grey becomes three equal channels if some images of the set are RGB."""
    grey = values.shape[-1] == 1
    return np.repeat(values, channels, axis=-1) if grey and channels == 3 else values


def _scans(patient: Patient) -> np.ndarray:
    """The scan number of each of the patient's slices.

    Every file is a scan; of numbered slices, every run without a gap is one.
    """
    depths = [len(lesion) for lesion in patient.lesion]
    numbers = [case.slice for case in patient.cases]
    if None in numbers or max(depths) > 1:
        return np.repeat(np.arange(len(depths)), depths)
    return np.cumsum(np.diff(numbers, prepend=numbers[0]) > 1)


def _survey(
    cases: Sequence[Case],
    code: Code | None,
    map_: Callable,
    given: Meaning,
    faults: list[str],
) -> Patient:
    """Measure a patient's cases."""
    known = [*range(given.num_classes), given.ignore_label]

    def measure(case: Case) -> tuple[formats.Picture, list[int]]:
        found, labels = _read_case(case, code)
        wrong = np.setdiff1d(labels, known)
        if wrong.size and case.masks:
            raise DataError(
                f'the mask of {case.images[0]} has the labels {some(wrong.tolist())} but '
                f'model.num_classes is {given.num_classes}: add '
                f'--config.model.num_classes={wrong.max() + 1}'
            )
        return found, [volumes.lesion_pixels(mask, given.ignore_label) for mask in labels]

    good = _sound(map_(functools.partial(_attempt, measure), cases), faults)
    shapes = {found.image.shape[1:]: found.source for found, _ in good}
    sizes = [found.image.shape[1:3] for found, _ in good for _ in found.image]
    spacing = {found.spacing for found, _ in good}
    intensity = measured = None
    channels = {shape[2] for shape in shapes}
    if channels and (len(channels) == 1 or channels == {1, 3}):
        images = [_widened(found.image, max(channels)) for found, _ in good]
        pixels = np.concatenate([image.reshape(-1, image.shape[-1]) for image in images])
        intensity = volumes.measure_intensity(pixels)
        measured = None if pixels.dtype == np.uint8 else volumes.measure_range(pixels)
    return Patient(
        list(cases),
        [lesion for _, lesion in good],
        shapes,
        sizes,
        spacing.pop() if len(spacing) == 1 else None,
        intensity,
        measured,
        [volumes.picture_digest(image) for found, _ in good for image in found.image],
    )


def _disagreements(patients: Iterable[Patient]) -> Iterator[str]:
    """Faults of patients that are sound alone but do not fit together."""
    shapes = {shape: path for patient in patients for shape, path in patient.shapes.items()}
    channels = {shape[2]: path for shape, path in shapes.items()}
    if len(channels) > 1 and set(channels) != {1, 3}:
        told = ', '.join(f'{path} has {n}' for n, path in sorted(channels.items()))
        yield f'images have different numbers of channels: {told}; convert them'


def volumes_by_name(path: Path) -> bool:
    """Whether the file is a volume, by its name."""
    return path.name.lower().endswith(('.nii', '.nii.gz', '.npy')) or path.is_dir()


def _attempt(function: Callable, *arguments):
    """(result, '') or (None, the fault)."""
    try:
        return function(*arguments), ''
    except DataError as error:
        return None, str(error)


def _sound(attempts: Iterable[tuple[Any, str]], faults: list[str]) -> list[Any]:
    """The results of the attempts without a fault; the others are appended to `faults`."""
    attempts = list(attempts)
    faults += [fault for _, fault in attempts if fault]
    return [result for result, fault in attempts if not fault]


def _look_at_masks(
    cases: Sequence[Case], given: Meaning, map_: Callable, faults: list[str]
) -> tuple[list[Case], Code | None]:
    """(cases, without masks that can't be read; what the masks mean, None if that is unknown)."""

    def look_at(case: Case) -> dict[Path, Found]:
        return {path: look(path) for path in case.masks}

    looks = list(map_(functools.partial(_attempt, look_at), cases))
    kept = [
        case._replace(masks=()) if fault else case
        for case, (_, fault) in zip(cases, looks, strict=True)
    ]
    found = {path: one for several in _sound(looks, faults) for path, one in several.items()}
    code, doubt = _attempt(understand, found, *given)
    if doubt:
        faults.append(doubt)
    elif found:
        logger.info('masks: %s', code.meaning)
    turned = [
        c.images[0] for c, turn in zip(cases, map_(_unclear_turn, cases), strict=True) if turn
    ]
    if turned:
        logger.warning(
            '%d images (%s) are rotated or mirrored by their EXIF orientation and read upright, '
            'as viewers show them: their masks must be drawn upright too', len(turned), turned[0],
        )  # fmt: skip
    return kept, code


def _unclear_turn(case: Case) -> bool:
    """Whether EXIF turns the image, and the mask without that turn would have the same size."""
    if not case.masks or flat.turn_by_exif(case.masks[0]) != 1:
        return False
    turn = flat.turn_by_exif(case.images[0])
    return turn in (2, 3, 4) or (turn != 1 and len(set(flat.size(case.images[0]))) == 1)


def _read_case(case: Case, code: Code | None) -> tuple[formats.Picture, np.ndarray]:
    """The image D H W C and its labels D H W uint8, which are 0 without a code."""
    picture = formats.stack([formats.read(path) for path in case.images])
    depth, *size, _ = picture.image.shape
    if not case.masks:
        if depth > 1 and case.shapes:
            raise DataError(
                f'{case.images[0]} has {depth} slices, but regions are drawn on one image: save '
                'each slice as an image, or the masks as a volume'
            )
        return picture, np.repeat(rasterize(case.shapes, tuple(size))[None], depth, axis=0)
    if code is None:
        for path in case.masks:
            formats.read_labels(path, picture)
        return picture, np.zeros((depth, *size), np.uint8)
    labels = [read_classes(path, picture, code) for path in case.masks]
    return picture, merged(labels, case.masks)
