"""Predicts folders of images, volumes and videos."""

import functools
import itertools
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from pspnet_jax.config import from_dict, to_dict
from pspnet_jax.data import formats, sources
from pspnet_jax.data.formats import Picture, files, limits
from pspnet_jax.data.volumes import channels_seen, free_memory
from pspnet_jax.inference import predictors
from pspnet_jax.inference.predictors import (
    Case,
    Predictor,
    as_taken,
    case_of,
    segment,
    slices_around,
)
from pspnet_jax.prediction import manifest
from pspnet_jax.prediction.inputs import (
    UNLISTED,
    Group,
    check_apart,
    files_beside,
    group_inputs,
    is_video,
    passed_lines,
    stack_channels,
    stem_of,
    take_stock,
)
from pspnet_jax.prediction.results import USUAL, name_results, result_names, write_results
from pspnet_jax.prediction.videos import predict_video
from pspnet_jax.runtime import hosts, paths
from pspnet_jax.runtime.errors import DataError, NoRoomError, one_line, say
from pspnet_jax.runtime.storage import sweep
from pspnet_jax.runtime.threads import in_threads

logger = logging.getLogger(__name__)
CHUNK_BYTES = 2**28  # of images that are sorted by size and predicted together
SIZES = 8  # different image sizes, after which the log recommends tiles
MOST_LISTED = 20  # existing results that an error lists


def open_manifest(predictor: Predictor, output: Path, group: str | None) -> manifest.Manifest:
    """The output folder's manifest, for this network with its options."""
    config = predictor.config
    options = {
        'digests': [run['digest'] for run in predictor.runs],
        'predict': to_dict(config)['predict'],
        'temperature': predictor.temperature,
        'group': sources.grouping(config, group),
        **_crf(config),
    }
    return manifest.read(output, options, jax.process_index())


def begin_manifest(predictor: Predictor, book: manifest.Manifest, group: str | None) -> None:
    """Write into the manifest which runs and options make the results. Raises DataError."""
    config = predictor.config
    writer = ' and '.join(f'{run["workdir"]}, step {run["step"]}' for run in predictor.runs)
    options = to_dict(config)['predict'] | {'group': sources.grouping(config, group)}
    options |= _crf(config)
    usual = to_dict(from_dict({}))['predict']
    told = ', '.join(f'{key}={x}' for key, x in options.items() if x != usual.get(key, ''))
    about = {'runs': predictor.runs, 'options': options, 'temperature': predictor.temperature}
    manifest.begin(book, f'{writer} ({told})' if told else writer, about)


def _crf(config) -> dict[str, Any]:
    """The CRF's options if there is one; left out otherwise, as in manifests of older versions."""
    found = {f'crf.{key}': value for key, value in to_dict(config)['crf'].items()}
    return found if config.crf.kernel != 'none' else {}


def find_finished(
    inputs: Mapping[Path, tuple[Path, str]], book: manifest.Manifest, kinds: Collection[str]
) -> tuple[set[Path], list[str]]:
    """(files whose results are all there, reasons why others can't be written).

    `inputs` maps a file to (its results' name without ending, its mark). Results are written
    atomically.
    """
    output = book.path.parent
    there = {path.relative_to(output).parent / stem_of(path) for path in output.rglob('*')}
    done, faults = set(), []
    for path, (stem, mark) in inputs.items():
        some = [kind for kind in kinds if stem.with_name(f'{stem.name}_{kind}') in there]
        source = Path(os.path.abspath(path))
        whole, fault = manifest.sort_out(book, stem.as_posix(), source, mark, kinds, some)
        done |= {path} if whole else set()
        faults += [fault] if fault else []
    return done, faults


