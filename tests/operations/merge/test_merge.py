"""A merge's files are what its report says, and nothing that was there is ever lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_family import (
    POSITION_IDS,
    QUERY,
    RANKS,
    TINY,
    added,
    layers_of,
    load,
    merge,
    part_multiplier,
    recipe,
    snapshot,
    tags_of,
    temporaries,
    write,
)

from hyper_merge.checkpoints.io import atomic_file as staging
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import HyperMergeError, InterruptedRun, OutputError, RecipeError
from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.operations import demo
from hyper_merge.operations.merge.merge import run_average, run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runs import hash_cache as lineage
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver import solve as solution

ROOT = Path(__file__).parent.parent
DTYPES = ("float16", "bfloat16", "float32")


def leftovers(models, hyper_model, loras, rows):
    """Squared norms of deviations and of what stays, (layers, k) each, from the files on disk.

    `rows` has a list of prompt tags per checkpoint.
    """
    base, checkpoints = load(hyper_model), [load(path) for path in models]
    loras = {name: load_file(path) for name, path in loras.items()}
    energies, errors = [], []
    for layer in layers_of(models[0]):
        weight = base[layer.key].double().flatten(1)
        blocks = {name: added(lora, layer.module) for name, lora in loras.items()}
        deviations = [c[layer.key].double().flatten(1) - weight for c in checkpoints]
        rests = [
            deviation - sum(part_multiplier(tag, layer.part) * blocks[tag.name] for tag in row)
            for deviation, row in zip(deviations, rows, strict=True)
        ]
        energies.append([float(d.square().sum()) for d in deviations])
        errors.append([float(r.square().sum()) for r in rests])
    return torch.tensor(energies).double(), torch.tensor(errors).double()


def losses(models, merged, rows):
    """Loss, and explained shares by checkpoint in all layers, UNet, text encoder."""
    loras = {path.stem: path for path in merged.loras}
    energies, errors = leftovers(models, merged.place.hyper_model, loras, rows)
    parts = [layer.part for layer in layers_of(models[0])]
    masks = [torch.tensor([p in which for p in parts]) for which in (parts, "unet", "text_encoder")]
    shares = [1 - errors[mask].sum(0) / energies[mask].sum(0) for mask in masks]
    return float(errors.sum() / energies.sum()), torch.stack(shares, 1)


def manifest_of(merged):
    return json.loads((merged.place.folder / "manifest.json").read_text(encoding="utf-8"))


def reported_shares(merged):
    rows = merged.report.checkpoints
    return torch.tensor([[r.explained, r.explained_unet, r.explained_text_encoder] for r in rows])


@pytest.fixture(scope="session")
def stored(tmp_path_factory, files):
    """A merge stored in each type."""
    folder = tmp_path_factory.mktemp("stored")
    return {dtype: merge(files, folder / dtype, dtype=dtype) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reported_loss_is_that_of_the_written_files(files, stored, dtype):
    merged = stored[dtype]
    loss, _ = losses(files, merged, tags_of(merged))
    assert merged.report.loss == pytest.approx(loss, abs=1e-6)
    types = {
        t.dtype for path in merged.loras for k, t in load_file(path).items() if "alpha" not in k
    }
    assert types == {getattr(torch, dtype)}
    assert load_file(merged.place.hyper_model)[QUERY].dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reported_shares_are_those_of_the_written_files(files, stored, dtype):
    merged = stored[dtype]
    _, shares = losses(files, merged, tags_of(merged))
    torch.testing.assert_close(reported_shares(merged), shares.float(), atol=1e-6, rtol=0)


def test_the_loss_is_right_for_files_of_all_types_weights_and_a_ckpt(tmp_path, state_of):
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


def test_the_largest_multiplier_of_every_lora_is_about_one(merged):
    rows = torch.tensor([row.multipliers for row in merged.report.checkpoints])
    torch.testing.assert_close(rows.abs().amax(0), torch.ones(2), atol=1e-2, rtol=0)
    assert torch.equal(rows.amax(0), rows.abs().amax(0))


def test_two_runs_with_one_seed_at_one_time_write_the_same_bytes(files, tmp_path, monkeypatch):
    class Clock:
        @staticmethod
        def now(zone):
            return types.SimpleNamespace(isoformat=lambda timespec: "2025-01-02T03:04:05+00:00")

    monkeypatch.setattr(lineage, "datetime", Clock)
    merge(files, tmp_path / "one")
    merge(files, tmp_path / "two")
    one, two = (snapshot(tmp_path / name) for name in ("one", "two"))
    manifests = [each.pop("hyper-merge/mix/manifest.json") for each in (one, two)]
    assert one == two
    assert manifests[0].replace(b"/one", b"/two") == manifests[1]


def test_other_ranks_read_no_checkpoint_and_use_the_hyper_model_again(files, started, monkeypatch):
    before = snapshot(started)

    def refuse(self, *rest):
        assert self.path not in files, f"{self.path} was opened"
        return enter(self)

    enter = CheckpointReader.__enter__
    monkeypatch.setattr(CheckpointReader, "__enter__", refuse)
    monkeypatch.setattr(lineage, "file_sha256", lambda *rest: pytest.fail("a file was hashed"))
    second = merge(files, started, ranks=(5,))
    assert second.reused_analysis
    assert second.place.exists
    assert second.place.hyper_model == started / "Stable-diffusion" / "mix.safetensors"
    assert [path.name for path in second.loras] == ["mix-2_0-5.safetensors"]
    assert second.place.folder == started / "hyper-merge" / "mix-2"
    after = snapshot(started)
    assert {name: after[name] for name in before} == before
    loss, _ = losses(files, second, tags_of(second))
    assert second.report.loss == pytest.approx(loss, abs=1e-6)
    assert merge(files, started, ranks=(6,)).place.run == "mix-3"


def test_a_lost_hyper_model_is_made_again_without_another_analysis(files, started):
    hyper_model = started / "Stable-diffusion" / "mix.safetensors"
    before = load_file(hyper_model)
    content = hyper_model.read_bytes()
    hyper_model.unlink()
    second = merge(files, started, ranks=(3,))
    assert second.reused_analysis
    after = load_file(second.place.hyper_model)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    offset = content.index(b"hyper_merge.average_id")
    assert content[offset : offset + 90] in second.place.hyper_model.read_bytes()


def test_without_the_cache_a_second_run_reads_the_files_again(files, started):
    shutil.rmtree(started / "hyper-merge" / "cache")
    second = merge(files, started, ranks=(3,))
    assert not second.reused_analysis
    assert second.place.exists
    loss, _ = losses(files, second, tags_of(second))
    assert second.report.loss == pytest.approx(loss, abs=1e-6)


def test_the_same_recipe_again_is_refused_and_overwriting_replaces(files, started):
    before = snapshot(started)
    with pytest.raises(OutputError, match="the run mix is this very merge already; choose another"):
        merge(files, started)
    assert snapshot(started) == before
    merge(files, started, overwrite=True, iterations=1)
    after = snapshot(started)
    assert after.keys() == before.keys()
    assert after["Lora/mix_0-4.safetensors"] != before["Lora/mix_0-4.safetensors"]
    assert after["Stable-diffusion/mix.safetensors"] == before["Stable-diffusion/mix.safetensors"]


def test_overwriting_makes_the_average_of_other_checkpoints(files, tmp_path):
    merge(files[:2], tmp_path)
    with pytest.raises(OutputError, match="is not the average of these checkpoints"):
        merge(files, tmp_path)
    merged = merge(files, tmp_path, overwrite=True)
    loss, _ = losses(files, merged, tags_of(merged))
    assert merged.report.loss == pytest.approx(loss, abs=1e-6)


def test_a_shorter_list_of_ranks_takes_the_old_loras_away_with_the_replacement(files, started):
    before = snapshot(started)
    mine = started / "Lora" / "mix_2-9.safetensors"
    mine.write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        merge(files, started, Stop(1.0, "interrupt").progress, ranks=(4,), overwrite=True)
    mine.unlink()
    assert snapshot(started) == before
    merge(files, started, ranks=(4,), overwrite=True)
    kept = {name for name in before if "mix_1-2" not in name}
    assert snapshot(started).keys() == kept
    assert temporaries(started) == []


def test_replacing_removes_only_loras_that_are_hyper_merges_own(files, started):
    manifest = started / "hyper-merge/mix/manifest.json"
    mine = [
        started / "Lora" / name for name in ("mix_1-2.safetensors", "mix_1-2.json", "mix_2-1.png")
    ]
    for path in mine:
        path.write_text("mine")
    content = json.loads(manifest.read_text())
    outside = Path(
        shutil.copy(started / "Lora/mix_0-4.safetensors", started)
    )  # ours by its content
    content["report"]["loras"] += ["../mix_0-4", "mix_0-4/../../mix_0-4", 7]
    manifest.write_text(json.dumps(content))
    merge(files, started, ranks=(3,), overwrite=True)
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert outside.exists()
    assert not (started / "Lora/mix_0-4.safetensors").exists()


def test_a_hyper_model_that_other_runs_need_is_not_replaced(files, started):
    merge(files, started, ranks=(3,))
    merge(files, started, ranks=(3,), name="other")
    before = snapshot(started)
    message = (
        "mix.safetensors is the hyper-model of the runs {}mix-2, other, and their LoRAs go with no"
        " other; choose another name, or delete the runs first"
    )
    with pytest.raises(OutputError) as caught:
        merge(files[:2], started, overwrite=True)
    assert str(caught.value) == message.format("")
    with pytest.raises(OutputError) as caught:
        run_average(run_preflight(recipe(files[:2], started, overwrite=True)), Progress())
    assert str(caught.value) == message.format("mix, ")  # whose LoRAs would stay
    assert snapshot(started) == before
    hyper_model = started / "Stable-diffusion/mix.safetensors"
    hyper_model.rename(started / "moved.safetensors")
    with pytest.raises(OutputError, match=r"hyper-model of the runs mix-2, other, and their"):
        merge(files[:2], started)
    (started / "moved.safetensors").rename(hyper_model)
    merge(files, started, overwrite=True, iterations=1)  # the same average: they all go with it
    run_average(run_preflight(recipe(files, started, overwrite=True)), Progress())
    assert load_file(hyper_model).keys() == load_file(files[0]).keys()


def test_the_base_of_another_run_is_not_replaced(files, started):
    base = started / "Stable-diffusion/mix.safetensors"
    merge(files[1:], started, name="from", base=str(base))
    with pytest.raises(OutputError, match="hyper-model of the run from, and their LoRAs"):
        merge(files[:2], started, overwrite=True)


def test_a_merge_on_another_device_is_the_same_merge(files, started):
    with pytest.raises(OutputError, match="the run mix is this very merge already"):
        merge(files, started, device="auto")


@pytest.mark.parametrize(
    "place",
    [
        "Stable-diffusion/mix.safetensors",
        "Lora/mix_1-2.safetensors",
        "Lora/mix_0-4.json",
        "Lora/mix_1-2.png",
    ],
)
def test_a_name_taken_by_somebody_elses_file_is_refused_before_any_work(
    files, tmp_path, place, monkeypatch
):
    mine = tmp_path / place
    mine.parent.mkdir()
    mine.write_text("mine")
    monkeypatch.setattr(CheckpointReader, "__enter__", lambda self: pytest.fail("work was done"))
    with pytest.raises(OutputError) as caught:
        merge(files, tmp_path)
    assert str(mine) in str(caught.value)
    assert "exists" in str(caught.value)
    assert "choose another name, or --overwrite" in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"


def test_a_folder_of_the_runs_name_makes_room_for_another(files, tmp_path):
    (tmp_path / "hyper-merge" / "mix").mkdir(parents=True)
    assert merge(files, tmp_path).place.run == "mix-2"


def test_a_checkpoint_of_the_merge_is_never_overwritten(files, tmp_path):
    (tmp_path / "Stable-diffusion").mkdir()
    models = [
        Path(shutil.copy(path, tmp_path / "Stable-diffusion" / path.name)) for path in files[:2]
    ]
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="one of the checkpoints"):
        merge(models, tmp_path, name="a", overwrite=True)
    assert snapshot(tmp_path) == before


def test_with_a_base_no_hyper_model_is_written(files, tmp_path):
    merged = merge(files[1:], tmp_path, base=str(files[0]))
    assert merged.place.hyper_model == files[0]
    assert not (tmp_path / "Stable-diffusion").exists()
    loss, shares = losses(files[1:], merged, tags_of(merged))
    assert merged.report.loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(reported_shares(merged), shares.float(), atol=1e-6, rtol=0)
    assert manifest_of(merged)["base_is_first_source"]
    assert merged.report.bytes_average == files[0].stat().st_size


def test_other_checkpoints_of_the_same_names_are_another_merge(files, tmp_path):
    merge(files[1:], tmp_path / "models", base=str(files[0]))
    (tmp_path / "others").mkdir()
    others = [Path(shutil.copy(files[0], tmp_path / "others" / path.name)) for path in files[1:]]
    second = merge([others[0], files[2]], tmp_path / "models", base=str(files[0]))
    assert second.place.run == "mix-2"


@pytest.mark.parametrize("count", [2, 3])
def test_equal_checkpoints_give_themselves_and_a_report_without_nan(tmp_path, state_of, count):
    state = state_of(0)
    models = [write(tmp_path / f"{name}.safetensors", state) for name in "xyz"[:count]]
    merged = merge(models, tmp_path / "models")
    written = load_file(merged.place.hyper_model)
    assert all(torch.equal(written[key], tensor) for key, tensor in state.items())
    assert merged.report.loss == merged.report.private_loss == merged.report.bound == 0
    for row in merged.report.checkpoints:
        assert (row.explained, row.error, row.not_carried) == (1, 0, 0)
        assert all(x == x and abs(x) < 10 for x in row.multipliers)  # noqa: PLR0124
    json.dumps(merged.report.as_dict(), allow_nan=False)
    texts = [path.read_text() for path in merged.place.folder.iterdir()]
    assert not any("nan" in content.lower() for content in texts)
    for path in merged.loras:
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def test_equal_wide_checkpoints_lose_only_the_rounding_of_the_average(tmp_path, state_of):
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


def test_the_settings_in_the_manifest_make_an_equal_recipe(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files[0].parent)
    names = [path.name for path in files[1:]]
    settings = {"base": files[0].name, "weights": (1, 2.5), "overwrite": True, "seed": 2**60}
    merged = merge(names, tmp_path, **settings)
    found = Recipe.from_settings(manifest_of(merged)["settings"], "manifest")
    assert found == recipe(files[1:], tmp_path, **{**settings, "base": str(files[0])})
    assert manifest_of(merged)["hyper_model"] == str(files[0])


def test_every_model_has_a_card_with_text_and_picture(merged):
    for model in (merged.place.hyper_model, *merged.loras):
        assert json.loads(model.with_suffix(".json").read_text(encoding="utf-8"))["description"]
        assert model.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_users_own_card_of_a_lost_hyper_model_stays(files, started):
    hyper_model = started / "Stable-diffusion" / "mix.safetensors"
    hyper_model.unlink()
    hyper_model.with_suffix(".png").write_bytes(b"mine")
    merge(files, started, ranks=(3,))
    assert hyper_model.with_suffix(".png").read_bytes() == b"mine"


def test_the_loras_of_a_later_merge_name_the_hyper_model_that_they_are_for(files, tmp_path):
    merge(files, tmp_path, name="first")
    second = merge(files, tmp_path, name="second")
    with safe_open(str(second.loras[0]), "pt") as file:
        assert file.metadata()["ss_sd_model_name"] == "first.safetensors"
    based = merge(files[1:], tmp_path, name="based", base=str(files[0]))
    with safe_open(str(based.loras[0]), "pt") as file:
        assert file.metadata()["ss_sd_model_name"] == "a.safetensors"


def test_the_sizes_in_the_report_are_those_of_the_files(files, merged):
    report = merged.report
    size = merged.place.hyper_model.stat().st_size
    loras = sum(path.stat().st_size for path in merged.loras)
    assert report.bytes_before == sum(path.stat().st_size for path in files)
    assert report.bytes_average == size
    assert report.bytes_loras == loras


class Stop:
    """Ends a run at a fraction of its work, by should_stop or as Ctrl-C does."""

    def __init__(self, at: float, how: str) -> None:
        self.at, self.how, self.reached = at, how, 0.0
        self.late = 0  # steps after the wish to stop

    def on_progress(self, phase, fraction):
        self.late += self.reached >= self.at
        self.reached = fraction
        if self.how == "interrupt" and fraction >= self.at:
            raise KeyboardInterrupt

    def should_stop(self):
        return self.how == "stop" and self.reached >= self.at

    @property
    def progress(self):
        return Progress(self.on_progress, self.should_stop)


@pytest.mark.parametrize("how", ["stop", "interrupt"])
def test_an_interrupt_at_any_point_leaves_everything_as_it_was(files, started, how):
    before = snapshot(started)
    changed = [files[2], files[1]]  # another average under the same name
    for at in (0.001, 0.04, 0.3, 0.61, 0.9, 1.0 if how == "interrupt" else 0.96):
        shutil.rmtree(started / "hyper-merge" / "cache", ignore_errors=True)
        stop = Stop(at, how)
        with pytest.raises((InterruptedRun, KeyboardInterrupt)):
            merge(changed, started, stop.progress, overwrite=True)
        assert stop.late == 0
        assert snapshot(started) == before, at
        assert temporaries(started) == [], at
    finished = merge(changed, started, overwrite=True)  # with whatever the cache holds
    loss, _ = losses(changed, finished, tags_of(finished))
    assert finished.report.loss == pytest.approx(loss, abs=1e-6)


def test_an_interrupt_of_a_first_run_leaves_the_cache_alone_behind(files, tmp_path):
    with pytest.raises(InterruptedRun, match="no file was changed"):
        merge(files, tmp_path, Stop(0.9, "stop").progress)
    assert snapshot(tmp_path) == {}
    assert {path.name for path in tmp_path.iterdir()} == {"hyper-merge"}
    assert merge(files, tmp_path).reused_analysis


class Wish:
    """Counts how often each phase asks, and wishes to stop when one asks for the n-th time."""

    def __init__(self, phase=None, at=0):
        self.phase, self.at = phase, at
        self.now = "hashing the checkpoints"
        self.asked = Counter()
        self.late = 0

    def on_progress(self, phase, fraction):
        self.now = phase

    def should_stop(self):
        self.asked[self.now] += 1
        wished = self.phase is not None and self.asked[self.phase] >= self.at
        self.late += wished
        return wished

    @property
    def progress(self):
        return Progress(self.on_progress, self.should_stop)


@pytest.mark.parametrize("method", ["joint", "greedy"])
def test_every_phase_hears_the_wish_to_stop_wherever_it_asks(files, tmp_path, method):
    root = tmp_path / "models"
    complete = Wish()
    loras = merge(files, root, complete.progress, method=method).loras
    cache = root / "hyper-merge" / "cache"
    shutil.copytree(cache, tmp_path / "cache")
    before = snapshot(root)
    layers = len(layers_of(files[0]))
    assert complete.asked["reading and analysing"] > 5 * layers  # within them too
    assert complete.asked["preparing the LoRAs"] >= layers
    tensors = sum(len(load_file(path)) for path in loras)
    assert complete.asked["writing the LoRAs"] > 4 * tensors  # to stage, hash and write them
    assert complete.asked["solving for the LoRAs"] > 20
    for phase, count in complete.asked.items():
        if phase == "putting the files in place" or (method == "greedy" and phase[:3] != "sol"):
            continue
        for at in {1, count // 2, count * 9 // 10} - {0}:  # how often varies with the threads
            shutil.rmtree(cache, ignore_errors=True)
            if phase not in ("hashing the checkpoints", "reading and analysing"):
                shutil.copytree(tmp_path / "cache", cache)
            wish = Wish(phase, at)
            with pytest.raises(InterruptedRun):
                merge(files, root, wish.progress, method=method, overwrite=True)
            assert wish.late <= torch.get_num_threads() + 2, (
                phase,
                at,
            )  # once for each item submitted
            assert snapshot(root) == before, (phase, at)
            assert temporaries(root) == [], (phase, at)


KILLED = """
import os, signal, sys
from pathlib import Path
from hyper_merge.runtime.progress import Progress
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.recipe import Recipe

