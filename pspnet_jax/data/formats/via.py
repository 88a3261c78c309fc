"""Makes label masks from the regions of an annotation file.

It reads VGG Image Annotator 1 and 2 (JSON or CSV), COCO and labelme. `pspnet_jax.rasterize` is the
command.
"""

import os
import runpy
import shlex
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from pspnet_jax.data.formats import annotations, files, flat
from pspnet_jax.data.formats.annotations import Annotations, count, listed, show
from pspnet_jax.data.formats.outlines import Shape, check_shapes, check_size, rasterize
from pspnet_jax.runtime.errors import ConfigError, DataError, some
from pspnet_jax.runtime.storage import writing


def holds_annotations(masks: Path, images: Path) -> tuple[bool, list[str]]:
    """(whether `masks` holds annotations instead of masks, notes about skipped files).

    Annotations are a file, or a folder of labelme files. A folder of masks may contain other .json
    files, and a folder of labelme files may contain images.
    """
    if not masks.is_dir():
        return masks.is_file(), []
    found, elsewhere = files.below(masks, ('.json',)), images.resolve()
    if not found:
        return False, []
    pictures = files.below(masks.resolve(), files.SUFFIXES)
    pictures = [path for path in pictures if not path.is_relative_to(elsewhere)]
    drawn = any(map(annotations.is_labelme, found)) or not pictures
    left = pictures if drawn else found
    what = 'images among labelme files' if drawn else 'other .json files among masks'
    told = some([show(path.name) for path in left])
    return drawn, [f'skipped: {what} ({len(left)}): {told}'] if left else []


def match_pictures(
    drawn: Annotations, images: str | Path, *, leave_out: str | Path | None = None
) -> tuple[dict[Path, list[Shape]], list[str], list[str]]:
    """({path of every image in `images`: its shapes}, faults, notes).

    A name in the annotations matches an image if one of the two paths ends with the other: 'a.png'
    may be in a subfolder, and 'train/a.png' or '/home/ann/train/a.png' in a folder named train. A
    loose name also matches an image in another folder, if there is only one. A name that matches no
    image or several is a fault; an image without a name has no shapes, with a note. The folder
    `leave_out` is skipped. Raises DataError if there is no image.
    """
    root = Path(images).expanduser()
    pictures = _find_pictures(root, leave_out)
    same_name = defaultdict(list)
    for way in pictures:
        same_name[way.rpartition('/')[2]].append(way)
    owner, missing, faults, notes = {}, [], [], []
    for name in drawn.shapes:
        alike = same_name[name.rpartition('/')[2]]
        ways = [w for w in alike if f'/{w}'.endswith(f'/{name}') or f'/{name}'.endswith(f'/{w}')]
        ways = [name] if name in pictures else ways or alike * drawn.loose
        if not ways:
            missing.append(show(name))
        elif len(ways) > 1:
            faults.append(
                f'{show(name)} may be {some(list(map(show, ways)))}: add the folder to its name'
            )
        elif owner.setdefault(ways[0], name) != name:
            faults.append(
                f'{show(ways[0])} is listed as {show(owner[ways[0]])} and as {show(name)}: keep one'
            )
    if missing:
        faults.append(
            f'{root} lacks {count(len(missing), "picture")} of the annotations: '
            f'{some(missing, 50)}; add them there, or take them out of the annotations'
        )
    unnamed = [show(way) for way in pictures if way not in owner]
    if unnamed and not faults:
        notes.append(
            f'not in the annotations, so all background: {some(unnamed)}; move them away if they '
            'were not annotated yet'
        )
    if empty := [show(way) for way, name in owner.items() if not drawn.shapes[name]]:
        notes.append(f'without a region, so all background: {some(empty)}')
    for way, name in owner.items():
        if told := drawn.sizes.get(name):
            with listed(faults):
                size = flat.size(pictures[way])
                if size != told:
                    faults.append(
                        f'{show(way)} is {size[1]} x {size[0]} pixels, but its annotations are for '
                        f'{told[1]} x {told[0]}: use the image that was annotated'
                    )
    return {p: drawn.shapes.get(owner.get(way), []) for way, p in pictures.items()}, faults, notes


