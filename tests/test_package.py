"""What is installed: the version has one place, requirements.txt is what pyproject.toml says."""

import re
import tomllib

import pspnet_jax
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
EXTRAS = PROJECT['project']['optional-dependencies']


def required(name):
    lines = (line.split('#')[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {line for line in lines if line}


def whole(*extras):
    """An extra with those that it names in turn."""
    found = set()
    for extra in extras:
        for line in EXTRAS[extra]:
            inner = re.fullmatch(r'pspnet_jax\[(.+)\]', line)
            found |= whole(*inner[1].split(',')) if inner else {line}
    return found


def test_the_version_has_one_place():
    version = PROJECT['tool']['setuptools']['dynamic']['version']
    assert version == {'attr': 'pspnet_jax.runtime.VERSION'}
    assert f'\nversion: {pspnet_jax.__version__}\n' in (ROOT / 'CITATION.cff').read_text()


def test_requirements_are_those_of_the_package():
    assert required('requirements.txt') == {*PROJECT['project']['dependencies'], *whole('lgg')}
    assert whole('dev') - whole('lgg') <= required('requirements-dev.txt') | {'pre-commit>=4'}


def test_nothing_else_lands_in_the_top_level_name_space():
    assert PROJECT['tool']['setuptools']['packages']['find']['include'] == ['pspnet_jax*']
    assert sorted(path.parent.name for path in ROOT.glob('pspnet_jax*/__init__.py')) == [
        'pspnet_jax'
    ]
