"""LoRA files add what was planned, by the rules of the hosts, and say what they are."""

import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from hyper_merge.checkpoints.architectures.families.sd1 import SD1
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.checkpoints.io.hashes import tensor_data_sha256
from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.errors import NonFiniteError, OutputError
from hyper_merge.loras.card_images import hyper_model_picture, lora_picture
from hyper_merge.loras.cards import format_card, stage_checkpoint_card
from hyper_merge.loras.lora_file import (
    as_hosts_apply,
    as_lora_weights,
    lora_tensors,
    stored_factors,
    write_lora,
)
from hyper_merge.loras.metadata import (
    Lineage,
    LoraFile,
    SourceRecord,
    checkpoint_metadata,
    lora_metadata,
)

LINEAR = Layer("te.weight", "lora_te_q_proj", "text_encoder", (6, 5))
POINT = Layer("in.weight", "lora_unet_proj_in", "unet", (4, 3, 1, 1))
CONV = Layer("conv.weight", "lora_unet_conv1", "unet", (7, 2, 3, 3))
LAYERS = (LINEAR, POINT, CONV)

SOURCES = (
    SourceRecord("a.safetensors", "a" * 64, "aaaaaaaa", {}),
    SourceRecord(
        "b.safetensors",
        "b" * 64,
        "bbbbbbbb",
        {
            "sd_merge_recipe": '{"type": "webui", "multiplier": 0.5}',
            "sd_merge_models": '{"c0": {"name": "c", "legacy_hash": "c", "sd_merge_recipe": null}}',
            "ss_output_name": "not ours",
        },
    ),
)
LINEAGE = Lineage("mix", SD1, {"name": "mix", "ranks": "4, 2"}, SOURCES, "2025-05-06T07:08:09")
FILE = LoraFile(LINEAGE, "mix", 0, 2, 4, {"a": 0.9123, "b": -1.0}, 0.75)


def host_delta(tensors, module, shape):
    """Returns what a host adds at multiplier 1, as kohya networks/lora.py and A1111 network_lora."""
    up = tensors[f"{module}.lora_up.weight"].double()
    down = tensors[f"{module}.lora_down.weight"].double()
    scale = tensors[f"{module}.alpha"].item() / down.shape[0]
    if down.ndim == 2:
        return up @ down * scale
    if down.shape[2:] == (1, 1):
        return ((up[:, :, 0, 0] @ down[:, :, 0, 0]) * scale).reshape(shape)
    composed = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up)
    return composed.permute(1, 0, 2, 3) * scale


def factors_of(rank_of, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.module: (
            torch.randn(layer.m, rank, generator=generator),
            torch.randn(rank, layer.n, generator=generator),
        )
        for layer, rank in zip(LAYERS, rank_of, strict=True)
        if rank
    }


def as_stored(layers, factors, file=FILE):
    alpha = file.rank if file.lineage.family.lora_alpha else None
    return {
        layer.module: stored_factors(layer, *factors[layer.module], alpha, file.dtype)
        for layer in layers
        if layer.module in factors
    }


def write(path, factors, file=FILE, **options):
    with FileTransaction(**options) as outputs:
        write_lora(outputs, path, LAYERS, as_stored(LAYERS, factors, file), file)


def metadata_of(path):
    with safe_open(path, "pt") as stream:
        return stream.metadata()


def test_each_module_has_the_shapes_that_loaders_want():
    expected = {
        "lora_te_q_proj.lora_down.weight": (4, 5),
        "lora_te_q_proj.lora_up.weight": (6, 4),
        "lora_te_q_proj.alpha": (),
        "lora_unet_conv1.lora_down.weight": (2, 2, 3, 3),
        "lora_unet_conv1.lora_up.weight": (7, 2, 1, 1),
        "lora_unet_conv1.alpha": (),
    }
    declared = lora_tensors(LAYERS, (4, 0, 2), torch.bfloat16, 4)
    assert declared == {key: TensorInfo(torch.bfloat16, s) for key, s in expected.items()}
    assert lora_tensors([POINT], [3], torch.float16, 3)[
        "lora_unet_proj_in.lora_down.weight"
    ].shape == (3, 3, 1, 1)


