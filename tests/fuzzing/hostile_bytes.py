"""Damage done to the bytes of a file, whatever it holds, and to .safetensors and .ckpt files by parts."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import zipfile
from dataclasses import dataclass, replace
from random import Random
from typing import Final

import numpy as np

from fuzzing.hostile_json import TEXTS, as_text, damaged, hostile_value

JUNK: Final = (
    *(
        b"\0" * 64,
        b"\xff" * 64,
        b"\xed\xa0\x80",
        b"[" * 3000,
        b"\r\n",
        b"\x1f\x8b",
        b"\xef\xbb\xbf",
    ),
    *(
        b"9" * 5000,
        b"1e999",
        b"-1",
        b"NaN",
        b"null",
        b'"',
        b"\\ud800",
        b"{}",
        b"18446744073709551616",
    ),
)
_LENGTHS: Final = (0, 1, 2**16, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)


def damaged_bytes(sample: bytes, random: Random) -> bytes:
    """Returns bytes with one to four damages."""
    data = sample
    for _ in range(random.choice((1, 1, 2, 4))):
        at = _place(len(data), random)
        end = min(len(data), at + random.choice((1, 4, 64, 4096)))
        before, part, after = data[:at], data[at:end], data[end:]
        junk = random.choice(JUNK)
        flipped = part[:1].translate(bytes(byte ^ 1 << random.randrange(8) for byte in range(256)))
        data = random.choice(
            (
                before + flipped + data[at + 1 :],
                before,
                before + after,
                before + part * random.choice((2, 51)) + after,
                before + junk + data[at:],
                before + junk + data[at + len(junk) :],
                before + random.randbytes(len(part)) + after,
                _with_another_number(data, random),
            )
        )
    return data


def _with_another_number(data: bytes, random: Random) -> bytes:
    """Returns a text with a number replaced; other files as they are, or nearly."""
    numbers = list(re.finditer(rb"\d+", data[:100_000]))
    if not numbers:
        return data
    number = random.choice(numbers)
    return data[: number.start()] + random.choice(JUNK[7:]) + data[number.end() :]


def _place(size: int, random: Random) -> int:
    """Returns a place in a file, often near its beginning or its end."""
    near = min(size, random.choice((16, 256, 4096)))
    return random.choice(
        (random.randrange(size + 1), random.randrange(near + 1), size - random.randrange(near + 1))
    )


@dataclass(frozen=True)
class _Tensor:
    key: str
    dtype: str
    shape: list[int]
    data: bytes


def damaged_safetensors(sample: bytes, random: Random) -> bytes:
    """Returns a .safetensors file with other tensors, another header, or other bytes."""
    length = int.from_bytes(sample[:8], "little")
    header, body = json.loads(sample[8 : 8 + length]), sample[8 + length :]
    kind = random.randrange(10)
    if kind == 0:
        return damaged_bytes(sample, random)
    if kind == 1:
        length = random.choice((length + 1, length - 1, *_LENGTHS))
        return length.to_bytes(8, "little") + sample[8:]
    if kind == 2:
        return _file(as_text(damaged(header, random), random), body)
    if kind == 3:
        text = as_text(damaged(header.get("__metadata__", {}), random), random)
        header["__metadata__"] = "@"
        return _file(json.dumps(header).replace('"@"', text), body)
    metadata = header.pop("__metadata__", {})
    if kind == 4 and metadata:
        metadata = _with_damaged_texts(metadata, random)
    tensors = [
        _Tensor(key, entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
        for key, entry in header.items()
    ]
    for _ in range(random.choice((1, 1, 2, 5)) if kind > 4 else 0):
        tensors = _with_damaged_tensor(tensors, random)
    return _safetensors(tensors, metadata)


def _with_damaged_texts(metadata: dict[str, str], random: Random) -> dict[str, str]:
    """Returns metadata in which a text, which is often JSON itself, is another."""
    key = random.choice(list(metadata))
    try:
        text = as_text(damaged(json.loads(metadata[key]), random), random)
    except ValueError:
        text = random.choice([item for item in TEXTS if "\ud800" not in item])
    return {**metadata, key: text}


def _with_damaged_tensor(tensors: list[_Tensor], random: Random) -> list[_Tensor]:
    """Returns tensors of which one is another; sizes fit together, so that the header is taken."""
    place = random.randrange(len(tensors))
    old, other = tensors[place], random.choice(tensors)
    if random.random() < 0.1:
        return tensors[:place] + tensors[place + 1 :]
    if random.random() < 0.1:
        key = random.choice((other.key + ".", old.key.replace("0", "1", 1), random.choice(TEXTS)))
        return [*tensors, replace(old, key=key.replace("\ud800", "?"))]
    new = random.choice(_damaged_tensors(old, other, random))
    return [*tensors[:place], new, *tensors[place + 1 :]]


def _damaged_tensors(old: _Tensor, other: _Tensor, random: Random) -> list[_Tensor]:
    count = int(np.prod(old.shape))
    size = max(1, len(old.data) // max(1, count))
    shapes = ([count], [1, count], [*old.shape, 1], old.shape[::-1], [1, 1, count])
    dtypes = {1: ("F8_E4M3", "I8", "BOOL", "U8"), 2: ("BF16", "I16", "U16"), 8: ("F64", "I64")}
    pattern = random.choice((b"\x00\x7c", b"\xff\xff", b"\x00\x00", b"\xff\x7b", b"\x01\x00"))
    return [
        replace(old, shape=random.choice(shapes)),
        replace(old, dtype=random.choice(dtypes.get(size, ("I32", "F32", "U32")))),
        replace(old, data=(pattern * (len(old.data) // 2 + 1))[: len(old.data)]),
        replace(old, shape=[0], data=b""),
        replace(old, shape=[], data=old.data[:size].ljust(size, b"\0")),
        replace(old, dtype="C64", shape=[0], data=b""),
        replace(other, key=old.key),
    ]


def _safetensors(tensors: list[_Tensor], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor in {tensor.key: tensor for tensor in tensors}.values():
        span = [end, end + len(tensor.data)]
        header[tensor.key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": span}
        end = span[1]
    kept = {tensor.key: tensor.data for tensor in tensors}
    return _file(json.dumps(header), b"".join(kept.values()))


def _file(header: str, body: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def damaged_checkpoint_pickle(sample: bytes, random: Random) -> bytes:
    """Returns a .ckpt file of either format with another pickle, other records, or other bytes."""
    if random.random() < 0.2:
        return damaged_bytes(sample, random)
    if not zipfile.is_zipfile(io.BytesIO(sample)):
        return random.choice((damaged_bytes, _damaged_opcodes))(sample, random)
    with zipfile.ZipFile(io.BytesIO(sample)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = random.choice([*records, *(3 * [next(n for n in records if n.endswith(".pkl"))])])
    change = random.choice((damaged_bytes, _damaged_opcodes, _hostile_pickle))
    records[name] = change(records[name], random)
    if random.random() < 0.1:
        del records[random.choice(list(records))]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _damaged_opcodes(sample: bytes, random: Random) -> bytes:
    """Returns a pickle with an opcode and its argument replaced, doubled, or taken away."""
    try:
        codes = [(code, at) for code, _, at in pickletools.genops(sample)]
    except ValueError:
        return damaged_bytes(sample, random)
    data = sample
    for _ in range(random.choice((1, 2, 4))):
        index = random.randrange(len(codes) - 1)
        start, end = codes[index][1], codes[index + 1][1]
        other = random.randrange(len(codes) - 1)
        part = sample[codes[other][1] : codes[other + 1][1]]
        opcode = random.choice(pickletools.opcodes).code.encode("latin1")
        new = random.choice(
            (b"", part, data[start:end] * 2, opcode, opcode + data[start + 1 : end])
        )
        data = data[:start] + new + data[end:]
    return data


def _hostile_pickle(_sample: bytes, random: Random) -> bytes:
    """Returns the pickle of a value that is no state dict, or of one with hostile keys."""
    value = random.choice((hostile_value(random), {"state_dict": hostile_value(random)}))
    return pickle.dumps(value, random.choice((0, 2, 4)))
