"""The report: complete in itself, safe with any name, and working in a browser."""

import base64
import hashlib
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import tomllib
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np
import pytest
from PIL import Image

from pspnet_jax.data.volumes import Volume
from pspnet_jax.evaluation import charts, protocol, report, scores, visualize
from tests.conftest import ROOT, tiny_config
from tests.test_charts import RECORDS

HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="hacked=1">\'"&'


def make_volume(name, rng, depth=5, size=24, lesion=True):
    mask = np.zeros((depth, size, size), np.uint8)
    if lesion:
        mask[1:4, 5:15, 5:15] = 1
        mask[2, 15:18, 5:15] = 1  # the slice with most of it
    image = rng.integers(0, 90, (*mask.shape, 3)).astype(np.uint8)
    intensity = np.array([[0], [255], [0], [1]], np.float32) * np.ones((1, 3), np.float32)
    return Volume(name, image, mask, np.arange(3, 3 + depth), intensity)


BATCHING = scores.Batching(batch_size=2, intensity=None, context=0)


def bright(image):
    """0.9 for lesion where channel 0 is above 50, else 0.1."""
    said = np.arange(2) == (image[..., :1] > 50)
    return np.where(said, 0.9, 0.1).astype(np.float32)


@pytest.fixture
def evaluated(rng):
    """(result, cases) of four patients: Dice rises with the number, the last has no lesion."""
    names = ['patient 10', HOSTILE, 'patient 9', 'none']
    data = [make_volume(n, rng, depth=5 + i, lesion=n != 'none') for i, n in enumerate(names)]
    for hit, each in zip((0.2, 0.6, 0.95, 0), data, strict=True):
        each.image[..., 0] = np.where(each.mask & (rng.random(each.mask.shape) < hit), 200, 20)
    options = scores.evaluate_options(tiny_config(), intensity=None)
    result = scores.evaluate_volumes(bright, data, **options)
    result['data'] |= {'source': HOSTILE, 'split': 'test'}
    result['checkpoint'] = {'step': 7, 'config': {'model': {'name': 'pspnet'}}}
    cases = []
    for role, row in report.extremes(result['patients']):
        volume = data[names.index(row['patient'])]
        found = scores.predict_foreground(bright, volume, BATCHING)
        cases.append((role, report.make_case(volume, *found)))
    return result, cases