@pytest.mark.parametrize(
    ("alpha", "dtype", "stored"),
    [
        (128, torch.float16, torch.float16),
        (2048, torch.float16, torch.float16),
        (2049, torch.float16, torch.float32),
        (128, torch.bfloat16, torch.bfloat16),
        (257, torch.bfloat16, torch.float32),
    ],
)
def test_alpha_is_stored_exactly(alpha, dtype, stored):
    tensors = as_lora_weights(LINEAR, torch.ones(6, 1), torch.ones(1, 5), alpha, dtype)
    value = tensors["lora_te_q_proj.alpha"]
    declared = lora_tensors([LINEAR], [1], dtype, alpha)["lora_te_q_proj.alpha"]
    assert (value.item(), value.dtype, value.shape) == (alpha, stored, ())
    assert declared.dtype == stored


@settings(deadline=None, max_examples=60)  # a busy machine is no failure
@given(
    layer=st.sampled_from(LAYERS),
    rank=st.integers(1, 4),
    alpha=st.integers(1, 128),
    seed=st.integers(0, 99),
)
def test_a_host_adds_the_product_whatever_the_alpha(layer, rank, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(layer.m, rank, generator=generator)
    down = torch.randn(rank, layer.n, generator=generator)
    tensors = as_lora_weights(layer, up, down, alpha, torch.float32)
    delta = host_delta(tensors, layer.module, layer.shape)
    planned = (up.double() @ down.double()).reshape(layer.shape)
    torch.testing.assert_close(delta, planned, atol=1e-5, rtol=1e-5)
    declared = lora_tensors([layer], [rank], torch.float32, alpha)
    assert {key: TensorInfo(t.dtype, tuple(t.shape)) for key, t in tensors.items()} == declared


def test_both_factors_share_the_rank_alpha_ratio():
    tensors = as_lora_weights(LINEAR, torch.ones(6, 1), torch.ones(1, 5), 4, torch.float32)
    assert torch.equal(tensors["lora_te_q_proj.lora_up.weight"], torch.full((6, 1), 0.5))
    assert torch.equal(tensors["lora_te_q_proj.lora_down.weight"], torch.full((1, 5), 0.5))


@pytest.mark.parametrize("layer", LAYERS)
def test_rounded_factors_are_what_hosts_add(layer):
    up, down = factors_of((3, 3, 3))[layer.module]
    rounded = as_hosts_apply(*stored_factors(layer, up, down, 128), 128)
    tensors = as_lora_weights(layer, up, down, 128)
    delta = host_delta(tensors, layer.module, layer.shape).reshape(layer.m, layer.n)
    torch.testing.assert_close(
        rounded[0].double() @ rounded[1].double(), delta, atol=1e-6, rtol=1e-6
    )
    assert not torch.equal(rounded[0], up)
    again = as_lora_weights(layer, *rounded, 128)
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_a_factor_that_half_precision_cannot_hold_is_refused():
    up, down = torch.ones(6, 2), torch.ones(2, 5)
    down[1, 2] = -7e4
    message = (
        "lora_te_q_proj: a factor reaches 7e+04, float16 files hold at most 60000;"
        " choose lora_dtype bfloat16 or float32"
    )
    with pytest.raises(NonFiniteError, match=re.escape(message)):
        as_lora_weights(LINEAR, up, down, 2)
    assert as_lora_weights(LINEAR, up, down, 2, torch.bfloat16)


@pytest.mark.parametrize("wrong", [float("nan"), float("-inf")])
def test_a_factor_that_is_no_number_is_refused(wrong):
    up, down = torch.ones(6, 2), torch.ones(2, 5)
    up[0, 0] = wrong
    with pytest.raises(NonFiniteError, match=f"lora_te_q_proj: a factor holds {abs(wrong)}"):
        as_lora_weights(LINEAR, up, down, 2, torch.float32)


def test_the_file_holds_one_alpha_and_the_planned_deltas(tmp_path):
    factors = factors_of((4, 3, 0))
    path = tmp_path / "mix_0-4.safetensors"
    write(path, factors)
    tensors = load_file(path)
    assert {key.partition(".")[0] for key in tensors} == {LINEAR.module, POINT.module}
    assert {key.partition(".")[2] for key in tensors} == {
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    }
    assert {t.item() for key, t in tensors.items() if key.endswith(".alpha")} == {4.0}
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    for layer in (LINEAR, POINT):
        up, down = factors[layer.module]
        planned = (up @ down).reshape(layer.shape).double()
        torch.testing.assert_close(
            host_delta(tensors, layer.module, layer.shape), planned, atol=1e-2, rtol=1e-2
        )


def test_the_file_has_the_hash_of_hosts(tmp_path):
    path = tmp_path / "mix_0-4.safetensors"
    write(path, factors_of((4, 3, 2)))
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    expected = hashlib.sha256(content[header:]).hexdigest()
    assert metadata_of(path)["sshs_model_hash"] == expected == tensor_data_sha256(path)


def test_a_bfloat16_file_with_wide_alpha_hashes_right(tmp_path):
    path = tmp_path / "mix_0-301.safetensors"
    write(path, factors_of((4, 3, 2)), replace(FILE, rank=301, dtype=torch.bfloat16))
    assert metadata_of(path)["sshs_model_hash"] == tensor_data_sha256(path)
    types = {key.rpartition(".")[2]: t.dtype for key, t in load_file(path).items()}
    assert types == {"alpha": torch.float32, "weight": torch.bfloat16}


def test_the_metadata_name_family_network_and_merge():
    metadata = lora_metadata(FILE, "mix_0-4", "f" * 64)
    assert all(isinstance(value, str) for value in metadata.values())
    own_keys = {key for key in metadata if key.startswith("hyper_merge.")}
    assert {key: value for key, value in metadata.items() if key not in own_keys} == {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4.0",
        "ss_network_args": '{"conv_dim": "4", "conv_alpha": "4.0"}',
        "ss_output_name": "mix_0-4",
        "ss_sd_model_name": "mix.safetensors",
        "sshs_model_hash": "f" * 64,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "mix_0-4",
        "modelspec.resolution": "512x512",
        "modelspec.date": "2025-05-06T07:08:09",
        "modelspec.prediction_type": "epsilon",
        "modelspec.merged_from": "a.safetensors, b.safetensors",
    }
    assert {metadata[f"hyper_merge.{key}"] for key in ("format_version", "index")} == {"1", "0"}
    assert metadata["hyper_merge.kind"] == "lora"
    assert metadata["hyper_merge.rank"] == "4"
    assert float(metadata["hyper_merge.explained"]) == 0.75
    assert json.loads(metadata["hyper_merge.multipliers"]) == {"a": 0.9123, "b": -1.0}
    assert json.loads(metadata["hyper_merge.recipe"]) == {"name": "mix", "ranks": "4, 2"}
    assert json.loads(metadata["hyper_merge.lineage"]) == [
        {"name": "a.safetensors", "sha256": "a" * 64, "legacy_hash": "aaaaaaaa"},
        {"name": "b.safetensors", "sha256": "b" * 64, "legacy_hash": "bbbbbbbb"},
    ]


@pytest.mark.parametrize(("ranks", "dim"), [((4, 4, 4), "4"), ((4, 3, 4), "Dynamic")])
def test_ranks_that_differ_by_layer_are_called_dynamic(tmp_path, ranks, dim):
    path = tmp_path / "x.safetensors"
    write(path, factors_of(ranks))
    metadata = metadata_of(path)
    assert metadata["ss_network_dim"] == dim
    assert json.loads(metadata["ss_network_args"])["conv_dim"] == dim
    assert metadata["ss_network_alpha"] == "4.0"


def test_multipliers_in_the_metadata_lose_no_digit():
    exact = 0.1 + 0.2
    metadata = lora_metadata(replace(FILE, multipliers={"é": exact}), "x", "")
    assert json.loads(metadata["hyper_merge.multipliers"]) == {"é": exact}


def test_the_hyper_model_carries_its_lineage_on():
    metadata = checkpoint_metadata(LINEAGE)
    assert all(isinstance(value, str) for value in metadata.values())
    assert not any(key.startswith(("ss_", "sshs_")) for key in metadata)
    assert json.loads(metadata["sd_merge_recipe"]) == {
        "type": "hyper-merge",
        "name": "mix",
        "ranks": "4, 2",
    }
    recipe = {"type": "webui", "multiplier": 0.5}
    assert json.loads(metadata["sd_merge_models"]) == {
        "c0": {"name": "c", "legacy_hash": "c", "sd_merge_recipe": None},
        "a" * 64: {"name": "a.safetensors", "legacy_hash": "aaaaaaaa", "sd_merge_recipe": None},
        "b" * 64: {"name": "b.safetensors", "legacy_hash": "bbbbbbbb", "sd_merge_recipe": recipe},
    }
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.title"] == "mix"
    assert metadata["hyper_merge.kind"] == "hyper-model"


@pytest.mark.parametrize("foreign", ["", "{", "[1]", "null", "3"])
def test_a_source_with_unreadable_lineage_is_still_named(foreign):
    metadata = {"sd_merge_models": foreign, "sd_merge_recipe": foreign}
    lineage = replace(LINEAGE, sources=(SourceRecord("d", "d" * 64, "d", metadata),))
    models = json.loads(checkpoint_metadata(lineage)["sd_merge_models"])
    assert models == {"d" * 64: {"name": "d", "legacy_hash": "d", "sd_merge_recipe": None}}


def test_the_card_shows_the_version_and_each_checkpoints_tag(tmp_path):
    path = tmp_path / "mix_0-4.safetensors"
    write(path, factors_of((4, 4, 4)))
    text = (tmp_path / "mix_0-4.json").read_text(encoding="utf-8")
    assert text == format_card(FILE, "mix_0-4")
    content = json.loads(text)
    assert content == {
        "description": "LoRA 1 of 2 of mix, rank 4. Goes with mix and its other LoRAs;"
        " multipliers in the notes.",
        "sd version": "SD1",
        "activation text": "",
        "preferred weight": 1.0,
        "negative text": "",
        "notes": "a: <lora:mix_0-4:0.91230>\nb: <lora:mix_0-4:-1.00000>",
    }


def test_text_multipliers_are_in_metadata_and_card():
    file = replace(FILE, text_multipliers={"a": 0.25, "b": 1.0})
    assert json.loads(lora_metadata(file, "x", "")["hyper_merge.text_multipliers"]) == {
        "a": 0.25,
        "b": 1.0,
    }
    assert json.loads(format_card(file, "mix_0-4"))["notes"] == (
        "a: <lora:mix_0-4:0.25000:0.91230>\nb: <lora:mix_0-4:1.00000:-1.00000>"
    )
    assert "hyper_merge.text_multipliers" not in lora_metadata(FILE, "x", "")


def test_the_only_lora_of_a_merge_needs_no_others():
    description = json.loads(format_card(replace(FILE, count=1), "mix_0-4"))["description"]
    assert "other LoRAs" not in description


def test_the_cards_picture_lies_where_both_webuis_look_first(tmp_path):
    path = tmp_path / "mix.v1_0-4.safetensors"
    write(path, factors_of((4, 4, 4)))
    picture = (tmp_path / "mix.v1_0-4.png").read_bytes()
    assert picture == lora_picture("mix", 0, 2, 4, FILE.multipliers)


def test_the_hyper_models_card_names_its_checkpoints(tmp_path):
    with FileTransaction() as outputs:
        stage_checkpoint_card(outputs, tmp_path / "mix.safetensors", LINEAGE, overwrite=False)
    assert json.loads((tmp_path / "mix.json").read_text(encoding="utf-8")) == {
        "description": "Average of 2 checkpoints, which LoRAs of the same merge bring back.",
        "notes": "a\nb",
    }
    assert (tmp_path / "mix.png").read_bytes() == hyper_model_picture("mix", ["a", "b"])


def test_the_users_card_stays_unless_overwriting(tmp_path):
    mine = tmp_path / "mix.png"
    mine.write_bytes(b"mine")
    for overwrite, stays in ((False, True), (True, False)):
        with FileTransaction(overwrite=overwrite) as outputs:
            path = tmp_path / "mix.safetensors"
            stage_checkpoint_card(outputs, path, LINEAGE, overwrite=overwrite)
            (tmp_path / "mix.json").unlink(missing_ok=True)
        assert (mine.read_bytes() == b"mine") == stays
    assert (tmp_path / "mix.json").exists()


def test_a_refused_lora_changes_no_file(tmp_path):
    factors = factors_of((4, 4, 4))
    factors[CONV.module][0][0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        write(tmp_path / "new" / "x.safetensors", factors)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.json").write_text("mine")
    with pytest.raises(OutputError):
        write(tmp_path / "x.safetensors", factors_of((4, 4, 4)))
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    write(tmp_path / "x.safetensors", factors_of((4, 4, 4)), overwrite=True)
    assert json.loads((tmp_path / "x.json").read_text())["sd version"] == "SD1"


ATTENTION = (
    Layer("in_proj_weight", "te_q", "text_encoder", (4, 4), (0, 4), "attention"),
    Layer("in_proj_weight", "te_k", "text_encoder", (4, 4), (4, 8), "attention"),
    Layer("in_proj_weight", "te_v", "text_encoder", (4, 4), (8, 12), "attention"),
    Layer("out.weight", "te_out", "text_encoder", (4, 4), None, "attention"),
)


def test_an_incomplete_attention_is_filled_with_zeros(tmp_path):
    layers = (*ATTENTION, LINEAR)
    factors = {"te_k": (torch.ones(4, 2), torch.ones(2, 4)), "te_v": (torch.ones(4, 0),) * 2}
    path = tmp_path / "x.safetensors"
    with FileTransaction() as outputs:
        write_lora(outputs, path, layers, as_stored(layers, factors), FILE)
    tensors = load_file(path)
    ends = (".lora_up.weight", ".lora_down.weight", ".alpha")
    assert set(tensors) == {f"te_{part}{end}" for part in ("q", "k", "v", "out") for end in ends}
    for part in ("q", "v", "out"):
        assert tensors[f"te_{part}.lora_up.weight"].shape == (4, 1)
        assert not host_delta(tensors, f"te_{part}", (4, 4)).any()
    delta = host_delta(tensors, "te_k", (4, 4))
    torch.testing.assert_close(delta, torch.full_like(delta, 2.0), atol=2e-3, rtol=0)
    declared = lora_tensors(layers, (0, 2, 0, 0, 0), torch.float16, 4)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        key: info.shape for key, info in declared.items()
    }


def test_an_attention_that_no_block_changes_is_left_out():
    assert lora_tensors(ATTENTION, (0, 0, 0, 0), torch.float16, 4) == {}


def test_a_family_without_alphas_adds_the_plain_product(tmp_path):
    up, down = torch.randn(6, 2), torch.randn(2, 5)
    stored = as_lora_weights(LINEAR, up, down, None, torch.float32)
    assert set(stored) == {"lora_te_q_proj.lora_up.weight", "lora_te_q_proj.lora_down.weight"}
    product = stored["lora_te_q_proj.lora_up.weight"] @ stored["lora_te_q_proj.lora_down.weight"]
    torch.testing.assert_close(product, up @ down)
    found_up, found_down = as_hosts_apply(
        *stored_factors(LINEAR, up, down, None, torch.float32), None
    )
    torch.testing.assert_close(found_up @ found_down, up @ down)
    family = replace(SD1, lora_alpha=False)
    file = replace(FILE, lineage=replace(LINEAGE, family=family))
    write(tmp_path / "x.safetensors", factors_of((4, 2, 2)), file)
    assert not [key for key in load_file(tmp_path / "x.safetensors") if "alpha" in key]


def test_a_flow_familys_metadata_omit_the_prediction_type():
    family = replace(SD1, modelspec_prediction_type="")
    file = replace(FILE, lineage=replace(LINEAGE, family=family))
    assert "modelspec.prediction_type" not in lora_metadata(file, "x", "0" * 64)
