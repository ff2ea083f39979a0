"""Checkpoints of full size that take no space on the disk."""

from pathlib import Path

import torch

from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.synthetic.checkpoint_layouts import sd1_layout


def full_size(path: Path, marker: str) -> Path:
    """Writes a header of the real layout before as many bytes of nothing: 2.1 GB that take no space."""
    tensors = {
        key: TensorInfo(torch.int64 if key.endswith("position_ids") else torch.float16, shape)
        for key, shape in sd1_layout().items()
    }
    writer = SafetensorsWriter(path, tensors, {"marker": marker})
    path.write_bytes(writer._header)
    with path.open("r+b") as stream:
        stream.truncate(writer.size)
    return path