class Page(HTMLParser):
    """Tags with their attributes, and the text that follows each up to the next tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.within = [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text.append('')
        self.within = True

    def handle_endtag(self, tag):
        self.within = False

    def handle_data(self, data):
        if self.within:
            self.text[-1] += data

    def of(self, tag):
        return [(a, t) for (name, a), t in zip(self.tags, self.text, strict=True) if name == tag]


def png(uri):
    head, data = uri.split(',')
    assert head == 'data:image/png;base64'
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_page_asks_for_nothing_and_runs_only_its_own_script(evaluated):
    text = report.render(evaluated[0], RECORDS, evaluated[1])
    page = Page(text)
    for tag, attributes in page.tags:
        assert not any(name.startswith('on') for name in attributes), (tag, attributes)
        for name in ('src', 'href', 'action', 'data'):
            assert attributes.get(name, 'data:').startswith(('data:', '#')), (tag, attributes)
    assert 'http://' not in text
    assert 'https://' not in text
    (data, _), (own, script) = page.of('script')
    assert data['type'] == 'application/json'
    assert own == {}
    policy = next(a['content'] for a, _ in page.of('meta') if 'http-equiv' in a)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_a_name_stands_in_the_page_as_it_is_and_is_no_markup(evaluated):
    result, cases = evaluated
    page = Page(report.render(result, [], cases))
    words = ' '.join(text for (tag, _), text in zip(page.tags, page.text, strict=True))
    assert words.count(HOSTILE) >= 3  # the source, the table, its dot or its pictures
    assert not page.of('img')  # all pictures are made by the script
    assert not any('hacked' in json.dumps(attributes) for _, attributes in page.tags)


def test_a_name_may_be_no_text(evaluated, tmp_path):
    """Of a file whose name is not UTF-8, or has control characters."""
    result, cases = evaluated
    row = next(row for row in result['patients'] if row['patient'] == cases[0][1].patient)
    row['patient'] = 'odd\udcff\x1b'
    cases[0] = (cases[0][0], cases[0][1]._replace(patient=row['patient']))
    page = Page(report.write(tmp_path, result, cases).read_text())
    assert sum('odd?\x1b' in text for text in page.text) == 3  # the table, its dot, its pictures


def test_json_in_the_page_is_the_same_json_and_ends_no_script(evaluated, monkeypatch):
    value = {'</script>': ['<!--', '&amp;', '\u2028', '"', None, 0.5]}
    monkeypatch.setattr(report, '_encode', lambda cases: value)
    page = Page(report.render(evaluated[0], [], evaluated[1]))
    text = page.of('script')[0][1]
    assert json.loads(text) == value
    assert not set('<>&') & set(text)
    monkeypatch.setattr(report, '_encode', lambda cases: math.nan)
    with pytest.raises(ValueError, match='not JSON compliant'):
        report.render(evaluated[0], [], evaluated[1])


def test_what_the_template_asks_for_is_there(evaluated):
    result, cases = evaluated
    del result['data']['hd95_unit']
    with pytest.raises(jinja2.UndefinedError, match='hd95_unit'):
        report.render(result, [], cases)


def test_an_installed_package_has_the_templates():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    globs = project['tool']['setuptools']['package-data']['pspnet_jax']
    package = ROOT / 'pspnet_jax'
    listed = {path for glob in globs for path in package.glob(glob)}
    files = {path for path in package.rglob('*') if path.is_file() and path.suffix != '.pyc'}
    assert {path for path in files if path.suffix != '.py'} <= listed


def test_the_tables_hold_the_figures(evaluated):
    result, cases = evaluated
    page = Page(report.render(result, [], cases))
    values = [a['data-value'] for a, _ in page.of('td') if 'data-value' in a]
    columns = [
        *report.FIGURES, *report.COUNTS, 'lesion_voxels', 'predicted_voxels', 'slices'
    ]  # fmt: skip
    expected = [p[name] for p in result['patients'] for name in columns]
    assert values == ['' if v is None else str(v) for v in expected]
    cells = [text for a, text in page.of('td') if 'data-value' not in a]
    dice = result['summary']['dice']
    assert cells[:5] == [
        f'{dice["mean"]:.3f}', f'{dice["ci95"][0]:.3f} to {dice["ci95"][1]:.3f}',
        f'{dice["median"]:.3f}', f'{dice["sd"]:.3f}', '3 of 4',
    ]  # fmt: skip


def test_the_volume_of_a_lesion_is_by_its_own_spacing(evaluated):
    """Not by the config's, which stands in where a file has none."""
    result, cases = evaluated
    rows = [p for p in result['patients'] if p['lesion_voxels']]
    rows[0] |= {'spacing': [3.0, 0.5, 0.5], 'in_mm': True}
    page = report.render(result, [], cases)
    for row, factor in zip(rows, (0.75, 1, 1), strict=True):
        assert f'lesion {factor * row["lesion_voxels"]:,.0f}<' in page
    assert 'lesion volume in cubic millimetres where known, else voxels' in page
    for row in rows:
        row['in_mm'] = True
    assert '>lesion volume in cubic millimetres<' in report.render(result, [], cases)
    for row in result['patients']:  # distances are of those without lesion too
        row['in_mm'] = True
    page = report.render(result, RECORDS, cases)
    assert '>mean over volumes, in millimetres<' in page


def test_every_definition_stands_by_its_figure(evaluated):
    result, cases = evaluated
    page = Page(report.render(result, RECORDS, cases))
    words = ' '.join(page.text)
    for said in (
        'larger of the two directed 95th percentiles', 'as in MedPy',
        "array's border belongs to the surface",
        'without a lesion counts 0 if anything is predicted, and is left out otherwise',
        'HD95, ASSD and precision leave out missed lesions',
        'over the structures', 'sample (n - 1)',
        '26 neighbours', 'Soft Dice treats the batch as one volume',
        'The warm-up multiplies the decay',
        'BatchNorm statistics of the step', 'An interval from 3 patients is too narrow',
    ):  # fmt: skip
        assert said in words, said


def test_structures_are_in_a_table_with_what_is_missed(evaluated):
    result, cases = evaluated
    page = Page(report.render(result, [], cases))
    (found,) = result['summary']['structures']
    heads = [text for _, text in page.of('th')]
    assert {'class 1', 'Missed in', 'Invented in'} <= set(heads)
    cells = [text for a, text in page.of('td') if 'data-value' not in a]
    place = cells.index(f'{found["dice"]["mean"]:.3f} ({found["dice"]["n"]})')
    assert cells[place + 7 : place + 10] == [
        str(found[name]) for name in ('present', 'missed', 'invented')
    ]


