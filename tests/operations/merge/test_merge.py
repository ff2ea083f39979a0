"""The files of a merge are what its report says."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_family import (
    QUERY,
    RANKS,
    losses,
    merge,
    recipe,
    reported_shares,
    tags_of,
    write,
)

from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.recipe.recipe import Recipe

DTYPES = ("float16", "bfloat16", "float32")


def manifest_of(merged):
    return json.loads((merged.place.folder / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def stored(tmp_path_factory, files):
    """A merge stored in each type."""
    folder = tmp_path_factory.mktemp("stored")
    return {dtype: merge(files, folder / dtype, dtype=dtype) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
def test_reported_loss_is_the_written_files_loss(files, stored, dtype):
    merged = stored[dtype]
    loss, _ = losses(files, merged, tags_of(merged))
    assert merged.report.loss == pytest.approx(loss, abs=1e-6)
    types = {
        t.dtype for path in merged.loras for k, t in load_file(path).items() if "alpha" not in k
    }
    assert types == {getattr(torch, dtype)}
    assert load_file(merged.place.hyper_model)[QUERY].dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reported_shares_are_the_written_files_shares(files, stored, dtype):
    merged = stored[dtype]
    _, shares = losses(files, merged, tags_of(merged))
    torch.testing.assert_close(reported_shares(merged), shares.float(), atol=1e-6, rtol=0)


def test_loss_holds_for_mixed_types_and_weights(tmp_path, state_of):
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    names = ("half.safetensors", "brain.ckpt", "single.safetensors")
    models = [
        write(tmp_path / name, state_of(c, dtype))
        for c, (name, dtype) in enumerate(zip(names, dtypes, strict=True))
    ]
    merged = merge(models, tmp_path / "models", weights=(3, 1, 2), vae="average")
    loss, shares = losses(models, merged, tags_of(merged))
    assert merged.report.loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(reported_shares(merged), shares.float(), atol=1e-6, rtol=0)


def test_the_multipliers_as_printed_reach_the_reported_loss(files, merged):
    lines = (merged.place.folder / "multipliers.txt").read_text(encoding="utf-8").splitlines()
    stems, tags = zip(*(line.split(": ", 1) for line in lines), strict=True)
    assert stems == ("a", "b", "c")
    rows = [parse_tags(line) for line in tags]
    assert [tag.name for tag in rows[0]] == ["mix_0-4", "mix_1-2"]
    loss, shares = losses(files, merged, rows)
    assert merged.report.loss == pytest.approx(loss, abs=1e-4)
    torch.testing.assert_close(reported_shares(merged), shares.float(), atol=1e-4, rtol=0)


def test_largest_multiplier_of_each_lora_is_one(merged):
    rows = torch.tensor([row.multipliers for row in merged.report.checkpoints])
    torch.testing.assert_close(rows.abs().amax(0), torch.ones(2), atol=1e-2, rtol=0)
    assert torch.equal(rows.amax(0), rows.abs().amax(0))


def test_with_a_base_no_hyper_model_is_written(files, tmp_path):
    merged = merge(files[1:], tmp_path, base=str(files[0]))
    assert merged.place.hyper_model == files[0]
    assert not (tmp_path / "Stable-diffusion").exists()
    loss, shares = losses(files[1:], merged, tags_of(merged))
    assert merged.report.loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(reported_shares(merged), shares.float(), atol=1e-6, rtol=0)
    assert manifest_of(merged)["base_is_first_source"]
    assert merged.report.bytes_average == files[0].stat().st_size


@pytest.mark.parametrize("count", [2, 3])
def test_equal_checkpoints_give_a_report_without_nan(tmp_path, state_of, count):
    state = state_of(0)
    models = [write(tmp_path / f"{name}.safetensors", state) for name in "xyz"[:count]]
    merged = merge(models, tmp_path / "models")
    written = load_file(merged.place.hyper_model)
    assert all(torch.equal(written[key], tensor) for key, tensor in state.items())
    report = merged.report
    assert report.loss == report.weighted_private_loss == report.weighted_bound == 0
    for row in merged.report.checkpoints:
        assert (row.explained, row.error, row.not_carried) == (1, 0, 0)
        assert all(x == x and abs(x) < 10 for x in row.multipliers)  # noqa: PLR0124
    json.dumps(merged.report.as_dict(), allow_nan=False)
    texts = [path.read_text() for path in merged.place.folder.iterdir()]
    assert not any("nan" in content.lower() for content in texts)
    for path in merged.loras:
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def test_equal_wide_checkpoints_lose_only_rounding(tmp_path, state_of):
    state = state_of(0, torch.float32)
    models = [write(tmp_path / f"{name}.safetensors", state) for name in "xy"]
    report = merge(models, tmp_path / "models").report
    assert report.loss == pytest.approx(1)
    json.dumps(report.as_dict(), allow_nan=False)


def test_greedy_is_never_better_than_joint(files, tmp_path):
    greedy = merge(files, tmp_path, method="greedy", iterations=6)
    joint = merge(files, tmp_path, iterations=12)
    assert len(greedy.report.losses) == len(RANKS)
    assert joint.report.loss <= greedy.report.loss + 1e-6
    loss, _ = losses(files, greedy, tags_of(greedy))
    assert greedy.report.loss == pytest.approx(loss, abs=1e-6)


def test_the_manifest_names_sources_files_and_figures(files, merged):
    manifest = manifest_of(merged)
    assert manifest["report"] == json.loads(json.dumps(merged.report.as_dict()))
    assert [source["path"] for source in manifest["sources"]] == [str(path) for path in files]
    assert all(len(source["sha256"]) == 64 for source in manifest["sources"])
    assert manifest["recipe"]["models"] == '["a.safetensors", "b.safetensors", "c.safetensors"]'
    with safe_open(str(merged.place.hyper_model), "pt") as file:
        metadata = file.metadata()
    assert metadata["hyper_merge.average_id"] == manifest["average_id"]
    assert json.loads(metadata["sd_merge_models"]).keys() == {
        source["sha256"] for source in manifest["sources"]
    }
    with safe_open(str(merged.loras[1]), "pt") as file:
        metadata = file.metadata()
    multipliers = json.loads(metadata["hyper_merge.multipliers"])
    assert list(multipliers.values()) == [row.multipliers[1] for row in merged.report.checkpoints]
    assert (merged.place.folder / "report.txt").read_text().startswith("mix: 3 checkpoints, 2 ")


def test_manifest_settings_make_an_equal_recipe(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files[0].parent)
    names = [path.name for path in files[1:]]
    settings = {"base": files[0].name, "weights": (1, 2.5), "overwrite": True, "seed": 2**60}
    merged = merge(names, tmp_path, **settings)
    rebuilt = Recipe.from_settings(manifest_of(merged)["settings"], "manifest")
    assert rebuilt == recipe(files[1:], tmp_path, **{**settings, "base": str(files[0])})
    assert manifest_of(merged)["hyper_model"] == str(files[0])


def test_every_model_has_a_card(merged):
    for model in (merged.place.hyper_model, *merged.loras):
        assert json.loads(model.with_suffix(".json").read_text(encoding="utf-8"))["description"]
        assert model.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_reported_sizes_are_the_files_sizes(files, merged):
    report = merged.report
    size = merged.place.hyper_model.stat().st_size
    loras = sum(path.stat().st_size for path in merged.loras)
    assert report.bytes_before == sum(path.stat().st_size for path in files)
    assert report.bytes_average == size
    assert report.bytes_loras == loras
