"""Annotations, tables, splits, names and places of strangers; see test_hostile_data."""

import base64
import io
import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pspnet_jax.data import folder, formats, lgg, phantom, splits
from pspnet_jax.data.formats import annotations, files, flat, outlines, via, video
from pspnet_jax.data.formats.outlines import Shape
from pspnet_jax.prediction import inputs, videos
from pspnet_jax.runtime import text
from pspnet_jax.runtime.errors import LONGEST, DataError, PspnetError
from tests.conftest import write_case
from tests.stress import fuzz, fuzz_data
from tests.test_flat import GREY, has
from tests.test_hostile_data import refusal, within
from tests.test_via import read_annotations

quick = settings(
    derandomize=True,
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SLICES = phantom.load(volumes=6, slices=2, size=16, seed=0)


def tree(root):
    """{path: bytes} of every file below."""
    return {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}


# Messages.


@quick
@given(st.text() | st.sampled_from(['a\nerror: b', '\x1b[2J', '\ud800', 'x' * 10**5, '\u202e', '']))
def test_a_message_is_one_line_whatever_it_quotes(quoted):
    assert str(PspnetError(f'{quoted} is bad')).isprintable()
    assert len(str(PspnetError(quoted))) < 10 * LONGEST
    lines = str(DataError(f'faults in {quoted}:', [quoted, 'second'])).split('\n  ')
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert lines[-1] == 'second'


def test_what_can_be_printed_stays_as_it_is():
    for plain in ('Größe: 大', "it's 100 % of C:\\new"):
        assert str(PspnetError(plain)) == plain
    assert str(PspnetError('a\tb\x1b[31mc\n')) == 'a\\tb\\x1b[31mc\\n'
    two = DataError('2 faults:', ['a', 'b'])
    assert (str(two), two.faults) == ('2 faults:\n  a\n  b', ('a', 'b'))


@pytest.mark.parametrize('name', ['a\nb', '\x1b[31mred', 'a\u202eb', os.fsdecode(b'a\xff')])
def test_names_can_not_add_a_line_nor_steer_a_terminal(tmp_path, name):
    place = tmp_path / name
    (place / 'images').mkdir(parents=True)
    (place / 'masks').mkdir()
    for kind in ('images', 'masks'):
        Image.fromarray(GREY * 0).save(place / kind / f'{name}.png')
    assert 'can not be a file name' in refusal(folder.load, place)
    (place / 'images' / f'{name}.png').write_bytes(b'')
    (place / 'kaggle_3m' / name).mkdir(parents=True)
    for function, path in (
        (folder.load, place),
        (formats.read, place / 'images' / f'{name}.png'),
        (formats.read, place / 'nothing'),
        (files.find, place / 'nothing'),
        (lgg.check, place),
        (read_annotations, place / 'images' / f'{name}.png'),
        (inputs.find_files, place / 'nothing'),
    ):
        refusal(function, path)
    assert str(videos.Speed(name, 1, 25.0, 1.0)).isprintable()


# What is no file, and where links lead.


def what_is_no_file(root):
    root.mkdir()
    os.mkfifo(root / 'fifo')
    (root / 'folder').mkdir()
    (root / 'zero').symlink_to('/dev/zero')
    (root / 'loop').symlink_to('loop')
    (root / 'gone').symlink_to('nowhere')
    return list(root.iterdir())


def test_nothing_waits_on_a_fifo_a_device_or_a_link_in_a_circle(tmp_path):
    endings = {
        'png': formats.read, 'tif': lgg.read_image, 'jpg': flat.open_picture, 'npy': formats.read,
        'nii.gz': formats.read_labels, 'dcm': formats.read, 'xyz': formats.read, 'json': text.read,
        'csv': folder.read_table,
    }  # fmt: skip
    for n, place in enumerate(what_is_no_file(tmp_path / 'here')):
        for ending, read in endings.items():
            path = tmp_path / f'{n}.{ending}'
            path.symlink_to(place)
            refusal(read, path)
        refusal(splits.read, place, SLICES)
        refusal(read_annotations, place)
        refusal(inputs.find_files, place)
        if has('av'):
            refusal(video.reading(place).__enter__)


def test_links_in_a_circle_are_not_followed(tmp_path):
    """Each of two links back doubles the ways: 2 to the 40th until the system refuses."""
    root = tmp_path / 'in'
    (root / 'sub').mkdir(parents=True)
    Image.fromarray(GREY).save(root / 'sub' / 'a.png')
    for name in ('one', 'two'):
        (root / name).symlink_to(root)
        (root / 'sub' / name).symlink_to(root)
    path = root / 'sub' / 'a.png'
    with within(5):
        assert files.find(root) == {'sub/a': path}
        assert inputs.find_files(root) == (root, [path])
        assert inputs.find_files(f'{root}/**/*.png') == (root, [path])
        assert inputs.find_files(f'{root}/**') == (root, [path])
        read = annotations.Annotations({'a.png': []}, {}, {}, [])
        assert list(via.match_pictures(read, root)[0]) == [path]
    assert 'is not a valid pattern' in refusal(inputs.find_files, f'{root}/**x')


def test_a_link_out_of_the_folder_is_no_way_to_write_there(tmp_path):
    images, out, victim = tmp_path / 'images', tmp_path / 'out', tmp_path / 'victim'
    (images / 'sub').mkdir(parents=True)
    victim.mkdir()
    (victim / 'kept').write_text('precious')
    Image.fromarray(GREY).save(images / 'sub' / 'a.png')
    out.mkdir()
    (out / 'sub').symlink_to(victim)
    write_json(tmp_path / 'a.json', via_tree('a.png'))
    assert 'leads out of' in refusal(via.write_masks, tmp_path / 'a.json', images, out)
    (out / 'sub').unlink()
    (out / 'sub').mkdir()
    (out / 'sub' / 'a.png').symlink_to(victim / 'kept')
    via.write_masks(tmp_path / 'a.json', images, out)
    assert tree(victim) == {victim / 'kept': b'precious'}
    assert not (out / 'sub' / 'a.png').is_symlink()


# Annotations.


def write_json(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def via_tree(name, shape=fuzz_data.SHAPES[0]):
    region = {'shape_attributes': shape, 'region_attributes': {}}
    return {'key': {'filename': name, 'regions': [region]}}


def coco_tree(name, segmentation=((2, 2, 9, 2, 9, 8),)):
    item = {'id': 1, 'image_id': 1, 'category_id': 1, 'segmentation': segmentation}
    categories = [{'id': 1, 'name': 'tumor'}]
    images = [{'id': 1, 'file_name': name}]
    return {'images': images, 'annotations': [item], 'categories': categories}


def labelme_tree(name, points=((2, 2), (9, 2), (9, 8))):
    return {'shapes': [{'label': 'tumor', 'points': points}], 'imagePath': name}


@pytest.mark.parametrize(
    'name', ['../b.png', 'x/../../b.png', '/etc/b.png', '..\\b.png', 'C:\\b.png', 'c:b.png',
             '\\\\host\\b.png', 'file:///b.png', '..', '/'],
)  # fmt: skip
@pytest.mark.parametrize('make', [via_tree, coco_tree, labelme_tree])
def test_a_picture_name_reads_and_writes_nowhere_else(tmp_path, make, name):
    images = tmp_path / 'data' / 'images'
    images.mkdir(parents=True)
    Image.fromarray(GREY).save(images / 'a.png')
    Image.fromarray(GREY).save(tmp_path / 'data' / 'b.png')  # what '../' leads to
    path = write_json(tmp_path / 'a.json', make(name))
    before = tree(tmp_path)
    told = refusal(via.write_masks, path, images, tmp_path / 'data' / 'masks')
    assert 'lacks 1 picture of the annotations' in told or 'write the name of the file' in told
    assert tree(tmp_path) == before


@pytest.mark.parametrize('value', ['NaN', 'Infinity', '1e999', '1e308', '-1e308', '9' * 400, '11'])
@pytest.mark.parametrize('make', [via_tree, coco_tree, labelme_tree])
def test_coordinates_that_are_none(tmp_path, make, value):
    """Where the tool's own numbers stand: one of them becomes the value."""
    plain = json.dumps(make('a.png'))
    at = plain.rindex('9')
    path = write_json(tmp_path / 'a.json', plain[:at] + value + plain[at + 1 :])
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(tmp_path / 'a.png')
    if value == '11':  # beyond the picture, which is clipped
        via.write_masks(path, tmp_path, tmp_path / 'out')
    else:
        refusal(via.write_masks, path, tmp_path, tmp_path / 'out')
    assert (tmp_path / 'out').exists() == (value == '11')


@pytest.mark.slow
def test_outlines_of_hundreds_of_thousands_of_points_end(tmp_path, rng):
    Image.fromarray(np.zeros((4000, 4000), np.uint8)).save(tmp_path / 'a.png')
    points = np.round(rng.random((300_000, 2)) * 4000).astype(int)
    tall = [[0, 0], [1, 4000]] * 150_000
    for outline in (points.tolist(), tall):
        path = write_json(tmp_path / 'a.json', labelme_tree('a.png', outline))
        assert 'times the limit' in refusal(via.write_masks, path, tmp_path, tmp_path / 'out')
    with pytest.raises(DataError, match='coordinates beyond'):
        outlines.rasterize([Shape('polygon', np.array([[0, 0], [np.nan, 1], [1, 1]]))], (9, 9))


def test_run_lengths_that_do_not_fit_are_refused_and_not_unpacked(tmp_path):
    """Among them texts that end within a number, after which pycocotools reads on."""
    texts = ('PYn0' * 10**5, 'o' * 10**5, '0P', 'o', '5o3', '\0', '~', '5\x7f', '\u0665', '')
    for counts in ([5, 3], [2**62], [-1, 9], [4.5, 4.5], [True] * 9, [0] * 10**6, None, *texts):
        for size in ([3, 3], [2**31, 2**31], [-1, 5], [3], [0, 0], None):
            tree = coco_tree('a.png', {'counts': counts, 'size': size})
            refusal(read_annotations, write_json(tmp_path / 'a.json', tree))
    huge = {'counts': [2**31], 'size': [2**15, 2**16 - 1]}
    told = refusal(read_annotations, write_json(tmp_path / 'a.json', coco_tree('a.png', huge)))
    assert 'not height and width' in told


@pytest.mark.parametrize(
    'mask', [None, 7, '', '!', 'AAAA', 'A' * 4_000_000, 'png of other size', 'bomb', 'colour']
)
def test_masks_of_labelme_that_are_no_picture_are_refused(tmp_path, mask):
    def png(pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, 'png')
        return base64.b64encode(buffer.getvalue()).decode()

    corners = ((2, 2), (8, 6))
    if mask == 'png of other size':
        mask = png(np.ones((5, 12), np.uint8))
    if mask == 'colour':
        mask = png(np.ones((5, 7, 3), np.uint8))
    if mask == 'bomb':
        mask, corners = png(np.ones((8000, 8000), bool)), ((0, 0), (65000, 65000))
    tree = labelme_tree('a.png', corners)
    tree['shapes'][0] |= {'shape_type': 'mask', 'mask': mask}
    told = refusal(read_annotations, write_json(tmp_path / 'a.json', tree))
    assert "'a.png', region 1: its mask is" in told
    assert len(told) < 500


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@st.composite
def changed(draw, trees):
    """One of the trees with a value anywhere in it replaced."""
    root = [json.loads(json.dumps(draw(st.sampled_from(trees))))]
    places = [(root, 0)]
    for node, key in places:
        child = node[key]
        if isinstance(child, list | dict):
            places += [
                (child, k) for k in (child if isinstance(child, dict) else range(len(child)))
            ]
    node, key = draw(st.sampled_from(places))
    node[key] = draw(json_values)
    return root[0]


@pytest.mark.stress
@quick
@given(tree=changed([via_tree('a.png'), coco_tree('a.png'), labelme_tree('a.png')]))
def test_any_value_anywhere_in_annotations(tmp_path_factory, tree):
    root = tmp_path_factory.getbasetemp() / 'any'
    root.mkdir(exist_ok=True)
    Image.fromarray(GREY).save(root / 'a.png')
    path = write_json(root / 'a.json', tree)
    kind, wrong = fuzz.attempt(lambda path: via.write_masks(path, root, root / 'out'), path)
    assert kind in ('accepted', 'refused'), wrong
    assert {path.name for path in root.iterdir()} <= {'a.png', 'a.json', 'out'}


# Splits and tables.


@pytest.mark.stress
@quick
@given(tree=changed([{'train': ['a'], 'validation': [], 'test': ['b'], 'fingerprint': 'x'}]))
def test_any_value_anywhere_in_a_split(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / 'splits.json'
    refusal(splits.read, write_json(path, tree), SLICES)


@pytest.mark.stress
@quick
@given(st.binary(max_size=60) | st.text(alphabet='stem,patient\n"\0\r ab').map(str.encode))
def test_any_table(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / 'table.csv'
    path.write_bytes(b'stem,patient\n' + content)
    kind, wrong = fuzz.attempt(lambda path: folder.group_stems(['a', 'b'], str(path)), path)
    assert kind in ('accepted', 'refused'), wrong


@pytest.mark.parametrize('patient', ['../x', '/x', 'a\\b', '.x', 'a\x07b', 'x' * 300])
def test_a_patient_is_a_file_name(tmp_path, patient):
    (tmp_path / 'p.csv').write_text(f'stem,patient\na,{patient}\n')
    _, faults = folder.group_stems(['a'], str(tmp_path / 'p.csv'))
    assert len(faults) == 1
    assert 'can not be a file name' in faults[0]


TEXTS = {
    'deep list': ('[' * 10**6, 'nested too deeply'),
    'deep object': ('{"a":' * 10**6, 'nested too deeply'),
    'nan': ('{"a": NaN}', 'NaN is not a number'),
    'huge integer': ('9' * 10**6, 'not readable as JSON'),
    'twice': ('{"a\\nb": 1, "a\\nb": 2}', 'is there twice'),
    'not UTF-8': (b'\xff\xfe{}', 'not UTF-8'),
    'large': (b'[' + b' ' * 2**26 + b']', 'larger than 64 MiB'),
}


@pytest.mark.parametrize('kind', TEXTS)
def test_text_that_is_no_json(tmp_path, kind):
    content, message = TEXTS[kind]
    path = tmp_path / 'a.json'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal(text.read_json, path)
    assert message in refusal(splits.read, path, SLICES)
    assert message in refusal(read_annotations, path)


# Data sets and videos.


def test_a_number_of_billions_is_a_gap_and_no_list_of_billions(tmp_path):
    case = write_case(tmp_path / 'kaggle_3m', 'TCGA_CS_4941_19960909', slices=2)
    for ending in ('.tif', '_mask.tif'):
        (case / f'{case.name}_2{ending}').rename(case / f'{case.name}_{10**18}{ending}')
    told = refusal(lgg.check, tmp_path)
    assert f'lacks slices [2 to {10**18 - 1}]' in told


@pytest.mark.skipif(not has('av'), reason='av is not installed')
@pytest.mark.parametrize('kind', ['hls', 'concat'])
def test_a_video_is_no_list_of_other_files(tmp_path, kind):
    """FFmpeg goes by the content, so it would open what the list names; ours does not."""
    from fractions import Fraction

    import av

    with video.writing(tmp_path / 'secret.mp4', Fraction(25), exact=False) as write:
        write(np.zeros((16, 16, 3), np.uint8))
    lists = {
        'hls': '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n',
        'concat': 'ffconcat version 1.0\nfile secret.mp4\n',
    }
    bait = tmp_path / 'bait.mp4'
    bait.write_text(lists[kind])
    if kind == 'concat':
        with av.open(str(bait)) as container:
            assert container.streams.video
    assert 'not a readable video' in refusal(video.reading(bait).__enter__)
    with video.reading(tmp_path / 'secret.mp4') as (_, _, frames):
        assert len(list(frames)) == 1