def test_several_classes_have_a_table_and_a_confusion_matrix(evaluated, rng):
    result, cases = evaluated
    assert 'class-table' not in report.render(result, [], cases)  # of one structure
    names = ('background', 'liver', HOSTILE)
    data = [make_volume(f'v{n}', rng) for n in range(3)]
    for n, each in enumerate(data):
        each.mask[1, :4, : 2 + n] = 2
        each.image[..., 0] = np.where(rng.random(each.mask.shape) < 0.8, each.mask, 1)
    config = tiny_config(**{'model.num_classes': 3, 'model.class_names': names})
    options = scores.evaluate_options(config, intensity=None)
    options['batching'] = BATCHING
    found = scores.evaluate_volumes(lambda image: np.eye(3)[image[..., 0].astype(int)],
                                    data, **options)  # fmt: skip
    result |= {key: found[key] for key in ('summary', 'patients', 'confusion', 'baseline')}
    result['data'] |= {'mean_of': found['data']['mean_of'], 'patients': 3}
    page = Page(report.render(result, [], []))
    cells = [text for a, text in page.of('td') if 'data-value' not in a]
    heads = [text for _, text in page.of('th')]
    assert heads.count(HOSTILE) == 3  # its row, its row and its column of the matrix
    for row in result['summary']['classes'].values():
        dice = row['dice']
        place = cells.index(f'{dice["ci95"][0]:.3f} to {dice["ci95"][1]:.3f}', 60)
        assert cells[place - 2 : place + 2] == [
            f'{dice["mean"]:.3f}', f'{dice["median"]:.3f}', cells[place], '3'
        ]  # fmt: skip
    matrix = [f'{n:,}' for row in found['confusion']['voxels'] for n in row]
    assert any(cells[n : n + 9] == matrix for n in range(len(cells)))
    assert any(found['data']['mean_of'] == text for _, text in page.of('p'))
    result['confusion']['classes'] = [str(n) for n in range(report.MOST_CONFUSED + 1)]
    assert 'confusion matrix of all 33 classes' in report.render(result, [], [])


def test_cases_that_the_run_has_seen_are_marked_in_the_table(evaluated):
    result, cases = evaluated
    assert 'trained on)' not in report.render(result, [], cases)
    result['patients'][0]['seen'], result['patients'][2]['seen'] = 'train', 'validation'
    page = Page(report.render(result, [], cases))
    assert [text for _, text in page.of('b')][:2] == ['(trained on)', '(checkpoint chosen on)']


def test_one_patient_has_no_interval(evaluated):
    result, _ = evaluated
    result['summary']['dice'] |= {'ci95': None, 'n': 1}
    text = report.render(result, [], [])
    assert '95 % interval none' in text
    assert 'There is no interval for fewer than two patients' in text


def test_best_median_and_worst():
    def rows(*dice):
        return [{'patient': str(i), 'dice': d} for i, d in enumerate(dice)]

    def found(*dice):
        return {role: row['patient'] for role, row in report.extremes(rows(*dice))}

    assert found(0.5, 0.9, None, 0.1, 0.7, 0.6) == {'best': '1', 'median': '5', 'worst': '3'}
    assert found(0.5, 0.9, 0.1, 0.7) == {'best': '1', 'median': '0', 'worst': '2'}
    assert found(0.5, 0.9) == {'best': '1', 'median and worst': '0'}
    assert found(None, 0.5) == {'best and median and worst': '1'}
    assert found(None) == {}


def test_nothing_to_show_is_said(evaluated):
    result, _ = evaluated
    for patient in result['patients']:
        patient['dice'] = None
    text = report.render(result, [], [])
    for words in ('no metrics.jsonl', 'No patient has a lesion', 'No patient has a defined Dice'):
        assert words in text


