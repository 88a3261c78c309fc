"""Exports a checkpoint as one file that runs without this package: StableHLO, ONNX, parameters.

Each file is read back and compared with the model before it gets its name.
"""

import contextlib
import functools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pspnet_jax import models
from pspnet_jax.config import from_dict, to_dict, without_paths
from pspnet_jax.inference import infer, saved, settings
from pspnet_jax.inference.runs import open_run
from pspnet_jax.inference.settings import with_choice
from pspnet_jax.models.weights import fixed_intensity, measured_how
from pspnet_jax.runtime import VERSION, compilation, paths
from pspnet_jax.runtime.errors import ConfigError, ExportError, say
from pspnet_jax.runtime.storage import writing
from pspnet_jax.serving import onnx_graph
from pspnet_jax.serving.read import FILES, KEY, METADATA, PROGRAM, READERS, Predict, reference

PLATFORMS = ('cpu', 'cuda', 'tpu')
SMALLEST = 32  # side in pixels: the deepest features then have at least one cell
TOLERANCE = {
    'float32': 1e-4,
    'float16': 3e-2,
    'bfloat16': 3e-2,
}  # on probabilities, since other forms round differently


# What the caller must do for a run that resizes its images, by `data.fit`.
RESIZED = {
    'letterbox': 'resize an image in proportion until it just fits into this height and width, and '
    'resize the probabilities back; in training what was left over was 0 once normalised, so where '
    'the size of the input is fixed, fill it with the mean of the image',
    'stretch': 'resize an image to this height and width, and the probabilities back',
}


# ---- the exported function ----------------------------------------------------------------


def measure_intensity(image_BHWC: jax.Array) -> jax.Array:
    """`data.volumes.measure_intensity` of a uint8 volume, in the graph: (4, C) float32.

    It uses only counts of the 256 values, so nothing is sorted and no long sum is rounded:
    percentiles are exact up to the last two bits.
    """
    C = image_BHWC.shape[-1]
    cells = image_BHWC.reshape(-1, C).astype(jnp.int32) + 256 * jnp.arange(C)[None]
    counts = jnp.zeros(256 * C, jnp.int32).at[cells.reshape(-1)].add(1, mode='promise_in_bounds')
    counts_C256 = counts.reshape(C, 256)
    up_to_C256 = jnp.cumsum(counts_C256, axis=1)
    count = up_to_C256[:1, -1]  # pixels, (1,)

    def percentile(q: int) -> jax.Array:
        """(C,), linear between neighbours; q (count - 1) / 100 in whole numbers."""
        hundreds, rest = jax.lax.div(count - 1, 100), jax.lax.rem(count - 1, 100) * q
        rank, part = hundreds * q + jax.lax.div(rest, 100), jax.lax.rem(rest, 100)
        lower, upper = (
            (up_to_C256 <= jnp.minimum(r, count - 1)[:, None]).sum(axis=1).astype(jnp.float32)
            for r in (rank, rank + 1)
        )
        return lower + (upper - lower) * (part.astype(jnp.float32) / 100)

    low, high = percentile(10), percentile(99)
    share_C256 = counts_C256.astype(jnp.float32) / count.astype(jnp.float32)[:, None]
    value = jnp.arange(256, dtype=jnp.float32)[None]
    above_C256 = jnp.clip(value, low[:, None], high[:, None]) - low[:, None]
    mean = (share_C256 * above_C256).sum(axis=1)
    std = jnp.sqrt((share_C256 * jnp.square(above_C256 - mean[:, None])).sum(axis=1))
    return jnp.stack([low, high, low + mean, jnp.where(std > 1e-6, std, 1.0)])


def serve(
    image_BHWC: jax.Array,
    *,
    variables,
    model,
    intensity: np.ndarray | None,
    crf_options: Any,
    context: int = 0,
) -> jax.Array:
    """B H W C uint8 -> B H W K float32: `data.volumes.normalize`, then `infer.probabilities`.

    With `context` the batch is the slices of one scan in order, and the neighbours of each
    (`data.volumes.neighbours`) are stacked here.
    """
    if intensity is None:
        intensity = measure_intensity(image_BHWC)
    low, high, mean, std = intensity.reshape(4, 1, 1, 1, -1)
    image_BHWC = jnp.clip(image_BHWC.astype(jnp.float32), low, high)
    image_BHWC = (image_BHWC - mean) * (1 / std)
    if context:
        image_BHWC = stack_neighbours(image_BHWC, context)
    return infer.probabilities(variables, image_BHWC, model=model, crf_options=crf_options)


def stack_neighbours(image_BHWC: jax.Array, context: int) -> jax.Array:
    """B H W (2 context + 1)C, for a batch of any size."""
    B = image_BHWC.shape[0]
    first, last = (jax.lax.slice_in_dim(image_BHWC, n, n + 1) for n in (0, B - 1))
    longer = jnp.concatenate([first] * context + [image_BHWC] + [last] * context)
    parts = [jax.lax.slice_in_dim(longer, n, B + n) for n in range(2 * context + 1)]
    return jnp.concatenate(parts, axis=-1)


