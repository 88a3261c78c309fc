"""Configs: every one runs its checks, every knob has its rule, errors name the remedy."""

import re
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from experiments import ablation
from pspnet_jax import config as rules
from pspnet_jax import models
from pspnet_jax.config import augmentations, base, lgg, phantom
from pspnet_jax.data.sources import SOURCES
from pspnet_jax.inference import settings
from pspnet_jax.runtime.errors import ConfigError
from tests.conftest import PSPNET, ROOT, tiny_config

LGG_ARGUMENTS = ('', 'pspnet_resnet18', 'pspnet_resnet101', *models.names())


def test_base_has_a_default_for_every_rule_and_a_rule_for_every_key():
    assert set(rules.flatten(base.get_config().to_dict())) == set(rules.RULES)


@pytest.mark.parametrize('get', [base, phantom, *LGG_ARGUMENTS])
def test_every_config_is_valid_and_locked(get):
    config = lgg.get_config(get) if isinstance(get, str) else get.get_config()
    rules.validate(config)
    with pytest.raises(AttributeError, match='backbone'):
        config.model.bacbone = 'vgg16'


def test_the_sources_named_are_the_sources_there():
    for name in SOURCES:
        rules.validate(tiny_config(**{'data.name': name}))
    assert str(rules.RULES['data.name'][1]) == f'one of {repr(list(SOURCES))[1:-1]}'


def test_it_survives_json():
    config = lgg.get_config('vgg_pspnet')
    back = rules.from_dict(rules.to_dict(config))
    assert back == config
    assert back.model.bins == (1, 2, 3, 6)


def test_a_config_from_before_a_knob_has_its_default():
    tree = rules.to_dict(lgg.get_config())
    del tree['data']['split'], tree['crf']
    assert rules.from_dict(tree) == lgg.get_config()


def test_a_config_from_before_pictures_kept_their_proportions_stretches_them():
    tree = rules.to_dict(lgg.get_config())
    del tree['data']['fit']
    assert rules.from_dict(tree).data.fit == 'stretch'
    assert settings.program_options(rules.from_dict(tree))['fit'] == 'stretch'
    assert rules.from_dict(tree | {'data': {**tree['data'], 'fit': 'letterbox'}}).data.fit == (
        'letterbox'
    )


@pytest.mark.parametrize(
    ('key', 'value', 'words'),
    [
        ('data.threads', 0, 'data.threads is 0: it must be a whole number of at least 1'),
        ('model.num_classes', 1, 'background is a class too, so one structure needs 2'),
        ('train.batch_size', 0, 'train.batch_size is 0: it must be a whole number of at least 1'),
        ('augment.flip', 1.5, 'augment.flip is 1.5: it must be a number from 0 to 1'),
        ('data.sampling', 'tumor', "data.sampling is 'tumor': it must be one of 'lesion'"),
        (
            'model.bins',
            (0,),
            'model.bins is (0,): it must be a tuple of values, each a whole number',
        ),
        ('loss.class_weights', (1.0,), 'it must have one for each of 2 classes'),
        ('model.class_names', ('lesion',), 'it must have one for each of 2 classes, background'),
        ('predict.overlap', 0.95, 'predict.overlap is 0.95: it must be a number from 0 to 0.9'),
        ('model.name', 'vgg_unet', 'vgg_unet uses vgg16, not resnet18'),
        (
            'model.dropout',
            2.0,
            'model.dropout is 2.0: it must be None (see pspnet_jax/config/base.py)',
        ),
        (
            'loss.top_k_share',
            0.0,
            'loss.top_k_share is 0.0: it must be a number above 0, at most 1',
        ),
        (
            'model.deep_supervision',
            True,
            'deep_supervision is for U-Nets, not for pspnet: leave it',
        ),
        ('train.accumulate', 3, 'train.batch_size 4 is not a multiple of train.accumulate 3'),
        ('train.epochs', 5.0, 'train.epochs is 5, but train.steps is 4 and takes precedence'),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_allowed(key, value, words):
    config = tiny_config(**PSPNET)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=re.escape(words)):
        rules.validate(config)


@pytest.mark.parametrize('value', [{4: 3}, {'>0': 1}, {'4': 3, '<=-1': 255}])
def test_a_label_map_is_a_knob_of_the_command_line_and_survives_json(monkeypatch, value):
    line = ['', f'--config={ROOT}/configs/folder.py', f'--config.data.label_map={value}']
    monkeypatch.setattr('sys.argv', line)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values)
    values(line)
    rules.validate(values.config)
    back = rules.from_dict(rules.to_dict(values.config))
    assert back.data.to_dict()['label_map'] == {str(key): label for key, label in value.items()}
    assert rules.to_dict(back) == rules.to_dict(values.config)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (
            {'data.label_map': {'a': 1}},
            "data.label_map is {'a': 1}: it must be None or a mapping from",
        ),
        (
            {'data.label_map': '{4: 3'},
            "data.label_map is '{4: 3': it must be None or a mapping from",
        ),
        ({'data.label_map': {4: 300}}, 'it must be None or a mapping from mask values'),
        ({'data.label_map': {}}, 'it must be None or a mapping from mask values'),
        ({'data.mask_name': '*'}, 'data.mask_name is'),
        (
            {'data.label_map': {4: 3}, 'data.mask_colors': ('#000000', '#ffffff')},
            'data.label_map gives each value its class',
        ),
    ],
)
def test_label_maps_and_rules_that_are_none(changes, words):
    config = tiny_config(**changes)
    with pytest.raises(ConfigError, match=re.escape(words)):
        rules.validate(config)