def test_pictures_are_the_slices(evaluated):
    result, cases = evaluated
    page = Page(report.render(result, [], cases))
    shown = json.loads(page.of('script')[0][1])
    for (_, case), pictures in zip(cases, shown, strict=True):
        assert pictures['number'] == case.number.tolist()
        for d in range(len(case.number)):
            truth, pred, apart = (
                np.array(png(pictures[layer][d])) for layer in ('truth', 'prediction', 'difference')
            )
            assert (truth == case.truth[d]).all()
            assert (pred == case.pred[d]).all()
            assert (apart == visualize.difference(case.pred[d], case.truth[d])).all()
            assert png(pictures['truth'][d]).convert('RGBA').getpixel((0, 0))[3] == 0  # see-through
            heat = png(pictures['probability'][d]).convert('RGB')
            assert (np.array(heat) == visualize.HEAT[case.prob[d]]).all()
            image = np.array(png(pictures['image'][d]).convert('RGB'), int)
            assert np.abs(image - case.image[d]).mean() < 8  # of 256 colours


def test_a_large_volume_is_shown_by_every_nth_pixel_and_few_slices(rng):
    volume = make_volume('large', rng, depth=100, size=300)
    volume.mask[3, 5:25, 5:15] = 1  # most of it, and not among the evenly spaced
    prob = rng.random(volume.mask.shape, np.float32)
    case = report.make_case(volume, volume.mask, prob)
    assert len(case.number) <= report.MOST_SLICES
    assert {3, 102, 3 + 3} <= set(case.number)  # the ends, and the slice with most lesion
    rows = case.number - 3
    assert (case.truth == volume.mask[rows, ::2, ::2]).all()
    assert (case.image == volume.image[rows, ::2, ::2]).all()
    np.testing.assert_allclose(case.prob / 255, prob[rows, ::2, ::2], atol=0.5 / 255 + 1e-6)


def test_pictures_become_coarser_until_they_fit(evaluated, monkeypatch):
    _, cases = evaluated
    cases = [case for _, case in cases]
    sizes = []
    for limit in (10**9, 30_000, 1):
        monkeypatch.setattr(report, 'PICTURE_BYTES', limit)
        shown = report._encode(cases)
        size = sum(len(uri) for case in shown for layer in report.LAYERS for uri in case[layer])
        assert size <= limit or limit == 1
        sizes.append(png(shown[0]['truth'][0]).size[0])
    assert sizes[0] == 24 > sizes[1] > sizes[2] == 1


def test_differences_by_hand():
    pred = np.array([[0, 1, 1, 0, 2, 1]])
    true = np.array([[0, 1, 0, 1, 1, 255]])
    found = visualize.difference(pred, true)
    right = visualize.OTHER + 1  # of class 1
    errors = [visualize.FALSE, visualize.MISSED, visualize.OTHER]
    assert found.tolist() == [[0, right, *errors, 0]]


def test_a_run_leaves_curves_and_a_report(trained, tmp_path):
    workdir, evaluation = trained
    picture = np.array(Image.open(workdir / 'curves.png'))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 3
    page = Page((workdir / 'report.html').read_text())
    assert len(page.of('svg')) == 2 + 4  # two of the evaluation, four of the run
    assert [text for _, text in page.of('h2')][-1] == 'The pictures'  # of one, not best and worst
    (one,) = evaluation['patients']
    assert [text for _, text in page.of('h3')] == [f'{one["patient"]}, Dice {one["dice"]:.3f}']
    (command,) = (text for _, text in page.of('code'))
    assert re.fullmatch(r'python -m pspnet_jax\.evaluate --workdir=\S+ --split=test', command)
    assert charts.write_curves(tmp_path) is None
    assert not list(tmp_path.iterdir())
    assert not [path for path in workdir.iterdir() if path.name.startswith('.')]


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
DRIVER = shutil.which('chromedriver')


def test_figures_on_pictures_of_the_training_are_called_too_good(evaluated):
    result, cases = evaluated
    assert 'too optimistic' not in report.render(result, [], cases)
    result['data']['overlap'] = None  # not known
    assert 'too optimistic' not in report.render(result, [], cases)
    result['data']['overlap'] = {'train': ['a', 'b'], 'validation': [], 'same_name': []}
    assert '2 of 4 patients have images that the run was trained on' in report.render(
        result, [], cases
    )


def test_chosen_post_processing_is_named(evaluated):
    result, cases = evaluated
    assert 'Post-processing' not in report.render(result, [], cases)
    facts = {'options': {'<flip>': True}, 'patients': 8, 'dice': 0.9, 'without': None}
    page = Page(report.render(result | {'postprocessing': facts}, [], cases))
    said = 'Post-processing: <flip>=True, chosen on 8 validation cases (their Dice 0.900, - '
    assert any(text.startswith(said) for _, text in page.of('p'))


