"""Each fault that a run must survive: the tests that make it, run, and a line a fault.

  python -m tests.stress.faults [--match=EXPRESSION]

A line of experiments/results/reliability.jsonl says how often the fault was tried, what was lost,
and the command that repeats it. Kills have a script of their own, tests/stress/chaos.py.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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

    def command(self) -> str:
        return f'python -m pytest {" ".join(self.names())}'


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
    Fault('a flipped bit or a cut anywhere in the best checkpoint, in the newest',
          ['faults::damage_anywhere_in_the_step_to_take_leads_to_the_other'], 200),
    Fault('a flipped bit or a cut in the metrics of a checkpoint',
          ['faults::no_flipped_bit_of_the_metrics_has_the_best_step_deleted',
           'checkpoint::the_last_and_the_best_are_kept_whatever_orbaxs_file_says'], 134),
    Fault('a damaged best checkpoint, and the run resumed',
          ['faults::a_run_whose_best_step_is_damaged_trains_on_and_is_evaluated',
           'checkpoint::a_damaged_best_step_is_set_aside_and_the_next_best_kept'], 5),
    Fault('a damaged best or newest checkpoint that is read',
          ['checkpoint::a_reader_takes_the_next_sound_step_and_says_so',
           'faults::the_step_that_was_passed_over_stands_in_every_output'], 7),
    Fault('a run that is read while it is written',
          ['faults::forty_loads_of_a_run_that_is_being_written',
           'checkpoint::a_step_that_is_replaced_while_it_is_read_is_no_damage',
           'checkpoint::a_step_that_is_half_deleted_while_it_is_read_is_no_damage'], 42),
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
    Fault('a file larger than the limit (EFBIG)',
          ['predict::a_full_disk_stops_it_with_one_line_and_leaves_nothing_half_written',
           'picture::a_full_disk_is_one_error_and_leaves_nothing'], 7),
    Fault('masks by hand in the folder of inputs or results',
          ['manifest::results_do_not_go_among_the_inputs',
           'manifest::masks_by_hand_are_neither_replaced_nor_taken_for_results'], 8),
    Fault('results of another run, with other options, of other files',
          ['manifest::another_run_or_other_options_do_not_pass_for_this_one',
           'manifest::inputs_that_changed_are_done_again_and_two_of_a_name_are_told_apart'], 4),
    Fault('a prediction that was killed',
          ['manifest::a_command_that_was_killed_is_gone_on_with',
           'manifest::what_a_killed_process_left_is_swept_and_a_living_ones_is_not'], 4),
    Fault('three predictions into one folder at once',
          ['manifest::two_commands_into_one_folder_at_once'], 1),
    Fault('a name that is too long',
          ['manifest::a_name_too_long_for_results_is_one_files_fault',
           'cli::names_that_are_too_long_are_an_error_of_one_line'], 6),
    Fault('a pipe, a device, a closed folder among the inputs',
          ['predict::the_summary_accounts_for_every_file',
           'predict::a_folder_that_can_not_be_listed_is_a_fault',
           'files::a_closed_folder_is_a_fault_and_not_passed_over',
           'hostile_text::nothing_waits_on_a_fifo_a_device_or_a_link_in_a_circle'], 8),
    Fault('a name with line breaks or escape codes',
          ['hostile_text::names_can_not_add_a_line_nor_steer_a_terminal',
           'cli::a_path_adds_no_line_to_the_log_and_steers_no_terminal'], 5),
    Fault('a volume larger than the free memory',
          ['predict::what_does_not_fit_is_refused_before_it_is_read',
           'predict::what_does_not_fit_beside_others_is_done_by_itself',
           'predict::pictures_of_one_patient_that_do_not_fit_the_memory_are_refused',
           'volumes::free_memory_is_the_containers_and_the_ulimits'], 8),
    Fault('an expression that never ends, a config that names any folder',
          ['folder::an_expression_that_never_ends_is_refused',
           'predict::a_strangers_run_makes_evaluation_read_no_folder'], 4),
    Fault('two runs on one folder', ['faults::two_runs_on_one_folder'], 2),
    Fault('a file system without locks',
          ['faults::a_file_system_without_locks_is_trained_on'], 1),
    Fault('a run that is resumed with another config',
          ['faults::a_resumed_run_says_what_changed_and_keeps_the_config_before',
           'faults::a_change_that_the_arrays_do_not_fit_is_refused_by_its_name'], 7),
    Fault('damaged lines in metrics.jsonl',
          ['faults::damaged_lines_of_the_log_are_counted_and_named'], 2),
    Fault('pictures that were turned between two starts',
          ['splits::pictures_turned_upside_down_are_other_data'], 1),
    Fault('SIGINT in a command that does not train',
          ['cli::an_interrupt_is_one_line_and_status_130'], 1),
    Fault('no validation and no test part',
          ['faults::training_on_all_data_ends_without_an_evaluation'], 1),
    Fault('a command that can not be followed',
          ['cli::bad_input_is_one_line_and_status_1',
           'cli::an_error_in_ones_own_config_is_a_line_with_its_place'], 26),
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
                'command': fault.command(),
                'seconds': round(sum(seconds for _, seconds in results.values()), 1),
            }
        )
    return made


def main(_: Sequence[str]) -> None:
    import jax

    made_by, start = commit(), time.time()
    chosen = [fault for fault in FAULTS if re.search(flags.FLAGS.match, fault.fault)]
    tests = sorted({test for fault in chosen for test in fault.names()})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        command = [sys.executable, '-m', 'pytest', '-q', f'--junitxml={report}', *tests]
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
    flags.DEFINE_string('match', '', 'only faults whose name has this; other lines stay')


if __name__ == '__main__':
    define_flags()
    app.run(main)
