"""Valid files made broken or hostile, at random and repeatably; see fuzz.py."""

import csv
import io
import json
import os
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

STRAY = Path('/tmp/pspnet_jax_fuzz_stray')  # what a reader that trusts a path would make or read
DEEP = 100_000
NUMBERS = (0, 1, -1, 2, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
TEXTS = (
    '', ' ', 'x' * 100_000, '../../x', f'../{STRAY.name}', str(STRAY), 'C:\\x', 'http://localhost/',
    'a\nb\n  c', '\x1b[31mred', '\0', '\ud800', '\u202e', '%s%n{0}', '__import__("os")', 'nan',
    '-inf', '9' * 5000, '1e308', '-1', '0', '1' + 'e' * 50, '((((a+)+)+)+)$', '\ufeff', '"', "'",
    ',',
)  # fmt: skip
VALUES = (  # written into JSON as they are
    'NaN', 'Infinity', '-1', '0', '1', '1.5', '1e308', '1e999', '9' * 5000, str(2**31), str(2**63),
    str(-(2**63) - 1), 'null', 'true', 'false', '[]', '{}', '[[]]', '[null]', '{"": {}}',
    '[1e308, 1e308]', '[' * DEEP + ']' * DEEP, '{"a":' * DEEP + '1' + '}' * DEEP,
    '[' + '0,' * DEEP + '0]',
    *(json.dumps(text) for text in TEXTS),
)  # fmt: skip


class Seed(NamedTuple):
    """A file, or a folder: its name and {way below it, '' for a file: bytes, or what lies there
    instead of a file}.
    """

    name: str
    files: dict[str, bytes | Callable[[Path], None]]


def load(paths: Sequence[Path]) -> list[Seed]:
    seeds = []
    for path in paths:
        found = sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]
        ways = ('' if p == path else p.relative_to(path).as_posix() for p in found)
        seeds.append(Seed(path.name, {w: p.read_bytes() for w, p in zip(ways, found, strict=True)}))
    return seeds


def write(seed: Seed, folder: Path) -> Path:
    """The seed's path in the folder."""
    for way, content in seed.files.items():
        path = folder / seed.name / way
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
    return folder / seed.name


def change(seeds: Sequence[Seed], rng: random.Random) -> Seed:
    """One of the seeds with one to three changes."""
    seed, other = rng.choice(seeds), rng.choice(seeds)
    files = dict(seed.files)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        way = rng.choice(list(files))
        if rng.random() < (0.02 if '' in files else 0.1):
            files[way] = rng.choice(INSTEAD)
        elif isinstance(files[way], bytes):
            name = way or seed.name
            files[way] = change_bytes(name, files[way], rng.choice(list(other.files.values())), rng)
    return seed._replace(files=files)


# What can lie where a file is expected.
INSTEAD = (
    lambda path: None,
    lambda path: path.write_bytes(b''),
    Path.mkdir,
    os.mkfifo,
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to('/dev/zero'),
    lambda path: path.symlink_to('..'),
)


def change_bytes(name: str, data: bytes, other: bytes, rng: random.Random) -> bytes:
    structured = STRUCTURED.get(Path(name).suffix) or STRUCTURED.get(Path(name).name)
    if structured and rng.random() < 0.7:
        try:
            return structured(data, rng)
        except Exception:
            pass  # a change before this one made it no such file
    return rng.choice(CHANGES)(data, other, rng)


def change_json(data: bytes, rng: random.Random) -> bytes:
    """A value, or a key, replaced; a member removed or there twice."""
    tree, places, mark = json.loads(data), [], '\u2042'

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    holder = [tree]
    walk(holder)
    node, key = rng.choice(places)
    what = rng.random()
    new = rng.choice(VALUES)
    if what < 0.1 and node is not holder:
        del node[key]
    elif what < 0.2 and isinstance(node, dict):
        new = json.dumps(rng.choice(TEXTS))
        node[mark] = node.pop(key)
    elif what < 0.3:  # a value of the same file: of the wrong type, or that of another's
        other, at = rng.choice(places)
        new = json.dumps(other[at])
        node[key] = mark
    else:
        node[key] = mark
    return json.dumps(holder[0]).replace(json.dumps(mark), new).encode('utf-8', 'surrogatepass')


