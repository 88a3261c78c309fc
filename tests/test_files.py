"""Which files there are."""

import errno
import os
import unicodedata
from pathlib import Path

import pytest

from pspnet_jax.data.formats import files
from pspnet_jax.runtime.errors import DataError


def test_names_are_composed_as_most_systems_have_them(tmp_path):
    """macOS decomposes: the picture of one machine and the mask of another are of one name."""
    for form in ('NFC', 'NFD'):
        (tmp_path / form / 'übung').mkdir(parents=True)
        name = unicodedata.normalize(form, 'übung/Öl_é')
        (tmp_path / form / name).parent.mkdir(exist_ok=True)
        (tmp_path / form / f'{name}.png').touch()
    keys = [list(files.find(tmp_path / form)) for form in ('NFC', 'NFD')]
    assert keys[0] == keys[1] == [unicodedata.normalize('NFC', 'übung/Öl_é')]


def test_find(tmp_path):
    for name in ('b.nii.gz', 'sub/a.PNG', 'c.d.tif', 'notes.txt', '.hidden.png', 'ct/1.dcm'):
        path = tmp_path / 'data' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    root = tmp_path / 'data'
    found = files.find(root)
    assert list(found) == ['b', 'c.d', 'ct', 'sub/a']
    assert found['b'] == root / 'b.nii.gz'
    assert found['ct'] == root / 'ct'
    (root / 'sub' / 'b.png').touch()
    assert files.find(root)['sub/b'] == root / 'sub' / 'b.png'  # another one than b
    (root / 'b.png').touch()
    (tmp_path / 'outside.png').touch()
    (root / 'out.png').symlink_to(tmp_path / 'outside.png')
    (root / 'up').symlink_to(tmp_path)
    (root / 'loop').symlink_to(root)  # inside: not gone into, no fault
    with pytest.raises(DataError) as caught:
        files.find(root)
    lines = str(caught.value).split('\n  ')
    assert lines[0] == f'3 fault(s) in {root}:'
    assert sorted(line.split()[0].removeprefix(f'{root}/') for line in lines[1:]) == [
        'b.nii.gz',
        'out.png',
        'up',
    ]
    (tmp_path / 'nothing').mkdir()
    with pytest.raises(DataError, match='holds no images'):
        files.find(tmp_path / 'nothing')
    with pytest.raises(DataError, match='is not a folder'):
        files.find(tmp_path / 'missing')


def test_a_closed_folder_is_a_fault_and_not_passed_over(tmp_path, monkeypatch):
    """Else a data set would shrink without a word."""
    (tmp_path / 'closed').mkdir()
    (tmp_path / 'a.png').touch()
    scandir = os.scandir

    def refuse(path):
        if Path(path) == tmp_path / 'closed':
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(DataError, match=r'closed can not be listed \(Permission denied\)'):
        files.find(tmp_path)
