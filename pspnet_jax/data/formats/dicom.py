"""DICOM files and series by pydicom."""

import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pspnet_jax.data.formats import limits
from pspnet_jax.runtime.errors import DataError, first_line, some

logger = logging.getLogger(__name__)

PLACE = ('ImagePositionPatient', 'ImageOrientationPatient')  # of a slice
DEFLATED = '1.2.840.10008.1.2.1.99'  # pydicom inflates it whole, without a limit
TOOLS = {  # how to convert these to masks
    'SEG': 'convert it to NIfTI, for instance by segimage2itkimage of dcmqi, or by highdicom',
    'RTSTRUCT': 'convert it to NIfTI, for instance by plastimatch or dcmrtstruct2nii',
}
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's axes to NIfTI's


class Look(NamedTuple):
    """From a header: the series of a slice with a position, else ''; and the kind of a file without
    an image, else ''.
    """

    series: str
    other: str


def look(path: Path) -> Look | None:
    """Read a file's header; None if it can't be read, which is reported when it is loaded."""
    tags = ['SeriesInstanceUID', 'SOPClassUID', 'Modality', 'Rows', *PLACE]
    try:
        header = _header(path, limits.imported('pydicom', path), specific_tags=tags)
        placed = all(header.get(tag) for tag in PLACE)
        return Look(str(header.get('SeriesInstanceUID', '')) * placed, _no_picture(header))
    except Exception:  # parsers raise anything for a corrupted file
        return None


def named(others: Mapping[Path, str]) -> str:
    """'rs.dcm (RTSTRUCT), sr.dcm (SR) and 3 more'."""
    return some([f'{path.name} ({what})' for path, what in others.items()])


def load(files: Sequence[Path], source: Path, labels: bool) -> tuple:
    """(D H W C, affine of column, row and slice or None, spacing or None) of one file or series."""
    pydicom = limits.imported('pydicom', source)
    slices, others = [], {}
    for path in files:
        with limits.reading(path, 'DICOM file'):
            header = _header(path, pydicom)
            if what := _no_picture(header):
                others[path] = what
            else:
                _check(header, path, pydicom)
                slices.append((path, header))
    if not slices:
        path, what = next(iter(others.items()))
        remedy = TOOLS.get(what, 'leave it out')
        raise DataError(f'{path} is DICOM of the kind {what}, which holds no image: {remedy}')
    if others:
        logger.info('%s: skipped files without a slice: %s', source, named(others))
    with limits.reading(source, 'DICOM series'):
        order, affine, spacing = _geometry(slices, source)
    image = None
    for d, i in enumerate(order):
        path, header = slices[i]
        with limits.reading(path, 'DICOM file'):
            together = len(slices) if image is None else 1
            size = (together, header.Rows, header.Columns, header.get('SamplesPerPixel', 1))
            limits.check_size(path, size, 8, together * path.stat().st_size)  # stored, turned
            pixels = _pixels(path, pydicom, labels)
            if image is None:
                image = np.empty((len(slices), *pixels.shape), pixels.dtype)
            if pixels.shape != image.shape[1:]:
                raise DataError(
                    f'{path} is {pixels.shape}, but {slices[order[0]][0]} is {image.shape[1:]}: '
                    'all slices of a series must have one size'
                )
            # Each slice may have its own slope, so a later one may need another dtype.
            image = image.astype(np.result_type(image, pixels), copy=False)
            image[d] = pixels
    return image, affine, spacing


def _header(path: Path, pydicom, **options: Any):
    if pydicom.filereader.read_file_meta_info(path).get('TransferSyntaxUID', '') == DEFLATED:
        raise DataError(f'{path} is deflated as a whole: save it as explicit VR little endian')
    return pydicom.dcmread(path, stop_before_pixels=True, **options)


def _no_picture(header) -> str:
    """The kind of a DICOM file without an image of a patient, 'RTSTRUCT', 'SR', ...; else ''."""
    modality = str(header.get('Modality', ''))
    if header.get('Rows') and modality not in ('SEG', 'RTDOSE'):
        return ''
    uid = header.get('SOPClassUID') or header.file_meta.get('MediaStorageSOPClassUID', '')
    return modality or str(getattr(uid, 'name', uid)) or 'unknown'


