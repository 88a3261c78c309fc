"""An evaluation as one page to read: report.html, a file that needs no other and no network.

Everything that comes from data is escaped on its way into the page, and the page's content
security policy lets no script run but ours, whose digest it states.
"""

import base64
import hashlib
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pspnet_jax import chart, choice, log, metrics, visualize
from pspnet_jax.chart import Chart, Series
from pspnet_jax.data.files import writing
from pspnet_jax.data.volumes import IGNORE_LABEL, Volume, lesion_pixels

MOST_SLICES = 48  # of a patient shown
MOST_PIXELS = 256  # a side of a picture shown
PICTURE_BYTES = 15_000_000  # of all pictures, as base64
LAYERS = ('image', 'truth', 'prediction', 'probability', 'difference')
FIGURES = {
    'dice': 'Dice',
    'dice_largest': 'Dice, largest component',
    'iou': 'IoU',
    'sensitivity': 'Sensitivity',
    'precision': 'Precision',
    'surface_dice': 'Surface Dice',
    'lesion_dice': 'Lesion Dice',
    'lesion_f1': 'Lesion F1',
    'hd95': 'HD95, larger of two',
    'hd95_joined': 'HD95, joined',
    'assd': 'ASSD',
}
DISTANCES = ('hd95', 'hd95_joined', 'assd')
COUNTS = {  # of structures, by patient
    'present': 'Structures',
    'missed': 'Missed',
    'invented': 'Invented',
}
# What the figures are, where they stand; docs/metrics.md has the rest.
DEFINITIONS = (
    'Each figure is a mean over the structures (the classes but background), then over patients; '
    'the deviation is that of a sample (n - 1).',
    'Dice and IoU: a patient without lesion counts 0 if anything is predicted, and is left out '
    'otherwise. Largest component: of each class, corners connect (26 neighbours, 8 in a picture).',
    'HD95, ASSD and surface Dice are between centres of voxels of the two surfaces; a voxel at the '
    "array's border is surface; a single picture's surface is its outline. HD95 is the larger of "
    "the two directed 95th percentiles (MONAI's); joined, that of both surfaces together "
    "(MedPy's), can be 20 times smaller.",
    'A lesion that is missed is in no HD95, no ASSD and no precision, one that is invented in no '
    'HD95, no ASSD and no sensitivity: the counts say how many are.',
)
TRAINED = (
    'Soft Dice is over the batch as one volume, with 1 added above and below. The warm-up '
    'multiplies the decay of the learning rate. An average of the parameters is evaluated with the '
    'BatchNorm statistics of the step. HD95 is the larger of two, and leaves missed lesions out.'
)

STYLE = """
body { margin: 0; background: #fff; color: #222; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 16px 24px 64px; }
h1 { font-size: 24px; margin: 16px 0 4px; }
h2 { font-size: 19px; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid #ccc; }
.note { font-size: 13px; color: #555; margin-bottom: 4px; }
h3 { font-size: 16px; margin: 24px 0 4px; }
p { margin: 4px 0 12px; max-width: 75ch; }
.headline { font-size: 18px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 12px 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 4px 0; }
th, td { padding: 4px 10px; border-bottom: 1px solid #e2e2e2; }
td { text-align: right; white-space: nowrap; }
thead th { text-align: right; vertical-align: bottom; border-bottom: 2px solid #767676; }
thead th:first-child, tbody th { text-align: left; }
tbody th { font-weight: 400; }
tbody tr:hover { background: #f3f6f9; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: ' \\25B2'; }
th[aria-sort=descending] button::after { content: ' \\25BC'; }
figure { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 500px)); gap: 16px; }
svg { width: 100%; height: auto; border: 1px solid #e2e2e2; }
.slider { display: flex; align-items: center; gap: 10px; max-width: none; }
.slider input { width: 320px; }
.slider output { font-variant-numeric: tabular-nums; min-width: 9ch; }
.panels { display: grid; grid-template-columns: repeat(5, 1fr); gap: 8px; }
@media (max-width: 800px) { .panels { grid-template-columns: repeat(2, 1fr); } }
.stack { position: relative; background: #000; }
.stack img { display: block; width: 100%; image-rendering: pixelated; }
.stack img + img { position: absolute; inset: 0; height: 100%; opacity: 0.65; }
figcaption { font-size: 13px; color: #555; }
.legend { font-size: 13px; margin: 2px 0; max-width: none; }
.legend span { margin-right: 14px; }
.legend i { display: inline-block; width: 12px; height: 12px; margin-right: 5px; }
.legend i.heat { width: 80px; margin: 0 5px; }
"""

