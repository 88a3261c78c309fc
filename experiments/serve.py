"""A program that `experiments.speed` times: it does a step when told to, and says how long.

Standard library only, so that every peer's own environment can run it.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(
    step: Callable[[], None], info: dict[str, Any], peak_bytes: Callable[[], int] | None = None
) -> None:
    """Say `info`; for each line 'go' run `step` and say its seconds; at the end the peak memory.

    On a CPU the peak is the largest resident set of the whole process, imports and compilation
    included.
    """

    def say(value: Any) -> None:
        sys.__stdout__.write(json.dumps(value) + '\n')
        sys.__stdout__.flush()

    say(info)
    for _ in iter(sys.stdin.readline, 'end\n'):
        start = time.perf_counter()
        step()
        say(time.perf_counter() - start)
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    say(peak_bytes() if peak_bytes else resident)
