"""Which patient is trained on, validated on, tested on. By patient, always.

Neighbouring slices of one head are nearly the same picture, so a split by slice
tests on what it trained on (Yagis et al. 2021 measured 29-55 points of that).
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

# The ten patients that Buda's published code holds out, `random.seed(42);
# random.sample(sorted(patients), 10)`: the only LGG split that others report on.
LGG_HOLDOUT = (
    'CS_4944', 'CS_6667', 'CS_6668', 'DU_5851', 'DU_6404',
    'DU_6408', 'DU_7014', 'HT_7616', 'HT_7692', 'HT_7879',
)  # fmt: skip


def short_name(patient: str) -> str:
    """'TCGA_CS_4944_20010208' -> 'CS_4944'; any other name is left alone."""
    parts = patient.split('_')
    return '_'.join(parts[1:3]) if parts[0] == 'TCGA' and len(parts) == 4 else patient


def site(patient: str) -> str:
    """'TCGA_CS_4944_20010208' -> 'CS', the hospital; '' where the name has none."""
    return short_name(patient).split('_')[0] if patient.startswith('TCGA_') else ''


def holdout(
    patients: Sequence[str],
    *,
    test_patients: Sequence[str] = (),
    test_fraction: float = 0.0,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> dict[str, list[str]]:
    """{'train', 'validation', 'test': sorted patients}, disjoint, together all of them.

    The test set is those of `test_patients` (short or whole names) that are there,
    or, with none named, `test_fraction` of all. Test and validation patients are
    drawn site by site in the order of a hash of seed and name, so that a subset of
    the patients keeps their order. Raises ValueError when nothing is left to train on.
    """
    patients = sorted(set(patients))
    named = set(test_patients)
    if named:
        test = [p for p in patients if p in named or short_name(p) in named]
    else:
        test = stratified_draw(patients, test_fraction, seed=seed, label='test')
    rest = [p for p in patients if p not in test]
    validation = stratified_draw(rest, validation_fraction, seed=seed, label='validation')
    train = [p for p in rest if p not in validation]
    if not train:
        raise ValueError(
            f'no patient of {len(patients)} is left to train on: '
            f'{len(test)} test, {len(validation)} validation; lower the fractions or add patients'
        )
    return {'train': train, 'validation': validation, 'test': test}


def stratified_draw(
    patients: Sequence[str], fraction: float, *, seed: int, label: str
) -> list[str]:
    """round(fraction * n) of the patients (at least 1), sites by largest remainder."""
    if fraction == 0.0 or not patients:
        return []
    by_site = defaultdict(list)
    for patient in sorted(patients, key=lambda p: _rank(p, seed, label)):
        by_site[site(patient)].append(patient)
    total = max(1, round(fraction * len(patients)))
    quota = {name: total * len(group) / len(patients) for name, group in by_site.items()}
    count = {name: int(share) for name, share in quota.items()}
    by_remainder = sorted(quota, key=lambda name: (count[name] - quota[name], name))
    for name in by_remainder[: total - sum(count.values())]:
        count[name] += 1
    return sorted(p for name, group in by_site.items() for p in group[: count[name]])


def _rank(patient: str, seed: int, label: str) -> bytes:
    return hashlib.sha256(f'{label}:{seed}:{patient}'.encode()).digest()