SCRIPT = """
'use strict';
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const compare = (x, y, sign) => {
    const a = x.dataset.value, b = y.dataset.value;
    if (a === undefined)  // a name
      return sign * x.textContent.localeCompare(y.textContent, 'en', {numeric: true});
    if (a === '' || b === '') return (a === '') - (b === '');  // undefined: last either way
    return sign * (a - b);
  };
  heads.forEach((head, column) => head.firstElementChild.addEventListener('click', () => {
    const way = head.getAttribute('aria-sort') === 'ascending' ? 'descending' : 'ascending';
    for (const other of heads) other.setAttribute('aria-sort', other === head ? way : 'none');
    const sign = way === 'ascending' ? 1 : -1;
    const rows = [...body.rows];
    rows.sort((x, y) => compare(x.cells[column], y.cells[column], sign));
    body.append(...rows);
  }));
}
const pictures = JSON.parse(document.getElementById('pictures').textContent);
for (const article of document.querySelectorAll('.case')) {
  const found = pictures[article.dataset.case];
  const slider = article.querySelector('input'), output = article.querySelector('output');
  const images = [];
  for (const stack of article.querySelectorAll('.stack')) {
    const layer = stack.dataset.layer;
    const layers = layer === 'image' || layer === 'probability' ? [layer] : ['image', layer];
    for (const name of layers) images.push({name, layer, element: new Image()});
    stack.append(...images.slice(-layers.length).map(image => image.element));
  }
  const show = () => {
    const d = Number(slider.value);
    output.value = `${found.number[d]} (${d + 1} of ${found.number.length})`;
    slider.setAttribute('aria-valuetext', `slice ${found.number[d]}`);
    for (const {name, layer, element} of images) {
      element.src = found[name][d];
      element.alt = name === layer ? `${layer}, slice ${found.number[d]}` : '';
    }
  };
  slider.addEventListener('input', show);
  show();
}
"""


class Case(NamedTuple):
    """A patient to look at, no larger than is shown: D slices, all arrays D h w (image: D h w 3).

    `prob` is the probability of foreground in 255ths; `number` those of the D slices.
    """

    patient: str
    number: np.ndarray
    image: np.ndarray
    truth: np.ndarray
    pred: np.ndarray
    prob: np.ndarray


