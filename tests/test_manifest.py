"""What predict writes is known again; what is somebody else's is left alone."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.config import base, to_dict, with_prediction
from pspnet_jax.inference.predictors import Predictor
from pspnet_jax.prediction import folders, manifest
from pspnet_jax.runtime.errors import ConfigError, DataError
from tests.conftest import ROOT
from tests.test_predict import noise, written

MINE = b'by hand'


def pictures(folder, names='abc'):
    for seed, name in enumerate(names):
        noise(folder / f'{name}.png', (32, 32), seed)
    return folder


def lines(out):
    return [json.loads(row) for row in (out / manifest.NAME).read_text().splitlines()]


def test_results_do_not_go_among_the_inputs(trained, tmp_path):
    """Kaggle's own layout: the masks by hand lie beside the pictures."""
    pictures(tmp_path)
    (tmp_path / 'a_mask.png').write_bytes(MINE)
    for source in (tmp_path, tmp_path / 'a.png', f'{tmp_path}/*.png'):
        with pytest.raises(ConfigError, match=r'holds the inputs: give the results a separate'):
            folders.predict_files(trained[0], source, tmp_path)
    with pytest.raises(ConfigError, match='holds the inputs'):
        folders.predict_files(trained[0], tmp_path, tmp_path, overwrite=True)
    (tmp_path / 'link').symlink_to(tmp_path)
    with pytest.raises(ConfigError, match='holds the inputs'):
        folders.predict_files(trained[0], tmp_path / 'a.png', tmp_path / 'link')
    assert (tmp_path / 'a_mask.png').read_bytes() == MINE
    assert written(tmp_path) == {'a.png', 'b.png', 'c.png', 'a_mask.png'}


@pytest.mark.slow
def test_masks_by_hand_are_neither_replaced_nor_taken_for_results(trained, tmp_path):
    source, out = pictures(tmp_path / 'in'), tmp_path / 'out'
    out.mkdir()
    for name in 'abc':
        (out / f'{name}_mask.png').write_bytes(MINE)
    with pytest.raises(
        DataError, match=r'3 result\(s\) in .*: give another --output, or --over'
    ) as e:
        folders.predict_files(trained[0], source, out, save=['mask'])
    assert f'{out}/b_mask... was not written by this command' in str(e.value)
    assert {path.read_bytes() for path in out.iterdir()} == {MINE}
    (out / 'c_mask.png').unlink()
    with pytest.raises(DataError, match=r'2 result\(s\)'):
        folders.predict_files(trained[0], source, out, save=['mask'])
    folders.predict_files(trained[0], source, out, save=['overlay'])  # of these there is none
    with pytest.raises(DataError, match=r'2 result\(s\)'):
        folders.predict_files(trained[0], source, out, save=['mask', 'overlay'])
    assert (out / 'a_mask.png').read_bytes() == MINE
    folders.predict_files(trained[0], source, out, save=['mask'], overwrite=True)
    assert np.array(Image.open(out / 'a_mask.png')).shape == (32, 32)


def test_the_manifest_says_run_step_and_options_of_every_result(trained, tmp_path):
    source, out = pictures(tmp_path / 'in', 'ab'), tmp_path / 'out'
    folders.predict_files(trained[0], source, out, save=['mask'], changes={'flip': True})
    writer, *rest = lines(out)
    (run,) = writer['runs']
    steps = [
        int(path.name) for path in (trained[0] / 'checkpoints').iterdir() if path.name.isdigit()
    ]
    assert run['workdir'] == str(trained[0])
    assert run['step'] in steps
    assert run['passed_over'] == {}
    assert writer['options']['flip'] is True
    for name in 'ab':
        assert [row['state'] for row in rest if row['result'] == name] == ['begun', 'done']
    assert {row['input'] for row in rest} == {str(source / 'a.png'), str(source / 'b.png')}
    assert {row['how'] for row in rest} == {writer['how']}


