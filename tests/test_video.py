"""Videos: every frame, at its size and rate, through the network and into a file again."""

import re
import struct
from fractions import Fraction

import numpy as np
import pytest

from pspnet_jax.data.formats import video
from pspnet_jax.inference import predictors
from pspnet_jax.prediction import folders, videos
from pspnet_jax.runtime.errors import DataError
from tests.conftest import tiny_config
from tests.test_predict import full_disk, written

av = pytest.importorskip('av', reason='videos are read and written by PyAV')

RATE = Fraction(30000, 1001)


def picture(n, size=(48, 64)):
    """Frame n: smooth, so that it survives compression, and another each time."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    channels = [rows * 3, columns * 2, np.full(size, 12 * n)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def make(path, frames, *, exact=False):
    with video.writing(path, RATE, exact=exact) as write:
        for frame in frames:
            write(frame)
    return path


def read(path):
    with video.reading(path) as (rate, count, frames):
        return rate, count, list(frames)


@pytest.mark.parametrize('size', [(48, 64), (47, 64), (48, 63), (33, 35)])
def test_frames_come_back_at_their_size_rate_and_number(tmp_path, size):
    frames = [picture(n, size) for n in range(7)]
    rate, count, found = read(make(tmp_path / 'a.mp4', frames))
    assert (rate, count, len(found)) == (RATE, 7, 7)
    for frame, ours in zip(frames, found, strict=True):
        assert ours.shape == frame.shape
        assert np.abs(ours.astype(int) - frame).mean() < 4
    assert written(tmp_path) == {'a.mp4'}


def test_exact_is_exact(tmp_path, rng):
    frames = list(rng.integers(0, 256, (5, 33, 35), np.uint8))
    with av.open(str(make(tmp_path / 'grey.mkv', frames, exact=True))) as container:
        found = [frame.to_ndarray(format='gray') for frame in container.decode(video=0)]
    np.testing.assert_array_equal(found, frames)
    frames = list(rng.integers(0, 256, (5, 33, 35, 3), np.uint8))
    _, _, found = read(make(tmp_path / 'colour.mkv', frames, exact=True))
    np.testing.assert_array_equal(found, frames)


def test_a_telephones_video_is_read_upright(tmp_path):
    path = make(tmp_path / 'a.mp4', [picture(n) for n in range(3)])
    _, _, lying = read(path)
    data = bytearray(path.read_bytes())
    matrix = data.index(b'tkhd') + 4 + 40  # ISO 14496-12, 8.3.2: right becomes down
    data[matrix : matrix + 20] = struct.pack('>5i', 0, 1 << 16, 0, -1 << 16, 0)
    path.write_bytes(data)
    _, _, upright = read(path)
    for a, b in zip(lying, upright, strict=True):
        np.testing.assert_array_equal(b, a.transpose(1, 0, 2)[:, ::-1])


def test_what_is_no_video_is_named(tmp_path):
    bad = tmp_path / 'bad.mp4'
    bad.write_bytes(b'no video at all' * 99)
    with pytest.raises(DataError, match=r'bad.mp4 is not a readable video'):
        read(bad)
    with pytest.raises(DataError, match=r'gone.mp4 is not a readable video'):
        read(tmp_path / 'gone.mp4')
    with pytest.raises(DataError, match='camera 97 does not answer'):
        read(97)
    whole = make(tmp_path / 'whole.mkv', [picture(n) for n in range(40)], exact=True)
    whole.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(DataError, match=r'whole.mkv is not a readable video'):
        read(whole)


def test_a_writer_that_fails_leaves_nothing(tmp_path, rng):
    with full_disk(3000), pytest.raises(DataError, match=r'a.mkv can not be written'):
        make(tmp_path / 'a.mkv', rng.integers(0, 256, (9, 64, 64), np.uint8), exact=True)
    with pytest.raises(ZeroDivisionError), video.writing(tmp_path / 'b.mp4', 25, exact=False) as w:
        w(picture(1 // 0))
    make(tmp_path / 'c.mp4', [])
    assert written(tmp_path) == set()


@pytest.fixture(scope='module')
def predictor(trained):
    return predictors.load(trained[0])


def test_a_video_becomes_videos_frame_by_frame(trained, predictor, tmp_path, capsys):
    frames = 10  # a batch is of four
    source = make(tmp_path / 'in' / 'clip.mp4', [picture(n) for n in range(frames)])
    save = ['mask', 'probability', 'overlay', 'panels']
    out = tmp_path / 'out'
    assert folders.predict_files(trained[0], tmp_path / 'in', out, save=save) == []
    assert f'clip.mp4: {frames} frames at 29.97 per second' in capsys.readouterr().out
    assert written(out) == {
        'clip_mask.mkv', 'clip_probability.mkv', 'clip_overlay.mp4', 'clip_panels.mp4'
    }  # fmt: skip
    for name, size in (
        ('mask.mkv', (48, 64)), ('overlay.mp4', (48, 64)), ('panels.mp4', (48, 3 * 64 + 8))
    ):  # fmt: skip
        rate, _, found = read(out / f'clip_{name}')
        assert (float(rate), len(found)) == (pytest.approx(float(RATE), rel=1e-3), frames)
        assert found[0].shape[:2] == size
    _, _, images = read(source)
    _, _, probs = read(out / 'clip_probability.mkv')
    _, _, masks = read(out / 'clip_mask.mkv')
    scale = predictors.case_of(predictor, np.stack(images)).intensity
    for image, prob, mask in zip(images, probs, masks, strict=True):
        case = predictors.Case(image[None], scale)
        ((labels, expected),) = predictors.segment(predictor, [case], probabilities=True)
        np.testing.assert_allclose(prob[..., 0] / 255, expected[0, ..., 1], atol=0.003)
        np.testing.assert_array_equal(mask[..., 0], 255 * labels[0])
    before = {name: (out / name).stat().st_mtime_ns for name in written(out)}
    folders.predict_files(trained[0], tmp_path / 'in', out, save=save)
    assert before == {name: (out / name).stat().st_mtime_ns for name in written(out)}


def bright(images):
    """A network that takes for class 1 what is brighter than the mean."""
    share = 1 / (1 + np.exp(-4 * images.mean(-1)))
    return np.stack([1 - share, share], axis=-1).astype(np.float32)


BRIGHT = predictors.Predictor(tiny_config(), bright, None, 3)


def black_at_first(black, lit):
    """Noise that a camera gives in the dark, then a picture with a bright half."""
    rng = np.random.default_rng(0)
    dark = [rng.integers(0, 4, (48, 64, 3)).astype(np.uint8) for _ in range(black)]
    half = np.full((48, 64, 3), 60, np.uint8)
    half[:, 32:] = 180
    return dark + [half] * lit


def masks(path):
    return np.stack(read(path)[2])[..., 0] > 0


@pytest.mark.parametrize('black', [0, 4, 30, 100])
def test_a_black_start_does_not_set_the_scale(tmp_path, black):
    lit = black + 10
    source = make(tmp_path / 'a.mkv', black_at_first(black, lit), exact=True)
    videos.predict_video(BRIGHT, source, tmp_path / 'a', save=['mask'])
    found = masks(tmp_path / 'a_mask.mkv')[black:]
    assert len(found) == lit
    assert found[:, :, 32:].all()
    assert not found[:, :, :32].any()


def test_the_frames_that_a_scale_is_measured_on_are_spread_over_all():
    seen = videos.Spread()
    for n in range(1000):
        seen.add(np.full((300, 400, 3), n % 256, np.uint8))
    assert (seen.count, len(seen.frames)) == (1000, 63)
    assert {int(frame.max()) for frame in seen.frames} == {n % 256 for n in range(0, 1000, 16)}
    assert max(frame[..., 0].size for frame in seen.frames) <= videos.FRAME_PIXELS


def test_a_cameras_scale_follows_its_frames_and_that_is_said(tmp_path, monkeypatch, caplog):
    source = make(tmp_path / 'a.mkv', black_at_first(4, 20), exact=True)
    reading = video.reading
    monkeypatch.setattr(video, 'reading', lambda camera: reading(source))
    with caplog.at_level('INFO'):
        videos.predict_video(BRIGHT, 0, tmp_path / 'camera', save=['mask'], limit=24)
    monkeypatch.undo()
    assert 'camera 0: the intensity scale is measured on the frames so far' in caplog.text
    assert masks(tmp_path / 'camera_mask.mkv')[-4:].mean((0, 1)).tolist() == 32 * [0] + 32 * [1]


@pytest.mark.parametrize(
    ('name', 'codec', 'kind', 'options'),
    [
        ('a.avi', 'mjpeg', 'yuvj420p', {}),
        ('b.avi', 'mpeg4', 'yuv420p', {}),
        ('c.mkv', 'ffv1', 'bgr0', {}),
        ('d.mkv', 'libx264', 'yuv420p', {}),
        ('e.mp4', 'libx264', 'yuv420p', {'movflags': 'faststart'}),
        ('f.mov', 'mjpeg', 'yuvj420p', {'movflags': 'faststart'}),
        ('g.wmv', 'wmv2', 'yuv420p', {}),
    ],
)
@pytest.mark.parametrize('share', [0.5, 0.9])
def test_a_video_that_was_cut_off_is_an_error_with_its_frames_counted(
    tmp_path, name, codec, kind, options, share
):
    path = tmp_path / name
    rng = np.random.default_rng(0)
    with av.open(str(path), 'w', options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, kind
        for _ in range(60):
            pixels = rng.integers(0, 255, (48, 64, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format='rgb24')))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert video.claimed_bytes(path) == len(data)
    assert len(read(path)[2]) == 60
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        DataError, match=r'ends early: it has (\d+) of (60|an unknown number of) frames'
    ) as e:
        videos.predict_video(BRIGHT, path, tmp_path / 'out' / 'x', save=['mask'])
    there = int(re.search(r'early: it has (\d+)', str(e.value))[1])
    assert 60 * share - 12 < there < 60 * share + 4
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(('name', 'codec', 'kind'), [('a.avi', 'ffv1', 'bgr0'),
                                                     ('b.mkv', 'libx264', 'yuv420p')])  # fmt: skip
def test_a_video_whose_end_is_zeros_is_an_error_too(tmp_path, name, codec, kind):
    path = tmp_path / name
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, kind
        for n in range(80):
            pixels = np.random.default_rng(n).integers(0, 255, (48, 64, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format='rgb24')))
        container.mux(stream.encode())
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[:half] + bytes(len(data) - half))
    with pytest.raises(DataError, match=r'ends early: it has [34]\d of 80 frames'):
        read(path)


def test_a_video_that_lacks_only_its_index_is_read_whole(tmp_path, caplog):
    path = make(tmp_path / 'a.mkv', [picture(n) for n in range(9)], exact=True)
    path.write_bytes(path.read_bytes()[:-5])
    with caplog.at_level('WARNING'):
        assert len(read(path)[2]) == 9
    assert 'is cut off at its end, but its 9 frames are there' in caplog.text


def test_a_cut_video_among_others_is_the_fault_of_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predictors, 'load', lambda *_: BRIGHT)
    cut = make(tmp_path / 'in' / 'cut.mkv', [picture(n) for n in range(20)], exact=True)
    cut.write_bytes(cut.read_bytes()[:-9000])
    make(tmp_path / 'in' / 'whole.mp4', [picture(n) for n in range(5)])
    (fault,) = folders.predict_files('run', tmp_path / 'in', tmp_path / 'out', save=['mask'])
    assert 'cut.mkv ends early' in fault
    assert written(tmp_path / 'out') == {'whole_mask.mkv'}


def test_a_bad_video_stops_no_other_and_leaves_nothing(trained, tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'bad.avi').write_bytes(b'RIFF no')
    make(tmp_path / 'in' / 'good.mp4', [picture(0)])
    (fault,) = folders.predict_files(trained[0], tmp_path / 'in', tmp_path / 'out', save=['mask'])
    assert 'bad.avi is not a readable video' in fault
    assert written(tmp_path / 'out') == {'good_mask.mkv'}


def test_a_video_without_frames_is_named_with_a_remedy(predictor, tmp_path, monkeypatch):
    source = make(tmp_path / 'empty.mp4', [picture(0)])
    monkeypatch.setattr(video, '_frames', lambda *arguments: iter(()))
    with pytest.raises(DataError, match=r'empty.mp4 has no frame that can be read: record'):
        videos.predict_video(predictor, source, tmp_path / 'out' / 'empty')
    assert not (tmp_path / 'out').exists()


def test_a_limit_and_an_interrupted_camera_end_whole(predictor, tmp_path, monkeypatch):
    source = make(tmp_path / 'a.mp4', [picture(n) for n in range(12)])
    speed = videos.predict_video(predictor, source, tmp_path / 'short', save=['mask'], limit=5)
    assert speed.frames == len(read(tmp_path / 'short_mask.mkv')[2]) == 5

    segment, calls = predictors.segment, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return segment(*arguments, **options)

    monkeypatch.setattr(videos, 'segment', interrupted)
    with pytest.raises(KeyboardInterrupt):  # a file that is not whole is not finished
        videos.predict_video(predictor, source, tmp_path / 'file', save=['mask'])
    assert not list(tmp_path.glob('*file*'))
    reading = video.reading
    monkeypatch.setattr(video, 'reading', lambda camera: reading(source))
    calls.clear()
    speed = videos.predict_video(predictor, 0, tmp_path / 'camera', save=['mask'])
    monkeypatch.undo()
    assert speed.frames == len(read(tmp_path / 'camera_mask.mkv')[2]) >= 4
