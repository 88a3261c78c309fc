"""How programs are compiled: XLA's options for the platform, and the cache of what it made."""

import ctypes
import glob
import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from pspnet_jax.runtime import paths


def options() -> dict[str, str]:
    """XLA's options for this platform; what the user set in XLA_FLAGS is left to the user.

    On a CPU, the schedule that needs least memory, which is no slower. From jax 0.11 on, XLA's
    library of fusions (YNN) gets single products only: its larger fusions return NaN in bfloat16.
    """
    if jax.default_backend() != 'cpu':
        return {}
    chosen = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}
    if jax.__version_info__ >= (0, 11):
        fusions = 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'
        chosen['xla_cpu_experimental_ynn_fusion_type'] = fusions
    users = re.findall(r'--(\w+)', os.environ.get('XLA_FLAGS', ''))
    return {name: value for name, value in chosen.items() if name not in users}


def jit(function: Callable, **arguments: Any) -> Any:
    """`jax.jit` with `options()`, for a program that is called from Python.

    It asks which platform this is and so starts JAX: call it inside functions, after
    `hosts.start`. Where one program traces another, JAX refuses options for the inner one: a
    function that is only a part of programs has a plain `jax.jit`.
    """
    return jax.jit(function, compiler_options=options(), **arguments)


def use_cache() -> None:
    """Keep compiled programs in JAX_COMPILATION_CACHE_DIR, by default ~/.cache/pspnet_jax/xla.

    A second start loads them instead of compiling. A cache that the user or a test has set up
    stays; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        place = paths.cache()
        if place is None:
            return
        jax.config.update('jax_compilation_cache_dir', str(place / 'xla'))
    _forget_the_damaged(Path(jax.config.jax_compilation_cache_dir))


def _forget_the_damaged(folder: Path) -> None:
    """From now on, delete what JAX can not read from its cache in `folder`, or not write there.

    A kill or a full disk leaves half an entry under its final name: JAX warns, compiles again and
    never replaces it. The warning names only the program: all entries of that name go.
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

    Keys: seconds; gflop as XLA counts them in the program it made; temporary_mb; needed_mb, with
    its arguments and results. NaN where XLA does not say. What the compiler used goes back to the
    system.
    """
    start = time.perf_counter()
    compiled = jitted.lower(*arguments).compile(options())  # `jax.pmap` takes none itself
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    facts = {
        'seconds': time.perf_counter() - start,
        'gflop': cost.get('flops', float('nan')) / 1e9,
        'temporary_mb': memory.temp_size_in_bytes / 2**20 if memory else float('nan'),
        'needed_mb': _needed(memory) / 2**20 if memory else float('nan'),
    }
    trim_heap()
    return compiled, facts


def trim_heap() -> None:
    """What was freed goes back to the system: glibc keeps it, hundreds of MB here."""
    if hasattr(ctypes.CDLL(None), 'malloc_trim'):
        ctypes.CDLL(None).malloc_trim(0)


def _needed(memory: Any) -> int:
    """Bytes: temporaries, arguments, and the results that do not take an argument's place."""
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + results
