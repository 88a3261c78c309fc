"""The commands as a person types them: one clear line and exit status 1."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from pspnet_jax import cli
from pspnet_jax.config import CHANGEABLE, base, flatten, with_prediction
from pspnet_jax.config.flags import define_prediction_flags, prediction_changes
from pspnet_jax.runtime.errors import ConfigError
from tests.conftest import ROOT, slow_but, write_case


def run(module, *arguments):
    return subprocess.run(
        [sys.executable, '-m', f'pspnet_jax.{module}', *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


PHANTOM, TWO_SLICES = '--config=configs/phantom.py', '--config.train.batch_size=2'
FEW = ['--config.phantom.volumes=6', '--config.phantom.slices=4']  # made in no time


BAD = [
    ('main', [], '--config is missing'),
    ('main', ['--config=nowhere.py'], '--config=nowhere.py is not a file'),
    ('main', [PHANTOM, '--config.model.bacbone=vgg16'], 'did you mean model.backbone?'),
    ('main', [PHANTOM, '--config.model.width=wide'], 'must be a whole number of at least 4'),
    ('main', [PHANTOM, '--config.model.output_stride=12'], 'one of 4, 8, 16, 32'),
    ('main', ['--config=configs/lgg.py:segnext'], "model.name is 'segnext': it must be one of"),
    ('main', [f'{PHANTOM}:,loud'], "augmentation 'loud' is not one of none, flips"),
    ('main', ['--config=configs/lgg.py', '--config.data.source=/no'], '/no is not a folder'),
    ('evaluate', ['--workdir=/no'], '/no holds no checkpoint'),
    ('predict', ['--workdir=/no', '--input=/no', '--output=x'], '/no is neither a file nor'),
    (
        'predict',
        ['--workdir=/no', '--input=/no', '--output=x', '--save=maks'],
        '--save=maks is not known: give some of mask,probability',
    ),
    (
        'predict',
        ['--workdir=/no', '--input=/no', '--output=x', '--scales=1,two'],
        'flag --scales=1,two: predict.scales must be a tuple of at least 1 values',
    ),
    ('export', ['--workdir=/no', '--format=onnx'], '/no holds no checkpoint'),
    ('export', ['--workdir=/no', '--format=onnx', '--size=9'], '--size=9 is not HEIGHT,WIDTH'),
    ('build', ['--source=/no'], '/no is not a folder: download https://www.kaggle.com'),
    ('main', [PHANTOM, '--config.train.steps=None'], '--config.train.steps can not be None'),
    (
        'main',
        [PHANTOM, '--config.augment.crop=500', *FEW],
        'is larger than the slices, which are 128',
    ),
    (
        'main',
        [PHANTOM, '--config.augment.channel_dropout=1', '--config.augment.kept_channel=3', *FEW],
        'augment.kept_channel=3 is not a channel of the images, which have',
    ),
    ('main', ['--config', 'nowhere.py'], '--config=nowhere.py is not a file'),
    (
        'main',
        [PHANTOM, '--config.train.steps=0', '--config.train.epochs=0.001', *FEW],
        'are 0 steps',
    ),
    (
        'main',
        [PHANTOM, '--config.parallel=pmap', '--config.train.accumulate=8', TWO_SLICES],
        'train.batch_size 2 is not a multiple of train.accumulate 8',
    ),
    ('evaluate', ['--workdir=gs://bucket/run'], 'is an address (gs://...), not a local folder'),
    ('evaluate', ['--workdir=~nobody-of-that-name/run'], 'give the path without ~'),
]


@pytest.mark.parametrize(('module', 'arguments', 'words'), slow_but(BAD, *BAD[3::5]))
def test_bad_input_is_one_line_and_status_1(module, arguments, words, tmp_path):
    workdir = tmp_path / 'run'
    if module == 'main':
        arguments = [*arguments, f'--workdir={workdir}']
    done = run(module, *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert done.returncode == 1
    assert len(errors) == 1
    assert words in done.stderr
    assert 'Traceback' not in done.stderr
    assert not workdir.exists()


def parsed(monkeypatch, *arguments):
    """The config as a command sees it."""
    values = flags.FlagValues()
    monkeypatch.setattr('sys.argv', ['main', *arguments])
    monkeypatch.setattr('sys.path', [*sys.path])
    monkeypatch.setattr(cli.flags, 'FLAGS', values)
    config_flags.DEFINE_config_file('config', flag_values=values)
    assert cli._parse('', ['main', *arguments]) == ['main']
    return values.config


def test_none_and_lists_on_the_command_line(monkeypatch):
    config = parsed(
        monkeypatch, '--config', f'{ROOT}/configs/phantom.py', '--config.predict.threshold=0.3',
        '--config.predict.threshold=None', '--config.model.output_stride=None',
        '--config.data.images=a,b', '--config.model.class_names=("x, y", "z")',
        '--config.predict.scales=(0.5, 1.0)',
    )  # fmt: skip
    assert (config.predict.threshold, config.model.output_stride) == (None, None)
    assert config.data.images == ('a', 'b')
    assert config.model.class_names == ('x, y', 'z')
    assert config.predict.scales == (0.5, 1.0)


def changes(monkeypatch, *arguments, figures=True):
    """What `evaluate` or, without figures, `predict` change of a run's config."""
    monkeypatch.setattr(cli.flags, 'FLAGS', flags.FlagValues())
    define_prediction_flags(figures=figures)
    cli._parse('', ['evaluate', *arguments])
    return prediction_changes()


