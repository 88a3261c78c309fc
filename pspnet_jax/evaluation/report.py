"""report.html: an evaluation as one self-contained page, which needs no network.

Everything that comes from data is escaped, and the page's content security policy allows only our
own script, by its digest.
"""

import base64
import datetime
import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pspnet_jax.data.volumes import Volume, lesion_pixels
from pspnet_jax.evaluation import charts, metrics, scores, visualize
from pspnet_jax.evaluation.words import Words, words_for
from pspnet_jax.inference import choice
from pspnet_jax.runtime import log
from pspnet_jax.runtime.storage import writing

MOST_CONFUSED = 32  # most classes for which the confusion matrix is shown
MOST_SLICES = 48  # that are shown of a patient
MOST_PIXELS = 256  # side of a picture that is shown
PICTURE_BYTES = 15_000_000  # of all pictures, as base64
LAYERS = ('image', 'truth', 'prediction', 'probability', 'difference')
# Columns of the tables: {key of a row: (heading, decimals)}.
FIGURES = {
    'dice': ('Dice', 3),
    'dice_largest': ('Dice, largest component', 3),
    'iou': ('IoU', 3),
    'sensitivity': ('Sensitivity', 3),
    'precision': ('Precision', 3),
    'surface_dice': ('Surface Dice', 3),
    'lesion_dice': ('Lesion Dice', 3),
    'lesion_f1': ('Lesion F1', 3),
    'hd95': ('HD95, larger of two', 1),
    'hd95_joined': ('HD95, joined', 1),
    'assd': ('ASSD', 1),
}
COUNTS = {'present': ('Structures', 0), 'missed': ('Missed', 0), 'invented': ('Invented', 0)}
SIZES = {
    'lesion_voxels': ('Lesion, voxels', 0),
    'predicted_voxels': ('Predicted, voxels', 0),
    'slices': ('Slices', 0),
}
POOLED = {
    'per_slice_dice_empty_is_1': 'Dice per slice, an empty slice predicted empty counts 1',
    'pooled_pixel_accuracy': 'Pixel accuracy, pooled',
    'frequency_weighted_IU': 'frequency_weighted_IU, pooled',
    'mean_IU': 'mean_IU, pooled, background included',
}
TEMPLATES = Path(__file__).parent / 'templates'


class Case(NamedTuple):
    """A patient to show, reduced in size: D slices, all arrays D h w (image: D h w 3).

    `prob` is the probability of foreground in 255ths; `number` holds the numbers of the slices.
    """

    patient: str
    number: np.ndarray
    image: np.ndarray
    truth: np.ndarray
    pred: np.ndarray
    prob: np.ndarray


