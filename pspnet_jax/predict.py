"""Masks and pictures for images that have no truth.

  python -m pspnet_jax.predict --workdir=RUN --input=FILE_FOLDER_GLOB_OR_CAMERA --output=FOLDER
  python -m pspnet_jax.predict --workdir=RUN1,RUN2,RUN3 --input=SCANS --output=MASKS --flip

For each picture NAME what --save lists, at the picture's own size:

  mask         NAME_mask.png: 0 and 255, or class numbers with more than two classes
  probability  NAME_probability.png: of class 1, 65535 is 1; with more classes one for each
  overlay      NAME_overlay.png: classes in colour, with their names
  outline      NAME_outline.png
  panels       NAME_panels.png: original, mask, outline on the original

A volume (NIfTI, DICOM, pages of a TIFF, array) gives a mask and probabilities in its own format,
size, spacing and orientation, and pictures of the slice with most in it. A video, or a camera by
its number, gives videos: .mp4, masks and probabilities exact in .mkv.

Each file is by itself, whatever its name, unless the run was trained on slices that files hold
(data.group, LGG) or --group says so: then those of a patient share an intensity scale, and those
with a number in (?P<slice>...) are slices of one volume.

The output folder keeps pspnet_predictions.jsonl, which says what each result was made from, and by
which run, step and options. The same command started again skips what is finished; a file there
that another command or person made is not replaced without --overwrite. A summary at the end
accounts for every file.
"""

import collections
import contextlib
import errno
import functools
import glob
import itertools
import logging
import math
import os
import re
import time
import unicodedata
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from pspnet_jax import (
    calibration,
    checkpoint,
    choice,
    cli,
    hosts,
    infer,
    manifest,
    paths,
    postprocess,
    visualize,
)
from pspnet_jax.config import from_dict, to_dict, with_prediction
from pspnet_jax.config.flags import define_prediction_flags, prediction_changes
from pspnet_jax.data import files, folder, pairing, sources, video
from pspnet_jax.data.files import Picture
from pspnet_jax.data.volumes import (
    channels_seen,
    check_kind,
    fit_channels,
    free_memory,
    measure,
    measure_intensity,
    neighbours,
    normalize,
    tile,
)
from pspnet_jax.errors import CheckpointError, ConfigError, DataError, NoRoomError, one_line, say
from pspnet_jax.evaluate import label_options, program_options, views, with_choice
from pspnet_jax.runs import open_run

logger = logging.getLogger(__name__)

KINDS = ('mask', 'probability', 'overlay', 'outline', 'panels')
USUAL = ('mask', 'overlay', 'panels')
# Why files are passed over.
NAMED = 'named like results or masks (give one as --input to predict it)'
LINK = 'links to folders, which are not followed'
UNLISTED = 'folders that can not be listed'
RESULT = re.compile(r'.*_(mask|probability|probability_\d+|overlay|outline|panels)')
CHUNK_BYTES = 2**28  # of pictures that are sorted by size to be predicted together
WINDOW_PIXELS = 2**24  # of images whose tiles are blended at a time
MOST_FRAMES = 64  # of a video that its intensity scale is measured on
FRAME_PIXELS = 2**14  # of each of them
SIZES = 8  # of images, after which the log recommends tiles
MOST_LISTED = 20  # results that are in the way


class Predictor(NamedTuple):
    """A run, or several as an ensemble: predict_fn takes B H W C normalised images.

    `intensity` normalises every image alike; None: each volume has its own. `temperature` is
    that which was fitted for the checkpoint, of probabilities alone: labels are those without.
    `chosen` is what the config has of `evaluate.with_choice`. `runs` say which they are: workdir,
    step, digest and what was passed over. `measured` is how a volume's own intensities are.
    """

    config: ConfigDict
    predict_fn: Callable[[np.ndarray], np.ndarray]
    intensity: np.ndarray | None
    channels: int  # of a picture, see `runs.Run`
    temperature: float = 1.0
    chosen: Mapping[str, Any] | None = None
    runs: Sequence[Mapping[str, Any]] = ()
    measured: str = 'volume'


class Case(NamedTuple):
    """Slices D H W C that share their size and intensity scale, and go to one or more files.

    `pictures` are what was read, whose slices are the image's in turn; `stems` are the results'
    names, without endings, below the output folder. `around` has for each slice those that the
    network sees as one with it, H W C each; without, they are the image's own.
    """

    image: np.ndarray
    intensity: np.ndarray
    pictures: Sequence[Picture] = ()
    stems: Sequence[Path] = ()
    around: Sequence[Sequence[np.ndarray]] = ()


# The network.


