"""Splits patients into training, validation and test sets; always whole patients.

Neighbouring slices of one head are nearly the same image, so a split by slice tests on what it
trained on (Yagis et al. 2021 measured 29-55 points of inflation).

A split is stored as {'train', 'validation', 'test': patients, 'fingerprint', 'pixels'}; `read`
refuses one of other data, and `overlap` finds its images among others.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pspnet_jax.data.volumes import Slices, picture_digest
from pspnet_jax.runtime import text
from pspnet_jax.runtime.errors import DataError
from pspnet_jax.runtime.storage import write_json

logger = logging.getLogger(__name__)

KEPT = 'splits.json'  # in a run's workdir
FEWEST_TO_TEST = 5  # patients for which there is a test set

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
    """'TCGA_CS_4944_20010208' -> 'CS', the hospital; '' if the name has none."""
    return short_name(patient).split('_')[0] if patient.startswith('TCGA_') else ''


def holdout(
    patients: Sequence[str],
    *,
    test_patients: Sequence[str] = (),
    test_fraction: float = 0.0,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> dict[str, list[str]]:
    """Split all patients into {'train', 'validation', 'test': sorted patients}.

    The test set is `test_patients` (short or whole names), or else `test_fraction` of all patients,
    at least one. With fewer than FEWEST_TO_TEST patients there is no test set, as all are needed to
    train and validate. Test and validation patients are drawn site by site in the order of a hash
    of seed and name, so a subset of the patients keeps their order. Raises DataError if no training
    patients are left.
    """
    patients = sorted(set(patients))
    named = set(test_patients)
    if named:
        test = [p for p in patients if p in named or short_name(p) in named]
    else:
        enough = len(patients) >= FEWEST_TO_TEST
        test = stratified_draw(patients, test_fraction * enough, seed=seed, label='test')
        if test_fraction and not enough:
            logger.warning(
                '%d cases are too few for a test set (it needs %d): the results at the end are for '
                'the validation cases, by which the best checkpoint is chosen, so they are too '
                'optimistic', len(patients), FEWEST_TO_TEST,
            )  # fmt: skip
    rest = [p for p in patients if p not in test]
    validation = stratified_draw(rest, validation_fraction, seed=seed, label='validation')
    train = [p for p in rest if p not in validation]
    if not train:
        raise DataError(
            f'no training patients are left: of {len(patients)}, {len(test)} are for the test and '
            f'{len(validation)} for validation: add patients, or lower the fractions, '
            '--config.data.test_fraction=0 --config.data.validation_fraction=0'
        )
    return {'train': train, 'validation': validation, 'test': test}


def kfold(
    patients: Sequence[str],
    *,
    folds: int,
    fold: int,
    test_patients: Sequence[str] = (),
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> dict[str, list[str]]:
    """`holdout`'s three parts with the patients of one of `folds` folds as the test set.

    Over all folds each patient is tested once, and sites are spread evenly. `test_patients`, a
    public hold-out, are in no part: they are kept for the final result. Raises DataError for more
    folds than patients.
    """
    patients = _without(patients, test_patients)
    if folds > len(patients):
        raise DataError(
            f'data.folds is {folds}, but there are only {len(patients)} patients: lower it'
        )
    dealt = sorted(patients, key=lambda p: (site(p), _rank(p, seed, 'fold')))
    test = dealt[fold::folds]
    return holdout(patients, test_patients=test, validation_fraction=validation_fraction, seed=seed)


def leave_site_out(
    patients: Sequence[str],
    *,
    left_out: str,
    test_patients: Sequence[str] = (),
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> dict[str, list[str]]:
    """`holdout`'s three parts with the patients of one site as the test set.

    `test_patients` are in no part. Raises DataError for a site without patients.
    """
    patients = _without(patients, test_patients)
    test = [patient for patient in patients if site(patient) == left_out]
    if not test:
        sites = sorted({site(patient) for patient in patients})
        raise DataError(f'no patient is from site {left_out!r}: data.site must be one of {sites}')
    return holdout(patients, test_patients=test, validation_fraction=validation_fraction, seed=seed)


def _without(patients: Sequence[str], reserved: Sequence[str]) -> list[str]:
    reserved = set(reserved)
    return [p for p in sorted(set(patients)) if not {p, short_name(p)} & reserved]


def fingerprint(slices: Slices) -> str:
    """A digest of the slices' numbers, lesion areas and each patient's intensity scale."""
    digest = hashlib.sha256()
    for patient in sorted(slices.intensity):
        rows = slices.patient == patient
        digest.update(patient.encode() + b'\0')
        for array in (slices.slice[rows], slices.lesion_pixels[rows]):
            digest.update(array.astype('<i8').tobytes())
        digest.update(slices.intensity[patient].astype('<f4').tobytes())
    return digest.hexdigest()


def write(path: str | Path, parts: dict[str, list[str]], slices: Slices) -> None:
    """Write `parts` of `slices` as JSON, atomically."""
    found = {**parts, 'fingerprint': fingerprint(slices), 'pixels': pixels(slices)}
    write_json(Path(path), found)


def keep(path: str | Path, parts: dict[str, list[str]], slices: Slices) -> None:
    """Write the split, or raise DataError if the file exists and holds another split."""
    if Path(path).exists() and read(path, slices) != parts:
        raise DataError(
            f'{path} splits the patients in another way than this config: resume with the '
            "run's own data.split, or give another --workdir"
        )
    if not Path(path).exists() or 'pixels' not in text.read_json(path):  # as in old versions
        write(path, parts, slices)


def pixels(slices: Slices) -> dict[str, list[str]]:
    """{patient: `volumes.picture_digest` of each slice}."""
    digest = slices.digest
    if digest is None:
        with ThreadPoolExecutor(4) as pool:
            read = pool.map(lambda key: picture_digest(slices.read(int(key))[0]), slices.key)
            digest = np.array(list(read))
    return {name: digest[slices.patient == name].tolist() for name in slices.intensity}


def overlap(path: str | Path, digests: Mapping[str, Sequence[str]]) -> dict[str, list[str]] | None:
    """Which of the patients in `digests` ({patient: digests of the slices}) are in a split file.

    'train' and 'validation' list patients who share a slice with that part of the split at `path`;
    'same_name' lists patients who share only a name. None if the split can't be read or has no
    digests.
    """
    try:
        kept: Any = text.read_json(path)
    except DataError:
        return None
    if not isinstance(kept, dict) or not isinstance(kept.get('pixels'), dict):
        return None
    found, seen = {}, set()
    for part in ('train', 'validation'):
        names = kept.get(part)
        names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        theirs = [kept['pixels'].get(name) for name in names]
        known = {str(x) for some in theirs if isinstance(some, list) for x in some} - {''}
        found[part] = [name for name, ours in digests.items() if known.intersection(ours)]
        seen |= set(names)
    known = {*found['train'], *found['validation']}
    found['same_name'] = [name for name in digests if name in seen and name not in known]
    return found


def read(path: str | Path, slices: Slices) -> dict[str, list[str]]:
    """The parts that `write` wrote. Raises DataError for another kind of file or other data."""
    parts, found = listed(path)
    unknown = sorted({name for part in parts.values() for name in part} - slices.intensity.keys())
    what = f'{unknown[:8]} are not there' if unknown else ''
    if not unknown and found.get('fingerprint') != fingerprint(slices):
        what = 'slices or pixels differ'
    if not what and slices.digest is not None and isinstance(kept := found.get('pixels'), dict):
        ours = pixels(slices)  # an upside-down image has the same intensities
        other = [name for name in ours if name in kept and kept[name] != ours[name]]
        what = f'the images of {other[:8]} have other pixels' if other else ''
    if what:
        raise DataError(
            f'{path} was made from other data ({what}): use that data, or split again without '
            'data.split_file and in a new workdir'
        )
    return parts


def listed(path: str | Path) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """(the parts, the whole content) of a split file. Raises DataError for another file."""
    names = ('train', 'validation', 'test')
    has = f'it must have the lists {", ".join(names)} and a fingerprint'
    try:
        found = text.parse_json(text.read(path))
    except DataError as error:
        raise DataError(f'{path} is not a split ({error}): {has}') from error
    found = found if isinstance(found, dict) else {}
    parts = {name: found.get(name) for name in names}
    if not all(isinstance(part, list) for part in parts.values()):
        raise DataError(f'{path} is not a split: {has}')
    patients = [patient for part in parts.values() for patient in part]
    if not all(isinstance(patient, str) for patient in patients):
        raise DataError(f'{path} is not a split: {has} of names')
    if len(set(patients)) < len(patients):
        raise DataError(f'{path} lists a patient twice: every patient must be in one part')
    return parts, found


def stratified_draw(
    patients: Sequence[str], fraction: float, *, seed: int, label: str
) -> list[str]:
    """Draw round(fraction * n) of the patients (at least 1), per site by largest remainder."""
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
