"""A checkpoint's score: per patient first, then over patients.

  python -m pspnet_jax.evaluate --workdir=RUN --split=test
  python -m pspnet_jax.evaluate --workdir=RUN --data=FOLDER

The figure to quote is Dice over the whole volume of a patient, its mean, median and
deviation over patients. Per-slice and pooled figures stand under those names only,
beside the baseline that calls everything background.
"""

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from pspnet_jax import checkpoint, cli, infer, metrics, models, postprocess, visualize
from pspnet_jax.config import from_dict, to_dict, with_prediction
from pspnet_jax.data import lgg, pipeline, sources, splits, volumes
from pspnet_jax.data.volumes import Volume
from pspnet_jax.errors import DataError
from pspnet_jax.models.published import fixed_intensity

PredictFn = Callable[[np.ndarray], np.ndarray]  # B H W C normalised -> B H W K probabilities


def predict_volume(
    predict_fn: PredictFn,
    volume: Volume,
    *,
    batch_size: int,
    intensity: np.ndarray | None,
    threshold: float | None = None,
    **clean_options: Any,
) -> np.ndarray:
    """D H W uint8 labels; `threshold` and `clean_options` as `postprocess` has them."""
    batches = pipeline.eval_batches(volume, batch_size, intensity)
    labels = [postprocess.to_labels(np.asarray(predict_fn(batch)), threshold) for batch in batches]
    return postprocess.clean(np.concatenate(labels)[: len(volume.image)], **clean_options)


def program_options(config) -> dict[str, Any]:
    """The keyword arguments of `infer.compile_predict` that a config decides."""
    predict = config.predict
    return {
        'size': config.data.size,
        'window': predict.window,
        'overlap': predict.overlap,
        'batch_size': config.eval.batch_size,
        'scales': predict.scales,
        'flip': predict.flip,
        'crf_options': config.crf.to_dict(),
    }


def label_options(config) -> dict[str, Any]:
    """Those of `predict_volume`: what is made of the probabilities."""
    predict = config.predict
    return {
        'threshold': predict.threshold,
        'largest_component': predict.largest_component,
        'min_size': predict.min_size,
    }


def evaluate_options(config) -> dict[str, Any]:
    """The keyword arguments of `evaluate_volumes` that a config decides."""
    return {
        'batch_size': config.eval.batch_size,
        'num_classes': config.model.num_classes,
        'ignore_label': config.loss.ignore_label,
        'spacing': config.eval.spacing,
        'bootstrap': config.eval.bootstrap,
    }


def evaluate_volumes(
    predict_fn: PredictFn,
    data: Iterable[Volume],
    *,
    batch_size: int,
    intensity: np.ndarray | None,
    num_classes: int,
    ignore_label: int,
    spacing: tuple[float, float, float],
    bootstrap: int,
    label_options: Mapping[str, Any] = MappingProxyType({}),
    each: Callable[[Volume, np.ndarray], None] = lambda volume, pred: None,
) -> dict[str, Any]:
    """{'summary', 'patients', 'baseline', 'data'} over volumes, read one at a time.

    With more than two classes a patient's figure is the mean over the structures
    1..K-1. Undefined figures are None, and `n` says over how many patients a mean is.
    `label_options` are further ones of `predict_volume`.
    `each(volume, labels_DHW)` is called with every prediction. Raises DataError for
    labels outside 0..K-1, and when there is no volume.
    """
    patients, per_slice, per_slice_empty = [], [], []
    for volume in data:
        wrong = np.setdiff1d(volume.mask, [*range(num_classes), ignore_label])
        if wrong.size:
            raise DataError(
                f'{volume.patient} has labels {wrong.tolist()}, the model has classes 0 to '
                f'{num_classes - 1}: map them or train with model.num_classes={wrong.max() + 1}'
            )
        pred = predict_volume(
            predict_fn, volume, batch_size=batch_size, intensity=intensity, **label_options
        )
        each(volume, pred)
        patients.append(_patient_row(pred, volume, num_classes, ignore_label, spacing))
        for labels, truth in zip(pred, volume.mask, strict=True):
            per_slice.append(metrics.counts(labels, truth, num_classes, ignore_label))
            background = np.zeros_like(labels)
            per_slice_empty.append(metrics.counts(background, truth, num_classes, ignore_label))
    if not patients:
        raise DataError('there is no volume to evaluate: the split is empty')
    names = ('dice', 'dice_largest', 'iou', 'sensitivity', 'precision', 'hd95')
    empty = np.sum(per_slice_empty, axis=0)
    return {
        'summary': {name: _over_patients(patients, name, bootstrap) for name in names}
        | {
            'per_slice_dice_empty_is_1': _slice_dice(per_slice),
            'pooled': _structures(metrics.ratios(np.sum(per_slice, axis=0))),
        },
        'patients': patients,
        'baseline': {
            'prediction': 'all background',
            'dice': 0.0,
            'per_slice_dice_empty_is_1': _slice_dice(per_slice_empty),
            'pooled_pixel_accuracy': float(empty[:, 0].sum() / empty[:, [0, 2]].sum()),
            'pooled_mean_iou': float(np.nanmean(metrics.ratios(empty)['iou'])),
        },
        'data': {
            'patients': len(patients),
            'slices': len(per_slice),
            'lesion_slices': sum(bool(c[1:, [0, 2]].sum()) for c in per_slice),
            'hd95_unit': f'steps of (slice, row, column) = {tuple(spacing)}',
        },
    }


