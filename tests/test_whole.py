"""From pictures and masks of every kind to a model, masks, a report and an export, by command
line; and every bad input, which is one line and leaves nothing.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.data import formats
from pspnet_jax.data.formats import video
from pspnet_jax.prediction import manifest
from pspnet_jax.runtime import checkpoint
from pspnet_jax.serving import export, read
from tests import test_via as drawn
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SIZE = (40, 48)
TINY = (
    '--config.model.width=4', '--config.train.steps=2',
    '--config.train.validate_every=2', '--config.train.batch_size=2',
    '--config.optim.warmup_steps=1', '--config.eval.bootstrap=20', '--config.eval.batch_size=4',
    '--config.data.test_fraction=0.25',
)  # fmt: skip


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def run(module, *arguments, largest=None):
    """The command; with `largest` no file can grow beyond so many bytes, as on a full disk."""
    limit = ['-c', LIMITED, str(largest)] if largest else []
    done = subprocess.run(
        [sys.executable, *limit, '-m', f'pspnet_jax.{module}', *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert 'Traceback' not in done.stderr
    return done


def ok(module, *arguments):
    done = run(module, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def boxes():
    """{stem: a rectangle with whole corners}, of ten pictures."""
    rng = np.random.default_rng(0)
    corner = rng.integers(2, 20, (10, 2))
    return {f'p{n}': ((x, y), (x + 14, y + 12)) for n, (x, y) in enumerate(corner.tolist())}


def pixels(box):
    """(image H W 3, mask H W) of noise with a bright rectangle."""
    ((x0, y0), (x1, y1)) = box
    mask = np.zeros(SIZE, np.uint8)
    mask[y0:y1, x0:x1] = 1
    image = np.random.default_rng(x0).integers(0, 120, (*SIZE, 3), np.uint8)
    return image + mask[..., None] * 100, mask


def write_pictures(root):
    """root/images, and the same masks as annotations of each tool and as pictures of each kind.

    {name of the kind: options of the config that lead to it}
    """
    drawing = {
        f'{stem}.png': [('rect', box, 'tumor')] if n % 2 else [('polygon', corners, 'tumor')]
        for n, (stem, box) in enumerate(boxes().items())
        for corners in [drawn.corners('rect', box)]
    }
    for name in ('images', 'binary', 'palette', 'colours'):
        (root / name).mkdir(parents=True)
    for stem, box in boxes().items():
        image, mask = pixels(box)
        Image.fromarray(image).save(root / 'images' / f'{stem}.png')
        Image.fromarray(mask * 255).save(root / 'binary' / f'{stem}.png')
        indexed = Image.fromarray(mask, 'P')
        indexed.putpalette([0, 0, 0, 200, 30, 60])
        indexed.save(root / 'palette' / f'{stem}.png')
        table = np.array([[0, 0, 0], [255, 0, 0]], np.uint8)
        Image.fromarray(table[mask]).save(root / 'colours' / f'{stem}.bmp')
    coco = drawn.coco(drawing)
    for picture in coco['images']:
        picture['height'], picture['width'] = SIZE
    drawn.write(root / 'via_1.json', drawn.via_export(1, drawing))
    drawn.write(root / 'via_2.json', drawn.via_project(drawing))
    drawn.write(root / 'via.csv', drawn.via_csv(drawing))
    drawn.write(root / 'coco.json', coco)
    for name, shapes in drawing.items():
        tree = drawn.labelme(name, shapes) | {'imageHeight': SIZE[0], 'imageWidth': SIZE[1]}
        drawn.write(root / 'labelme' / f'{name[:-4]}.json', tree)
    via = '--config.data.attribute=type'
    return {
        'binary': ['binary'],
        'palette': ['palette'],
        'colours': ['colours', '--config.data.mask_colors=("#000000", "#ff0000")'],
        'VIA 1': ['via_1.json', via],
        'VIA 2': ['via_2.json', via],
        'VIA CSV': ['via.csv', via],
        # Its categories are two, of which one is drawn.
        'COCO': ['coco.json', "--config.model.class_names=('background', 'tumor')"],
        'labelme': ['labelme'],
    }


def figures(workdir):
    """The rows of a run's evaluation, with the figures of the classes in their order."""
    rows = json.loads((workdir / 'evaluation.json').read_text())['patients']
    return [row | {'classes': list(row['classes'].values())} for row in rows]


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """(folder, options of each kind of masks, the run on the first kind)."""
    root = tmp_path_factory.mktemp('own')
    kinds = write_pictures(root)
    train(root, kinds['binary'], root / 'run')
    return root, kinds, root / 'run'


