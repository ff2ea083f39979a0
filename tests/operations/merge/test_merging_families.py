"""Merges from end to end of small checkpoints of every family, in every precision, spelling and completeness."""

import json

import pytest
import torch
import yaml
from narrow_layouts import NARROW, UNET, few, one, other_way_round, parts, renamed, two, xl
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_family import layers_of, merge, recipe

from hyper_merge.errors import FamilyError, MismatchError
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runs.report_text import format_report
from hyper_merge.synthetic.checkpoint_layouts import text_encoders_layout

CLIP = "cond_stage_model.transformer.text_model."
SPREAD = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
NARROW_SPREAD = 0.05  # of a checkpoint that predicts noise
WIDE = 64  # a rank that no layer of these files reaches


def state(shapes, seed, step=0.1, dtype=torch.float32):
    """Random numbers, those of each seed a step away from one base."""
    base, own = (torch.Generator().manual_seed(n) for n in (0, seed + 1))
    found = {}
    for key, shape in shapes.items():
        values = torch.randn(shape, generator=base) + step * torch.randn(shape, generator=own)
        values *= NARROW_SPREAD if key == SPREAD else 1.0
        found[key] = torch.arange(77)[None] if key.endswith("_ids") else values.to(dtype)
    return found


def files(folder, *states, names="abcdef"):
    folder.mkdir(exist_ok=True, parents=True)
    paths = [folder / f"{name}.safetensors" for name, _ in zip(names, states, strict=False)]
    for path, tensors in zip(paths, states, strict=True):
        save_file(tensors, path)
    return paths


def merged_exactly(models, folder, **settings):
    """A merge of two whose one LoRA is wide enough to hold all of their difference."""
    even = {"ranks": (WIDE,), "allocation": "even", "iterations": 1}
    settings = {**even, "dtype": "float32", **settings}
    return merge(models, folder / "models", **{"allocation": "even", **settings})


def added(lora, module):
    """What a host adds at multiplier 1; without an alpha, the plain product."""
    up, down = (lora[f"{module}.lora_{end}.weight"].double().flatten(1) for end in ("up", "down"))
    alpha = lora.get(f"{module}.alpha")
    return up @ down * (1.0 if alpha is None else alpha.double() / len(down))


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def misses(merged, path, row):
    """What the LoRAs of one row miss of a checkpoint's deviation, relative, by layer."""
    average, own = load_file(merged.place.hyper_model), load_file(path)
    loras = [load_file(lora) for lora in merged.loras]
    for layer in layers_of(merged.place.hyper_model):
        rows = slice(*layer.rows) if layer.rows else slice(None)
        base, wanted = (of[layer.key][rows].double().flatten(1) for of in (average, own))
        terms = zip(row.multipliers_of(layer.part), loras, strict=True)
        delta = sum(x * added(lora, layer.module) for x, lora in terms)
        yield float((base + delta - wanted).norm() / (wanted - base).norm())