# ---- writing ------------------------------------------------------------------------------


def input_type(inputs: dict[str, Any]) -> str:
    """The dtype of the exported function's images, by a checkpoint's 'inputs'."""
    return 'float32' if 'range' in inputs else 'uint8'


def to_stablehlo(function: Callable, channels: int, dtype: str = 'uint8') -> jax.export.Exported:
    """Export `function` of B H W C for all PLATFORMS, with symbolic batch, height and width."""
    sizes = jax.export.symbolic_shape(
        'b, h, w', constraints=[f'h >= {SMALLEST}', f'w >= {SMALLEST}']
    )
    image = jax.ShapeDtypeStruct((*sizes, channels), dtype)
    try:
        return jax.export.export(compilation.jit(function), platforms=PLATFORMS)(image)
    except jax.core.InconclusiveDimensionOperation as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f'this network can not be exported for any size ({reason}): use --format=onnx'
        ) from error


def to_onnx(
    function: Callable,
    channels: int,
    size: tuple[int, int],
    metadata: dict[str, Any],
    dtype: str = 'uint8',
):
    """`onnx.ModelProto` of `function` for any batch size and one height and width."""
    (batch,) = jax.export.symbolic_shape('b')
    return onnx_graph.convert(
        function,
        jax.ShapeDtypeStruct((batch, *size, channels), dtype),
        input_name='image',
        output_name='probabilities',
        metadata={KEY: json.dumps(metadata)},
    )


def left_out(config) -> list[str]:
    """What `evaluate` and `predict` do around the network but no file does: 'key = value'."""
    usual = from_dict({})  # every default
    knobs = [('data', 'size'), *(('predict', key) for key in usual.predict)]
    return [
        f'{section}.{key} = {config[section][key]!r}'
        for section, key in knobs
        if config[section][key] != usual[section][key]
    ]


def describe(
    fmt: str, config, inputs: dict[str, Any], step: int, size: tuple[int, int], crf: str
) -> dict[str, Any]:
    """The metadata: input, output and origin of the file."""
    intensity = fixed_intensity(inputs)
    if measured_how(inputs) == 'buda':
        normalization = {
            'kind': 'buda',
            'how': 'the batch is one volume, measured as in pspnet_jax.data.volumes.measure_head',
        }
    elif intensity is None:
        normalization = {
            'kind': 'volume',
            'how': 'the batch is one volume, measured per channel: clipped to its 10th and 99th '
            'percentile, minus the mean of that, over its deviation (1 if that is 0)',
        }
    else:
        rows = ('low', 'high', 'mean', 'deviation')
        normalization = {'kind': 'fixed', **dict(zip(rows, intensity.tolist(), strict=True))}
    context = None
    if config.data.context:
        context = {
            'slices': config.data.context,
            'how': 'the batch is the slices of one volume in order: the network sees each slice '
            'with so many before and after it; the first and last slice are repeated',
        }
    trained = None
    if config.data.size:
        trained = {
            'height': config.data.size[0],
            'width': config.data.size[1],
            'fit': config.data.fit,
            'how': RESIZED[config.data.fit],
        }
    free = f'any from {SMALLEST}'
    height, width = size if fmt == 'onnx' else (free, free)
    return {
        'format': fmt,
        'pspnet_jax': VERSION,
        'jax': jax.__version__,
        'step': step,
        'model': config.model.name,
        'classes': config.model.num_classes,
        'input': {
            'name': 'image',
            'layout': 'B H W C',
            'dtype': input_type(inputs),
            'order': 'RGB',
        },
        'output': {'name': 'probabilities', 'layout': 'B H W K', 'dtype': 'float32'},
        'sizes': {
            'batch': 'any',
            'height': height,
            'width': width,
            'channels': inputs['channels'],
        },
        'trained_size': trained,
        'normalization': normalization,
        'context': context,
        'crf': crf,
        'inputs': inputs,
        'config': to_dict(without_paths(config)),
    }


