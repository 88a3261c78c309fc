"""A run in one safetensors file: named parameters and statistics, with the run's metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pspnet_jax import models
from pspnet_jax.config import from_dict
from pspnet_jax.data import volumes
from pspnet_jax.inference.networks import abstract_variables
from pspnet_jax.runtime import checkpoint
from pspnet_jax.runtime.errors import CheckpointError, ExportError, PspnetError

NAME = 'model.safetensors'  # in the folder of a run
KEY = 'pspnet_jax'  # of the file's metadata
MOST_TEXT = 2**22  # characters of the metadata
CRF_KERNELS = ('none', 'exact', 'windowed')
TYPES = ('float32', 'float16')


def write(
    path: Path, variables: Mapping[str, Any], metadata: Mapping[str, Any], dtype: str = 'float32'
) -> None:
    """Write `variables`, nested dictionaries of arrays, as `dtype`, one of TYPES.

    Raises ExportError for a value that `dtype` can not hold.
    """
    from safetensors.numpy import save

    arrays = {}
    for name, array in flatten_dict(variables, sep='/').items():
        with np.errstate(over='ignore'):
            arrays[name] = np.ascontiguousarray(array, dtype)
        if not np.isfinite(arrays[name]).all():
            raise ExportError(f'{name} has values that {dtype} can not hold: give float32')
    path.write_bytes(save(arrays, metadata={KEY: json.dumps(metadata)}))


def read_metadata(text: str | bytes) -> dict[str, Any]:
    found = json.loads(text[:MOST_TEXT])
    if not isinstance(found, dict):
        raise ValueError(f'metadata is {found!r:.80}')
    return found


def read_params(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(variables, metadata) of a file that `write` made; the arrays are float32, numpy's.

    Raises CheckpointError unless the arrays' names and shapes are those of the config's network.
    """
    from safetensors import safe_open

    if not Path(path).is_file():  # reading a pipe would block
        raise ExportError(f'{path} is not a file')
    try:
        with safe_open(path, 'numpy') as file:
            metadata = read_metadata(file.metadata()[KEY])
            config = from_dict(metadata['config'])
            checkpoint.check_inputs(metadata['inputs'], path)
            if metadata['crf'] not in CRF_KERNELS or not 0 <= int(metadata['step']) < 2**63:
                raise ValueError('crf or step')
            seen = volumes.channels_seen(metadata['inputs']['channels'], config.data.context)
            tree = abstract_variables(models.create(**config.model), seen)
            leaves: dict[str, Any] = flatten_dict(tree, sep='/')
            shapes = {name: leaf.shape for name, leaf in leaves.items()}
            names = list(file.keys())
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            faults = [
                f'{name} is {found.get(name, "missing")}, '
                f'it should be {shapes.get(name, "left out")}'
                for name in sorted(found.keys() | shapes.keys())
                if found.get(name) != shapes.get(name)
            ]
            if faults:
                raise CheckpointError(f'{path} does not fit its config:', faults)
            arrays = {name: file.get_tensor(name) for name in shapes}
            if any(array.dtype.name not in TYPES for array in arrays.values()):
                raise ValueError('dtype')
    except PspnetError:
        raise
    except Exception as error:  # safetensors, JSON and untrusted types each raise their own
        raise CheckpointError(f'{path} is not an exported savedparams: export it again') from error
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return unflatten_dict(arrays, sep='/'), metadata