def on_progress(phase, fraction):
    if fraction > float(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe(name="mix", models=tuple(map(Path, sys.argv[3:])), ranks=(4, 2), device="cpu",
                output=Path(sys.argv[2]), overwrite=True, method="greedy")
run_merge(run_preflight(recipe), Progress(on_progress))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("at", [0.3, 0.98])
def test_a_killed_process_leaves_the_old_files_and_a_usable_cache(files, started, at):
    shutil.rmtree(started / "hyper-merge" / "cache")
    before = snapshot(started)
    changed = [files[2], files[1]]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(at), str(started), *map(str, changed)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    after = snapshot(started)
    assert {name: content for name, content in after.items() if name in before} == before
    new = [Path(name) for name in after if name not in before]
    assert new
    assert all(name.suffix == ".tmp" for name in new)
    finished = merge(changed, started, overwrite=True, method="greedy")
    assert finished.reused_analysis == (at > 0.9)
    loss, _ = losses(changed, finished, tags_of(finished))
    assert finished.report.loss == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("after", [0, 3, 150, 400])
def test_a_disk_that_fills_up_is_told_and_leaves_everything_as_it_was(
    files, started, after, monkeypatch
):
    before = snapshot(started)
    shutil.rmtree(started / "hyper-merge" / "cache")
    real, written = staging.StagedFile._write_some, []

    def write_some(self, data, offset):
        written.append(offset)
        if len(written) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data, offset)

    monkeypatch.setattr(staging.StagedFile, "_write_some", write_some)
    with pytest.raises(OutputError, match=r"the disk is full; free some space") as caught:
        merge(files[::-1], started, overwrite=True)
    assert "bytes needed" in str(caught.value)
    assert snapshot(started) == before
    assert temporaries(started) == []


