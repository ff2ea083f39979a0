"""Merges from end to end of small checkpoints of every family, in every precision, spelling and completeness."""

import json

import pytest
import torch
from narrow_layouts import NARROW, UNET, few, one, other_way_round, parts, renamed, two, xl
from random_checkpoints import (
    CLIP,
    SPREAD,
    added,
    files,
    merged_exactly,
    metadata,
    misses,
    state,
)
from safetensors.torch import load_file
from tiny_family import layers_of, merge, recipe

from hyper_merge.errors import FamilyError, MismatchError
from hyper_merge.operations.extract.extract import ExtractRequest, run_extract
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.operations.restore.request import RestoreRequest
from hyper_merge.operations.restore.restore import run_restore
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.report_text import format_report
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.family_layouts import text_encoders_layout


@pytest.mark.parametrize(
    "name",
    [
        *("sd1_inpainting", "sd2", "sdxl_refiner", "sd3_medium", "sd35_medium", "flux_dev"),
        *("chroma", "flux2_klein", "z_image", "lumina_2", "anima", "qwen_image_edit_2511", "wan"),
    ],
)
def test_full_rank_restores_every_layer(tmp_path, name):
    shapes = few(NARROW[name]())
    if name in ("sd3_medium", "flux_dev"):
        shapes |= text_encoders_layout(8, 16 * (name == "sd3_medium"), 64, 20)
    models = files(tmp_path, state(shapes, 1), state(shapes, 2))
    merged = merged_exactly(models, tmp_path)
    assert set(load_file(merged.place.hyper_model)) == set(shapes)
    if name in SAID:
        require_said(name, merged.loras[0])
    for path, row in zip(models, merged.report.checkpoints, strict=True):
        assert row.explained == pytest.approx(1, abs=1e-6)
        assert max(misses(merged, path, row)) < 2e-3  # the bases are kept in float16


SAID = {  # of a family by its LoRAs' metadata and by their cards
    "sd2": ({"ss_base_model_version": "sd_v2", "ss_v2": "True"}, "SD2"),
    "sdxl_refiner": ({"modelspec.architecture": "stable-diffusion-xl-v1-refiner/lora"}, "SDXL"),
    "sd35_large": ({"ss_base_model_version": "5-large", "ss_v2": "False"}, "Unknown"),
    "flux_schnell": ({"modelspec.architecture": "flux-1-schnell/lora"}, "Flux"),
    "z_image": ({"modelspec.architecture": "Z-Image/lora"}, "Unknown"),
}


def require_said(name, lora):
    """Requires that a LoRA says of which family it is."""
    expected, word = SAID[name]
    assert expected.items() <= metadata(lora).items()
    alphas = [key for key in load_file(lora) if key.endswith(".alpha")]
    assert (not alphas) == name.startswith(("sd3", "z_image"))
    card = json.loads(lora.with_suffix(".json").read_text())
    assert card["sd version"] == word


@pytest.mark.parametrize("name", ["sd35_large", "flux_schnell"])  # the others: above
def test_loras_say_of_which_family_they_are(tmp_path, name):
    shapes = NARROW[name]()
    models = files(tmp_path, state(shapes, 1), state(shapes, 2))
    (lora,) = merged_exactly(models, tmp_path, ranks=(2,), dtype="float16").loras
    require_said(name, lora)


def test_a_single_number_in_the_network_is_averaged(tmp_path):
    shapes = {**few(one()), UNET + "scale": ()}
    models = files(tmp_path, *(state(shapes, seed) for seed in (1, 2, 3)))
    merged = merge(models[:2], tmp_path / "models", dtype="float32")
    numbers = [load_file(path)[UNET + "scale"] for path in (*models[:2], merged.place.hyper_model)]
    assert numbers[2] == pytest.approx(float(numbers[0] + numbers[1]) / 2)
    folders = Folders.under(tmp_path / "models")
    run_fit(FitRequest("mix", models[2]), folders, Progress())
    run_restore(RestoreRequest("mix", {"a": 1.0}), folders, Progress())
    run_extract(ExtractRequest(*models[:2], rank=1), folders, Progress())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_averaged_exactly(tmp_path, dtype):
    shapes = parts(few(one()), UNET + "input_blocks", UNET + "middle", CLIP + "encoder.layers.0.")
    models = files(tmp_path, *(state(shapes, seed, dtype=dtype) for seed in (1, 2)))
    merged = merged_exactly(models, tmp_path)
    average = load_file(merged.place.hyper_model)
    first, second = (load_file(path) for path in models)
    for key, mean in average.items():
        assert torch.equal(mean, (first[key].float() + second[key].float()) / 2)
    assert merged.report.loss < 1e-6


