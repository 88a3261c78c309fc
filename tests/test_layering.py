"""Who may import whom: downwards only, so that each file can be read by itself."""

import ast

import pytest

from tests.conftest import ROOT

# File -> what of ours it may import; a folder stands for its files.
ALLOWED = {
    'errors': set(),
    'text': {'errors'},
    'losses': set(),
    'metrics': set(),
    'postprocess': {'metrics'},
    'optim': set(),
    'models.convolution': set(),
    'models.layers': {'models.convolution'},
    'models.backbones': {'models.convolution', 'models.layers'},
    'models.pspnet': {'models.layers'},
    'models.unet': {'models.convolution', 'models.layers'},
    'models.segnet': {'models.layers'},
    'models.refinenet': {'models.layers'},
    'models.fcn': {'models.layers', 'models.backbones'},
    'models.dilated': {'models.layers', 'models.backbones', 'models.fcn'},
    'models.deeplab': {'models.layers', 'models.backbones', 'models.fcn'},
    'models.published': set(),
    'models.torch_file': set(),
    'models.pretrained': {'errors', 'models.published', 'models.torch_file'},
    'models.__init__': {
        'models.backbones',
        'models.deeplab',
        'models.dilated',
        'models.fcn',
        'models.pspnet',
        'models.refinenet',
        'models.segnet',
        'models.unet',
    },
    'crf': set(),
    'data.volumes': {'errors'},
    'data.tiff': {'errors'},
    'data.files': {'data.tiff', 'data.volumes', 'errors'},
    'data.splits': {'data.files', 'data.volumes', 'errors', 'text'},
    'data.outlines': {'errors'},
    'data.annotations': {'data.outlines', 'errors', 'text'},
    'data.via': {'data.annotations', 'data.files', 'data.outlines', 'errors'},
    'data.augment': {'data.volumes'},
    'data.phantom': {'data.volumes', 'errors'},
    'data.lgg': {'data.files', 'data.splits', 'data.volumes', 'errors'},
    'data.video': {'data.files', 'errors'},
    'data.pipeline': {'data.volumes', 'errors'},
    'data.pairing': set(),
    'data.masks': {'data.files', 'data.volumes', 'errors'},
    'data.folder': {
        'data.files',
        'data.masks',
        'data.pairing',
        'data.via',
        'data.volumes',
        'errors',
        'text',
    },
    'data.sources': {
        'data.folder',
        'data.lgg',
        'data.pairing',
        'data.phantom',
        'data.splits',
        'data.volumes',
        'errors',
    },
    'infer': {'data.volumes', 'compilation', 'crf', 'errors', 'models.layers'},
    'visualize': {'data.volumes'},
    'onnx_graph': {'errors'},
    'stablehlo': {'errors'},
    'hosts': {'errors'},
    'log': {'errors'},
    'faults': {'errors'},
    'chart': set(),
    'calibration': {'data.files', 'errors'},
    'choice': {'calibration', 'config', 'data.files', 'errors', 'metrics', 'postprocess', 'text'},
    'report': {'chart', 'choice', 'data.files', 'data.volumes', 'log', 'metrics', 'visualize'},
    'checkpoint': {'errors', 'hosts', 'paths'},
    'config.base': set(),
    'config.augmentations': set(),
    'config.lgg': {'config', 'config.augmentations', 'config.base'},
    'config.folder': {'config', 'config.base', 'config.lgg'},
    'config.phantom': {'config', 'config.augmentations', 'config.base'},
    'config.rules': {
        'config',
        'config.base',
        'data.masks',
        'data.pairing',
        'errors',
        'losses',
        'models',
        'models.backbones',
    },
    'config.flags': {'config', 'config.base', 'config.rules', 'errors'},
    'manifest': {'errors'},
    'paths': {'errors'},
    'runs': {
        'checkpoint',
        'config',
        'data.volumes',
        'errors',
        'paths',
        'models',
        'models.published',
    },
    'transfer': {
        'checkpoint',
        'data.volumes',
        'errors',
        'models.pretrained',
        'models.published',
        'runs',
    },
    'compilation': {'paths'},
    'devices': {'errors'},
    'cli': {
        'compilation',
        'config',
        'config.augmentations',
        'config.flags',
        'models',
        'devices',
        'errors',
        'hosts',
    },
}
COMMANDS = {
    'main',
    'train',
    'evaluate',
    'predict',
    'api',
    'export',
    'data.check',
}  # these bring the others together
FILES = sorted((ROOT / 'pspnet_jax').rglob('*.py'))


def name_of(path):
    return '.'.join(path.relative_to(ROOT / 'pspnet_jax').with_suffix('').parts)


OURS = {name_of(path).removesuffix('.__init__') for path in FILES}


def imports(path):
    """Modules imported when the file is, those under `if __name__` left out; ours by our names."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f'{node.module}.{alias.name}' for alias in node.names}
            modules = {module for module in inside if module.removeprefix('pspnet_jax.') in OURS}
            found |= modules or {node.module}
    return {module.removeprefix('pspnet_jax.') for module in found}


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_imports_point_downwards(path):
    name, found = name_of(path), imports(path)
    assert not any(module.startswith(('configs', 'experiments', 'tests')) for module in found)
    ours = found & OURS
    if name in ALLOWED:
        assert ours <= ALLOWED[name], f'{name} imports {ours - ALLOWED[name]}: see ALLOWED here'
    else:
        assert name in COMMANDS | {'__init__', 'data.__init__', 'config.__init__'}, (
            f'say in ALLOWED what {name} may'
        )
    if name == 'evaluate':
        assert 'train' not in ours


@pytest.mark.parametrize('path', [p for p in FILES if 'data' in p.parts[-2]], ids=name_of)
def test_data_never_starts_a_jax_backend(path):
    if name_of(path) != 'data.augment':  # runs on the device
        assert not any(module.split('.')[0] in ('jax', 'flax') for module in imports(path))


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_configs_are_pages_that_import_the_packages_only(path):
    assert all(module.startswith('config.') for module in imports(path))
