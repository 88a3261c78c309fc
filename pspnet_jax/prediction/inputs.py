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
# Why files are passed over.
NAMED = 'named like results or masks (give one as --input to predict it)'
LINK = 'links to folders, which are not followed'
UNLISTED = 'folders that can not be listed'
RESULT = re.compile(r'.*_(mask|probability|probability_\d+|overlay|outline|panels)')


def find_files(source: str | Path, output: str | Path = '') -> tuple[Path, list[Path]]:
    """(folder that results are named after, files) of a file, a folder or a pattern.

    DICOM files go as `files.gather` says. Raises DataError where nothing is left.
    """
    return take_stock(source, output)[:2]


def take_stock(
    source: str | Path, output: str | Path = ''
) -> tuple[Path, list[Path], dict[str, list[Path]]]:
    """What `find_files` finds, and {why: files and folders} of all else that is there.

    Masks, results of ours, hidden files and what is below `output` are passed over.
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
            f'{source} holds no pictures: the known endings are {endings}', passed_lines(passed)
        )
    if root in found:  # a DICOM series itself
        root = root.parent
    return root, sorted(found), dict(passed)


def _list_entries(source: str | Path, output: str | Path) -> tuple[Path, set[Path], Path | None]:
    """(folder that all are below, every file, `output` where that is below it too); folders
    that are not looked into are entries themselves.
    """
    source = Path(source).expanduser()
    if source.is_file():
        return source.parent, {source}, None
    if source.is_dir():
        root, below = source, [source]
    elif glob.has_magic(str(source)):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), source.parts))
        try:  # unlike glob.glob, not into links to folders, which may lead in a circle
            below = list(root.glob(str(source.relative_to(root))))
        except ValueError as error:
            raise ConfigError(f'--input={source} is not a valid pattern: {error}') from error
    else:
        raise DataError(f'{source} is neither a file nor a folder: give --input=PICTURE_OR_FOLDER')
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
    """Why an entry is no input; '' for one that is."""
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
        return 'of endings that are not read'
    return NAMED if RESULT.fullmatch(stem_of(path)) else ''


def files_beside(pictures: Iterable[Path]) -> list[Path]:
    """Other pictures and volumes in the folders of these."""
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
    """A line for each reason, with the number of entries and the names of the first."""
    lines = []
    for why, entries in passed.items():
        names = one_line(', '.join(path.name for path in entries[:3]))
        more = f' and {len(entries) - 3} more' if len(entries) > 3 else ''
        lines.append(f'{len(entries)} passed over, {why}: {names}{more}')
    return lines


def stack_channels(found: Sequence[Path], images: Sequence[str]) -> dict[Path, tuple[Path, ...]]:
    """{file: its channels} as a run reads them whose `data.images` has a rule for each channel; all
    but the first are no files of their own. Other runs have one file a picture.
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
    """Raise ConfigError for results among the inputs, where nobody could tell them apart."""
    if output.resolve() in {path.resolve() for path in (root, *(path.parent for path in found))}:
        raise ConfigError(
            f'--output={output} holds the inputs: give results a folder of their own, as '
            f'--output={output / "predictions"}'
        )


class Group(NamedTuple):
    """Files that share an intensity scale; those `beside` them only help to measure it, and are
    neighbours where the network sees some.

    `numbers` are those of the slices of one volume; a file without is by itself.
    """

    paths: Sequence[Path]
    beside: Sequence[Path] = ()
    numbers: Mapping[Path, int] = MappingProxyType({})


def group_files(
    paths: Sequence[Path], grouping: str = '', beside: Sequence[Path] = (), rule: str = pairing.STEM
) -> tuple[list[Group], str]:
    """The groups of `paths`, and in words which way it was.

    `grouping` is `sources.grouping`'s: '' makes each file one of its own, but for slices in
    Kaggle's layout of LGG, which are a volume by that. `beside` are other files of the same
    folders. Files are called as in training: by what `rule` leaves of their names, and by their
    paths below where all are, where names alone would be the same.
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
    """The groups of what a run is to predict; the log says which way it was."""
    grouping = sources.grouping(config, group)
    if group is None and grouping.endswith('.csv') and not os.path.isfile(grouping):
        logger.warning(
            '%s, which grouped the pictures of the run, is not here, so each file is a case of its '
            'own: to group these files, give --group=TABLE.csv', grouping,
        )  # fmt: skip
        grouping = ''
    rule = pairing.split(Path(config.data.images[0]))[1]
    groups, told = group_files(paths, grouping, beside, rule)
    if told:
        logger.info('%s', told)
    return groups


def _is_kaggle(path: Path) -> bool:
    """Whether it is CASE/CASE_7.tif, with its mask beside it."""
    match = path.suffix == '.tif' and sources.SLICE.fullmatch(path.stem)
    mask = path.with_name(f'{path.stem}_mask.tif')
    return bool(match) and match['patient'] == path.parent.name and os.path.isfile(mask)


def _say_groups(groups: Sequence[Group], grouping: str, named: Iterable[Path]) -> str:
    """Which files belong together and by what; '' where there is one that does not."""
    named = set(named)
    together = [group for group in groups if not named.isdisjoint(group.paths)]
    alone = [group.paths[0] for group in groups if named.isdisjoint(group.paths)]
    volumes = sum(bool(group.numbers) for group in together)
    count = sum(len(group.paths) for group in together)
    by = f'the group {grouping!r}' if grouping else "Kaggle's layout"
    said = []
    if together or grouping:
        said.append(
            f'{count} files belong to {len(together)} patients by {by}: those of one share what is '
            f'measured of intensities, and {volumes} are volumes of numbered slices'
        )
    if grouping:
        said += [f'in {len(alone)} files it finds no patient: each is by itself'] if alone else []
        said.append('--group= takes each file by itself')
    elif len(alone) > 1:
        said.append(f'each of {len(alone)} files is by itself, as evaluation takes it')
        numbered = [sources.SLICE.fullmatch(path.stem) for path in alone]
        names = collections.Counter(match['patient'] for match in numbered if match)
        if max(names.values(), default=0) > 1:
            said.append("if NAME_1, NAME_2 ... are slices: --group='(.+)_(?P<slice>[0-9]+)'")
    return '; '.join(said)