def test_too_small_a_disk_is_refused_before_any_work_with_free_and_needed(
    files, tmp_path, monkeypatch
):
    usage = types.SimpleNamespace(total=2**40, used=0, free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(CheckpointReader, "__enter__", lambda self: pytest.fail("work was done"))
    with pytest.raises(OutputError, match=r"needs \d+ MB but its disk has 1 MB free; make"):
        merge(files, tmp_path)
    assert list(tmp_path.iterdir()) == []
    preflight = run_preflight(recipe(files, tmp_path))
    usage.free = 2**10
    with pytest.raises(OutputError, match="its disk has"):
        run_average(preflight, Progress())


def test_a_device_without_memory_hands_the_cores_to_the_cpu(files, tmp_path, merged, monkeypatch):
    real, asked, warnings = solution.best_start, [], []

    def best_start(*rest):
        asked.append(rest)
        if len(asked) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (pretended)")
        return real(*rest)

    monkeypatch.setattr(solution, "best_start", best_start)
    told = []
    progress = Progress(lambda _phase, x: told.append(x), warn=warnings.append)
    report = merge(files, tmp_path, progress).report
    assert told == sorted(told)
    assert warnings == ["cpu has too little memory for the cores; the CPU takes them"]
    assert report == merged.report


def test_the_whole_run_is_one_rising_progress(files, tmp_path):
    told = []
    merge(files, tmp_path, Progress(lambda phase, x: told.append((phase, x))))
    fractions = [x for _, x in told]
    assert fractions == sorted(fractions)
    assert fractions[0] >= 0
    assert fractions[-1] == 1
    assert list(dict.fromkeys(phase for phase, _ in told)) == [
        "hashing the checkpoints",
        "reading and analysing",
        "searching for a start",
        "solving for the LoRAs",
        "preparing the LoRAs",
        "writing the LoRAs",
        "putting the files in place",
    ]


def test_the_average_alone_is_the_hyper_model_of_the_merge(files, tmp_path, merged):
    path = run_average(run_preflight(recipe(files, tmp_path / "alone")), Progress())
    alone, whole = load_file(path), load_file(merged.place.hyper_model)
    assert alone.keys() == whole.keys()
    assert all(torch.equal(alone[key], tensor) for key, tensor in whole.items())
    assert torch.equal(alone[POSITION_IDS], torch.arange(77)[None])
    reused = merge(files, tmp_path / "alone")
    assert reused.place.exists
    before = snapshot(tmp_path / "alone")
    with pytest.raises(
        OutputError, match=r"mix\.safetensors exists; choose another name, or --overwrite"
    ):
        run_average(run_preflight(recipe(files, tmp_path / "alone")), Progress())
    assert snapshot(tmp_path / "alone") == before


def test_the_average_alone_refuses_a_base_and_stops_without_a_trace(files, tmp_path):
    with pytest.raises(RecipeError, match="base"):
        run_average(run_preflight(recipe(files[1:], tmp_path, base=str(files[0]))), Progress())
    with pytest.raises(InterruptedRun):
        run_average(run_preflight(recipe(files, tmp_path)), Stop(0.5, "stop").progress)
    assert snapshot(tmp_path) == {}


def test_a_place_that_cannot_be_written_is_named(files, tmp_path):
    blocked = tmp_path / "models"
    blocked.write_text("a file")
    with pytest.raises(HyperMergeError, match="models"):
        merge(files, blocked)
    assert blocked.read_text() == "a file"


def test_files_go_to_the_folders_of_the_host_whatever_the_recipes_output_is(files, tmp_path):
    names = ("checkpoints", "lora", "mine/runs", "elsewhere/cache")
    folders = Folders(*(tmp_path / name for name in names))
    preflight = run_preflight(recipe(files, tmp_path / "output"))
    merged = run_merge(preflight, Progress(), folders)
    assert merged.place.hyper_model == tmp_path / "checkpoints/mix.safetensors"
    assert merged.loras[0] == tmp_path / "lora/mix_0-4.safetensors"
    assert (tmp_path / "mine/runs/mix/manifest.json").is_file()
    assert list(folders.cache.glob("*.analysis.safetensors"))
    assert not (tmp_path / "output").exists()
    again = run_preflight(recipe(files, tmp_path / "output", ranks=(3,)))
    assert run_merge(again, Progress(), replace(folders, cache_limit=0)).reused_analysis
    assert not list(folders.cache.glob("*.analysis.*"))
    alone = run_preflight(recipe(files, tmp_path / "output", name="alone"))
    assert run_average(alone, Progress(), folders) == tmp_path / "checkpoints/alone.safetensors"


@pytest.mark.slow
def test_the_demo_makes_a_family_once_and_merges_it(tmp_path, monkeypatch):
    small = replace(TINY, count=4, width=8, context=16, terms=6)
    monkeypatch.setattr(demo, "_SPEC", small)
    monkeypatch.setattr(demo, "DEMO_RANKS", (3, 2, 1))
    folder, told = tmp_path / "demo", []
    first = demo.run_demo(folder, Progress(lambda phase, x: told.append((phase, x))))
    assert told[0][0] == "making"
    assert [x for _, x in told] == sorted(x for _, x in told)
    assert {path.name for path in (folder / "Stable-diffusion").iterdir()} == {
        "portrait.safetensors",
        "landscape.safetensors",
        "anime.safetensors",
        "watercolour.safetensors",
        "demo.safetensors",
        "demo.json",
        "demo.png",
    }
    modules = {key.partition(".")[0] for key in load_file(first.loras[0])}
    assert 200 < len(modules) <= 278 + 72  # a layer where other bytes bring back more has none
    assert first.report.loss < 0.12
    assert first.report.relative_loss < 0.13
    told.clear()
    second = demo.run_demo(folder, Progress(lambda phase, x: told.append((phase, x))))
    assert second.report.loss == pytest.approx(first.report.loss, rel=0.02)  # starts from the first
    assert second.reused_analysis
    assert "making" not in dict(told)
