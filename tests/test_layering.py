"""Who may import whom: folders import downwards only, so that each can be read by itself."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Each folder may import itself and what stands below it here; two on one line know nothing of
# each other. The package's root, '', holds the commands.
FLOORS = (
    ('',),
    ('training', 'prediction', 'serving'),
    ('evaluation',),
    ('inference',),
    ('config',),
    ('models', 'data'),
    ('runtime',),
)
COMMANDS = {
    'main', 'build', 'rasterize', 'check', 'evaluate', 'predict', 'export', 'convert'
}  # fmt: skip
ROOM = COMMANDS | {'__init__', 'api', 'cli'}
FILES = sorted((ROOT / 'pspnet_jax').rglob('*.py'))


def name_of(path):
    return '.'.join(path.relative_to(ROOT / 'pspnet_jax').with_suffix('').parts)


NAMES = {name_of(path).removesuffix('.__init__') for path in FILES}


def imports(path, inside=True):
    """What a file imports at its top, and with `inside` in functions too; ours by our names."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = {f'{node.module}.{alias.name}' for alias in node.names}
            modules = {module for module in full if module.removeprefix('pspnet_jax.') in NAMES}
            found |= modules or {node.module}
    return {module.removeprefix('pspnet_jax.') for module in found}


def folder(name):
    return (
        name.split('.')[0] if '.' in name or name in {x for floor in FLOORS for x in floor} else ''
    )


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_folders_import_downwards_only(path):
    name, found = name_of(path), imports(path)
    assert not any(module.startswith(('configs', 'experiments', 'tests')) for module in found)
    here = folder(name)
    level = next(level for level, floor in enumerate(FLOORS) if here in floor)
    for module in found & NAMES:
        there = folder(module)
        below = {x for floor in FLOORS[level + 1 :] for x in floor}
        assert there == here or there in below, f'{name} imports {module}, which is not below it'


def test_the_root_has_the_commands_alone():
    assert {name_of(path) for path in FILES if path.parent.name == 'pspnet_jax'} == ROOM


def test_files_of_a_folder_import_each_other_in_one_direction():
    arrows = {name_of(path): imports(path) & NAMES for path in FILES}
    for folder_name in {folder(name) for name in arrows}:
        left = {name for name in arrows if folder(name) == folder_name}
        while free := {name for name in left if not (arrows[name] - {name}) & left}:
            left -= free
        assert not left, f'these import each other: {sorted(left)}'


@pytest.mark.parametrize('path', [p for p in FILES if 'data' in p.parts], ids=name_of)
def test_data_never_starts_a_jax_backend(path):
    if name_of(path) != 'data.augment':  # runs on the device
        assert not any(module.split('.')[0] in ('jax', 'flax') for module in imports(path))


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_configs_are_pages_that_import_the_packages_only(path):
    assert all(module.startswith('config.') for module in imports(path))


@pytest.mark.parametrize(
    'module', ['data.folder', 'data.sources', 'cli', 'predict', 'main', 'api', 'config.flags']
)
def test_what_is_heavy_is_imported_when_it_is_asked_for(module):
    heavy = {'tensorflow_datasets', 'jax', 'flax', 'nibabel', 'pydicom', 'tifffile', 'av', 'torch'}
    code = f'import sys, pspnet_jax.{module}; print(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not heavy & set(done.stdout.split())


LONGEST, MOST = 80, 10  # lines of a function, and parameters
LONG = {'config.base.get_config'}  # the list of knobs, see there


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_functions_are_short_and_take_few_arguments(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name, given = f'{name_of(path)}.{node.name}', node.args
            first = min(line.lineno for line in (node, *node.decorator_list))
            parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            parameters += filter(None, (given.vararg, given.kwarg))
            assert len(parameters) <= MOST, name
            assert node.end_lineno - first < LONGEST or name in LONG, name