def train(root, masks, workdir):
    name, *options = masks
    return ok(
        'main', '--config=configs/folder.py:unet_mini', f'--config.data.source={root}',
        f'--config.data.masks={name}', *options, *TINY, f'--workdir={workdir}',
    )  # fmt: skip


def test_pictures_go_through_every_command(own):
    root, _, workdir = own
    for name in ('curves.png', 'report.html', 'metrics.jsonl', 'splits.json'):
        assert (workdir / name).stat().st_size
    before = figures(workdir)
    (workdir / 'report.html').unlink()
    ok('evaluate', f'--workdir={workdir}')
    assert figures(workdir) == before
    assert (workdir / 'report.html').stat().st_size
    ok('predict', f'--workdir={workdir}', f'--input={root / "images"}', f'--output={root / "out"}')
    for stem in boxes():
        mask = Image.open(root / 'out' / f'{stem}_mask.png')
        assert mask.size == SIZE[::-1]
        assert Image.open(root / 'out' / f'{stem}_overlay.png').mode == 'RGB'
    for fmt in ('stablehlo', 'savedparams'):
        ok('export', f'--workdir={workdir}', f'--format={fmt}', '--size=40,48')
        served, _ = read.read(workdir / export.FILES[fmt])
        image, _ = pixels(boxes()['p3'])
        labels = served(image[None])[0].argmax(-1)
        mask = np.array(Image.open(root / 'out' / 'p3_mask.png')) > 0
        assert (labels == mask).mean() > 0.999  # a value in the middle may round otherwise


@pytest.mark.parametrize(
    'kind', ['palette', 'colours', 'VIA 1', 'VIA 2', 'VIA CSV', 'COCO', 'labelme']
)
def test_the_same_masks_of_another_kind_give_the_same_run(own, tmp_path, kind):
    root, kinds, workdir = own
    train(root, kinds[kind], tmp_path / 'run')
    assert figures(tmp_path / 'run') == figures(workdir)
    ours, theirs = (checkpoint.metadata(run, 2)['sha256'] for run in (tmp_path / 'run', workdir))
    assert ours == theirs  # so that all that is predicted and exported is the same
    assert (tmp_path / 'run' / 'report.html').stat().st_size


def test_a_video_goes_through_the_network(own, tmp_path):
    pytest.importorskip('av', reason='videos are read and written by PyAV')
    _, _, workdir = own
    with video.writing(tmp_path / 'film.mp4', 25, exact=False) as write:
        for box in boxes().values():
            write(pixels(box)[0])
    told = ok('predict', f'--workdir={workdir}', f'--input={tmp_path / "film.mp4"}',
              f'--output={tmp_path / "out"}')  # fmt: skip
    assert '10 frames at 25 per second' in told
    with video.reading(tmp_path / 'out' / 'film_overlay.mp4') as (rate, count, frames):
        assert (rate, count) == (25, 10)
        assert {frame.shape for frame in frames} == {(*SIZE, 3)}


def whole_chain(root, tmp_path, ending):
    """Train, evaluate, predict, export; the folder of predictions."""
    workdir, out = tmp_path / 'run', tmp_path / 'out'
    train(root, ['masks'], workdir)
    ok('evaluate', f'--workdir={workdir}')
    assert (workdir / 'report.html').stat().st_size
    assert figures(workdir)
    ok('predict', f'--workdir={workdir}', f'--input={root / "images"}', f'--output={out}')
    assert len(list(out.glob(f'*_mask{ending}'))) == len(list((root / 'images').iterdir()))
    ok('export', f'--workdir={workdir}', '--format=onnx', '--size=40,48')
    return out


