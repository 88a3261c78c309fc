"""Metrics of a network over volumes with known masks: first per case, then over cases.

A case is a patient's volume or an image. The main metric is Dice over a whole case: its mean,
median and deviation over cases, and with several classes also per class. Per-slice and pooled
metrics are named as such and come with the baseline that predicts all background. docs/metrics.md
defines each metric.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from pspnet_jax.data import pipeline, volumes
from pspnet_jax.data.volumes import IGNORE_LABEL, Volume
from pspnet_jax.evaluation import metrics
from pspnet_jax.evaluation.words import Words, words_for
from pspnet_jax.inference import calibration, choice, postprocess
from pspnet_jax.runtime import hosts
from pspnet_jax.runtime.errors import DataError, one_line, some

PredictFn = Callable[[np.ndarray], np.ndarray]  # B H W C normalised -> B H W K probabilities
DISTANCES = ('hd95', 'hd95_joined', 'assd', 'surface_dice')  # of `metrics.surface_ratios`
LESIONS = ('lesion_dice', 'lesion_f1')  # of `metrics.lesion_ratios`
FIGURES = ('dice', 'dice_largest', 'iou', 'sensitivity', 'precision', *DISTANCES, *LESIONS)
OVERLAP = ('dice', 'iou', 'sensitivity', 'precision')  # of `metrics.ratios`
OF_CLASS = (*OVERLAP, 'hd95')  # metrics of each class, per case and over cases
MOST_CONFUSED = 8  # most classes for which the confusion matrix fits a console
TRUTH = 'truth \\ predicted'
SEEN = {'train': 'trained on', 'validation': 'checkpoint chosen on'}  # a case's note in the table
COUNTS = (
    'present', 'missed', 'invented', 'lesions_found', 'lesions_missed', 'lesions_false'
)  # fmt: skip


class Batching(NamedTuple):
    """How a volume's slices become the network's batches: the arguments of `pipeline.eval_batches`.

    `intensity` normalises every volume alike; None if each has its own.
    """

    batch_size: int
    intensity: np.ndarray | None
    context: int


class Scoring(NamedTuple):
    """Which classes are scored, and the options of the metrics.

    `spacing` is for volumes that have none of their own; `lesion_options` are those of
    `metrics.lesions`. `class_names` are the names of all classes, background first; if empty,
    'class 1' and so on.
    """

    num_classes: int
    ignore_label: int
    spacing: tuple[float, float, float]
    surface_tolerance: float
    lesion_options: Mapping[str, Any]
    calibration_bins: int
    bootstrap: int
    class_names: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        """The names of the K classes; equal names are followed by the class number."""
        names = self.class_names or ['background']
        names = [*names, *[''] * (self.num_classes - len(names))]
        names = [name or f'class {label}' for label, name in enumerate(names)]
        return [
            f'{name} ({label})' if names.count(name) > 1 else name
            for label, name in enumerate(names)
        ]

    @property
    def structures(self) -> list[int]:
        """The classes that are scored one by one."""
        return [label for label in range(1, self.num_classes) if label != self.ignore_label]


def predict_slices(
    predict_fn: PredictFn, volume: Volume, batching: Batching
) -> Iterator[np.ndarray]:
    """n H W K probabilities of all D slices in order, batch by batch, without padding."""
    left = len(volume.image)
    for batch in pipeline.eval_batches(volume, *batching):
        yield np.asarray(predict_fn(batch))[:left]
        left -= len(batch)


def predict_foreground(
    predict_fn: PredictFn,
    volume: Volume,
    batching: Batching,
    *,
    temperature: float = 1.0,
    threshold: float | None = None,
    **clean_options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """D H W uint8 labels, and D H W float32: the probability of any class but 0.

    `threshold` and `clean_options` are those of `postprocess`; each scan is cleaned separately. The
    temperature changes the probabilities, not the labels.
    """
    labels, foreground = [], []
    for prob in predict_slices(predict_fn, volume, batching):
        labels.append(postprocess.to_labels(prob, threshold))
        foreground.append(calibration.temper(prob, temperature)[..., 1:].sum(-1))
    labels = np.concatenate(labels)
    for rows in volumes.scans(volume.scan, len(labels)):
        labels[rows] = postprocess.clean(labels[rows], **clean_options)
    return labels, np.concatenate(foreground)


def evaluate_options(config, intensity: np.ndarray | None) -> dict[str, Any]:
    """The keyword arguments of `evaluate_volumes` that a config decides."""
    options = config.eval
    lesions = {'dilation': options.lesion_dilation, 'smallest': options.lesion_smallest}
    return {
        'batching': Batching(options.batch_size, intensity, config.data.context),
        'scoring': Scoring(
            config.model.num_classes,
            config.loss.ignore_label,
            options.spacing,
            options.surface_tolerance,
            lesions,
            options.calibration_bins,
            options.bootstrap,
            config.model.class_names,
        ),
    }


def evaluate_volumes(
    predict_fn: PredictFn,
    data: Iterable[Volume],
    *,
    batching: Batching,
    scoring: Scoring,
    temperature: float = 1.0,
    label_options: Mapping[str, Any] = MappingProxyType({}),
    each: Callable[[Volume, np.ndarray], None] = lambda volume, pred: None,
    order: Sequence[str] = (),
) -> dict[str, Any]:
    """{'summary', 'patients', 'confusion', 'baseline', 'calibration', 'data'} over volumes, which
    are read one at a time.

    With more than two classes a patient's metric is the mean over the structures 1..K-1 without
    `ignore_label`; 'classes' of a patient and of the summary holds those of each class by name, and
    'mean_of' of the data describes the mean. 'confusion' counts voxels: one row per true class, one
    column per predicted class.

    Distances and components are computed per scan, so per image if a patient has several, and a
    distance is the mean over these. It is in mm if a volume has its spacing, else in the unit of
    `scoring.spacing`. Undefined metrics are None; 'n' is the number of patients in a mean.
    'structures' counts those that are missed or invented, which no distance shows. Calibration is
    that of the probability of any class but 0, over all counted voxels.

    `label_options` are further options of `predict_foreground`. `each(volume, labels_DHW)` is
    called with every prediction; the volume's ignored voxels are IGNORE_LABEL. On several hosts
    `data` are this host's volumes, `order` lists the patients of all hosts, and the metrics are
    over all. Raises DataError for labels outside 0..K-1, and if there is no volume.
    """
    rows, options = [], {'temperature': temperature, **label_options}
    confusion = np.zeros((scoring.num_classes,) * 2, np.int64)
    for volume in data:
        check_labels(volume, scoring)
        pred, foreground = predict_foreground(predict_fn, volume, batching, **options)
        each(with_ignored(volume, scoring.ignore_label), pred)
        found = metrics.confusion(pred, volume.mask, scoring.num_classes, scoring.ignore_label)
        confusion += found
        rows.append(_measure(volume, pred, foreground, metrics.counts_of(found), scoring))
    rows = in_order(hosts.gather(rows), order)
    if not rows:
        raise DataError('there is no volume to evaluate: the split is empty')
    patients, per_slice, empty, calibrated = map(list, zip(*rows, strict=True))
    calibrated = np.sum(calibrated, axis=0)
    if not calibrated.any():
        raise DataError(
            f'every voxel is labelled {scoring.ignore_label}, which is ignored: nothing to score'
        )
    slices = np.concatenate(per_slice)
    return {
        'summary': _summary(patients, slices, scoring),
        'patients': patients,
        'confusion': {
            'of': 'voxels: a row a class of the truth, a column a class of the prediction',
            'classes': scoring.names,
            'voxels': np.sum(hosts.gather([confusion.tolist()]), axis=0).tolist(),
        },
        'baseline': _baseline(empty, scoring),
        'calibration': {
            'of': 'the probability of any class but 0, over all counted voxels',
            'temperature': temperature,
            'expected_calibration_error': metrics.expected_calibration_error(calibrated),
            'bins': _calibration_bins(calibrated),
        },
        'data': _about(patients, slices, scoring),
    }


def _measure(
    volume: Volume, pred: np.ndarray, foreground: np.ndarray, count: np.ndarray, scoring: Scoring
) -> list[Any]:
    """[the patient's metrics, `metrics.counts` of each slice, the same for all background, counts
    of calibration], as JSON values; `count` are the counts of the volume.
    """
    num_classes, ignore_label = scoring.num_classes, scoring.ignore_label
    counted = volume.mask != ignore_label
    calibrated = metrics.calibration_counts(
        foreground[counted], volume.mask[counted] > 0, scoring.calibration_bins
    )
    per_slice, empty = (
        [
            metrics.counts(labels, truth, num_classes, ignore_label).tolist()
            for labels, truth in zip(predicted, volume.mask, strict=True)
        ]
        for predicted in (pred, np.zeros_like(pred))
    )
    figures = _patient_row(pred, volume, count, scoring)
    return [figures, per_slice, empty, np.asarray(calibrated).tolist()]


def _summary(
    patients: Sequence[dict[str, Any]], slices: np.ndarray, scoring: Scoring
) -> dict[str, Any]:
    """The metrics over patients, over their slices and over all pixels; `slices` are counts."""
    structures = scoring.structures
    pooled, by_structure = np.sum(slices, axis=0), _over_structures(patients, structures)
    return {
        **{name: _over_patients(patients, name, scoring.bootstrap) for name in FIGURES},
        'structures': by_structure,
        'classes': _over_classes(patients, by_structure, scoring),
        'lesions': {
            what: sum(p[f'lesions_{what}'] for p in patients)
            for what in ('found', 'missed', 'false')
        },
        'per_slice_dice_empty_is_1': _slice_dice(slices, structures),
        'pooled': {
            name: _mean(values[structures]) for name, values in metrics.ratios(pooled).items()
        },
        'pooled_pixel_accuracy': _accuracy(pooled),
        **metrics.pooled_iou(pooled, scoring.ignore_label),
    }


def _baseline(counts: Sequence[Sequence], scoring: Scoring) -> dict[str, Any]:
    """The metrics of predicting all background, from each patient's counts per slice."""
    structures = scoring.structures
    ignored = [scoring.ignore_label] if scoring.ignore_label < scoring.num_classes else []
    slices = np.concatenate(counts)
    pooled = np.sum(slices, axis=0)
    return {
        'prediction': 'all background',
        'dice': _mean([_mean_dice(np.sum(of_one, axis=0), structures) for of_one in counts]),
        'per_slice_dice_empty_is_1': _slice_dice(slices, structures),
        'pooled_pixel_accuracy': _accuracy(pooled),
        'pooled_mean_iou': _mean(np.delete(metrics.ratios(pooled)['iou'], ignored)),
        **metrics.pooled_iou(pooled, scoring.ignore_label),
    }