def change_csv(data: bytes, rng: random.Random) -> bytes:
    """A field replaced, removed or there twice; as JSON where it is that."""
    rows = list(csv.reader(io.StringIO(data.decode(), newline='')))
    row = rng.choice(rows)
    n = rng.randrange(len(row))
    what = rng.random()
    if what < 0.15:
        del row[n]
    elif what < 0.3:
        row.insert(n, row[n])
    elif what < 0.6 and row[n][:1] in ('{', '['):
        row[n] = change_json(row[n].encode(), rng).decode()
    else:
        row[n] = rng.choice((*TEXTS, *VALUES))
    text = io.StringIO(newline='')
    csv.writer(text).writerows(rows)
    return text.getvalue().encode('utf-8', 'surrogatepass')


# By the end of a name, or the whole: (data, rng) -> data; fuzz_state has more.
STRUCTURED = {'.json': change_json, '.csv': change_csv}


# Bytes: (data, another seed's, rng) -> data. Headers are short and at the start, so half of the
# places are there.


def _place(data: bytes, rng: random.Random, width: int = 1) -> int:
    end = max(len(data) - width + 1, 1)
    return rng.randrange(min(end, 512) if rng.random() < 0.5 else end)


def _flip(data, _, rng):
    data = bytearray(data or b'\0')
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _noise(data, _, rng):
    at = _place(data, rng)
    return data[:at] + rng.randbytes(size := rng.choice((1, 2, 4, 16, 64))) + data[at + size :]


def _insert(data, _, rng):
    at, size = _place(data, rng), rng.choice((1, 4, 16, 256, 65536))
    return data[:at] + rng.choice((bytes(size), b'\xff' * size, rng.randbytes(size))) + data[at:]


def _remove(data, _, rng):
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 4, 16, 256)) :]


def _repeat(data, _, rng):
    at, size = _place(data, rng), rng.choice((1, 4, 16, 256))
    return data[:at] + data[at : at + size] * rng.choice((2, 2, 2, 1000)) + data[at + size :]


def _truncate(data, _, rng):
    return data[: _place(data, rng)]


def _field(data, _, rng):
    """A number of 16, 32 or 64 bits of either order."""
    size = rng.choice((2, 4, 4, 8))
    at = _place(data, rng, size) // 2 * 2  # most fields lie at even places
    number = rng.choice(NUMBERS) % 2 ** (8 * size)
    return data[:at] + number.to_bytes(size, rng.choice(('little', 'big'))) + data[at + size :]


def _real(data, _, rng):
    at = _place(data, rng, 4) // 4 * 4
    kind = rng.choice(('<f', '>f', '<d', '>d'))
    value = struct.pack(kind, rng.choice((float('nan'), float('inf'), -1.0, 0.0, 1e30, 1e-30)))
    return data[:at] + value + data[at + len(value) :]


def _swap(data, _, rng):
    """Two fields change places."""
    size = rng.choice((2, 4))
    one, two = sorted((_place(data, rng, size), _place(data, rng, size)))
    if one + size > two:
        return data[::-1]
    a, b = data[one : one + size], data[two : two + size]
    return data[:one] + b + data[one + size : two] + a + data[two + size :]


def _splice(data, other, rng):
    if not isinstance(other, bytes):
        return data
    return data[: _place(data, rng)] + other[_place(other, rng) :]


def _text(data, _, rng):
    """A number in the text, or whatever is there, becomes another text."""
    at = _place(data, rng)
    new = rng.choice((*TEXTS, *VALUES)).encode('utf-8', 'surrogatepass')
    return data[:at] + new + data[at + rng.choice((0, 1, len(new))) :]


CHANGES = (
    _flip, _flip, _noise, _insert, _remove, _repeat, _truncate, _field, _field, _field, _real,
    _swap, _splice, _text,
)  # fmt: skip
