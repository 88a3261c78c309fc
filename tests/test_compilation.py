"""XLA's options: which, when, and that every program gets them."""

import ast
import warnings

import jax
import jax.numpy as jnp
import pytest

from pspnet_jax.runtime import compilation
from tests.conftest import ROOT

pytestmark = pytest.mark.newest
SCHEDULE, FUSIONS = 'xla_cpu_scheduler_type', 'xla_cpu_experimental_ynn_fusion_type'


def chosen(monkeypatch, *, version=(0, 12), platform='cpu', flags=''):
    monkeypatch.setattr(jax, '__version_info__', version)
    monkeypatch.setattr(jax, 'default_backend', lambda: platform)
    monkeypatch.setenv('XLA_FLAGS', flags)
    return compilation.options()


def test_options_are_for_a_cpu_and_for_the_versions_that_need_them(monkeypatch):
    for version, sums in (((0, 10, 2), True), ((0, 11, 0), False), ((0, 12, 0, 1), False)):
        options = chosen(monkeypatch, version=version)
        assert set(options) == {SCHEDULE, FUSIONS}
        assert ('REDUCE' in options[FUSIONS]) == sums, version
    for platform in ('gpu', 'tpu'):  # their compilers refuse what they do not know
        assert not chosen(monkeypatch, platform=platform)


def test_the_users_flags_win(monkeypatch):
    flags = f'--xla_force_host_platform_device_count=2 --{FUSIONS}='
    assert set(chosen(monkeypatch, flags=flags)) == {SCHEDULE}


def test_what_jit_and_pmap_return_is_compiled_with_the_options(monkeypatch):
    monkeypatch.setattr(compilation, 'options', lambda: {'xla_no_such_option': '1'})
    x = jnp.ones((1, 2))
    for compiles in (
        lambda: compilation.jit(jnp.sin)(x),
        lambda: compilation.jit(jnp.sin).lower(x).compile(),
        lambda: compilation.compile_now(jax.pmap(jnp.sin), x),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match='xla_no_such_option'):
            compiles()


@pytest.mark.parametrize('kind', [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_our_own_use_of_what_is_deprecated_is_an_error(kind):
    """As pyproject.toml has it; what others use is theirs to mend."""
    for name in ('pspnet_jax.train', 'experiments.run', 'configs.lgg', 'tests.conftest'):
        with pytest.raises(kind):
            warnings.warn_explicit('old', kind, 'x.py', 1, module=name)
    with pytest.warns(kind):
        warnings.warn_explicit('old', kind, 'x.py', 1, module='flax.linen')


def uses(tree):
    """(how, line) of each `jax.jit` that is no decorator, and of what would start JAX on import."""
    decorators = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        for part in ast.walk(decorator)
    }
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.Lambda)
        for body in (node.body if isinstance(node.body, list) else [node.body])
        for part in ast.walk(body)
    }
    for node in ast.walk(tree):
        name = ast.unparse(node) if isinstance(node, ast.Attribute | ast.ImportFrom) else ''
        if name == 'jax.jit' and id(node) not in decorators:
            yield name, node.lineno
        if name.startswith('from jax import') and 'jit' in name:
            yield name, node.lineno
        if name == 'compilation.jit' and (id(node) in decorators or id(node) not in inside):
            yield name, node.lineno


@pytest.mark.parametrize('folder', ['pspnet_jax', 'experiments'])
def test_programs_are_compiled_by_compilation_jit(folder):
    """A plain `jax.jit` decorates functions that are only a part of programs."""
    found = {
        f'{path.name}:{line} {name}'
        for path in sorted((ROOT / folder).rglob('*.py'))
        if path.name != 'compilation.py'
        for name, line in uses(ast.parse(path.read_text()))
    }
    assert not found, 'call compilation.jit, inside a function'


@pytest.mark.parametrize(
    'source',
    [
        'run = jax.jit(f)',
        'def g():\n    return functools.partial(jax.jit, donate_argnums=0)(f)',
        'from jax import jit',
        'run = compilation.jit(f)',
        '@compilation.jit\ndef f(x): ...',
        'def g(run=compilation.jit(f)): ...',
    ],
)
def test_other_ways_are_found(source):
    assert list(uses(ast.parse(source)))
    assert not list(uses(ast.parse('@jax.jit\ndef f(x):\n    return compilation.jit(g)(x)')))
