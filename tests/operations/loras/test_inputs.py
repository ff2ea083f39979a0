"""LoRA files are recognised by their modules and shapes; those that do not go together are refused."""

import pytest
import torch
from lora_files import KEY, QUERY, TEXT, kohya, write, write_few, write_lora

from hyper_merge.errors import CheckpointError, FamilyError, MismatchError
from hyper_merge.operations.loras.inputs import read_loras
from hyper_merge.operations.loras.known_layers import known_family, known_names


@pytest.mark.parametrize("name", known_names())
def test_every_family_is_recognised_by_a_whole_lora(tmp_path, name):
    family = known_family(name).family
    prefix = next(part.lora_prefix for part in family.parts if part.name == "unet")
    said = {"ss_base_model_version": family.ss_base_model_version}
    path = write_few(tmp_path / "a.safetensors", name, prefix, said)
    found = read_loras([path])
    # The transformers of Flux schnell lack one end that dev has: without ends they are alike.
    assert found.known is known_family("flux_dev" if name == "flux_schnell" else name)


def test_sizes_of_one_family_do_not_go_together(tmp_path):
    paths = [
        write_few(tmp_path / f"{name}.safetensors", name, "blocks_0_self_attn_q")
        for name in ("wan_14b", "wan_1b")
    ]
    with pytest.raises(MismatchError, match=r"wan_14b.safetensors is a LoRA of Wan 14B, wan_1b"):
        read_loras(paths)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [("sd1", "attn2_to_k"), ("sd2", "attn2_to_k"), ("sdxl", "attn2_to_k"), ("sdxl", "lora_te2_")],
)
def test_few_modules_tell_families_apart(tmp_path, family, pattern):
    assert (
        read_loras([write_few(tmp_path / "a.safetensors", family, pattern)]).family.name == family
    )


def test_layers_are_those_of_any_file_in_the_order_of_the_network(tmp_path):
    one = write_lora(tmp_path / "a.safetensors", 0, modules=[KEY, QUERY])
    two = write_lora(tmp_path / "b.safetensors", 1, modules=[TEXT])
    assert [layer.module for layer in read_loras([one, two]).layers] == [TEXT, QUERY, KEY]


def test_a_fused_attention_is_completed(tmp_path):
    path = write_few(
        tmp_path / "a.safetensors", "sdxl", "lora_te2_text_model_encoder_layers_3_self_attn_q"
    )
    assert len(read_loras([path]).layers) == 4  # A1111 takes all of an attention or nothing


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (("sd1", "attn2_to_k", {}), ("sd2", "attn2_to_k", {})),
        (("sd1", "attn2_to_k", {}), ("sdxl", "attn2_to_k", {})),
        (
            ("sd2", "attn1_to_q", {"ss_base_model_version": "sd_v2"}),
            ("sd2", "attn1_to_q", {"ss_base_model_version": "sd_v2_v"}),
        ),
        (
            ("sdxl", "attn1_to_q", {"modelspec.prediction_type": "epsilon"}),
            ("sdxl", "attn1_to_q", {"modelspec.prediction_type": "v"}),
        ),
    ],
)
def test_loras_of_different_bases_are_refused_by_name(tmp_path, one, two):
    paths = [
        write_few(tmp_path / f"{name}.safetensors", *given)
        for name, given in (("one", one), ("two", two))
    ]
    with pytest.raises(MismatchError, match=r"one\.safetensors .*, two\.safetensors") as caught:
        read_loras(paths)
    assert "LoRAs of one base" in str(caught.value)


def test_other_words_for_one_base_are_taken(tmp_path):
    words = (
        {"ss_base_model_version": "sdxl_base_v0-9"},
        {"ss_base_model_version": "sdxl_base_v1-0"},
        {},
    )
    paths = [
        write_few(tmp_path / f"{place}.safetensors", "sdxl", "attn1_to_q", word)
        for place, word in enumerate(words)
    ]
    assert read_loras(paths).family.name == "sdxl"


def test_different_checkpoints_are_a_warning(tmp_path):
    paths = [
        write_few(tmp_path / f"{name}.safetensors", "sd1", "attn1_to_q", {"ss_sd_model_name": name})
        for name in ("cartoon", "photo")
    ]
    (warning,) = [text for text in read_loras(paths).warnings if "trained" in text]
    assert "cartoon" in warning
    assert "photo" in warning


def test_a_module_that_the_nearest_family_lacks_is_named(tmp_path):
    state = kohya({})
    path = write_lora(tmp_path / "a.safetensors")
    from safetensors.torch import load_file

    state = {**load_file(path), "lora_unet_extra_block.lora_up.weight": torch.ones(3, 1)}
    state["lora_unet_extra_block.lora_down.weight"] = torch.ones(1, 3)
    path = write(tmp_path / "b.safetensors", state)
    with pytest.raises(FamilyError, match=r"1 of 7 modules .* lora_unet_extra_block"):
        read_loras([path])


def test_shapes_of_no_family_are_named(tmp_path):
    state = {
        f"{KEY}.lora_up.weight": torch.ones(320, 2),
        f"{KEY}.lora_down.weight": torch.ones(2, 500),
    }
    with pytest.raises(FamilyError, match=f"{KEY} of 320 x 500.*Stable Diffusion"):
        read_loras([write(tmp_path / "a.safetensors", state)])


def test_a_checkpoint_is_no_lora(files):
    with pytest.raises(CheckpointError, match="no tensor of a LoRA"):
        read_loras(files[:1])


def test_the_same_file_twice_is_refused(tmp_path):
    path = write_lora(tmp_path / "a.safetensors")
    with pytest.raises(MismatchError):
        read_loras([path, path])
