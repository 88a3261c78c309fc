"""Checks in a separate process what a StableHLO program does.

MLIR's parser expects trusted programs: a corrupted one can crash the parsing process, or hang. So
another process reads it first, with limits on time and memory.
"""

import contextlib
import json
import os
import select
import subprocess
import sys

from pspnet_jax.runtime.errors import ExportError

OUTSIDE = {f'stablehlo.{name}' for name in ('infeed', 'outfeed', 'send', 'recv')}
START_SECONDS = 300  # to start the other process on a busy machine
SECONDS_A_MEGABYTE, SECONDS = 0.25, 10.0  # for one program
MEMORY = 2**34  # bytes of address space for data
ANSWER = 'from pspnet_jax.serving import stablehlo; stablehlo.answer()'

_reader: subprocess.Popen | None = None  # kept alive, since its start takes a second


def check(program: bytes) -> None:
    """Raise ExportError for a program that can't be parsed or does more than compute."""
    seconds = SECONDS + SECONDS_A_MEGABYTE * len(program) / 2**20
    try:
        reader = _start()
        reader.stdin.write(f'{len(program)}\n'.encode() + program)
        reader.stdin.flush()
        foreign = json.loads(_line(reader, seconds))
    except (OSError, ValueError):  # it crashed or does not answer
        _stop()
        foreign = None
    if foreign is None:
        raise ExportError('its StableHLO program can not be parsed')
    if foreign:
        names = ', '.join(foreign)[:200]
        raise ExportError(f'it does more than compute ({names}), unlike exports of pspnet_jax')


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
    """Its next line; empty if it ended or does not answer in time."""
    ready, _, _ = select.select([reader.stdout], [], [], seconds)
    return reader.stdout.readline() if ready else b''


def _stop() -> None:
    global _reader
    if _reader is not None:
        _reader.kill()
        with _reader:
            _reader = None


def answer() -> None:
    """Run the other process: print the foreign operations of each program on stdin, or null."""
    with contextlib.suppress(ImportError):  # Windows
        import resource

        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        least = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
        resource.setrlimit(resource.RLIMIT_DATA, (least, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from jax.extend.mlir import ir  # noqa: F401  before it prints 'ready'

    print('ready', flush=True)
    while words := sys.stdin.buffer.readline():
        program = sys.stdin.buffer.read(int(words))
        try:
            found = sorted(foreign_operations(program))
        except Exception:  # MLIR raises its own
            found = None
        print(json.dumps(found), flush=True)


def foreign_operations(program: bytes) -> set[str]:
    """A program's operations that do not just compute with arrays; our exports have none.

    A custom call can be any function of the process, at an address that the file gives.
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
