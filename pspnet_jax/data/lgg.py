"""The LGG MRI segmentation data set as a TensorFlow Datasets builder.

Buda, Saha, Mazurowski, Computers in Biology and Medicine 2019; Kaggle
`mateuszbuda/lgg-mri-segmentation`, 110 patients, 3,929 slices, CC BY-NC-SA 4.0.

Layout: kaggle_3m/<case>/<case>_<n>.tif (256 x 256 x 3 uint8: pre-contrast, FLAIR,
post-contrast) and <case>_<n>_mask.tif (256 x 256 uint8, 0 or 255). The channel of a missing
sequence holds FLAIR.
"""

import collections
import contextlib
import hashlib
import io
import itertools
import logging
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pspnet_jax.data import splits, volumes
from pspnet_jax.data.formats.flat import open_picture
from pspnet_jax.data.volumes import Slices, Volume
from pspnet_jax.runtime.errors import DataError, first_line

try:
    import tensorflow_datasets as tfds
    from etils import epath
except ImportError as error:
    raise DataError(
        f'the LGG data set and other data in its kaggle_3m layout need {error.name}: pip install '
        '"pspnet_jax[lgg]"; for your own images use FOLDER/images and FOLDER/masks instead'
    ) from error

logger = logging.getLogger(__name__)

KAGGLE = 'mateuszbuda/lgg-mri-segmentation'
DOWNLOAD_HELP = (
    f'download https://www.kaggle.com/datasets/{KAGGLE} in a browser (a free account is needed), '
    'unzip it, and give the folder that holds kaggle_3m as the source '
    '(--config.data.source=FOLDER for training, --source=FOLDER for the builder)'
)
SIZE = (256, 256)
MOST_TEXT = 2**22  # bytes of a built data set's description


class Case(NamedTuple):
    """One patient's files, in slice order."""

    patient: str
    slices: tuple[int, ...]
    images: tuple[Path, ...]
    masks: tuple[Path, ...]


def scan(source: str | Path) -> tuple[list[Case], list[str]]:
    """(cases in `source`, which is a kaggle_3m folder or holds one; their faults).

    The Kaggle zip holds the folder twice; the outer copy is used. Faults are images without a
    mask, masks without an image and gaps in the numbering; the cases hold the slices that have
    both. Raises DataError if there is no case at all.
    """
    source = Path(source).expanduser()
    if not source.is_dir():
        raise DataError(f'{source} is not a folder: {DOWNLOAD_HELP}')
    candidates = (source / 'kaggle_3m', source / 'lgg-mri-segmentation' / 'kaggle_3m', source)
    root = next(path for path in candidates if path.is_dir())
    cases, faults = [], []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        images, masks = _numbered(folder, ''), _numbered(folder, '_mask')
        if not images and not masks:
            continue  # another folder, not a case
        for n in sorted(images.keys() - masks.keys()):
            faults.append(f'{images[n]} has no mask: add {images[n].stem}_mask.tif or remove it')
        for n in sorted(masks.keys() - images.keys()):
            faults.append(f'{masks[n]} has no image: add it or remove the mask')
        order = sorted(images)
        gaps = [(n + 1, m - 1) for n, m in itertools.pairwise(order) if m > n + 1]
        if gaps:
            missing = ', '.join(str(n) if n == m else f'{n} to {m}' for n, m in gaps[:50])
            faults.append(f'{folder} lacks slices [{missing}]: a volume must be whole')
        if not folder.name.isprintable():
            faults.append(f'{folder} has a name that can not be printed: rename it')
        pairs = [n for n in order if n in masks]
        if not pairs:
            continue
        cases.append(
            Case(
                folder.name,
                tuple(pairs),
                tuple(images[n] for n in pairs),
                tuple(masks[n] for n in pairs),
            )
        )
    if not cases and not faults:
        raise DataError(
            f'{root} holds no case: expected <case>/<case>_<n>.tif and <case>_<n>_mask.tif; '
            f'{DOWNLOAD_HELP}'
        )
    return cases, faults


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    pattern = re.compile(rf'{re.escape(folder.name)}_(\d+){suffix}\.tif')
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def _all_faults(source: str | Path, faults: Sequence[str]) -> DataError:
    return DataError(f'{len(faults)} fault(s) in {source}:', faults)


def read_image(path: Path) -> np.ndarray:
    """Read H W 3 uint8. Raises DataError for any other file."""
    with open_picture(path) as picture:
        if picture.mode != 'RGB':
            raise DataError(f'{path} is {picture.mode}, not 8-bit RGB: convert it')
        return np.array(picture)


def read_mask(path: Path) -> np.ndarray:
    """Read H W uint8, 0 or 1. Raises DataError for values other than 0 and 255."""
    with open_picture(path) as picture:
        if picture.mode not in ('L', '1', 'P'):
            raise DataError(f'{path} is {picture.mode}, not 8-bit grey: convert it')
        labels = np.array(picture.convert('L') if picture.mode == '1' else picture)
    values = np.unique(labels)
    if not np.isin(values, (0, 255)).all():
        raise DataError(f'{path} has mask values {values[:8].tolist()}: only 0 and 255 are allowed')
    return (labels > 0).astype(np.uint8)


