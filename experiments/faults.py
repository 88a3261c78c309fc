"""Each fault that a run must survive: the tests that make it, run, and a line a fault.

  python -m experiments.faults [--match=WORDS]

A line of experiments/results/reliability.jsonl says how often the fault was tried, what was lost,
and the command that repeats it. Kills have a script of their own, experiments/chaos.py.
"""

import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from absl import app, flags

from experiments.provenance import commit, device


class Fault(NamedTuple):
    """`tests` are FILE::TEST without their 'test_'; `tries` how often all of them make it."""

    fault: str
    tests: Sequence[str]
    tries: int

    def names(self) -> list[str]:
        """Of the tests, as pytest has them."""
        pairs = (test.split('::') for test in self.tests)
        return [f'tests/test_{file}.py::test_{name}' for file, name in pairs]


DAMAGE = 'checkpoint::damage_is_passed_over_and_nothing_is_deleted'
FAULTS = (
    Fault('SIGKILL during compilation, a save, a validation',
          ['chaos::three_kills_change_nothing'], 3),
    Fault('SIGTERM, SIGINT',
          ['faults::a_signal_ends_the_run_behind_a_checkpoint_and_it_goes_on_to_the_bit'], 2),
    Fault('half an entry in the compilation cache',
          ['chaos::half_an_entry_of_the_compilation_cache_is_replaced'], 2),
    Fault('a flipped byte in a checkpoint',
          ['faults::no_flipped_byte_is_loaded_in_silence',
           'checkpoint::a_flipped_byte_is_noticed'], 203),
    Fault('a truncated file in a checkpoint, then in all', [f'{DAMAGE}[truncate]'], 2),
    Fault('a missing file in a checkpoint, then in all', [f'{DAMAGE}[lose_a_file]'], 2),
    Fault('a half-deleted checkpoint, then all', [f'{DAMAGE}[half_delete]'], 2),
    Fault('a checkpoint without its metadata, then all', [f'{DAMAGE}[lose_the_metadata]'], 2),
    Fault('a forged config in a checkpoint, then in all', [f'{DAMAGE}[forge_the_config]'], 2),
    Fault('metadata of another run or network',
          ['checkpoint::metadata_of_another_run_does_not_vouch_for_these_arrays'], 2),
    Fault('an empty newer step, a damaged newer step',
          ['checkpoint::an_empty_newer_step_is_passed_over',
           'faults::a_damaged_newer_step_is_set_aside_and_saved_again'], 3),
    Fault('a disk that is full or read-only at a checkpoint',
          ['disk::a_disk_that_is_full_when_a_checkpoint_is_saved',
           'disk::a_read_only_folder_of_checkpoints'], 2),
    Fault('a disk that is full or read-only at the start',
          ['disk::a_run_on_such_a_disk_does_not_start'], 2),
    Fault('a disk that is full or read-only at the metrics',
          ['disk::metrics_end_in_a_whole_line_and_go_on',
           'disk::half_a_line_is_taken_back',
           'disk::metrics_on_a_read_only_disk'], 3),
    Fault('a disk that is full or read-only at reports',
          ['disk::reports_of_before_stay'], 2),
    Fault('a disk that is full or read-only at predictions',
          ['disk::predictions_of_before_stay_and_the_rest_is_done_later',
           'disk::a_video_is_there_whole_or_not_at_all'], 4),
    Fault('a disk that is full or read-only at an export',
          ['disk::an_export_of_before_stays'], 2),
    Fault('two runs on one folder', ['faults::two_runs_on_one_folder'], 2),
    Fault('the lock of a run that was killed',
          ['faults::the_lock_of_a_run_that_was_killed_is_no_hindrance'], 1),
    Fault('a loss that is no number, stopped at',
          ['train::a_loss_that_is_no_number_stops_the_run'], 1),
    Fault('a loss that is no number, skipped',
          ['faults::an_update_of_no_number_is_skipped_and_counted'], 2),
    Fault('a slice that can not be read, stopped at and passed over',
          ['faults::a_slice_that_can_not_be_read_gives_way_to_the_next_and_is_listed'], 5),
    Fault('SIGTERM to one of two hosts, then SIGKILL to one',
          ['hosts::a_signal_to_one_process_stops_all_behind_the_same_checkpoint',
           'hosts::where_one_process_is_killed_the_others_say_so_and_stop',
           'hosts::started_again_the_run_ends_as_in_one_process'], 2),
    Fault('memory of the device exhausted',
          ['faults::exhausted_memory_is_explained'], 1),
)  # fmt: skip


def outcomes(path: Path) -> dict[str, tuple[bool | None, float]]:
    """{test: (passed, seconds)} of a report in JUnit's format; None for one that was skipped."""
    found = {}
    for case in ElementTree.parse(path).getroot().iter('testcase'):
        kinds = {child.tag for child in case}
        passed = None if 'skipped' in kinds else not kinds & {'failure', 'error'}
        name = f'{case.get("classname").replace(".", "/")}.py::{case.get("name")}'
        found[name] = passed, float(case.get('time'))
    return found


def lines(
    faults: Sequence[Fault], found: dict[str, tuple[bool | None, float]]
) -> list[dict[str, object]]:
    """A line a fault, for those of which every test was run."""
    made = []
    for fault in faults:
        results = {
            name: result
            for name, result in found.items()
            if any(name == test or name.startswith(f'{test}[') for test in fault.names())
        }
        if not results or any(passed is None for passed, _ in results.values()):
            print(f'not tried: {fault.fault}')
            continue
        failed = [name for name, (passed, _) in results.items() if not passed]
        made.append(
            {
                'fault': fault.fault,
                'tries': fault.tries,
                'lost': ', '.join(failed) or 'nothing',
                'command': f'python -m pytest -n 0 {" ".join(fault.names())}',
                'seconds': round(sum(seconds for _, seconds in results.values()), 1),
            }
        )
    return made


def main(_: Sequence[str]) -> None:
    made_by, start = commit(), time.time()
    chosen = [fault for fault in FAULTS if flags.FLAGS.match in fault.fault]
    tests = sorted({test for fault in chosen for test in fault.names()})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        command = [sys.executable, '-m', 'pytest', '-q', '-n', '0', f'--junitxml={report}', *tests]
        subprocess.run(command, check=False)
        made = lines(chosen, outcomes(report))
    about = {'commit': made_by, 'seed': 0, 'device': device(), 'versions': {'jax': jax.__version__}}
    path, names = Path('experiments/results/reliability.jsonl'), [f.fault for f in FAULTS]
    kept = path.read_text().splitlines() if path.exists() else []
    newest = {line['fault']: line for line in map(json.loads, kept)}
    newest |= {line['fault']: line | about for line in made}
    ordered = [newest[name] for name in names if name in newest]
    path.write_text(''.join(f'{json.dumps(line)}\n' for line in ordered))
    lost = [line['fault'] for line in made if line['lost'] != 'nothing']
    print(f'{len(made)} faults in {time.time() - start:.0f} s, lost: {lost or "nothing"}')
    sys.exit(bool(lost))


def define_flags() -> None:
    flags.DEFINE_string('match', '', 'only faults in whose name this is; other lines stay')


if __name__ == '__main__':
    define_flags()
    app.run(main)