def as_pictures(result):
    """The same figures, as if each slice were a picture of its own."""
    for row in result['patients']:
        row['scans'] = row['slices']


def words_of(text):
    page = Page(text)
    return ' '.join(
        text for (tag, _), text in zip(page.tags, page.text, strict=True)
        if tag not in ('script', 'style')
    )  # fmt: skip


def test_pictures_have_objects_and_volumes_have_lesions(evaluated):
    result, cases = evaluated
    said = words_of(report.render(result, RECORDS, cases)).lower()
    assert 'patient' in said
    assert 'lesion' in said
    as_pictures(result)
    for row in result['patients']:  # whose own names may say patient
        row['patient'] = row['patient'].replace('patient', 'p')
    cases = [(role, c._replace(patient=c.patient.replace('patient', 'p'))) for role, c in cases]
    said = words_of(report.render(result, RECORDS, cases)).lower()
    assert 'patient' not in said
    assert 'lesion' not in said
    assert 'dice against object size' in report.render(result, RECORDS, cases).lower()
    result['checkpoint']['config']['data'] = {'name': 'lgg'}
    said = words_of(report.render(result, RECORDS, cases)).lower()
    assert 'patients' in said
    assert 'object' not in said


def test_the_title_names_run_data_date_and_command(evaluated):
    result, cases = evaluated
    result['data']['source'] = '/data/of/mine/teeth'
    made = {'run': 'run_3', 'command': 'python -m x --a="<b>"', 'date': '2026-11-27 12:00 UTC'}
    page = Page(report.render(result, [], cases, **made))
    assert [text for _, text in page.of('h1')] == ['run_3: pspnet on teeth, test']
    assert [text for _, text in page.of('title')][:1] == ['run_3: pspnet on teeth, test']
    assert [text for _, text in page.of('code')] == [made['command']]
    first = next(text for _, text in page.of('p'))
    assert 'of /data/of/mine/teeth: 4 patients' in first
    assert 'step 7, evaluated 2026-11-27 12:00 UTC' in first


def test_the_command_makes_the_same_evaluation():
    command = protocol._command(
        [Path('runs/a b')],
        {'split': 'test', 'data': None, 'group': '', 'flip': True, 'scales': (0.75, 1.0)},
    )
    assert shlex.split(command) == [
        'python', '-m', 'pspnet_jax.evaluate', '--workdir=runs/a b', '--split=test', '--group=',
        '--flip=True', '--scales=0.75,1.0',
    ]  # fmt: skip


def test_classes_have_their_names_and_one_colour(evaluated):
    result, cases = evaluated
    result['checkpoint']['config']['model']['class_names'] = ['background', 'oedema']
    text = report.render(result, [], cases)
    assert 'class 1' not in words_of(text)
    color = report._css(visualize.class_color(1))
    page = Page(text)
    swatches = [a['style'] for a, _ in page.of('i') if 'style' in a]
    assert swatches.count(f'background: {color}') == 2  # of the masks and of the difference
    assert 'oedema, right' in text


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_what_the_run_has_seen_is_said(evaluated, split):
    result, cases = evaluated
    result['data']['split'] = split
    warnings = [a for a, _ in Page(report.render(result, [], cases)).of('p') if a.get('class')]
    assert [a['class'] for a in warnings].count('warning') == (split != 'test')


def test_notes_stand_beside_their_charts_alone(evaluated):
    result, cases = evaluated
    only = [{'step': 1, 'loss': 0.5}, {'step': 2, 'loss': 0.4}]
    said = words_of(report.render(result, only, cases))
    assert 'Soft Dice treats the batch as one volume' in said
    for other in (
        'The warm-up',
        'BatchNorm statistics',
        'HD95 is the larger of the two directed ones and leaves',
    ):
        assert other not in said


def test_one_picture_has_no_columns_over_cases_and_no_slider(evaluated):
    result, cases = evaluated
    keep = cases[0][1].patient
    result['patients'] = [row for row in result['patients'] if row['patient'] == keep]
    result['data'] |= {'patients': 1, 'slices': 1}
    for row in result['patients']:
        row |= {'slices': 1, 'scans': 1}
    one = cases[0][1]
    one = one._replace(**{key: getattr(one, key)[:1] for key in one._fields[1:]})
    page = Page(report.render(result, [], [('best and median and worst', one)]))
    heads = [text for _, text in page.of('th')]
    assert 'deviation' not in heads
    assert 'defined for' not in heads
    assert not [text for _, text in page.of('h3') if 'worst' in text]
    (slider,) = [a for a, _ in page.of('p') if a.get('class') == 'slider']
    assert 'hidden' in slider


