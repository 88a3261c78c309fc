"""What is installed: the version has one place, requirements.txt is what pyproject.toml says."""

import ast
import pkgutil
import re
import subprocess
import sys
import tomllib

import pytest

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


# What is imported -> what is installed, where the names differ.
DISTRIBUTIONS = {
    'PIL': 'pillow', 'absl': 'absl-py', 'orbax': 'orbax-checkpoint', 'ml_dtypes': 'jax',
}  # fmt: skip


def names(requirements):
    return {re.match(r'[\w-]+', line)[0].lower().replace('_', '-') for line in requirements}


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'pspnet_jax').rglob('*.py')), ids=lambda path: path.stem
)
def test_the_light_install_has_what_files_import_at_their_top(path):
    """An extra's packages are imported in functions, but for LGG's own file, which says so."""
    core, extra = names(PROJECT['project']['dependencies']), names(whole(*EXTRAS))
    tree = ast.parse(path.read_text())
    inner = [node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)]
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in {module.split('.')[0] for module in modules} - sys.stdlib_module_names:
            name = DISTRIBUTIONS.get(module, module.lower().replace('_', '-'))
            late = node in inner or path.name == 'lgg.py'
            assert name in core | {'pspnet-jax'} or (name in extra and late), module


def test_the_change_log_sends_to_modules_and_names_that_are_there():
    rows = re.findall(r'^  \| `.*? \| (`.*) \|$', (ROOT / 'CHANGELOG.md').read_text(), re.M)
    assert len(rows) == 10
    for now in rows:
        for module, named in re.findall(r'`(pspnet_jax[\w.]+)`(?: \(((?:`\w+`(?:, )?)+)\))?', now):
            found = pkgutil.resolve_name(module)
            assert all(hasattr(found, name) for name in re.findall(r'\w+', named)), module


def test_lgg_without_its_extra_says_what_to_install():
    code = "import sys; sys.modules['tensorflow_datasets'] = None; import pspnet_jax.data.lgg"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('pspnet_jax.runtime.errors.DataError: ')
    assert 'need tensorflow_datasets: pip install "pspnet_jax[lgg]"' in last


def test_pyright_looks_at_the_public_interface():
    ignored = PROJECT['tool']['pyright']['ignore']
    assert all((ROOT / path).is_file() for path in ignored), 'a file that is gone: take it out'
    assert not any(
        path.count('/') == 1 or path.startswith('pspnet_jax/config/') for path in ignored
    )
