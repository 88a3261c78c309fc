"""Pairs images and masks by name, or by a rule if their names differ.

A rule gives a mask's name, where {stem} is the image's name: '{stem}_mask', 'seg_{stem}', or
'segmentation' if each folder has one image. With a * several masks belong to one image:
'{stem}_mask*', '{stem}/*'. In the name of an image folder, 'imagesTr/{stem}_0000', the rule
selects the files that are images, or one channel of them.
"""

import collections
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

STEM = '{stem}'
MOST_NAMES = 200  # in which a rule is searched


class Affix(NamedTuple):
    """What stands before and after the stem."""

    before: str
    after: str


def is_rule(text: str) -> bool:
    """Whether it has at most one {stem} and at most one *, which needs a {stem}."""
    plain = text.replace(STEM, '', 1)
    stars = plain.count('*')
    return bool(text) and not re.search(r'[{}\0]', plain) and stars <= (STEM in text)


def split(place: Path) -> tuple[Path, str]:
    """(folder, rule) of 'FOLDER/{stem}_0000'; the rule of a plain folder is '{stem}'."""
    return (place.parent, place.name) if STEM in place.name else (place, STEM)


def named(ways: Mapping[str, Path], rule: str) -> dict[str, Path]:
    """{way, its name reduced to the stem: file} of the files that match the rule."""
    before, after = rule.split(STEM)
    found = {}
    for way, path in ways.items():
        folder, slash, last = way.rpartition('/')
        stem = last[len(before) : len(last) - len(after)]
        if stem and last == before + stem + after:
            found[folder + slash + stem] = path
    return found


def last(way: str) -> str:
    return way.rpartition('/')[2]


def are_unique(ways: Iterable[str]) -> bool:
    lasts = [last(way) for way in ways]
    return len(set(lasts)) == len(lasts)


def match(
    pictures: Sequence[str], masks: Sequence[str], rule: str = STEM, *, together: bool = False
) -> dict[str, list[str]]:
    """{picture: its masks}, without pictures that have none; all are paths below their folders.

    They are matched by name if names are unique; otherwise their subfolders must agree too. A mask
    that fits two pictures belongs to the longer name. `together`: both are in one folder, and no
    file is its own mask.
    """
    alone = STEM in rule and '/' not in rule and are_unique(pictures) and are_unique(masks)
    known, ways = ({last(way) if alone else way: way for way in some} for some in (masks, pictures))
    found = collections.defaultdict(list)
    if '*' not in rule:
        for name, way in ways.items():
            folder, slash, stem = name.rpartition('/')
            mask = folder + slash + rule.replace(STEM, stem)
            if mask in known and not (together and mask == name):
                found[way].append(known[mask])
        return dict(found)
    before, after = rule.split(STEM)
    pattern = re.compile(re.escape(after).replace(r'\*', '[^/]*'))
    for mask, whole in known.items():
        if way := _owner(mask, ways, before, pattern, together):
            found[way].append(whole)
    return dict(found)


def _owner(
    mask: str, pictures: Mapping[str, str], before: str, after: re.Pattern, together: bool
) -> str:
    """The picture with the longest name for which the rule gives this mask; '' for none."""
    starts = [0, *(i + 1 for i, letter in enumerate(mask) if letter == '/')]
    for end in range(len(mask), 0, -1):
        # A number must end here: img_1 is not the picture of img_10.
        if mask[end - 1].isdigit() and mask[end : end + 1].isdigit():
            continue
        if not after.fullmatch(mask, end):
            continue
        for start in starts:
            if mask.startswith(before, start):
                name = mask[:start] + mask[start + len(before) : end]
                if name in pictures and not (together and name == mask):
                    return pictures[name]
    return ''


# Suggestions of a rule for names that do not pair.


def suggest(folder: Path, pictures: Sequence[str], masks: Sequence[str]) -> str:
    """'--config.data.mask_name={stem}_mask pairs 12 of 12', or ''."""
    best, most = '', 0
    for flags, given, rule in _candidates(folder, pictures, masks):
        pairs = len(match(given, masks, rule)) if given else 0
        if pairs > most:
            best, most = f'{flags} pairs {pairs} of {len(given)}', pairs
    return best if 2 * most > min(len(pictures), len(masks)) else ''


def _candidates(
    folder: Path, pictures: Sequence[str], masks: Sequence[str]
) -> Iterator[tuple[str, list[str], str]]:
    """(flags, ways of the pictures that these select, rule for the masks)."""
    images, truths = [last(way) for way in pictures], [last(way) for way in masks]
    alone, folders = collections.Counter(truths).most_common(1)[0]
    inside = f'{STEM}/*' if any('/' in way for way in masks) else ''
    for rule in (_decoration(images, truths), alone if folders > 1 else '', inside):
        if is_rule(rule):
            yield f'--config.data.mask_name={shlex.quote(rule)}', list(pictures), rule
    affixes = _affixes(truths, images).most_common(8)
    channels = sorted(affix for affix, count in affixes if 2 * count >= affixes[0][1])
    here, there = _common(images), _common(truths)
    for chosen, rule in ((channels, STEM), ([here], f'{there.before}{STEM}{there.after}')):
        rules = [f'{affix.before}{STEM}{affix.after}' for affix in chosen]
        if rules and all(map(is_rule, (*rules, rule))):
            places = ', '.join(json.dumps(str(folder / name)) for name in rules)
            flags = f'--config.data.images={shlex.quote(f"({places},)")}'
            flags += '' if rule == STEM else f' --config.data.mask_name={shlex.quote(rule)}'
            yield flags, list(named(dict.fromkeys(pictures), rules[0])), rule


def _affixes(stems: Sequence[str], names: Sequence[str]) -> collections.Counter[Affix]:
    """Counts of what surrounds the longest stem in each name."""
    known, found = set(stems), collections.Counter()
    for name in names[:MOST_NAMES]:
        affixes = (
            Affix(name[:start], name[start + size :])
            for size in range(len(name) - 1, 0, -1)
            for start in range(len(name) - size + 1)
            if name[start : start + size] in known
        )
        found.update(itertools.islice(affixes, 1))
    return found


def _decoration(stems: Sequence[str], names: Sequence[str]) -> str:
    """The rule that makes most of the names from the stems; '' for none."""
    affixes = _affixes(stems, names)
    if not affixes:
        return ''
    before = affixes.most_common(1)[0][0].before
    after = {affix.after for affix in affixes if affix.before == before}
    if len(after) == 1:
        return f'{before}{STEM}{after.pop()}'
    return f'{before}{STEM}{_start(after)}*'


def _start(names: Iterable[str]) -> str:
    """The common prefix of all names."""
    low, high = min(names), max(names)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))
    return ''.join(letter for letter, _ in same)


def _common(names: Sequence[str]) -> Affix:
    """The common prefix and suffix of all names, without the digits that distinguish them."""
    before = re.sub(r'\d+$', '', _start(names))
    rest = [name[len(before) :][::-1] for name in names]
    return Affix(before, re.sub(r'\d+$', '', _start(rest))[::-1])