@pytest.fixture
def browser(tmp_path):
    """`call(path, body)` to a headless Chromium, by the WebDriver protocol."""
    if not (CHROMIUM and DRIVER):
        pytest.skip('no browser here: apt-get install chromium chromium-driver')
    process = subprocess.Popen([DRIVER, '--port=0'], stdout=subprocess.PIPE, text=True)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        found = (re.search(r'started successfully on port (\d+)', line) for line in process.stdout)
        port = next(match[1] for match in found if match)

        def request(path, body=None, method=None):
            data = None if body is None else json.dumps(body).encode()
            url = f'http://127.0.0.1:{port}/session{path}'
            with opener.open(urllib.request.Request(url, data, method=method), timeout=60) as reply:
                return json.load(reply)['value']

        options = {
            'binary': CHROMIUM,
            'args': [
                '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
                '--no-first-run', '--disable-background-networking', '--disable-sync',
                '--disable-component-update', '--window-size=1200,900',
                f'--user-data-dir={tmp_path / "browser"}',
            ],
        }  # fmt: skip
        always = {'goog:chromeOptions': options, 'goog:loggingPrefs': {'browser': 'ALL'}}
        session = request('', {'capabilities': {'alwaysMatch': always}})['sessionId']
        yield lambda path, body=None: request(f'/{session}{path}', body)
        request(f'/{session}', method='DELETE')
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_the_page_works_in_a_browser(evaluated, tmp_path, browser):
    result, cases = evaluated
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, RECORDS)))
    browser('/url', {'url': report.write(tmp_path, result, cases).as_uri()})

    def run(script):
        return browser('/execute/sync', {'script': f'return {script}', 'args': []})

    def element(css):
        return next(iter(browser('/element', {'using': 'css selector', 'value': css}).values()))

    def click(css):
        browser(f'/element/{element(css)}/click', {})

    def column(n):
        cells = f'#patient-table tbody tr > :nth-child({n})'
        return run(f'[...document.querySelectorAll("{cells}")].map(cell => cell.textContent)')

    assert run('document.querySelectorAll("svg").length') == 6

    # Sorting: by number with the undefined last, either way; by name in the order of its numbers.
    dice = sorted(p['dice'] for p in result['patients'] if p['dice'] is not None)
    heading = '#patient-table th:nth-child(2) button'
    for ranked in (dice, dice[::-1]):
        click(heading)
        assert column(2) == [*(f'{d:.3f}' for d in ranked), '-']
    click('#patient-table th:nth-child(1) button')
    assert column(1) == [HOSTILE, 'none', 'patient 9', 'patient 10']
    sorts = run(
        '[...document.querySelectorAll("#patient-table th[aria-sort]")].map(h => h.ariaSort)'
    )
    assert sorts == ['ascending', *['none'] * 17]

    # The slider: starts where most lesion is, an arrow key shows the next slice in all panels.
    images = '[...document.querySelectorAll(".case img")]'
    before = run(f'{images}.map(image => image.src)')
    assert run('document.querySelector("output").value') == f'5 (3 of {len(cases[0][1].number)})'
    browser(f'/element/{element(".case input")}/value', {'text': '\ue014'})
    assert run('document.querySelector("output").value').startswith('6 (4 of ')
    after = run(f'{images}.map(image => image.src)')
    assert len(after) == 3 * 8
    assert before[8:] == after[8:]  # the other patients stand still
    assert all(a != b for a, b in zip(before[:2], after[:2], strict=True))
    browser('/execute/async', {
        'script': f'Promise.all({images}.map(image => image.decode())).then(arguments[0])',
        'args': [],
    })  # fmt: skip
    assert run(f'{images}.every(image => image.naturalWidth === 24)')

    # No name has run, nothing was fetched, and the console is silent.
    assert run('typeof window.hacked') == 'undefined'
    assert not [
        entry
        for entry in run('performance.getEntriesByType("resource").map(entry => entry.name)')
        if not entry.startswith('data:')
    ]
    assert browser('/se/log', {'type': 'browser'}) == []