def test_evaluation_changes_memory_spacing_and_tolerance_of_a_runs_config(monkeypatch):
    given = {
        'predict.flip': ('False', False), 'predict.threshold': ('None', None),
        'predict.scales': ('1,1.5', (1.0, 1.5)), 'predict.window': ('64', 64),
        'crf.kernel': ('windowed', 'windowed'), 'crf.bilateral_sigma': ('7', 7.0),
        'eval.batch_size': ('2', 2), 'eval.spacing': ('(3, 0.5, 0.5)', (3.0, 0.5, 0.5)),
        'eval.surface_tolerance': ('2', 2.0), 'eval.lesion_dilation': ('1', 1),
        'eval.lesion_smallest': ('2', 2.0), 'eval.bootstrap': ('7', 7),
        'eval.calibration_bins': ('9', 9), 'data.threads': ('1', 1),
    }  # fmt: skip
    found = changes(monkeypatch, *(f'--config.{key}={text}' for key, (text, _) in given.items()))
    config = flatten(with_prediction(base.get_config(), found).to_dict())
    assert {key: config[key] for key in given} == {key: value for key, (_, value) in given.items()}
    usual = flatten(base.get_config().to_dict())
    assert {key for key in config if config[key] != usual[key]} <= given.keys()
    for key in given:
        assert type(config[key]) is type(given[key][1]), key
    assert changes(monkeypatch, '--noflip', '--window', '32') == {'flip': False, 'window': 32}
    assert changes(monkeypatch, '--config.crf.iterations', '3') == {'crf.iterations': 3}
    assert changes(monkeypatch) == {}


@pytest.mark.parametrize(
    ('argument', 'words'),
    [
        ('--config.model.width=4', 'model.width is fixed by training: you can change eval.batch'),
        (
            '--config.eval.checkpoint=last',
            'eval.checkpoint has its own flag: give --checkpoint',
        ),
        ('--config=lgg', '--config is fixed by training'),
        ('--config.eval.batchsize=4', 'eval.batchsize is not a key: did you mean eval.batch_size'),
        ('--config.eval.spacing=3,1', 'eval.spacing must be a tuple of 3 values'),
        ('--config.crf.kernel=None', "crf.kernel must be one of 'none'"),
        ('--config.eval.bootstrap=0', 'eval.bootstrap must be a whole number'),
        ('--threshold=2', 'predict.threshold must be None'),
    ],
)
def test_other_keys_and_values_are_refused_in_one_line(monkeypatch, capsys, argument, words):
    with pytest.raises(SystemExit) as ended:
        changes(monkeypatch, argument)
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert len(said.splitlines()) == 1
    assert words in said
    if 'fixed' in words:
        assert all(key in said for key in CHANGEABLE)


