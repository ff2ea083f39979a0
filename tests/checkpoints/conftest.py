"""Small files and headers for the tests of `hyper_merge.checkpoints`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.synthetic.checkpoint_layouts import sd1_layout

MakeHeader = Callable[..., Header]
WriteRaw = Callable[..., Path]


@pytest.fixture
def make_header() -> MakeHeader:
    """A header of the given keys and shapes, without a file."""

    def make(
        shapes: Mapping[str, tuple[int, ...]],
        name: str = "a.safetensors",
        dtype: torch.dtype = torch.float16,
    ) -> Header:
        tensors = {
            key: TensorInfo(torch.int64 if key.endswith("position_ids") else dtype, shape)
            for key, shape in shapes.items()
        }
        return Header(path=Path(name), tensors=tensors, metadata={}, size=0, mtime_ns=0)

    return make


@pytest.fixture
def narrow() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a whole SD 1.x checkpoint, a tenth as wide."""
    return sd1_layout(width=32, context=48, vocabulary=100, vae_width=16)


@pytest.fixture
def write_raw(tmp_path: Path) -> WriteRaw:
    """A .safetensors file of any table, true or false, and any data."""

    def write(table: Any, data: bytes = b"", name: str = "x.safetensors") -> Path:
        text = table if isinstance(table, bytes) else json.dumps(table).encode()
        path = tmp_path / name
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return path

    return write
