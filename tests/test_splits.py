"""By patient: disjoint, complete, stable, site by site."""

import dataclasses
import json
import random

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.config import base
from pspnet_jax.data import folder, phantom, sources, splits, volumes
from pspnet_jax.runtime.errors import DataError

SITES = {'DU': 45, 'HT': 34, 'CS': 16, 'FG': 14, 'EZ': 1}
PATIENTS = [f'TCGA_{site}_{1000 + i}_19990101' for site, n in SITES.items() for i in range(n)]


@pytest.mark.parametrize('seed', range(5))
def test_parts_are_disjoint_and_together_everybody(seed):
    parts = splits.holdout(PATIENTS, test_patients=['DU_1001', 'TCGA_HT_1003_19990101'], seed=seed)
    everybody = [patient for part in parts.values() for patient in part]
    assert sorted(everybody) == sorted(PATIENTS)
    assert len(set(everybody)) == len(everybody)
    assert parts['test'] == ['TCGA_DU_1001_19990101', 'TCGA_HT_1003_19990101']


def test_validation_mirrors_the_sites():
    parts = splits.holdout(PATIENTS, validation_fraction=0.2)
    drawn = [splits.site(p) for p in parts['validation']]
    assert len(drawn) == 22
    for site, n in SITES.items():
        assert abs(drawn.count(site) - 0.2 * n) < 1


def test_order_does_not_matter_and_seed_does():
    shuffled = random.Random(0).sample(PATIENTS, len(PATIENTS))
    assert splits.holdout(shuffled) == splits.holdout(PATIENTS)
    assert splits.holdout(PATIENTS, seed=1) != splits.holdout(PATIENTS)


def test_a_patient_more_does_not_reshuffle_the_others():
    more = splits.stratified_draw([*PATIENTS, 'TCGA_DU_9999_1'], 0.2, seed=0, label='validation')
    fewer = splits.stratified_draw(PATIENTS, 0.2, seed=0, label='validation')
    assert len(set(more) ^ set(fewer)) <= 3


@pytest.mark.parametrize('count', range(2, 40))
def test_few_cases_are_validated_and_tested_as_far_as_they_go(count, caplog):
    """One to validate from two on, one to test from five, and most to train on."""
    names = [f'p{n}' for n in range(count)]
    parts = splits.holdout(names, test_fraction=0.15, validation_fraction=0.1)
    assert sorted(name for part in parts.values() for name in part) == sorted(names)
    assert len(parts['validation']) >= 1
    assert bool(parts['test']) == (count >= 5)
    assert len(parts['train']) >= max(1, 0.6 * count - 1)
    assert ('too few for a test set' in caplog.text) == (count < 5)


def test_nobody_left_to_train_on_is_an_error():
    with pytest.raises(DataError, match='no training patients are left: of 1,'):
        splits.holdout(['a'], test_fraction=0.5)


HOLDOUT = ('DU_1001', 'HT_1003')


@pytest.mark.parametrize('folds', [2, 5, 7])
def test_every_patient_is_tested_in_one_fold_and_the_public_holdout_in_none(folds):
    parts = [
        splits.kfold(PATIENTS, folds=folds, fold=fold, test_patients=HOLDOUT)
        for fold in range(folds)
    ]
    reserved = {p for p in PATIENTS if splits.short_name(p) in HOLDOUT}
    assert sorted(p for part in parts for p in part['test']) == sorted(set(PATIENTS) - reserved)
    for part in parts:
        everybody = [p for names in part.values() for p in names]
        assert len(everybody) == len(set(everybody)) == len(PATIENTS) - 2
        for site, n in SITES.items():  # the sites are dealt out evenly
            drawn = sum(splits.site(p) == site for p in part['test'])
            assert abs(drawn - (n - (site in ('DU', 'HT'))) / folds) < 1


def test_a_site_is_left_out_whole():
    parts = splits.leave_site_out(PATIENTS, left_out='CS', test_patients=HOLDOUT)
    assert parts['test'] == sorted(p for p in PATIENTS if splits.site(p) == 'CS')
    assert 'CS' not in {splits.site(p) for p in parts['train'] + parts['validation']}
    with pytest.raises(DataError, match=r"data\.site must be one of .*'DU'"):
        splits.leave_site_out(PATIENTS, left_out='XX')


def test_more_folds_than_patients_are_refused():
    with pytest.raises(DataError, match=r'data\.folds is 3, but there are only 2 patients'):
        splits.kfold(['a', 'b'], folds=3, fold=0)


@pytest.fixture
def slices():
    return phantom.load(volumes=4, slices=4, size=32, seed=0)


def test_a_split_that_is_read_back_is_the_one_that_was_written(tmp_path, slices):
    parts = splits.holdout(list(slices.intensity), test_fraction=0.25)
    splits.keep(tmp_path / 'splits.json', parts, slices)
    assert splits.read(tmp_path / 'splits.json', slices) == parts
    splits.keep(tmp_path / 'splits.json', parts, slices)  # again: nothing to say
    other = splits.holdout(list(slices.intensity), test_fraction=0.25, seed=3)
    assert other != parts
    with pytest.raises(DataError, match='splits the patients in another way'):
        splits.keep(tmp_path / 'splits.json', other, slices)


def test_a_split_of_other_data_is_refused(tmp_path, slices):
    path = tmp_path / 'splits.json'
    parts = splits.holdout(list(slices.intensity), test_fraction=0.25)
    splits.write(path, parts, slices)
    fewer = volumes.select(slices, sorted(slices.intensity)[:3])
    with pytest.raises(DataError, match='are not there'):
        splits.read(path, fewer)
    brighter = {p: array + (p == 'phantom_001') for p, array in slices.intensity.items()}
    with pytest.raises(DataError, match='slices or pixels differ'):
        splits.read(path, dataclasses.replace(slices, intensity=brighter))


