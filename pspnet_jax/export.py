"""A checkpoint as one file that serves without this package.

  python -m pspnet_jax.export --workdir=RUN --format=stablehlo|onnx|savedparams

  stablehlo     model.stablehlo.zip: for jax.export on CPU, CUDA and TPU, any batch, height and
                width; metadata.json is beside it in the archive
  onnx          model.onnx: for onnxruntime and others, any batch, the height and width of --size
  savedparams   model.safetensors: parameters and statistics by name, for anyone with numpy, and a
                run in one file: a folder with it alone can be evaluated, predict and be exported

The first two take uint8 RGB and give probabilities, the normalisation is inside: with a fixed
one each image is alone, with each volume's own the batch is one volume. With data.context the
batch is always one volume, its slices in turn, and neighbours are stacked inside. A run with one
scale for images that are not of 8 bits takes float32, in the images' own unit. Metadata is JSON
under 'pspnet_jax'. Each file is read again and compared with the model before it is there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from pspnet_jax import cli
from pspnet_jax.runtime.errors import ConfigError, say


def read(path: str | Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """`serving.read.read`: what was exported, as a function of images, and its metadata."""
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
        'format', None, ['stablehlo', 'onnx', 'savedparams'], 'of the file', required=True
    )
    flags.DEFINE_string('output', '', "the file; '': in the workdir")
    flags.DEFINE_string('checkpoint', '', "'best', 'last' or a step; '': as the config says")
    flags.DEFINE_list('size', ['256', '256'], 'HEIGHT,WIDTH of ONNX, and of what is compared')
    flags.DEFINE_boolean('crf', True, "the config's CRF behind the network")
    flags.DEFINE_enum('dtype', 'float32', ['float32', 'float16'], 'of what savedparams has')
    cli.run(main)
