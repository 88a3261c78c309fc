"""A checkpoint's score: per patient first, then over patients.

  python -m pspnet_jax.evaluate --workdir=RUN --split=test
  python -m pspnet_jax.evaluate --workdir=RUN --data=FOLDER
  python -m pspnet_jax.evaluate --workdir=RUN --split=validation --fit_temperature

The figure to quote is Dice over the whole volume of a patient, its mean, median and
deviation over patients. Per-slice and pooled figures stand under those names only,
beside the baseline that calls everything background.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from pspnet_jax import (
    calibration,
    checkpoint,
    cli,
    hosts,
    infer,
    metrics,
    models,
    postprocess,
    report,
    visualize,
)
from pspnet_jax.config import from_dict, to_dict, with_prediction
from pspnet_jax.data import files, pipeline, sources, splits, volumes
from pspnet_jax.data.volumes import IGNORE_LABEL, Volume
from pspnet_jax.errors import ConfigError, DataError, first_line
from pspnet_jax.models.published import fixed_intensity

PredictFn = Callable[[np.ndarray], np.ndarray]  # B H W C normalised -> B H W K probabilities
FIT_VOXELS = 50_000  # of each validation patient that the temperature is fitted on


def predict_slices(
    predict_fn: PredictFn, volume: Volume, *, batch_size: int, intensity: np.ndarray | None
) -> Iterator[np.ndarray]:
    """n H W K probabilities, batch by batch: of all D slices in order, and of no padding."""
    left = len(volume.image)
    for batch in pipeline.eval_batches(volume, batch_size, intensity):
        yield np.asarray(predict_fn(batch))[:left]
        left -= len(batch)


def predict_foreground(
    predict_fn: PredictFn,
    volume: Volume,
    *,
    batch_size: int,
    intensity: np.ndarray | None,
    temperature: float = 1.0,
    threshold: float | None = None,
    **clean_options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """D H W uint8 labels, and D H W float32: the probability of any class but 0.

    `threshold` and `clean_options` as `postprocess` has them. The temperature is the
    probability's alone: labels are those without.
    """
    labels, foreground = [], []
    parts = predict_slices(predict_fn, volume, batch_size=batch_size, intensity=intensity)
    for prob in parts:
        labels.append(postprocess.to_labels(prob, threshold))
        foreground.append(calibration.temper(prob, temperature)[..., 1:].sum(-1))
    return postprocess.clean(np.concatenate(labels), **clean_options), np.concatenate(foreground)


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
    """Those of `predict_foreground`: what is made of the probabilities."""
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
        'surface_tolerance': config.eval.surface_tolerance,
        'lesion_options': {
            'dilation': config.eval.lesion_dilation,
            'smallest': config.eval.lesion_smallest,
        },
        'calibration_bins': config.eval.calibration_bins,
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
    surface_tolerance: float,
    lesion_options: Mapping[str, Any],
    calibration_bins: int,
    bootstrap: int,
    temperature: float = 1.0,
    label_options: Mapping[str, Any] = MappingProxyType({}),
    each: Callable[[Volume, np.ndarray], None] = lambda volume, pred: None,
    order: Sequence[str] = (),
) -> dict[str, Any]:
    """{'summary', 'patients', 'baseline', 'calibration', 'data'} over volumes, one at a time.

    With more than two classes a patient's figure is the mean over the structures
    1..K-1. Distances are in mm where a volume has its spacing, else in `spacing`'s unit.
    Undefined figures are None, and `n` says over how many patients a mean is.
    Calibration is of the probability of any class but 0, over all counted voxels.
    `label_options` are further ones of `predict_foreground`, `lesion_options` those of
    `metrics.lesions`.
    `each(volume, labels_DHW)` is called with every prediction. On several hosts `data` are
    this one's volumes and `order` the patients of all, and the figures are of all. Raises
    DataError for labels outside 0..K-1, and when there is no volume.
    """
    rows = []
    for volume in data:
        _check_labels(volume, num_classes, ignore_label)
        pred, foreground = predict_foreground(
            predict_fn,
            volume,
            batch_size=batch_size,
            intensity=intensity,
            temperature=temperature,
            **label_options,
        )
        each(volume, pred)
        counted = volume.mask != ignore_label
        calibrated = metrics.calibration_counts(
            foreground[counted], volume.mask[counted] > 0, calibration_bins
        )
        per_slice, empty = (
            [
                metrics.counts(labels, truth, num_classes, ignore_label).tolist()
                for labels, truth in zip(predicted, volume.mask, strict=True)
            ]
            for predicted in (pred, np.zeros_like(pred))
        )
        figures = _patient_row(
            pred,
            volume,
            num_classes,
            ignore_label,
            volume.spacing or spacing,
            surface_tolerance,
            lesion_options,
        )
        in_mm = volume.spacing is not None
        rows.append([figures, per_slice, empty, np.asarray(calibrated).tolist(), in_mm])
    rows = in_order(hosts.gather(rows), order)
    if not rows:
        raise DataError('there is no volume to evaluate: the split is empty')
    patients, per_slice, per_slice_empty, calibrated, in_mm = zip(*rows, strict=True)
    patients, calibrated = list(patients), np.sum(calibrated, axis=0)
    per_slice, per_slice_empty = (
        np.array([counts for counts_of_one in part for counts in counts_of_one])
        for part in (per_slice, per_slice_empty)
    )
    if not calibrated.any():
        raise DataError(f'every voxel is labelled {ignore_label}, to be ignored: nothing to score')
    names = (
        'dice', 'dice_largest', 'iou', 'sensitivity', 'precision', 'hd95', 'assd', 'surface_dice',
        'lesion_dice', 'lesion_f1',
    )  # fmt: skip
    pooled, empty = np.sum(per_slice, axis=0), np.sum(per_slice_empty, axis=0)
    steps = f'steps of (slice, row, column) = {tuple(spacing)}'
    if any(in_mm):
        steps = f'mm where the file says its spacing, else {steps}'
    return {
        'summary': {name: _over_patients(patients, name, bootstrap) for name in names}
        | {
            'per_slice_dice_empty_is_1': _slice_dice(per_slice),
            'lesions': {
                what: sum(p[f'lesions_{what}'] for p in patients)
                for what in ('found', 'missed', 'false')
            },
            'pooled': _structures(metrics.ratios(pooled)),
            'pooled_pixel_accuracy': _accuracy(pooled),
            **metrics.pooled_iou(pooled),
        },
        'patients': patients,
        'baseline': {
            'prediction': 'all background',
            'dice': 0.0,
            'per_slice_dice_empty_is_1': _slice_dice(per_slice_empty),
            'pooled_pixel_accuracy': _accuracy(empty),
            'pooled_mean_iou': float(np.nanmean(metrics.ratios(empty)['iou'])),
            **metrics.pooled_iou(empty),
        },
        'calibration': {
            'of': 'the probability of any class but 0, over all counted voxels',
            'temperature': temperature,
            'expected_calibration_error': metrics.expected_calibration_error(calibrated),
            'bins': _calibration_bins(calibrated),
        },
        'data': {
            'patients': len(patients),
            'slices': len(per_slice),
            'lesion_slices': sum(bool(c[1:, [0, 2]].sum()) for c in per_slice),
            'hd95_unit': 'mm' if all(in_mm) else steps,
            'spacing': list(spacing),
            'surface_tolerance': surface_tolerance,
            'lesion_options': dict(lesion_options),
        },
    }


def in_order(rows: Sequence[Any], order: Sequence[str]) -> list[Any]:
    """Rows as one host has them: by the place of their patients in `order`, if there is one."""
    place = {name: n for n, name in enumerate(order)}

    def key(row) -> int:
        name = row[0]['patient']  # or 'NAME 32x40', where its slices have several sizes
        return place[name if name in place else name.rsplit(' ', 1)[0]]

    return sorted(rows, key=key) if order else list(rows)


def _check_labels(volume: Volume, num_classes: int, ignore_label: int) -> None:
    wrong = np.setdiff1d(volume.mask, [*range(num_classes), ignore_label])
    if wrong.size:
        raise DataError(
            f'{volume.patient} has labels {wrong.tolist()}, the model has classes 0 to '
            f'{num_classes - 1}: map them or train with model.num_classes={wrong.max() + 1}'
        )


def _patient_row(
    pred, volume, num_classes, ignore_label, spacing, surface_tolerance, lesion_options
) -> dict[str, Any]:
    """One patient's figures, means over the structures."""
    largest, surfaces, lesions = np.zeros_like(pred), [], []
    counted = volume.mask != ignore_label
    for label in range(1, num_classes):
        largest[metrics.largest_component(pred == label)] = label
        masks = (pred == label) & counted, volume.mask == label
        lesions.append(metrics.lesions(*masks, spacing, **lesion_options))
        distances = metrics.surface_distances(*masks, spacing)
        surfaces.append(metrics.surface_ratios(distances, surface_tolerance))
    count = metrics.counts(pred, volume.mask, num_classes, ignore_label)
    largest_count = metrics.counts(largest, volume.mask, num_classes, ignore_label)
    by_lesion = [metrics.lesion_ratios(counted) for counted in lesions]
    hits = [int(found.sum()) for _, found, _ in lesions]
    return {
        'patient': volume.patient,
        **_structures(metrics.ratios(count)),
        'dice_largest': _structures(metrics.ratios(largest_count))['dice'],
        **{name: _mean([ratios[name] for ratios in surfaces]) for name in surfaces[0]},
        **{name: _mean([ratios[name] for ratios in by_lesion]) for name in by_lesion[0]},
        'lesions_found': sum(hits),
        'lesions_missed': sum(len(found) for _, found, _ in lesions) - sum(hits),
        'lesions_false': sum(false for _, _, false in lesions),
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


def _accuracy(counts: np.ndarray) -> float:
    """(K, 3) pooled counts -> share of the pixels that are right."""
    return float(counts[:, 0].sum() / counts[:, [0, 2]].sum())


def _calibration_bins(counts: np.ndarray) -> list[dict[str, Any]]:
    """(bins, 3) counts -> each bin's range, voxels, mean probability and share of foreground."""
    edges = np.linspace(0, 1, len(counts) + 1)
    return [
        {
            'low': float(low),
            'high': float(high),
            'voxels': int(number),
            'probability': float(prob / number) if number else None,
            'frequency': float(true / number) if number else None,
        }
        for low, high, (number, prob, true) in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


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
    shapes = abstract_variables(model, meta['inputs']['channels'])
    variables = checkpoint.restore_variables(workdir, step, shapes)
    return config, model, variables, fixed_intensity(meta['inputs']), step


def abstract_variables(model, channels: int) -> dict[str, Any]:
    """Shapes and types of all that a network has. Raises ConfigError where it can't be built."""
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    init = functools.partial(model.init, train=False)
    try:
        return jax.eval_shape(init, jax.random.key(0), image)
    except Exception as error:  # of each layer its own: the config may be a stranger's
        reason = first_line(error)
        raise ConfigError(f'there is no network of such a model section: {reason}') from error


def fit_temperature(
    predict_fn: PredictFn,
    data: Iterable[Volume],
    *,
    batch_size: int,
    intensity: np.ndarray | None,
    num_classes: int,
    ignore_label: int,
) -> dict[str, Any]:
    """'temperature', the negative log likelihood without and with it, and over how much.

    On at most FIT_VOXELS voxels a volume, drawn evenly, so small volumes weigh what large
    ones do. Raises DataError when there is nothing to fit on.
    """
    probs, labels = [], []
    for index, volume in enumerate(data):
        _check_labels(volume, num_classes, ignore_label)
        start, depth = 0, len(volume.mask)
        for part in predict_slices(predict_fn, volume, batch_size=batch_size, intensity=intensity):
            mask, count = volume.mask[start : start + len(part)], FIT_VOXELS * len(part) // depth
            prob, label = calibration.sample(part, mask, ignore_label, count, [index, start])
            probs.append(prob)
            labels.append(label)
            start += len(part)
    if not sum(map(len, labels)):
        raise DataError('there is no voxel to fit the temperature on: the split is empty')
    prob, label = np.concatenate(probs), np.concatenate(labels)
    temperature = calibration.fit(prob, label)
    return {
        'temperature': temperature,
        'negative_log_likelihood': calibration.negative_log_likelihood(prob, label, temperature),
        'without': calibration.negative_log_likelihood(prob, label, 1.0),
        'voxels': len(label),
        'patients': index + 1,
    }


def evaluate_checkpoint(
    workdir: str | Path,
    *,
    split: str = 'test',
    data: str = '',
    which: str = '',
    fit: bool = False,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Evaluate; write WORKDIR/evaluation.json, report.html and pictures; print the table.

    `data` is a folder with images/ and masks/, as the config reads them, or in the Kaggle layout;
    without it, the patients of `split` in the data set that the run was trained on. `changes` are
    to the config's `predict` section; evaluation.json has the config as it was used. With `fit`
    the temperature is fitted on the validation patients first and kept in
    WORKDIR/temperature.json; this and every later call applies it to the probabilities of that
    checkpoint. Returns what evaluation.json holds.
    """
    if fit and (data or split != 'validation'):
        raise ConfigError(
            '--fit_temperature is for the patients of --split=validation: what is fitted on '
            'others would be tested on them'
        )
    config, model, variables, intensity, step = restore_model(workdir, which)
    config = with_prediction(config, changes)
    names, open_volumes = _volume_source(config, workdir, split, data)
    folder = Path(workdir) / 'pictures'

    def save_picture(volume: Volume, pred: np.ndarray) -> None:
        picture = visualize.volume_picture(volume, pred)
        with files.writing(folder / f'{volume.patient}.png') as aside:
            Image.fromarray(picture).save(aside, 'png')

    program = infer.compile_predict(model, **program_options(config))
    predict_fn = functools.partial(program, jax.device_put(variables))
    how = {'batch_size': config.eval.batch_size, 'intensity': intensity}
    if fit:
        classes = {
            'num_classes': config.model.num_classes,
            'ignore_label': config.loss.ignore_label,
        }
        facts = fit_temperature(predict_fn, open_volumes(), **classes, **how)
        if hosts.is_first():
            calibration.save(workdir, {'step': step, 'split': split, **facts})
        hosts.wait_for_all()
        print(
            f'temperature {facts["temperature"]:.3f} for step {step}: negative log likelihood '
            f'{facts["without"]:.4f} without, {facts["negative_log_likelihood"]:.4f} with'
        )
    how['temperature'] = calibration.load(workdir, step)
    result = evaluate_volumes(
        predict_fn,
        open_volumes(hosts.share(names)),
        **evaluate_options(config) | how,
        label_options=label_options(config),
        each=save_picture,
        order=names,
    )
    result['data'] |= {'source': data or config.data.name, 'split': '' if data else split}
    result['checkpoint'] = {'step': step, 'config': to_dict(config)}
    if not hosts.is_first():
        return result
    path = Path(workdir) / 'evaluation.json'
    with files.writing(path) as aside:
        aside.write_text(json.dumps(result, indent=1, allow_nan=False) + '\n')

    # Which patient is the median is known only now: the few shown are predicted again.
    roles = {row['patient']: role for role, row in report.extremes(result['patients'])}
    cases = {}
    for volume in open_volumes(list(roles)):
        shown = np.where(volume.mask == config.loss.ignore_label, IGNORE_LABEL, volume.mask)
        pred, foreground = predict_foreground(predict_fn, volume, **how, **label_options(config))
        cases[volume.patient] = report.make_case(volume._replace(mask=shown), pred, foreground)
    page = report.write(workdir, result, [(role, cases[name]) for name, role in roles.items()])
    print(table(result))
    print(f'written to {path} and {page}; pictures in {folder}')
    return result


def _volume_source(
    config, workdir, split: str, data: str
) -> tuple[list[str], Callable[[Sequence[str] | None], Iterator[Volume]]]:
    """The patients in order, and `open_volumes(patients=None)`: the volumes to evaluate, one at a
    time, or those of these.
    """
    if data and (Path(data).expanduser() / config.data.images[0]).is_dir():
        slices = sources.read_folder(config, source=data, mixed_sizes=True)
        parts = {split: list(slices.intensity)}
    elif data:
        from pspnet_jax.data import lgg  # which needs tensorflow-datasets

        found = lgg.check(data, size=None)

        def open_folder(patients: Sequence[str] | None = None) -> Iterator[Volume]:
            chosen = [case for case in found if patients is None or case.patient in patients]
            return (lgg.read_case(case, size=None) for case in chosen)

        return [case.patient for case in found], open_folder
    else:
        kept = Path(workdir) / splits.KEPT
        slices, parts = sources.load(config, kept if kept.exists() else '')
    if not parts[split]:
        raise DataError(f'the split {split!r} has no patient in this data set')

    def open_split(patients: Sequence[str] | None = None) -> Iterator[Volume]:
        chosen = parts[split]
        if patients is not None:  # one whose slices have several sizes is several, 'NAME 32x40'
            begin = tuple(f'{name} ' for name in chosen)
            found = {
                name.rsplit(' ', 1)[0] if name.startswith(begin) else name for name in patients
            }
            chosen = [name for name in chosen if name in found]
        for volume in volumes.iterate_volumes(volumes.select(slices, chosen)):
            own = volume.patient
            if patients is None or own in patients or own.rsplit(' ', 1)[0] in patients:
                yield volume

    return sorted(parts[split]), open_split


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
    summary, baseline, calibrated = result['summary'], result['baseline'], result['calibration']
    dice, hd95 = summary['dice'], summary['hd95']
    low, high = dice['ci95'] or (None, None)
    lines += [
        f'per-volume Dice {cell(dice["mean"])}, 95 % interval {cell(low)} to {cell(high)} '
        f'(bootstrap over {dice["n"]} of {len(result["patients"])} patients); '
        f'HD95 over {hd95["n"]} of {len(result["patients"])}',
        f'pooled Dice {cell(summary["pooled"]["dice"])}; per-slice Dice with empty = 1 '
        f'{cell(summary["per_slice_dice_empty_is_1"])}',
        f'all background: per-volume Dice {cell(baseline["dice"])}, per-slice with empty = 1 '
        f'{cell(baseline["per_slice_dice_empty_is_1"])}, '
        f'pixel accuracy {cell(baseline["pooled_pixel_accuracy"])}, '
        f'mean IoU {cell(baseline["pooled_mean_iou"])}',
        f'ASSD {cell(summary["assd"]["mean"])} over {summary["assd"]["n"]}; surface Dice within '
        f'{result["data"]["surface_tolerance"]:g} {cell(summary["surface_dice"]["mean"])} over '
        f'{summary["surface_dice"]["n"]}',
        f'lesion-wise as in BraTS 2023: Dice {cell(summary["lesion_dice"]["mean"])}, detection F1 '
        f'{cell(summary["lesion_f1"]["mean"])} over {summary["lesion_f1"]["n"]}; lesions: '
        f'{", ".join(f"{number} {what}" for what, number in summary["lesions"].items())}',
        f'pooled: frequency_weighted_IU {cell(summary["frequency_weighted_IU"])}, mean_IU '
        f'{cell(summary["mean_IU"])}, class_wise_IU '
        f'{" ".join(cell(value) for value in summary["class_wise_IU"])}',
        f'expected calibration error {cell(calibrated["expected_calibration_error"], 4)} at '
        f'temperature {cell(calibrated["temperature"])}',
    ]
    return '\n'.join(lines)


def main() -> None:
    options = flags.FLAGS
    evaluate_checkpoint(
        options.workdir,
        split=options.split,
        data=options.data,
        which=options.checkpoint,
        fit=options.fit_temperature,
        changes=cli.prediction_changes(),
    )


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'folder of a training run', required=True)
    flags.DEFINE_enum('split', 'test', ['train', 'validation', 'test'], 'whose patients')
    flags.DEFINE_string('data', '', 'instead: a folder with images/ and masks/, or kaggle_3m')
    flags.DEFINE_string('checkpoint', '', "'best', 'last' or a step; '': as the config says")
    flags.DEFINE_bool(
        'fit_temperature', False, 'fit it on --split=validation and keep it with the run'
    )
    cli.define_prediction_flags()
    hosts.define_flags()
    cli.run(main)
