"""The loop of a program that speed.py times: it runs a step on request and reports its seconds.

It uses only the standard library, so that every peer's environment can run it.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(
    step: Callable[[], None], info: dict[str, Any], peak_bytes: Callable[[], int] | None = None
) -> None:
    """Print `info`; for each line 'go' run `step` and print its seconds; at the end peak memory.

    Peak memory is {'steps', 'process'} in bytes. On a CPU it is the largest resident set since the
    first 'go', and of the whole process with imports, compilation and preparation.
    """

    def say(value: Any) -> None:
        sys.__stdout__.write(json.dumps(value) + '\n')
        sys.__stdout__.flush()

    say(info)
    before = None
    for _ in iter(sys.stdin.readline, 'end\n'):
        if before is None and not peak_bytes:
            before = resident_peak()
            Path('/proc/self/clear_refs').write_text('5')  # resets the peak, see man 5 proc
        start = time.perf_counter()
        step()
        say(time.perf_counter() - start)
    steps = peak_bytes() if peak_bytes else resident_peak()
    say({'steps': steps, 'process': steps if peak_bytes else max(before or 0, steps)})


def resident_peak() -> int:
    """The largest resident set so far, in bytes."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(re.search(r'VmHWM:\s*(\d+) kB', status)[1])
