"""Masks and pictures for images that have no truth.

  python -m pspnet_jax.predict --workdir=RUN --input=FILE_OR_FOLDER --output=FOLDER

For each picture NAME: NAME_mask.png (0 and 255, or class numbers with more than two
classes), NAME_overlay.png, and NAME_panels.png: original, mask, outline on the
original. All at the picture's own size. With --probability also NAME_probability.png: the
probability of any class but background in 255ths, at the temperature that was fitted for the
checkpoint, if one was.
"""

import contextlib
import functools
import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from absl import flags, logging
from PIL import Image
from tqdm import tqdm

from pspnet_jax import calibration, cli, infer, visualize
from pspnet_jax.data.volumes import Volume, measure_intensity, read_picture
from pspnet_jax.errors import DataError
from pspnet_jax.evaluate import predict_foreground, restore_model

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff')


def find_pictures(source: str | Path) -> list[Path]:
    """The file, or every picture below the folder that is not a mask or a result of ours."""
    source = Path(source).expanduser()
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f'{source} is neither a file nor a folder: give --input=PICTURE_OR_FOLDER')
    results = re.compile(r'.*_(mask|overlay|panels|probability)')
    found = sorted(
        path
        for path in source.rglob('*')
        if path.suffix.lower() in SUFFIXES and not results.fullmatch(path.stem)
    )
    if not found:
        raise DataError(f'{source} holds no picture: the endings known are {", ".join(SUFFIXES)}')
    return found


def group_slices(pictures: list[Path]) -> list[list[Path]]:
    """Pictures that make one volume: NAME_1.tif, NAME_2.tif ... in one folder, in order."""
    groups = defaultdict(list)
    for path in pictures:
        match = re.fullmatch(r'(.+)_(\d+)', path.stem)
        name, number = (match[1], int(match[2])) if match else (path.stem, 0)
        groups[path.parent, name, path.suffix].append((number, path))
    return [[path for _, path in sorted(group)] for group in groups.values()]


def predict_pictures(
    workdir: str | Path,
    source: str | Path,
    output: str | Path,
    which: str = '',
    probability: bool = False,
) -> list[str]:
    """Write masks and pictures below `output`; returns the faults of what was left out.

    Slices of one volume share its intensity scale. A single slice takes that of its
    neighbours in the folder, where they are (the network was trained on whole volumes'
    scales), else its own. Raises DataError or CheckpointError before anything is written.
    """
    pictures = find_pictures(source)
    config, model, variables, intensity, step = restore_model(workdir, which)
    temperature = calibration.load(workdir, step) if probability else 1.0
    predict_fn = functools.partial(infer.compile_predict(model, **config.crf), variables)
    root = Path(source).expanduser()
    root = root if root.is_dir() else root.parent
    faults = []
    for group in tqdm(group_slices(pictures), unit='volume', disable=None):
        images, good = [], []
        for path in group:
            try:
                images.append(read_picture(path))
                good.append(path)
            except DataError as error:
                faults.append(str(error))
        for shape in sorted({image.shape for image in images}):
            same = [i for i, image in enumerate(images) if image.shape == shape]
            image = np.stack([images[i] for i in same])
            context = image if len(image) > 1 else _neighbours(good[same[0]], image)
            empty = np.zeros(image.shape[:3], np.uint8)
            numbers = np.arange(len(image))
            volume = Volume(good[0].stem, image, empty, numbers, measure_intensity(context))
            labels, foreground = predict_foreground(
                predict_fn,
                volume,
                batch_size=min(config.eval.batch_size, len(image)),
                intensity=intensity,
                temperature=temperature,
            )
            for i, pixels, mask, prob in zip(same, image, labels, foreground, strict=True):
                folder = Path(output) / good[i].relative_to(root).parent
                kinds = {
                    'mask': mask * 255 if config.model.num_classes == 2 else mask,
                    'overlay': visualize.overlay(pixels, mask),
                    'panels': visualize.three_panels(pixels, mask),
                }
                if probability:
                    kinds['probability'] = np.rint(255 * prob)
                _write(folder, good[i].stem, kinds)
    return faults


def _neighbours(path: Path, image: np.ndarray) -> np.ndarray:
    """The volume that `path` is a slice of, as far as its folder holds it; else `image`."""
    match = re.fullmatch(r'(.+)_(\d+)', path.stem)
    if not match:
        return image
    others = []
    for beside in path.parent.iterdir():
        pattern = rf'{re.escape(match[1])}_\d+{re.escape(path.suffix)}'
        if beside != path and re.fullmatch(pattern, beside.name):
            with contextlib.suppress(DataError):  # one that can't be read is no help
                others.append(read_picture(beside))
    others = [pixels for pixels in others if pixels.shape == image[0].shape]
    if others:
        logging.info('%s: intensity scale of the %d slices beside it', path.name, len(others) + 1)
    return np.stack([image[0], *others])


def _write(folder: Path, name: str, kinds: dict[str, np.ndarray]) -> None:
    """FOLDER/NAME_kind.png of each of `kinds`."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, pixels in kinds.items():
        path = folder / f'{name}_{kind}.png'
        aside = path.with_name(f'.{path.name}.tmp')
        Image.fromarray(pixels.astype(np.uint8)).save(aside, 'png')
        os.replace(aside, path)


def main() -> None:
    options = flags.FLAGS
    faults = predict_pictures(
        options.workdir,
        options.input,
        options.output,
        which=options.checkpoint,
        probability=options.probability,
    )
    print(f'masks, overlays and panels are in {options.output}')
    if faults:
        raise DataError('\n  '.join([f'{len(faults)} picture(s) left out:', *faults]))


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'folder of a training run', required=True)
    flags.DEFINE_string('input', None, 'a picture or a folder of pictures', required=True)
    flags.DEFINE_string('output', None, 'folder for the results', required=True)
    flags.DEFINE_string('checkpoint', '', "'best', 'last' or a step; '': as the config says")
    flags.DEFINE_bool('probability', False, 'write NAME_probability.png too')
    cli.run(main)