def read_case(case: Case, size: tuple[int, int] | None = SIZE) -> Volume:
    """The case's volume; `size` None allows any one size. The DataError lists all faults."""
    images, masks, faults = [], [], []
    for image_path, mask_path in zip(case.images, case.masks, strict=True):
        try:
            image, mask = read_image(image_path), read_mask(mask_path)
        except DataError as error:
            faults.append(str(error))
            continue
        size = size or image.shape[:2]
        for path, pixels in ((image_path, image), (mask_path, mask)):
            if pixels.shape[:2] != size:
                faults.append(
                    f'{path} is {pixels.shape[0]}x{pixels.shape[1]}, not {size[0]}x{size[1]}'
                )
        images.append(image)
        masks.append(mask)
    if faults:
        raise _all_faults(case.images[0].parent, faults)
    image = np.stack(images)
    return Volume(
        case.patient,
        image,
        np.stack(masks),
        np.array(case.slices),
        volumes.measure_intensity(image),
    )


def read_volumes(source: str | Path) -> Iterator[Volume]:
    """Volumes of any size from a folder in the Kaggle layout; all are checked before the first."""
    return (read_case(case, size=None) for case in check(source, size=None))


def check(source: str | Path, size: tuple[int, int] | None = SIZE) -> list[Case]:
    """The cases in `source`; reads every file, and lists all faults in one DataError."""
    cases, faults = scan(source)

    def find_faults(case: Case) -> Sequence[str]:
        try:
            read_case(case, size)
        except DataError as error:
            return error.faults
        return ()

    for found in _in_threads(find_faults, cases):
        faults += found
    if faults:
        raise _all_faults(source, faults)
    return cases


def _in_threads(function: Callable[[Case], Any], cases: Sequence[Case]) -> Iterator[Any]:
    """`map` on all cores, a few cases ahead: Pillow releases Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = collections.deque()
        for case in cases:
            ahead.append(pool.submit(function, case))
            if len(ahead) > 2 * (os.cpu_count() or 1):
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Do nothing: the data is in no bucket, and tfds would leave a folder in /tmp."""


class Lgg(tfds.core.GeneratorBasedBuilder):
    """Slices with their masks, in three splits by patient (`splits.holdout`)."""

    VERSION = tfds.core.Version('1.0.0')
    MANUAL_DOWNLOAD_INSTRUCTIONS = DOWNLOAD_HELP

    def _info(self) -> tfds.core.DatasetInfo:
        return Info(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(*SIZE, 3), encoding_format='png'),
                    'mask': tfds.features.Image(shape=(*SIZE, 1), encoding_format='png'),
                    'patient': tfds.features.Text(),
                    'slice': np.int32,
                    'site': tfds.features.Text(),
                    'missing_pre': np.bool_,
                    'missing_post': np.bool_,
                    'lesion_pixels': np.int32,
                    'intensity': tfds.features.Tensor(shape=(4, 3), dtype=np.float32),
                }
            ),
            supervised_keys=('image', 'mask'),
            homepage=f'https://www.kaggle.com/datasets/{KAGGLE}',
            citation='Buda, Saha, Mazurowski. Computers in Biology and Medicine, 2019.',
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        cases = check(dl_manager.manual_dir)
        self.info.metadata['fingerprint'] = fingerprint(cases)
        by_name = {case.patient: case for case in cases}
        parts = splits.holdout(list(by_name), test_patients=splits.LGG_HOLDOUT)
        return {
            split: self._generate_examples([by_name[patient] for patient in patients])
            for split, patients in parts.items()
            if patients
        }

    def _generate_examples(self, cases: Sequence[Case]):
        for examples in _in_threads(_examples, cases):
            yield from examples


def _examples(case: Case) -> list[tuple[str, dict[str, Any]]]:
    """(key, features) of each of the case's slices."""
    volume = read_case(case)
    pre, flair, post = np.moveaxis(volume.image, -1, 0)
    shared = {
        'patient': case.patient,
        'site': splits.site(case.patient),
        'missing_pre': bool((pre == flair).all()),
        'missing_post': bool((post == flair).all()),
        'intensity': volume.intensity,
    }
    return [
        (
            f'{case.patient}_{n:03d}',
            {
                'image': _png(image),
                'mask': _png(mask),
                'slice': int(n),
                'lesion_pixels': volumes.lesion_pixels(mask),
                **shared,
            },
        )
        for n, image, mask in zip(volume.slices, volume.image, volume.mask, strict=True)
    ]


