"""How programs are compiled: XLA's options for the platform, and the compilation cache."""

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
    """XLA's options for this platform; options that the user set in XLA_FLAGS are left alone.

    A CPU uses the schedule that needs least memory, which is no slower. XLA's library YNN computes
    only products and sums there, since its convolutions with up to 64 outputs use a single core.
    From jax 0.11 on it computes only products: its sums are NaN in bfloat16.
    """
    if jax.default_backend() != 'cpu':
        return {}
    operations = (
        ['INDIVIDUAL_DOT'] if jax.__version_info__ >= (0, 11) else ['INDIVIDUAL_DOT', 'REDUCE']
    )
    chosen = {
        'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED',
        'xla_cpu_experimental_ynn_fusion_type': ','.join(
            f'LIBRARY_FUSION_TYPE_{name}' for name in operations
        ),
    }
    users = re.findall(r'--(\w+)', os.environ.get('XLA_FLAGS', ''))
    return {name: value for name, value in chosen.items() if name not in users}


def jit(function: Callable, **arguments: Any) -> Any:
    """`jax.jit` with `options()`, for a program that is called from Python.

    It looks up the platform and so starts JAX: call it inside functions, after `hosts.start`.
    JAX refuses options for a program that another one traces: use a plain `jax.jit` there.
    """
    return jax.jit(function, compiler_options=options(), **arguments)


def use_cache() -> None:
    """Keep compiled programs in JAX_COMPILATION_CACHE_DIR, by default ~/.cache/pspnet_jax/xla.

    A second start loads them instead of compiling. A cache that is already configured is kept;
    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        place = paths.cache()
        if place is None:
            return
        jax.config.update('jax_compilation_cache_dir', str(place / 'xla'))
    _forget_the_damaged(Path(jax.config.jax_compilation_cache_dir))


def _forget_the_damaged(folder: Path) -> None:
    """From now on, delete cache entries in `folder` that JAX can't read or write.

    A kill or a full disk leaves half an entry under its final name: JAX warns, compiles again and
    never replaces it. The warning names only the program, so all its entries are deleted.
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
    """Compile a `jax.jit` or `jax.pmap` function for these arguments: (program, its cost).

    The cost has the keys seconds; gflop, as XLA counts the compiled program; temporary_mb; and
    needed_mb, which includes arguments and results. NaN means that XLA does not report it. The
    compiler's memory is returned to the system.
    """
    start = time.perf_counter()
    compiled = jitted.lower(*arguments).compile(options())  # `jax.pmap` itself takes no options
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
    """Return freed memory to the system: glibc would keep hundreds of MB."""
    if hasattr(ctypes.CDLL(None), 'malloc_trim'):
        ctypes.CDLL(None).malloc_trim(0)


def _needed(memory: Any) -> int:
    """Bytes of temporaries, arguments, and results that do not reuse an argument's memory."""
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + results
