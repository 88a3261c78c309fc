"""The README's commands are the project's: the files and flags they name exist."""

import re

import pytest

from experiments import coming_from_keras, tables
from pspnet_jax import models
from pspnet_jax.config import RULES
from tests.conftest import ROOT

README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```bash\n(.*?)```', README, re.DOTALL)
COMMANDS = [
    line.strip()
    for block in BLOCKS
    for line in block.replace('\\\n', ' ').splitlines()
    if line.strip() and not line.startswith('#')
]


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


@pytest.mark.parametrize('command', COMMANDS)
def test_modules_configs_and_knobs_exist(command):
    for module in re.findall(r'-m ((?:pspnet_jax|experiments)[\w.]*)', command):
        assert (ROOT / f'{module.replace(".", "/")}.py').is_file(), module
    for path in re.findall(r'--config=([\w/]+\.py)', command):
        assert (ROOT / path).is_file(), path
    for key in re.findall(r'--config\.([\w.]+)=', command):
        assert key in RULES, key
    for path in re.findall(r'-r (\S+)', command):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize('page', tables.TABLES)
def test_the_tables_are_those_of_the_committed_results(page):
    text = (ROOT / page).read_text()
    assert tables.fill(page, text) == text, 'run python -m experiments.tables'


def test_every_row_for_the_keras_tools_users_names_tests_that_are_there():
    for row in coming_from_keras.ROWS.values():
        assert row.tests
        for test in row.tests:
            file, name = test.split('::')
            assert f'def {name}(' in (ROOT / f'tests/{file}.py').read_text(), test
    listed = {name for key in coming_from_keras.ROWS for name in key.split(', ')}
    absent = {'F18', 'F19', 'F33'}  # what that tool does not have either
    assert listed == {f'F{n:02}' for n in range(1, 35)} - absent


def test_the_page_of_names_has_every_name_of_the_keras_tool():
    rows = re.findall(r'^\| `(\w+)` \| `([\w:]+)`', (ROOT / 'docs/models.md').read_text(), re.M)
    assert [theirs for theirs, _ in rows] == list(models.ALIASES)
    for theirs, ours in rows:
        name, backbone = (*ours.split(':'), None)[:2]
        alias = models.ALIASES[theirs]
        assert (alias.get('name', theirs), alias.get('backbone')) == (name, backbone)
