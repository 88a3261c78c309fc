"""The Kaggle layout: what is read, every fault at once, and the tfds builder."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import tables
from pspnet_jax.data import lgg, splits, volumes
from pspnet_jax.runtime.errors import DataError
from tests.conftest import SHARED, needs_shared, write_case


def test_the_folder_is_found_from_above_from_itself_and_once_only(kaggle):
    nested = kaggle / 'lgg-mri-segmentation' / 'kaggle_3m'
    shutil.copytree(kaggle / 'kaggle_3m', nested)
    for source in (kaggle, kaggle / 'kaggle_3m', kaggle / 'lgg-mri-segmentation'):
        cases = lgg.check(source)
        assert len(cases) == 6
        assert len({case.patient for case in cases}) == 6


def test_slices_are_in_the_order_of_their_numbers(tmp_path):
    write_case(tmp_path, 'case', slices=11)
    (case,) = lgg.check(tmp_path)
    assert case.slices == tuple(range(1, 12))
    volume = lgg.read_case(case)
    direct = np.array(Image.open(tmp_path / 'case' / 'case_10.tif'))
    assert (volume.image[9] == direct).all()
    assert set(np.unique(volume.mask)) == {0, 1}


def test_every_fault_of_layout_and_content_is_listed_at_once(kaggle, tmp_path):
    def path(patient, n, kind=''):
        return kaggle / 'kaggle_3m' / patient / f'{patient}_{n}{kind}.tif'

    no_mask = path('TCGA_CS_4941_19960909', 2)
    no_image = path('TCGA_DU_5849_19950405', 4, '_mask')
    path('TCGA_CS_4941_19960909', 2, '_mask').unlink()
    path('TCGA_DU_5849_19950405', 4).unlink()
    for kind in ('', '_mask'):
        path('TCGA_HT_7473_19970826', 3, kind).unlink()
    size, values = path('TCGA_CS_4941_19960909', 1), path('TCGA_DU_5849_19950405', 2, '_mask')
    truncated, grey = path('TCGA_HT_7473_19970826', 2), path('TCGA_HT_7475_19970918', 4)
    Image.new('RGB', (128, 256)).save(size)
    Image.new('L', (256, 256), 7).save(values)
    truncated.write_bytes(truncated.read_bytes()[:1000])
    Image.new('L', (256, 256)).save(grey)
    for find in (lgg.check, lambda source: lgg.build(source, tmp_path / 'built')):
        with pytest.raises(DataError) as caught:
            find(kaggle)
        message = str(caught.value)
        assert message.startswith('7 fault(s)')
        assert f'{no_mask} has no mask' in message
        assert f'{no_image} has no image' in message
        assert 'lacks slices [3]' in message
        assert f'{size} is 256x128, not 256x256' in message
        assert f'{values} has mask values [7]' in message
        assert f'{truncated} is not a readable picture' in message
        assert f'{grey} is L, not 8-bit RGB' in message
    assert not list(tmp_path.rglob('*.array_record*'))


def test_a_data_set_with_faults_does_not_replace_the_one_that_is_there(kaggle, tmp_path):
    there = Path(lgg.build(kaggle, tmp_path / 'built').data_dir)
    before = sorted(path.name for path in there.iterdir())
    (image, *_) = sorted((kaggle / 'kaggle_3m').rglob('*_1.tif'))
    extra = image.with_name(image.name.replace('_1.tif', '_5.tif'))
    shutil.copy(image, extra)
    with pytest.raises(DataError, match='has no mask'):
        lgg.build(kaggle, tmp_path / 'built')
    extra.unlink()
    image.write_bytes(b'broken')
    with pytest.raises(DataError, match='is not a readable picture'):
        lgg.build(kaggle, tmp_path / 'built')
    assert sorted(path.name for path in there.iterdir()) == before


def test_a_folder_that_is_none_says_what_to_download(tmp_path):
    for source in (tmp_path / 'missing', tmp_path):
        with pytest.raises(DataError, match=r'kaggle\.com/datasets/mateuszbuda') as caught:
            lgg.check(source)
        assert str(source) in str(caught.value)


def test_the_built_data_set_is_the_files(kaggle, tmp_path):
    builder = lgg.build(kaggle, tmp_path / 'built')
    assert set(builder.info.splits) == {'train', 'validation', 'test'}
    test = {row['patient'] for row in builder.as_data_source('test')}
    assert test == {b'TCGA_CS_4944_20010208'}

    slices = lgg.load('', str(tmp_path / 'built'))
    built = {volume.patient: volume for volume in volumes.iterate_volumes(slices)}
    for case in lgg.check(kaggle):
        direct = lgg.read_case(case)
        for field in ('image', 'mask', 'slices', 'intensity'):
            assert (getattr(built[case.patient], field) == getattr(direct, field)).all()
    lesions = [volumes.lesion_pixels(slices.read(int(key))[1]) for key in slices.key]
    assert slices.lesion_pixels.tolist() == lesions


def test_a_missing_sequence_is_noted(tmp_path):
    folder = write_case(tmp_path / 'kaggle_3m', 'TCGA_CS_4941_19960909')
    write_case(tmp_path / 'kaggle_3m', 'TCGA_DU_5849_19950405')
    for path in folder.glob('*_?.tif'):
        pixels = np.array(Image.open(path))
        pixels[..., 2] = pixels[..., 1]  # FLAIR in place of post-contrast
        Image.fromarray(pixels).save(path)
    builder = lgg.build(tmp_path, tmp_path / 'built')
    rows = [row for split in builder.info.splits for row in builder.as_data_source(split)]
    for row in rows:
        assert not row['missing_pre']
        assert row['missing_post'] == (row['site'] == b'CS')


def test_it_is_built_once_and_anew_when_the_files_change(kaggle, tmp_path):
    def stamp():
        folder = Path(lgg.build(kaggle, tmp_path / 'built').data_dir)
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    first = stamp()
    assert stamp() == first
    write_case(kaggle / 'kaggle_3m', 'TCGA_FG_5964_20010511')
    assert stamp() != first
    assert len(lgg.load('', str(tmp_path / 'built')).intensity) == 7


def test_a_fault_leaves_nothing_built(kaggle, tmp_path):
    Image.new('L', (256, 256), 9).save(
        kaggle / 'kaggle_3m' / 'TCGA_CS_4941_19960909' / 'TCGA_CS_4941_19960909_1_mask.tif'
    )
    with pytest.raises(DataError, match=r'1 fault\(s\)'):
        lgg.build(kaggle, tmp_path / 'built')
    assert not list((tmp_path / 'built').rglob('*.array_record*'))


@needs_shared
def test_the_shared_patients_have_the_published_counts(tmp_path):
    """LGG.md: all ten of the public hold-out are among them."""
    from zipfile import ZipFile

    archives = sorted((SHARED / 'lgg').glob('TCGA_*.zip'))
    patient = archives[0].stem
    with ZipFile(archives[0]) as archive:
        for name in archive.namelist():
            target = tmp_path / patient / f'{name.rsplit("/", 1)[-1].rsplit(".", 1)[0]}.tif'
            target.parent.mkdir(exist_ok=True)
            Image.open(archive.open(name)).save(target)
    volume = next(lgg.read_volumes(tmp_path))
    assert volume.image.shape == (23, 256, 256, 3)
    assert volume.mask.sum() == 14_379
    parts = splits.holdout([path.stem for path in archives], test_patients=splits.LGG_HOLDOUT)
    assert [len(part) for part in parts.values()] == [70, 8, 10]


@needs_shared
@pytest.mark.slow
def test_the_patients_who_lack_sequences_are_those_of_the_table():
    """FLAIR, channel 1, is in the place of missing sequences: equal but for rounding."""
    from zipfile import ZipFile

    found = {}
    for path in sorted((SHARED / 'lgg').glob('TCGA_*.zip')):
        with ZipFile(path) as archive:
            images = sorted(name for name in archive.namelist() if 'mask' not in name)[::4]
            pixels = [np.asarray(Image.open(archive.open(name)), np.float32) for name in images]
        apart = [
            np.mean([np.abs(image[..., c] - image[..., 1]).mean() for image in pixels])
            for c in (0, 2)
        ]
        found[splits.short_name(path.stem)] = sum(difference < 1.0 for difference in apart)
    assert len(found) == 88
    assert {name for name, missing in found.items() if missing == 2} == set(tables.FLAIR_ALONE)
    assert {name for name, missing in found.items() if missing == 1} == set(tables.ONE_MISSING)
