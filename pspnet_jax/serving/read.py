"""Reads an exported network as a function of images."""

import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pspnet_jax import models
from pspnet_jax.config import from_dict
from pspnet_jax.data import volumes
from pspnet_jax.inference import infer, saved, settings
from pspnet_jax.inference.saved import KEY, read_metadata, read_params
from pspnet_jax.models.weights import check_archive, fixed_intensity, measured_how
from pspnet_jax.runtime import compilation
from pspnet_jax.runtime.errors import ExportError, PspnetError, first_line
from pspnet_jax.serving import onnx_graph, stablehlo

FILES = {
    'stablehlo': 'model.stablehlo.zip',
    'onnx': 'model.onnx',
    'savedparams': saved.NAME,
}
PROGRAM, METADATA = 'model.stablehlo', 'metadata.json'  # in the archive
Predict = Callable[[np.ndarray], np.ndarray]  # B H W C uint8 -> B H W K probabilities


def reference(
    image_BHWC: np.ndarray,
    *,
    variables,
    predict_fn,
    intensity: np.ndarray | None,
    measured: str,
    context: int = 0,
) -> np.ndarray:
    """The network as in `evaluate` and `predict`: measure, normalise and stack by numpy."""
    if intensity is None:
        intensity = volumes.measure([image_BHWC], measured)
    else:
        volumes.check_kind(image_BHWC, intensity, 'the image')
    rows_Bn = volumes.neighbours(None, len(image_BHWC), context)
    image_BHWC = volumes.stack(volumes.normalize(image_BHWC, intensity), rows_Bn)
    return predict_fn(variables, image_BHWC)


def read_stablehlo(path: str | Path) -> tuple[Predict, dict[str, Any]]:
    """(predict, metadata). Raises ExportError for another file."""
    path = _file(path)
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            program, metadata = archive.read(PROGRAM), read_metadata(archive.read(METADATA))
        exported = jax.export.deserialize(bytearray(program))
        stablehlo.check(bytes(exported.mlir_module_serialized))
    except ExportError as error:
        raise ExportError(f'{path}: {error}') from error
    except PspnetError:
        raise
    except Exception as error:  # zipfile, flatbuffers and MLIR raise their own
        raise ExportError(f'{path} is not an exported StableHLO: export it again') from error
    predict = compilation.jit(exported.call)
    return (lambda image: np.asarray(predict(image))), metadata


def _file(path: str | Path) -> Path:
    """The path. Raises ExportError if it is not a file: reading a pipe would block."""
    if not Path(path).is_file():
        raise ExportError(f'{path} is not a file')
    return Path(path)


def read_onnx(path: str | Path) -> tuple[Predict, dict[str, Any]]:
    """(predict, metadata), on the CPU. Raises ExportError for another file."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(onnx_graph.NEED) from error
    path = _file(path)
    try:
        session = onnxruntime.InferenceSession(
            path.read_bytes(),  # bytes, so that it can't read other files
            providers=['CPUExecutionProvider'],
            disabled_optimizers=['ConstantFolding'],  # it would compute constants of any size
        )
        metadata = read_metadata(session.get_modelmeta().custom_metadata_map[KEY])
    except Exception as error:  # onnxruntime's exceptions have no other common base
        reason = first_line(error)
        raise ExportError(f'{path} can not be read by onnxruntime: {reason}') from error
    return (lambda image: session.run(None, {'image': image})[0]), metadata


def read_savedparams(path: str | Path) -> tuple[Predict, dict[str, Any]]:
    """(predict, metadata): the network of `read_params`, as `predict` runs it."""
    variables, metadata = read_params(path)
    config = from_dict(metadata['config'])
    crf_options = settings.crf_options(config) | {'kernel': metadata['crf']}
    predict = functools.partial(
        reference,
        variables=variables,
        predict_fn=infer.compile_predict(models.create(**config.model), crf_options=crf_options),
        intensity=fixed_intensity(metadata['inputs']),
        measured=measured_how(metadata['inputs']),
        context=config.data.context,
    )
    return predict, metadata


READERS = {'stablehlo': read_stablehlo, 'onnx': read_onnx, 'savedparams': read_savedparams}


def read(path: str | Path) -> tuple[Predict, dict[str, Any]]:
    """(predict, metadata) of an exported file of any format, by its ending."""
    for fmt, name in FILES.items():
        if str(path).endswith(name.removeprefix('model')):
            return READERS[fmt](path)
    raise ExportError(f'{path} must be named like one of {", ".join(FILES.values())}')