def load(
    workdirs: Sequence[str | Path] | str | Path,
    which: str = '',
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Predictor:
    """The checkpoint of a run, or of several runs as one network: the mean of their probabilities.

    `changes` are to the config's `predict` section, which is the first run's with what was chosen
    on validation (`evaluate.with_choice`) where there is one run. Raises
    CheckpointError for runs of different networks or differently normalised images.
    """
    workdirs = [workdirs] if isinstance(workdirs, str | Path) else list(workdirs)
    runs = [open_run(workdir, which) for workdir in workdirs]
    first, variables = runs[0], runs[0].variables
    for workdir, other in zip(workdirs[1:], runs[1:], strict=True):
        faults = checkpoint.model_differences(to_dict(first.config), to_dict(other.config))
        same = np.array_equal(first.intensity, other.intensity)
        if not same or first.measured != other.measured:
            faults.append('images are normalised in two ways: data.normalize')
        ours, theirs = first.config.model.class_names, other.config.model.class_names
        if ours and theirs and ours != theirs:
            faults.append(f'model.class_names is {ours} there, {theirs} here')
        if faults:
            raise CheckpointError(
                f'{workdirs[0]} (there) and {workdir} (here) can not be averaged: '
                f'{"; ".join(faults)}: give runs of one config'
            )
    ensemble, place = len(runs) > 1, paths.local(workdirs[0])
    config, chosen = with_prediction(first.config, changes), None
    if not ensemble:
        config, chosen = with_choice(first.config, place, first.step, changes)
    elif any((Path(paths.local(each)) / choice.KEPT).exists() for each in workdirs):
        logger.info(
            '%s is chosen for one run by itself: not applied to the mean of %d',
            choice.KEPT, len(runs),
        )  # fmt: skip
    if ensemble:
        variables = jax.tree.map(lambda *arrays: np.stack(arrays), *(run.variables for run in runs))
    program = infer.compile_predict(first.model, ensemble=ensemble, **program_options(config))
    predict_fn = functools.partial(program, jax.device_put(variables))
    temperature = 1.0 if ensemble else calibration.load(place, first.step, views(config))
    about = [
        {
            'workdir': os.path.abspath(paths.local(workdir)),
            'step': run.step,
            'passed_over': {str(step): reason for step, reason in run.passed_over.items()},
            'digest': run.digest,
        }
        for workdir, run in zip(workdirs, runs, strict=True)
    ]
    return Predictor(
        config, predict_fn, first.intensity, first.channels, temperature, chosen, about,
        first.measured,
    )  # fmt: skip


def predict_array(predictor: Predictor, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels uint8, probabilities K float32) of an image H W, H W C or D H W C of numbers.

    D slices are one volume. Raises DataError for channels that are not the network's.
    """
    image_DHWC = {2: image[None, ..., None], 3: image[None], 4: image}.get(image.ndim)
    if image_DHWC is None or not image.size:
        raise DataError(f'an array of shape {image.shape} is no image: give H W, H W C or D H W C')
    image_DHWC = as_taken(predictor, image_DHWC, f'an array of shape {image.shape}')
    ((labels, prob),) = segment(predictor, [_case(predictor, image_DHWC)], probabilities=True)
    return (labels, prob) if image.ndim == 4 else (labels[0], prob[0])


def segment(
    predictor: Predictor, cases: Sequence[Case], *, probabilities: bool
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """(labels D H W uint8, probabilities D H W K where asked for) of each case.

    Slices of one size are predicted together, whatever case they are of.
    """
    config = predictor.config
    batch_size, options = config.eval.batch_size, label_options(config)
    threshold = options.pop('threshold')
    labels = [np.empty(case.image.shape[:3], np.uint8) for case in cases]
    shapes = [(*case.image.shape[:3], config.model.num_classes) for case in cases]
    probs = [np.empty(shape, np.float32) if probabilities else None for shape in shapes]
    context = config.data.context
    around = [case.around or _around(case.image, context) for case in cases]
    scales = [tile(case.intensity, context) for case in cases]
    by_size = defaultdict(list)
    for c, case in enumerate(cases):
        by_size[case.image.shape[1:]] += [(c, d) for d in range(len(case.image))]
    for (H, W, _), places in by_size.items():
        together = batch_size
        if config.predict.window:  # the batch is of tiles, and blending needs memory
            together = min(batch_size, max(WINDOW_PIXELS // (H * W), 1))
        for first in range(0, len(places), together):
            batch = places[first : first + together]
            images = [np.concatenate(around[c][d], axis=-1) for c, d in batch]
            images = np.stack(
                [normalize(x, scales[c]) for x, (c, _) in zip(images, batch, strict=True)]
            )
            if not config.predict.window:
                images = infer.pad_batch(images, batch_size)
            prob_BHWK = predictor.predict_fn(images)
            labels_BHW = postprocess.to_labels(prob_BHWK, threshold)
            for (c, d), labels_HW, prob_HWK in zip(batch, labels_BHW, prob_BHWK, strict=False):
                labels[c][d] = labels_HW
                if probabilities:
                    probs[c][d] = calibration.temper(prob_HWK, predictor.temperature)
    return [
        (postprocess.clean(labels_DHW, **options), prob)
        for labels_DHW, prob in zip(labels, probs, strict=True)
    ]


def _around(images: Sequence[np.ndarray], context: int) -> list[list[np.ndarray]]:
    """For each of the slices of a scan those that the network sees as one with it."""
    return [[images[row] for row in rows] for rows in neighbours(None, len(images), context)]


def as_taken(predictor: Predictor, image_DHWC: np.ndarray, name: Any) -> np.ndarray:
    """The image with the network's channels. Raises DataError for one that it can't take."""
    if predictor.intensity is not None:
        check_kind(image_DHWC, predictor.intensity, name)
    return fit_channels(image_DHWC, predictor.channels, name)


def _case(
    predictor: Predictor, image_DHWC: np.ndarray, context: Sequence[np.ndarray] = (), **names
) -> Case:
    """A case whose scale, where the network needs one, is that of the images of `context`, else of
    itself.
    """
    if predictor.intensity is not None:
        return Case(image_DHWC, predictor.intensity, **names)
    return Case(image_DHWC, measure(context or [image_DHWC], predictor.measured), **names)


# Which files, and what is in them.


def find_files(source: str | Path, output: str | Path = '') -> tuple[Path, list[Path]]:
    """(folder that results are named after, files) of a file, a folder or a pattern.

    DICOM files go as `files.gather_dicom` says. Raises DataError where nothing is left.
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
    volumes, others = files.gather_dicom(dicom, root)
    found.update(volumes)
    for path, what in others.items():
        passed[f'DICOM without a picture ({what})'].append(path)
    if not found:
        endings = ', '.join((*files.SUFFIXES, *video.SUFFIXES))
        raise DataError(
            f'{source} holds no picture: the endings known are {endings}', _passed_lines(passed)
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
            raise ConfigError(f'--input={source} is no pattern: {error}') from error
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
    return NAMED if RESULT.fullmatch(_stem(path)) else ''


def _beside(pictures: Iterable[Path]) -> list[Path]:
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


def _passed_lines(passed: Mapping[str, Sequence[Path]]) -> list[str]:
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


def _stem(path: Path) -> str:
    return path.stem if _is_video(path) else path.name if path.is_dir() else files.stem(path)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in video.SUFFIXES


def name_results(root: Path, found: Sequence[Path]) -> tuple[dict[Path, Path], list[str]]:
    """{file: its results' name without ending}, and a fault for each file whose name is taken."""
    stems, faults = {}, []
    for path in found:
        stem = path.relative_to(root).parent / _stem(path)
        if stem in stems:
            faults.append(f'{path} would overwrite the results of {stems[stem]}: rename one')
        else:
            stems[stem] = path
    return {path: stem for stem, path in stems.items()}, faults


def check_apart(output: Path, root: Path, found: Iterable[Path]) -> None:
    """Raise ConfigError for results among the inputs, where nobody could tell them apart."""
    if output.resolve() in {path.resolve() for path in (root, *(path.parent for path in found))}:
        raise ConfigError(
            f'--output={output} holds the inputs: give results a folder of their own, as '
            f'--output={output / "predictions"}'
        )


def open_manifest(predictor: Predictor, output: Path, group: str | None) -> manifest.Manifest:
    """The folder's manifest, for what this network writes there with its options."""
    config = predictor.config
    options = {
        'digests': [run['digest'] for run in predictor.runs],
        'predict': to_dict(config)['predict'],
        'temperature': predictor.temperature,
        'group': sources.grouping(config, group),
    }
    return manifest.read(output, options, jax.process_index())


def begin_manifest(predictor: Predictor, book: manifest.Manifest, group: str | None) -> None:
    """Write which runs and options the results are of. Raises DataError."""
    config = predictor.config
    writer = ' and '.join(f'{run["workdir"]}, step {run["step"]}' for run in predictor.runs)
    options = to_dict(config)['predict'] | {'group': sources.grouping(config, group)}
    usual = to_dict(from_dict({}))['predict']
    told = ', '.join(f'{key}={x}' for key, x in options.items() if x != usual.get(key, ''))
    about = {'runs': predictor.runs, 'options': options, 'temperature': predictor.temperature}
    manifest.begin(book, f'{writer} ({told})' if told else writer, about)


def find_finished(
    inputs: Mapping[Path, tuple[Path, str]], book: manifest.Manifest, kinds: Collection[str]
) -> tuple[set[Path], list[str]]:
    """(the files whose every result is there, what keeps others from being written).

    `inputs` are {file: (its results' name without ending, its mark)}. Each result appears whole.
    """
    output = book.path.parent
    there = {path.relative_to(output).parent / _stem(path) for path in output.rglob('*')}
    done, faults = set(), []
    for path, (stem, mark) in inputs.items():
        some = [kind for kind in kinds if stem.with_name(f'{stem.name}_{kind}') in there]
        source = Path(os.path.abspath(path))
        whole, fault = manifest.sort_out(book, stem.as_posix(), source, mark, kinds, some)
        done |= {path} if whole else set()
        faults += [fault] if fault else []
    return done, faults


def _names(kind: str, num_classes: int) -> dict[int, str]:
    """{class: the result's name}; only probabilities have one for each class."""
    if kind == 'probability' and num_classes > 2:
        return {label: f'{kind}_{label}' for label in range(1, num_classes)}
    return {1: kind}


class Group(NamedTuple):
    """Files that share an intensity scale; those `beside` them only help to measure it, and are
    neighbours where the network sees some.

    `numbers` are those of the slices of one volume; a file without is by itself.
    """

    paths: Sequence[Path]
    beside: Sequence[Path] = ()
    numbers: Mapping[Path, int] = MappingProxyType({})


def group_files(
    paths: Sequence[Path], how: str = '', beside: Sequence[Path] = (), rule: str = pairing.STEM
) -> tuple[list[Group], str]:
    """The groups of `paths`, and in words which way it was.

    `how` is `data.group`, as `sources.grouping` has it: '' makes each file one of its own, but for
    slices in Kaggle's layout of LGG, which are a volume by that. `beside` are other files of the
    same folders. Files are called as in training: by what `rule` leaves of their names, and by
    their paths below where all are, where names alone would be the same.
    """
    where = {path: _stem(path) for path in (*paths, *beside)}
    where = {p: next(iter(pairing.named({stem: p}, rule)), stem) for p, stem in where.items()}
    if len(set(where.values())) < len(where):
        top = os.path.commonpath([path.parent for path in where])
        where = {p: (p.parent.relative_to(top) / stem).as_posix() for p, stem in where.items()}
    where = {path: unicodedata.normalize('NFC', stem) for path, stem in where.items()}
    if how:
        table, _ = folder.group_stems(sorted(set(where.values())), how)
        told, _ = folder.slice_numbers(table, how)
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
    return groups, _say_groups(groups, how, named)


def _group_inputs(
    config: ConfigDict, paths: Sequence[Path], beside: Sequence[Path], group: str | None
) -> list[Group]:
    """The groups of what a run is to predict; the log says which way it was."""
    how = sources.grouping(config, group)
    if group is None and how.endswith('.csv') and not os.path.isfile(how):
        logger.warning(
            '%s, by which the pictures of the run were grouped, is not here, so each file is by '
            'itself: give --group=TABLE.csv for those of these files', how,
        )  # fmt: skip
        how = ''
    rule = pairing.split(Path(config.data.images[0]))[1]
    groups, told = group_files(paths, how, beside, rule)
    if told:
        logger.info('%s', told)
    return groups


def _is_kaggle(path: Path) -> bool:
    """Whether it is CASE/CASE_7.tif, with its mask beside it."""
    match = path.suffix == '.tif' and sources.SLICE.fullmatch(path.stem)
    mask = path.with_name(f'{path.stem}_mask.tif')
    return bool(match) and match['patient'] == path.parent.name and os.path.isfile(mask)


def _say_groups(groups: Sequence[Group], how: str, named: Iterable[Path]) -> str:
    """Which files belong together and by what; '' where there is one that does not."""
    named = set(named)
    together = [group for group in groups if not named.isdisjoint(group.paths)]
    alone = [group.paths[0] for group in groups if named.isdisjoint(group.paths)]
    volumes = sum(bool(group.numbers) for group in together)
    count = sum(len(group.paths) for group in together)
    by = f'the group {how!r}' if how else "Kaggle's layout"
    said = []
    if together or how:
        said.append(
            f'{count} files belong to {len(together)} patients by {by}: those of one share what is '
            f'measured of intensities, and {volumes} are volumes of numbered slices'
        )
    if how:
        said += [f'in {len(alone)} files it finds no patient: each is by itself'] if alone else []
        said.append('--group= takes each file by itself')
    elif len(alone) > 1:
        said.append(f'each of {len(alone)} files is by itself, as evaluation takes it')
        numbered = [sources.SLICE.fullmatch(path.stem) for path in alone]
        names = collections.Counter(match['patient'] for match in numbered if match)
        if max(names.values(), default=0) > 1:
            said.append("if NAME_1, NAME_2 ... are slices: --group='(.+)_(?P<slice>[0-9]+)'")
    return '; '.join(said)


def read_cases(
    group: Group,
    *,
    predictor: Predictor,
    stems: Mapping[Path, Path],
    channels: Mapping[Path, Sequence[Path]] = MappingProxyType({}),
    save: Sequence[str] = USUAL,
    later: list[Group] | None = None,
) -> tuple[int, list[Case], list[str]]:
    """(number of files, cases, faults). Raises nothing for a file that is bad.

    What there is no room for goes to `later`, where that is given, as others are being worked on.
    `channels` are `stack_channels`'s. Files of a group share an intensity scale, where the run has
    none for all. A case is a file, or the slices of one size whose numbers follow one another.
    """
    several = len(group.paths) + len(group.beside) > 1
    seen = predictor.config.data.context if group.numbers else 0
    whole = predictor.intensity is None or seen  # those beside are needed
    if several and whole and (fault := _too_large(group)):
        return len(group.paths), [], [f'{path}: {fault}' for path in group.paths]
    found, faults, beside = [], [], set(group.beside)
    for path in (*group.paths, *group.beside):
        try:
            if path not in beside or whole:
                picture = files.stack([files.read(part) for part in channels.get(path, [path])])
                files.check_room(path, _needed(picture, predictor, save))
                image = as_taken(predictor, picture.image, path)
                found.append((path, picture, image))
        except DataError as error:
            if isinstance(error, NoRoomError) and later is not None:
                later.append(group)
                return 0, [], []
            faults += [] if path in beside else [str(error)]
    context = []
    if len(found) > 1 and predictor.intensity is None:
        by_size = defaultdict(list)
        for _, _, image in found:
            by_size[image.shape[1:]].append(image)
        context = [np.concatenate(images) for images in by_size.values()]
    cases, around = [], {}
    for some in _scans(found, group.numbers) if seen else ():
        images = [image[0] for _, _, image in some]
        around |= zip((path for path, _, _ in some), _around(images, seen), strict=True)
    for some in _scans([item for item in found if item[0] not in beside], group.numbers):
        paths, pictures, images = zip(*some, strict=True)
        names = {'pictures': pictures, 'stems': [stems[path] for path in paths]}
        if seen and len(images[0]) == 1:
            names['around'] = [around[path] for path in paths]
        image = images[0] if len(images) == 1 else np.concatenate(images)
        cases.append(_case(predictor, image, context, **names))
    return len(group.paths), cases, faults


def _scans(found: Sequence[tuple], numbers: Mapping[Path, int]) -> list[list[tuple]]:
    """What `read_cases` read, as evaluation takes it apart (`folder.load`): each file is one, but
    for pictures that are numbered as slices, whose every run without a gap is one of a size.
    """
    if not all(path in numbers and len(image) == 1 for path, _, image in found):
        return [[item] for item in found]
    scans, run, last = defaultdict(list), 0, None
    for item in sorted(found, key=lambda item: numbers[item[0]]):
        number = numbers[item[0]]
        run += last is not None and number > last + 1
        last = number
        scans[run, item[2].shape].append(item)
    return list(scans.values())


def _too_large(group: Group) -> str:
    """Why the files of a group can't be held together; '' where they can."""
    needed = sum(map(_decoded_bytes, (*group.paths, *group.beside)))
    if needed <= files.SMALL or needed <= (free := free_memory()) / 2:
        return ''
    return (
        f'the {len(group.paths) + len(group.beside)} pictures of its patient, which are read '
        f'together, need {needed / 2**20:.0f} MB and {free / 2**20:.0f} MB are free: close '
        'other programs, or give --group= to take each by itself'
    )


def _decoded_bytes(path: Path) -> int:
    """Of a flat picture, from the header alone; 0 where that can't be read, which reading then
    reports.
    """
    try:
        with Image.open(path, formats=files.PIL_FORMATS) as picture:
            return math.prod(picture.size) * len(picture.getbands())
    except Exception:  # Pillow's parsers raise whatever a damaged header leads to
        return 0


def _needed(picture: Picture, predictor: Predictor, save: Sequence[str]) -> int:
    """Bytes beside the picture that predicting it takes, about.

    Of all slices a byte of labels, one of what is written, and where they are asked for the
    probabilities, the components, and a copy to measure intensities; of one slice at a time images
    and probabilities.
    """
    D, H, W, C = picture.image.shape
    options = predictor.config.predict
    measuring = 5 * C if predictor.measured == 'buda' else 4  # all channels, or one at a time
    each = 2 + measuring * (predictor.intensity is None)
    each += 4 * (predictor.config.model.num_classes + 1) * ('probability' in save)
    each += 8 * (options.largest_component or options.min_size > 1)
    seen = channels_seen(C, predictor.config.data.context)
    return H * W * (D * each + 4 * (seen + 3 * predictor.config.model.num_classes))


# From files to files.


def predict_files(
    workdirs: Sequence[str | Path] | str | Path,
    source: str | Path,
    output: str | Path,
    which: str = '',
    *,
    save: Sequence[str] = USUAL,
    overwrite: bool = False,
    changes: Mapping[str, Any] = MappingProxyType({}),
    group: str | None = None,
) -> list[str]:
    """Write results below `output`; returns the faults of what was left out.

    `group` says whose files belong together, in place of the run's `data.group`. What became of
    every file is said at the end. Files are read ahead and results written behind while the
    network runs. Raises DataError, CheckpointError or ConfigError before anything is written, and
    DataError, which stops it all, where results can not be written.
    """
    output = paths.local(output)
    root, there, passed = take_stock(source, output)
    check_apart(output, root, there)
    predictor = load(workdirs, which, changes)
    channels = stack_channels(there, predictor.config.data.images)
    found = list(channels)
    stems, faults = name_results(root, found)
    classes = predictor.config.model.num_classes
    kinds = [name for kind in save for name in _names(kind, classes).values()]
    book = open_manifest(predictor, output, group)
    inputs = {path: (stem, manifest.mark_of(channels[path])) for path, stem in stems.items()}
    done, taken = (set(), []) if overwrite else find_finished(inputs, book, kinds)
    hosts.wait_for_all()  # from here on each writes
    if taken:
        raise DataError(
            f'{len(taken)} result(s) in {output} are not of this command: give another --output, '
            'or --overwrite to replace them:', taken[:MOST_LISTED],
        )  # fmt: skip
    targets = {path: output / stem for path, stem in stems.items()}
    note_of = {
        output / stem: functools.partial(
            manifest.add, book, result=stem.as_posix(), source=os.path.abspath(path), mark=mark,
            kinds=kinds,
        )
        for path, (stem, mark) in inputs.items()
    }  # fmt: skip
    pictures = [path for path in stems if not _is_video(path)]
    beside = {}
    if not Path(source).expanduser().is_dir():
        read_already = {part for parts in channels.values() for part in parts}
        others = [path for path in _beside(pictures) if path not in read_already]
        beside = stack_channels(others, predictor.config.data.images)
    groups = _group_inputs(predictor.config, pictures, list(beside), group)
    channels |= beside
    groups = [some for some in groups if not done.issuperset(some.paths)]
    done = done.difference(*(some.paths for some in groups))  # of these all are done again
    if done:
        print(f'{len(done)} finished before are left as they are: --overwrite does them again')
    groups = hosts.share(groups)
    videos = hosts.share([path for path in stems if _is_video(path) and path not in done])
    faults = faults if hosts.is_first() else []  # each has found the same so far
    # Volumes are large, and long at work on: one is read while another is.
    flat = all(
        len(some.paths) == 1 and some.paths[0].name.lower().endswith(files.PICTURES)
        for some in groups
    )
    threads = predictor.config.data.threads if flat else 1
    later = []
    read = functools.partial(
        read_cases, predictor=predictor, stems=targets, channels=channels, save=save
    )
    files.sweep(output)
    begin_manifest(predictor, book, group)
    write = functools.partial(write_results, predictor=predictor, save=save, note_of=note_of)
    probabilities = 'probability' in save
    pipelined = functools.partial(read, later=later)
    predicted = _predict_chunks(
        predictor, in_threads(pipelined, groups, threads), probabilities=probabilities
    )
    with tqdm(total=sum(len(g.paths) for g in groups), unit='file', disable=None) as bar:
        for count, found_faults in in_threads(write, predicted, threads):
            faults += found_faults
            bar.update(count)
        for some in later:  # by itself, when nothing else takes memory
            for item in _predict_chunks(predictor, [read(some)], probabilities=probabilities):
                count, found_faults = write(item)
                faults += found_faults
                bar.update(count)
    for path in videos:
        note = note_of[targets[path]]
        try:
            note('begun')
            say(str(predict_video(predictor, path, targets[path], save=save)))
            note('done')
        except DataError as error:
            faults.append(str(error))
    faults = hosts.gather(faults)
    if hosts.is_first():
        faults += [f'{path} can not be listed: is it yours?' for path in passed.get(UNLISTED, ())]
        say(f'{", ".join(save)} are in {output}')
        further = set(there) - set(found)
        print(summary(source, found, done, len(faults), passed, further))
    return faults


def summary(
    source: str | Path,
    found: Sequence[Path],
    done: Sequence[Path],
    failed: int,
    passed: Mapping[str, Sequence[Path]],
    further: Iterable[Path] = (),
) -> str:
    """What became of every file: a line of numbers that add up, and one for each reason to pass
    files over. `further` are those that hold a further channel of others.
    """
    further = len(set(further))
    failed -= len(passed.get(UNLISTED, ()))
    over = sum(map(len, passed.values()))
    series = [path for path in found if path.is_dir()]
    over_paths = {path for paths in passed.values() for path in paths}
    inside = {path for folder in series for path in folder.iterdir()} - over_paths
    slices = sum(map(files.is_dicom, inside))
    kinds = f' ({len(series)} of them folders of {slices} DICOM slices)' if series else ''
    folders = series or any(map(os.path.isdir, over_paths))
    total = len(found) + further + over
    things = 'files and folders' if folders else 'file' if total == 1 else 'files'
    counts = {
        'predicted': len(found) - len(done) - failed,
        'finished before': len(done),
        'failed': failed,
        'further channels of these': further,
        'passed over': over,
    }
    parts = ', '.join(f'{n} {what}' for what, n in counts.items() if n or what == 'predicted')
    head = one_line(f'{total} {things} in {source}{kinds}: {parts}')
    return '\n  '.join([head, *_passed_lines(passed)])


def _predict_chunks(predictor: Predictor, read: Iterable, *, probabilities: bool) -> Iterator:
    """What `read_cases` gives, its cases with labels and probabilities."""
    waiting, slices, size, sizes, told = [], 0, 0, set(), False
    config = predictor.config
    one_shape = config.predict.window or config.data.size
    for item in itertools.chain(read, [None]):
        if item is not None:
            waiting.append(item)
            images = [case.image for case in item[1]]
            slices += sum(map(len, images))
            size += sum(image.nbytes for image in images)
            sizes |= {image.shape[1:3] for image in images}
            if len(sizes) > SIZES and not (told or one_shape):
                told = True
                logger.warning(
                    'images of %d sizes so far, and each new size is compiled: '
                    '--window=512 cuts them into tiles of one size',
                    len(sizes),
                )
            if slices < 4 * config.eval.batch_size and size < CHUNK_BYTES:
                continue
        cases = [case for _, cases, _ in waiting for case in cases]
        results = iter(segment(predictor, cases, probabilities=probabilities))
        for count, cases, faults in waiting:
            yield count, [(case, *next(results)) for case in cases], faults
        waiting, slices, size = [], 0, 0


def write_results(
    item, *, predictor: Predictor, save: Sequence[str], note_of: Mapping[Path, Callable]
) -> tuple[int, list[str]]:
    """Write the results of an item of `_predict_chunks`; returns the number of its files and their
    faults.

    `note_of[stem]` is told when its results are 'begun' and 'done'. Raises DataError, except for a
    name that the file system finds too long, which is a fault of one file.
    """
    count, predicted, faults = item
    config = predictor.config
    for case, labels_DHW, prob_DHWK in predicted:
        first, shown = 0, case.intensity
        if predictor.intensity is not None and case.image.dtype != np.uint8:
            shown = measure_intensity(case.image)  # the run's own range is wider than is looked at
        for picture, stem in zip(case.pictures, case.stems, strict=True):
            part = slice(first, first + len(picture.image))
            first = part.stop
            prob = None if prob_DHWK is None else prob_DHWK[part]
            note_of[stem]('begun')
            try:
                _write(stem, picture, case.image[part], shown, labels_DHW[part], prob,
                       save=save, config=config)  # fmt: skip
            except DataError as error:
                if getattr(error.__cause__, 'errno', 0) != errno.ENAMETOOLONG:
                    raise
                faults.append(
                    f'{picture.source}: with _{save[0]} behind it the name is too long for this '
                    'disk: give it a shorter one'
                )
            else:
                note_of[stem]('done')
    return count, faults


def _write(
    stem: Path,
    picture: Picture,
    image_DHWC: np.ndarray,
    intensity: np.ndarray,
    labels_DHW: np.ndarray,
    prob_DHWK: np.ndarray | None,
    *,
    save: Sequence[str],
    config: ConfigDict,
) -> None:
    """The results of one file."""
    num_classes, ending = config.model.num_classes, files.output_suffix(picture)
    d = int((labels_DHW > 0).sum((1, 2)).argmax())
    shown = visualize.to_uint8(image_DHWC[d], intensity[0], intensity[1])
    for kind in save:
        for label, name in _names(kind, num_classes).items():
            path = stem.with_name(f'{stem.name}_{name}')
            if kind == 'mask':
                shades = num_classes == 2 and ending in ('.png', '.tif')
                values = labels_DHW * np.uint8(255) if shades else labels_DHW
                files.write_labels(f'{path}{ending}', values, picture)
            elif kind == 'probability':
                files.write_probabilities(f'{path}{ending}', prob_DHWK[..., label], picture)
            else:
                pixels = draw(kind, shown, labels_DHW[d], config.model.class_names)
                with files.writing(Path(f'{path}.png')) as aside:
                    Image.fromarray(pixels).save(aside, 'png')


def draw(kind: str, image_HWC: np.ndarray, mask_HW: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The RGB picture that a kind of result is."""
    if kind == 'panels':
        return visualize.three_panels(image_HWC, mask_HW)
    if kind == 'outline':
        return visualize.outline(image_HWC, mask_HW)
    return visualize.legend(visualize.overlay(image_HWC, mask_HW), mask_HW, names)


# Videos.


class Speed(NamedTuple):
    """Frames done, frames a second of the input, and those reached.

    The first batch does not count, as it waits for the compiler; NaN where there is no other.
    """

    name: str
    frames: int
    rate: float
    reached: float

    def __str__(self) -> str:
        reached = '' if math.isnan(self.reached) else f', {self.reached:.4g} a second reached'
        name = one_line(self.name)
        return f'{name}: {self.frames} frames of {self.rate:.4g} a second{reached}'


class Spread:
    """Frames evenly spread over the `count` that were added, at most MOST_FRAMES, made coarse."""

    def __init__(self):
        self.frames, self.count, self._every = [], 0, 1

    def add(self, frame_HWC: np.ndarray) -> None:
        if self.count % self._every == 0:
            H, W = frame_HWC.shape[:2]
            step = math.ceil(math.sqrt(H * W / FRAME_PIXELS))
            self.frames.append(frame_HWC[::step, ::step].copy())
        self.count += 1
        if len(self.frames) > MOST_FRAMES:
            self.frames, self._every = self.frames[::2], 2 * self._every

    def fitted(self, predictor: Predictor, name: str) -> np.ndarray:
        """D h w C, as the network takes them."""
        return as_taken(predictor, np.stack(self.frames), name)


def predict_video(
    predictor: Predictor,
    source: Path | int,
    stem: Path,
    *,
    save: Sequence[str] = USUAL,
    limit: int = 0,
) -> Speed:
    """Write videos with the input's size, frame rate and number of frames; sound is left out.

    `source` is a file or the number of a camera, which is read to `limit` frames or until
    Ctrl-C. Decoding, the network and encoding run at once. Where each volume has its own
    intensity scale, that of a file is measured over frames from its start to its end, and that of
    a camera again and again over those it has given so far. With `data.context` a frame stands
    between those before and after it. Raises DataError.
    """
    name = f'camera {source}' if isinstance(source, int) else str(source)
    batch_size, classes = predictor.config.eval.batch_size, predictor.config.model.num_classes
    context = predictor.config.data.context  # of frames, as many before and after
    results = [(kind, *item) for kind in save for item in _names(kind, classes).items()]
    exact = ('mask', 'probability')
    intensity, seen, frames, first, start = predictor.intensity, Spread(), 0, 0, math.nan
    if intensity is None and not isinstance(source, int):
        with video.reading(source) as (_, _, pictures):
            for frame in pictures:
                seen.add(frame)
        if seen.frames:
            intensity = _case(predictor, seen.fitted(predictor, name)).intensity
            logger.info(
                '%s: one intensity scale, measured over %d of its %d frames',
                name, len(seen.frames), seen.count,
            )  # fmt: skip
    running = intensity is None and isinstance(source, int)
    if running:
        logger.info(
            '%s: its intensity scale is that of the frames so far, so the first masks have a '
            'scale that changes', name,
        )  # fmt: skip

    def predicted(batches: Iterable[list[np.ndarray]]) -> Iterator[list]:
        nonlocal intensity, first, start
        for windows in batches:
            batch = [window[context] for window in windows]
            taken = [
                [as_taken(predictor, frame[None], name)[0] for frame in window]
                for window in windows
            ]
            if running:
                for frame in batch:
                    seen.add(frame)
                intensity = _case(predictor, seen.fitted(predictor, name)).intensity
            cases = [Case(around[context][None], intensity, around=[around]) for around in taken]
            labelled = segment(predictor, cases, probabilities='probability' in save)
            if not first:
                first, start = len(batch), time.perf_counter()
            yield list(zip(batch, labelled, strict=True))

    def encode(batch: list) -> int:
        nonlocal frames
        for frame_HWC, (labels_1HW, prob_1HWK) in batch:
            for kind, label, result in results:
                if kind == 'mask':
                    pixels = labels_1HW[0] * np.uint8(255 if classes == 2 else 1)
                elif kind == 'probability':
                    pixels = np.rint(255 * prob_1HWK[0, ..., label]).astype(np.uint8)
                else:
                    names = predictor.config.model.class_names
                    pixels = draw(kind, frame_HWC, labels_1HW[0], names)
                writers[result](pixels)
            frames += 1
        return len(batch)

    with contextlib.ExitStack() as stack:
        rate, count, pictures = stack.enter_context(video.reading(source))
        pictures = itertools.islice(pictures, limit or None)
        writers = {
            result: stack.enter_context(
                video.writing(
                    stem.with_name(f'{stem.name}_{result}{".mkv" if kind in exact else ".mp4"}'),
                    rate,
                    exact=kind in exact,
                )
            )
            for kind, _, result in results
        }
        bar = stack.enter_context(tqdm(total=limit or count or None, unit='frame', disable=None))
        # Closed before the file that it reads from is.
        windows = _windows(pictures, context)
        batches = stack.enter_context(contextlib.closing(ahead(_batched(windows, batch_size))))
        try:
            for done in in_threads(encode, predicted(batches), 1):
                bar.update(done)
        except KeyboardInterrupt:
            if not isinstance(source, int) or not frames:
                raise
            logger.info('%s: stopped after %d frames', name, frames)
        if not frames:
            raise DataError(f'{name} has no frame that can be read: record or export it again')
        seconds = time.perf_counter() - start
    reached = (frames - first) / seconds if frames > first else math.nan
    return Speed(name, frames, float(rate), reached)


def _windows(frames: Iterable[np.ndarray], context: int) -> Iterator[list[np.ndarray]]:
    """Each frame between as many others on either side, of which the first and last are repeated:
    `volumes.neighbours` of what is not there yet.
    """
    seen = deque(maxlen=2 * context + 1)
    for frame in frames:
        seen.extend([frame] * (1 if seen else context + 1))
        if len(seen) == seen.maxlen:
            yield list(seen)
    for _ in range(context if seen else 0):
        seen.append(seen[-1])
        if len(seen) == seen.maxlen:
            yield list(seen)


def _batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


# Threads.


def in_threads(function: Callable, items: Iterable, threads: int) -> Iterator:
    """function(item) of each, in order, some computed ahead of the one that is asked for."""
    pool, pending = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(items: Iterable) -> Iterator:
    """The same items, made in a thread of their own before they are asked for."""
    items, end = iter(items), object()
    made = in_threads(lambda _: next(items, end), itertools.repeat(None), 1)
    with contextlib.closing(made):
        for item in made:
            if item is end:
                return
            yield item


def main() -> None:
    options = flags.FLAGS
    workdirs = []
    for text in options.workdir:
        workdirs += [text] if Path(text).exists() else text.split(',')
    if wrong := [kind for kind in options.save if kind not in KINDS]:
        raise ConfigError(f'--save={",".join(wrong)} is not known: give some of {",".join(KINDS)}')
    changes, group = prediction_changes(), options.group
    if options.input.isdigit() and not os.path.exists(options.input):
        output, name = Path(options.output).expanduser(), f'camera_{options.input}'
        if not options.overwrite and list(output.glob(f'{name}_*')):
            raise ConfigError(f'{output / name}_* is there: give another --output, or --overwrite')
        predictor = load(workdirs, options.checkpoint, changes)
        camera = int(options.input)
        done = predict_video(
            predictor, camera, output / name, save=options.save, limit=options.frames
        )
        say(str(done))
        return
    faults = predict_files(
        workdirs,
        options.input,
        options.output,
        options.checkpoint,
        save=options.save,
        overwrite=options.overwrite,
        changes=changes,
        group=group,
    )
    if faults:
        raise DataError(f'{len(faults)} file(s) left out:', faults)


if __name__ == '__main__':
    flags.DEFINE_multi_string('workdir', None, 'folder of a run; several: the mean', required=True)
    flags.DEFINE_string(
        'input', None, 'file, folder, pattern, or number of a camera', required=True
    )
    flags.DEFINE_string('output', None, 'folder for the results', required=True)
    flags.DEFINE_string('checkpoint', '', "'best', 'last' or a step; '': as the config says")
    flags.DEFINE_list('save', ','.join(USUAL), f'which results: some of {",".join(KINDS)}')
    flags.DEFINE_string('group', None, cli.GROUP)
    flags.DEFINE_bool('overwrite', False, 'do again what is finished')
    flags.DEFINE_integer('frames', 0, 'of a camera; 0: until Ctrl-C')
    define_prediction_flags()
    hosts.define_flags()
    cli.run(main)