@pytest.mark.slow
def test_another_run_or_other_options_do_not_pass_for_this_one(trained, tmp_path):
    source, out = pictures(tmp_path / 'in', 'ab'), tmp_path / 'out'
    folders.predict_files(trained[0], source, out, save=['mask'])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for changes in ({'flip': True}, {'threshold': 0.9}):
        with pytest.raises(DataError, match=r'a_mask\.\.\. was written by .*, step \d+'):
            folders.predict_files(trained[0], source, out, save=['mask'], changes=changes)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # The same weights in another folder are the same run.
    copy = shutil.copytree(trained[0], tmp_path / 'copy')
    folders.predict_files(copy, source, out, save=['mask'])
    assert (out / 'a_mask.png').read_bytes() == before['a_mask.png']
    # And a new file goes beside those of other options.
    more = pictures(tmp_path / 'more', 'x')
    folders.predict_files(trained[0], more, out, save=['mask'], changes={'flip': True})
    assert 'x_mask.png' in written(out)


@pytest.mark.slow
def test_inputs_that_changed_are_done_again_and_two_of_a_name_are_told_apart(trained, tmp_path):
    source, out = pictures(tmp_path / 'in', 'ab'), tmp_path / 'out'
    folders.predict_files(trained[0], source, out, save=['overlay'])
    before = {name: (out / name).read_bytes() for name in written(out)}
    noise(source / 'a.png', (48, 32), 9)
    folders.predict_files(trained[0], source, out, save=['overlay'])
    assert Image.open(out / 'a_overlay.png').size[0] >= 32
    assert (out / 'a_overlay.png').read_bytes() != before['a_overlay.png']
    assert (out / 'b_overlay.png').read_bytes() == before['b_overlay.png']
    other = pictures(tmp_path / 'other', 'zab')
    with pytest.raises(DataError, match=rf'is the result of {source}/a.png, not of {other}/a.png'):
        folders.predict_files(trained[0], other, out, save=['overlay'])
    # A folder that was moved is the same.
    moved = source.rename(tmp_path / 'moved')
    kept = {name: (out / name).read_bytes() for name in written(out)}
    for name in kept:
        (out / name).write_bytes(b'finished')
    folders.predict_files(trained[0], moved, out, save=['overlay'])
    assert {(out / name).read_bytes() for name in kept} == {b'finished'}


@pytest.mark.slow
@pytest.mark.parametrize('cut', ['begun', 'middle of a line', 'none of it'])
def test_a_command_that_was_killed_is_gone_on_with(trained, tmp_path, cut):
    source, out = pictures(tmp_path / 'in'), tmp_path / 'out'
    folders.predict_files(trained[0], source, out, save=['mask'])
    expected = {name: (out / name).read_bytes() for name in written(out)}
    rows = (out / manifest.NAME).read_text().splitlines(keepends=True)
    (done,) = (row for row in rows if '"b"' in row and '"done"' in row)
    rows = [row for row in rows if '"c"' not in row and row != done]
    if cut == 'none of it':
        rows = [row for row in rows if '"b"' not in row]
        (out / 'b_mask.png').unlink()
    else:  # whether it was written is known by the line at the end alone
        (out / 'b_mask.png').write_bytes(b'of before')
        rows += [done[:30]] if cut == 'middle of a line' else []
    (out / manifest.NAME).write_text(''.join(rows))
    (out / 'c_mask.png').unlink()
    folders.predict_files(trained[0], source, out, save=['mask'])
    assert {name: (out / name).read_bytes() for name in written(out)} == expected
    assert all(isinstance(row, dict) for row in manifest._lines(out / manifest.NAME))
    for name in expected:  # and is finished then
        (out / name).write_bytes(b'finished')
    folders.predict_files(trained[0], source, out, save=['mask'])
    assert {(out / name).read_bytes() for name in expected} == {b'finished'}