def _patient_row(pred, volume, num_classes, ignore_label, spacing) -> dict[str, Any]:
    """One patient's figures, means over the structures."""
    largest, hd95 = np.zeros_like(pred), []
    for label in range(1, num_classes):
        largest[metrics.largest_component(pred == label)] = label
        counted = volume.mask != ignore_label
        hd95.append(metrics.hd95((pred == label) & counted, volume.mask == label, spacing))
    count = metrics.counts(pred, volume.mask, num_classes, ignore_label)
    largest_count = metrics.counts(largest, volume.mask, num_classes, ignore_label)
    return {
        'patient': volume.patient,
        **_structures(metrics.ratios(count)),
        'dice_largest': _structures(metrics.ratios(largest_count))['dice'],
        'hd95': _mean(hd95),
        'slices': len(pred),
        'lesion_voxels': int(count[1:, [0, 2]].sum()),
        'predicted_voxels': int(count[1:, [0, 1]].sum()),
    }


def _structures(ratios: dict[str, np.ndarray]) -> dict[str, float | None]:
    """(K,) ratios -> mean over the structures 1..K-1; None where all are undefined."""
    return {name: _mean(values[1:]) for name, values in ratios.items()}


def _mean(values) -> float | None:
    values = np.array([np.nan if v is None else v for v in values], np.float64)
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _slice_dice(counts: Sequence[np.ndarray]) -> float:
    """Mean over slices, where an empty slice that is predicted empty counts 1."""
    return float(np.nan_to_num(metrics.ratios(np.stack(counts))['dice'][:, 1:], nan=1.0).mean())


