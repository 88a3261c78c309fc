"""A checkpoint's score: per patient first, then over patients.

  python -m pspnet_jax.evaluate --workdir=RUN --split=test
  python -m pspnet_jax.evaluate --workdir=RUN --data=FOLDER
  python -m pspnet_jax.evaluate --workdir=RUN --split=validation --fit_temperature
  python -m pspnet_jax.evaluate --workdir=RUN --split=validation --choose_postprocessing

The figure to quote is Dice over the whole volume of a patient, its mean, median and
deviation over patients. Per-slice and pooled figures stand under those names only,
beside the baseline that calls everything background. docs/metrics.md defines each figure.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from pspnet_jax import (
    calibration,
    choice,
    cli,
    hosts,
    infer,
    metrics,
    paths,
    postprocess,
    report,
    visualize,
)
from pspnet_jax.config import to_dict, with_prediction
from pspnet_jax.config.flags import define_prediction_flags, prediction_changes
from pspnet_jax.data import files, pairing, pipeline, sources, splits, volumes
from pspnet_jax.data.volumes import IGNORE_LABEL, Volume
from pspnet_jax.errors import ConfigError, DataError, one_line, say
from pspnet_jax.runs import open_run

logger = logging.getLogger(__name__)

PredictFn = Callable[[np.ndarray], np.ndarray]  # B H W C normalised -> B H W K probabilities
FIT_VOXELS = 50_000  # of each validation patient that the temperature is fitted on
DISTANCES = ('hd95', 'hd95_joined', 'assd', 'surface_dice')  # of `metrics.surface_ratios`
LESIONS = ('lesion_dice', 'lesion_f1')  # of `metrics.lesion_ratios`
FIGURES = ('dice', 'dice_largest', 'iou', 'sensitivity', 'precision', *DISTANCES, *LESIONS)
COUNTS = (
    'present', 'missed', 'invented', 'lesions_found', 'lesions_missed', 'lesions_false'
)  # fmt: skip


def predict_slices(
    predict_fn: PredictFn,
    volume: Volume,
    *,
    batch_size: int,
    intensity: np.ndarray | None,
    context: int,
) -> Iterator[np.ndarray]:
    """n H W K probabilities, batch by batch: of all D slices in order, and of no padding."""
    left = len(volume.image)
    for batch in pipeline.eval_batches(volume, batch_size, intensity, context):
        yield np.asarray(predict_fn(batch))[:left]
        left -= len(batch)


def predict_foreground(
    predict_fn: PredictFn,
    volume: Volume,
    *,
    batch_size: int,
    intensity: np.ndarray | None,
    context: int,
    temperature: float = 1.0,
    threshold: float | None = None,
    **clean_options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """D H W uint8 labels, and D H W float32: the probability of any class but 0.

    `threshold` and `clean_options` as `postprocess` has them, of each scan by itself. The
    temperature is the probability's alone: labels are those without.
    """
    labels, foreground = [], []
    how = {'batch_size': batch_size, 'intensity': intensity, 'context': context}
    for prob in predict_slices(predict_fn, volume, **how):
        labels.append(postprocess.to_labels(prob, threshold))
        foreground.append(calibration.temper(prob, temperature)[..., 1:].sum(-1))
    labels = np.concatenate(labels)
    for rows in volumes.scans(volume.scan, len(labels)):
        labels[rows] = postprocess.clean(labels[rows], **clean_options)
    return labels, np.concatenate(foreground)


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
        'crf_options': crf_options(config),
    }


def crf_options(config) -> dict[str, Any]:
    """The keyword arguments of `infer.refine` that a config decides."""
    return config.crf.to_dict() | {'context': config.data.context}


def views(config) -> dict[str, Any]:
    """What decides the probabilities beside the checkpoint, as JSON has it: a temperature is
    fitted for these. What has no effect is left out.
    """
    predict, crf = config.predict, config.crf.to_dict()
    found = {'scales': list(predict.scales), 'flip': predict.flip, 'window': predict.window}
    if predict.window:
        found['overlap'] = predict.overlap
    if crf['kernel'] == 'exact':
        del crf['window']
    return {**found, 'crf': crf if crf['kernel'] != 'none' else {'kernel': 'none'}}


def label_options(config) -> dict[str, Any]:
    """Those of `predict_foreground`: what is made of the probabilities."""
    predict = config.predict
    return {
        'threshold': predict.threshold,
        'largest_component': predict.largest_component,
        'min_size': predict.min_size,
    }


def with_choice(
    config, workdir: str | Path, step: int, changes: Mapping[str, Any]
) -> tuple[Any, dict[str, Any] | None]:
    """(the config to predict with, what it has of a choice): its own `predict` section, then what
    was chosen on validation for this checkpoint and its views, then `changes`.

    The second has the 'options' that were taken, those 'given' in their place, and the validation
    Dice of the whole choice and 'without' it; None where nothing is taken. The log says it.
    """
    wanted = with_prediction(config, changes)
    kept = choice.load(workdir, config, step, choice_views(wanted))
    if kept is None:
        return wanted, None
    options = {key: value for key, value in kept['options'].items() if key not in changes}
    if not options:
        return wanted, None
    chosen = {
        'options': options,
        'given': [key for key in kept['options'] if key in changes],
        **{key: kept[key] for key in ('dice', 'without', 'patients')},
    }
    logger.info('%s: %s', Path(workdir) / choice.KEPT, choice.words(chosen))
    return with_prediction(config, {**options, **changes}), chosen


def choice_views(config) -> dict[str, Any]:
    """The `views` that post-processing is chosen for: the mirror image is part of the choice."""
    return {key: value for key, value in views(config).items() if key != 'flip'}


def evaluate_options(config) -> dict[str, Any]:
    """The keyword arguments of `evaluate_volumes` that a config decides."""
    return {
        'batch_size': config.eval.batch_size,
        'context': config.data.context,
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
    context: int,
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

    With more than two classes a patient's figure is the mean over the structures 1..K-1 without
    `ignore_label`. Distances and components are of each scan, so of each picture where a patient
    has several, and a distance is the mean over these; they are in mm where a volume has its
    spacing, else in `spacing`'s unit. Undefined figures are None, and `n` says over how many
    patients a mean is; `structures` says how many are missed or invented, which no distance
    shows. Calibration is of the probability of any class but 0, over all counted voxels.
    `label_options` are further ones of `predict_foreground`, `lesion_options` those of
    `metrics.lesions`.
    `each(volume, labels_DHW)` is called with every prediction, the volume's ignored voxels as
    IGNORE_LABEL. On several hosts `data` are this one's volumes and `order` the patients of all,
    and the figures are of all. Raises DataError for labels outside 0..K-1, and when there is no
    volume.
    """
    rows = []
    for volume in data:
        _check_labels(volume, num_classes, ignore_label)
        pred, foreground = predict_foreground(
            predict_fn,
            volume,
            batch_size=batch_size,
            intensity=intensity,
            context=context,
            temperature=temperature,
            **label_options,
        )
        each(_with_ignored(volume, ignore_label), pred)
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
        rows.append([figures, per_slice, empty, np.asarray(calibrated).tolist()])
    rows = in_order(hosts.gather(rows), order)
    if not rows:
        raise DataError('there is no volume to evaluate: the split is empty')
    patients, per_slice, per_slice_empty, calibrated = zip(*rows, strict=True)
    patients, calibrated = list(patients), np.sum(calibrated, axis=0)
    structures = _structures(num_classes, ignore_label)
    ignored = [ignore_label] if ignore_label < num_classes else []
    nothing = [_mean_dice(np.sum(counts, axis=0), structures) for counts in per_slice_empty]
    per_slice, per_slice_empty = (
        np.array([counts for counts_of_one in part for counts in counts_of_one])
        for part in (per_slice, per_slice_empty)
    )
    if not calibrated.any():
        raise DataError(f'every voxel is labelled {ignore_label}, to be ignored: nothing to score')
    pooled, empty = np.sum(per_slice, axis=0), np.sum(per_slice_empty, axis=0)
    in_mm = [row['in_mm'] for row in patients]
    steps = f'steps of (slice, row, column) = {tuple(spacing)}'
    if any(in_mm):
        steps = f'mm where the file says its spacing, else {steps}'
    return {
        'summary': {name: _over_patients(patients, name, bootstrap) for name in FIGURES}
        | {
            'structures': _over_structures(patients, structures),
            'lesions': {
                what: sum(p[f'lesions_{what}'] for p in patients)
                for what in ('found', 'missed', 'false')
            },
            'per_slice_dice_empty_is_1': _slice_dice(per_slice, structures),
            'pooled': {
                name: _mean(values[structures]) for name, values in metrics.ratios(pooled).items()
            },
            'pooled_pixel_accuracy': _accuracy(pooled),
            **metrics.pooled_iou(pooled, ignore_label),
        },
        'patients': patients,
        'baseline': {
            'prediction': 'all background',
            'dice': _mean(nothing),
            'per_slice_dice_empty_is_1': _slice_dice(per_slice_empty, structures),
            'pooled_pixel_accuracy': _accuracy(empty),
            'pooled_mean_iou': _mean(np.delete(metrics.ratios(empty)['iou'], ignored)),
            **metrics.pooled_iou(empty, ignore_label),
        },
        'calibration': {
            'of': 'the probability of any class but 0, over all counted voxels',
            'temperature': temperature,
            'expected_calibration_error': metrics.expected_calibration_error(calibrated),
            'bins': _calibration_bins(calibrated),
        },
        'data': {
            'patients': len(patients),
            'scans': sum(row['scans'] for row in patients),
            'slices': len(per_slice),
            'lesion_slices': sum(bool(c[1:, [0, 2]].sum()) for c in per_slice),
            'ignored_slices': int((~per_slice.any((1, 2))).sum()),
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


def _with_ignored(volume: Volume, ignore_label: int) -> Volume:
    """The volume for pictures, which know one ignored label."""
    return volume._replace(mask=np.where(volume.mask == ignore_label, IGNORE_LABEL, volume.mask))


def _structures(num_classes: int, ignore_label: int) -> list[int]:
    """The classes that are scored one by one."""
    return [label for label in range(1, num_classes) if label != ignore_label]


def _patient_row(
    pred, volume, num_classes, ignore_label, spacing, surface_tolerance, lesion_options
) -> dict[str, Any]:
    """One patient's figures, means over the structures; `structures` has those of each."""
    scans = volumes.scans(volume.scan, len(pred))
    structures = _structures(num_classes, ignore_label)
    largest, counted = np.zeros_like(pred), volume.mask != ignore_label
    rows = []
    for label in structures:
        ours, theirs = (pred == label) & counted, volume.mask == label
        for scan in scans:
            component = metrics.largest_component(pred[scan] == label)
            largest[scan] = np.where(component, label, largest[scan])
        found = [
            metrics.surface_ratios(
                metrics.surface_distances(ours[scan], theirs[scan], spacing), surface_tolerance
            )
            for scan in scans
        ]
        dice, hits, false = zip(
            *(metrics.lesions(ours[scan], theirs[scan], spacing, **lesion_options)
              for scan in scans), strict=True,
        )  # fmt: skip
        dice, hits, false = np.concatenate(dice), np.concatenate(hits), sum(false)
        predicted, there = (
            np.array([mask[scan].any() for scan in scans]) for mask in (ours, theirs)
        )
        rows.append(
            {
                'label': label,
                **{name: _mean([ratios[name] for ratios in found]) for name in DISTANCES},
                **{
                    name: _mean([value])
                    for name, value in metrics.lesion_ratios((dice, hits, false)).items()
                },
                'present': int(there.sum()),
                'missed': int((there & ~predicted).sum()),
                'invented': int((predicted & ~there).sum()),
                'lesions_found': int(hits.sum()),
                'lesions_missed': int((~hits).sum()),
                'lesions_false': false,
            }
        )
    count = metrics.counts(pred, volume.mask, num_classes, ignore_label)
    largest_count = metrics.counts(largest, volume.mask, num_classes, ignore_label)
    ratios = metrics.ratios(count)
    for row in rows:
        row['dice'] = _mean([ratios['dice'][row['label']]])
    return {
        'patient': volume.patient,
        **{name: _mean(values[structures]) for name, values in ratios.items()},
        'dice_largest': _mean_dice(largest_count, structures),
        **{name: _mean([row[name] for row in rows]) for name in (*DISTANCES, *LESIONS)},
        **{name: sum(row[name] for row in rows) for name in COUNTS},
        'scans': len(scans),
        'slices': len(pred),
        'lesion_voxels': int(count[structures][:, [0, 2]].sum()),
        'predicted_voxels': int(count[structures][:, [0, 1]].sum()),
        'spacing': list(map(float, spacing)),
        'in_mm': volume.spacing is not None,
        'structures': rows,
    }


def _over_structures(patients, structures: Sequence[int]) -> list[dict[str, Any]]:
    """For each structure the means over patients and over how many, and how many are missed."""
    found = []
    for place, label in enumerate(structures):
        rows = [patient['structures'][place] for patient in patients]
        figures = {
            name: {'mean': _mean(values), 'n': sum(value is not None for value in values)}
            for name in ('dice', *DISTANCES, *LESIONS)
            for values in [[row[name] for row in rows]]
        }
        numbers = {name: sum(row[name] for row in rows) for name in COUNTS}
        found.append({'label': label, **figures, **numbers})
    return found


def _mean_dice(counts: np.ndarray, structures: Sequence[int]) -> float | None:
    """(K, 3) counts -> mean Dice over the structures; None where all are undefined."""
    return _mean(metrics.ratios(counts)['dice'][structures])


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


def _slice_dice(counts: Sequence[np.ndarray], structures: Sequence[int]) -> float:
    """Mean over slices, where an empty slice that is predicted empty counts 1, and one whose
    every pixel is ignored does not count.
    """
    counts = np.stack(counts)
    dice = metrics.ratios(counts[counts.any((1, 2))])['dice'][:, structures]
    return float(np.nan_to_num(dice, nan=1.0).mean())


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


def fit_temperature(
    predict_fn: PredictFn,
    data: Iterable[Volume],
    *,
    batch_size: int,
    intensity: np.ndarray | None,
    context: int,
    num_classes: int,
    ignore_label: int,
) -> dict[str, Any]:
    """'temperature', the negative log likelihood without and with it, and over how much.

    On at most FIT_VOXELS voxels a volume, drawn evenly, so small volumes weigh what large
    ones do. Raises DataError when there is nothing to fit on.
    """
    how = {'batch_size': batch_size, 'intensity': intensity, 'context': context}
    probs, labels = [], []
    for index, volume in enumerate(data):
        _check_labels(volume, num_classes, ignore_label)
        start, depth = 0, len(volume.mask)
        for part in predict_slices(predict_fn, volume, **how):
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


def choose_postprocessing(
    program: Callable[[bool], PredictFn],
    data: Iterable[Volume],
    *,
    tried: Mapping[str, Sequence[Any]],
    batch_size: int,
    intensity: np.ndarray | None,
    context: int,
    num_classes: int,
    ignore_label: int,
    order: Sequence[str] = (),
) -> dict[str, Any]:
    """`choice.choose` of the Dice that `evaluate_volumes` has of each volume for each combination
    of what is `tried` (`choice.grid`). The network runs once a volume for each `program(flip)`.

    On several hosts `data` are this one's volumes and `order` the patients of all.
    """
    structures, rows = _structures(num_classes, ignore_label), []
    how = {'batch_size': batch_size, 'intensity': intensity, 'context': context}
    for volume in data:
        _check_labels(volume, num_classes, ignore_label)
        dice = []
        for flip in tried['flip']:
            parts = predict_slices(program(flip), volume, **how)
            labels = zip(
                *([postprocess.to_labels(part, t) for t in tried['threshold']] for part in parts),
                strict=True,
            )
            for of_one in labels:
                counts = choice.tally(
                    np.concatenate(of_one),
                    volume.mask,
                    scans=volumes.scans(volume.scan, len(volume.mask)),
                    structures=structures,
                    ignore_label=ignore_label,
                    largest=tried['largest_component'],
                    min_sizes=tried['min_size'],
                )
                dice += choice.mean_dice(counts).ravel().tolist()
        rows.append([{'patient': volume.patient}, dice])
    rows = in_order(hosts.gather(rows), order)
    if not rows:
        raise DataError('there is no volume to choose post-processing on: the split is empty')
    return choice.choose(tried, np.array([dice for _, dice in rows]))


def evaluate_checkpoint(
    workdir: str | Path,
    *,
    split: str = '',
    data: str = '',
    which: str = '',
    fit: bool = False,
    choose: bool = False,
    changes: Mapping[str, Any] = MappingProxyType({}),
    group: str | None = None,
    trusted: bool = False,
) -> dict[str, Any]:
    """Evaluate; write WORKDIR/evaluation.json, report.html and pictures; print the table.

    `data` is a folder with images/ and masks/, as the config reads them, or in the Kaggle layout;
    without it, the data set that the run was trained on, if this user did so on this machine or
    says that the run is `trusted`: one from elsewhere may name any folder. `split` chooses
    patients as WORKDIR/splits.json has them: '' takes those of 'test', and of `data` all. `group`
    says whose pictures of such a folder belong together, in place of the run's `data.group`.
    `changes` are to the config's `predict` section; evaluation.json has the config as used. With
    `choose`, post-processing is chosen on the validation patients first and kept in
    WORKDIR/postprocessing.json; `with_choice` says what this and later calls make of it. With `fit`
    the temperature is then fitted on these patients and kept in
    WORKDIR/temperature.json; this and every later call of the same `views` applies it to the
    probabilities of that checkpoint. Returns what evaluation.json holds.
    """
    if (fit or choose) and (data or split != 'validation'):
        asked = '--choose_postprocessing' if choose else '--fit_temperature'
        raise ConfigError(
            f'{asked} is for the patients of --split=validation: what is fitted on '
            'others would be tested on them'
        )
    workdir, data = paths.local(workdir), data and str(paths.local(data))
    run = open_run(workdir, which)
    config, step = with_prediction(run.config, changes), run.step
    if not data:
        split = split or 'test'
        if not trusted:
            _check_known(config, split)
    if group is not None and not _is_folder(config, data):
        raise ConfigError('--group is for --data=FOLDER with images/ and masks/')
    names, open_volumes = _volume_source(
        config, workdir, split, data, run.channels, run.measured, group
    )
    folder, digests = Path(workdir) / 'pictures', []

    def save_picture(volume: Volume, pred: np.ndarray) -> None:
        digests.append([volume.patient, [*map(volumes.picture_digest, volume.image)]])
        picture = visualize.volume_picture(volume, pred)
        with files.writing(folder / f'{volume.patient}.png') as aside:
            Image.fromarray(picture).save(aside, 'png')

    variables, options = jax.device_put(run.variables), program_options(config)

    @functools.cache
    def program(flip: bool) -> PredictFn:
        compiled = infer.compile_predict(run.model, **options | {'flip': flip})
        return functools.partial(compiled, variables)

    how = {
        'batch_size': config.eval.batch_size,
        'intensity': run.intensity,
        'context': run.context,
    }
    classes = {'num_classes': config.model.num_classes, 'ignore_label': config.loss.ignore_label}
    if choose:
        tried = choice.grid(config.predict, config.model.num_classes, given=changes)
        part = open_volumes(hosts.share(names))
        facts = choose_postprocessing(program, part, tried=tried, order=names, **classes, **how)
        if hosts.is_first():
            seen = {'step': step, 'views': choice_views(config), 'split': split}
            choice.save(workdir, {**seen, **facts})
        hosts.wait_for_all()
        print(f'post-processing for step {step}: {choice.words(facts)}')
    config, chosen = with_choice(run.config, workdir, step, changes)
    predict_fn = program(config.predict.flip)
    if fit:
        facts = fit_temperature(predict_fn, open_volumes(), **classes, **how)
        if hosts.is_first():
            seen = {'step': step, 'views': views(config), 'split': split}
            calibration.save(workdir, {**seen, **facts})
        hosts.wait_for_all()
        print(
            f'temperature {facts["temperature"]:.3f} for step {step}: negative log likelihood '
            f'{facts["without"]:.4f} without, {facts["negative_log_likelihood"]:.4f} with'
        )
    how['temperature'] = calibration.load(workdir, step, views(config))
    result = evaluate_volumes(
        predict_fn,
        open_volumes(hosts.share(names)),
        **evaluate_options(config) | how,
        label_options=label_options(config),
        each=save_picture,
        order=names,
    )
    result['data'] |= {'source': data or config.data.name, 'split': split}
    if data:
        result['data'] |= tell_overlap([workdir], dict(hosts.gather(digests)))
    result['postprocessing'] = chosen
    result['checkpoint'] = {
        'step': step,
        'passed_over': {str(n): reason for n, reason in run.passed_over.items()},
        'config': to_dict(config),
    }
    if not hosts.is_first():
        return result
    path = Path(workdir) / 'evaluation.json'
    with files.writing(path) as aside:
        aside.write_text(json.dumps(result, indent=1, allow_nan=False) + '\n')

    # Which patient is the median is known only now: the few shown are predicted again.
    roles = {row['patient']: role for role, row in report.extremes(result['patients'])}
    cases = {}
    for volume in open_volumes(list(roles)):
        pred, foreground = predict_foreground(predict_fn, volume, **how, **label_options(config))
        shown = _with_ignored(volume, config.loss.ignore_label)
        cases[volume.patient] = report.make_case(shown, pred, foreground)
    page = report.write(workdir, result, [(role, cases[name]) for name, role in roles.items()])
    print(table(result))
    say(f'written to {path} and {page}; pictures in {folder}')
    return result


def tell_overlap(
    workdirs: Sequence[str | Path], digests: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, list[str]] | None]:
    """{'overlap': `splits.overlap` with what the runs were trained and validated on}, which the
    log says; None where that is not known of all.
    """
    kept = [Path(workdir) / splits.KEPT for workdir in workdirs]
    found = [splits.overlap(path, digests) for path in kept]
    for path, one in zip(kept, found, strict=True):
        if one is None and hosts.is_first():
            logger.warning(
                'whether the run was trained on these pictures is not known: %s is not there, '
                'damaged, or older than the digests of pictures', path,
            )  # fmt: skip
    if None in found:
        return {'overlap': None}
    together = {
        key: [name for name in digests if any(name in one[key] for one in found)]
        for key in ('train', 'validation', 'same_name')
    }
    said = {
        'train': 'have pictures that the run was trained on, so these figures are too good',
        'validation': 'have pictures of its validation set, by which its checkpoint was chosen',
        'same_name': 'have the name of one of these and other pictures',
    }
    for key, words in said.items():
        if (names := together[key]) and hosts.is_first():
            some = ', '.join(names[:5]) + (f' and {len(names) - 5} more' if names[5:] else '')
            logger.warning('%d of %d patients %s: %s', len(names), len(digests), words, some)
    return {'overlap': together}


def _is_folder(config, data: str) -> bool:
    """Whether --data holds the config's folder of images, and is not in Kaggle's layout."""
    place = Path(data).expanduser() / sources.elsewhere(config, data)['images'][0]
    return bool(data) and pairing.split(place)[0].is_dir()


def _check_known(config, split: str) -> None:
    """Raise DataError for a run that names data which this user has not trained on here."""
    places = sources.places(config)
    if places and not paths.are_known(places):
        raise DataError(
            f'the run was trained on {", ".join(places)}, and no training of yours on this machine '
            f'has read that: look whether it is what you expect, and give --data={places[0]} '
            f'--split={split}'
        )


def _volume_source(
    config, workdir, split: str, data: str, channels: int, how: str, group: str | None
) -> tuple[list[str], Callable[[Sequence[str] | None], Iterator[Volume]]]:
    """The patients in order, and `open_volumes(patients=None)`: the volumes to evaluate, one at a
    time, or those of these, with the network's channels and intensities as `how` measures them.
    """
    kept = Path(workdir) / splits.KEPT
    if _is_folder(config, data):
        where = sources.elsewhere(config, data) | {'group': sources.grouping(config, group)}
        slices = sources.read_folder(config, **where, mixed_sizes=True)
        parts = splits.read(kept, slices) if split else {split: list(slices.intensity)}
    elif data:
        from pspnet_jax.data import lgg  # which needs tensorflow-datasets

        found = lgg.check(data, size=None)
        if split:
            wanted = set(splits.listed(kept)[0][split])
            found = [case for case in found if case.patient in wanted]
            if lost := sorted(wanted - {case.patient for case in found}):
                raise DataError(f'{data} lacks {lost[:8]}, of the split {split!r} in {kept}')

        def open_folder(patients: Sequence[str] | None = None) -> Iterator[Volume]:
            chosen = [case for case in found if patients is None or case.patient in patients]
            cases = (lgg.read_case(case, size=None) for case in chosen)
            found_volumes = (volumes.with_intensity(volume, how) for volume in cases)
            return (volumes.with_channels(volume, channels) for volume in found_volumes)

        return [case.patient for case in found], open_folder
    else:
        slices, parts = sources.load(config, kept if kept.exists() else '')
    sources.check_class_names(slices, config)
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
        for volume in volumes.iterate_volumes(volumes.select(slices, chosen), how):
            own = volume.patient
            if patients is None or own in patients or own.rsplit(' ', 1)[0] in patients:
                yield volumes.with_channels(volume, channels)

    return sorted(parts[split]), open_split


def table(result: dict[str, Any]) -> str:
    """What a person reads: a row a patient, then the summary and the baseline."""

    def cell(value, digits=3):
        return '-' if value is None else f'{value:.{digits}f}'

    columns = ('dice', 'dice_largest', 'iou', 'sensitivity', 'precision', 'hd95', 'hd95_joined')
    patients, summary = result['patients'], result['summary']
    names = [one_line(p['patient']) for p in patients]
    wide = max(len('patient'), *map(len, names))
    head = f'{"patient":{wide}} ' + ' '.join(f'{c:>12}' for c in columns)
    head += f' {"missed":>8} {"invented":>8} {"voxels":>9}'
    lines = [head, '-' * len(head)]
    for p, name in zip(patients, names, strict=True):
        cells = ' '.join(f'{cell(p[c]):>12}' for c in columns)
        missed = f'{p["missed"]} of {p["present"]}'
        lines.append(
            f'{name:{wide}} {cells} {missed:>8} {p["invented"]:>8} {p["lesion_voxels"]:>9,}'
        )
    lines.append('-' * len(head))
    for statistic in ('mean', 'median', 'sd'):
        cells = ' '.join(f'{cell(summary[c][statistic]):>12}' for c in columns)
        lines.append(f'{statistic:{wide}} {cells}')
    baseline, calibrated = result['baseline'], result['calibration']
    dice, hd95 = summary['dice'], summary['hd95']
    found = {
        name: sum(row[name] for row in summary['structures'])
        for name in ('present', 'missed', 'invented')
    }
    lines += [
        f'per-volume Dice {cell(dice["mean"])}, {interval(dice)} '
        f'(bootstrap over {dice["n"]} of {len(patients)} patients)',
        f'HD95, the larger of the two directed ones, {cell(hd95["mean"])}, of both surfaces joined '
        f'{cell(summary["hd95_joined"]["mean"])}, over {hd95["n"]} of {len(patients)} patients',
        f'{found["missed"]} of {found["present"]} structures are missed and {found["invented"]} '
        'invented; these are in no distance',
    ]
    if len(summary['structures']) > 1:
        lines += [
            f'class {row["label"]}: Dice {cell(row["dice"]["mean"])} over {row["dice"]["n"]}, HD95 '
            f'{cell(row["hd95"]["mean"])} over {row["hd95"]["n"]}; missed {row["missed"]} of '
            f'{row["present"]}, invented {row["invented"]}'
            for row in summary['structures']
        ]
    lines += [
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
    if chosen := result.get('postprocessing'):
        lines.append(f'post-processing: {choice.words(chosen, result["data"]["split"])}')
    return '\n'.join(lines)


def interval(figures: dict[str, Any], digits: int = 3) -> str:
    """The interval of one of the summary's figures in words, with what few patients do to it."""
    if figures['ci95'] is None:
        return f'no interval of {figures["n"]}'
    low, high = figures['ci95']
    few = f', too narrow for {figures["n"]}' if figures['n'] < metrics.FEW else ''
    return f'95 % interval {low:.{digits}f} to {high:.{digits}f}{few}'


def main() -> None:
    options = flags.FLAGS
    evaluate_checkpoint(
        options.workdir,
        split=options.split,
        data=options.data,
        which=options.checkpoint,
        fit=options.fit_temperature,
        choose=options.choose_postprocessing,
        group=options.group,
        changes=prediction_changes(),
    )


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'folder of a training run', required=True)
    flags.DEFINE_enum(
        'split', '', ['', 'train', 'validation', 'test'],
        "whose patients; '': those of test, and of --data all",
    )  # fmt: skip
    flags.DEFINE_string('data', '', 'a folder with images/ and masks/, or kaggle_3m')
    flags.DEFINE_string('checkpoint', '', "'best', 'last' or a step; '': as the config says")
    flags.DEFINE_string('group', None, f'of --data: {cli.GROUP}')
    flags.DEFINE_bool(
        'fit_temperature', False, 'fit it on --split=validation and keep it with the run'
    )
    flags.DEFINE_bool(
        'choose_postprocessing', False,
        'choose flip, threshold, components on --split=validation and keep them with the run',
    )  # fmt: skip
    define_prediction_flags()
    hosts.define_flags()
    cli.run(main)