def test_a_threshold_is_for_two_classes():
    config = tiny_config(**{'predict.threshold': 0.4})
    rules.validate(config)
    config.model.num_classes = 3
    with pytest.raises(
        ConfigError, match=r'predict.threshold is for two classes, but the model has 3'
    ):
        rules.validate(config)


def test_every_fault_is_listed_at_once():
    config = tiny_config(**{'seed': -1, 'optim.learning_rate': 0.0})
    with config.unlocked():
        config.model.bacbone = 'vgg16'
        del config.train.steps
    with pytest.raises(ConfigError) as caught:
        rules.validate(config)
    for words in (
        'model.bacbone is not a key: did you mean model.backbone?',
        'train.steps is missing',
        'seed is -1',
        'optim.learning_rate is 0.0',
    ):
        assert words in str(caught.value)


def test_paths_are_kept_whole_and_expressions_as_they_are(tmp_path, monkeypatch):
    """So that a run can be evaluated from another folder than that in which it was trained."""
    (tmp_path / 'own' / 'images').mkdir(parents=True)
    (tmp_path / 'teacher').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    config = tiny_config(**{
        'data.name': 'folder', 'data.images': ('own/images',), 'data.group': '(.+)_',
        'model.pretrained': 'hf:timm/resnet18', 'distill.teacher': '~/teacher@260',
    })  # fmt: skip
    whole = rules.with_absolute_paths(config)
    assert whole.data.images == (f'{tmp_path}/own/images',)
    assert whole.distill.teacher == f'{tmp_path}/teacher@260'
    assert (whole.data.group, whole.model.pretrained) == ('(.+)_', 'hf:timm/resnet18')
    assert config.data.images == ('own/images',)
    config.data.source = 'own'
    assert rules.with_absolute_paths(config).data.source == f'{tmp_path}/own'


def test_every_knob_is_read():
    """A key that stands nowhere in the code steers nothing."""
    code = '\n'.join(
        path.read_text() for path in (ROOT / 'pspnet_jax').rglob('*.py') if path.name != 'config.py'
    )
    for key in rules.RULES:
        assert re.search(rf'\b{key.split(".")[-1]}\b', code), f'{key} is read by nothing'


def test_no_knob_has_a_second_home():
    for path in (ROOT / 'pspnet_jax').rglob('*.py'):
        assert 'config.get(' not in Path(path).read_text(), f'{path}: a default belongs in base.py'


@pytest.mark.parametrize('name', augmentations.RECIPES)
def test_a_recipe_says_every_knob_but_those_of_the_data(name):
    config = phantom.get_config(f'fcn8s,{name}')
    rules.validate(config)
    assert config.model.name == 'fcn8s'
    knobs = set(base.get_config().augment) - {'crop', 'kept_channel'}  # those of the data
    assert set(augmentations.RECIPES[name]) == knobs
    assert {key: config.augment[key] for key in knobs} == augmentations.RECIPES[name]


def test_light_is_what_there_is_without_a_recipe():
    assert phantom.get_config(',light').augment == base.get_config().augment
    assert lgg.get_config(',light') == lgg.get_config()


def test_a_recipe_can_be_changed_knob_by_knob(monkeypatch):
    line = ['', f'--config={ROOT}/configs/lgg.py:unet,strong', '--config.augment.rotate=5']
    monkeypatch.setattr('sys.argv', line)  # where config_flags looks for the knobs
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values)
    values(line)
    augment = values.config.augment
    assert (augment.rotate, augment.elastic) == (5.0, augmentations.RECIPES['strong']['elastic'])
    assert values.config.model.name == 'unet'


def test_the_only_structure_cannot_be_ignored():
    config = base.get_config().copy_and_resolve_references()
    config.loss.ignore_label = 1
    with pytest.raises(ConfigError, match='ignore_label is 1, the only structure of 2 classes'):
        rules.validate(config)
    config.model.num_classes = 3
    rules.validate(config)


def test_every_knob_is_described_where_it_is_defined():
    told = base.comments()
    assert set(told) == set(rules.RULES)
    assert all(told.values())
    assert told['model.pretrained'].startswith('Weights of the backbone')
    assert told['data.images'].endswith('selects files of a folder by name')
    assert told['predict.overlap'] == 'of neighbouring tiles, as a share of the window'


def test_a_limit_is_of_a_knob():
    from pspnet_jax.config import rules as limits

    assert set(limits.LIMITS) <= set(rules.RULES)


@pytest.mark.parametrize('name', ablation.STUDIES)
def test_every_variant_of_a_study_can_run_and_changes_something(name):
    study = ablation.STUDIES[name]
    configs = [
        ablation.config_of(study, variant, seed=0, local={'data.source': 'x'})
        for variant in study.variants
    ]
    for config in configs:
        rules.validate(config)
    told = [str(rules.to_dict(config)) for config in configs]
    assert len(set(told)) == len(told)
    assert study.variants.get(ablation.BASE, {}) == {}