@pytest.mark.parametrize(
    "name", ["sd1_inpainting", "sd2", "sdxl_refiner", "sd3_medium", "sd35_medium", "flux_dev"]
)
def test_at_full_rank_every_layer_of_a_checkpoint_comes_back(tmp_path, name):
    shapes = few(NARROW[name]())
    if name in ("sd3_medium", "flux_dev"):
        shapes |= text_encoders_layout(8, 16 * (name == "sd3_medium"), 64, 20)
    models = files(tmp_path, state(shapes, 1), state(shapes, 2))
    merged = merged_exactly(models, tmp_path)
    assert set(load_file(merged.place.hyper_model)) == set(shapes)
    for path, row in zip(models, merged.report.checkpoints, strict=True):
        assert row.explained == pytest.approx(1, abs=1e-6)
        assert max(misses(merged, path, row)) < 2e-3  # the bases are kept in float16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd2", {"ss_base_model_version": "sd_v2", "ss_v2": "True"}),
        ("sdxl_refiner", {"modelspec.architecture": "stable-diffusion-xl-v1-refiner/lora"}),
        ("sd35_large", {"ss_base_model_version": "5-large", "ss_v2": "False"}),
        ("flux_schnell", {"modelspec.architecture": "flux-1-schnell/lora"}),
    ],
)
def test_loras_say_of_which_family_they_are(tmp_path, name, expected):
    shapes = few(NARROW[name]())
    models = files(tmp_path, state(shapes, 1), state(shapes, 2))
    (lora,) = merged_exactly(models, tmp_path, ranks=(2,), dtype="float16").loras
    assert expected.items() <= metadata(lora).items()
    alphas = [key for key in load_file(lora) if key.endswith(".alpha")]
    assert (not alphas) == name.startswith("sd3")
    card = json.loads(lora.with_suffix(".json").read_text())
    words = {"sd2": "SD2", "sdxl_refiner": "SDXL", "flux_schnell": "Flux", "sd35_large": "Unknown"}
    assert card["sd version"] == words[name]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_averaged_in_their_exact_values(tmp_path, dtype):
    shapes = parts(one(), UNET + "input_blocks", UNET + "middle", CLIP + "encoder.layers.0.")
    models = files(tmp_path, *(state(shapes, seed, dtype=dtype) for seed in (1, 2)))
    merged = merged_exactly(models, tmp_path)
    average = load_file(merged.place.hyper_model)
    first, second = (load_file(path) for path in models)
    for key, mean in average.items():
        assert torch.equal(mean, (first[key].float() + second[key].float()) / 2)
    assert merged.report.loss < 1e-6


def test_scaled_8_bit_floats_are_averaged_in_their_real_values(tmp_path):
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


def test_old_text_encoder_keys_merge_with_new_ones_and_are_written_new(tmp_path):
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
    assert (row[0], row[3]) == ("a", "-")  # nothing to explain in a text encoder


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("sd2", "cond_stage_model.model.transformer.resblocks.3.attn."),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.3.attn."),
    ],
)
def test_an_attention_of_one_tensor_is_in_a_lora_whole_or_not_at_all(tmp_path, name, layer):
    shapes = few(NARROW[name]())
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
    sizes = [sum(path.stat().st_size for path in of.loras) for of in (even, adaptive)]
    assert sizes[1] <= sizes[0]
    assert adaptive.report.loss < even.report.loss


def test_files_with_other_parts_than_the_rest_are_refused_in_words(tmp_path):
    whole = one()
    without_vae = parts(whole, UNET, CLIP)
    alone = parts(one(context=768), UNET)
    models = files(
        tmp_path,
        *(state(of, 1, dtype=torch.float16) for of in (without_vae, whole, whole, alone)),
    )
    with pytest.raises(MismatchError) as refusal:
        merge(models, tmp_path / "models")
    assert str(refusal.value) == (
        "2 hold text encoder, UNet and VAE, 1 holds text encoder and UNet, 1 holds UNet:"
        " b.safetensors, c.safetensors / a.safetensors / d.safetensors;"
        " choose files with the same parts"
    )


def test_mixed_families_are_refused_in_words(tmp_path):
    shapes = [xl(), two(), xl(), NARROW["flux_dev"]()]
    models = files(tmp_path, *(state(of, 1, dtype=torch.float16) for of in shapes))
    with pytest.raises(
        MismatchError, match=r"2 are Stable Diffusion XL, 1 is Stable Diffusion 2.x, 1"
    ):
        merge(models, tmp_path / "models")


def test_sd2_of_other_tools_merges_with_the_usual_one(tmp_path):
    """The other shape around the transformers; what never runs is a stand-in, or is missing."""
    usual, other = (state(few(two()), seed, dtype=torch.float16) for seed in (1, 2))
    usual, other = ({**of, SPREAD: of[SPREAD].float().mul(0.5).half()} for of in (usual, other))
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


def test_training_averages_are_left_out_and_need_not_be_in_every_file(tmp_path):
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


def predicting(shapes, seed, spread):
    """A checkpoint whose telling tensor spreads so far."""
    tensors = state(shapes, seed, dtype=torch.float16)
    values = torch.linspace(-1, 1, tensors[SPREAD].numel())
    return {**tensors, SPREAD: (values * spread / values.std()).half()}


