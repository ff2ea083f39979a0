"""Ways to damage the file of an analysis."""

import json
import math
import os

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hyper_merge.analysis.checksums import checksum
from hyper_merge.checkpoints.io.safetensors_header import read_table
from hyper_merge.checkpoints.reader import read_header


def spans(path):
    """Returns first and last byte of every tensor in the file, by key."""
    size = path.stat().st_size
    start = read_table(path, size).data_start
    header = json.loads(path.read_bytes()[8:start])
    header.pop("__metadata__")
    return {key: [start + at for at in entry["data_offsets"]] for key, entry in header.items()}


def overwritten(path, at, new):
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(new)


def flip(path, at):
    overwritten(path, at, bytes([path.read_bytes()[at] ^ 0x40]))


def flipped(key):
    def damage(path):
        start, end = spans(path)[key]
        flip(path, (start + end) // 2)

    return damage


def filled(key, value):
    def damage(path):
        start, end = spans(path)[key]
        dtype = read_header(path).tensors[key].dtype
        count = (end - start) // dtype.itemsize
        content = torch.full((count,), value, dtype=dtype).view(torch.uint8).numpy().tobytes()
        overwritten(path, start, content)

    return damage


def zero_tail(path):
    size = path.stat().st_size
    overwritten(path, size // 2, bytes(size - size // 2))


def truncated(path):
    os.truncate(path, path.stat().st_size - 100)


def emptied(path):
    path.write_bytes(b"")


def other_kind(path):
    path.write_bytes(b"<!doctype html>")


def of_others(path):
    """Puts a good file under the name of another analysis."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    about = json.loads(metadata["hyper_merge.analysis"])
    metadata["hyper_merge.analysis"] = json.dumps({**about, "seed": 99})
    save_file(tensors, path, metadata)


def rewritten(change):
    def damage(path):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)

    return damage


def without(key):
    return rewritten(lambda tensors: tensors.pop(key))


def narrower(tensors):
    tensors["17.left"] = tensors["17.left"][:, :-1]


def turned(tensors):
    tensors["grams"] = tensors["grams"].float()


def swapped(tensors):
    cores = {}
    for key in sorted(key for key in tensors if key.endswith(".core")):
        other = cores.setdefault(tensors[key].shape, key)
        if other != key:
            tensors[key], tensors[other] = tensors[other], tensors[key]
            return
    raise AssertionError("no two layers are alike")


def in_header(path):
    flip(path, 300)


DAMAGES = {
    **{f"flipped {key}": flipped(key) for key in ("grams", "weights", "not_carried")},
    **{f"flipped 17.{key}": flipped(f"17.{key}") for key in ("core", "rounding", "left", "right")},
    "other checksums": filled("checksums", 7),
    "infinite bases": filled("17.left", math.inf),
    "a core of NaN": filled("17.core", math.nan),
    "zero bases": filled("17.right", 0.0),
    **{
        damage.__name__: damage for damage in (zero_tail, truncated, emptied, other_kind, of_others)
    },
    "in the header": in_header,
    **{f"without {key}": without(key) for key in ("17.core", "grams")},
    "another width": rewritten(narrower),
    "another type": rewritten(turned),
    "another order": rewritten(swapped),
}


def with_spectra(path):
    """Makes the file as versions wrote it that kept spectra of the layers in it."""

    def add(tensors):
        cores = {key for key in tensors if key.endswith(".core")}
        for place in (key.partition(".")[0] for key in cores):
            p, q = tensors[f"{place}.rounding"].shape
            for name, shape in (("rows", (p,)), ("columns", (q,)), ("private", (3, min(p, q)))):
                tensors[f"{place}.{name}"] = torch.ones(shape, dtype=torch.float64)
        del tensors["checksums"]
        values = [checksum(tensors[key]) for key in sorted(tensors)]
        tensors["checksums"] = torch.tensor(values, dtype=torch.int64)

    rewritten(add)(path)


def as_before(path):
    """Makes the file as versions without checksums wrote it."""
    with_spectra(path)
    without("checksums")(path)