def _check(header, path: Path, pydicom) -> None:
    """Raise DataError for unsupported images and missing decoders."""
    if int(header.get('NumberOfFrames', None) or 1) > 1:
        raise DataError(f'{path} has several frames: convert it to NIfTI, for instance by dcm2niix')
    if header.get('PhotometricInterpretation') == 'PALETTE COLOR':
        raise DataError(f'{path} has a palette: convert it to RGB or PNG')
    syntax = header.file_meta.get('TransferSyntaxUID', '')
    if not syntax or not syntax.is_transfer_syntax or not syntax.is_compressed:
        return
    compressed = f'{path} is compressed as {syntax.name}'
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError as error:
        raise DataError(
            f'{compressed}, which pydicom cannot decode: '
            'convert it to NIfTI or PNG by a program that can'
        ) from error
    if not decoder.is_available:
        raise DataError(f'{compressed}: to read it, {_plugin(syntax)}')


def _plugin(syntax) -> str:
    """What to install to decode a transfer syntax, by pydicom's list."""
    plugin = 'openjpeg' if re.search('2000|HTJ2K|High-Throughput', syntax.name) else 'libjpeg'
    return f'pip install pylibjpeg pylibjpeg-{plugin}'


def _pixels(path: Path, pydicom, labels: bool) -> np.ndarray:
    """H W C; images are in the modality's scale (CT: Hounsfield units), higher is brighter."""
    data = pydicom.dcmread(path)
    try:
        pixels = pydicom.pixels.pixel_array(data)
    except Exception as error:  # each decoder raises its own
        syntax = data.file_meta.TransferSyntaxUID
        missing = importlib.util.find_spec('pylibjpeg') is None
        if not (missing and syntax.is_compressed and 'JPEG' in syntax.name):
            raise
        raise DataError(
            f'{path} can not be decompressed ({first_line(error)}): {_plugin(syntax)}; if that '
            'does not help, copy the file again'
        ) from error
    if not labels:
        if data.get('PhotometricInterpretation') == 'MONOCHROME1':  # stored as a negative
            pixels = ~pixels if pixels.dtype.kind == 'i' else 2**data.BitsStored - 1 - pixels
        scaled = pydicom.pixels.apply_modality_lut(pixels, data)
        pixels = scaled.astype(np.float32) if scaled.dtype.kind == 'f' else scaled
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _geometry(slices: Sequence[tuple[Path, Any]], source: Path) -> tuple:
    """(order of the slices, affine of column, row and slice or None, spacing or None)."""
    headers = [header for _, header in slices]
    first = headers[0]
    across = first.get('PixelSpacing') or first.get('ImagerPixelSpacing')
    placed, turned = ([header.get(tag) for header in headers] for tag in PLACE)
    if not across or None in placed or None in turned:
        if len(slices) > 1:
            raise DataError(
                f'{source}: DICOM files without a position are not a series: give one file'
            )
        return [0], None, (1.0, *map(float, across)) if across else None
    series = {str(header.get('SeriesInstanceUID', '')) for header in headers}
    if len(series) > 1:
        raise DataError(f'{source} holds {len(series)} DICOM series: give each its own folder')
    if not np.allclose(np.array(turned, float), np.array(turned[0], float), atol=1e-3):
        raise DataError(
            f'{source}: the slices have different orientations (localizers?): separate them'
        )
    along_row, along_column = np.array(turned[0], float).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    positions = np.array(placed, float)
    order = np.argsort(positions @ normal, kind='stable')
    steps = np.diff(positions[order] @ normal)
    if not len(steps):
        step = normal * float(first.get('SpacingBetweenSlices') or first.get('SliceThickness') or 1)
    else:
        near, far = (slices[order[i]][0] for i in (np.argmin(steps), np.argmin(steps) + 1))
        if steps.min() < 1e-3:
            raise DataError(f'{near} and {far} have the same position: keep one volume per folder')
        if steps.max() > steps.min() + 0.1 * np.median(steps):
            near, far = (slices[order[i]][0] for i in (np.argmax(steps), np.argmax(steps) + 1))
            raise DataError(
                f'{source} lacks a slice between {near.name} and {far.name}: '
                f'steps of {steps.min():.3g} to {steps.max():.3g} mm'
            )
        step = (positions[order[-1]] - positions[order[0]]) / len(steps)
    row_step, column_step = map(float, across)
    affine = np.eye(4)
    axes = (along_row * column_step, along_column * row_step, step, positions[order[0]])
    affine[:3] = np.stack(axes, axis=1)
    return order.tolist(), LPS_TO_RAS @ affine, None