def _about(
    patients: Sequence[dict[str, Any]], slices: np.ndarray, scoring: Scoring
) -> dict[str, Any]:
    """How many cases and slices the metrics are over, and their units."""
    in_mm = [row['in_mm'] for row in patients]
    steps = f'steps of (slice, row, column) = {tuple(scoring.spacing)}'
    if any(in_mm):
        steps = f'mm if the file has a spacing, else {steps}'
    return {
        'patients': len(patients),
        'scans': sum(row['scans'] for row in patients),
        'slices': len(slices),
        'lesion_slices': sum(bool(c[1:, [0, 2]].sum()) for c in slices),
        'ignored_slices': int((~slices.any((1, 2))).sum()),
        'hd95_unit': 'mm' if all(in_mm) else steps,
        'spacing': list(scoring.spacing),
        'surface_tolerance': scoring.surface_tolerance,
        'lesion_options': dict(scoring.lesion_options),
        'mean_of': _mean_of(patients, scoring),
    }


def _mean_of(patients: Sequence[dict[str, Any]], scoring: Scoring) -> str:
    """A description of what the mean Dice is a mean over."""
    names = [scoring.names[label] for label in scoring.structures]
    w = words_for({'patients': patients})
    n = sum(row['dice'] is not None for row in patients)
    over = f'over {n} of {len(patients)} {w.case}s'
    left_out = f'{scoring.names[0]} is left out'
    if 0 < scoring.ignore_label < scoring.num_classes:
        left_out += f', {scoring.names[scoring.ignore_label]} is ignored'
    if len(names) == 1:
        return (
            f'Dice is that of {names[0]} in each {w.case}, averaged {over}; {left_out}. A {w.case} '
            f'with {names[0]} in neither truth nor prediction does not count; one with '
            f'{names[0]} in only one of them counts 0.'
        )
    return (
        f'Dice is the mean over {len(names)} classes ({some(names)}) of each {w.case}, then '
        f'averaged {over}; {left_out}. A class that is in neither truth nor prediction of a '
        f'{w.case} does not count there; one that is in only one of them counts 0. A {w.case} '
        'without any class in either does not count.'
    )