def read_cases(
    group: Group,
    *,
    predictor: Predictor,
    stems: Mapping[Path, Path],
    channels: Mapping[Path, Sequence[Path]] = MappingProxyType({}),
    save: Sequence[str] = USUAL,
    later: list[Group] | None = None,
) -> tuple[int, list[Case], list[str]]:
    """(number of files, cases, faults). A bad file is a fault and raises nothing.

    A group that does not fit into memory now is appended to `later` if that is given. `channels`
    comes from `stack_channels`. Files of a group share an intensity scale, unless the run has one
    for all images. A case is a file, or slices of one size with consecutive numbers.
    """
    several = len(group.paths) + len(group.beside) > 1
    seen = predictor.config.data.context if group.numbers else 0
    whole = predictor.intensity is None or seen  # then the files of group.beside are needed
    if several and whole and (fault := _too_large(group)):
        return len(group.paths), [], [f'{path}: {fault}' for path in group.paths]
    found, faults, beside = [], [], set(group.beside)
    for path in (*group.paths, *group.beside):
        try:
            if path not in beside or whole:
                picture = formats.stack([formats.read(part) for part in channels.get(path, [path])])
                limits.check_room(path, _needed(picture, predictor, save))
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
        around |= zip((path for path, _, _ in some), slices_around(images, seen), strict=True)
    for some in _scans([item for item in found if item[0] not in beside], group.numbers):
        paths, pictures, images = zip(*some, strict=True)
        names = {'pictures': pictures, 'stems': [stems[path] for path in paths]}
        if seen and len(images[0]) == 1:
            names['around'] = [around[path] for path in paths]
        image = images[0] if len(images) == 1 else np.concatenate(images)
        cases.append(case_of(predictor, image, context, **names))
    return len(group.paths), cases, faults


def _scans(found: Sequence[tuple], numbers: Mapping[Path, int]) -> list[list[tuple]]:
    """Divide what `read_cases` read into scans, as evaluation does (`folder.load`).

    Each file is a scan of its own, but numbered slices of one size without a gap are one scan.
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
    """Why a group's files do not fit into memory together; '' if they do."""
    needed = sum(map(_decoded_bytes, (*group.paths, *group.beside)))
    if needed <= limits.SMALL or needed <= (free := free_memory()) / 2:
        return ''
    return (
        f'the {len(group.paths) + len(group.beside)} images of its patient, which are read '
        f'together, need {needed / 2**20:.0f} MB and {free / 2**20:.0f} MB are free: close '
        'other programs, or give --group= to predict each image separately'
    )


def _decoded_bytes(path: Path) -> int:
    """Bytes of a 2D image, from its header; 0 if that can't be read, which is reported later."""
    try:
        with Image.open(path, formats=limits.PIL_FORMATS) as picture:
            return math.prod(picture.size) * len(picture.getbands())
    except Exception:  # Pillow's parsers raise anything for a corrupted header
        return 0


