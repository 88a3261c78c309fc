"""Readers of data for fuzz.py, with small valid files of every kind that they take."""

import base64
import functools
import io
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pspnet_jax.inference import predictors
from pspnet_jax.prediction import folders, inputs, results

GREY = (np.add.outer(np.arange(12), np.arange(16)) * 9).astype(np.uint8)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)
MASK = np.zeros((12, 16), np.uint8)
MASK[3:8, 4:12] = 255


# Pictures and volumes.


def read_file(path: Path) -> None:
    """As `predict` does: the image, and a mask in its form."""
    from pspnet_jax.data import formats

    picture = formats.read(path)
    out = path.parent / 'out' / f'mask{formats.output_suffix(picture)}'
    formats.write_labels(out, np.zeros(picture.image.shape[:3], np.uint8), picture)


def read_mask(path: Path) -> None:
    from pspnet_jax.data import formats

    formats.read_labels(path)


def _pictures(kind: str, folder: Path) -> list[Path]:
    palette = Image.fromarray(GREY // 16)
    palette.putpalette(bytes(range(48)))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        'grey': Image.fromarray(GREY),
        'colour': Image.fromarray(COLOUR),
        'alpha': Image.fromarray(np.dstack([COLOUR, GREY])),
        'palette': palette,
        'bits': Image.fromarray(GREY > 99),
        'deep': Image.fromarray(GREY.astype(np.uint16) * 257),
        'real': Image.fromarray(GREY.astype(np.float32)),
    }
    allowed = {
        '.png': ('grey', 'colour', 'alpha', 'palette', 'bits', 'deep'),
        '.jpg': ('grey', 'colour'),
        '.bmp': ('grey', 'colour', 'palette', 'bits'),
        '.webp': ('colour', 'alpha'),
        '.tif': tuple(kinds),
    }[kind]
    paths = []
    for name in allowed:
        paths.append(folder / f'{name}{kind}')
        kinds[name].save(paths[-1])
    if kind != '.bmp':
        paths.append(folder / f'turned{kind}')
        lossless = {'.webp': {'lossless': True}, '.tif': {'compression': 'tiff_lzw'}}
        kinds['colour'].save(paths[-1], exif=exif, **lossless.get(kind, {}))
    if kind == '.tif':
        for name in ('raw', 'tiff_deflate', 'packbits', 'group4', 'jpeg'):
            paths.append(folder / f'{name}.tif')
            first = kinds['bits' if name == 'group4' else 'grey']
            options = {} if name == 'raw' else {'compression': name}
            first.save(paths[-1], save_all=True, append_images=[first] * 2, **options)
    return paths


def _microscopy(folder: Path) -> list[Path]:
    """TIFFs that are tifffile's."""
    import tifffile

    stack = np.arange(2 * 3 * 8 * 9, dtype=np.uint16).reshape(2, 3, 8, 9)
    tifffile.imwrite(folder / 'a.tif', stack, imagej=True, metadata={'axes': 'ZCYX'})
    tifffile.imwrite(folder / 'b.tif', stack, ome=True, metadata={'axes': 'ZCYX'})
    tifffile.imwrite(folder / 'c.tif', stack[0], photometric='minisblack', planarconfig='separate')
    tifffile.imwrite(folder / 'd.tif', stack[0, 0].astype(np.float64))
    return sorted(folder.glob('*.tif'))


def _arrays(folder: Path) -> list[Path]:
    arrays = {
        'grey': GREY, 'volume': np.zeros((2, 3, 4, 1), np.int16), 'real': GREY.astype(np.float64),
        'bool': GREY > 9, 'big': GREY.astype('>u4'), 'column': np.asfortranarray(GREY),
    }  # fmt: skip
    for name, values in arrays.items():
        np.save(folder / f'{name}.npy', values)
    return sorted(folder.glob('*.npy'))


