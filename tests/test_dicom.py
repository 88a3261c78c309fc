"""DICOM: series are volumes, radiographs pictures, and the rest is named."""

import numpy as np
import pytest

from pspnet_jax.data import formats
from pspnet_jax.data.formats import files
from pspnet_jax.runtime.errors import DataError
from tests.test_flat import has

needs_pydicom = pytest.mark.skipif(
    not (has('nibabel') and has('pydicom')), reason='nibabel and pydicom are not both installed'
)


def save_dicom(path, pixels, *, position=None, turned=(1, 0, 0, 0, 1, 0), series='1.2.3', **more):
    """pydicom's way to make a file, with what a scanner says of place and scale."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = more.pop('syntax', ExplicitVRLittleEndian)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.SeriesInstanceUID = series
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = 'MONOCHROME2' if pixels.ndim == 2 else 'RGB'
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == 'i')
    if position is not None:
        data.ImagePositionPatient = list(position)
        data.ImageOrientationPatient = list(turned)
        data.PixelSpacing = [0.5, 0.75]
    for name, value in more.items():
        setattr(data, name, value)
    data.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    data.save_as(path, enforce_file_format=True)


@needs_pydicom
def test_a_dicom_series_is_a_volume(tmp_path, rng):
    import nibabel

    stored = rng.integers(0, 3000, (5, 4, 6)).astype(np.uint16)
    folder = tmp_path / 'series'
    folder.mkdir()
    for n, d in enumerate([3, 0, 4, 1, 2]):  # the names say nothing about the order
        save_dicom(
            folder / f'IM{n}',
            stored[d],
            position=(-10.0, 20.0, 100.0 + 2.5 * d),
            RescaleSlope=1,
            RescaleIntercept=-1024,
        )
    picture = formats.read(folder)
    # Feet to head, front to back, right to left: how an axial DICOM is stored.
    np.testing.assert_array_equal(picture.image[..., 0], stored.astype(np.float32) - 1024)
    np.testing.assert_allclose(picture.spacing, (2.5, 0.5, 0.75))
    np.testing.assert_array_equal(formats.read_labels(folder), stored)

    assert formats.output_suffix(picture) == '.nii.gz'
    formats.write_labels(tmp_path / 'a.nii.gz', stored, picture)
    back = nibabel.load(tmp_path / 'a.nii.gz')
    for column, row, d in ((0, 0, 0), (5, 3, 4), (2, 1, 3)):
        assert back.dataobj[column, row, d] == stored[d, row, column]
        lps = np.array([-10 + 0.75 * column, 20 + 0.5 * row, 100 + 2.5 * d])
        place = back.affine @ (column, row, d, 1)
        np.testing.assert_allclose(place[:3], lps * (-1, -1, 1), rtol=1e-6)

    (folder / 'IM0').unlink()
    with pytest.raises(DataError, match='lacks a slice between IM4 and IM2'):
        formats.read(folder)
    save_dicom(folder / 'IM0', stored[3], position=(-10.0, 20.0, 107.5), series='1.2.4')
    with pytest.raises(DataError, match='2 DICOM series'):
        formats.read(folder)
    save_dicom(folder / 'IM0', stored[3], position=(-10.0, 20.0, 110.0))
    with pytest.raises(DataError, match='the same position'):
        formats.read(folder)


@needs_pydicom
def test_single_dicom_files(tmp_path, rng):
    grey = rng.integers(0, 255, (4, 6), np.uint8)
    save_dicom(tmp_path / 'xray.dcm', grey, ImagerPixelSpacing=[0.2, 0.1])
    picture = formats.read(tmp_path / 'xray.dcm')
    np.testing.assert_array_equal(picture.image, grey[None, ..., None])
    assert picture.spacing == (1.0, 0.2, 0.1)
    assert formats.output_suffix(picture) == '.png'
    save_dicom(tmp_path / 'negative.dcm', 255 - grey, PhotometricInterpretation='MONOCHROME1')
    np.testing.assert_array_equal(formats.read(tmp_path / 'negative.dcm').image, picture.image)
    colour = rng.integers(0, 255, (4, 6, 3), np.uint8)
    save_dicom(tmp_path / 'colour.dcm', colour)
    np.testing.assert_array_equal(formats.read(tmp_path / 'colour.dcm').image[0], colour)
    # A coronal slice is kept whole, head up: columns to the left, rows to the feet.
    save_dicom(tmp_path / 'coronal', grey, position=(0, 0, 0), turned=(1, 0, 0, 0, 0, -1))
    picture = formats.read(tmp_path / 'coronal')
    np.testing.assert_array_equal(picture.image, grey[None, ..., None])
    np.testing.assert_allclose(picture.spacing, (1.0, 0.5, 0.75))

    save_dicom(tmp_path / 'frames.dcm', np.tile(grey, (2, 1)), NumberOfFrames=2, Rows=4)
    with pytest.raises(DataError, match='several frames'):
        formats.read(tmp_path / 'frames.dcm')
    save_dicom(tmp_path / 'deflated.dcm', grey, syntax='1.2.840.10008.1.2.1.99')
    with pytest.raises(DataError, match='deflated'):
        formats.read(tmp_path / 'deflated.dcm')


@needs_pydicom
def test_what_lies_beside_the_slices_is_passed_over_by_name(tmp_path, rng, caplog):
    folder = tmp_path / 'p1'
    folder.mkdir()
    stored = rng.integers(0, 900, (3, 4, 6)).astype(np.uint16)
    for n, pixels in enumerate(stored):
        save_dicom(folder / f'IM{n:04}', pixels, position=(0, 0, 2.0 * n))
    save_no_picture(folder / 'RS.dcm', 'RTSTRUCT')
    save_no_picture(folder / 'report', 'SR')
    with caplog.at_level('INFO'):
        np.testing.assert_array_equal(formats.read(folder).image[..., 0], stored)
    assert 'RS.dcm (RTSTRUCT), report (SR)' in caplog.text
    assert files.find(tmp_path) == {'p1': folder}


@needs_pydicom
@pytest.mark.parametrize(
    ('modality', 'tool'),
    [('SEG', 'segimage2itkimage of dcmqi, or by highdicom'), ('RTSTRUCT', 'plastimatch'),
     ('SR', 'leave it out')],
)  # fmt: skip
def test_dicom_without_a_picture_names_what_converts_it(tmp_path, modality, tool):
    frames = np.zeros((4, 6), np.uint8)
    for name in ('a.dcm', 'without'):
        if modality == 'SEG':
            save_dicom(tmp_path / name, frames, Modality='SEG', NumberOfFrames=2, Rows=2)
        else:
            save_no_picture(tmp_path / name, modality)
        for read in (formats.read, formats.read_labels):
            with pytest.raises(DataError, match=rf'of the kind {modality}.*{tool}') as caught:
                read(tmp_path / name)
            assert 'dcm2niix' not in str(caught.value)
    assert set(files.find(tmp_path)) == {'a', 'without'}  # alone: reading says what they are


def save_no_picture(path, modality):
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = '1.2.840.10008.5.1.4.1.1.481.3'
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.SeriesInstanceUID, data.Modality = generate_uid(), modality
    data.save_as(path, enforce_file_format=True)


@needs_pydicom
def test_radiographs_are_pictures_and_series_are_volumes(tmp_path, rng):
    """By what the files say, with or without an ending; training and prediction alike."""
    grey = rng.integers(0, 255, (4, 6), np.uint8)
    for place in ('xrays', 'ct', 'one'):
        (tmp_path / place).mkdir()
    for n in range(3):
        save_dicom(tmp_path / f'film{n}.dcm', grey, series=f'1.2.{n}')
        save_dicom(tmp_path / 'xrays' / f'view{n}', grey, series='1.2.9')
        save_dicom(tmp_path / 'ct' / f'IM{n}', grey, series='1.2.8', position=(0, 0, 3.0 * n))
    save_dicom(tmp_path / 'one' / 'a.dcm', grey)
    (tmp_path / 'notes.txt').write_text('no DICM')
    ways = ['ct', 'film0', 'film1', 'film2', 'one', 'xrays/view0', 'xrays/view1', 'xrays/view2']
    found = files.find(tmp_path)
    assert list(found) == ways
    entries, others = files.gather(filter(files.is_dicom, tmp_path.rglob('*')), tmp_path)
    assert sorted(entries) == sorted(found.values())
    assert not others
    for path in found.values():
        assert formats.read(path).image.shape == (3 if path.name == 'ct' else 1, 4, 6, 1)


@needs_pydicom
def test_slices_in_the_folder_itself_are_pictures_in_training_and_a_volume_as_input(
    tmp_path, rng, caplog
):
    for n in range(3):
        grey = rng.integers(0, 255, (4, 6), np.uint8)
        save_dicom(tmp_path / f'IM{n}.dcm', grey, position=(0, 0, 3.0 * n))
    assert list(files.find(tmp_path)) == ['IM0', 'IM1', 'IM2']
    assert 'put each series into a folder of its own' in caplog.text
    assert files.gather(tmp_path.iterdir(), tmp_path) == ([tmp_path], {})


@needs_pydicom
def test_packed_dicom_names_the_plug_in(tmp_path):
    """Not 'copy it again': the copy would need it too."""
    import pydicom

    grey = np.zeros((4, 6), np.uint8)
    for syntax, words in (
        (pydicom.uid.JPEGLosslessSV1, 'pip install pylibjpeg pylibjpeg-libjpeg'),
        (pydicom.uid.JPEGLSLossless, 'pip install pylibjpeg pylibjpeg-libjpeg'),
        (pydicom.uid.HTJ2KLossless, 'pip install pylibjpeg pylibjpeg-openjpeg'),
        (pydicom.uid.MPEG2MPML, 'cannot decode: convert it to NIfTI or PNG'),
        (pydicom.uid.UID('1.2.840.10008.1.2.4.55'), 'cannot decode: convert it to NIfTI or PNG'),
    ):
        save_dicom(tmp_path / 'a.dcm', grey)
        data = pydicom.dcmread(tmp_path / 'a.dcm')
        data.PixelData = pydicom.encaps.encapsulate([b'\xff\xd8' + bytes(30)])
        data['PixelData'].VR = 'OB'
        data.file_meta.TransferSyntaxUID = syntax
        data.save_as(tmp_path / 'a.dcm', enforce_file_format=True)
        if words.startswith('pip') and pydicom.pixels.get_decoder(syntax).is_available:
            continue  # here it is installed
        with pytest.raises(DataError, match='compressed as') as caught:
            formats.read(tmp_path / 'a.dcm')
        assert words in str(caught.value)
