"""LoRAs of the newer transformers as input, in the spellings of their trainers."""

import pytest
import torch
from lora_files import share
from narrow_layouts import NARROW, UNET
from safetensors.torch import load_file, save_file

from hyper_merge.operations.loras.apply import run_apply
from hyper_merge.operations.loras.combine import run_combine
from hyper_merge.operations.loras.known_layers import known_family
from hyper_merge.operations.loras.request import ApplyRequest, CombineRequest
from hyper_merge.runtime.progress import Progress

KOHYA = ("lora_unet_", "_", ".lora_up.weight", ".lora_down.weight")
COMFY = ("diffusion_model.", ".", ".lora_B.weight", ".lora_A.weight")
CONDITIONER = ("text_conditioner.", ".", ".lora_B.weight", ".lora_A.weight")
DIFFUSERS = ("transformer.", ".", ".lora_B.weight", ".lora_A.weight")
CASES = [
    ("anima", "blocks.0.", (KOHYA, COMFY, DIFFUSERS), "diffusion_model.", COMFY),
    ("z_image", "layers.0.attention.", (COMFY, DIFFUSERS), "diffusion_model.", COMFY),
    ("qwen_image", "transformer_blocks.0.attn.", (KOHYA, COMFY), "lora_unet_", KOHYA),
]


ADAPTER = "diffusion_model.llm_adapter."


def factors(layers, seed):
    """Returns two factors for each layer: mixtures of two that all have in common."""
    common, own = (torch.Generator().manual_seed(n) for n in (0, seed))
    mix = torch.randn(2, generator=own)
    pairs = {}
    for layer in layers:
        ups = torch.randn(2, layer.m, 2, generator=common)
        downs = torch.randn(2, 2, layer.n, generator=common)
        up = torch.cat([x * part for x, part in zip(mix, ups, strict=True)], 1)
        pairs[layer.module] = (up, torch.cat(list(downs)))
    return pairs


def spelled(pairs, own_prefix, spelling):
    prefix, separator, up_end, down_end = spelling
    tensors = {}
    for module, (up, down) in pairs.items():
        path = module.removeprefix(own_prefix)
        name = prefix + (path.replace(".", "_") if separator == "_" else path)
        tensors[name + up_end], tensors[name + down_end] = up.clone(), down.clone()
    return tensors


@pytest.mark.parametrize(("family", "pattern", "spellings", "own_prefix", "written"), CASES)
def test_files_of_all_spellings_become_one_in_that_of_the_family(
    family, pattern, spellings, own_prefix, written, tmp_path
):
    known = known_family(family)
    flat = pattern.replace(".", "_")
    layers = [x for x in known.layers if flat in x.module.replace(".", "_")]
    paths = []
    for place, spelling in enumerate(spellings):
        path = tmp_path / f"lora{place}.safetensors"
        save_file(spelled(factors(layers, place + 1), own_prefix, spelling), path)
        paths.append(path)
    result = share(
        paths, tmp_path / "models", ranks=(2, 2), allocation="even", lora_dtype="float32"
    )
    assert result.report.loss < 0.01
    lora = load_file(result.loras[0])
    ends = (*written[2:], ".alpha")
    assert {layer.module for layer in layers} == {
        key.removesuffix(end) for key in lora for end in ends if key.endswith(end)
    }
    assert any(key.endswith(".alpha") for key in lora) == known.family.lora_alpha
    resized = run_combine(
        CombineRequest((paths[0],), rank=2, to=tmp_path / "small.safetensors"), Progress()
    )
    assert resized.rank == 2
    assert any(key.endswith(written[2]) for key in load_file(resized.path))


def adapter_layers():
    layers = known_family("anima").layers
    return [x for x in layers if x.module.startswith(f"{ADAPTER}blocks.2.")]


def test_the_adapter_of_anima_is_shared_under_its_own_names(tmp_path):
    layers = adapter_layers()
    assert len(layers) == 10
    paths = []
    spellings = ((KOHYA, "diffusion_model."), (COMFY, "diffusion_model."), (CONDITIONER, ADAPTER))
    for place, (spelling, own) in enumerate(spellings):
        paths.append(tmp_path / f"lora{place}.safetensors")
        save_file(spelled(factors(layers, place + 1), own, spelling), paths[-1])
    result = share(
        paths, tmp_path / "models", ranks=(2, 2), allocation="even", multipliers="separate"
    )
    assert result.report.loss < 0.01
    assert {key.rpartition(".lora_")[0] for key in load_file(result.loras[0])} == {
        layer.module for layer in layers
    }
    assert not any(row.text_multipliers for row in result.report.checkpoints)
    assert {part.name for part in result.report.parts} == {"ADAPTER"}


def test_the_adapter_of_anima_is_added_to_a_checkpoint(tmp_path):
    shapes = NARROW["anima"]()
    model, lora = tmp_path / "model.safetensors", tmp_path / "lora.safetensors"
    save_file({key: torch.randn(shape) for key, shape in shapes.items()}, model)
    key = f"{UNET}llm_adapter.blocks.1.mlp.2.weight"
    up, down = torch.randn(shapes[key][0], 2), torch.randn(2, shapes[key][1])
    save_file(spelled({f"{ADAPTER}blocks.1.mlp.2": (up, down)}, "diffusion_model.", KOHYA), lora)
    result = run_apply(ApplyRequest((lora,), checkpoint=model), Progress())
    before, after = load_file(model), load_file(result.path)
    torch.testing.assert_close(after[key] - before[key], up @ down, atol=1e-4, rtol=1e-4)
    assert result.layers == 1