def extremes(patients: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """[(role, row)] of the best, median and worst patient by Dice, each patient once.

    Of two in the middle the lower. Patients whose Dice is undefined are passed over.
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
    """Every n-th pixel and at most MOST_SLICES evenly spaced slices, that with most lesion too."""
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


def run_charts(records: Sequence[dict[str, float | None]]) -> list[Chart]:
    """Charts of what metrics.jsonl holds: loss and learning rate, validation Dice and HD95."""

    def series(label: str, key: str, **options: Any) -> Series:
        pairs = [(r['step'], r[key]) for r in records if _is_finite(r.get(key))]
        return Series(label, *thin(*zip(*pairs, strict=True)) if pairs else ((), ()), **options)

    dotted = {'dots': True}
    charts = [
        Chart('Loss', 'step', 'training loss', [series('', 'loss')], y_range=(0, None)),
        Chart(
            'Validation Dice',
            'step',
            'per volume',
            [
                series('mean', 'validation/dice', **dotted),
                series('median', 'validation/dice_median', color=chart.ORANGE, **dotted),
            ],
            y_range=(0, 1),
        ),
        Chart(
            'Validation HD95',
            'step',
            "the spacing's unit",
            [series('', 'validation/hd95', **dotted)],
            y_range=(0, None),
        ),
        Chart(
            'Learning rate', 'step', '', [series('', 'learning_rate')], y_range=(0, None)
        ),
    ]  # fmt: skip
    return [each for each in charts if any(len(s.x) for s in each.series)]


def thin(x: Sequence[float], y: Sequence[float], most: int = 300) -> tuple[list, list]:
    """Means over runs of equal length: at most `most` points."""
    size = math.ceil(len(x) / most)
    runs = [slice(i, i + size) for i in range(0, len(x), size)]
    return [float(np.mean(x[run])) for run in runs], [float(np.mean(y[run])) for run in runs]


def write_curves(workdir: str | Path) -> Path | None:
    """WORKDIR/curves.png of WORKDIR/metrics.jsonl; None where that holds nothing yet."""
    charts = run_charts(log.read(workdir))
    if not charts:
        return None
    path = Path(workdir) / 'curves.png'
    with writing(path) as aside:
        Image.fromarray(chart.grid([chart.picture(each) for each in charts])).save(aside, 'png')
    return path


def write(workdir: str | Path, result: dict[str, Any], cases: Sequence[tuple[str, Case]]) -> Path:
    """WORKDIR/report.html of what `evaluate.evaluate_checkpoint` found.

    `cases` are [(role, Case)], `extremes` with their pictures; the run's curves are read from
    WORKDIR/metrics.jsonl. At most PICTURE_BYTES of pictures: they are made coarser until they
    fit.
    """
    path = Path(workdir) / 'report.html'
    page = render(result, run_charts(log.read(workdir)), cases)
    with writing(path) as aside:
        aside.write_text(page, encoding='utf-8', errors='replace')  # names need not be UTF-8
    return path


def render(
    result: dict[str, Any], curves: Sequence[Chart], cases: Sequence[tuple[str, Case]]
) -> str:
    """The page."""
    pictures = _encode([case for _, case in cases])
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    sections = {
        'Summary': _summary(result),
        'Patients': _patients(result),
        'Dice and lesion volume': _volume(result),
        'Calibration': _calibration(result),
        'The training run': _curves(curves),
        'Best, median, worst': _cases(cases, {p['patient']: p for p in result['patients']}),
    }
    body = _heading(result)
    for name, parts in sections.items():
        body += [f'<section><h2>{name}</h2>', *parts, '</section>']
    return '\n'.join(
        [
            '<!DOCTYPE html>',
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f'<title>{_title(result)}</title>',
            f'<style>{STYLE}</style></head><body><main>',
            *body,
            '</main>',
            f'<script type="application/json" id="pictures">{_json(pictures)}</script>',
            f'<script>{SCRIPT}</script>',
            '</body></html>\n',
        ]
    )


def _title(result) -> str:
    name = result['checkpoint']['config']['model']['name']
    return html.escape(f'{name}: evaluation of step {result["checkpoint"]["step"]}')


def _heading(result) -> list[str]:
    data, dice = result['data'], result['summary']['dice']
    where = f'split {data["split"]} of {data["source"]}' if data['split'] else data['source']
    few = f' {_few(dice["n"])}' if dice['n'] < metrics.FEW else ''
    chosen = result.get('postprocessing')
    chosen = chosen and choice.words(chosen, data['split'])
    seen = len((data.get('overlap') or {'train': ()})['train'])
    return [
        f'<h1>{_title(result)}</h1>',
        f'<p>{html.escape(where)}: {data["patients"]} patients, {data["slices"]:,} slices, '
        f'{data["lesion_slices"]:,} with lesion.</p>',
        f'<p class="headline">Dice per volume <strong>{_cell(dice["mean"])}</strong>, '
        f'95 % interval {_interval(dice, 3)}</p>',
        f'<p>Dice is over the whole volume of a patient; mean and bootstrap interval are over '
        f'{dice["n"]} of {data["patients"]} patients.{few}</p>',
        f'<p><strong>{seen} of {data["patients"]} patients have pictures that the run was trained '
        'on: these figures are too good.</strong></p>' if seen else '',
        f'<p>Post-processing: {html.escape(chosen)}.</p>' if chosen else '',
    ]  # fmt: skip


def _interval(figures: dict[str, Any], digits: int) -> str:
    if figures['ci95'] is None:
        return 'none'
    return ' to '.join(_cell(end, digits) for end in figures['ci95'])


def _few(n: int) -> str:
    if n < 2:
        return 'There is no interval of fewer than two patients.'
    return (
        f'The interval of {n} is too narrow: it holds the true mean in 76 % of trials with 3 '
        'patients, 86 % with 6, 90 % with 10.'
    )


def _cell(value: float | None, digits: int = 3) -> str:
    return '-' if value is None else f'{value:,.{digits}f}'


def _digits(name: str) -> int:
    return 1 if name in DISTANCES else 3


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of escaped cells: the first of a row is its heading, the others numbers."""
    cells = ''.join(f'<th scope="col">{name}</th>' for name in head)
    body = '\n'.join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<table><caption>{caption}</caption><thead><tr>{cells}</tr></thead>'
        f'<tbody>{body}</tbody></table>'
    )


