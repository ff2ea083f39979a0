"""The network that `benchmarks/trained.py` trains as SDXL is the one that merges see in its files."""

from pathlib import Path

import torch
from networks import SDXLNetwork
from random_checkpoints import sane_weights
from reference_networks import InputLog
from torch.testing import assert_close

from hyper_merge.calibration.measure import can_run
from hyper_merge.calibration.network import Network
from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.families.sdxl import SDXL
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.io.header import Header, TensorInfo

PROMPTS = ["cat"]  # one word: random prompts are the same for both encoders


def test_sdxl_to_be_trained_is_detected_and_runs_alike(monkeypatch):
    network = SDXLNetwork(8, PROMPTS).eval()
    shapes = {key: tuple(tensor.shape) for key, tensor in network.checkpoint().items()}
    state = sane_weights(shapes)
    network.load(state)
    tensors = {key: TensorInfo(torch.float32, shape) for key, shape in shapes.items()}
    header = Header(Path("a.safetensors"), tensors, {}, 0, 0)
    layout = layout_of(header, require_supported(header))
    assert layout.family is SDXL
    assert can_run(layout, shapes)

    log, steps = InputLog(monkeypatch), torch.tensor([20, 981])
    with torch.no_grad():
        network_of_merges = Network(state.__getitem__, shapes, layout.family)
        output = network_of_merges.run(steps.float(), 8, torch.Generator().manual_seed(0))
        (_, tokens, _), (_, others, _) = log.texts
        assert torch.equal(tokens, others)
        expected = network(log.unet[0], steps, tokens)
    assert 0.1 < float(output.std()) < 10
    assert_close(output, expected, rtol=1e-4, atol=1e-4)