def test_scaled_8_bit_floats_are_averaged_unscaled(tmp_path):
    key = UNET + "double_blocks.0.img_mlp.0.weight"
    stem = key.removesuffix("weight")
    plain, scaled = (state(NARROW["flux_dev"](), seed) for seed in (1, 2))
    scaled[key] = scaled[key].to(torch.float8_e4m3fn)
    scale = {stem + "scale_weight": torch.tensor(0.25), UNET + "scaled_fp8": torch.zeros(0)}
    models = files(tmp_path, {**scaled, **scale}, plain)
    average = load_file(merged_exactly(models, tmp_path).place.hyper_model)
    assert set(average) == set(plain)
    expected = (plain[key] + 0.25 * scaled[key].float()) / 2
    torch.testing.assert_close(average[key], expected)


def test_flux_as_comfyui_saves_it_merges_with_the_usual_one(tmp_path):
    usual, other = (state(NARROW["flux_dev"](), seed) for seed in (1, 2))
    spelt = {key.replace("_norm.scale", "_norm.weight"): t for key, t in other.items()}
    assert spelt.keys() != usual.keys()
    merged = merged_exactly(files(tmp_path, spelt, usual), tmp_path)
    average = load_file(merged.place.hyper_model)
    assert set(average) == set(usual)
    for key in average:
        torch.testing.assert_close(average[key], (usual[key] + other[key]) / 2)


