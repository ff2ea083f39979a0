"""Layers at the ends of the UNet: carried by companions where they matter, averaged otherwise."""

import json
from dataclasses import replace

import pytest
import torch
from narrow_layouts import NARROW, few
from safetensors.torch import load_file, save_file
from tiny_family import UNET, load, merge, recipe, write

from hyper_merge.errors import RecipeError
from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.operations.restore.request import RestoreRequest
from hyper_merge.operations.restore.restore import run_restore
from hyper_merge.recipe.parsing import parse_private_lora_target
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.report_text import format_report
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress

FIRST = UNET + "input_blocks.0.0"
ENDS = [FIRST, UNET + "time_embed.0", UNET + "time_embed.2", UNET + "out.2"]
MODULES = {
    FIRST: "lora_unet_conv_in",
    UNET + "time_embed.0": "lora_unet_time_embedding_linear_1",
    UNET + "time_embed.2": "lora_unet_time_embedding_linear_2",
    UNET + "out.2": "lora_unet_conv_out",
}


@pytest.fixture(scope="module")
def only_ends(tmp_path_factory, state_of):
    """Three checkpoints that differ in the end layers and conv_in's bias, and nowhere else."""
    folder = tmp_path_factory.mktemp("ends")
    differing = {f"{end}.weight" for end in ENDS} | {f"{FIRST}.bias"}
    states = [state_of(c, torch.float32) for c in range(3)]
    return tuple(
        write(
            folder / f"{name}.safetensors",
            {key: (state if key in differing else states[0])[key] for key in state},
        )
        for name, state in zip("abc", states, strict=True)
    )


@pytest.fixture(scope="module")
def carried(only_ends, tmp_path_factory):
    folder = tmp_path_factory.mktemp("carried")
    settings = {"dtype": "float32", "ranks": (64, 64), "allocation": "even", "iterations": 10}
    return merge(only_ends, folder, exact="auto", **settings)


def folders_of(merged):
    return Folders.under(merged.place.loras.parent)


def companions(merged):
    return {p.stem: load_file(p) for p in merged.loras if p.stem.endswith("-exact")}


def test_a_restore_is_exact_where_only_ends_differ(only_ends, carried):
    for path in only_ends:
        restored = run_restore(
            RestoreRequest("mix", {path.stem: 1.0}), folders_of(carried), Progress()
        )
        assert restored.compared.everything == pytest.approx(1, abs=1e-6)
        result, original = load(restored.path), load(path)
        for key in result:
            torch.testing.assert_close(result[key], original[key], atol=2e-5, rtol=0)


def test_main_files_hold_no_end_layers(carried):
    assert [path.stem for path in carried.loras][2:] == ["mix_0-64-exact", "mix_1-64-exact"]
    for path in carried.loras[:2]:
        assert not any(key.startswith(tuple(MODULES.values())) for key in load_file(path))


def test_hosts_get_factors_and_for_conv_in_one_float32_tensor(carried):
    keys = {"lora_unet_conv_in.diff", "lora_unet_conv_in.diff_b"}
    for key in ENDS[1:]:
        ends = ("lora_up.weight", "lora_down.weight", "alpha")
        keys |= {f"{MODULES[key]}.{end}" for end in ends}
    for tensors in companions(carried).values():
        assert set(tensors) == keys
        change = tensors["lora_unet_conv_in.diff"]
        assert (change.dtype, change.shape) == (torch.float32, (16, 4, 3, 3))
        assert float(tensors["lora_unet_conv_out.alpha"]) == 64