def _needed(picture: Picture, predictor: Predictor, save: Sequence[str]) -> int:
    """About how many bytes it takes to predict a picture, besides the picture itself.

    For all slices: a byte of labels, one of what is written, and if needed the probabilities, the
    components, and a copy to measure intensities. For one slice at a time: image and probabilities.
    """
    D, H, W, C = picture.image.shape
    options = predictor.config.predict
    measuring = 5 * C if predictor.measured == 'buda' else 4  # all channels, or one at a time
    each = 2 + measuring * (predictor.intensity is None)
    each += 4 * (predictor.config.model.num_classes + 1) * ('probability' in save)
    each += 8 * (options.largest_component or options.min_size > 1)
    seen = channels_seen(C, predictor.config.data.context)
    return H * W * (D * each + 4 * (seen + 3 * predictor.config.model.num_classes))


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
    """Write results to the folder `output`; return the faults of the files that failed.

    `group` replaces the run's `data.group`, which tells which files belong together. A summary is
    printed at the end. Raises DataError, CheckpointError or ConfigError before anything is written,
    and DataError if results can not be written.
    """
    output = paths.local(output)
    root, there, passed = take_stock(source, output)
    check_apart(output, root, there)
    predictor = predictors.load(workdirs, which, changes)
    channels = stack_channels(there, predictor.config.data.images)
    found = list(channels)
    stems, faults = name_results(root, found)
    classes = predictor.config.model.num_classes
    kinds = [name for kind in save for name in result_names(kind, classes).values()]
    book = open_manifest(predictor, output, group)
    inputs = {path: (stem, manifest.mark_of(channels[path])) for path, stem in stems.items()}
    done, taken = (set(), []) if overwrite else find_finished(inputs, book, kinds)
    hosts.wait_for_all()  # every process writes from here on
    if taken:
        raise DataError(
            f'{len(taken)} result(s) in {output} are from another command: give another --output, '
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
    pictures = [path for path in stems if not is_video(path)]
    beside = {}
    if not Path(source).expanduser().is_dir():
        beside = _channels_beside(predictor, pictures, channels)
    groups = group_inputs(predictor.config, pictures, list(beside), group)
    channels |= beside
    groups = [some for some in groups if not done.issuperset(some.paths)]
    done = done.difference(*(some.paths for some in groups))  # an unfinished group is done again
    if done:
        print(f'{len(done)} file(s) were finished before: --overwrite predicts them again')
    groups = hosts.share(groups)
    videos = hosts.share([path for path in stems if is_video(path) and path not in done])
    faults = faults if hosts.is_first() else []  # all processes have found the same so far
    sweep(output)
    begin_manifest(predictor, book, group)
    read = functools.partial(
        read_cases, predictor=predictor, stems=targets, channels=channels, save=save
    )
    write = functools.partial(write_results, predictor=predictor, save=save, note_of=note_of)
    faults += _predict_groups(predictor, groups, read, write, probabilities='probability' in save)
    for path in videos:
        faults += _predict_video(predictor, path, targets[path], save, note_of[targets[path]])
    faults = hosts.gather(faults)
    if hosts.is_first():
        faults += [
            f'{path} can not be listed: check its permissions' for path in passed.get(UNLISTED, ())
        ]
        say(f'{", ".join(save)} are in {output}')
        further = set(there) - set(found)
        print(summary(source, found, done, len(faults), passed, further))
    return faults


def _channels_beside(
    predictor: Predictor, pictures: Sequence[Path], channels: Mapping[Path, Sequence[Path]]
) -> dict[Path, tuple[Path, ...]]:
    """`stack_channels` of other files in the same folders that are no channels of `pictures`."""
    read_already = {part for parts in channels.values() for part in parts}
    others = [path for path in files_beside(pictures) if path not in read_already]
    return stack_channels(others, predictor.config.data.images)


def _predict_groups(
    predictor: Predictor, groups: Sequence[Group], read: Callable, write: Callable,
    *, probabilities: bool,
) -> list[str]:  # fmt: skip
    """`read` each group, predict it and `write` the results; return the faults.

    Reading and writing overlap with the network's work on other groups.
    """
    # Volumes are large and slow: only one is read ahead.
    flat = all(
        len(some.paths) == 1 and some.paths[0].name.lower().endswith(files.PICTURES)
        for some in groups
    )
    threads = predictor.config.data.threads if flat else 1
    faults, later = [], []
    predict = functools.partial(_predict_chunks, predictor, probabilities=probabilities)
    predicted = predict(in_threads(functools.partial(read, later=later), groups, threads))
    with tqdm(total=sum(len(g.paths) for g in groups), unit='file', disable=None) as bar:
        for count, found_faults in in_threads(write, predicted, threads):
            faults += found_faults
            bar.update(count)
        for some in later:  # alone, when nothing else takes memory
            for count, found_faults in map(write, predict([read(some)])):
                faults += found_faults
                bar.update(count)
    return faults


def _predict_video(
    predictor: Predictor, path: Path, stem: Path, save: Sequence[str], note: Callable
) -> list[str]:
    """Run `predict_video` and `note` its state; return the faults."""
    try:
        note('begun')
        say(str(predict_video(predictor, path, stem, save=save)))
        note('done')
    except DataError as error:
        return [str(error)]
    return []


def summary(
    source: str | Path,
    found: Sequence[Path],
    done: Sequence[Path],
    failed: int,
    passed: Mapping[str, Sequence[Path]],
    further: Iterable[Path] = (),
) -> str:
    """The summary: one line that counts every file, and one for each reason to skip files.

    `further` are files that hold another channel of an input.
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
        'skipped': over,
    }
    parts = ', '.join(f'{n} {what}' for what, n in counts.items() if n or what == 'predicted')
    head = one_line(f'{total} {things} in {source}{kinds}: {parts}')
    return '\n  '.join([head, *passed_lines(passed)])


def _predict_chunks(predictor: Predictor, read: Iterable, *, probabilities: bool) -> Iterator:
    """The items of `read_cases`, with labels and probabilities added to the cases."""
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
                    'add --window=512 to cut them into tiles of one size',
                    len(sizes),
                )
            if slices < 4 * config.eval.batch_size and size < CHUNK_BYTES:
                continue
        cases = [case for _, cases, _ in waiting for case in cases]
        results = iter(segment(predictor, cases, probabilities=probabilities))
        for count, cases, faults in waiting:
            yield count, [(case, *next(results)) for case in cases], faults
        waiting, slices, size = [], 0, 0
