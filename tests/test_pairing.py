"""Whose mask is whose: names, rules, and the rule that is proposed where names do not pair."""

import re
import shlex
from pathlib import Path

import pytest

from pspnet_jax.data import pairing

N = [f'{n:03}' for n in range(1, 13)]


def test_names_pair_wherever_they_lie_if_no_two_are_alike():
    pictures, masks = ['train/a', 'b'], ['b', 'deep/er/a', 'c']
    assert pairing.match(pictures, masks) == {'train/a': ['deep/er/a'], 'b': ['b']}


def test_of_one_name_in_several_folders_the_folder_decides():
    ways = ['p1/1', 'p1/2', 'p2/1', 'p2/2']
    assert pairing.match(ways, ways[::-1]) == {way: [way] for way in ways}
    assert pairing.match(ways, ['p1/1', 'p3/2']) == {'p1/1': ['p1/1']}


@pytest.mark.parametrize(
    ('rule', 'masks', 'expected'),
    [
        ('{stem}_mask', ['a_mask', 'b_mask', 'a'], {'a': ['a_mask'], 'b': ['b_mask']}),
        ('seg-{stem}.final', ['seg-a.final'], {'a': ['seg-a.final']}),
        ('{stem}_mask*', ['a_mask', 'a_mask_1', 'b_mask_x'],
         {'a': ['a_mask', 'a_mask_1'], 'b': ['b_mask_x']}),
        ('{stem}/*', ['a/1', 'a/2', 'b/1'], {'a': ['a/1', 'a/2'], 'b': ['b/1']}),
        ('{stem}*', ['a', 'a_1', 'bx'], {'a': ['a', 'a_1'], 'b': ['bx']}),
    ],
)  # fmt: skip
def test_a_rule_says_what_masks_are_called(rule, masks, expected):
    assert pairing.match(['a', 'b'], masks, rule) == expected


def test_in_one_folder_nothing_is_a_mask_of_itself():
    ways = ['a', 'a_1', 'seg']
    assert pairing.match(ways, ways, '{stem}*', together=True) == {'a': ['a_1']}
    assert pairing.match(ways, ways, 'seg', together=True) == {'a': ['seg'], 'a_1': ['seg']}


def test_the_longer_name_has_the_mask_and_numbers_are_whole():
    masks = ['img_1_a', 'img_10_a', 'img_1_extra_a']
    found = pairing.match(['img_1', 'img_1_extra', 'img_10'], masks, '{stem}_*')
    assert found == {'img_1': ['img_1_a'], 'img_10': ['img_10_a'], 'img_1_extra': ['img_1_extra_a']}
    assert pairing.match(['img_1'], ['img_10', 'img_1x'], '{stem}*') == {'img_1': ['img_1x']}


def test_one_mask_in_each_folder_needs_no_stem():
    pictures = [f'case_{n}/imaging' for n in N]
    found = pairing.match(pictures, [f'case_{n}/segmentation' for n in N], 'segmentation')
    assert found == {f'case_{n}/imaging': [f'case_{n}/segmentation'] for n in N}


def test_a_rule_in_the_name_of_a_folder_chooses_pictures():
    assert pairing.split(Path('imagesTr/{stem}_0000')) == (Path('imagesTr'), '{stem}_0000')
    assert pairing.split(Path('images')) == (Path('images'), '{stem}')
    ways = {'a_0000': 1, 'sub/b_0000': 2, 'a_0001': 3, '_0000': 4}
    assert pairing.named(ways, '{stem}_0000') == {'a': 1, 'sub/b': 2}


CASES = {  # pictures, masks, flags that pair them all
    'suffix': (N, [f'{n}_mask' for n in N], "--config.data.mask_name='{stem}_mask'"),
    'isic': ([f'ISIC_{n}' for n in N], [f'ISIC_{n}_segmentation' for n in N],
             "--config.data.mask_name='{stem}_segmentation'"),
    'prefix': (N, [f'seg_{n}' for n in N], "--config.data.mask_name='seg_{stem}'"),
    'nnU-Net': ([f'liver_{n}_0000' for n in N], [f'liver_{n}' for n in N],
                '--config.data.images=\'("in/{stem}_0000",)\''),
    'channels': ([f'brats_{n}_000{c}' for n in N for c in range(4)], [f'brats_{n}' for n in N],
                 '--config.data.images=\'("in/{stem}_0000", "in/{stem}_0001", "in/{stem}_0002", '
                 '"in/{stem}_0003",)\''),
    'both': ([f'img_{n}' for n in N], [f'mask_{n}' for n in N],
             '--config.data.images=\'("in/img_{stem}",)\' --config.data.mask_name=\'mask_{stem}\''),
    'several': ([f'benign ({n})' for n in N],
                [f'benign ({n})_mask{more}' for n in N for more in ('', '_1')],
                "--config.data.mask_name='{stem}_mask*'"),
    'instances': (N, [f'{n}/nucleus{i}' for n in N for i in 'abc'],
                  "--config.data.mask_name='{stem}/*'"),
    'one name': ([f'case_{n}/imaging' for n in N], [f'case_{n}/segmentation' for n in N],
                 '--config.data.mask_name=segmentation'),
}  # fmt: skip


@pytest.mark.parametrize('name', CASES)
def test_a_rule_is_proposed_that_can_be_pasted(name):
    pictures, masks, flags = CASES[name]
    hint = pairing.suggest(Path('in'), pictures, masks)
    assert hint == f'{flags} pairs 12 of 12'
    given = dict(flag.split('=', 1) for flag in shlex.split(flags))
    rules = [pairing.STEM]
    if images := given.get('--config.data.images'):
        rules = [Path(place).name for place in re.findall('"(.+?)"', images)]
    chosen = [list(pairing.named(dict.fromkeys(pictures), rule)) for rule in rules]
    assert all(len(ways) == 12 for ways in chosen)
    assert (
        len(pairing.match(chosen[0], masks, given.get('--config.data.mask_name', pairing.STEM)))
        == 12
    )


@pytest.mark.parametrize(
    ('pictures', 'masks'),
    [(['a', 'b', 'c'], ['x', 'y', 'z']), (['a'], ['z']), (['{stem}'], ['*']), (['a'], ['a*b{c}'])],
)
def test_nothing_is_proposed_that_does_not_pair(pictures, masks):
    assert pairing.suggest(Path('in'), pictures, masks) == ''


@pytest.mark.parametrize('rule', ['{stem}', '{stem}_mask*', 'seg', 'a{stem}b', '{stem}/*'])
def test_rules(rule):
    assert pairing.is_rule(rule)


@pytest.mark.parametrize('rule', ['', '{stem}{stem}', '*', 'a*', '{stem}**', '{name}', '{stem'])
def test_what_is_no_rule(rule):
    assert not pairing.is_rule(rule)
