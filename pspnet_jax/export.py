"""A checkpoint as one file that serves without this package.

  python -m pspnet_jax.export --workdir=RUN --format=stablehlo|onnx|savedparams

  stablehlo     model.stablehlo.zip: for jax.export on CPU, CUDA and TPU, any batch, height and
                width; metadata.json is beside it in the archive
  onnx          model.onnx: for onnxruntime and others, any batch, the height and width of --size
  savedparams   model.safetensors: parameters and statistics by name, for `read` here and for
                anyone with numpy

The first two take uint8 RGB and give probabilities, the normalisation is inside: with a fixed
one each image is alone, with each volume's own the batch is one volume. With data.context the
batch is always one volume, its slices in turn, and neighbours are stacked inside. A run with one
scale for images that are not of 8 bits takes float32, in the images' own unit. Metadata is JSON
under 'pspnet_jax'. Each file is read again and compared with the model before it is there.
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
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict

import pspnet_jax
from pspnet_jax import (
    checkpoint,
    cli,
    compilation,
    evaluate,
    infer,
    models,
    onnx_graph,
    paths,
    stablehlo,
)
from pspnet_jax.config import from_dict, to_dict
from pspnet_jax.data import files, volumes
from pspnet_jax.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    PspnetError,
    first_line,
    say,
)
from pspnet_jax.evaluate import with_choice
from pspnet_jax.models.pretrained import check_archive
from pspnet_jax.models.published import fixed_intensity, measured_how
from pspnet_jax.runs import abstract_variables, open_run

FILES = {
    'stablehlo': 'model.stablehlo.zip',
    'onnx': 'model.onnx',
    'savedparams': 'model.safetensors',
}
PLATFORMS = ('cpu', 'cuda', 'tpu')
SMALLEST = 32  # pixels a side: the deepest features have at least a cell
TOLERANCE = {'float32': 1e-4, 'bfloat16': 3e-2}  # of a probability: other forms round otherwise
PROGRAM, METADATA = 'model.stablehlo', 'metadata.json'  # in the archive
KEY = 'pspnet_jax'  # of the metadata in the other formats
MOST_TEXT = 2**22  # of the metadata
CRF_KERNELS = ('none', 'exact', 'windowed')

Predict = Callable[[np.ndarray], np.ndarray]  # B H W C uint8 -> B H W K probabilities


# ---- the exported function ----------------------------------------------------------------


def measure_intensity(image_BHWC: jax.Array) -> jax.Array:
    """`data.volumes.measure_intensity` of a uint8 volume, in the graph: (4, C) float32.

    All of it follows from how often each of 256 values occurs, so nothing is sorted and no
    long sum is rounded: percentiles are exact to the last bit but one.
    """
    C = image_BHWC.shape[-1]
    cells = image_BHWC.reshape(-1, C).astype(jnp.int32) + 256 * jnp.arange(C)[None]
    counts = jnp.zeros(256 * C, jnp.int32).at[cells.reshape(-1)].add(1, mode='promise_in_bounds')
    counts_C256 = counts.reshape(C, 256)
    up_to_C256 = jnp.cumsum(counts_C256, axis=1)
    count = up_to_C256[:1, -1]  # pixels, (1,)

    def percentile(q: int) -> jax.Array:
        """(C,), linear between neighbours; q (count - 1) / 100 by whole numbers."""
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

    With `context` the batch is the slices of one scan in turn, `data.volumes.neighbours` of which
    are stacked here.
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
    """B H W (2 context + 1)C, of a batch of any size."""
    B = image_BHWC.shape[0]
    first, last = (jax.lax.slice_in_dim(image_BHWC, n, n + 1) for n in (0, B - 1))
    longer = jnp.concatenate([first] * context + [image_BHWC] + [last] * context)
    parts = [jax.lax.slice_in_dim(longer, n, B + n) for n in range(2 * context + 1)]
    return jnp.concatenate(parts, axis=-1)


def reference(
    image_BHWC: np.ndarray,
    *,
    variables,
    predict_fn,
    intensity: np.ndarray | None,
    measured: str,
    context: int = 0,
) -> np.ndarray:
    """The same as `evaluate` and `predict` have it: measured, normalised and stacked by numpy."""
    if intensity is None:
        intensity = volumes.measure([image_BHWC], measured)
    else:
        volumes.check_kind(image_BHWC, intensity, 'the image')
    rows_Bn = volumes.neighbours(None, len(image_BHWC), context)
    image_BHWC = volumes.stack(volumes.normalize(image_BHWC, intensity), rows_Bn)
    return predict_fn(variables, image_BHWC)


# ---- writing ------------------------------------------------------------------------------


def input_type(inputs: dict[str, Any]) -> str:
    """Of the images that a network with these 'inputs' of a checkpoint is exported for."""
    return 'float32' if 'range' in inputs else 'uint8'


def to_stablehlo(function: Callable, channels: int, dtype: str = 'uint8') -> jax.export.Exported:
    """`function` of B H W C for all PLATFORMS, its batch, height and width symbols."""
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
    """`onnx.ModelProto` of `function` for any batch of one height and width."""
    (batch,) = jax.export.symbolic_shape('b')
    return onnx_graph.convert(
        function,
        jax.ShapeDtypeStruct((batch, *size, channels), dtype),
        input_name='image',
        output_name='probabilities',
        metadata={KEY: json.dumps(metadata)},
    )


def left_out(config) -> list[str]:
    """What `evaluate` and `predict` do around the network that no file does, 'knob = value'."""
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
    """The metadata: what goes in and comes out, and what made it."""
    intensity = fixed_intensity(inputs)
    if measured_how(inputs) == 'buda':
        normalization = {
            'kind': 'buda',
            'how': 'the batch is one volume, measured as pspnet_jax.data.volumes.measure_head says',
        }
    elif intensity is None:
        normalization = {
            'kind': 'volume',
            'how': 'the batch is one volume, measured by channel: clipped to its 10th and 99th '
            'percentile, minus the mean of that, over its deviation (1 where that is 0)',
        }
    else:
        rows = ('low', 'high', 'mean', 'deviation')
        normalization = {'kind': 'fixed', **dict(zip(rows, intensity.tolist(), strict=True))}
    context = None
    if config.data.context:
        context = {
            'slices': config.data.context,
            'how': 'the batch is the slices of one volume in turn: the network sees each with so '
            'many before and behind it, where there are fewer the first and last again',
        }
    free = f'any from {SMALLEST}'
    height, width = size if fmt == 'onnx' else (free, free)
    return {
        'format': fmt,
        'pspnet_jax': pspnet_jax.__version__,
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
        'normalization': normalization,
        'context': context,
        'crf': crf,
        'inputs': inputs,
        'config': to_dict(config),
    }


def export_checkpoint(
    workdir: str | Path,
    fmt: str,
    *,
    output: str | Path = '',
    which: str = '',
    size: tuple[int, int] = (256, 256),
    crf: bool = True,
) -> Path:
    """Write the file, read it again, compare it with the model; only then it has its name.

    `output` is the file, WORKDIR/ and the name in FILES if empty; `size` that of ONNX and of the
    images compared; without `crf` the config's CRF is left out. Raises ExportError where the file
    computes something else, and leaves nothing.
    """
    if min(size) < SMALLEST:
        raise ConfigError(f'size {size[0]} x {size[1]} is too small: {SMALLEST} x {SMALLEST} is')
    target = paths.local(output) if output else paths.local(workdir) / FILES[fmt]
    run = open_run(workdir, which)
    config, model, variables, inputs = run.config, run.model, run.variables, run.inputs
    crf_options = evaluate.crf_options(config) | ({} if crf else {'kernel': 'none'})
    check_crf(fmt, crf_options['kernel'])
    if run.measured == 'buda' and fmt != 'savedparams':
        raise ConfigError(
            f"data.normalize 'buda' has no form in {fmt}: give --format=savedparams, or train with "
            '--config.data.normalize=volume'
        )
    if fmt == 'onnx':  # whose runtimes have no bfloat16 on CPUs
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
        with files.writing(target) as aside:
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
                _write_params(aside, variables, metadata)
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
            limit = TOLERANCE[jnp.dtype(model.dtype).name]
            batches = (2 + run.context, 1)
            print(compare(predict, expect, inputs, (size, other), limit, batches))
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # it could not be made
                folder.rmdir()
        raise
    if metadata['left_out']:
        say(f'not in the file, the caller has to do it: {", ".join(metadata["left_out"])}')
    return target


def check_crf(fmt: str, kernel: str) -> None:
    """Raise ConfigError for a CRF that the format can't hold."""
    if kernel == 'none' or fmt == 'savedparams':
        return
    if fmt == 'onnx' or kernel == 'exact':
        raise ConfigError(
            f'crf.kernel {kernel!r} has no form in {fmt} for every size: export the network '
            'without it by --nocrf'
        )