@pytest.mark.parametrize(
    'text', ['', '[]', '{"train": []}', '{"train": 3, "validation": [], "test": []}', '[' * 9999]
)
def test_what_is_no_split_is_named(tmp_path, slices, text):
    (tmp_path / 'splits.json').write_text(text)
    with pytest.raises(DataError, match=r'splits\.json is not a split'):
        splits.read(tmp_path / 'splits.json', slices)


def test_a_patient_in_two_parts_is_refused(tmp_path, slices):
    everybody = sorted(slices.intensity)
    path = tmp_path / 'splits.json'
    splits.write(path, {'train': everybody, 'validation': [], 'test': everybody[:1]}, slices)
    with pytest.raises(DataError, match='lists a patient twice'):
        splits.read(path, slices)


def test_pictures_of_the_run_are_known_by_their_pixels_under_any_name(tmp_path, slices):
    path = tmp_path / 'splits.json'
    names = list(slices.intensity)
    parts = {'train': names[:2], 'validation': names[2:3], 'test': names[3:]}
    splits.keep(path, parts, slices)
    digests = {f'copy of {n}': ['else', found[2]] for n, found in splits.pixels(slices).items()}
    digests |= {names[0]: ['other pixels', ''], 'new': ['others'], 'black': ['']}
    assert splits.overlap(path, digests) == {
        'train': [f'copy of {name}' for name in names[:2]],
        'validation': [f'copy of {names[2]}'],
        'same_name': [names[0]],
    }
    # A run that began before there were digests gets them when it goes on.
    found = json.loads(path.read_text())
    del found['pixels']
    path.write_text(json.dumps(found))
    assert splits.overlap(path, digests) is None
    splits.keep(path, parts, slices)
    assert splits.overlap(path, digests)['train']


def test_the_same_pixels_have_the_same_digest_whoever_reads_them(slices, rng):
    unread = dataclasses.replace(slices, digest=None)  # as of LGG, which is read for it
    assert splits.pixels(unread) == splits.pixels(slices)
    grey = rng.integers(0, 255, (8, 9, 1)).astype(np.uint8)
    digest = volumes.picture_digest(grey)
    assert digest == volumes.picture_digest(np.repeat(grey.astype(np.uint16), 3, axis=-1))
    assert digest == volumes.picture_digest(np.asfortranarray(grey.astype(np.float32)))
    assert digest != volumes.picture_digest(grey.reshape(9, 8, 1))
    grey[3, 3] ^= 1
    assert digest != volumes.picture_digest(grey)
    assert volumes.picture_digest(grey * 0) == ''  # black is the same in all


@pytest.mark.parametrize(
    'text', [None, '', '[]', '{"pixels": 3}', '{"train": [], "validation": [], "test": []}']
)
def test_where_no_digests_are_kept_nothing_is_known(tmp_path, text):
    if text is not None:
        (tmp_path / 'splits.json').write_text(text)
    assert splits.overlap(tmp_path / 'splits.json', {'a': ['1']}) is None
    strange = {'train': [3, 'a', ['b']], 'validation': None, 'pixels': {'a': '1', 'b': [['1']]}}
    (tmp_path / 'splits.json').write_text(json.dumps(strange))
    found = splits.overlap(tmp_path / 'splits.json', {'a': ['1']})
    assert found == {'train': [], 'validation': [], 'same_name': ['a']}


def test_pictures_turned_upside_down_are_other_data(tmp_path, rng):
    """They have the same intensities, and their masks the same area."""
    for name in 'abcd':
        image, mask = rng.integers(0, 255, (20, 24), np.uint8), np.zeros((20, 24), np.uint8)
        mask[2:9, 4:9] = 255
        for kind, pixels in (('images', image), ('masks', mask)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / f'{name}.png')
    before = folder.load(tmp_path)
    parts = {'train': ['a', 'b'], 'validation': ['c'], 'test': ['d']}
    splits.write(tmp_path / 'splits.json', parts, before)
    assert splits.read(tmp_path / 'splits.json', folder.load(tmp_path)) == parts
    for kind in ('images', 'masks'):
        with Image.open(tmp_path / kind / 'b.png') as picture:
            turned = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        turned.save(tmp_path / kind / 'b.png')
    after = folder.load(tmp_path)
    assert splits.fingerprint(after) == splits.fingerprint(before)
    with pytest.raises(DataError, match=r"the images of \['b'\] have other pixels"):
        splits.read(tmp_path / 'splits.json', after)


@pytest.mark.parametrize('held_out', [True, False])
def test_the_public_holdout_is_in_a_fold_only_where_that_is_asked_for(monkeypatch, rng, held_out):
    names = ['TCGA_CS_4944_20010208', *(f'TCGA_DU_{n}_19960101' for n in range(5849, 5858))]
    image, mask = rng.integers(0, 99, (1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8), np.uint8)
    scale = volumes.measure_intensity(image)
    slices = volumes.from_volumes(
        [volumes.Volume(name, image, mask, np.ones(1), scale) for name in names]
    )
    monkeypatch.setattr(sources, 'read', lambda config: slices)
    config = base.get_config()
    config.data.update({'name': 'lgg', 'split': 'kfold', 'folds': 2, 'public_holdout': held_out})
    tested = []
    for config.data.fold in range(2):
        tested += sources.load(config)[1]['test']
    expected = [name for name in names if splits.short_name(name) not in splits.LGG_HOLDOUT]
    assert sorted(tested) == sorted(expected if held_out else names)
