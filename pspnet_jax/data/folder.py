"""A folder of pictures and a folder of masks, or of annotations, as slices.

  FOLDER/images/a.png  FOLDER/masks/a.png     paired by stem, whatever their formats

Volumes (NIfTI, multi-page TIFF, DICOM) are patients by themselves; pictures are grouped into
patients by `data.group`, and are slices of a volume where it names their number. Several image
folders stack as channels. What the masks' values mean is found out from all of them, said in one
line, and refused where it could mean two things.
"""

import csv
import functools
import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pspnet_jax import text
from pspnet_jax.data import files, via, volumes
from pspnet_jax.data.volumes import IGNORE_LABEL, Slices
from pspnet_jax.errors import DataError

logger = logging.getLogger(__name__)

FORMATS = ('auto', 'index', 'binary', 'color')
MOST_LISTED = 50  # faults in one error
MAX_NAME = 200  # characters of a patient, as file systems take 255 bytes with what we add


class Case(NamedTuple):
    """One picture or volume: its patient, one file a channel stack, its mask or its shapes, and
    its place among the slices of a volume where `group` tells.
    """

    patient: str
    images: tuple[Path, ...]
    mask: Path | Sequence[via.Shape]
    slice: int | None = None


class Patient(NamedTuple):
    """A patient's cases, pixels of lesion of each one's slices, {(H, W, C): a file of it}, spacing
    where all have the same, (4, C) intensity scale, (2, C) range where one is not of 8 bits, and
    each slice's digest.
    """

    cases: list[Case]
    lesion: list[list[int]]
    shapes: dict[tuple[int, ...], Path]
    spacing: tuple[float, float, float] | None
    intensity: np.ndarray | None
    range: np.ndarray | None
    digest: list[str]


class Code(NamedTuple):
    """What mask values mean: `to_labels` makes classes of them, `meaning` says it in words."""

    to_labels: Callable[[np.ndarray], np.ndarray]
    meaning: str


def scan(
    images: Sequence[Path],
    masks: Path,
    *,
    group: str = '',
    classes: Mapping[str, int] | None = None,
    attribute: str = '',
) -> tuple[list[Case], list[str], list[str]]:
    """The cases below the folders, their faults, and what annotations were understood as.

    `masks` is a folder of masks, a file of annotations (`via.read_annotations`, which is given
    `classes` and `attribute`) or a folder of labelme's. `group` is a regular expression whose
    first group, searched in the stem, is the patient; or a .csv with the columns stem and
    patient; '' makes each picture a patient of its own. A group (?P<slice>[0-9]+) or a column slice
    makes a patient's pictures the slices of a volume; without it each picture is by itself.
    """
    stacks = [files.find(folder) for folder in images]
    first, faults, notes = stacks[0], [], []
    for folder, stack in zip(images[1:], stacks[1:], strict=True):
        for stem in sorted(first.keys() ^ stack.keys()):
            here, there = (folder, images[0]) if stem in stack else (images[0], folder)
            faults.append(f'{stem} is in {here} and not in {there}: every channel needs it')
    if masks.is_file() or next(masks.glob('*.json'), None):
        annotations = via.read_annotations(masks, classes=classes, attribute=attribute)
        shapes, wrong, more = via.match_pictures(annotations, images[0])
        faults, notes = faults + wrong, [*annotations.notes, *more]
        mask_of = {stem: shapes.get(path, ()) for stem, path in first.items()}
    else:
        mask_of = files.find(masks)
        for stem in sorted(first.keys() - mask_of.keys()):
            faults.append(f'{first[stem]} has no mask: add {masks / stem}.png or remove it')
        for stem in sorted(mask_of.keys() - first.keys()):
            faults.append(f'{mask_of[stem]} has no image: add it or remove the mask')
    whole = [s for s in sorted(first) if s in mask_of and all(s in stack for stack in stacks)]
    patients, wrong = group_stems(whole, group)
    numbers, more = slice_numbers(patients, group)
    cases = [
        Case(
            patients[stem], tuple(stack[stem] for stack in stacks), mask_of[stem], numbers.get(stem)
        )
        for stem in sorted(patients, key=lambda stem: (numbers.get(stem, 0), stem))
    ]
    return cases, faults + wrong + more, notes