def _over_patients(patients, name: str, bootstrap: int) -> dict[str, Any]:
    values = np.array([np.nan if p[name] is None else p[name] for p in patients], np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return {'mean': None, 'median': None, 'sd': None, 'ci95': None, 'n': 0}
    return {
        'mean': float(values.mean()),
        'median': float(np.median(values)),
        'sd': float(values.std(ddof=1)) if len(values) > 1 else None,
        'ci95': metrics.bootstrap_ci(values, resamples=bootstrap),
        'n': len(values),
    }


def restore_model(workdir: str | Path, which: str = ''):
    """(config, module, variables, intensity, step) of a training run's checkpoint folder alone.

    `which` is 'best', 'last' or a step; '' takes the config's `eval.checkpoint`.
    """
    step = checkpoint.choose(workdir, which or 'last')
    meta = checkpoint.metadata(workdir, step)
    config = from_dict(meta['config'])
    if not which:
        step = checkpoint.choose(workdir, config.eval.checkpoint)
    model = models.create(**config.model)
    image = jax.ShapeDtypeStruct((1, 64, 64, meta['inputs']['channels']), jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)
    variables = checkpoint.restore_variables(workdir, step, shapes)
    return config, model, variables, fixed_intensity(meta['inputs']), step


def evaluate_checkpoint(
    workdir: str | Path,
    *,
    split: str = 'test',
    data: str = '',
    which: str = '',
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Evaluate; write WORKDIR/evaluation.json and pictures; print the table.

    `data` is a folder in the Kaggle layout; without it, the patients of `split` in the
    data set that the run was trained on. `changes` are to the config's `predict` section;
    evaluation.json has the config as it was used. Returns what it holds.
    """
    config, model, variables, intensity, step = restore_model(workdir, which)
    config = with_prediction(config, changes)
    if data:
        source = lgg.read_volumes(data)
    else:
        kept = Path(workdir) / splits.KEPT
        slices, parts = sources.load(config, kept if kept.exists() else '')
        if not parts[split]:
            raise DataError(f'the split {split!r} has no patient in this data set')
        source = volumes.iterate_volumes(volumes.select(slices, parts[split]))
    folder = Path(workdir) / 'pictures'
    folder.mkdir(exist_ok=True)

    def save_picture(volume: Volume, pred: np.ndarray) -> None:
        picture = visualize.volume_picture(volume, pred)
        Image.fromarray(picture).save(folder / f'{volume.patient}.png')

    result = evaluate_volumes(
        functools.partial(
            infer.compile_predict(model, **program_options(config)), jax.device_put(variables)
        ),
        source,
        intensity=intensity,
        **evaluate_options(config),
        label_options=label_options(config),
        each=save_picture,
    )
    result['data'] |= {'source': data or config.data.name, 'split': '' if data else split}
    result['checkpoint'] = {'step': step, 'config': to_dict(config)}
    path = Path(workdir) / 'evaluation.json'
    aside = path.with_suffix('.tmp')
    aside.write_text(json.dumps(result, indent=1, allow_nan=False) + '\n')
    os.replace(aside, path)
    print(table(result))
    print(f'written to {path}; pictures in {folder}')
    return result


def table(result: dict[str, Any]) -> str:
    """What a person reads: a row a patient, then the summary and the baseline."""

    def cell(value, digits=3):
        return '-' if value is None else f'{value:.{digits}f}'

    columns = ('dice', 'dice_largest', 'iou', 'sensitivity', 'precision', 'hd95')
    wide = max(len('patient'), *(len(p['patient']) for p in result['patients']))
    head = f'{"patient":{wide}} ' + ' '.join(f'{c:>12}' for c in columns) + f' {"voxels":>9}'
    lines = [head, '-' * len(head)]
    for p in result['patients']:
        cells = ' '.join(f'{cell(p[c]):>12}' for c in columns)
        lines.append(f'{p["patient"]:{wide}} {cells} {p["lesion_voxels"]:>9,}')
    lines.append('-' * len(head))
    for statistic in ('mean', 'median', 'sd'):
        cells = ' '.join(f'{cell(result["summary"][c][statistic]):>12}' for c in columns)
        lines.append(f'{statistic:{wide}} {cells}')
    dice, baseline = result['summary']['dice'], result['baseline']
    low, high = dice['ci95'] or (None, None)
    hd95 = result['summary']['hd95']
    lines += [
        f'per-volume Dice {cell(dice["mean"])}, 95 % interval {cell(low)} to {cell(high)} '
        f'(bootstrap over {dice["n"]} of {len(result["patients"])} patients); '
        f'HD95 over {hd95["n"]} of {len(result["patients"])}',
        f'pooled Dice {cell(result["summary"]["pooled"]["dice"])}; per-slice Dice with empty = 1 '
        f'{cell(result["summary"]["per_slice_dice_empty_is_1"])}',
        f'all background: per-volume Dice {cell(baseline["dice"])}, per-slice with empty = 1 '
        f'{cell(baseline["per_slice_dice_empty_is_1"])}, '
        f'pixel accuracy {cell(baseline["pooled_pixel_accuracy"])}, '
        f'mean IoU {cell(baseline["pooled_mean_iou"])}',
    ]
    return '\n'.join(lines)


def main() -> None:
    options = flags.FLAGS
    evaluate_checkpoint(
        options.workdir,
        split=options.split,
        data=options.data,
        which=options.checkpoint,
        changes=cli.prediction_changes(),
    )


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'folder of a training run', required=True)
    flags.DEFINE_enum('split', 'test', ['train', 'validation', 'test'], 'whose patients')
    flags.DEFINE_string('data', '', 'instead: a folder in the Kaggle layout')
    flags.DEFINE_string('checkpoint', '', "'best', 'last' or a step; '': as the config says")
    cli.define_prediction_flags()
    cli.run(main)