def test_report_prompt_and_run_know_the_companions(carried):
    report = carried.report
    assert report.ends.carried
    assert report.ends.share == pytest.approx(1)
    text = format_report(report)
    assert "end layers hold 100.00% of the differences" in text
    assert "and are carried by the companions\n" in text
    assert "end biases 100.00%; they load in AUTOMATIC1111, Forge and ComfyUI" in text
    assert report.not_carried["other weights"] == 0
    tags = parse_tags(report.tags(report.checkpoints[1]))
    assert [tag.name for tag in tags] == [*report.loras, *report.companions]
    assert [tag.multiplier for tag in tags[:2]] == [tag.multiplier for tag in tags[2:]]
    run = load_run(folders_of(carried), "mix")
    assert (run.report, run.missing, run.loras) == (report, (), carried.loras)
    card = json.loads(carried.loras[2].with_suffix(".json").read_text())
    assert card["description"].startswith("End layers that go with LoRA 1 of 2 of mix")


def test_a_fit_uses_the_companions(only_ends, carried):
    fitted = run_fit(FitRequest("mix", only_ends[1], name="again"), folders_of(carried), Progress())
    assert fitted.row.explained == pytest.approx(1, abs=1e-6)
    row = carried.report.checkpoints[1]
    assert fitted.row.multipliers == pytest.approx(row.multipliers, abs=1e-4)


def test_none_leaves_ends_averaged_from_the_same_analysis(only_ends, carried):
    merged = merge(only_ends, carried.place.loras.parent, exact="none", dtype="float32", ranks=(4,))
    assert merged.reused_analysis
    assert [path.stem for path in merged.loras] == ["mix-2_0-4"]
    report = merged.report
    assert (report.ends.share, report.ends.carried) == (pytest.approx(1), False)
    assert report.not_carried["other weights"] == pytest.approx(1, abs=1e-3)
    assert "averaged only (exact ends would carry them)" in format_report(report)


@pytest.fixture(scope="module")
def alike_at_the_ends(tmp_path_factory, state_of):
    """Two checkpoints whose end layers are the same, all but for a few numbers."""
    folder = tmp_path_factory.mktemp("alike")
    states = [state_of(c, torch.float32) for c in range(2)]
    for end in ENDS:
        states[1][f"{end}.weight"] = states[0][f"{end}.weight"]
    states[1][f"{ENDS[1]}.weight"] = states[0][f"{ENDS[1]}.weight"] + 1e-7
    pairs = zip("ab", states, strict=True)
    return [write(folder / f"{name}.safetensors", state) for name, state in pairs]


def test_auto_carries_no_ends_that_do_not_matter(alike_at_the_ends, tmp_path):
    merged = merge(alike_at_the_ends, tmp_path, exact="auto", ranks=(2,))
    assert 0 < merged.report.ends.share < 0.01
    assert not merged.report.ends.carried
    assert len(merged.loras) == 1


def test_companions_without_any_rank_are_not_written(alike_at_the_ends, tmp_path):
    merged = merge(alike_at_the_ends, tmp_path, exact="ends", ranks=(2,))
    assert merged.report.ends.carried
    assert (len(merged.loras), merged.report.companions) == (1, ())
    assert "too little for a companion" in format_report(merged.report)
    restored = run_restore(RestoreRequest("mix", {"b": 1.0}), Folders.under(tmp_path), Progress())
    assert restored.compared.explained == pytest.approx(restored.compared.reported, abs=1e-3)


def test_one_lora_of_two_may_have_a_companion(carried):
    """As where the solver gives a block no rank in any end layer."""
    report = replace(carried.report, companions=carried.report.companions[1:])
    row = report.checkpoints[0]
    names = [tag.name for tag in parse_tags(report.tags(row))]
    assert names == ["mix_0-64", "mix_1-64", "mix_1-64-exact"]
    assert report.companion_multipliers(row) == (("mix_1-64-exact", row.multipliers[1]),)
    assert type(report).from_dict(json.loads(json.dumps(report.as_dict()))) == report
    damaged = report.as_dict() | {"companions": ["mix_9-1-exact"]}
    with pytest.raises(ValueError, match=r"expected a LoRA for every name in report\.companions"):
        type(report).from_dict(damaged)


def written(name, folder):
    """Returns two checkpoints of a family with other random numbers each."""
    paths = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        shapes = few(NARROW[name]())
        state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        paths.append(folder / f"{seed}.safetensors")
        save_file(state, paths[-1])
    return paths