def _write_params(path: Path, variables: dict[str, Any], metadata: dict[str, Any]) -> None:
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(x) for name, x in flatten_dict(variables, sep='/').items()}
    path.write_bytes(save(arrays, metadata={KEY: json.dumps(metadata)}))


def sample_images(channels: int, size: tuple[int, int], batch: int) -> np.ndarray:
    """B H W C uint8: blocks of every brightness, with noise."""
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
    """A line with the largest difference over two batches, of each size in turn.

    Raises ExportError where it is above the limit.
    """
    worst, differing, pixels, shapes = 0.0, 0, 0, []
    for batch, (H, W) in zip(batches, sizes, strict=True):
        image = sample_images(inputs['channels'], (H, W), batch)
        if 'range' in inputs:
            low, high = np.array(inputs['range'])
            image = (low + (high - low) * image / 255).astype(np.float32)
        got, expected = predict(image), expect(image)
        if got.shape != expected.shape:
            raise ExportError(f'the file gives {got.shape} where the model gives {expected.shape}')
        worst = max(worst, float(np.abs(got - expected).max()))
        differing += int((got.argmax(-1) != expected.argmax(-1)).sum())
        pixels += batch * H * W
        shapes.append(f'{batch} x {H} x {W}')
    if not worst <= limit:  # NaN too
        raise ExportError(
            f'the file computes something else than the model: probabilities differ by '
            f'{worst:.1e}, the limit is {limit:.0e}; nothing was written'
        )
    return (
        f'read again and compared on {" and ".join(shapes)}: probabilities differ by at most '
        f'{worst:.1e}, {differing} of {pixels} labels differ'
    )