def _nifti(folder: Path) -> list[Path]:
    import nibabel

    affine = np.diag([-1.0, 2.0, 3.0, 1.0])
    volume = np.arange(60, dtype=np.int16).reshape(5, 4, 3)
    first, second = nibabel.Nifti1Image, nibabel.Nifti2Image
    kinds = {
        'a.nii': first(volume, affine),
        'b.nii.gz': first(volume.astype(np.float32), affine),
        'c.nii': second(volume.astype(np.uint8), affine),
        'd.nii.gz': first(volume[..., None].repeat(2, -1), affine),
    }
    kinds['a.nii'].header.extensions.append(nibabel.nifti1.Nifti1Extension('comment', b'hello'))
    for name, image in kinds.items():
        nibabel.save(image, folder / name)
    return [folder / name for name in kinds]


def _dicom(folder: Path, series: bool) -> list[Path]:
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    for n, syntax in enumerate((ExplicitVRLittleEndian, ImplicitVRLittleEndian, None)):
        syntax = syntax or ExplicitVRLittleEndian
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, syntax
        meta.MediaStorageSOPInstanceUID = f'1.2.3.{n}'
        data = FileDataset('', {}, file_meta=meta, preamble=bytes(128))
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, f'1.2.3.{n}'
        data.SeriesInstanceUID, data.Modality = '1.2.3', 'CT'
        data.Rows, data.Columns, data.SamplesPerPixel = *GREY.shape, 1
        data.PhotometricInterpretation = 'MONOCHROME2'
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 1
        data.RescaleSlope, data.RescaleIntercept = '2', '-1024'
        data.PixelSpacing, data.SliceThickness = ['0.5', '0.5'], '2'
        data.ImagePositionPatient = ['0', '0', str(2 * n)]
        data.ImageOrientationPatient = ['1', '0', '0', '0', '1', '0']
        data.PixelData = GREY.astype('<i2').tobytes()
        if series:
            (folder / 'series').mkdir(exist_ok=True)
        path = folder / 'series' / f'{n}.dcm' if series else folder / f'{n}.dcm'
        pydicom.dcmwrite(path, data, enforce_file_format=True)
    return [folder / 'series'] if series else sorted(folder.glob('*.dcm'))


def _masks(folder: Path) -> list[Path]:
    """What holds whole numbers, one or three a pixel."""
    paths = [path for kind in ('.png', '.bmp', '.tif') for path in _pictures(kind, folder)]
    found = _dicom(folder, series=False) + _nifti(folder)[:3] + _arrays(folder)
    return paths + [path for path in found if path.stem != 'volume']


def _slices(folder: Path) -> list[Path]:
    (folder / 'slices').mkdir()
    for n in range(3):
        Image.fromarray(GREY).save(folder / 'slices' / f's_{n}.png')
    return [folder / 'slices']


# Annotations.

SQUARE = {'all_points_x': [2, 9, 9, 2], 'all_points_y': [2, 2, 8, 8]}
SHAPES = (
    {'name': 'polygon', **SQUARE},
    {'name': 'polyline', **SQUARE},
    {'name': 'rect', 'x': 1, 'y': 1, 'width': 5, 'height': 4},
    {'name': 'circle', 'cx': 5, 'cy': 5, 'r': 3},
    {'name': 'ellipse', 'cx': 5, 'cy': 5, 'rx': 3, 'ry': 2, 'theta': 0.5},
)


def read_annotations(path: Path) -> None:
    from pspnet_jax.data.formats import via

    images = path.parent / 'out' / 'images'
    images.mkdir(parents=True)
    for name in ('a.png', 'b.png'):
        (images / name).write_bytes(_png(GREY))
    via.write_masks(path, images, path.parent / 'out' / 'masks')


@functools.cache
def _cached(key: bytes, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.frombuffer(key, np.uint8).reshape(shape)).save(buffer, 'png')
    return buffer.getvalue()


def _png(pixels: np.ndarray) -> bytes:
    return _cached(pixels.tobytes(), pixels.shape)


def _via(folder: Path) -> list[Path]:
    regions = [
        {'shape_attributes': shape, 'region_attributes': {'type': 'tumor'}} for shape in SHAPES
    ]
    entries = {
        'a.png1': {'filename': 'a.png', 'size': 1, 'regions': regions, 'file_attributes': {}},
        'b.png1': {'filename': 'b.png', 'size': 1, 'regions': {'0': regions[0]}},
    }
    project = {'_via_settings': {}, '_via_img_metadata': entries, '_via_attributes': {}}
    (folder / 'one.json').write_text(json.dumps(entries))
    (folder / 'two.json').write_text(json.dumps(project))
    return [folder / 'one.json', folder / 'two.json']