def test_prediction_takes_no_key_of_figures(monkeypatch, capsys):
    assert changes(monkeypatch, '--config.eval.batch_size=3', figures=False)
    with pytest.raises(SystemExit):
        changes(monkeypatch, '--config.eval.spacing=1,1,1', figures=False)
    assert 'eval.batch_size' in (said := capsys.readouterr().err)
    assert 'eval.bootstrap' not in said


def test_a_script_changes_the_same_keys_and_no_other():
    with pytest.raises(ConfigError, match=r'model\.width is fixed by training: you can change'):
        with_prediction(base.get_config(), {'model.width': 4})
    assert with_prediction(base.get_config(), {'flip': True, 'crf.window': 3}).crf.window == 3


def test_a_path_adds_no_line_to_the_log_and_steers_no_terminal():
    """Neither as text nor as path; what is no text, such as an error, escapes by itself."""
    name = 'a\n\x1b[2Jerror: forged'
    record = logging.LogRecord(
        'pspnet_jax.x', logging.INFO, 'x.py', 1, '%s is %s, %d', (name, Path(name), 3), None
    )
    assert cli._is_shown(record)
    assert record.getMessage().isprintable()
    assert record.getMessage().count('\\n\\x1b[2Jerror: forged') == 2


@pytest.mark.parametrize('module', ['evaluate', 'predict', 'export', 'main'])
def test_names_that_are_too_long_are_an_error_of_one_line(module, tmp_path):
    name = f'--workdir={tmp_path}/{"x" * 300}'
    more = {
        'predict': ['--input=configs', f'--output={tmp_path}/out'],
        'export': ['--format=onnx'],
        'main': [PHANTOM],
    }.get(module, [])
    done = run(module, name, *more)
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert (done.returncode, len(errors)) == (1, 1)
    assert 'File name too long' in errors[0]
    assert 'Traceback' not in done.stderr


def test_an_interrupt_is_one_line_and_status_130():
    code = 'import os, signal\nfrom pspnet_jax import cli\n'
    code += 'signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # none in background jobs
    code += 'cli.run(lambda: os.kill(os.getpid(), signal.SIGINT))'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == 'interrupted: the same command resumes'
    assert 'Traceback' not in done.stderr