# ---- reading ------------------------------------------------------------------------------


def read_stablehlo(path: str | Path) -> tuple[Predict, dict[str, Any]]:
    """(predict, metadata). Raises ExportError for another file."""
    path = _file(path)
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            program, metadata = archive.read(PROGRAM), _metadata(archive.read(METADATA))
        exported = jax.export.deserialize(bytearray(program))
        stablehlo.check(bytes(exported.mlir_module_serialized))
    except ExportError as error:
        raise ExportError(f'{path}: {error}') from error
    except PspnetError:
        raise
    except Exception as error:  # of zipfile, flatbuffers and MLIR each its own
        raise ExportError(f'{path} is no exported StableHLO: export it again') from error
    predict = compilation.jit(exported.call)
    return (lambda image: np.asarray(predict(image))), metadata


def _file(path: str | Path) -> Path:
    """Raises ExportError for what is no file: a pipe would be waited for."""
    if not Path(path).is_file():
        raise ExportError(f'{path} is not a file')
    return Path(path)


def _metadata(text: str | bytes) -> dict[str, Any]:
    found = json.loads(text[:MOST_TEXT])
    if not isinstance(found, dict):
        raise ValueError(f'metadata is {found!r:.80}')
    return found


def read_onnx(path: str | Path) -> tuple[Predict, dict[str, Any]]:
    """(predict, metadata), on the CPU. Raises ExportError for another file."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(onnx_graph.NEED) from error
    path = _file(path)
    try:
        session = onnxruntime.InferenceSession(
            path.read_bytes(),  # from bytes, other files are out of its reach
            providers=['CPUExecutionProvider'],
            disabled_optimizers=['ConstantFolding'],  # it would compute, of whatever size
        )
        metadata = _metadata(session.get_modelmeta().custom_metadata_map[KEY])
    except Exception as error:  # onnxruntime's kinds share no base but this
        reason = first_line(error)
        raise ExportError(f'{path} is not read by onnxruntime: {reason}') from error
    return (lambda image: session.run(None, {'image': image})[0]), metadata


def read_params(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(variables, metadata) of a savedparams file, of numpy arrays: strict.

    Raises CheckpointError where an array that the config's network has is missing, has
    another shape, or is one too many.
    """
    from safetensors import safe_open

    path = _file(path)
    try:
        with safe_open(path, 'numpy') as file:
            metadata = _metadata(file.metadata()[KEY])
            config = from_dict(metadata['config'])
            checkpoint.check_inputs(metadata['inputs'], path)
            if metadata['crf'] not in CRF_KERNELS:
                raise ValueError('crf')
            seen = volumes.channels_seen(metadata['inputs']['channels'], config.data.context)
            shapes = _shapes(config, seen)
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
            if any(array.dtype != np.float32 for array in arrays.values()):
                raise ValueError('dtype')
    except PspnetError:
        raise
    except Exception as error:  # of safetensors, JSON and a stranger's types each its own
        raise CheckpointError(f'{path} is no exported savedparams: export it again') from error
    return unflatten_dict(arrays, sep='/'), metadata


def _shapes(config, channels: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all that the config's network has."""
    tree = abstract_variables(models.create(**config.model), channels)
    return {name: leaf.shape for name, leaf in flatten_dict(tree, sep='/').items()}


def read_savedparams(path: str | Path) -> tuple[Predict, dict[str, Any]]:
    """(predict, metadata): the network of `read_params`, as `predict` runs it."""
    variables, metadata = read_params(path)
    config = from_dict(metadata['config'])
    crf_options = evaluate.crf_options(config) | {'kernel': metadata['crf']}
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
    """(predict, metadata) of an exported file of any format, by the end of its name."""
    for fmt, name in FILES.items():
        if str(path).endswith(name.removeprefix('model')):
            return READERS[fmt](path)
    raise ExportError(f'{path} has none of the names {", ".join(FILES.values())}')


def main() -> None:
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
    )
    say(f'written to {path}')


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'folder of a training run', required=True)
    flags.DEFINE_enum('format', None, list(FILES), 'of the file', required=True)
    flags.DEFINE_string('output', '', "the file; '': in the workdir")
    flags.DEFINE_string('checkpoint', '', "'best', 'last' or a step; '': as the config says")
    flags.DEFINE_list('size', ['256', '256'], 'HEIGHT,WIDTH of ONNX, and of what is compared')
    flags.DEFINE_boolean('crf', True, "the config's CRF behind the network")
    cli.run(main)