@pytest.mark.parametrize(
    'row',
    ['', 'x', '[]', '{}', '3', '{"how": 1}', '{"how": "a", "writer": 3}', '[' * 100_000,
     '{"how": "a", "result": "a", "input": "a", "mark": "a", "state": "done", "kinds": [3]}',
     '{"how": "a", "result": "a", "input": "a", "mark": "a", "state": "done", "kinds": 3}',
     '\x00\ufffd'],
)  # fmt: skip
def test_lines_that_are_none_of_ours_are_passed_over(tmp_path, row):
    (tmp_path / manifest.NAME).write_text(f'{row}\n')
    found = manifest.read(tmp_path, {})
    assert not found.last
    assert not found.writers


@pytest.mark.slow
def test_two_commands_into_one_folder_at_once(trained, tmp_path):
    """Of one input and of two: each result is whole, and nothing else is left."""
    one, other = pictures(tmp_path / 'one', 'abcd'), pictures(tmp_path / 'other', 'stuv')
    code = 'import sys; from pspnet_jax.prediction import folders\n'
    code += 'assert not folders.predict_files(*sys.argv[1:], save=["mask"])'
    out = tmp_path / 'out'
    started = [
        subprocess.Popen([sys.executable, '-c', code, trained[0], source, out], cwd=ROOT,
                         stderr=subprocess.PIPE, text=True)
        for source in (one, one, other)
    ]  # fmt: skip
    for process in started:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert written(out) == {f'{name}_mask.png' for name in 'abcdstuv'}
    folders.predict_files(trained[0], one, tmp_path / 'alone', save=['mask'])
    for name in 'abcd':
        ours, alone = ((tmp_path / k / f'{name}_mask.png').read_bytes() for k in ('out', 'alone'))
        assert ours == alone


@pytest.mark.slow
def test_what_a_killed_process_left_is_swept_and_a_living_ones_is_not(trained, tmp_path):
    source, out = pictures(tmp_path / 'in', 'a'), tmp_path / 'out'
    code = 'import os, sys; from pathlib import Path; from pspnet_jax.runtime import storage\n'
    code += 'with storage.writing(Path(sys.argv[1])) as aside: aside.touch(); os._exit(9)'
    subprocess.run([sys.executable, '-c', code, out / 'sub' / 'x.png'], cwd=ROOT, check=False)
    (left,) = (out / 'sub').iterdir()
    parts = left.name.split('.')
    living = left.with_name('.'.join([*parts[:2], str(os.getpid()), *parts[3:]]))
    living.touch()
    folders.predict_files(trained[0], source, out, save=['mask'])
    assert list((out / 'sub').iterdir()) == [living]


@pytest.mark.slow
def test_a_name_too_long_for_results_is_one_files_fault(trained, tmp_path):
    source, out = pictures(tmp_path / 'in', ['a', 'z', 'x' * 247]), tmp_path / 'out'
    for _ in range(2):
        (fault,) = folders.predict_files(trained[0], source, out, save=['mask', 'overlay'])
        assert fault.endswith(
            f'{"x" * 247}.png: with _mask added, the name is too long for this disk: rename the '
            'file'
        )
    assert written(out) == {f'{name}_{kind}.png' for name in 'az' for kind in ('mask', 'overlay')}
    longest = pictures(tmp_path / 'longest', ['y' * 246])  # _mask.png makes it 255
    assert folders.predict_files(trained[0], longest, out, save=['mask']) == []


def test_results_of_another_crf_are_others_and_without_one_those_of_before(tmp_path):
    def digest(**changes):
        config = with_prediction(base.get_config(), changes)
        predictor = Predictor(config, None, None, 3, runs=[{'digest': 'd'}])
        return folders.open_manifest(predictor, tmp_path, None).digest

    options = {
        'digests': ['d'], 'predict': to_dict(base.get_config())['predict'], 'temperature': 1.0,
        'group': '',
    }  # fmt: skip
    assert digest() == manifest.read(tmp_path, options).digest
    assert digest() == digest(**{'eval.batch_size': 3, 'data.threads': 1, 'crf.window': 3})
    found = [digest(**{'crf.kernel': 'windowed', 'crf.window': n}) for n in (3, 4)]
    assert len({digest(), *found}) == 3
