"""Companions of the LoRAs: norms and biases with the same multipliers, and what they restore."""

import json

import pytest
import torch
from narrow_layouts import FULL, NARROW, UNET
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_family import merge, recipe, write

from hyper_merge.checkpoints.architectures.detection import detect_family
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.architectures.norms_and_biases import norms_and_biases_of
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.errors import OutputError, RecipeError
from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runs.deletion import delete_run, files_of
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.report_text import format_report
from hyper_merge.runs.run import load_run

NORM = UNET + "input_blocks.1.0.in_layers.0"
# Of the UNet: biases, those of the norms included; the norms' scales; norms.
SIZES = {
    "sd1": (343_684, 100_160, 109),
    "sd2": (343_684, 100_160, 109),
    "sdxl": (1_289_284, 294_080, 256),
    "sdxl_refiner": (931_204, 230_016, 188),
}


def vectors(shapes, *kinds):
    tensors = {key: TensorInfo(torch.float16, shape) for key, shape in shapes.items()}
    header = Header("x.safetensors", tensors, {}, 0, 0)
    known = norms_and_biases_of(header, layout_of(header, detect_family(header)))
    return [vector for vector in known if not kinds or vector.kind in kinds]


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def merged(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    return merge(
        files, folder, exact="all", dtype="float32", ranks=(4, 2), iterations=2, allocation="even"
    )


@pytest.mark.parametrize("name", SIZES)
def test_full_size_unet_norms_and_biases_are_complete(name):
    tensors = vectors(FULL[name]())
    biases = sum(vector.size for vector in tensors if vector.key.endswith(".bias"))
    scales = sum(vector.size for vector in tensors if vector.key.endswith(".weight"))
    assert (biases, scales) == SIZES[name][:2]
    keys = [vector.lora_key for vector in tensors if vector.kind == "norms"]
    assert len(keys) == 2 * SIZES[name][2] == len(set(keys))


@pytest.mark.parametrize("name", SIZES)
def test_a1111_finds_both_halves_of_every_norm(name):
    keys = {vector.lora_key for vector in vectors(NARROW[name](), "norms")}
    halves = {
        end: {k.removesuffix(end) for k in keys if k.endswith(end)}
        for end in (".w_norm", ".b_norm")
    }
    assert halves[".w_norm"] == halves[".b_norm"]
    assert len(keys) == 2 * len(halves[".w_norm"])
    assert "lora_unet_out_0" in halves[".w_norm"]  # only so for A1111
    assert all(key.startswith("lora_unet_") for key in keys)


def test_names_are_comfyuis_by_the_checkpoints_own_keys():
    """model_lora_keys_unet in comfy/lora.py: lora_unet_ and the key, dots as underscores."""
    for vector in vectors(NARROW["flux_dev"]()):
        stem = vector.key.removeprefix(UNET).removesuffix(".bias").replace(".", "_")
        assert vector.lora_key == f"lora_unet_{stem}.diff_b"


def hosted(merged, key, row):
    """Returns what a host makes of a vector: the average plus multiplier times change."""
    value = load_file(merged.place.hyper_model)[key].double()
    for path, multiplier in zip(merged.loras[2:], row.multipliers, strict=True):
        kind = {True: {"weight": ".w_norm", "bias": ".b_norm"}, False: {"bias": ".diff_b"}}
        stem, _, end = key.rpartition(".")
        is_norm = load_file(merged.place.hyper_model)[stem + ".weight"].dim() == 1
        name = "lora_unet_" + stem.removeprefix(UNET).replace(".", "_") + kind[is_norm][end]
        value = value + multiplier * load_file(path)[name].double()
    return value


@pytest.mark.parametrize("key", [NORM + ".weight", NORM + ".bias", UNET + "out.2.bias"])
def test_two_loras_restore_norms_and_biases(files, merged, key):
    for path, row in zip(files, merged.report.checkpoints, strict=True):
        expected = load_file(path)[key].double()
        torch.testing.assert_close(hosted(merged, key, row), expected, atol=1e-5, rtol=0)


def test_report_names_companion_gains_and_hosts(merged):
    report = merged.report
    assert {gain.kind: gain.share for gain in report.recovered} == {
        "norms": pytest.approx(1, abs=1e-6),
        "biases": pytest.approx(1, abs=1e-6),
        "end biases": pytest.approx(1, abs=1e-6),
    }
    assert report.companions == ("mix_0-4-exact", "mix_1-2-exact")
    text = format_report(report)
    assert "in the UNet: norms 100.00%, biases 100.00%, end biases 100.00%" in text
    assert "they load in Forge and ComfyUI, not in AUTOMATIC1111" in text
    assert type(report).from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_prompts_use_every_multiplier_for_lora_and_companion(merged):
    row = merged.report.checkpoints[1]
    lines = (merged.place.folder / "multipliers.txt").read_text().splitlines()
    tags = parse_tags(lines[1])
    names = [tag.name for tag in tags]
    assert names == ["mix_0-4", "mix_1-2", "mix_0-4-exact", "mix_1-2-exact"]
    assert [tag.multiplier for tag in tags] == pytest.approx(
        [*row.multipliers, *row.multipliers], abs=1e-5
    )


def test_companion_is_float32_and_describes_itself(merged):
    path = merged.loras[2]
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    entries = metadata(path)
    assert (entries["ss_output_name"], entries["hyper_merge.exact"]) == ("mix_0-4-exact", "all")
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["description"].startswith(
        "End layers, norms and biases that go with LoRA 1 of 2 of mix"
    )
    assert path.with_suffix(".png").exists()


def test_norms_alone_load_in_a1111_too(files, tmp_path):
    merged = merge(files, tmp_path, exact="norms", ranks=(2,), iterations=1, allocation="even")
    keys = set(load_file(merged.loras[1]))
    ends = {key for key in keys if "_conv_" in key or "_time_embedding_" in key}
    assert {key.rpartition(".")[2] for key in keys - ends} == {"w_norm", "b_norm"}
    assert [gain.kind for gain in merged.report.recovered] == ["norms", "end biases"]
    assert 0 < merged.report.recovered[0].share < 1  # one LoRA for three checkpoints
    assert "they load in AUTOMATIC1111, Forge and ComfyUI" in format_report(merged.report)


def test_companions_are_the_least_squares_fit(files, tmp_path):
    merged = merge(
        files,
        tmp_path,
        exact="norms",
        ranks=(2,),
        iterations=1,
        dtype="float32",
        allocation="even",
    )
    multipliers = torch.tensor([row.multipliers for row in merged.report.checkpoints]).double()
    average = load_file(merged.place.hyper_model)[NORM + ".weight"].double()
    norms = torch.stack([load_file(path)[NORM + ".weight"].double() for path in files])
    deviations = norms - average
    name = "lora_unet_input_blocks_1_0_in_layers_0.w_norm"
    changes = load_file(merged.loras[1])[name].double()[None]
    rest = deviations - multipliers @ changes
    # The residual of least squares is orthogonal to all that the multipliers reach.
    assert float((multipliers.T @ rest).abs().max()) < 1e-6 * float(deviations.norm())


def test_nothing_is_written_unless_asked_for(files, tmp_path):
    merged = merge(files, tmp_path, ranks=(2,), iterations=1, allocation="even")
    assert [path.name for path in merged.loras] == ["mix_0-2.safetensors"]
    assert (merged.report.companions, merged.report.recovered) == ((), ())
    assert "companions" not in format_report(merged.report)


def test_companions_belong_to_their_run(files, tmp_path):
    merged = merge(files, tmp_path, exact="norms", ranks=(2,), iterations=1, allocation="even")
    folders = Folders.under(tmp_path)
    run = load_run(folders, "mix")
    assert (run.missing, run.loras) == ((), merged.loras)
    assert merged.loras[1] in files_of(run, folders)
    again = merge(files, tmp_path, ranks=(2,), iterations=1, overwrite=True, allocation="even")
    assert not merged.loras[1].exists()  # the replaced run's
    assert again.loras[0].exists()
    delete_run(load_run(folders, "mix"), folders)
    assert list((tmp_path / "Lora").iterdir()) == []


def test_a_companions_place_that_is_taken_is_refused(files, tmp_path):
    (tmp_path / "Lora").mkdir()
    (tmp_path / "Lora" / "mix_0-2-exact.safetensors").write_text("mine")
    with pytest.raises(OutputError, match=r"mix_0-2-exact\.safetensors"):
        merge(files, tmp_path, exact="norms", ranks=(2,), iterations=1, allocation="even")


def test_the_estimate_counts_companions(files, tmp_path):
    plain, exact = (run_preflight(recipe(files, tmp_path, exact=word)) for word in ("none", "all"))
    sizes = [vector.size for vector in exact.norms_and_biases]
    layers = {layer.module: layer for layer in exact.inputs.layout.layers if layer.is_end}
    first = layers.pop("lora_unet_conv_in")
    factors = [
        (layer.m + layer.n) * min(rank, layer.m) + 1  # alpha
        for layer in layers.values()
        for rank in exact.recipe.ranks
    ]
    expected = 2 * 4 * (sum(sizes) + first.m * first.n) + 2 * sum(factors)
    assert estimate_merge(exact).loras - estimate_merge(plain).loras == expected


def test_family_without_norms_is_refused(tmp_path):
    shapes = NARROW["flux_dev"]()
    paths = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(tensors, paths[-1])
    with pytest.raises(RecipeError, match=r"Flux dev has no norms that hosts take .* auto or all"):
        run_preflight(recipe(paths, tmp_path, exact="norms"))
    assert run_preflight(recipe(paths, tmp_path, exact="all")).norms_and_biases


def test_companions_fit_the_average_as_stored(tmp_path, state_of):
    models = [write(tmp_path / f"{c}.safetensors", state_of(c, torch.float32)) for c in (0, 1)]
    merged = merge(
        models,
        tmp_path,
        exact="norms",
        ranks=(2,),
        iterations=1,
        dtype="float16",
        allocation="even",
    )
    average = load_file(merged.place.hyper_model)[NORM + ".weight"]
    assert average.dtype == torch.float16
    change = load_file(merged.loras[1])["lora_unet_input_blocks_1_0_in_layers_0.w_norm"]
    multipliers = torch.tensor([row.multipliers for row in merged.report.checkpoints])
    norms = torch.stack([load_file(path)[NORM + ".weight"] for path in models])
    expected = torch.linalg.pinv(multipliers) @ (norms - average.float())
    torch.testing.assert_close(change[None], expected, atol=1e-6, rtol=0)