def group_stems(stems: Sequence[str], group: str) -> tuple[dict[str, str], list[str]]:
    """Stem -> patient, and the faults: stems that the expression or the table leaves out."""
    if not group:
        table, remedy = {stem: stem for stem in stems}, ''
    elif group.endswith('.csv'):
        table = read_table(Path(group))
        remedy = f'add it to {group}'
    else:
        try:
            expression = re.compile(group)
        except re.error as error:
            raise DataError(f'data.group {group!r} is no regular expression: {error}') from error
        number = expression.groupindex.get('slice')
        patient = next((n for n in range(1, expression.groups + 1) if n != number), 0)
        if not patient:
            raise DataError(f'data.group {group!r} has no group: put the patient in (), as "(.+)_"')
        found = ((stem, expression.search(stem)) for stem in stems)
        table = {stem: match[patient] for stem, match in found if match and match[patient]}
        remedy = f'data.group {group!r} must find one in it'
    faults = [f'{stem} has no patient: {remedy}' for stem in stems if not table.get(stem)]
    patients = {stem: table[stem] for stem in stems if table.get(stem)}
    for name in sorted(set(patients.values())):
        bad = re.search(r'[/\\]', name) or name.startswith('.') or not name.isprintable()
        if bad or len(name) > MAX_NAME:
            faults.append(f'patient {name!r} can not be a file name, which results take: rename it')
    return patients, faults


def slice_numbers(patients: Mapping[str, str], group: str) -> tuple[dict[str, int], list[str]]:
    """Stem -> number of the slice, where `group` tells it of these stems and their patients, and
    the faults; none are told: they are pictures by themselves.
    """
    if group.endswith('.csv'):
        found = read_table(Path(group), 'slice')
    elif group and 'slice' in (expression := re.compile(group)).groupindex:
        found = {stem: expression.search(stem)['slice'] for stem in patients}
        found = {stem: number for stem, number in found.items() if number is not None}
    else:
        return {}, []
    numbers, faults, taken = {}, [], {}
    for stem in sorted(patients.keys() & found.keys()):
        if not re.fullmatch(r'[0-9]{1,9}', found[stem] or ''):
            faults.append(f'{stem} is slice {found[stem]!r} by data.group: it must be a number')
            continue
        numbers[stem] = int(found[stem])
        other = taken.setdefault((patients[stem], numbers[stem]), stem)
        if other != stem:
            faults.append(f'{other} and {stem} are both slice {numbers[stem]}: rename one')
    return numbers, faults


def read_table(path: Path, column: str = 'patient') -> dict[str, str]:
    """Stem -> patient of a .csv with these two columns, or another column where it has that."""
    has = 'it has a line "stem,patient" and one such line a picture'
    try:
        rows = csv.DictReader(io.StringIO(text.read(path, has), newline=''))
        if column != 'patient' and column not in (rows.fieldnames or ()):
            return {}
        return {row['stem'].strip(): row[column].strip() for row in rows}
    except (KeyError, AttributeError, csv.Error) as error:
        raise DataError(
            f'{path} is not a table of patients ({type(error).__name__}: {error}): {has}'
        ) from error


