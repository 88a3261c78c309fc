"""Changes of files that hold state; their lengths, checksums and digests stay right."""

import io
import json
import random
import struct
import zipfile

from tests.stress import mutate


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    (size,) = struct.unpack('<Q', data[:8])
    head = json.loads(data[8 : 8 + size])
    if 'pspnet_jax' in head.get('__metadata__', {}) and rng.random() < 0.5:
        metadata = head['__metadata__']
        metadata['pspnet_jax'] = change_metadata(metadata['pspnet_jax'].encode(), rng).decode()
        head = json.dumps(head).encode()
    else:
        head = mutate.change_json(json.dumps(head).encode(), rng)
    return struct.pack('<Q', len(head)) + head + data[8 + size :]


def change_zip(data: bytes, rng: random.Random) -> bytes:
    """One entry changed, its checksum right; or there twice, or of another name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    n = rng.randrange(len(entries))
    # Half the time the small one that says what the others are: of PyTorch's, or of ours.
    told = [i for i, (e, _) in enumerate(entries) if e.filename.endswith(('.pkl', '.json'))]
    n = rng.choice(told) if told and rng.random() < 0.5 else n
    entry, content = entries[n]
    name, what = entry.filename, rng.random()
    if what < 0.05:
        name = rng.choice(mutate.TEXTS)
    elif what < 0.1:
        entries.append(entries[n])
    elif what < 0.11:
        content = bytes(2**27)  # of which deflate makes 600 kB
    else:
        content = mutate.change_bytes(name, content, rng.choice(entries)[1], rng)
    packing = zipfile.ZIP_DEFLATED if what < 0.11 else entry.compress_type
    entries[n] = (zipfile.ZipInfo(name), content)
    entries[n][0].compress_type = packing
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', compresslevel=1) as archive:
        for each, text in entries:
            archive.writestr(each, text)
    return out.getvalue()


def change_metadata(data: bytes, rng: random.Random) -> bytes:
    """JSON of a checkpoint: changed anywhere, or below its seal, which is made anew."""
    from pspnet_jax.runtime import checkpoint

    tree = json.loads(data)
    found = tree.get('custom_metadata')
    if not isinstance(found, dict) or rng.random() < 0.2:
        return mutate.change_json(data, rng)
    del found[checkpoint.SEAL]
    part = rng.choice(list(found))
    found[part] = json.loads(mutate.change_json(json.dumps(found[part]).encode(), rng))
    found[checkpoint.SEAL] = checkpoint.seal(found)
    return json.dumps(tree).encode()


def change_onnx(data: bytes, rng: random.Random) -> bytes:
    """A field of any message in it replaced, or one of several removed or there twice."""
    import onnx

    model, places = onnx.ModelProto.FromString(data), []

    def walk(message):
        for field, value in message.ListFields():
            places.append((message, field.name))
            if hasattr(value, 'ListFields'):
                walk(value)
            elif isinstance(value, str | bytes | int | float) or not len(value):
                continue
            elif hasattr(value[0], 'ListFields'):
                for each in value:
                    walk(each)

    walk(model)
    message, name = rng.choice(places)
    value = getattr(message, name)
    if isinstance(value, str):
        setattr(message, name, rng.choice((*mutate.TEXTS, 'Tile', 'Expand', 'Range', 'Loop')))
    elif isinstance(value, bytes):
        setattr(message, name, rng.choice(mutate.CHANGES)(value, value, rng))
    elif isinstance(value, int | float):
        setattr(message, name, rng.choice(mutate.NUMBERS))
    elif hasattr(value, 'ListFields'):
        message.ClearField(name)
    elif rng.random() < 0.3:
        del value[rng.randrange(len(value))]
    elif isinstance(value[0], int | float):
        value[rng.randrange(len(value))] = rng.choice(mutate.NUMBERS)
    else:
        value.append(rng.choice(value))
    return model.SerializeToString()


def change_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    n = rng.randrange(len(lines))
    lines[n] = mutate.change_json(lines[n], rng)
    return b'\n'.join(lines)


STRUCTURED = {
    '.safetensors': change_safetensors,
    '.npz': change_zip,
    '.pth': change_zip,
    '.pt': change_zip,
    '.zip': change_zip,
    '.onnx': change_onnx,
    '.jsonl': change_lines,
    '_CHECKPOINT_METADATA': change_metadata,
    '_METADATA': mutate.change_json,
    'metrics': mutate.change_json,
    'lock': mutate.change_json,
}
