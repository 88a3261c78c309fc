"""Finding the files to predict, and which of them belong together."""

import collections
import glob
import itertools
import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ml_collections import ConfigDict

from pspnet_jax.data import folder, pairing, sources
from pspnet_jax.data.formats import files, video
from pspnet_jax.runtime.errors import ConfigError, DataError, one_line

logger = logging.getLogger(__name__)
# Why files are skipped.
NAMED = 'named like results or masks (give one as --input to predict it)'
LINK = 'links to folders, which are not followed'
UNLISTED = 'folders that can not be listed'
RESULT = re.compile(r'.*_(mask|probability|probability_\d+|overlay|outline|panels)')


def find_files(source: str | Path, output: str | Path = '') -> tuple[Path, list[Path]]:
    """(folder relative to which results are named, files) of a file, a folder or a pattern.

    DICOM files are grouped by `files.gather`. Raises DataError if nothing is found.
    """
    return take_stock(source, output)[:2]


def take_stock(
    source: str | Path, output: str | Path = ''
) -> tuple[Path, list[Path], dict[str, list[Path]]]:
    """What `find_files` finds, and {why: files and folders} of all that is skipped.

    Masks, results of this program, hidden files and the folder `output` are skipped.
    """
    root, entries, ours = _list_entries(source, output)
    if entries == {Path(source).expanduser()}:  # whatever its name
        return root, list(entries), {}
    passed, found, dicom = defaultdict(list), set(), []
    for path in sorted(entries):
        if why := _why_not(path, root, ours):
            passed[why].append(path)
        elif files.is_dicom(path):
            dicom.append(path)
        else:
            found.add(path)
    volumes, others = files.gather(dicom, root)
    found.update(volumes)
    for path, what in others.items():
        passed[f'DICOM without a picture ({what})'].append(path)
    if not found:
        endings = ', '.join((*files.SUFFIXES, *video.SUFFIXES))
        raise DataError(
            f'{source} holds no images: the known endings are {endings}', passed_lines(passed)
        )
    if root in found:  # a DICOM series itself
        root = root.parent
    return root, sorted(found), dict(passed)


def _list_entries(source: str | Path, output: str | Path) -> tuple[Path, set[Path], Path | None]:
    """(root folder, every file in it, `output` if it is in it too or None).

    Folders that are not searched are entries themselves.
    """
    source = Path(source).expanduser()
    if source.is_file():
        return source.parent, {source}, None
    if source.is_dir():
        root, below = source, [source]
    elif glob.has_magic(str(source)):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), source.parts))
        try:  # unlike glob.glob, it does not follow links to folders, which may form a circle
            below = list(root.glob(str(source.relative_to(root))))
        except ValueError as error:
            raise ConfigError(f'--input={source} is not a valid pattern: {error}') from error
    else:
        raise DataError(f'{source} is neither a file nor a folder: give --input=IMAGE_OR_FOLDER')
    results = Path(output).expanduser().resolve()
    inside = output and root.resolve() in results.parents
    ours = root / results.relative_to(root.resolve()) if inside else None
    entries = set()
    for place in below:
        unlisted = [] if place.is_dir() else [place]
        for here, folders, names in os.walk(
            place, onerror=lambda error, unlisted=unlisted: unlisted.append(Path(error.filename))
        ):
            into = []
            for path in map(Path(here).joinpath, folders):
                entered = not (path.name.startswith('.') or path == ours or os.path.islink(path))
                into += [path.name] if entered else []
                entries |= set() if entered else {path}
            folders[:] = into
            entries |= {Path(here, name) for name in names}
        entries |= set(unlisted)
    return root, entries, ours


def _why_not(path: Path, root: Path, ours: Path | None) -> str:
    """Why an entry is skipped; '' if it is an input."""
    if ours is not None and ours in (path, *path.parents):
        return 'in --output'
    if any(part.startswith('.') for part in path.relative_to(root).parts):
        return 'hidden'
    if os.path.isdir(path):
        return LINK if os.path.islink(path) else UNLISTED
    if not os.path.isfile(path):
        return 'neither files nor folders (pipes, devices, broken links)'
    known = path.name.lower().endswith((*files.SUFFIXES, *video.SUFFIXES))
    if not (known or files.is_dicom(path)):
        return 'unknown endings'
    return NAMED if RESULT.fullmatch(stem_of(path)) else ''


def files_beside(pictures: Iterable[Path]) -> list[Path]:
    """Other images and volumes in the same folders."""
    pictures = set(pictures)
    return [
        path
        for parent in sorted({path.parent for path in pictures})
        for path in sorted(parent.iterdir())
        if path not in pictures
        and path.name.lower().endswith((*files.PICTURES, *files.NIFTI, '.npy'))
        and not _why_not(path, parent, None)
    ]


def passed_lines(passed: Mapping[str, Sequence[Path]]) -> list[str]:
    """One line per reason, with the number of entries and the first names."""
    lines = []
    for why, entries in passed.items():
        names = one_line(', '.join(path.name for path in entries[:3]))
        more = f' and {len(entries) - 3} more' if len(entries) > 3 else ''
        lines.append(f'{len(entries)} skipped, {why}: {names}{more}')
    return lines


def stack_channels(found: Sequence[Path], images: Sequence[str]) -> dict[Path, tuple[Path, ...]]:
    """{first file: files of its channels}, if the run's `data.images` has a rule per channel.

    The other channels' files are then no inputs. Other runs have one file per image.
    """
    rules = [pairing.split(Path(place))[1] for place in images]
    stacks, others = {path: (path,) for path in found}, set()
    if len(rules) < 2 or pairing.STEM in rules:
        return stacks
    for path in found:
        ending = path.name[len(files.stem(path)) :]
        for name in pairing.named({files.stem(path): path}, rules[0]):
            parts = [path.with_name(rule.replace(pairing.STEM, name) + ending) for rule in rules]
            stacks[path] = tuple(part for part in parts if part.exists())
            others.update(parts[1:])
    return {path: parts for path, parts in stacks.items() if path not in others}