def load(
    source: str | Path,
    *,
    images: Sequence[str] = ('images',),
    masks: str = 'masks',
    group: str = '',
    classes: Mapping[str, int] | None = None,
    attribute: str = '',
    mask_format: str = 'auto',
    mask_colors: Sequence[str] = (),
    num_classes: int = 2,
    ignore_label: int = IGNORE_LABEL,
    mixed_sizes: bool = False,
    threads: int = 4,
) -> Slices:
    """Every slice below the folders, `images` and `masks` named within `source` or whole paths.

    Every file is read once here. Raises one DataError that lists every fault, several sizes
    among them unless `mixed_sizes`.
    """
    folders, masks = _find_folders(Path(source).expanduser(), images, masks)
    cases, faults, notes = scan(folders, masks, group=group, classes=classes, attribute=attribute)
    if not cases and not faults:
        raise DataError(f'{folders[0]} holds no picture: {", ".join(files.SUFFIXES)} are read')
    for note in notes:
        logger.info('annotations: %s', note)
    if not group and not any(volumes_by_name(case.images[0]) for case in cases):
        logger.warning(
            'no data.group: each of %d pictures counts as a patient of its own; where several '
            'show the same one, the figures will be too good', len(cases),
        )  # fmt: skip

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(functools.partial(_attempt, _mask_values), cases))
        unread = [fault for _, fault in found if fault]
        if unread:  # what the others mean can't be known
            raise _all_faults(source, faults + unread)
        values = functools.reduce(np.union1d, [values for values, _ in found], np.array([], int))
        code = understand(values, mask_format, mask_colors, num_classes, ignore_label)
        if len(values):
            logger.info('masks: %s', code.meaning)
        patients = {}
        for name in sorted({case.patient for case in cases}):
            own = [case for case in cases if case.patient == name]
            patients[name], more = _survey(own, code, pool.map, num_classes, ignore_label)
            faults += more
    faults += _disagreements(patients.values(), mixed_sizes)
    if faults:
        raise _all_faults(source, faults)

    in_order = [case for patient in patients.values() for case in patient.cases]
    depths = [len(lesion) for patient in patients.values() for lesion in patient.lesion]
    places = [(number, d) for number, depth in enumerate(depths) for d in range(depth)]

    @functools.lru_cache(maxsize=8)  # a volume's slices are asked for one by one
    def read_case(number: int) -> tuple[files.Picture, np.ndarray]:
        return _read_case(in_order[number], code)

    def read(key: int) -> tuple[np.ndarray, np.ndarray]:
        number, d = places[key]
        picture, labels = read_case(number)
        return picture.image[d], labels[d]

    lesion = [np.concatenate(patient.lesion) for patient in patients.values()]
    scans = [_scans(patient) for patient in patients.values()]
    several = sum(bool(numbers.any()) for numbers in scans)
    if group and in_order[0].slice is not None:
        logger.info(
            'data.group: the pictures are slices of %d volumes, by their numbers; %d lack some: '
            'distances and components are of each part', len(scans), several,
        )  # fmt: skip
    elif group and several:
        logger.info(
            'data.group: %d of %d patients have several files; distances and components are of '
            'each file by itself. If they are slices of one volume, name their number: '
            'data.group="(.+)_(?P<slice>[0-9]+)"', several, len(scans),
        )  # fmt: skip
    return Slices(
        read=read,
        key=np.arange(len(places)),
        patient=np.repeat(list(patients), [len(pixels) for pixels in lesion]),
        slice=np.concatenate([np.arange(len(pixels)) for pixels in lesion]),
        lesion_pixels=np.concatenate(lesion),
        intensity={name: patient.intensity for name, patient in patients.items()},
        spacing={name: p.spacing for name, p in patients.items() if p.spacing is not None},
        ranges={name: p.range for name, p in patients.items() if p.range is not None},
        digest=np.concatenate([patient.digest for patient in patients.values()]),
        scan=np.concatenate(scans),
    )


def _scans(patient: Patient) -> np.ndarray:
    """Number of the scan that each of the patient's slices is of: every file is one, but for
    pictures that are numbered as slices, whose every run without a gap is one.
    """
    depths = [len(lesion) for lesion in patient.lesion]
    numbers = [case.slice for case in patient.cases]
    if None in numbers or max(depths) > 1:
        return np.repeat(np.arange(len(depths)), depths)
    return np.cumsum(np.diff(numbers, prepend=numbers[0]) > 1)


def _find_folders(root: Path, images: Sequence[str], masks: str) -> tuple[list[Path], Path]:
    """The folders of images, and that of masks or the file of annotations."""
    folders = [root / name for name in images]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f'{folder} is not a folder: put the pictures into {root / "images"} and the masks '
                f'into {root / "masks"}, or set data.images and data.masks'
            )
    if not (root / masks).exists():
        raise DataError(f'{root / masks} is neither a folder of masks nor a file of annotations')
    return folders, root / masks