def test_an_average_that_predicts_v_has_a_configuration_that_says_so(tmp_path):
    models = files(tmp_path, *(predicting(few(two()), seed, 0.12) for seed in (1, 2)))
    merged = merged_exactly(models, tmp_path, ranks=(2,), dtype="float16")
    config = merged.place.hyper_model.with_suffix(".yaml")
    params = yaml.safe_load(config.read_text())["model"]["params"]
    assert params["parameterization"] == "v"
    assert params["unet_config"]["params"]["context_dim"] == 1024
    said = metadata(merged.loras[0])
    assert said["ss_base_model_version"] == "sd_v2_v"
    assert said["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert (said["modelspec.resolution"], said["modelspec.prediction_type"]) == ("768x768", "v")
    assert metadata(merged.place.hyper_model)["modelspec.prediction_type"] == "v"


def test_an_average_that_predicts_noise_has_none(tmp_path):
    models = files(tmp_path, *(predicting(few(two()), seed, 0.05) for seed in (1, 2)))
    merged = merged_exactly(models, tmp_path, ranks=(2,), dtype="float16")
    assert not merged.place.hyper_model.with_suffix(".yaml").exists()
    assert metadata(merged.loras[0])["modelspec.prediction_type"] == "epsilon"


def test_a_checkpoints_own_configuration_wins_and_is_taken_over(tmp_path):
    models = files(tmp_path, *(predicting(few(two()), seed, 0.05) for seed in (1, 2)))
    own = "model: {params: {parameterization: v}}  # mine\n"
    for path in models:
        path.with_suffix(".yaml").write_text(own)
    merged = merged_exactly(models, tmp_path, ranks=(2,), dtype="float16")
    assert merged.place.hyper_model.with_suffix(".yaml").read_text() == own


def test_both_predictions_in_one_set_are_refused_in_words(tmp_path):
    spreads = (0.12, 0.12, 0.05)
    models = files(
        tmp_path, *(predicting(few(two()), n, spread) for n, spread in enumerate(spreads))
    )
    with pytest.raises(
        MismatchError, match=r"^2 are Stable Diffusion 2.x with v-prediction, 1 is "
    ):
        merge(models, tmp_path / "models")


def test_markers_of_sdxl_are_kept_and_told_to_hosts_that_do_not_know_them(tmp_path):
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    models = files(
        tmp_path, *({**state(few(xl()), n, dtype=torch.float16), **markers} for n in (1, 2))
    )
    merged = merged_exactly(models, tmp_path, ranks=(2,), dtype="float16")
    assert markers.keys() <= load_file(merged.place.hyper_model).keys()
    config = yaml.safe_load(merged.place.hyper_model.with_suffix(".yaml").read_text())
    scaling = config["model"]["params"]["denoiser_config"]["params"]["scaling_config"]
    assert scaling["target"].endswith(".VScaling")
    assert metadata(merged.loras[0])["modelspec.prediction_type"] == "v"


def test_a_configuration_that_is_there_already_is_not_replaced(tmp_path):
    models = files(tmp_path, *(predicting(few(two()), seed, 0.12) for seed in (1, 2)))
    place = tmp_path / "models" / "Stable-diffusion"
    place.mkdir(parents=True)
    (place / "mix.yaml").write_text("mine")
    with pytest.raises(OSError, match=r"mix\.yaml"):
        merged_exactly(models, tmp_path, ranks=(2,), dtype="float16")
    assert [path.name for path in place.iterdir()] == ["mix.yaml"]
    assert (place / "mix.yaml").read_text() == "mine"


def test_a_damaged_variant_is_refused_before_anything_is_written(tmp_path):
    shapes = two()
    models = files(tmp_path, state(shapes, 1, dtype=torch.float16), {"a.absmax": torch.zeros(2)})
    with pytest.raises(FamilyError, match=r"b\.safetensors is a 4-bit model .*: use its fp16"):
        merge(models, tmp_path / "models")
    assert not (tmp_path / "models").exists()
