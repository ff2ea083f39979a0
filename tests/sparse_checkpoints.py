"""Checkpoints of full size that take no space on the disk."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.synthetic.checkpoint_layouts import sd1_layout

Layout = Callable[[], Mapping[str, tuple[int, ...]]]


def full_size(path: Path, marker: str, layout: Layout = sd1_layout) -> Path:
    """Writes a header of a real layout before as many bytes of nothing, which take no space."""
    tensors = {
        key: TensorInfo(torch.int64 if key.endswith("position_ids") else torch.float16, shape)
        for key, shape in layout().items()
    }
    writer = SafetensorsWriter(path, tensors, {"marker": marker})
    path.write_bytes(writer._header)
    with path.open("r+b") as stream:
        stream.truncate(writer.size)
    return path