def export_checkpoint(
    workdir: str | Path,
    fmt: str,
    *,
    output: str | Path = '',
    which: str = '',
    size: tuple[int, int] = (256, 256),
    crf: bool = True,
    dtype: str = 'float32',
) -> Path:
    """Write the file, read it back, compare it with the model, and then give it its name.

    `output` is the file, by default WORKDIR/ and the name in FILES. `size` is that of ONNX and of
    the compared images. Without `crf` the config's CRF is left out. `dtype` is that of the
    parameters in savedparams; 'float16' halves the file. Raises ExportError if the file computes
    something else, and then leaves no file.
    """
    if min(size) < SMALLEST:
        raise ConfigError(f'size {size[0]} x {size[1]} is too small: use at least {SMALLEST}')
    target = paths.local(output) if output else paths.writable(workdir, '--output') / FILES[fmt]
    run = open_run(workdir, which)
    config, model, variables, inputs = run.config, run.model, run.variables, run.inputs
    crf_options = settings.crf_options(config) | ({} if crf else {'kernel': 'none'})
    check_crf(fmt, crf_options['kernel'])
    if run.measured == 'buda' and fmt != 'savedparams':
        raise ConfigError(
            f"data.normalize 'buda' can not be exported as {fmt}: give --format=savedparams, or "
            'train with --config.data.normalize=volume'
        )
    if dtype != 'float32' and fmt != 'savedparams':
        raise ConfigError(f'--dtype={dtype} is only for savedparams, {fmt} has float32')
    if fmt == 'onnx':  # ONNX runtimes have no bfloat16 on CPUs
        model = models.create(**(config.model.to_dict() | {'dtype': 'float32'}))
    metadata = describe(fmt, config, inputs, run.step, size, crf_options['kernel'])
    metadata['left_out'] = left_out(with_choice(config, paths.local(workdir), run.step, {})[0])
    function = functools.partial(
        serve,
        variables=variables,
        model=model,
        intensity=run.intensity,
        crf_options=crf_options,
        context=run.context,
    )
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        with writing(target) as aside:
            if fmt == 'stablehlo':
                exported = to_stablehlo(function, inputs['channels'], input_type(inputs))
                program = exported.serialize()
                with zipfile.ZipFile(aside, 'w') as archive:
                    archive.writestr(PROGRAM, program)
                    archive.writestr(METADATA, json.dumps(metadata, indent=1))
            elif fmt == 'onnx':
                proto = to_onnx(function, inputs['channels'], size, metadata, input_type(inputs))
                aside.write_bytes(proto.SerializeToString())
            else:
                saved.write(aside, variables, metadata, dtype)
            predict, _ = READERS[fmt](aside)
            expect = functools.partial(
                reference,
                variables=variables,
                predict_fn=infer.compile_predict(model, crf_options=crf_options),
                intensity=run.intensity,
                measured=run.measured,
                context=run.context,
            )
            other = (size[0] * 3 // 4 + SMALLEST // 2, size[1]) if fmt == 'stablehlo' else size
            limit = max(TOLERANCE[dtype], TOLERANCE[jnp.dtype(model.dtype).name])
            batches = (2 + run.context, 1)
            print(compare(predict, expect, inputs, (size, other), limit, batches))
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # it was not created
                folder.rmdir()
        raise
    if metadata['left_out']:
        say(f'not in the file, so the caller must do it: {", ".join(metadata["left_out"])}')
    if trained := metadata['trained_size']:
        say(f'the network was trained at {trained["height"]}x{trained["width"]}: {trained["how"]}')
    return target


def check_crf(fmt: str, kernel: str) -> None:
    """Raise ConfigError for a CRF that the format can't hold."""
    if kernel == 'none' or fmt == 'savedparams':
        return
    if fmt == 'onnx' or kernel == 'exact':
        raise ConfigError(
            f'crf.kernel {kernel!r} can not be exported as {fmt} for any size: add --nocrf to '
            'export the network without it'
        )


def sample_images(channels: int, size: tuple[int, int], batch: int) -> np.ndarray:
    """B H W C uint8: blocks of random brightness, with noise."""
    rng = np.random.default_rng(0)
    H, W = size
    blocks = rng.integers(0, 220, (batch, -(-H // 16), -(-W // 16), channels))
    blocks = blocks.repeat(16, axis=1).repeat(16, axis=2)[:, :H, :W]
    return (blocks + rng.integers(0, 36, blocks.shape)).astype(np.uint8)


def compare(
    predict: Predict,
    expect: Predict,
    inputs: dict[str, Any],
    sizes,
    limit: float,
    batches: tuple[int, int] = (2, 1),
) -> str:
    """A line with the largest difference over two batches, one per size.

    Raises ExportError if it is above the limit.
    """
    worst, differing, pixels, shapes = 0.0, 0, 0, []
    for batch, (H, W) in zip(batches, sizes, strict=True):
        image = sample_images(inputs['channels'], (H, W), batch)
        if 'range' in inputs:
            low, high = np.array(inputs['range'])
            image = (low + (high - low) * image / 255).astype(np.float32)
        got, expected = predict(image), expect(image)
        if got.shape != expected.shape:
            raise ExportError(f'the file gives {got.shape}, but the model {expected.shape}')
        worst = max(worst, float(np.abs(got - expected).max()))
        differing += int((got.argmax(-1) != expected.argmax(-1)).sum())
        pixels += batch * H * W
        shapes.append(f'{batch} x {H} x {W}')
    if not worst <= limit:  # NaN too
        raise ExportError(
            f'the file does not compute the same as the model: probabilities differ by '
            f'{worst:.1e}, the limit is {limit:.0e}; nothing was written'
        )
    return (
        f'read back and compared on {" and ".join(shapes)}: probabilities differ by at most '
        f'{worst:.1e}, {differing} of {pixels} labels differ'
    )