def test_old_text_encoder_keys_merge_with_new_ones(tmp_path):
    new, old = (state(few(one()), seed, dtype=torch.float16) for seed in (1, 2))
    spelt = renamed(old, CLIP, CLIP.removesuffix("text_model."))
    merged = merged_exactly(files(tmp_path, spelt, new), tmp_path)
    average = load_file(merged.place.hyper_model)
    assert set(average) == set(new)
    for key in average:
        if not key.startswith("first_stage_model.") and not key.endswith("position_ids"):
            mean = (new[key].float() + old[key].float()) / 2
            torch.testing.assert_close(average[key], mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("prefix", [UNET, ""])
def test_unets_alone_are_merged_as_unets(tmp_path, prefix):
    shapes = renamed(parts(few(one(context=768)), UNET), UNET, prefix)
    models = files(tmp_path, *(state(shapes, seed, dtype=torch.float16) for seed in (1, 2)))
    merged = merged_exactly(models, tmp_path, ranks=(4,))
    assert set(load_file(merged.place.hyper_model)) == {
        UNET + key.removeprefix(UNET) for key in shapes
    }
    (lora,) = merged.loras
    assert len(load_file(lora)) == 70 * 3
    row = format_report(merged.report).splitlines()[3].split()
    assert (row[0], row[4]) == ("a", "-")  # nothing to explain in a text encoder


def test_fused_attention_is_whole_in_a_lora(tmp_path):
    layer = "cond_stage_model.model.transformer.resblocks.3.attn."
    shapes = few(two())
    first, second = state(shapes, 1), state(shapes, 2)
    other = layer.replace(".3.", ".4.")
    for key in first:
        if key.startswith(other):
            second[key] = first[key]  # an attention without differences
    fused = layer + "in_proj_weight"
    width = shapes[fused][0] // 3
    second[fused][width:] = first[fused][width:]  # another that differs in its query alone,
    second[layer + "out_proj.weight"] = first[layer + "out_proj.weight"]
    second[fused][:width] += 3 * torch.randn(
        width, width, generator=torch.Generator().manual_seed(7)
    )
    even, adaptive = (
        merge(
            files(tmp_path / how, first, second),
            tmp_path / how,
            ranks=(2, 1),
            allocation=how,
            layer_weights="plain",
        )
        for how in ("even", "adaptive")
    )
    prefix = next(y.module for y in layers_of(even.place.hyper_model) if y.key == fused)
    prefix = prefix.removesuffix("q_proj")
    names = [prefix + end for end in ("q_proj", "k_proj", "v_proj", "out_proj")]
    for path in adaptive.loras:
        tensors = load_file(path)
        assert not [key for key in tensors if prefix.replace("_3_", "_4_") in key]
        there = [m for m in names if m + ".lora_up.weight" in tensors]
        assert there in ([], names)
        if there:
            assert added(tensors, names[0]).any()
            assert not any(added(tensors, module).any() for module in names[1:])
    assert prefix + "q_proj.lora_up.weight" in load_file(adaptive.loras[0])
    sizes = [sum(path.stat().st_size for path in result.loras) for result in (even, adaptive)]
    assert sizes[1] <= sizes[0]
    assert adaptive.report.loss < even.report.loss


def test_files_with_differing_parts_are_refused(tmp_path):
    whole = one()
    without_vae = parts(whole, UNET, CLIP)
    alone = parts(one(context=768), UNET)
    models = files(
        tmp_path,
        *(state(shapes, 1, dtype=torch.float16) for shapes in (without_vae, whole, whole, alone)),
    )
    with pytest.raises(MismatchError) as refusal:
        merge(models, tmp_path / "models")
    assert str(refusal.value) == (
        "2 hold text encoder, UNet and VAE, 1 holds text encoder and UNet, 1 holds UNet:"
        " b.safetensors, c.safetensors / a.safetensors / d.safetensors;"
        " choose files with the same parts"
    )


def test_mixed_families_are_refused(tmp_path):
    shapes = [xl(), two(), xl(), NARROW["flux_dev"]()]
    models = files(tmp_path, *(state(layout, 1, dtype=torch.float16) for layout in shapes))
    with pytest.raises(
        MismatchError, match=r"2 are Stable Diffusion XL, 1 is Stable Diffusion 2.x, 1"
    ):
        merge(models, tmp_path / "models")


def test_sd2_file_of_another_tool_merges(tmp_path):
    """The other shape around the transformers; what never runs is a stand-in, or is missing."""
    usual, other = (state(few(two()), seed, dtype=torch.float16) for seed in (1, 2))
    usual, other = (
        {**tensors, SPREAD: tensors[SPREAD].float().mul(0.5).half()} for tensors in (usual, other)
    )
    for key, shape in other_way_round(few(two())).items():
        other[key] = other[key].reshape(shape)
    projection = "cond_stage_model.model.text_projection"
    other[projection] = torch.ones_like(other[projection])
    other = {key: tensor for key, tensor in other.items() if ".resblocks.23." not in key}
    models = files(tmp_path, usual, other)
    merged = merged_exactly(models, tmp_path)
    average = load_file(merged.place.hyper_model)
    assert {key: tuple(tensor.shape) for key, tensor in average.items()} == few(two())
    assert torch.equal(average[projection], usual[projection])
    assert max(misses(merged, models[0], merged.report.checkpoints[0])) < 2e-3
    assert merged.report.loss < 1e-6


def test_training_averages_are_left_out(tmp_path):
    """One of 7 GB with training averages beside the weights, one of 4 GB without."""
    plain = state(one(), 1, dtype=torch.float16)
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor.clone()
        for key, tensor in plain.items()
        if key.startswith(UNET)
    }
    steps = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    models = files(tmp_path, {**plain, **averages, **steps}, plain)
    assert len(load_file(models[0])) == len(plain) + 688
    preflight = run_preflight(recipe(models, tmp_path / "models"))
    assert set(preflight.inputs.outputs()) == set(plain)


def test_damaged_variant_is_refused_before_writing(tmp_path):
    shapes = two()
    models = files(tmp_path, state(shapes, 1, dtype=torch.float16), {"a.absmax": torch.zeros(2)})
    with pytest.raises(FamilyError, match=r"b\.safetensors is a 4-bit model .*: use its fp16"):
        merge(models, tmp_path / "models")
    assert not (tmp_path / "models").exists()