@pytest.mark.slow
@pytest.mark.parametrize('width', [390, 800, 1600])
def test_nothing_runs_off_the_page(evaluated, tmp_path, browser, width):
    """Neither a long name nor a chart: what is wider scrolls in its own box."""
    result, cases = evaluated
    long = 'one_word' * 40
    row = next(row for row in result['patients'] if row['patient'] == cases[0][1].patient)
    row['patient'], cases[0] = long, (cases[0][0], cases[0][1]._replace(patient=long))
    result['data']['source'] = f'/{long}'
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, RECORDS)))
    size = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': True}
    browser('/goog/cdp/execute', {'cmd': 'Emulation.setDeviceMetricsOverride', 'params': size})
    browser('/url', {'url': report.write(tmp_path, result, cases).as_uri()})
    script = """
        const over = [...document.querySelectorAll('main, main *')].filter(element =>
          !element.parentElement.closest('.scroll') &&
          element.getBoundingClientRect().right > document.documentElement.clientWidth);
        return [innerWidth, document.documentElement.scrollWidth, over.map(e => e.outerHTML)]"""
    found = browser('/execute/sync', {'script': script, 'args': []})
    assert found == [width, width, []]


def emulate(browser, **params):
    browser('/goog/cdp/execute', {'cmd': 'Emulation.setEmulatedMedia', 'params': params})


def test_text_can_be_read_on_light_and_dark(evaluated, tmp_path, browser):
    """WCAG's 4.5:1 of every text against the page or the box that it stands in."""
    result, cases = evaluated
    result['data']['split'] = 'train'  # the warning too
    page = report.write(tmp_path, result, cases, 'python -m pspnet_jax.evaluate')
    browser('/url', {'url': page.as_uri()})
    script = """
        const own = [...document.querySelectorAll('main *:not(svg *)')].filter(e =>
          [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
        const paper = e => { for (; e; e = e.parentElement) {
          const found = getComputedStyle(e).backgroundColor;
          if (found !== 'rgba(0, 0, 0, 0)') return found; } return 'none'; };
        return own.map(e => [getComputedStyle(e).color, paper(e)])"""
    papers = set()
    for scheme in ('light', 'dark'):
        emulate(browser, features=[{'name': 'prefers-color-scheme', 'value': scheme}])
        pairs = {tuple(pair) for pair in browser('/execute/sync', {'script': script, 'args': []})}
        for pair in pairs:
            rgb = (
                np.array([[int(n) for n in re.findall(r'\d+', color)[:3]] for color in pair]) / 255
            )
            light = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
            ink, ground = light @ [0.2126, 0.7152, 0.0722]
            assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5, (scheme, pair)
            papers.add((scheme, round(float(ground), 1)))
    assert {('light', 1.0), ('dark', 0.0)} <= papers


def test_print_has_all_cases_and_no_controls(evaluated, tmp_path, browser):
    result, cases = evaluated
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, RECORDS)))
    browser('/url', {'url': report.write(tmp_path, result, cases).as_uri()})
    emulate(browser, media='print')
    script = """
        dispatchEvent(new Event('beforeprint'));
        const seen = css => [...document.querySelectorAll(css)].filter(e => e.checkVisibility());
        return [seen('input, .control').length, seen('.case').length,
                [...document.querySelectorAll('details')].every(e => e.open),
                seen('.case, figure, tr').every(e => getComputedStyle(e).breakInside === 'avoid'),
                getComputedStyle(document.querySelector('.scroll')).overflowX]"""
    found = browser('/execute/sync', {'script': script, 'args': []})
    assert found == [0, len(cases), True, True, 'visible']


def test_the_slider_is_marked_when_tab_reaches_it(evaluated, tmp_path, browser):
    result, cases = evaluated
    browser('/url', {'url': report.write(tmp_path, result, cases).as_uri()})
    keys = [{'type': kind, 'value': '\ue004'} for kind in ('keyDown', 'keyUp')]
    state = """
        const e = document.activeElement;
        return [e.type, e.matches(':focus-visible'), getComputedStyle(e).outlineWidth]"""
    for _ in range(40):
        browser('/actions', {'actions': [{'type': 'key', 'id': 'keyboard', 'actions': keys}]})
        found = browser('/execute/sync', {'script': state, 'args': []})
        if found[0] == 'range':
            break
    assert found == ['range', True, '3px']
    assert 'press Tab' in words_of(report.render(result, [], cases))
