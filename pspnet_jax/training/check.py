"""`pspnet check`: what is in a data set, and what is wrong with it."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pspnet_jax.config import validate
from pspnet_jax.data import sources, volumes
from pspnet_jax.data.augment import augment
from pspnet_jax.data.volumes import IGNORE_LABEL, Slices
from pspnet_jax.evaluation import visualize
from pspnet_jax.runtime.errors import DataError, say
from pspnet_jax.runtime.storage import writing
from pspnet_jax.training.start import complete, normalize_by_weights

THUMB = 16  # side in pixels of the thumbnails that are compared
ALIKE = 0.999  # thumbnails with this correlation or more show the same image
SHEET = {'train': 8, 'validation': 2, 'test': 2}  # columns of the contact sheet, at most
CELL = 160  # side in pixels of its images
NAME = 18  # pixels below each, for its name


def statistics(slices: Slices) -> tuple[dict[str, int], dict[int, int], np.ndarray]:
    """Read every slice: ({'HxWxC dtype': slices}, {class: pixels}, (N, THUMB**2) thumbnails).

    A thumbnail has mean 0 and length 1, or is all zeros if the image is nearly flat.
    """
    sizes, pixels = collections.Counter(), np.zeros(256, np.int64)
    thumbs = np.zeros((len(slices), THUMB * THUMB), np.float32)
    for row, key in enumerate(slices.key):
        image, mask = slices.read(int(key))
        sizes[f'{"x".join(map(str, image.shape))} {image.dtype}'] += 1
        pixels += np.bincount(mask.ravel(), minlength=256)
        grey = image.mean(axis=-1, keepdims=True, dtype=np.float32)
        thumb = volumes.resize_image(grey, (THUMB, THUMB)).ravel()
        thumb = thumb - thumb.mean()
        if thumb.std() > 0.02 * max(np.ptp(grey), 1e-6) and np.ptp(grey) > 0:
            thumbs[row] = thumb / np.linalg.norm(thumb)
    return dict(sizes), {label: int(n) for label, n in enumerate(pixels) if n}, thumbs


def leaks(
    thumbs: np.ndarray, patient: np.ndarray, parts: dict[str, list[str]]
) -> Iterator[tuple[int, int]]:
    """Pairs of rows from two different parts whose thumbnails show the same image."""
    part_of = {p: number for number, names in enumerate(parts.values()) for p in names}
    part = np.array([part_of.get(p, -1) for p in patient.tolist()])
    for number in range(len(parts) - 1):
        here, there = np.flatnonzero(part == number), np.flatnonzero(part > number)
        for first in range(0, len(here), 1024):  # blocks, so that the matrix stays small
            block = here[first : first + 1024]
            alike = thumbs[block] @ thumbs[there].T > ALIKE
            for i, j in zip(*np.nonzero(alike), strict=True):
                yield int(block[i]), int(there[j])


def contact_sheet(
    slices: Slices,
    parts: Mapping[str, Sequence[str]],
    augment_options: dict,
    seed: int,
    ignore_label: int = IGNORE_LABEL,
    names: Sequence[str] = (),
) -> np.ndarray:
    """RGB uint8: the slices of each part with the largest lesions, outlined and named; a legend.

    It shows one slice per patient if there are enough patients. A column of 'train' is a slice and
    two augmentations of it, as the network sees them; a column of another part is three slices.
    `names` are the names of all classes.
    """
    import jax

    columns, seen = [], np.zeros(256, bool)
    for part, most in SHEET.items():
        chosen = volumes.select(slices, parts.get(part, ()))
        rows = _with_most(chosen)[: most if part == 'train' else 3 * most]
        cells = []
        for row in rows:
            image, mask = chosen.read(int(chosen.key[row]))
            intensity = chosen.intensity[chosen.patient[row]]
            shown = np.where(mask == ignore_label, IGNORE_LABEL, mask).astype(np.uint8)
            seen[np.unique(shown)] = True
            picture = visualize.outline(visualize.to_uint8(image, *intensity[:2]), shown)
            cells.append(_cell(picture, _name(chosen, row)))
            content = (0, 0, *mask.shape) if chosen.content is None else chosen.content[row]
            normal = volumes.blank_around(volumes.normalize(image, intensity), content)
            for n in range(2 if part == 'train' else 0):
                key = jax.random.fold_in(jax.random.key(seed), 2 * row + n)
                changed, labels = augment(
                    key, normal, mask.astype(np.int32), augment_options, ignore_label=ignore_label
                )
                changed = np.asarray(changed) * intensity[3] + intensity[2]  # original unit
                picture = visualize.to_uint8(changed.astype(np.float32), *intensity[:2])
                labels = np.asarray(labels)
                labels = np.where(labels == ignore_label, 0, labels).astype(np.uint8)
                cells.append(_cell(visualize.outline(picture, labels), f'augmented {n + 1}'))
        empty = np.full_like(cells[0], 255) if cells else None
        for first in range(0, len(cells), 3):
            column = [*cells[first : first + 3], empty, empty][:3]
            columns.append((part, np.concatenate(column)))
    keys = visualize.class_keys(np.flatnonzero(seen), names)
    return visualize.framed(columns, keys)


def _with_most(slices: Slices) -> list[int]:
    """All rows by decreasing lesion area: first one of each patient, then the others."""
    first, rest, seen = [], [], set()
    for row in np.argsort(-slices.lesion_pixels, kind='stable').tolist():
        (rest if slices.patient[row] in seen else first).append(row)
        seen.add(slices.patient[row])
    return first + rest


def _name(slices: Slices, row: int) -> str:
    """The patient's name, with the slice's number if the patient has several."""
    patient = str(slices.patient[row])
    several = np.count_nonzero(slices.patient == patient) > 1
    return f'{patient}, {slices.slice[row]}' if several else patient


def _cell(picture: np.ndarray, name: str) -> np.ndarray:
    """The image within CELL x CELL on grey, with its name below."""
    image = Image.fromarray(picture)
    image.thumbnail((CELL - 4, CELL - 4))
    cell = Image.new('RGB', (CELL, CELL + NAME), 'white')
    cell.paste((60, 60, 60), (0, 0, CELL, CELL))
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    font = ImageFont.load_default(11)
    words = visualize.fitted(name, font, CELL - 6)
    ImageDraw.Draw(cell).text((3, CELL + NAME / 2), words, 'black', font, anchor='lm')
    return np.asarray(cell)


def _missing(pixels: dict[int, int], num_classes: int) -> list[str]:
    """One fault for each class of the model that no pixel has."""
    there = [label for label in range(num_classes) if label in pixels]
    if there in ([0], []):
        return [
            'all pixels are of class 0: look at a mask, and describe its values with '
            'data.mask_format, data.mask_colors or data.label_map'
        ]
    faults = []
    for label in sorted(set(range(num_classes)) - set(there)):
        remedy = f'lower model.num_classes to {there[-1] + 1}'
        if label < there[-1]:
            places = {old: new for new, old in enumerate(there) if old != new}
            remedy = (
                'if there is no such class, number the others without a gap: '
                f'data.label_map="{places}" with model.num_classes={len(there)}'
            )
        faults.append(f'no pixel is of class {label}: {remedy}')
    return faults


def check(config, out: str | Path) -> None:
    """Print what is in the data set; raise one DataError with all its faults."""
    validate(config)
    slices, parts = sources.load(config)
    config = complete(config, slices, int(np.isin(slices.patient, parts['train']).sum()))
    for name, patients in parts.items():
        print(f'{name:10} {volumes.describe(volumes.select(slices, patients))}')
    sizes, pixels, thumbs = statistics(slices)
    print('sizes      ' + ', '.join(f'{size}: {n}' for size, n in sorted(sizes.items())))
    total = sum(pixels.values())
    shares = (f'{label}: {100 * n / total:.2f} %' for label, n in pixels.items())
    print('classes    ' + ', '.join(shares))
    fit, ignored = config.data.fit, config.loss.ignore_label
    shown = volumes.resized(slices, config.data.size, fit, ignored) if config.data.size else slices
    if config.data.normalize == 'buda':
        shown = volumes.measured(shown, 'buda')
    path = Path(out) / 'contact_sheet.png'
    sheet = contact_sheet(
        shown,
        parts,
        config.augment.to_dict(),
        config.seed,
        config.loss.ignore_label,
        config.model.class_names or slices.class_names,
    )
    with writing(path) as aside:
        Image.fromarray(sheet).save(aside, 'png')
    say(f'written to {path}')

    faults = _missing(pixels, config.model.num_classes)
    if normalize_by_weights(config):
        try:
            volumes.joint_range(slices)
        except DataError as error:
            faults.append(str(error))
    found = leaks(thumbs, slices.patient, parts)
    pairs = collections.Counter((str(slices.patient[a]), str(slices.patient[b])) for a, b in found)
    faults += [
        f'{a} and {b} are in different parts and have {n} pair(s) of nearly identical images: '
        'make them one patient (data.group), or remove one'
        for (a, b), n in sorted(pairs.items())
    ]
    if faults:
        raise DataError(f'{len(faults)} fault(s):', faults[:50])
    print('no faults found')