def test_grey_pictures_of_16_bits(tmp_path):
    root = tmp_path / 'own'
    for name in ('images', 'masks'):
        (root / name).mkdir(parents=True)
    for stem, box in list(boxes().items())[:6]:
        image, mask = pixels(box)
        Image.fromarray(image[..., 0].astype(np.uint16) * 200).save(root / f'images/{stem}.tif')
        Image.fromarray(mask).save(root / f'masks/{stem}.png')
    out = whole_chain(root, tmp_path, '.png')
    assert np.array(Image.open(out / 'p0_mask.png')).shape == SIZE


def test_volumes_of_any_orientation(tmp_path):
    nibabel = pytest.importorskip('nibabel', reason='NIfTI is read by nibabel')
    root = tmp_path / 'own'
    for name in ('images', 'masks'):
        (root / name).mkdir(parents=True)
    for codes, (stem, box) in zip(('RAS', 'LPI', 'PSR', 'IRA'), boxes().items(), strict=False):
        image, mask = pixels(box)
        axial = nibabel.orientations.axcodes2ornt('LPS')  # columns, rows, slices
        turn = nibabel.orientations.ornt_transform(axial, nibabel.orientations.axcodes2ornt(codes))
        for name, values in (('images', image[..., 0]), ('masks', mask)):
            stacked = np.stack([values, values], axis=-1).swapaxes(0, 1)
            volume = nibabel.Nifti1Image(stacked, np.diag([-1.0, -2.0, 3.0, 1.0]))
            volume = volume.as_reoriented(turn)
            assert ''.join(nibabel.aff2axcodes(volume.affine)) == codes
            nibabel.save(volume, root / name / f'{stem}.nii.gz')
    out = whole_chain(root, tmp_path, '.nii.gz')
    for path in sorted((root / 'images').iterdir()):
        image, mask = (
            nibabel.load(p) for p in (path, out / path.name.replace('.nii', '_mask.nii'))
        )
        assert mask.shape == image.shape
        np.testing.assert_array_equal(mask.affine, image.affine)
        assert np.array_equal(formats.read_labels(mask.get_filename()).shape, (2, *SIZE))


# Bad input: one line, and nothing but what was there.


def snapshot(*folders):
    return {
        path: path.read_bytes() for root in folders for path in root.rglob('*') if path.is_file()
    }


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / 'own'
    write_pictures(root)
    (root / 'binary').rename(root / 'masks')
    return root


def truncated(root):
    path = root / 'images/p1.png'
    path.write_bytes(path.read_bytes()[:200])
    return 'p1.png is not a readable picture'


def no_image(root):
    (root / 'images/p1.png').unlink()
    return 'p1.png has no image: add it or remove the mask'


def no_mask(root):
    (root / 'masks/p1.png').unlink()
    return 'p1.png has no mask: add'


def other_size(root):
    Image.new('L', (30, 30)).save(root / 'masks/p1.png')
    return 'p1.png have different sizes'


def unknown_label(root):
    Image.fromarray(np.full(SIZE, 7, np.uint8)).save(root / 'masks/p1.png')
    return '--config.data.label_map="{0: 0, 7: 1, 255: 2}"'


def only_images(root):
    nibabel = pytest.importorskip('nibabel', reason='NIfTI is read by nibabel')
    for path in (root / 'images').iterdir():
        path.unlink()
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.eye(4)),
                 root / 'images/scan.nii.gz')  # fmt: skip
    return 'scan.nii.gz has no mask: add'


@pytest.mark.parametrize(
    'damage', [truncated, no_image, no_mask, other_size, unknown_label, only_images]
)
def test_a_bad_data_set_is_refused_before_a_run_begins(pictures, tmp_path, damage):
    words = damage(pictures)
    before = snapshot(tmp_path)
    done = run('main', '--config=configs/folder.py', f'--config.data.source={pictures}',
               '--config.model.pretrained=', f'--workdir={tmp_path / "run"}')  # fmt: skip
    assert done.returncode == 1
    assert words in done.stderr
    assert snapshot(tmp_path) == before


