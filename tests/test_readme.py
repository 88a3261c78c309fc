"""The README's commands are the project's: the files and flags they name exist."""

import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import pspnet_jax
from experiments import tables
from pspnet_jax import cli, models
from pspnet_jax.config import RULES, base
from pspnet_jax.training.loop import train_and_evaluate
from tests.conftest import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('[et]*/**/README.md'))
}
README = PAGES['README.md']


def commands_of(page):
    """The lines of its bash blocks, and what it says to type in the text."""
    lines = [
        line.strip()
        for block in re.findall(r'```bash\n(.*?)```', page, re.DOTALL)
        for line in block.replace('\\\n', ' ').splitlines()
    ]
    return [line for line in lines if line and not line.startswith('#')]


COMMANDS = commands_of(README)
# Files and keys of results.
NO_KNOBS = {'data.json', 'data.mean_of', 'model.onnx', 'model.safetensors', 'model.stablehlo'}
ALL_COMMANDS = sorted({command for page in PAGES.values() for command in commands_of(page)})


def test_the_first_two_commands_set_everything_up():
    run, tests = COMMANDS[:2]
    for command in (run, tests):
        assert command.startswith('python3 -m venv .venv && ')
        assert '-r requirements.txt' in command
    assert '--config=configs/phantom.py' in run
    assert 'pytest' in tests


