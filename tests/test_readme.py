"""The README's commands are the project's: the files and flags they name exist."""

import re

import pytest

from experiments import tables
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


def test_the_tables_are_those_of_the_committed_results():
    assert tables.fill(README) == README, 'run python -m experiments.tables'