def _png(pixels: np.ndarray) -> bytes:
    """PNG at zlib's fastest level, since a build mostly compresses."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'png', compress_level=1)
    return buffer.getvalue()


def fingerprint(cases: Sequence[Case]) -> str:
    """Digest of the files' names, sizes and times, to see whether the source changed."""
    digest = hashlib.sha256()
    for case in cases:
        for path in (*case.images, *case.masks):
            stat = path.stat()
            digest.update(f'{path.name} {stat.st_size} {stat.st_mtime_ns}\n'.encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Silence tfds' progress bars and warnings: we print one line instead."""
    theirs = logging.getLogger('absl')
    level = theirs.level
    tfds.disable_progress_bar()
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


@_quiet_tfds()
def build(source: str | Path = '', out: str | Path = '') -> Lgg:
    """The built data set in `out` (default: tfds' own folder); it is built if it is missing.

    Without `source` an existing data set is used, or else Kaggle's is downloaded. With `source`, a
    data set that was built from other files is built again. Raises DataError.
    """
    data_dir = str(Path(out).expanduser()) if out else None
    with _sound(data_dir):
        builder = Lgg(data_dir=data_dir, file_format='array_record')
        if builder.is_prepared() and not source:
            return builder
    source = Path(source).expanduser() if source else fetch()
    cases, faults = scan(source)
    if builder.is_prepared():
        if not faults and builder.info.metadata.get('fingerprint') == fingerprint(cases):
            return builder
        check(source)  # remove the old data set only if a new one can be built
        logger.info('%s was built from other files: it is built again', builder.data_dir)
        epath.Path(builder.data_dir).rmtree()
        builder = Lgg(data_dir=data_dir, file_format='array_record')
    logger.info(
        'building the LGG data set from %s (%d cases): about half a minute', source, len(cases)
    )
    with contextlib.redirect_stdout(io.StringIO()):  # what tfds prints
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=str(source)),
        )
    return builder


@contextlib.contextmanager
def _sound(data_dir: str | None) -> Iterator[None]:
    """Raise DataError if the built data set is corrupted: tfds may raise any exception."""
    folder = Path(data_dir or tfds.core.constants.DATA_DIR) / 'lgg' / str(Lgg.VERSION)
    try:
        for path in folder.iterdir() if folder.is_dir() else ():
            if not path.is_file():
                raise ValueError(f'{path.name} is not a file')  # reading a pipe would block
            if path.suffix == '.json' and path.stat().st_size > MOST_TEXT:
                raise ValueError(f'{path.name} is larger than {MOST_TEXT // 2**20} MiB')
        yield
    except DataError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise DataError(
            f'the data set built in {folder} can not be read ({reason}): remove the folder, and '
            'build it again from data.source'
        ) from error


def fetch() -> Path:
    """The data set's folder in kagglehub's cache, downloaded on first use."""
    try:
        import kagglehub

        return Path(kagglehub.dataset_download(KAGGLE))
    except Exception as error:  # kagglehub passes on whatever its HTTP client raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f'the LGG data set can not be downloaded ({reason}): {DOWNLOAD_HELP}'
        ) from error


def load(source: str, root: str) -> Slices:
    """Every slice of the data set, of all splits; `splits` selects patients."""
    builder = build(source, root)
    skip = {'image': tfds.decode.SkipDecoding(), 'mask': tfds.decode.SkipDecoding()}
    rows = []
    with _sound(root and str(Path(root).expanduser())):
        tables = [builder.as_data_source(split, decoders=skip) for split in builder.info.splits]
        offsets = np.cumsum([0, *(len(table) for table in tables)])
        for offset, table in zip(offsets, tables, strict=False):
            for i, row in enumerate(table):
                name = row['patient'].decode()
                if row['intensity'].shape != (4, 3) or not np.isfinite(row['intensity']).all():
                    raise ValueError(f'intensity of {name!r:.80}')
                rows.append((name, int(row['slice']), offset + i, int(row['lesion_pixels']), row))
        rows.sort(key=lambda row: row[:2])
        patient, number, key, lesion_pixels, examples = zip(*rows, strict=True)

    def read(key: int) -> tuple[np.ndarray, np.ndarray]:
        table = int(np.searchsorted(offsets, key, side='right')) - 1
        try:
            row = tables[table][key - int(offsets[table])]
            return _decode(row['image'], 'RGB'), _decode(row['mask'], 'L')
        except Exception as error:  # array_record, protobuf and Pillow each raise their own
            raise DataError(f'slice {key} of {builder.data_dir} is corrupted: {error}') from error

    return Slices(
        read=read,
        key=np.array(key),
        patient=np.array(patient),
        slice=np.array(number),
        lesion_pixels=np.array(lesion_pixels),
        intensity={name: row['intensity'] for name, row in zip(patient, examples, strict=True)},
    )


def _decode(png: bytes, mode: str) -> np.ndarray:
    """Decode by Pillow as PNG only: tfds would try every format, and some start other programs."""
    with Image.open(io.BytesIO(png), formats=['PNG']) as picture:
        if picture.size != SIZE[::-1] or picture.mode != mode:
            raise DataError(f'it is {picture.size} {picture.mode}, not {SIZE} {mode}')
        return np.array(picture)


if __name__ == '__main__':  # the former name of the command
    print('pspnet_jax.data.lgg is now pspnet_jax.build', file=sys.stderr)
    runpy.run_module('pspnet_jax.build', run_name='__main__', alter_sys=True)
