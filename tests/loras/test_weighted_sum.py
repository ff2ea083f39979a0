"""Stored LoRAs are read by their shapes and alphas, and add up to the dense sum."""

from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_family import added

from hyper_merge.checkpoints.architectures.families.sd1 import SD1
from hyper_merge.errors import CheckpointError
from hyper_merge.loras.lora_file import as_hosts_apply
from hyper_merge.loras.reader import LoraReader
from hyper_merge.loras.weighted_sum import WeightedSum

LINEAR = "lora_te_text_model_a"
POINT = "lora_unet_b"
CONV = "lora_unet_c"


def lora_file(path, ranks, alpha, dtype=torch.float32, seed=0):
    """A LoRA of one linear layer, one 1x1 and one 3x3 convolution with these ranks."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = ((LINEAR, (6,), (5,)), (POINT, (4, 1, 1), (3, 1, 1)), (CONV, (7, 1, 1), (2, 3, 3)))
    for (module, out, into), rank in zip(shapes, ranks, strict=True):
        if rank:
            up = torch.randn(out[0], rank, *out[1:], generator=generator)
            down = torch.randn(rank, *into, generator=generator)
            tensors[f"{module}.lora_up.weight"] = up.to(dtype)
            tensors[f"{module}.lora_down.weight"] = down.to(dtype)
            if alpha is not None:
                tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path)
    return path


def plain(path):
    """The file's tensors in a type that can be calculated with, each with an alpha."""
    tensors = {key: tensor.to(torch.float64) for key, tensor in load_file(path).items()}
    for key in [key for key in tensors if key.endswith("lora_down.weight")]:
        module = key.partition(".")[0]
        tensors.setdefault(f"{module}.alpha", torch.tensor(float(len(tensors[key]))))
    return tensors


@pytest.mark.parametrize(
    ("dtype", "again"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float16),
    ],
)
@pytest.mark.parametrize("alpha", [None, 1, 8])
def test_a_stored_lora_is_read_by_shapes_and_alphas(tmp_path, dtype, again, alpha):
    path = lora_file(tmp_path / "x.safetensors", (4, 1, 3), alpha, dtype)
    tensors = plain(path)
    with LoraReader(path, SD1) as lora:
        assert lora.ranks == {LINEAR: 4, POINT: 1, CONV: 3}
        assert {name: layer.shape for name, layer in lora.modules.items()} == {
            LINEAR: (6, 5),
            POINT: (4, 3, 1, 1),
            CONV: (7, 2, 3, 3),
        }
        assert [lora.modules[m].part for m in (LINEAR, POINT)] == ["text_encoder", "unet"]
        assert lora.dtype == again
        for module in lora.modules:
            up, down = lora.factors(module)
            torch.testing.assert_close(up @ down, added(tensors, module), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LINEAR}.lora_up.weight"), f"is no whole LoRA: {LINEAR} has half of its"),
        (lambda t: t.update({f"{LINEAR}.alpha": torch.tensor(-1.0)}), f"has the alpha -1.0 in {LINEAR}"),
    ],
)  # fmt: skip
def test_a_lora_that_cannot_be_meant_is_refused(tmp_path, change, message):
    tensors = load_file(lora_file(tmp_path / "y.safetensors", (2, 2, 2), 2))
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with (
        pytest.raises(CheckpointError, match=f"x.safetensors {message}"),
        LoraReader(tmp_path / "x.safetensors", SD1) as lora,
    ):
        lora.factors(LINEAR)


def weighted(stack, paths, multipliers, rank=None):
    loras = [stack.enter_context(LoraReader(path, SD1)) for path in paths]
    return WeightedSum(loras, lambda layer: multipliers[layer.part], rank)


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def test_differing_ranks_add_up_to_the_dense_sum(tmp_path, stack):
    paths = [
        lora_file(tmp_path / "x.safetensors", (2, 1, 3), 4),
        lora_file(tmp_path / "y.safetensors", (1, 0, 2), None, seed=1),
    ]
    multipliers = {"unet": (-0.7, 1.25), "text_encoder": (0.0, 0.5)}
    total = weighted(stack, paths, multipliers)
    assert {name: rank for name, (_, rank) in total.ranks().items()} == {
        LINEAR: 1,
        POINT: 1,
        CONV: 5,
    }
    dense = [plain(path) for path in paths]
    for module, (layer, _) in total.ranks().items():
        expected = sum(
            x * added(lora, module)
            for x, lora in zip(multipliers[layer.part], dense, strict=True)
            if f"{module}.alpha" in lora
        )
        for alpha in (None, 5):
            details = total.stored(layer, alpha, torch.float32)
            up, down = (factor.double() for factor in as_hosts_apply(*details.factors, alpha))
            torch.testing.assert_close(up @ down, expected, rtol=1e-5, atol=1e-5)
            assert details.energy == pytest.approx(float(expected.square().sum()), rel=1e-9)


def test_ranks_beyond_a_layers_size_are_capped(tmp_path, stack):
    paths = [lora_file(tmp_path / f"{n}.safetensors", (3, 2, 1), 3, seed=n) for n in range(3)]
    total = weighted(stack, paths, dict.fromkeys(("unet", "text_encoder"), (1.0, -1.0, 0.5)))
    layer, rank = total.ranks()[LINEAR]
    assert rank == 5
    assert total.stored(layer, 9, torch.float32).lost < 1e-9


def test_factors_too_large_for_half_precision_are_evened(tmp_path, stack):
    tensors = load_file(lora_file(tmp_path / "y.safetensors", (2, 1, 1), 2))
    tensors[f"{LINEAR}.lora_up.weight"] *= 1e7
    tensors[f"{LINEAR}.lora_down.weight"] *= 1e-7
    save_file(tensors, tmp_path / "x.safetensors")
    total = weighted(stack, [tmp_path / "x.safetensors"], {"text_encoder": (-3.0,), "unet": (1.0,)})
    layer, _ = total.ranks()[LINEAR]
    details = total.stored(layer, 2, torch.float16)
    assert max(float(factor.abs().max()) for factor in details.factors) < 10
    assert details.lost / details.energy < 1e-6