def _summary(result) -> list[str]:
    summary, baseline, data = result['summary'], result['baseline'], result['data']
    lesion_options = data['lesion_options']
    rows = []
    for name, words in FIGURES.items():
        digits, figures = _digits(name), summary[name]
        rows.append(
            [
                words,
                _cell(figures['mean'], digits),
                _interval(figures, digits),
                _cell(figures['median'], digits),
                _cell(figures['sd'], digits),
                f'{figures["n"]} of {data["patients"]}',
            ]
        )
    head = ['Per patient', 'mean', '95 % interval', 'median', 'deviation', 'defined for']
    pooled = [
        ('Dice per volume, mean', summary['dice']['mean'], baseline['dice']),
        *[
            (words, summary[name], baseline[name])
            for words, name in {
                'Dice per slice, an empty slice left empty counts 1': 'per_slice_dice_empty_is_1',
                'Pixel accuracy, pooled': 'pooled_pixel_accuracy',
                'frequency_weighted_IU, pooled': 'frequency_weighted_IU',
                'mean_IU, pooled, background included': 'mean_IU',
            }.items()
        ],
        *[
            (f'class_wise_IU, class {label}', *pair)
            for label, pair in enumerate(
                zip(summary['class_wise_IU'], baseline['class_wise_IU'], strict=True)
            )
        ],
    ]
    return [
        _table('Means over patients', head, rows),
        f'<p>HD95 and ASSD in {html.escape(data["hd95_unit"])}; surface Dice within '
        f'{data["surface_tolerance"]:g} of that unit.</p>',
        *(f'<p class="note">{html.escape(words)}</p>' for words in DEFINITIONS),
        '<p class="note">Lesion Dice and F1 are as in BraTS 2023: true lesions that meet after '
        f'{lesion_options["dilation"]} steps of dilation count as one, and those of at most '
        f'{lesion_options["smallest"]:g} cubic units are left out. Lesions: '
        f'{", ".join(f"{number} {what}" for what, number in summary["lesions"].items())}.</p>',
        _structures(summary['structures']),
        _table(
            'Against calling everything background',
            ['Figure', 'this run', 'all background'],
            [[words, _cell(ours), _cell(theirs)] for words, ours, theirs in pooled],
        ),
        '<p>Figures that the right column makes look good say little about lesions.</p>',
    ]


def _structures(structures: Sequence[dict[str, Any]]) -> str:
    """A row a class: its figures, over how many patients, and how often it is missed."""
    figures = {name: words for name, words in FIGURES.items() if name in structures[0]}
    rows = [
        [
            f'class {row["label"]}',
            *(f'{_cell(row[name]["mean"], _digits(name))} ({row[name]["n"]})' for name in figures),
            *(f'{row[name]:,}' for name in COUNTS),
        ]
        for row in structures
    ]
    head = ['Structure', *(f'{words} (n)' for words in figures.values()), 'Present in', 'Missed in',
            'Invented in']  # fmt: skip
    return _table('Structure by structure; counts are of volumes or pictures', head, rows)