def in_order(rows: Sequence[Any], order: Sequence[str]) -> list[Any]:
    """Rows in the order that one host would have: by their patients' place in `order`, if given."""
    place = {name: n for n, name in enumerate(order)}

    def key(row) -> int:
        name = row[0]['patient']  # 'NAME 32x40' if the slices have several sizes
        return place[name if name in place else name.rsplit(' ', 1)[0]]

    return sorted(rows, key=key) if order else list(rows)


def check_labels(volume: Volume, scoring: Scoring) -> None:
    wrong = np.setdiff1d(volume.mask, [*range(scoring.num_classes), scoring.ignore_label])
    if wrong.size:
        raise DataError(
            f'{volume.patient} has labels {wrong.tolist()}, but the model has classes 0 to '
            f'{scoring.num_classes - 1}: map them (data.label_map), or train with '
            f'--config.model.num_classes={wrong.max() + 1}'
        )


def with_ignored(volume: Volume, ignore_label: int) -> Volume:
    """The volume with IGNORE_LABEL as its ignored label, for pictures."""
    return volume._replace(mask=np.where(volume.mask == ignore_label, IGNORE_LABEL, volume.mask))


def _patient_row(
    pred: np.ndarray, volume: Volume, count: np.ndarray, scoring: Scoring
) -> dict[str, Any]:
    """One patient's metrics, means over the structures.

    'structures' and (by name) 'classes' hold the metrics of each structure.
    """
    num_classes, ignore_label = scoring.num_classes, scoring.ignore_label
    spacing = volume.spacing or scoring.spacing
    scans = volumes.scans(volume.scan, len(pred))
    structures = scoring.structures
    largest, counted = np.zeros_like(pred), volume.mask != ignore_label
    rows = []
    for label in structures:
        ours, theirs = (pred == label) & counted, volume.mask == label
        for scan in scans:
            component = postprocess.largest_component(pred[scan] == label)
            largest[scan] = np.where(component, label, largest[scan])
        found = [
            metrics.surface_ratios(
                metrics.surface_distances(ours[scan], theirs[scan], spacing),
                scoring.surface_tolerance,
            )
            for scan in scans
        ]
        dice, hits, false = zip(
            *(metrics.lesions(ours[scan], theirs[scan], spacing, **scoring.lesion_options)
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
        'classes': {
            scoring.names[row['label']]: {
                'label': row['label'],
                **{name: _mean([ratios[name][row['label']]]) for name in OVERLAP},
                'hd95': row['hd95'],
                'voxels': int(count[row['label'], [0, 2]].sum()),
                'predicted_voxels': int(count[row['label'], [0, 1]].sum()),
            }
            for row in rows
        },
    }


def _over_structures(patients, structures: Sequence[int]) -> list[dict[str, Any]]:
    """For each structure: means over patients, the number of patients, and counts."""
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


def _over_classes(
    patients, by_structure: Sequence[dict[str, Any]], scoring: Scoring
) -> dict[str, dict[str, Any]]:
    """{class: `_over_patients` of each of its metrics, and the counts of `_over_structures`}."""
    found = {}
    for counted in by_structure:
        name = scoring.names[counted['label']]
        rows = [patient['classes'][name] for patient in patients]
        figures = {key: _over_patients(rows, key, scoring.bootstrap) for key in OF_CLASS}
        numbers = {key: counted[key] for key in ('label', 'present', 'missed', 'invented')}
        found[name] = numbers | figures
    return found


def _mean_dice(counts: np.ndarray, structures: Sequence[int]) -> float | None:
    """(K, 3) counts -> mean Dice over the structures; None if all are undefined."""
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
    """Mean Dice over slices. An empty slice that is predicted empty counts 1; a slice whose pixels
    are all ignored does not count.
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


def table(result: dict[str, Any]) -> str:
    """The printed table: one row per case, then the summary, the classes and the baseline."""
    patients, summary, w = result['patients'], result['summary'], words_for(result)
    columns = ('dice', 'dice_largest', 'iou', 'sensitivity', 'precision', 'hd95', 'hd95_joined')
    names = [one_line(p['patient']) for p in patients]
    wide = max(len(w.case), *map(len, names))
    head = f'{w.case:{wide}} ' + ' '.join(f'{c:>12}' for c in columns)
    head += f' {"missed":>8} {"invented":>8} {"voxels":>9}'
    lines = [head, '-' * len(head)]
    for p, name in zip(patients, names, strict=True):
        cells = ' '.join(f'{_cell(p[c]):>12}' for c in columns)
        missed = f'{p["missed"]} of {p["present"]}'
        seen = SEEN.get(p.get('seen'), '')
        lines.append(
            f'{name:{wide}} {cells} {missed:>8} {p["invented"]:>8} {p["lesion_voxels"]:>9,}'
            + f'  {seen}' * bool(seen)
        )
    lines.append('-' * len(head))
    for statistic in ('mean', 'median', 'sd'):
        cells = ' '.join(f'{_cell(summary[c][statistic]):>12}' for c in columns)
        lines.append(f'{statistic:{wide}} {cells}')
    baseline, calibrated = result['baseline'], result['calibration']
    dice, hd95 = summary['dice'], summary['hd95']
    found = {
        name: sum(row[name] for row in summary['structures'])
        for name in ('present', 'missed', 'invented')
    }
    lines += [
        f'per-{w.whole} Dice {_cell(dice["mean"])}, {interval(dice)} '
        f'(bootstrap over {dice["n"]} of {len(patients)} {w.case}s)',
        one_line(result['data']['mean_of']),
        f'HD95 {_cell(hd95["mean"])} (the larger of the two directed ones), '
        f'{_cell(summary["hd95_joined"]["mean"])} (both surfaces joined), over {hd95["n"]} of '
        f'{len(patients)} {w.case}s',
        f'{found["missed"]} of {found["present"]} structures are missed and {found["invented"]} '
        'invented; no distance includes these',
    ]
    if len(summary['classes']) > 1:
        lines += [*_class_lines(summary['classes'], w), *_confusion_lines(result['confusion'])]
    lines += [
        f'pooled Dice {_cell(summary["pooled"]["dice"])}; per-{w.slice} Dice with empty = 1 '
        f'{_cell(summary["per_slice_dice_empty_is_1"])}',
        f'all background: per-{w.whole} Dice {_cell(baseline["dice"])}, per-{w.slice} with empty = '
        f'1 {_cell(baseline["per_slice_dice_empty_is_1"])}, '
        f'pixel accuracy {_cell(baseline["pooled_pixel_accuracy"])}, '
        f'mean IoU {_cell(baseline["pooled_mean_iou"])}',
        f'ASSD {_cell(summary["assd"]["mean"])} over {summary["assd"]["n"]}; surface Dice within '
        f'{result["data"]["surface_tolerance"]:g} {_cell(summary["surface_dice"]["mean"])} over '
        f'{summary["surface_dice"]["n"]}',
        f'{w.lesion} by {w.lesion}, as in BraTS 2023: '
        f'Dice {_cell(summary["lesion_dice"]["mean"])}, '
        f'detection F1 {_cell(summary["lesion_f1"]["mean"])} over {summary["lesion_f1"]["n"]}; '
        f'{w.lesion}s: '
        f'{", ".join(f"{number} {what}" for what, number in summary["lesions"].items())}',
        f'pooled: frequency_weighted_IU {_cell(summary["frequency_weighted_IU"])}, mean_IU '
        f'{_cell(summary["mean_IU"])}, class_wise_IU '
        f'{" ".join(_cell(value) for value in summary["class_wise_IU"])}',
        f'expected calibration error {_cell(calibrated["expected_calibration_error"], 4)} at '
        f'temperature {_cell(calibrated["temperature"])}',
        *seen_lines(result),
    ]
    if chosen := result.get('postprocessing'):
        split = result['data'].get('split', '')
        lines.append(f'post-processing: {choice.describe(chosen, split)}')
    return '\n'.join(lines)


def seen_lines(result: dict[str, Any]) -> list[str]:
    """One sentence for each part of the run's own data that is among the cases."""
    patients, w = result['patients'], words_for(result)
    words = {
        'train': 'the run was trained on: these results are too optimistic',
        'validation': 'the checkpoint was chosen on: these results are slightly too optimistic',
    }
    numbers = {part: sum(row.get('seen') == part for row in patients) for part in words}
    return [
        f'{number} of {len(patients)} {w.case}s have images that {words[part]}'
        for part, number in numbers.items()
        if number
    ]


def _cell(value: float | None, digits: int = 3) -> str:
    return '-' if value is None else f'{value:.{digits}f}'


def _class_lines(classes: Mapping[str, dict[str, Any]], w: Words) -> list[str]:
    """One row per class: its metrics over cases, each with the number of cases."""
    wide = max(len('class'), *(len(one_line(name)) for name in classes))
    head = f'{"class":{wide}} {"Dice":>12} {"median":>7} {"95 % interval":>16} '
    head += ' '.join(f'{name:>12}' for name in ('IoU', 'sensitivity', 'precision', 'HD95'))
    head += f' {"missed":>10} {"invented":>8}'
    lines = ['', head, '-' * len(head)]
    for name, row in classes.items():
        dice = row['dice']
        ends = ' to '.join(map(_cell, dice['ci95'])) if dice['ci95'] else 'none'
        missed = f'{row["missed"]} of {row["present"]}'
        cells = ' '.join(
            f'{_cell(row[key]["mean"])} ({row[key]["n"]})'.rjust(12) for key in OF_CLASS
        )
        first, rest = cells[:12], cells[13:]
        lines.append(
            f'{one_line(name):{wide}} {first} {_cell(dice["median"]):>7} {ends:>16} {rest} '
            f'{missed:>10} {row["invented"]:>8}'
        )
    return [*lines, f'means over {w.case}s (number of {w.case}s)', '']


def _confusion_lines(confusion: Mapping[str, Any]) -> list[str]:
    """The matrix if it fits a console, else where to find it."""
    names, voxels = [one_line(name) for name in confusion['classes']], confusion['voxels']
    if len(names) > MOST_CONFUSED:
        return [f'the confusion matrix of {len(names)} classes is in evaluation.json']
    texts = [[f'{number:,}' for number in row] for row in voxels]
    short = [name if len(name) <= 14 else f'{name[:13]}~' for name in names]
    widths = [max(len(head), *(len(row[k]) for row in texts)) for k, head in enumerate(short)]
    wide = max(len(TRUTH), *map(len, short))
    return [
        f'{TRUTH:{wide}}  ' + '  '.join(f'{h:>{n}}' for h, n in zip(short, widths, strict=True)),
        *(
            f'{name:{wide}}  ' + '  '.join(f'{x:>{n}}' for x, n in zip(row, widths, strict=True))
            for name, row in zip(short, texts, strict=True)
        ),
        'voxels: one row per true class, one column per predicted class',
        '',
    ]


def interval(figures: dict[str, Any], digits: int = 3) -> str:
    """The interval of one of the summary's metrics as text, with a warning for few patients."""
    if figures['ci95'] is None:
        return f'no interval for {figures["n"]}'
    low, high = figures['ci95']
    few = f', too narrow for {figures["n"]}' if figures['n'] < metrics.FEW else ''
    return f'95 % interval {low:.{digits}f} to {high:.{digits}f}{few}'
