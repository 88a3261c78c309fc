"""What a StableHLO program does, found out in a process of its own.

MLIR's parser is made for programs of friends: a damaged one can end the process in which it is
parsed, or never come back. So another process reads it first, within a time and a memory.
"""

import contextlib
import json
import os
import select
import subprocess
import sys

from pspnet_jax.runtime.errors import ExportError

OUTSIDE = {f'stablehlo.{name}' for name in ('infeed', 'outfeed', 'send', 'recv')}
START_SECONDS = 300  # of the other process, on a busy machine
SECONDS_A_MEGABYTE, SECONDS = 0.25, 10.0  # of one program
MEMORY = 2**34  # bytes of address space for data
ANSWER = 'from pspnet_jax.serving import stablehlo; stablehlo.answer()'

_reader: subprocess.Popen | None = None  # lives as long as this process: its start takes a second


def check(program: bytes) -> None:
    """Raise ExportError for a program that can't be parsed or does more than compute."""
    seconds = SECONDS + SECONDS_A_MEGABYTE * len(program) / 2**20
    try:
        reader = _start()
        reader.stdin.write(f'{len(program)}\n'.encode() + program)
        reader.stdin.flush()
        foreign = json.loads(_line(reader, seconds))
    except (OSError, ValueError):  # it ended, or is silent
        _stop()
        foreign = None
    if foreign is None:
        raise ExportError('it holds no StableHLO program that can be parsed')
    if foreign:
        names = ', '.join(foreign)[:200]
        raise ExportError(f'it does more than compute ({names}): no export here does')


def _start() -> subprocess.Popen:
    global _reader
    if _reader is None or _reader.poll() is not None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        _reader = subprocess.Popen(
            [sys.executable, '-c', ANSWER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, 'PYTHONPATH': paths},
        )
        _line(_reader, START_SECONDS)
    return _reader


def _line(reader: subprocess.Popen, seconds: float) -> bytes:
    """What it says next; nothing where it ended or is silent for so long."""
    ready, _, _ = select.select([reader.stdout], [], [], seconds)
    return reader.stdout.readline() if ready else b''


def _stop() -> None:
    global _reader
    if _reader is not None:
        _reader.kill()
        with _reader:
            _reader = None


def answer() -> None:
    """The other process: of each program on stdin the foreign operations, or that it is none."""
    with contextlib.suppress(ImportError):  # Windows
        import resource

        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        least = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
        resource.setrlimit(resource.RLIMIT_DATA, (least, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from jax.extend.mlir import ir  # noqa: F401  before it says that it is there

    print('ready', flush=True)
    while words := sys.stdin.buffer.readline():
        program = sys.stdin.buffer.read(int(words))
        try:
            found = sorted(foreign_operations(program))
        except Exception:  # MLIR's own
            found = None
        print(json.dumps(found), flush=True)


def foreign_operations(program: bytes) -> set[str]:
    """What a program does but to compute with arrays; those we export do nothing else.

    A custom call can be any function of the process, at an address that the file states.
    """
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import stablehlo

    found = set()

    def see(operation):
        name = operation.name
        if name == 'stablehlo.custom_call':
            name = ir.StringAttr(operation.attributes['call_target_name']).value
        if name not in ('shape_assertion', 'builtin.module') and (
            name in OUTSIDE or not name.startswith(('stablehlo.', 'func.'))
        ):
            found.add(name)
        return ir.WalkResult.ADVANCE

    with ir.Context() as context:
        stablehlo.register_dialect(context)
        stablehlo.deserialize_portable_artifact(context, program).operation.walk(see)
    return found