def shape(**changes):
    square = {'name': 'polygon', 'all_points_x': [4, 14, 14, 4], 'all_points_y': [4, 4, 14, 14]}
    return [{'shape_attributes': square | changes, 'region_attributes': {}}]


@pytest.mark.parametrize(
    ('name', 'regions', 'words'),
    [
        ('p1.png', shape(all_points_x=[400, 500, 500, 400]), 'outside'),
        ('p1.png', shape(all_points_x=[4, 4, 4, 4]), 'no area'),
        ('../q1.png', shape(), 'lacks 1 picture'),
        ('/etc/passwd', shape(), 'lacks 1 picture'),
        ('C:\\q1.png', shape(), 'lacks 1 picture'),
    ],
)
def test_a_bad_drawing_is_one_line_and_no_mask(pictures, tmp_path, name, regions, words):
    drawn.write(tmp_path / 'via.json', {'x1': {'filename': name, 'size': 1, 'regions': regions}})
    before = snapshot(tmp_path)
    done = run('rasterize', f'--annotations={tmp_path / "via.json"}',
               f'--images={pictures / "images"}', f'--out={tmp_path / "masks"}')  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert done.returncode == 1
    assert len(errors) == 1
    assert words in errors[0]
    assert snapshot(tmp_path) == before


def test_an_outline_that_crosses_itself_is_named_and_taken(pictures, tmp_path):
    regions = shape(all_points_x=[4, 14, 4, 14])
    drawn.write(
        tmp_path / 'via.json', {'x1': {'filename': 'p1.png', 'size': 1, 'regions': regions}}
    )
    told = ok('rasterize', f'--annotations={tmp_path / "via.json"}',
              f'--images={pictures / "images"}', f'--out={tmp_path / "masks"}')  # fmt: skip
    assert (
        "'p1.png', region 1 crosses itself: areas that it encloses twice are outside; draw" in told
    )
    assert (tmp_path / 'masks' / 'p1.png').exists()


def test_a_film_of_no_frames_is_one_line(own, tmp_path):
    av = pytest.importorskip('av', reason='videos are read and written by PyAV')
    with av.open(tmp_path / 'film.avi', 'w') as container:  # a header alone
        stream = container.add_stream('mjpeg', rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 40, 'yuvj420p'
        container.start_encoding()
    done = run('predict', f'--workdir={own[2]}', f'--input={tmp_path / "film.avi"}',
               f'--output={tmp_path / "out"}')  # fmt: skip
    assert done.returncode == 1
    assert 'film.avi has no frame that can be read: record or export it again' in done.stderr
    assert [path.name for path in snapshot(tmp_path / 'out')] == [manifest.NAME]


@pytest.mark.parametrize('command', ['evaluate', 'predict', 'export', 'check', 'via'])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(own, tmp_path, command):
    root, _, run_of_all = own
    workdir = shutil.copytree(run_of_all, tmp_path / 'run')
    call = {
        'evaluate': ('evaluate', f'--workdir={workdir}'),
        'predict': ('predict', f'--workdir={workdir}', f'--input={root / "images"}',
                    f'--output={tmp_path / "out"}', '--save=overlay'),
        'export': ('export', f'--workdir={workdir}', '--format=savedparams',
                   f'--output={tmp_path / "out" / "model.safetensors"}'),
        'check': ('check', '--config=configs/folder.py', f'--config.data.source={root}',
                  '--config.data.masks=binary', f'--out={tmp_path / "out"}'),
        'via': ('rasterize', f'--annotations={root / "coco.json"}',
                f'--images={root / "images"}', f'--out={tmp_path / "out"}'),
    }[command]  # fmt: skip
    before = snapshot(tmp_path)
    done = run(*call, largest=60)
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert done.returncode == 1
    assert len(errors) == 1
    assert 'can not be written (File too large): free some space' in errors[0]
    after = snapshot(tmp_path)
    assert {path: x for path, x in after.items() if path.name != manifest.NAME} == before
