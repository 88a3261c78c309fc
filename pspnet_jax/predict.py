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
its number, gives videos: .mp4, masks and probabilities exact in .mkv. Pictures NAME_1, NAME_2 ...
of one folder are the slices of one volume. What is finished is skipped when started again.
"""

import contextlib
import functools
import glob
import itertools
import logging
import math
import os
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from pspnet_jax import calibration, checkpoint, cli, hosts, infer, postprocess, visualize
from pspnet_jax.config import to_dict, with_prediction
from pspnet_jax.data import files, pairing, video
from pspnet_jax.data.files import Picture
from pspnet_jax.data.volumes import free_memory, measure_intensity, normalize
from pspnet_jax.errors import CheckpointError, ConfigError, DataError, one_line
from pspnet_jax.evaluate import label_options, program_options, restore_model

logger = logging.getLogger(__name__)

KINDS = ('mask', 'probability', 'overlay', 'outline', 'panels')
USUAL = ('mask', 'overlay', 'panels')
RESULT = re.compile(r'.*_(mask|probability|probability_\d+|overlay|outline|panels)')
VOLUME_BYTES = 2**31  # decoded; more pictures of one name are no volume but an album
CHUNK_BYTES = 2**28  # of pictures that are sorted by size to be predicted together
WINDOW_PIXELS = 2**24  # of images whose tiles are blended at a time
SIZES = 8  # of images, after which the log recommends tiles


class Predictor(NamedTuple):
    """A run, or several as an ensemble: predict_fn takes B H W C normalised images.

    `intensity` normalises every image alike; None: each volume has its own. `temperature` is
    that which was fitted for the checkpoint, of probabilities alone: labels are those without.
    """

    config: ConfigDict
    predict_fn: Callable[[np.ndarray], np.ndarray]
    intensity: np.ndarray | None
    channels: int
    temperature: float = 1.0


class Case(NamedTuple):
    """Slices D H W C that share their size and intensity scale, and go to one or more files.

    `pictures` are what was read, whose slices are the image's in turn; `stems` are the results'
    names, without endings, below the output folder.
    """

    image: np.ndarray
    intensity: np.ndarray
    pictures: Sequence[Picture] = ()
    stems: Sequence[Path] = ()


# The network.


def load(
    workdirs: Sequence[str | Path] | str | Path,
    which: str = '',
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Predictor:
    """The checkpoint of a run, or of several runs as one network: the mean of their probabilities.

    `changes` are to the config's `predict` section, which is the first run's. Raises
    CheckpointError for runs of different networks or differently normalised images.
    """
    workdirs = [workdirs] if isinstance(workdirs, str | Path) else list(workdirs)
    runs = [restore_model(workdir, which) for workdir in workdirs]
    config, model, variables, intensity, step = runs[0]
    config = with_prediction(config, changes)
    for workdir, (other, _, _, scale, _) in zip(workdirs[1:], runs[1:], strict=True):
        faults = checkpoint.model_differences(to_dict(runs[0][0]), to_dict(other))
        if not np.array_equal(intensity, scale):
            faults.append('images are normalised in two ways: data.normalize')
        if faults:
            raise CheckpointError(
                f'{workdirs[0]} (there) and {workdir} (here) can not be averaged: '
                f'{"; ".join(faults)}: give runs of one config'
            )
    ensemble = len(runs) > 1
    if ensemble:
        variables = jax.tree.map(lambda *arrays: np.stack(arrays), *(run[2] for run in runs))
    program = infer.compile_predict(model, ensemble=ensemble, **program_options(config))
    channels = checkpoint.metadata(workdirs[0], step)['inputs']['channels']
    predict_fn = functools.partial(program, jax.device_put(variables))
    temperature = 1.0 if ensemble else calibration.load(workdirs[0], step)
    return Predictor(config, predict_fn, intensity, channels, temperature)


def predict_array(predictor: Predictor, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels uint8, probabilities K float32) of an image H W, H W C or D H W C of numbers.

    D slices are one volume. Raises DataError for channels that are not the network's.
    """
    image_DHWC = {2: image[None, ..., None], 3: image[None], 4: image}.get(image.ndim)
    if image_DHWC is None or not image.size:
        raise DataError(f'an array of shape {image.shape} is no image: give H W, H W C or D H W C')
    image_DHWC = fit_channels(image_DHWC, predictor.channels, f'an array of shape {image.shape}')
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
    probs: list[list[np.ndarray]] = [[None] * len(case.image) for case in cases]
    by_size = defaultdict(list)
    for c, case in enumerate(cases):
        by_size[case.image.shape[1:]] += [(c, d) for d in range(len(case.image))]
    for (H, W, _), places in by_size.items():
        together = batch_size
        if config.predict.window:  # the batch is of tiles, and blending needs memory
            together = min(batch_size, max(WINDOW_PIXELS // (H * W), 1))
        for first in range(0, len(places), together):
            batch = places[first : first + together]
            images = np.stack([normalize(cases[c].image[d], cases[c].intensity) for c, d in batch])
            if not config.predict.window:
                images = infer.pad_batch(images, batch_size)
            prob_BHWK = predictor.predict_fn(images)
            labels_BHW = postprocess.to_labels(prob_BHWK, threshold)
            for (c, d), labels_HW, prob_HWK in zip(batch, labels_BHW, prob_BHWK, strict=False):
                labels[c][d] = labels_HW
                if probabilities:
                    probs[c][d] = calibration.temper(prob_HWK, predictor.temperature)
    return [
        (postprocess.clean(labels_DHW, **options), np.stack(prob) if probabilities else None)
        for labels_DHW, prob in zip(labels, probs, strict=True)
    ]


def fit_channels(image_DHWC: np.ndarray, channels: int, name: Any) -> np.ndarray:
    """Grey as three equal channels where the network takes three, and the other way round."""
    found = image_DHWC.shape[-1]
    if found == channels:
        return image_DHWC
    if (found, channels) == (1, 3):
        return np.repeat(image_DHWC, 3, axis=-1)
    if (found, channels) == (3, 1) and (image_DHWC == image_DHWC[..., :1]).all():
        return image_DHWC[..., :1]
    raise DataError(f'{name} has {found} channels, the network takes {channels}: give it these')


def _case(predictor: Predictor, image_DHWC: np.ndarray, context=None, **names) -> Case:
    """A case whose scale, where the network needs one, is that of `context`, else of itself."""
    if predictor.intensity is not None:
        return Case(image_DHWC, predictor.intensity, **names)
    return Case(image_DHWC, measure_intensity(image_DHWC if context is None else context), **names)


# Which files, and what is in them.


def find_files(source: str | Path, output: str | Path = '') -> tuple[Path, list[Path]]:
    """(folder that results are named after, files) of a file, a folder or a pattern.

    DICOM files go as `files.gather_dicom` says. Masks, results of ours, hidden files and what is
    below `output` are left out. Raises DataError where nothing is left.
    """
    source = Path(source).expanduser()
    if source.is_file():
        return source.parent, [source]
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
    found, dicom = set(), []
    for path in itertools.chain.from_iterable(
        place.rglob('*') if place.is_dir() else [place] for place in below
    ):
        known = path.name.lower().endswith((*files.SUFFIXES, *video.SUFFIXES))
        known = known or files.is_dicom(path)
        if not known or path.name.startswith('.') or RESULT.fullmatch(_stem(path)):
            continue
        if ours not in path.parents and path.is_file():
            if files.is_dicom(path):
                dicom.append(path)
            else:
                found.add(path)
    found.update(files.gather_dicom(dicom, root)[0])
    if not found:
        endings = ', '.join((*files.SUFFIXES, *video.SUFFIXES))
        raise DataError(f'{source} holds no picture: the endings known are {endings}')
    if root in found:  # a DICOM series itself
        return root.parent, sorted(found)
    return root, sorted(found)


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


def find_finished(
    stems: Mapping[Path, Path], output: Path, save: Sequence[str], num_classes: int
) -> set[Path]:
    """The files of which every result is there, with whatever ending; each appears whole."""
    there = {path.relative_to(output).parent / _stem(path) for path in output.rglob('*')}
    names = [name for kind in save for name in _names(kind, num_classes).values()]
    return {
        path
        for path, stem in stems.items()
        if all(stem.with_name(f'{stem.name}_{name}') in there for name in names)
    }


def _names(kind: str, num_classes: int) -> dict[int, str]:
    """{class: the result's name}; only probabilities have one for each class."""
    if kind == 'probability' and num_classes > 2:
        return {label: f'{kind}_{label}' for label in range(1, num_classes)}
    return {1: kind}


def group_slices(pictures: Sequence[Path]) -> list[list[Path]]:
    """Pictures that make one volume: NAME_1.tif, NAME_2.tif ... in one folder, in order."""
    groups = defaultdict(list)
    for path in pictures:
        match = re.fullmatch(r'(.+)_(\d+)', path.stem)
        if match and path.name.lower().endswith(files.PICTURES):
            groups[path.parent, match[1], path.suffix].append((int(match[2]), path))
        else:
            groups[path, '', ''].append((0, path))
    return [[path for _, path in sorted(group)] for group in groups.values()]


def split_albums(groups: Sequence[list[Path]]) -> list[list[Path]]:
    """Groups too large for a volume, picture by picture: a camera's IMG_0001.jpg and on."""
    parts = []
    for group in groups:
        if len(group) > 1 and len(group) * _decoded_bytes(group[0]) > VOLUME_BYTES:
            more = len(group) - 1
            logger.info('%s and %d more are taken as pictures, not slices', group[0], more)
            parts += [[path] for path in group]
        else:
            parts.append(group)
    return parts


def _decoded_bytes(path: Path) -> int:
    """From the header alone; 0 where that can't be read, which reading then reports."""
    try:
        with Image.open(path, formats=files.PIL_FORMATS) as picture:
            return math.prod(picture.size) * len(picture.getbands())
    except Exception:  # Pillow's parsers raise whatever a damaged header leads to
        return 0


def read_cases(
    group: Sequence[Path],
    *,
    predictor: Predictor,
    stems: Mapping[Path, Path],
    channels: Mapping[Path, Sequence[Path]] = MappingProxyType({}),
) -> tuple[int, list[Case], list[str]]:
    """(number of files, cases, faults). Raises nothing for a file that is bad.

    `channels` are `stack_channels`'s. Slices of one volume share its intensity scale. A single
    slice takes that of its neighbours in the folder, where they are (the network was trained on
    whole volumes' scales), else its own.
    """
    slices, cases, faults = defaultdict(list), [], []
    for path in group:
        try:
            picture = files.stack([files.read(part) for part in channels.get(path, [path])])
            _check_memory(picture, predictor.config.model.num_classes)
            image_DHWC = fit_channels(picture.image, predictor.channels, path)
            if len(image_DHWC) == 1 and picture.geometry is None:
                slices[image_DHWC.shape].append((path, picture, image_DHWC))
                continue
            names = {'pictures': (picture,), 'stems': (stems[path],)}
            cases.append(_case(predictor, image_DHWC, **names))
        except DataError as error:
            faults.append(str(error))
    for same in slices.values():
        paths, pictures, images = zip(*same, strict=True)
        context = None
        if len(group) == 1 and predictor.intensity is None:
            context = _with_neighbours(paths[0], images[0])
        image_DHWC = np.concatenate(images)
        names = {'pictures': pictures, 'stems': [stems[path] for path in paths]}
        cases.append(_case(predictor, image_DHWC, context, **names))
    return len(group), cases, faults


def _with_neighbours(path: Path, image_1HWC: np.ndarray) -> np.ndarray:
    """The volume that `path` is a slice of, as far as its folder holds it; else the image."""
    match = re.fullmatch(r'(.+)_(\d+)', path.stem)
    if not match:
        return image_1HWC
    pattern = re.compile(rf'{re.escape(match[1])}_\d+{re.escape(path.suffix)}')
    beside = [other for other in path.parent.iterdir() if pattern.fullmatch(other.name)]
    if len(beside) * image_1HWC.nbytes > VOLUME_BYTES:
        return image_1HWC
    images = [image_1HWC]
    for other in sorted(beside):
        if other != path:
            with contextlib.suppress(DataError):  # one that can't be read is no help
                pixels = files.read(other).image
                images.append(fit_channels(pixels, image_1HWC.shape[-1], other))
    images = [pixels for pixels in images if pixels.shape == image_1HWC.shape]
    if len(images) > 1:
        logger.info('%s: intensity scale of the %d slices beside it', path.name, len(images) - 1)
    return np.concatenate(images)


def _check_memory(picture: Picture, num_classes: int) -> None:
    """One slice at a time is predicted: as float32, with its sums and its probabilities."""
    _, H, W, C = picture.image.shape
    needed = 4 * H * W * (C + 3 * num_classes)
    if needed > files.SMALL and needed > (free := free_memory()):
        raise DataError(
            f'{picture.source} of {H} x {W} needs {needed / 2**20:.0f} MB for {num_classes} '
            f'classes and {free / 2**20:.0f} MB are free: close other programs or cut it up'
        )


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
) -> list[str]:
    """Write results below `output`; returns the faults of what was left out.

    Files are read ahead and results written behind while the network runs. Raises DataError,
    CheckpointError or ConfigError before anything is written, and DataError, which stops it
    all, where results can not be written.
    """
    root, found = find_files(source, output)
    output = Path(output).expanduser()
    predictor = load(workdirs, which, changes)
    channels = stack_channels(found, predictor.config.data.images)
    stems, faults = name_results(root, list(channels))
    done = set()
    if not overwrite:
        done = find_finished(stems, output, save, predictor.config.model.num_classes)
    if done:
        print(f'{len(done)} finished before are left as they are: --overwrite does them again')
    targets = {path: output / stem for path, stem in stems.items()}
    groups = split_albums(group_slices([path for path in stems if not _is_video(path)]))
    groups = hosts.share([group for group in groups if not done.issuperset(group)])
    videos = hosts.share([path for path in stems if _is_video(path) and path not in done])
    faults = faults if hosts.is_first() else []  # each has found the same so far
    # Volumes are large, and long at work on: one is read while another is.
    flat = all(len(g) == 1 and g[0].name.lower().endswith(files.PICTURES) for g in groups)
    threads = predictor.config.data.threads if flat else 1
    read = functools.partial(read_cases, predictor=predictor, stems=targets, channels=channels)
    write = functools.partial(write_results, predictor=predictor, save=save)
    predicted = _predict_chunks(
        predictor, in_threads(read, groups, threads), probabilities='probability' in save
    )
    with tqdm(total=sum(map(len, groups)), unit='file', disable=None) as bar:
        for count, found_faults in in_threads(write, predicted, threads):
            faults += found_faults
            bar.update(count)
    for path in videos:
        try:
            print(predict_video(predictor, path, targets[path], save=save))
        except DataError as error:
            faults.append(str(error))
    return hosts.gather(faults)


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


def write_results(item, *, predictor: Predictor, save: Sequence[str]) -> tuple[int, list[str]]:
    """Write the results of an item of `_predict_chunks`. Raises DataError."""
    count, predicted, faults = item
    config = predictor.config
    for case, labels_DHW, prob_DHWK in predicted:
        first = 0
        for picture, stem in zip(case.pictures, case.stems, strict=True):
            part = slice(first, first + len(picture.image))
            first = part.stop
            prob = None if prob_DHWK is None else prob_DHWK[part]
            _write(stem, picture, case.image[part], case.intensity, labels_DHW[part], prob,
                   save=save, config=config)  # fmt: skip
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
    intensity scale, a video's is that of its first batch. Raises DataError.
    """
    name = f'camera {source}' if isinstance(source, int) else str(source)
    batch_size, classes = predictor.config.eval.batch_size, predictor.config.model.num_classes
    results = [(kind, *item) for kind in save for item in _names(kind, classes).items()]
    exact = ('mask', 'probability')
    intensity, frames, first, start = None, 0, 0, math.nan

    def predicted(batches: Iterable[list[np.ndarray]]) -> Iterator[list]:
        nonlocal intensity, first, start
        for batch in batches:
            image_DHWC = fit_channels(np.stack(batch), predictor.channels, name)
            if intensity is None:
                intensity = _case(predictor, image_DHWC).intensity
            cases = [Case(image[None], intensity) for image in image_DHWC]
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
        batches = stack.enter_context(contextlib.closing(ahead(_batched(pictures, batch_size))))
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
    changes = cli.prediction_changes()
    if options.input.isdigit() and not os.path.exists(options.input):
        output, name = Path(options.output).expanduser(), f'camera_{options.input}'
        if not options.overwrite and list(output.glob(f'{name}_*')):
            raise ConfigError(f'{output / name}_* is there: give another --output, or --overwrite')
        predictor = load(workdirs, options.checkpoint, changes)
        camera = int(options.input)
        print(
            predict_video(predictor, camera, output / name, save=options.save, limit=options.frames)
        )
        return
    faults = predict_files(
        workdirs,
        options.input,
        options.output,
        options.checkpoint,
        save=options.save,
        overwrite=options.overwrite,
        changes=changes,
    )
    print(f'{", ".join(options.save)} are in {options.output}')
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
    flags.DEFINE_bool('overwrite', False, 'do again what is finished')
    flags.DEFINE_integer('frames', 0, 'of a camera; 0: until Ctrl-C')
    cli.define_prediction_flags()
    hosts.define_flags()
    cli.run(main)
