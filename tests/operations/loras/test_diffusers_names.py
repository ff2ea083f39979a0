"""LoRAs in diffusers' names at full size: recognised by these alone, and made into files of the family's."""

import numpy as np
import pytest
import torch
from lora_files import write
from safetensors.torch import load_file

from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import FamilyError
from hyper_merge.operations.loras.combine import run_combine
from hyper_merge.operations.loras.inputs import recognise
from hyper_merge.operations.loras.inspect import inspect_lora
from hyper_merge.operations.loras.known_layers import known_family
from hyper_merge.operations.loras.request import CombineRequest
from hyper_merge.runtime.progress import Progress

QKV = ["to_q", "to_k", "to_v"]
ADDED = ["add_q_proj", "add_k_proj", "add_v_proj"]


def shape_of(known, name):
    (place,) = known.index.find(name)
    return place.shape


def tensors_for(known, names, rank=2, prefix="transformer."):
    """Returns random factors for some modules of a network, in diffusers' names."""
    generator = torch.Generator().manual_seed(len(names))
    tensors = {}
    for name in names:
        m, n = shape_of(known, name)
        module = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        ends = ("lora_up", "lora_down") if prefix.endswith("_") else ("lora_B", "lora_A")
        for end, size in zip(ends, ((m, rank), (rank, n)), strict=True):
            tensors[f"{module}.{end}.weight"] = torch.randn(size, generator=generator) * 0.05
    return tensors


def attention(blocks, parts, kind="transformer_blocks"):
    return [f"{kind}.{block}.attn.{part}" for block in blocks for part in parts]


@pytest.mark.parametrize("prefix", ["transformer.", "lora_transformer_", "lycoris_", ""])
@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("flux_dev", attention([3], QKV, "single_transformer_blocks")),
        ("flux_dev", ["transformer_blocks.18.ff.net.0.proj"]),
        ("flux_dev", attention(range(19), QKV)),  # Qwen-Image has these names, but 60 blocks
        ("qwen_image", attention([0], QKV)),  # rather than one of the 19 blocks of Flux
        ("qwen_image", attention(range(60), QKV + ADDED)),
        ("sd3_medium", attention([0, 23], QKV + ADDED)),
        ("sd35_large", attention([37], ADDED)),
        ("sd35_medium", ["transformer_blocks.12.attn2.to_out.0"]),
        ("lumina_2", attention([25], QKV, "layers")),
        ("z_image", ["layers.29.attention.to_out.0"]),
        ("flux2_klein_4b", attention([0], ["to_qkv_mlp_proj"], "single_transformer_blocks")),
        ("flux2_klein_9b", attention([7], QKV)),
        ("flux2_dev", ["transformer_blocks.0.ff.linear_in"]),
    ],
)
def test_a_network_is_recognised_by_some_names(tmp_path, name, modules, prefix):
    known = known_family(name)
    path = write(tmp_path / "a.safetensors", tensors_for(known, modules, prefix=prefix), {})
    facts = inspect_lora(path)
    assert (facts.problem, facts.family, facts.rank) == ("", known.family.title, 2)
    assert recognise(read_header(path))[0] is known


def test_chroma_is_told_by_its_metadata(tmp_path):
    known = known_family("chroma")
    tensors = tensors_for(known, attention([0], QKV, "single_transformer_blocks"))
    path = write(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "chroma"})
    assert recognise(read_header(path))[0] is known


def test_a_name_that_no_network_has_is_refused_by_its_key(tmp_path):
    known = known_family("flux_dev")
    tensors = tensors_for(known, attention([0], QKV, "single_transformer_blocks"))
    tensors = {key.replace("attn.to_v", "attn.to_w"): x for key, x in tensors.items()}
    with pytest.raises(FamilyError, match=r"1 of 3 modules that Flux dev does not") as caught:
        recognise(read_header(write(tmp_path / "a.safetensors", tensors, {})))
    assert caught.value.key == "transformer.single_transformer_blocks.0.attn.to_w"
    assert "leave the file out" in caught.value.hint


def test_a_shape_that_contradicts_is_refused_by_its_key(tmp_path):
    known = known_family("flux_dev")
    tensors = tensors_for(known, attention([0], QKV, "single_transformer_blocks"))
    key = "transformer.single_transformer_blocks.0.attn.to_k"
    tensors[f"{key}.lora_B.weight"] = torch.ones(9216, 2)
    with pytest.raises(FamilyError, match=r"to_k of 9216 x 3072, expected 3072 x 3072") as caught:
        recognise(read_header(write(tmp_path / "a.safetensors", tensors, {})))
    assert caught.value.key == key


def test_a_factor_that_is_shared_is_written_once(tmp_path):
    known = known_family("flux_dev")
    tensors = tensors_for(known, attention([0], QKV))
    stem = "transformer.transformer_blocks.0.attn."
    down = tensors[f"{stem}to_q.lora_A.weight"]
    tensors |= {f"{stem}{part}.lora_A.weight": down.clone() for part in QKV}
    said = {"ss_base_model_version": "flux1"}  # without it these few could be of Qwen-Image
    path = write(tmp_path / "a.safetensors", tensors, said)
    combined = run_combine(CombineRequest((path,), to=tmp_path / "sum.safetensors"), Progress())
    assert combined.rank == 2
    written = load_file(combined.path)
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    up, down_again = (written[f"{module}.lora_{end}.weight"] for end in ("up", "down"))
    expected = torch.cat([tensors[f"{stem}{part}.lora_B.weight"] for part in QKV]) @ down[:, :50]
    assert float(written[f"{module}.alpha"]) == 2  # of the file, by the ranks that it needs
    torch.testing.assert_close(up @ down_again[:, :50], expected, atol=1e-6, rtol=0)


def test_the_sum_with_a_lora_in_the_familys_names_is_exact(tmp_path):
    """Rows of `linear1` are query, key, value, MLP: flux_to_diffusers in ComfyUI's utils.py."""
    known = known_family("flux_dev")
    split = tensors_for(known, attention([2], ["to_q", "to_v"], "single_transformer_blocks"))
    own = tensors_for(known, ["single_blocks.2.linear1"], prefix="lora_unet_")
    paths = [
        write(tmp_path / f"{name}.safetensors", x, {})
        for name, x in {"split": split, "own": own}.items()
    ]
    request = CombineRequest(tuple(paths), (1.0, -0.5), to=tmp_path / "sum.safetensors")
    written = load_file(run_combine(request, Progress()).path)
    module = "lora_unet_single_blocks_2_linear1"
    assert {key.partition(".")[0] for key in written} == {module}

    columns = np.arange(0, 3072, 97)  # every matrix whole would take seconds
    expected = np.zeros((21504, len(columns)))
    for place, part in enumerate(QKV):
        stem = f"transformer.single_transformer_blocks.2.attn.{part}.lora"
        if f"{stem}_B.weight" in split:
            up, down = (split[f"{stem}_{end}.weight"].double().numpy() for end in "BA")
            expected[place * 3072 : (place + 1) * 3072] = up @ down[:, columns]
    up, down = (own[f"{module}.lora_{end}.weight"].double().numpy() for end in ("up", "down"))
    expected -= 0.5 * up @ down[:, columns]
    up, down = (written[f"{module}.lora_{end}.weight"].double().numpy() for end in ("up", "down"))
    scale = float(written[f"{module}.alpha"]) / len(down)
    np.testing.assert_allclose(up @ down[:, columns] * scale, expected, atol=1e-6)
