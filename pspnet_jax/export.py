"""Export a checkpoint as one file that runs without this package.

  python -m pspnet_jax.export --workdir=RUN --format=stablehlo|onnx|savedparams

  stablehlo     model.stablehlo.zip: for jax.export on CPU, CUDA and TPU, any batch, height and
                width; the archive also holds metadata.json
  onnx          model.onnx: for onnxruntime and others, any batch, the height and width of --size
  savedparams   model.safetensors: parameters and statistics by name, readable with numpy; a folder
                with only this file is a run that can evaluate, predict and be exported

The first two take uint8 RGB and return probabilities; normalisation is part of the file. With a
fixed normalisation images are independent; if each volume has its own, the batch is one volume.
With data.context the batch is always one volume, its slices in order. A run with one scale for
images that are not 8-bit takes float32 in the images' own unit. Metadata is JSON under
'pspnet_jax'. Each file is read back and compared with the model before it gets its name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from pspnet_jax import cli
from pspnet_jax.runtime.errors import ConfigError, say


def read(path: str | Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """(an exported file as a function of images, its metadata): `serving.read.read`."""
    from pspnet_jax.serving import read as reading

    return reading.read(path)


def main() -> None:
    from pspnet_jax.serving.export import export_checkpoint

    options = flags.FLAGS
    try:
        height, width = map(int, options.size)
    except ValueError as error:
        raise ConfigError(f'--size={",".join(options.size)} is not HEIGHT,WIDTH') from error
    path = export_checkpoint(
        options.workdir,
        options.format,
        output=options.output,
        which=options.checkpoint,
        size=(height, width),
        crf=options.crf,
        dtype=options.dtype,
    )
    say(f'written to {path}')


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'folder of a training run', required=True)
    flags.DEFINE_enum(
        'format', None, ['stablehlo', 'onnx', 'savedparams'], "the file's format", required=True
    )
    flags.DEFINE_string('output', '', "the file; '': in the workdir")
    flags.DEFINE_string('checkpoint', '', "'best', 'last' or a step; '': as in the config")
    flags.DEFINE_list('size', ['256', '256'], 'HEIGHT,WIDTH of ONNX and of the compared images')
    flags.DEFINE_boolean('crf', True, "include the config's CRF")
    flags.DEFINE_enum('dtype', 'float32', ['float32', 'float16'], 'of the savedparams')
    cli.run(main)
