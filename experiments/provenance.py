"""The origin of a result: commit and device."""

import os
import platform
import re
import subprocess
from pathlib import Path

import jax

RESULTS = ':!experiments/results'  # tracked files that each result changes


def commit() -> str:
    """The checked-out commit, with '+changes' if tracked files other than results differ from it.

    $COMMIT replaces it; a copy of the files without .git needs that. Raises SystemExit without
    either.
    """
    if given := os.environ.get('COMMIT'):
        return given
    if not Path('.git').exists():
        raise SystemExit('there is no .git here: set COMMIT to the commit of this copy')

    def git(*arguments: str) -> str:
        return subprocess.run(
            ('git', *arguments), check=True, capture_output=True, text=True
        ).stdout.strip()

    changed = git('status', '--porcelain', '--untracked-files=no', '--', '.', RESULTS)
    return git('rev-parse', 'HEAD') + ('+changes' if changed else '')


def device() -> str:
    """'1 x NVIDIA H200', or '2 cores, Intel(R) Xeon(R) ...' on a CPU."""
    first = jax.devices()[0]
    if first.platform != 'cpu':
        return f'{jax.device_count()} x {first.device_kind}'
    info = Path('/proc/cpuinfo')
    text = info.read_text() if info.exists() else ''
    name = re.search(r'model name\s*: (.*)', text)
    return f'{text.count("processor")} cores, {name[1] if name else platform.processor()}'