def _patients(result) -> list[str]:
    columns = {
        **{name: (words, _digits(name)) for name, words in FIGURES.items()},
        **{name: (words, 0) for name, words in COUNTS.items()},
        'lesion_voxels': ('Lesion, voxels', 0),
        'predicted_voxels': ('Predicted, voxels', 0),
        'slices': ('Slices', 0),
    }
    head = ''.join(
        f'<th scope="col" aria-sort="none"><button type="button">{words}</button></th>'
        for words in ('Patient', *(words for words, _ in columns.values()))
    )
    rows = []
    for row in result['patients']:
        cells = ''.join(
            f'<td data-value="{"" if row[name] is None else row[name]}">'
            f'{_cell(row[name], digits)}</td>'
            for name, (_, digits) in columns.items()
        )
        rows.append(f'<tr><th scope="row">{html.escape(row["patient"])}</th>{cells}</tr>')
    body = '\n'.join(rows)
    return [
        '<p>A click on a heading sorts by it.</p>',
        '<div class="scroll"><table class="sortable" id="patient-table">',
        f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
    ]


def _volume(result) -> list[str]:
    points = [p for p in result['patients'] if p['dice'] is not None and p['lesion_voxels']]
    if not points:
        return ['<p>No patient has a lesion.</p>']
    known = [p['in_mm'] for p in points]
    steps = 'voxels' if set(result['data']['spacing']) == {1.0} else "the spacing's unit, cubed"
    unit = 'mm³' if all(known) else f'mm³ where known, else {steps}' if any(known) else steps
    volume = [math.prod(p['spacing']) * p['lesion_voxels'] for p in points]
    dots = Series(
        '',
        volume,
        [p['dice'] for p in points],
        line=False,
        dots=True,
        titles=[
            f'{p["patient"]}: Dice {p["dice"]:.3f}, lesion {v:,.0f}'
            for p, v in zip(points, volume, strict=True)
        ],
    )
    drawn = Chart(
        'Dice against lesion volume', f'lesion volume, {unit} (log)', 'Dice', [dots],
        x_log=True, y_range=(0, 1),
    )  # fmt: skip
    return [f'<div class="charts"><figure>{chart.svg(drawn)}</figure></div>']


def _calibration(result) -> list[str]:
    found = result['calibration']
    bins = [b for b in found['bins'] if b['voxels']]
    if not bins:
        return ['<p>No voxel is counted.</p>']
    curve = Series(
        'this run',
        [b['probability'] for b in bins],
        [b['frequency'] for b in bins],
        dots=True,
        titles=[
            f'{b["low"]:.2f} to {b["high"]:.2f}: {b["voxels"]:,} voxels, probability '
            f'{b["probability"]:.3f}, frequency {b["frequency"]:.3f}'
            for b in bins
        ],
    )
    right = Series('right', [0, 1], [0, 1], color=chart.GRAY, dashed=True)
    drawn = Chart(
        'Calibration of the probability of foreground', 'predicted probability',
        'share that is foreground', [right, curve], x_range=(0, 1), y_range=(0, 1),
    )  # fmt: skip
    voxels = sum(b['voxels'] for b in bins)
    rows = [
        [
            f'{b["low"]:.2f} to {b["high"]:.2f}',
            f'{b["voxels"]:,}',
            _cell(b['probability']),
            _cell(b['frequency']),
        ]
        for b in bins
    ]
    tempered = (
        'as the network gives them'
        if found['temperature'] == 1.0
        else f'tempered by T = {found["temperature"]:.3f}, fitted on the validation patients'
    )
    fraction = found['bins'][0]['voxels'] / voxels
    table = _table(
        'Bins of the probability',
        ['Probability', 'voxels', 'mean probability', 'share that is foreground'],
        rows,
    )
    return [
        f'<p>Expected calibration error <strong>'
        f'{_cell(found["expected_calibration_error"], 4)}</strong> over {voxels:,} voxels, '
        f'probabilities {tempered}. {fraction:.1%} of the voxels are in the lowest bin, which '
        'makes the error small whatever happens at lesions: look at the curve.</p>',
        f'<div class="charts"><figure>{chart.svg(drawn)}</figure></div>',
        f'<details><summary>The bins as a table</summary>{table}</details>',
    ]


