"""A merged run, and a checkpoint that is not part of it."""

import pytest
import torch
from tiny_family import write

from hyper_merge.runs.folders import Folders


@pytest.fixture
def at(started, merged):
    """The folders of a merge, with a manifest as if it had been made there."""
    manifest, root = started / "hyper-merge/mix/manifest.json", merged.place.loras.parent
    manifest.write_text(manifest.read_text().replace(str(root), str(started)))
    return Folders.under(started)


@pytest.fixture
def other(tmp_path, state_of):
    """A checkpoint of the family that is no other's: a mixture with something of its own."""
    state = state_of(0, torch.float32)
    second = state_of(1, torch.float32)
    generator = torch.Generator().manual_seed(7)
    for key, tensor in state.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * tensor.std().nan_to_num()
            state[key] = (0.3 * tensor + 0.7 * second[key] + 0.002 * noise).half()
    return write(tmp_path / "new one.safetensors", state)