def test_every_tier_is_run():
    """The fast one by the README's command, the others by .ci/run behind it."""
    assert '-m "not slow and not stress" tests' in COMMANDS[1]
    assert 'for tier in slow stress; do' in (ROOT / '.ci/run').read_text()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    """To files of the repository and to headings; what is elsewhere is not looked at."""
    text = re.sub(r'```.*?```', '', PAGES[page], flags=re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match('https?:', target):
            continue
        file, _, heading = target.partition('#')
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if heading:
            titles = re.findall(r'^#+ (.*)$', path.read_text(), re.M)
            slugs = {re.sub(r'[^\w\- ]', '', t.lower()).replace(' ', '-') for t in titles}
            assert heading in slugs, target


def test_every_page_is_in_the_index():
    index = PAGES['docs/README.md']
    for path in (ROOT / 'docs').glob('*.md'):
        assert path.name == 'README.md' or f'({path.name})' in index, path.name


def test_every_knob_that_a_page_names_is_there():
    sections = '|'.join(sorted({key.split('.')[0] for key in RULES if '.' in key}))
    for page, text in PAGES.items():
        if page == 'CHANGELOG.md':
            continue
        for knob in re.findall(rf'`((?:{sections})\.[a-z_0-9]+)(?:=[^`]*)?`', text):
            assert knob in RULES or knob in NO_KNOBS, f'{page}: {knob}'


@pytest.mark.parametrize('command', ALL_COMMANDS)
def test_modules_configs_and_knobs_exist(command):
    for module in re.findall(r'-m ((?:pspnet_jax|experiments)[\w.]*)', command):
        assert (ROOT / f'{module.replace(".", "/")}.py').is_file(), module
    for path in re.findall(r'--config=([\w/]+\.py)', command):
        assert (ROOT / path).is_file() or path == 'mine.py', path  # that of CONTRIBUTING
    for key in re.findall(r'--config\.([\w.]+)=', command):
        assert key in RULES, key
    for path in re.findall(r'-r (\S+)', command):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize('page', tables.TABLES)
def test_the_tables_are_those_of_the_committed_results(page):
    text = (ROOT / page).read_text()
    assert tables.fill(page, text) == text, 'run python -m experiments.tables'


KERAS = (ROOT / 'docs/coming-from-keras.md').read_text()
KERAS_ROWS = [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in KERAS.splitlines()
    if line.startswith('| F')
]


def test_the_page_for_the_keras_tools_users_has_every_feature_with_tests_that_are_there():
    for row in KERAS_ROWS:
        tests = re.findall(r'`(test_\w+)::(test_\w+)`', row[4])
        assert tests
        for file, name in tests:
            assert f'def {name}(' in (ROOT / f'tests/{file}.py').read_text(), name
    listed = {name for row in KERAS_ROWS for name in row[0].split(', ')}
    absent = {'F18', 'F19', 'F33'}  # what that tool does not have either
    assert listed == {f'F{n:02}' for n in range(1, 35)} - absent


def flags_of(module):
    """The flags that a command of the package defines."""
    text = (ROOT / f'pspnet_jax/{module}.py').read_text()
    found = set(re.findall(r"DEFINE_\w+\(\s*'(\w+)'", text))
    return found | (set(base.get_config().predict) if 'prediction_flags' in text else set())


@pytest.mark.parametrize('row', KERAS_ROWS, ids=lambda row: row[0])
def test_what_the_page_for_the_keras_tools_users_names_is_there(row):
    """Our two columns: its keys, flags, commands, files, and calls with their arguments."""
    ours, calls = row[2], re.findall('`([^`]+)`', row[3])
    keys = re.findall(r'--config\.([\w.]+)=', row[3])
    knobs = re.findall(r'`([a-z]+\.[a-z_]+)`', ours)
    assert all(key in RULES or Path(key).suffix in ('.json', '.html') for key in keys + knobs)
    for page in re.findall(r'--config=(\S+?)(?::(\S+))?(?=[ `])', row[3]):
        assert (ROOT / page[0]).is_file()
        spec = importlib.util.spec_from_file_location('page', ROOT / page[0])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.get_config(page[1])
    for call in calls:
        if match := re.match(r'python -m pspnet_jax\.(\w+)|pspnet (\w+)', call):
            module = match[1] or cli.COMMANDS[match[2]][0]
            assert set(re.findall(r'--(\w+)[= ]', call)) <= flags_of(module), call
        elif match := re.match(r'([\w.]+)\((.*)\)', call):
            function = {
                'model.evaluate': pspnet_jax.Model.evaluate,
                'train_and_evaluate': train_and_evaluate,
            }.get(match[1]) or pkgutil.resolve_name(match[1])
            named = re.findall(r'(\w+)=\.\.\.', match[2])
            assert set(named) <= set(inspect.signature(function).parameters), call
        else:
            assert call.startswith('--config') or call == 'RUN/checkpoints/', call


def test_the_page_of_names_has_every_name_of_the_keras_tool():
    rows = re.findall(r'^\| `(\w+)` \| `([\w:]+)`', (ROOT / 'docs/models.md').read_text(), re.M)
    assert [theirs for theirs, _ in rows] == list(models.ALIASES)
    for theirs, ours in rows:
        name, backbone = (*ours.split(':'), None)[:2]
        alias = models.ALIASES[theirs]
        assert (alias.get('name', theirs), alias.get('backbone')) == (name, backbone)


CONTRIBUTING = (ROOT / 'CONTRIBUTING.md').read_text()
PLACES = sorted(set(re.findall(r'`([\w/]+\.py):(\w+)`', CONTRIBUTING)))


@pytest.mark.parametrize(('file', 'name'), PLACES)
def test_the_walks_through_the_code_name_what_is_there(file, name):
    text = (ROOT / 'pspnet_jax' / file).read_text()
    assert re.search(rf'^(def {name}\(|class {name}[(:]|{name}(: .*)? = )', text, re.M)


def test_the_picture_of_the_folders_has_all_folders_and_commands_and_no_other_file():
    picture = CONTRIBUTING.split('\n```\nconfigs/')[1].split('\n```\n')[0]
    package = ROOT / 'pspnet_jax'
    files = {path.name for path in package.rglob('*.py')}
    assert set(re.findall(r'\w+\.py', picture)) <= files
    folders = {path.parent.name for path in package.glob('*/*.py')}
    assert folders <= set(re.findall(r'(\w+)/', picture))
    for module, _ in cli.COMMANDS.values():
        assert re.search(rf'\b{module}\b', picture), module


def test_the_walk_of_the_workdir_has_every_file_of_a_run(trained):
    table = CONTRIBUTING.split('| file | written by |\n')[1].split('\n\n')[0]
    named = {name for line in table.splitlines() for name in re.findall('`([^`]+)`', line)}
    for path in trained[0].iterdir():
        found = f'{path.name}/' if path.is_dir() else path.name
        assert found in named or (found == 'checkpoints/' and 'checkpoints/STEP/' in named)