def _curves(curves: Sequence[Chart]) -> list[str]:
    if not curves:
        return ['<p>The workdir has no metrics.jsonl: there are no curves of the run.</p>']
    figures = ''.join(f'<figure>{chart.svg(each)}</figure>' for each in curves)
    return [f'<p class="note">{html.escape(TRAINED)}</p>', f'<div class="charts">{figures}</div>']


def _cases(cases: Sequence[tuple[str, Case]], rows: dict[str, Any]) -> list[str]:
    if not cases:
        return ['<p>No patient has a defined Dice: there is none to show.</p>']
    parts = ['<noscript><p>The pictures need JavaScript.</p></noscript>', _legend(cases)]
    for i, (role, case) in enumerate(cases):
        start = _lesion_pixels(case.truth).argmax()
        row = rows[case.patient]
        note = '' if row['slices'] == len(case.number) else f' of {row["slices"]}, evenly spaced'
        panels = ''.join(
            f'<figure><div class="stack" data-layer="{layer}"></div>'
            f'<figcaption>{layer}</figcaption></figure>'
            for layer in LAYERS
        )
        parts.append(
            f'<article class="case" data-case="{i}">'
            f'<h3>{role.capitalize()}: {html.escape(case.patient)}, Dice {_cell(row["dice"])}</h3>'
            f'<p class="slider"><label for="slice-{i}">Slice</label>'
            f'<input type="range" id="slice-{i}" min="0" max="{len(case.number) - 1}" '
            f'value="{start}" step="1"> <output for="slice-{i}"></output>{note}</p>'
            f'<div class="panels">{panels}</div></article>'
        )
    return parts


def _legend(cases: Sequence[tuple[str, Case]]) -> str:
    def key(color, words):
        return f'<span><i style="background: rgb{tuple(map(int, color))}"></i>{words}</span>'

    classes = {
        label for _, case in cases for x in (case.truth, case.pred) for label in np.unique(x)
    }
    palette = visualize.label_palette()
    labels = [
        key(palette[label], 'ignored' if label == IGNORE_LABEL else f'class {label}')
        for label in sorted(classes - {0})
    ]
    shown = {n for _, case in cases for n in np.unique(visualize.difference(case.pred, case.truth))}
    kinds = [key(c, words) for n, (words, c) in visualize.DIFFERENCE.items() if n in shown]
    steps = ', '.join(f'rgb{tuple(map(int, visualize.HEAT[i]))}' for i in range(0, 256, 51))
    heat = (
        '<span>probability of foreground 0 <i class="heat" '
        f'style="background: linear-gradient(to right, {steps})"></i> 1</span>'
    )
    rows = (('Truth, prediction', labels), ('Probability', [heat]), ('Difference', kinds))
    return ''.join(
        f'<p class="legend"><b>{words}:</b> {" ".join(keys) or "nothing"}</p>'
        for words, keys in rows
    )


def _encode(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What the page's script reads, at the finest of 1, 1/2, 1/4 .. that fits PICTURE_BYTES."""
    step = 1
    while True:
        pictures = [_encode_case(case, step) for case in cases]
        size = sum(len(uri) for case in pictures for layer in LAYERS for uri in case[layer])
        if size <= PICTURE_BYTES or step >= MOST_PIXELS:
            return pictures
        step *= 2


def _encode_case(case: Case, step: int) -> dict[str, Any]:
    """Data URIs by layer and slice. Truth, prediction and difference lie over the image."""
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
    """A palette picture with no more of the palette than it uses."""
    picture = Image.frombytes('P', index_HW.shape[::-1], index_HW.tobytes())
    picture.putpalette(palette[: int(index_HW.max()) + 1].tobytes())
    return picture


def _png(picture: Image.Image, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, 'png', optimize=True, **options)
    return f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'


def _json(value: Any) -> str:
    """JSON that can't end the <script> it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(',', ':'))
    return text.replace('<', '\\u003c').replace('>', '\\u003e').replace('&', '\\u0026')


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