def _find_pictures(root: Path, leave_out: str | Path | None) -> dict[str, Path]:
    """{path below the folder: path} of every image, sorted."""
    if not os.path.isdir(root):
        raise DataError(f'{root} is not a folder: give the one that holds the images')
    outer, inner = root.resolve(), leave_out and Path(leave_out).expanduser().resolve()
    masks = inner and inner.is_relative_to(outer) and root / inner.relative_to(outer)
    found = {
        unicodedata.normalize('NFC', path.relative_to(root).as_posix()): path
        for path in files.below(root, files.PICTURES)
        if not (masks and path.is_relative_to(masks))
    }
    if not found:
        known = ', '.join(files.PICTURES)
        raise DataError(f'{root} holds no images: the known endings are {known}')
    return found


def check_drawn(
    matched: Mapping[Path, Sequence[Shape]],
) -> tuple[dict[Path, tuple[int, int]], list[str], list[str]]:
    """({image: (H, W)}, faults, notes) of images and the shapes on them."""
    sizes, faults, notes = {}, [], []
    for path, shapes in matched.items():
        with listed(faults):
            sizes[path] = flat.size(path)
            check_size(path, sizes[path])
            wrong, odd = check_shapes(shapes, sizes[path])
            faults += wrong
            notes += odd
    return sizes, faults, notes


def write_masks(
    source: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    classes: Mapping[str, int] | None = None,
    attribute: str = '',
    line_width: float = 1.0,
) -> list[str]:
    """Write OUT/NAME.png, 8-bit class numbers, for every image in `images`; return the notes.

    `out` gets the same subfolders as `images`. If there are faults, one DataError lists all of them
    and nothing is written. Masks are written atomically.
    """
    if not 0 < line_width <= 1000:
        raise ConfigError(f'line width {line_width}: it must be above 0 and at most 1000 pixels')
    root, out = Path(images).expanduser(), Path(out).expanduser()
    if out.resolve() == root.resolve():
        raise DataError(f'{out} holds the images themselves: give another folder for the masks')
    drawn, faults = annotations.read(source, classes, attribute)
    matched, wrong, more = match_pictures(drawn, root, leave_out=out)
    sizes, odd, small = check_drawn(matched)
    notes = drawn.notes + more + small
    if not classes and len(drawn.classes) > 2 and ',' not in ''.join(drawn.classes):
        told = ','.join(f'{name}={number}' for name, number in drawn.classes.items() if number)
        notes.append(f'for other files with these classes: {shlex.quote(f"--classes={told}")}')
    targets = {path: out / path.relative_to(root).with_suffix('.png') for path in matched}
    faults = list(dict.fromkeys(faults + wrong + odd + _check_targets(targets, root, out)))
    if faults:
        raise annotations.all_faults(source, faults)
    for path, shapes in matched.items():
        with writing(targets[path]) as aside:
            mask = rasterize(shapes, sizes[path], line_width=line_width)
            Image.fromarray(mask).save(aside, 'png')
    return notes


def _check_targets(targets: Mapping[Path, Path], root: Path, out: Path) -> list[str]:
    """Faults for masks that would share a file, be among the images or be outside of `out`."""
    faults, pictures, first = [], {path.resolve() for path in targets}, {}
    root, below = root.resolve(), out.resolve()
    for path, target in targets.items():
        folder = target.parent.resolve()
        if not folder.is_relative_to(below):
            faults.append(f'{target.parent} leads out of {out}: remove the link')
        elif folder / target.name in pictures or (
            folder.is_relative_to(root) and not below.is_relative_to(root)
        ):
            faults.append(f'the mask of {path} would be among the images: give another folder')
        if (other := first.setdefault(target, path)) != path:
            faults.append(f'{other} and {path} would share the mask {target}: rename one of them')
    return faults


if __name__ == '__main__':  # the former name of the command
    print('pspnet_jax.data.formats.via is now pspnet_jax.rasterize', file=sys.stderr)
    runpy.run_module('pspnet_jax.rasterize', run_name='__main__', alter_sys=True)