def test_config_files_of_one_folder_import_each_other(monkeypatch, tmp_path):
    (tmp_path / 'common_part.py').write_text(
        'from pspnet_jax.config import phantom\nget = phantom.get_config'
    )
    (tmp_path / 'mine.py').write_text('import common_part\nget_config = common_part.get\n')
    assert parsed(monkeypatch, f'--config={tmp_path}/mine.py').data.name == 'phantom'


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('def get_config():\n    return 1 / 0\n', 'line 2: ZeroDivisionError: division by zero'),
        ('import no_such_module\n', "line 1: ModuleNotFoundError: No module named 'no_such_"),
        ('def get_config(:\n', 'SyntaxError'),
    ],
)
def test_an_error_in_ones_own_config_is_a_line_with_its_place(tmp_path, text, words):
    (tmp_path / 'mine.py').write_text(text)
    done = run('main', f'--config={tmp_path}/mine.py', f'--workdir={tmp_path}/run')
    (line,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert line.startswith(f'error: {tmp_path}/mine.py')
    assert words in line
    assert 'Traceback' not in done.stderr
    assert done.returncode == 1


def test_build_reports_every_fault_and_builds_nothing(tmp_path):
    folder = write_case(tmp_path / 'raw', 'TCGA_CS_4941_19960909')
    write_case(tmp_path / 'raw', 'TCGA_DU_5849_19950405')
    broken = folder / 'TCGA_CS_4941_19960909_2.tif'
    broken.write_bytes(broken.read_bytes()[:500])
    done = run('build', f'--source={tmp_path / "raw"}', f'--out={tmp_path / "built"}')
    assert done.returncode == 1
    assert f'{broken} is not a readable picture' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not list(tmp_path.rglob('*.array_record*'))


@pytest.mark.slow
def test_build_then_evaluate_then_predict(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / 'run')
    for patient in ('TCGA_CS_4941_19960909', 'TCGA_DU_5849_19950405'):
        write_case(tmp_path / 'raw', patient, slices=2)
    done = run('build', f'--source={tmp_path / "raw"}', f'--out={tmp_path / "built"}')
    assert done.returncode == 0, done.stderr
    assert 'train: 2 slices' in done.stdout
    done = run('evaluate', f'--workdir={workdir}', '--split=validation')
    assert done.returncode == 0, done.stderr
    assert 'per-volume Dice' in done.stdout
    assert 'all background' in done.stdout
    done = run(
        'predict', f'--workdir={workdir}', f'--input={tmp_path / "raw"}',
        f'--output={tmp_path / "out"}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / 'out').rglob('*_mask.png'))) == 4
    (tmp_path / 'raw' / 'bad.png').write_bytes(b'no picture')
    three = [
        f'--workdir={workdir},{workdir}', f'--workdir={workdir}', '--flip', '--window=128',
        f'--output={tmp_path / "three"}',
    ]  # fmt: skip
    done = run('predict', *three, '--save=mask,outline', f'--input={tmp_path / "raw"}')
    assert done.returncode == 1
    assert 'error: 1 file(s) failed:' in done.stderr
    assert 'bad.png is not a readable picture' in done.stderr
    assert 'Traceback' not in done.stderr
    assert len(list((tmp_path / 'three').rglob('*_outline.png'))) == 4
    done = run('predict', *three, '--save=outline', f'--input={tmp_path}/raw/*/*_1.tif')
    assert done.returncode == 0, done.stderr
    assert '2 file(s) were finished before' in done.stdout


def test_a_config_of_the_package_is_named_without_a_path(monkeypatch, tmp_path):
    """From any folder, as an installed package is used; a file of that name goes before it."""
    monkeypatch.chdir(tmp_path)
    assert parsed(monkeypatch, '--config=phantom').data.name == 'phantom'
    assert parsed(monkeypatch, '--config=folder:unet,strong').model.name == 'unet'
    assert parsed(monkeypatch, '--config', 'lgg').data.name == 'lgg'
    own = 'from pspnet_jax.config import phantom as p; get_config = p.get_config'
    (tmp_path / 'lgg').write_text(own)
    assert parsed(monkeypatch, '--config=lgg').data.name == 'phantom'


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_help_shows_the_commands_own_flags_and_ends_well(name, tmp_path):
    """As a console script starts it, from any folder."""
    code = f'import sys; sys.argv = ["pspnet", "{name}", "--help"]\n'
    code += 'from pspnet_jax.cli import pspnet; pspnet()'
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    flag = {
        'train': 'workdir', 'check': 'out', 'convert': 'source', 'build': 'source',
        'rasterize': 'annotations',
    }.get(name, 'checkpoint')  # fmt: skip
    assert f'\n  --{flag}' in done.stdout
    assert 'python -m pspnet_jax.' in done.stdout
    assert not any(theirs in done.stdout for theirs in ('--alsologtostderr', 'grain', 'pdb'))
    assert ('--config.KEY=VALUE' in done.stdout) == (name in ('train', 'check', 'convert'))
    assert ('--threshold' in done.stdout) == (name in ('evaluate', 'predict'))


def test_the_console_script_lists_its_commands_and_refuses_others(capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['pspnet'])
    cli.pspnet()
    told = capsys.readouterr().out
    assert all(f'  {name:10}{words}\n' in told for name, (_, words) in cli.COMMANDS.items())
    monkeypatch.setattr('sys.argv', ['pspnet', 'trian'])
    with pytest.raises(SystemExit, match='1'):
        cli.pspnet()
    assert 'pspnet trian is not a command: give one of train, build' in capsys.readouterr().err