def _survey(
    cases: Sequence[Case], code: Code, map_: Callable, num_classes: int, ignore_label: int
) -> tuple[Patient, list[str]]:
    """What is to be known of a patient's cases, and their faults."""
    known = [*range(num_classes), ignore_label]

    def measure(case: Case) -> tuple[files.Picture, list[int]]:
        picture, labels = _read_case(case, code)
        wrong = np.setdiff1d(labels, known)
        if wrong.size:
            raise DataError(
                f'the mask of {case.images[0]} has labels {wrong.tolist()[:8]}, the model has '
                f'classes 0 to {num_classes - 1}: set model.num_classes={wrong.max() + 1}'
            )
        return picture, [volumes.lesion_pixels(mask, ignore_label) for mask in labels]

    found = list(map_(functools.partial(_attempt, measure), cases))
    good = [result for result, fault in found if not fault]
    shapes = {picture.image.shape[1:]: picture.source for picture, _ in good}
    spacing = {picture.spacing for picture, _ in good}
    intensity = measured = None
    if len({channels for *_, channels in shapes}) == 1:
        pixels = [picture.image.reshape(-1, picture.image.shape[-1]) for picture, _ in good]
        pixels = np.concatenate(pixels)
        intensity = volumes.measure_intensity(pixels)
        measured = None if pixels.dtype == np.uint8 else volumes.measure_range(pixels)
    patient = Patient(
        list(cases),
        [lesion for _, lesion in good],
        shapes,
        spacing.pop() if len(spacing) == 1 else None,
        intensity,
        measured,
        [volumes.picture_digest(image) for picture, _ in good for image in picture.image],
    )
    return patient, [fault for _, fault in found if fault]


def _disagreements(patients: Iterable[Patient], mixed_sizes: bool) -> Iterator[str]:
    """Faults of patients that are sound, but not together."""
    shapes = {shape: path for patient in patients for shape, path in patient.shapes.items()}
    channels = {shape[2]: path for shape, path in shapes.items()}
    sizes = {shape[:2]: path for shape, path in shapes.items()}
    if len(channels) > 1:
        some = ', '.join(f'{path} has {n}' for n, path in sorted(channels.items()))
        yield f'not all images have as many channels: {some}; convert them'
    if len(sizes) > 1 and not mixed_sizes:
        some = ', '.join(f'{path} is {h}x{w}' for (h, w), path in sorted(sizes.items())[:4])
        yield (
            f'images are of {len(sizes)} sizes ({some}): set data.size="(HEIGHT, WIDTH)", they are '
            'resized to it for training and the masks that come out have their own size'
        )


def volumes_by_name(path: Path) -> bool:
    """Whether the file holds more than a flat picture, by its name."""
    return path.name.lower().endswith(('.nii', '.nii.gz', '.npy', '.dcm')) or path.is_dir()


def _all_faults(source: str | Path, faults: list[str]) -> DataError:
    rest = len(faults) - MOST_LISTED
    more = [f'and {rest} more'] if rest > 0 else []
    return DataError(f'{len(faults)} fault(s) in {source}:', [*faults[:MOST_LISTED], *more])


def _attempt(function: Callable, *arguments):
    """(result, '') or (None, what was wrong)."""
    try:
        return function(*arguments), ''
    except DataError as error:
        return None, str(error)


def _mask_values(case: Case) -> np.ndarray:
    """The distinct values of a case's mask, `as_numbers`; none where it is drawn."""
    if not isinstance(case.mask, Path):
        return np.array([], int)
    return np.unique(as_numbers(files.read_labels(case.mask)))


def as_numbers(mask: np.ndarray) -> np.ndarray:
    """D H W integers; of D H W 3 colours 0xRRGGBB, or where all are grey their value."""
    if mask.ndim == 3:
        return mask
    red, green, blue = (mask[..., c].astype(np.int64) for c in range(3))
    if (red == green).all() and (green == blue).all():
        return red
    return COLORED | (red << 16) | (green << 8) | blue


COLORED = 1 << 24  # marks a number that is a colour


