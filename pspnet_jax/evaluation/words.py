"""The words for what is evaluated: patients with lesions, or cases with objects."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Words(NamedTuple):
    case: str
    lesion: str
    whole: str  # over which a case's Dice is computed
    slice: str  # a case has one or several
    size: str  # of a lesion
    voxel: str


PATIENTS = Words('patient', 'lesion', 'volume', 'slice', 'lesion volume', 'voxel')
CASES = Words('case', 'object', 'case', 'picture', 'object size', 'pixel')


def words_for(result: Mapping[str, Any]) -> Words:
    """The words for a result: patients in the LGG data and if there are volumes, else cases."""
    data = result.get('checkpoint', {'config': {}})['config'].get('data', {})
    volumes = any(row['slices'] > row['scans'] for row in result['patients'])
    return PATIENTS if volumes or data.get('name') == 'lgg' else CASES
