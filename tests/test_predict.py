"""Prediction: files of the right size and values, and one bad picture stops no other."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspnet_jax import calibration, checkpoint, predict, visualize
from pspnet_jax.errors import DataError
from tests.conftest import write_case


def test_a_folder_becomes_masks_overlays_and_panels(trained, tmp_path):
    write_case(tmp_path / 'in', 'case', slices=3)
    Image.new('L', (50, 37), 90).save(tmp_path / 'in' / 'photo.jpg')
    assert predict.predict_pictures(trained[0], tmp_path / 'in', tmp_path / 'out') == []
    names = {str(path.relative_to(tmp_path / 'out')) for path in (tmp_path / 'out').rglob('*.*')}
    stems = ['case/case_1', 'case/case_2', 'case/case_3', 'photo']
    assert names == {f'{s}_{k}.png' for s in stems for k in ('mask', 'overlay', 'panels')}
    mask = np.array(Image.open(tmp_path / 'out' / 'photo_mask.png'))
    assert mask.shape == (37, 50)
    assert set(np.unique(mask)) <= {0, 255}
    assert Image.open(tmp_path / 'out' / 'photo_panels.png').size == (3 * 50 + 8, 37)


def test_the_probability_is_a_picture_too_and_tempered_without_a_change_of_the_mask(
    trained, tmp_path
):
    shutil.copytree(trained[0] / 'checkpoints', tmp_path / 'run' / 'checkpoints')
    folder = write_case(tmp_path / 'in', 'case', slices=2)

    def predicted(name):
        out = tmp_path / name
        predict.predict_pictures(tmp_path / 'run', folder, out, probability=True)
        kinds = ('mask', 'probability')
        return [np.array(Image.open(out / f'case_1_{kind}.png')).astype(int) for kind in kinds]

    mask, prob = predicted('plain')
    assert ((mask > 0) == (prob > 127.5))[abs(prob - 127.5) > 1].all()
    step = checkpoint.choose(tmp_path / 'run')
    calibration.save(tmp_path / 'run', {'step': step, 'temperature': 4.0})
    same, even = predicted('tempered')
    assert (same == mask).all()
    assert (abs(even - 127.5) <= abs(prob - 127.5) + 1).all()
    assert abs(even - prob).max() > 2


def test_one_slice_alone_is_predicted_as_within_its_volume(trained, tmp_path):
    folder = write_case(tmp_path / 'in', 'case', slices=4)
    predict.predict_pictures(trained[0], folder, tmp_path / 'all')
    predict.predict_pictures(trained[0], folder / 'case_2.tif', tmp_path / 'one')
    assert {path.name for path in (tmp_path / 'one').iterdir()} == {
        f'case_2_{kind}.png' for kind in ('mask', 'overlay', 'panels')
    }
    one, among = (
        np.array(Image.open(tmp_path / name / 'case_2_mask.png')) for name in ('one', 'all')
    )
    assert (one == among).mean() > 0.999  # the same scale; batches of another size round otherwise


def test_a_bad_picture_is_reported_and_the_others_done(trained, tmp_path):
    folder = write_case(tmp_path / 'in', 'case', slices=2)
    (folder / 'case_1.tif').write_bytes(b'no tiff')
    faults = predict.predict_pictures(trained[0], folder, tmp_path / 'out')
    assert len(faults) == 1
    assert 'case_1.tif is not a readable picture' in faults[0]
    assert (tmp_path / 'out' / 'case_2_mask.png').exists()
    assert not list((tmp_path / 'out').glob('*case_1*'))
    assert not list((tmp_path / 'out').glob('.*'))


@pytest.mark.parametrize('kind', ['missing', 'empty'])
def test_no_pictures_is_an_error_before_anything_is_written(trained, tmp_path, kind):
    source = tmp_path / 'in'
    if kind == 'empty':
        source.mkdir()
    with pytest.raises(DataError, match=str(source)):
        predict.predict_pictures(trained[0], source, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_slices_are_grouped_in_the_order_of_their_numbers():
    names = ['b_10.tif', 'b_9.tif', 'b_1.tif', 'a.png', 'c_1.png']
    groups = predict.group_slices([Path(name) for name in names])
    assert [[p.name for p in group] for group in groups] == [
        ['b_1.tif', 'b_9.tif', 'b_10.tif'], ['a.png'], ['c_1.png']
    ]  # fmt: skip


def test_pictures_show_the_mask_and_keep_the_rest():
    image = np.full((8, 8, 3), 100, np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 1
    for draw in (visualize.overlay, visualize.outline):
        picture = draw(image, mask)
        assert (picture[mask == 0] == 100).all()
        assert (picture[2, 2] != 100).any()
    assert (visualize.outline(image, mask)[3:5, 3:5] == 100).all()  # a line, not a filling
    assert (image == 100).all()  # the input is left alone
    panels = visualize.three_panels(image, mask)
    assert (panels[:, :8] == image).all()
    assert ((panels[:, 12:20] == 255).all(-1) == (mask == 1)).all()
