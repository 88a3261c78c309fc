"""By patient: disjoint, complete, stable, site by site."""

import random

import pytest

from pspnet_jax.data import splits

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


def test_nobody_left_to_train_on_is_an_error():
    with pytest.raises(ValueError, match='no patient of 1 is left'):
        splits.holdout(['a'], test_fraction=0.5)
