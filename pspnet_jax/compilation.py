"""How programs are compiled: XLA's options for the platform, and the cache of what it made."""

import ctypes
import glob
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

import jax

UNKNOWN = dict.fromkeys(('seconds', 'gflop', 'temporary_mb', 'needed_mb'), float('nan'))


def options() -> dict[str, str]:
    """Compiler options. On a CPU the schedule that keeps least in memory, which is no slower."""
    if jax.default_backend() != 'cpu':
        return {}
    return {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}


def use_cache() -> None:
    """Keep compiled programs in JAX_COMPILATION_CACHE_DIR, by default ~/.cache/pspnet_jax/xla.

    A second start loads them in place of compiling. A cache that the user or a test has set
    up stays; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
        jax.config.update('jax_compilation_cache_dir', str(home / 'pspnet_jax' / 'xla'))
    _forget_the_damaged(Path(jax.config.jax_compilation_cache_dir))


def _forget_the_damaged(folder: Path) -> None:
    """From now on, delete what JAX can not read from its cache in `folder`, or not write there.

    A kill or a full disk leaves half an entry under its final name, which JAX warns of, compiles
    anew and never replaces. The warning names the program alone: all entries of that name go.
    """
    show = warnings.showwarning

    def show_and_forget(message, *rest, **options):
        words = r"Error (?:reading|writing) persistent compilation cache entry for '([\w.<>-]+)'"
        if found := re.match(words, str(message)):
            for path in folder.glob(f'{glob.escape(found[1])}-*-cache'):
                path.unlink(missing_ok=True)
        show(message, *rest, **options)

    warnings.showwarning = show_and_forget


def compile_now(jitted: Any, *arguments: Any) -> tuple[Any, dict[str, float]]:
    """`jitted`, or what `jax.pmap` returns, compiled for these arguments, and what that took.

    The keys are UNKNOWN's; gflop as XLA counts them in the program it
    made, needed_mb with its arguments and results, NaN where it does not say. What the compiler
    used goes back to the system.
    """
    start = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    facts = {
        'seconds': time.perf_counter() - start,
        'gflop': cost.get('flops', float('nan')) / 1e9,
        'temporary_mb': memory.temp_size_in_bytes / 2**20 if memory else float('nan'),
        'needed_mb': _needed(memory) / 2**20 if memory else float('nan'),
    }
    give_back_memory()
    return compiled, facts


def give_back_memory() -> None:
    """What was freed goes back to the system: glibc keeps it, hundreds of MB here."""
    if hasattr(ctypes.CDLL(None), 'malloc_trim'):
        ctypes.CDLL(None).malloc_trim(0)


def _needed(memory: Any) -> int:
    """Bytes: temporaries, arguments, and the results that do not take an argument's place."""
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + results
