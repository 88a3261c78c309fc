"""Inputs for fuzz.py that libFuzzer chooses: what reached new code is changed further.

atheris counts what is reached in the Python of TRACED; readers in C are seen only by what our
code makes of their answers.
"""

import contextlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import atheris

from tests.stress import mutate

TRACED = ['pspnet_jax', 'configs', 'PIL', 'nibabel', 'pydicom', 'tensorflow_datasets']
LONGEST = 2**23  # bytes of an input


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """What is imported in it is traced."""
    with (
        contextlib.redirect_stderr(io.StringIO()),  # the name of each module
        atheris.instrument_imports(include=TRACED),
    ):
        yield


def fuzz(valid: Sequence[mutate.Seed], *, corpus: Path, seed: int, read: Callable) -> None:
    """Call `read(changed seed)` until it ends the process.

    `corpus` is a folder: what it holds is gone on with, and what reaches new code is kept there.
    """
    originals = [pack(one) for one in valid]
    for n, data in enumerate(originals):
        (corpus / f'seed_{n}').write_bytes(data)

    def change(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        # What reached new code was mostly refused, and so are changes of it.
        one = (rng.random() < 0.7 and unpack(data)) or rng.choice(valid)
        way = rng.choice(list(one.files))
        if rng.random() < 0.5:
            new = atheris.Mutate(one.files[way], most)
        else:
            other = rng.choice(list(rng.choice(valid).files.values()))
            new = mutate.change_bytes(way or one.name, one.files[way], other, rng)
        changed = pack(one._replace(files={**one.files, way: new}))
        return changed if len(changed) <= most else data

    def test(data: bytes) -> None:
        one = unpack(data)
        if one and data not in originals:
            read(one)

    options = [f'-seed={seed + 1}', f'-max_len={LONGEST}', '-len_control=0', '-rss_limit_mb=0']
    options += ['-mutate_depth=1', '-use_value_profile=1']
    # The worker is watched from outside, and what it dies of should end it.
    options += ['-timeout=86400', '-handle_segv=0', '-handle_bus=0', '-handle_abrt=0']
    atheris.Setup(['fuzz', *options, str(corpus)], test, custom_mutator=change)
    atheris.Fuzz()


def pack(seed: mutate.Seed) -> bytes:
    """As bytes: lengths and what is that long, name and content of each file in turn."""
    parts = [seed.name.encode()]
    for way, content in seed.files.items():
        parts += [way.encode(), content]
    return b''.join(len(part).to_bytes(4, 'big') + part for part in parts)


def unpack(data: bytes) -> mutate.Seed | None:
    """None for what `pack` has not made, as libFuzzer's first input of no bytes."""
    parts, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], 'big')
        parts.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if at != len(data) or len(parts) < 3:
        return None
    name, *rest = parts
    ways = (way.decode() for way in rest[::2])
    return mutate.Seed(name.decode(), dict(zip(ways, rest[1::2], strict=True)))