def stem_of(path: Path) -> str:
    return path.stem if is_video(path) else path.name if path.is_dir() else files.stem(path)


def is_video(path: Path) -> bool:
    return path.suffix.lower() in video.SUFFIXES


def check_apart(output: Path, root: Path, found: Iterable[Path]) -> None:
    """Raise ConfigError if results would be written among the inputs."""
    if output.resolve() in {path.resolve() for path in (root, *(path.parent for path in found))}:
        raise ConfigError(
            f'--output={output} holds the inputs: give the results a separate folder, such as '
            f'--output={output / "predictions"}'
        )


class Group(NamedTuple):
    """Files that share an intensity scale.

    Files in `beside` are not predicted: they help to measure the scale, and are neighbouring slices
    if the network sees some. `numbers` are slice numbers within a volume; a file without one is a
    case of its own.
    """

    paths: Sequence[Path]
    beside: Sequence[Path] = ()
    numbers: Mapping[Path, int] = MappingProxyType({})


def group_files(
    paths: Sequence[Path], grouping: str = '', beside: Sequence[Path] = (), rule: str = pairing.STEM
) -> tuple[list[Group], str]:
    """The groups of `paths`, and a description of how they were grouped.

    `grouping` is `sources.grouping`'s. '' makes each file its own group, except slices in Kaggle's
    layout of LGG, which form volumes. `beside` are other files of the same folders. Files are named
    as in training: by what `rule` leaves of their names, or by their relative paths if names are
    not unique.
    """
    where = {path: stem_of(path) for path in (*paths, *beside)}
    where = {p: next(iter(pairing.named({stem: p}, rule)), stem) for p, stem in where.items()}
    if len(set(where.values())) < len(where):
        top = os.path.commonpath([path.parent for path in where])
        where = {p: (p.parent.relative_to(top) / stem).as_posix() for p, stem in where.items()}
    where = {path: unicodedata.normalize('NFC', stem) for path, stem in where.items()}
    if grouping:
        table, _ = folder.group_stems(sorted(set(where.values())), grouping)
        told, _ = folder.slice_numbers(table, grouping)
        named = {path: table[stem] for path, stem in where.items() if stem in table}
        numbers = {path: told[where[path]] for path in named if where[path] in told}
    else:
        match = {path: sources.SLICE.fullmatch(path.stem) for path in where if _is_kaggle(path)}
        named = {path: path.parent for path in match}
        numbers = {path: int(found['slice']) for path, found in match.items()}
    members = defaultdict(list)
    for path in where:
        members[path in named, named.get(path, path)].append(path)
    asked, groups = set(paths), []
    for some in members.values():
        some = sorted(some, key=lambda path: (numbers.get(path, 0), path))
        own = [path for path in some if path in asked]
        if own:
            others = [path for path in some if path not in asked]
            groups.append(Group(own, others, {p: numbers[p] for p in some if p in numbers}))
    return groups, _say_groups(groups, grouping, named)


def group_inputs(
    config: ConfigDict, paths: Sequence[Path], beside: Sequence[Path], group: str | None
) -> list[Group]:
    """The groups of the files to predict; logs how they were grouped."""
    grouping = sources.grouping(config, group)
    if group is None and grouping.endswith('.csv') and not os.path.isfile(grouping):
        logger.warning(
            '%s, which grouped the images of the run, is not here, so each file is a separate '
            'case: to group these files, give --group=TABLE.csv', grouping,
        )  # fmt: skip
        grouping = ''
    rule = pairing.split(Path(config.data.images[0]))[1]
    groups, told = group_files(paths, grouping, beside, rule)
    if told:
        logger.info('%s', told)
    return groups


def _is_kaggle(path: Path) -> bool:
    """Whether it is CASE/CASE_7.tif with its mask in the same folder."""
    match = path.suffix == '.tif' and sources.SLICE.fullmatch(path.stem)
    mask = path.with_name(f'{path.stem}_mask.tif')
    return bool(match) and match['patient'] == path.parent.name and os.path.isfile(mask)


def _say_groups(groups: Sequence[Group], grouping: str, named: Iterable[Path]) -> str:
    """Which files belong together, and why; '' for a single ungrouped file."""
    named = set(named)
    together = [group for group in groups if not named.isdisjoint(group.paths)]
    alone = [group.paths[0] for group in groups if named.isdisjoint(group.paths)]
    volumes = sum(bool(group.numbers) for group in together)
    count, patients = sum(len(group.paths) for group in together), len(together)
    by = f'the group {grouping!r}' if grouping else "Kaggle's layout"
    said = []
    if together or grouping:
        said.append(
            f'{count} files belong to {patients} patient{"s" * (patients != 1)} by {by}: files of '
            'one patient share an intensity scale; numbered slices form a volume '
            f'({volumes} of {patients})'
        )
    if grouping:
        said += [f'{len(alone)} file(s) without a patient are separate cases'] if alone else []
        said.append('--group= makes each file a separate case')
    elif len(alone) > 1:
        said.append(f'each of {len(alone)} files is a separate case, as in evaluation')
        numbered = [sources.SLICE.fullmatch(path.stem) for path in alone]
        names = collections.Counter(match['patient'] for match in numbered if match)
        if max(names.values(), default=0) > 1:
            said.append("if NAME_1, NAME_2 ... are slices: --group='(.+)_(?P<slice>[0-9]+)'")
    return '; '.join(said)