def _via_csv(folder: Path) -> list[Path]:
    import csv

    from pspnet_jax.data.formats.annotations import CSV_HEADER

    with (folder / 'a.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(CSV_HEADER.split(','))
        for n, shape in enumerate(SHAPES):
            writer.writerow(['a.png', 1, '{}', 5, n, json.dumps(shape), '{"type": "tumor"}'])
        writer.writerow(['b.png', 1, '{}', 0, 0, '{}', '{}'])
    return [folder / 'a.csv']


def _coco(folder: Path) -> list[Path]:
    images = [
        {'id': n, 'file_name': name, 'height': 12, 'width': 16}
        for n, name in enumerate(('a.png', 'b.png'), 1)
    ]
    parts = [[2, 2, 9, 2, 9, 8], [1, 1, 3, 1, 3, 3]]
    item = {'id': 1, 'image_id': 1, 'category_id': 1, 'segmentation': parts, 'bbox': [1, 1, 8, 7]}
    runs = [
        {**item, 'image_id': 2, 'segmentation': {'counts': counts, 'size': [12, 16]}}
        for counts in ([20, 10, 162], 'd0:R5')  # the same, the second compressed
    ]
    categories = [{'id': 1, 'name': 'tumor'}]
    tree = {'images': images, 'annotations': [item, *runs], 'categories': categories}
    (folder / 'coco.json').write_text(json.dumps(tree))
    return [folder / 'coco.json']


def _labelme(folder: Path) -> list[Path]:
    kinds = {
        'polygon': [[2, 2], [9, 2], [9, 8]], 'rectangle': [[1, 1], [5, 5]],
        'circle': [[5, 5], [7, 5]], 'linestrip': [[2, 2], [9, 2], [9, 8]],
    }  # fmt: skip
    shapes = [
        {'label': 'tumor', 'points': points, 'shape_type': kind} for kind, points in kinds.items()
    ]
    mask = base64.b64encode(_png(np.eye(5, dtype=np.uint8))).decode()
    corners = {'points': [[2, 3], [6, 7]], 'shape_type': 'mask', 'mask': mask}
    shapes.append({'label': 'tumor', **corners})
    (folder / 'files').mkdir()
    for name in ('a', 'b'):
        tree = {'version': '5', 'shapes': shapes, 'imagePath': f'../{name}.png', 'imageData': None,
                'imageHeight': 12, 'imageWidth': 16}  # fmt: skip
        for place in (folder, folder / 'files'):
            (place / f'{name}.json').write_text(json.dumps(tree))
    return [folder / 'a.json', folder / 'b.json', folder / 'files']


# Data sets.


def read_folder(path: Path) -> None:
    from pspnet_jax.data import folder

    slices = folder.load(path, group=str(path / 'patients.csv'), mixed_sizes=True, threads=1)
    for key in slices.key:
        slices.read(int(key))


def _folder(folder: Path) -> list[Path]:
    for name in ('a', 'b'):
        for kind, pixels in (('images', GREY), ('masks', MASK)):
            (folder / 'set' / kind).mkdir(parents=True, exist_ok=True)
            (folder / 'set' / kind / f'{name}.png').write_bytes(_png(pixels))
    (folder / 'set' / 'patients.csv').write_text('stem,patient\na,p1\nb,p2\n')
    return [folder / 'set']


@functools.cache
def _phantom():
    from pspnet_jax.data import phantom

    return phantom.load(volumes=6, slices=2, size=16, seed=0)


def read_split(path: Path) -> None:
    from pspnet_jax.data import splits

    slices = _phantom()
    splits.read(path, slices)
    splits.keep(path, splits.holdout(list(slices.intensity), test_fraction=0.2), slices)


def _split(folder: Path) -> list[Path]:
    from pspnet_jax.data import splits

    slices = _phantom()
    parts = splits.holdout(list(slices.intensity), test_fraction=0.2)
    splits.write(folder / 'splits.json', parts, slices)
    return [folder / 'splits.json']


def read_lgg(path: Path) -> None:
    from pspnet_jax.data import lgg

    for _ in lgg.read_volumes(path):
        pass


def _lgg(folder: Path) -> list[Path]:
    for patient in ('TCGA_CS_4941_19960909', 'TCGA_DU_5849_19950405'):
        case = folder / 'raw' / 'kaggle_3m' / patient
        case.mkdir(parents=True)
        for n in (1, 2):
            Image.fromarray(COLOUR).save(case / f'{patient}_{n}.tif', compression='tiff_lzw')
            Image.fromarray(MASK).save(case / f'{patient}_{n}_mask.tif')
    (folder / 'raw' / 'kaggle_3m' / 'data.csv').write_text('Patient,age\nTCGA_CS_4941,51\n')
    return [folder / 'raw']


# What is predicted.


def read_video(path: Path) -> None:
    from pspnet_jax.data.formats import video

    with video.reading(path) as (rate, _, frames):
        float(rate)
        for _ in itertools.islice(frames, 100):
            pass


def _videos(folder: Path) -> list[Path]:
    from fractions import Fraction

    import av

    from pspnet_jax.data.formats import video

    for name, exact in (('a.mp4', False), ('b.mkv', True)):
        with video.writing(folder / name, Fraction(25), exact=exact) as write:
            for n in range(4):
                write(np.roll(COLOUR, n, axis=0))
    for name, codec, kind in (('c.avi', 'mjpeg', 'yuvj420p'), ('d.mpg', 'mpeg1video', 'yuv420p')):
        with av.open(str(folder / name), 'w') as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 16, 12, kind
            for n in range(4):
                frame = av.VideoFrame.from_ndarray(np.roll(COLOUR, n, axis=0), format='rgb24')
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return sorted(folder.iterdir())


def read_input(path: Path) -> None:
    """What `predict` does with a folder, up to the network."""
    from pspnet_jax.config import phantom
    from pspnet_jax.runtime.errors import DataError

    predictor = predictors.Predictor(phantom.get_config(), None, None, 1)
    root, found = inputs.find_files(path, path.parent / 'out')
    stems, faults = results.name_results(root, found)
    pictures = [path for path in stems if not inputs.is_video(path)]
    groups, _ = inputs.group_files(pictures, '(.+)_(?P<slice>[0-9]+)')
    for group in groups:
        _, _, more = folders.read_cases(group, predictor=predictor, stems=stems)
        faults += more
    if faults:
        raise DataError('; '.join(faults))


def _inputs(folder: Path) -> list[Path]:
    (folder / 'in' / 'below').mkdir(parents=True)
    for name in ('a_1', 'a_2', 'b', 'below/c_7'):
        (folder / 'in' / f'{name}.png').write_bytes(_png(GREY))
    np.save(folder / 'in' / 'd.npy', GREY)
    return [folder / 'in']


def _kind(suffix: str) -> Callable[[Path], Sequence[Path]]:
    return functools.partial(_pictures, suffix)


READERS = {
    'png': (_kind('.png'), read_file),
    'jpeg': (_kind('.jpg'), read_file),
    'bmp': (_kind('.bmp'), read_file),
    'webp': (_kind('.webp'), read_file),
    'tiff': (_kind('.tif'), read_file),
    'microscopy': (_microscopy, read_file),
    'npy': (_arrays, read_file),
    'nifti': (_nifti, read_file),
    'dicom': (functools.partial(_dicom, series=False), read_file),
    'dicom_series': (functools.partial(_dicom, series=True), read_file),
    'mask': (_masks, read_mask),
    'slices': (_slices, read_file),
    'via': (_via, read_annotations),
    'via_csv': (_via_csv, read_annotations),
    'coco': (_coco, read_annotations),
    'labelme': (_labelme, read_annotations),
    'folder': (_folder, read_folder),
    'split': (_split, read_split),
    'lgg': (_lgg, read_lgg),
    'video': (_videos, read_video),
    'input': (_inputs, read_input),
}