def understand(
    values: np.ndarray,
    mask_format: str,
    colors: Sequence[str],
    num_classes: int,
    ignore_label: int = IGNORE_LABEL,
) -> Code:
    """What the masks' values mean, from all of them.

    'auto' takes class numbers where all values are some, 0 and 255 for two classes as background
    and class 1, and `colors` ('#rrggbb', in the order of the classes) where the masks have
    colours. Raises DataError where that leaves a doubt, with the choices.
    """
    shown = ', '.join(
        f'#{v & 0xFFFFFF:06x}' if v & COLORED else str(v) for v in values[:8].tolist()
    ) + (f' and {len(values) - 8} more' if len(values) > 8 else '')
    colored = values.size and (values & COLORED).any()
    if mask_format == 'color' or (mask_format == 'auto' and colors):
        return _by_color(values, colors, shown)
    if colored:
        raise DataError(
            f'the masks have colours ({shown}): name them in the order of the classes, '
            'data.mask_colors=("#000000", "#ff0000", ...)'
        )
    classes = {*range(num_classes), ignore_label}
    two = set(values.tolist()) <= {0, 255}
    if mask_format == 'binary' or (
        mask_format == 'auto' and two and 255 in values and num_classes == 2
    ):
        half = int(values.max(initial=1)) / 2
        return Code(
            lambda labels: (as_numbers(labels) > half).astype(np.uint8),
            f'values {shown}; class 1 is what is above {half:g}',
        )
    if mask_format == 'index' or set(values.tolist()) <= classes:
        ignored = f', {ignore_label} counts nowhere' if ignore_label in values else ''
        return Code(
            lambda labels: _as_uint8(as_numbers(labels)),
            f'values {shown} are class numbers{ignored}',
        )
    raise DataError(
        f'the masks have values {shown}, the model has classes 0 to {num_classes - 1}: '
        f'data.mask_format="binary" makes what is above {values.max() / 2:g} class 1, '
        f'"index" takes values as classes (then model.num_classes must be {values.max() + 1}); '
        'many values are usually a mask saved as JPEG: save it as PNG'
    )


def _as_uint8(numbers: np.ndarray) -> np.ndarray:
    if numbers.size and (numbers.min() < 0 or numbers.max() > 255):
        raise DataError(f'labels go from {numbers.min()} to {numbers.max()}: 0 to 255 are classes')
    return numbers.astype(np.uint8)


def _by_color(values: np.ndarray, colors: Sequence[str], shown: str) -> Code:
    table = {}
    for label, name in enumerate(colors):
        if not re.fullmatch('#[0-9a-fA-F]{6}', name):
            raise DataError(f'data.mask_colors has {name!r}: a colour is written #rrggbb')
        table[int(name[1:], 16)] = label
    # A grey value v is the colour #vvvvvv.
    plain = np.where(values & COLORED, values & 0xFFFFFF, values * 0x010101)
    unknown = sorted(set(plain.tolist()) - table.keys())
    if unknown:
        some = ', '.join(f'#{v:06x}' for v in unknown[:8])
        raise DataError(f'the masks have {some}, which data.mask_colors does not name: add them')
    known = np.array(sorted(table))
    labels_of = np.array([table[color] for color in known.tolist()], np.uint8)

    def to_labels(mask: np.ndarray) -> np.ndarray:
        numbers = as_numbers(mask)
        plain = np.where(numbers & COLORED, numbers & 0xFFFFFF, numbers * 0x010101)
        return labels_of[np.searchsorted(known, plain)]

    return Code(to_labels, f'colours {shown} are the classes in the order of data.mask_colors')


def _read_case(case: Case, code: Code) -> tuple[files.Picture, np.ndarray]:
    """The picture D H W C and its labels D H W uint8, of one size."""
    parts = [files.read(path) for path in case.images]
    picture = parts[0] if len(parts) == 1 else files.stack(parts)
    if not isinstance(case.mask, Path):
        size = picture.image.shape[1:3]
        faults, _ = via.check_shapes(case.mask, size)
        if faults:
            raise DataError(f'{case.images[0]}: {"; ".join(faults)}')
        return picture, via.rasterize(case.mask, size)[None]
    return picture, code.to_labels(files.read_labels(case.mask, picture))