def test_nine_channels_are_never_written(tmp_path):
    models = written("sd1_inpainting", tmp_path)
    merged = merge(models, tmp_path, exact="ends", ranks=(2,), iterations=1)
    (tensors,) = companions(merged).values()
    assert any("conv_out" in key for key in tensors)
    assert not any("conv_in" in key for key in tensors)
    assert merged.report.not_carried["other weights"] > 0


def test_flux_carries_its_ends_for_forge_and_comfyui(tmp_path):
    merged = merge(written("flux_dev", tmp_path), tmp_path, exact="ends", ranks=(2,), iterations=1)
    (tensors,) = companions(merged).values()
    modules = {key.partition(".")[0].removeprefix("lora_unet_") for key in tensors}
    assert {"img_in", "final_layer_linear"} & modules
    card = json.loads(merged.loras[1].with_suffix(".json").read_text())
    assert card["description"].endswith("Loads in Forge and ComfyUI.")


def test_a_family_without_ends_is_refused(tmp_path):
    models = written("sd3_medium", tmp_path)
    with pytest.raises(RecipeError, match=r"3 medium has no end layers that hosts take"):
        run_preflight(recipe(models, tmp_path, exact="ends"))
    estimate = [
        estimate_merge(run_preflight(recipe(models, tmp_path, exact=word))).loras
        for word in ("auto", "none")
    ]
    assert estimate[0] == estimate[1]


def test_a_budget_counts_the_companions(files, tmp_path):
    budget = 400_000
    merged = merge(files, tmp_path, exact="norms", budget=budget, ranks=(4,), iterations=2)
    assert companions(merged)
    assert sum(path.stat().st_size for path in merged.loras) <= budget
    assert merged.report.bytes_loras <= budget


def test_private_loras_leave_the_ends_to_the_companions(files, tmp_path):
    merged = merge(files, tmp_path, exact="ends", topup="2", ranks=(2,), iterations=2)
    (private, *_) = [path for path in merged.loras if "_top-" in path.stem]
    tensors = load_file(private)
    assert not any(key.startswith(tuple(MODULES.values())) for key in tensors)
    row = next(row for row in merged.report.checkpoints if row.topup == private.stem)
    restored = run_restore(
        RestoreRequest("mix", {row.name: 1.0}, dtype="float32"), Folders.under(tmp_path), Progress()
    )
    assert restored.compared.explained == pytest.approx(row.explained, abs=1e-3)


def test_float8_leaves_conv_in_as_it_is(files, tmp_path):
    merged = merge(files, tmp_path, exact="ends", lora_dtype="float8", ranks=(4, 2), iterations=9)
    for tensors in companions(merged).values():
        assert tensors["lora_unet_conv_in.diff"].dtype == torch.float32
    restored = run_restore(
        RestoreRequest("mix", {"b": 1.0}, dtype="float32"), Folders.under(tmp_path), Progress()
    )
    assert restored.compared.explained == pytest.approx(restored.compared.reported, abs=1e-3)
    (first,) = [part for part in restored.compared.parts if part.name == "IN00"]
    assert first.lost < 1e-3 * first.energy  # two whole tensors explain three checkpoints


def test_a_later_fit_with_a_private_lora_uses_the_companions_too(files, tmp_path):
    merged = merge(files[:2], tmp_path, exact="ends", ranks=(4,), iterations=2, dtype="float32")
    folders = folders_of(merged)
    fitted = run_fit(
        FitRequest("mix", files[2], topup=parse_private_lora_target("2")), folders, Progress()
    )
    tensors = load_file(tmp_path / "Lora" / f"{fitted.topups[0].name}.safetensors")
    assert not any(key.startswith(tuple(MODULES.values())) for key in tensors)
    restored = run_restore(RestoreRequest("mix", {fitted.row.name: 1.0}), folders, Progress())
    assert restored.compared.explained == pytest.approx(fitted.explained, abs=1e-4)
    assert restored.compared.reported == fitted.explained