def extremes(patients: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """[(role, row)] of the best, median and worst patient by Dice, each patient once.

    The median is the lower of two in the middle. Patients with undefined Dice are skipped.
    """
    ranked = sorted((p for p in patients if p['dice'] is not None), key=lambda p: p['dice'])
    if not ranked:
        return []
    places = {'best': len(ranked) - 1, 'median': (len(ranked) - 1) // 2, 'worst': 0}
    roles = {}
    for role, place in places.items():
        roles.setdefault(place, []).append(role)
    return [(' and '.join(names), ranked[place]) for place, names in roles.items()]


def make_case(volume: Volume, pred_DHW: np.ndarray, foreground_DHW: np.ndarray) -> Case:
    """A Case of every n-th pixel and at most MOST_SLICES evenly spaced slices.

    The slice with the largest lesion is among them.
    """
    D, H, W = pred_DHW.shape
    keep = np.arange(D)
    if D > MOST_SLICES:
        most = _lesion_pixels(volume.mask).argmax()
        spaced = np.linspace(0, D - 1, MOST_SLICES - 1).round().astype(int)
        keep = np.union1d(spaced, most)
    step = math.ceil(max(H, W) / MOST_PIXELS)
    return Case(
        volume.patient,
        volume.slices[keep],
        np.stack([visualize.to_rgb(volume.image[d, ::step, ::step]) for d in keep]),
        volume.mask[keep, ::step, ::step],
        pred_DHW[keep, ::step, ::step],
        np.rint(255 * foreground_DHW[keep, ::step, ::step]).astype(np.uint8),
    )


def _lesion_pixels(mask_DHW: np.ndarray) -> np.ndarray:
    return np.array([lesion_pixels(mask_HW) for mask_HW in mask_DHW])


def write(
    workdir: str | Path,
    result: dict[str, Any],
    cases: Sequence[tuple[str, Case]],
    command: str = '',
    folder: str | Path = '',
) -> Path:
    """Write report.html of the result of `protocol.evaluate_checkpoint` to FOLDER or WORKDIR.

    `cases` are [(role, Case)] of the `extremes`; the run's curves are read from
    WORKDIR/metrics.jsonl. `command` makes the same page again. Pictures are made coarser until they
    fit into PICTURE_BYTES.
    """
    path = Path(folder or workdir) / 'report.html'
    made = {
        'run': Path(workdir).absolute().name,
        'command': command,
        'date': datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z'),
    }
    page = render(result, log.read(workdir), cases, **made)
    with writing(path) as aside:
        aside.write_text(page, encoding='utf-8', errors='replace')  # names need not be UTF-8
    return path


def render(
    result: dict[str, Any],
    records: Sequence[dict[str, Any]],
    cases: Sequence[tuple[str, Case]],
    run: str = '',
    command: str = '',
    date: str = '',
) -> str:
    """The page: the template, filled with metrics, charts and pictures."""
    script = (TEMPLATES / 'report.js').read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    bins = [each for each in result['calibration']['bins'] if each['voxels']]
    rows = {row['patient']: row for row in result['patients']}
    chosen = result.get('postprocessing')
    structures = result['summary']['structures']
    distance = _unit(result['patients'], result['data']['spacing'])
    w = words_for(result)
    lesions = [p for p in result['patients'] if p['dice'] is not None and p['lesion_voxels']]
    volume = _unit(lesions, result['data']['spacing'], 'cubic ')
    return _template().render(
        result,
        title=_title(result, run),
        command=command,
        date=date,
        w=w,
        class_names=visualize.class_words(_names(result), len(structures) + 2),
        policy="default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=(TEMPLATES / 'report.css').read_text(),
        script=script,
        few=metrics.FEW,
        chosen=chosen and choice.describe(chosen, result['data']['split']),
        seen=len((result['data'].get('overlap') or {'train': ()})['train']),
        figures=_fitting(FIGURES, w),
        structure_figures={
            name: of for name, of in _fitting(FIGURES, w).items() if name in structures[0]
        },
        class_figures={name: FIGURES[name] for name in scores.OF_CLASS},
        most_confused=MOST_CONFUSED,
        seen_words=scores.SEEN,
        counts=COUNTS,
        columns=_fitting(FIGURES | COUNTS | SIZES, w),
        pooled={name: of.replace('slice', w.slice) for name, of in POOLED.items()},
        volume_chart=lesions and charts.svg(charts.lesion_volume(lesions, volume, w)),
        bins=bins,
        calibration_chart=bins and charts.svg(charts.calibration(bins)),
        curves={each.title: charts.svg(each) for each in charts.run_charts(records, distance)},
        legend=_legend([case for _, case in cases], _names(result)),
        heat=f'linear-gradient(to right, {", ".join(map(_css, visualize.HEAT[::51]))})',
        layers=LAYERS,
        cases=[
            {
                'role': role,
                'row': rows[case.patient],
                'shown': len(case.number),
                'start': int(_lesion_pixels(case.truth).argmax()),
            }
            for role, case in cases
        ],
        pictures=_encode([case for _, case in cases]),
    )


def _template():
    """templates/report.html, which escapes all but what it marks as safe: our files and charts."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {'number': _number, 'interval': _interval}
    environment.policies['json.dumps_kwargs'] = {'allow_nan': False, 'separators': (',', ':')}
    return environment.get_template('report.html')


def _number(value: float | None, digits: int = 3) -> str:
    return '-' if value is None else f'{value:,.{digits}f}'


def _interval(figures: dict[str, Any], digits: int) -> str:
    if figures['ci95'] is None:
        return 'none'
    return ' to '.join(_number(end, digits) for end in figures['ci95'])


def _unit(patients: Sequence[dict[str, Any]], spacing: Sequence[float], cubic: str = '') -> str:
    """The unit of distances or volumes; `spacing` is for patients whose files have none."""
    known, mm = [row['in_mm'] for row in patients], f'{cubic}millimetres'
    flat = all(row['slices'] == row['scans'] for row in patients)
    steps = f'{cubic}units of eval.spacing'
    if set(spacing) == {1.0}:
        steps = 'pixels' if flat else 'voxels'
    return mm if all(known) else f'{mm} where known, else {steps}' if any(known) else steps


def _title(result: dict[str, Any], run: str) -> str:
    """'holdout_0: unet on lgg, test': the run, its network and the data."""
    data, model = result['data'], result['checkpoint']['config']['model']['name']
    source = Path(data['source']).name or data['source']
    split = f', {data["split"]}' if data['split'] else ''
    return f'{run}: {model} on {source}{split}' if run else f'{model} on {source}{split}'


def _names(result: dict[str, Any]) -> Sequence[str]:
    """The names of all classes, background first; () if they have none."""
    return result['checkpoint']['config']['model'].get('class_names') or ()


def _fitting(columns: dict[str, tuple[str, int]], w: Words) -> dict[str, tuple[str, int]]:
    """The columns with headings in the result's words."""
    pairs = ('Lesion', w.lesion.capitalize()), ('voxel', w.voxel), ('Slice', w.slice.capitalize())
    found = {}
    for key, (heading, digits) in columns.items():
        for old, new in pairs:
            heading = heading.replace(old, new)
        found[key] = (heading, digits)
    return found


def _legend(cases: Sequence[Case], names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """{panels: [(colour, words)]} for what the panels show."""
    labels, apart = [np.zeros(1, np.uint8)], [np.zeros(1, np.uint8)]
    for case in cases:
        labels += [np.unique(case.truth), np.unique(case.pred)]
        apart.append(np.unique(visualize.difference(case.pred, case.truth)))
    keys = {
        'Truth, prediction': visualize.class_keys(np.concatenate(labels), names),
        'Difference': visualize.difference_keys(np.concatenate(apart), names),
    }
    return {panel: [(_css(color), words) for color, words in key] for panel, key in keys.items()}


def _css(color: Sequence[int]) -> str:
    return f'rgb({", ".join(map(str, color))})'


def _encode(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The pictures for the page's script, at the largest scale (1, 1/2, 1/4, ...) that fits."""
    step = 1
    while True:
        pictures = [_encode_case(case, step) for case in cases]
        size = sum(len(uri) for case in pictures for layer in LAYERS for uri in case[layer])
        if size <= PICTURE_BYTES or step >= MOST_PIXELS:
            return pictures
        step *= 2


def _encode_case(case: Case, step: int) -> dict[str, Any]:
    """Data URIs by layer and slice. Truth, prediction and difference are drawn over the image."""
    image, truth, pred, prob = (x[:, ::step, ::step] for x in case[2:])
    labels, kinds = visualize.label_palette(), visualize.difference_palette()
    apart = [visualize.difference(p, t) for p, t in zip(pred, truth, strict=True)]
    return {
        'number': [int(n) for n in case.number],
        'image': [_png(Image.fromarray(x).quantize(256)) for x in image],
        'truth': [_png(_indexed(x, labels), transparency=0) for x in truth],
        'prediction': [_png(_indexed(x, labels), transparency=0) for x in pred],
        'probability': [_png(_indexed(x, visualize.HEAT)) for x in prob],
        'difference': [_png(_indexed(x, kinds), transparency=0) for x in apart],
    }


def _indexed(index_HW: np.ndarray, palette: np.ndarray) -> Image.Image:
    """A palette picture whose palette has only the entries it needs."""
    picture = Image.frombytes('P', index_HW.shape[::-1], index_HW.tobytes())
    picture.putpalette(palette[: int(index_HW.max()) + 1].tobytes())
    return picture


def _png(picture: Image.Image, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, 'png', optimize=True, **options)
    return f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'
