"""Many LoRAs take a quick way: it says what dense numpy finds, and loses little beside the slow one."""

import json
from functools import partial
from statistics import fmean

import numpy as np
import pytest
import torch
from lora_files import (
    CONV,
    SHAPES,
    dense,
    distance,
    energy,
    factors,
    kohya,
    restored,
    share,
    write,
    write_lora,
)

from hyper_merge.decomposition.factored import FEW
from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.errors import RecipeError
from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.operations.loras import analysis as reading
from hyper_merge.operations.loras import relatives as relatives_of
from hyper_merge.operations.loras.plan import plan_share
from hyper_merge.operations.loras.relatives import find_relative_sets
from hyper_merge.operations.loras.share import DEFAULTS, preflight_share, run_share
from hyper_merge.recipe.recipe import Recipe
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver import many_inputs
from hyper_merge.solver.many_start import start_pairs

COUNT, ALIKE = 10, 5


def write_relatives(folder, count=COUNT):
    """Writes LoRAs in groups of `ALIKE`, each of which share half of their ranks."""
    paths = []
    for c in range(count):
        own, shared = factors(4, c), factors(4, 100 + c // ALIKE)
        strength = 0.6 + 0.1 * (c % ALIKE)
        pairs = {
            module: (
                np.concatenate([own[module][0] * 0.7, shared[module][0] * strength], 1),
                np.concatenate([own[module][1], shared[module][1]]),
            )
            for module in SHAPES
        }
        paths.append(write(folder / f"lora{c}.safetensors", kohya(pairs, 8, torch.float16)))
    return paths


@pytest.fixture(scope="module")
def relatives(tmp_path_factory):
    return write_relatives(tmp_path_factory.mktemp("relatives"))


def budget(paths, part=0.3):
    return int(part * sum(path.stat().st_size for path in paths))


def sets_of(paths, output):
    """Returns the sets of relatives for a budget."""
    settings = {"name": "mix", "budget": budget(paths), "output": output, "exact": "none"}
    preflight = preflight_share(Recipe(models=tuple(paths), **settings))
    return find_relative_sets(preflight.merge, preflight.loras, Progress())


def named_by(result, row):
    return {tag.name for tag in parse_tags(result.report.tags(row))}


def slow(monkeypatch):
    """Takes the way of few inputs."""
    monkeypatch.setattr(relatives_of, "FEW", 100)
    monkeypatch.setattr(reading, "FEW", 100)


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 0.3},
        {"ranks": (4,) * 6},
        {"budget": 0.3, "layer_weights": "layout", "fit_weights": (*(1.0,) * 9, 4.0)},
        {"budget": 0.3, "topup": "2"},
        {"ranks": (4,) * 6, "multipliers": "shared", "lora_dtype": "float8"},
        {"ranks": (3, 3), "allocation": "even"},
        {"target": 0.6},
    ],
    ids=str,
)
def test_what_the_report_says_holds_for_the_files(tmp_path, relatives, settings):
    if "budget" in settings:
        settings = {**settings, "budget": budget(relatives, settings["budget"])}
    result = share(relatives, tmp_path / "models", **settings)
    for path, row in zip(relatives, result.report.checkpoints, strict=True):
        original = dense(path)
        left = distance(restored(result, row), original) / energy(original)
        assert row.explained == pytest.approx(1 - left, abs=5e-4)
    if "budget" in settings:
        size = sum(path.stat().st_size for path in result.loras)
        assert 0.97 * settings["budget"] < size <= settings["budget"]


def test_it_loses_next_to_nothing_beside_the_way_of_few(tmp_path, relatives, monkeypatch):
    settings = {"budget": budget(relatives), "iterations": 12}
    quick = share(relatives, tmp_path / "quick", **settings).report
    slow(monkeypatch)
    reference = share(relatives, tmp_path / "slow", **settings).report
    assert quick.loss < 1.03 * reference.loss
    assert quick.loss < 0.9 * quick.private_loss


def start_with(further, components, blocks, most, seed):
    """Returns what `start_pairs` does with other random numbers."""
    return start_pairs(components, blocks, most, seed + further)


def test_sets_of_relatives_lose_no_more_than_all_at_once_and_have_short_prompts(
    tmp_path, relatives, monkeypatch
):
    settings = {"budget": budget(relatives, 0.2), "iterations": 4}
    reports = {"sets": [], "all": []}
    for seed in range(0, 400, 100):  # the start's random numbers alone make a hundredth and more
        seeded = partial(start_with, seed)
        monkeypatch.setattr(many_inputs, "start_pairs", seeded)
        for way, few in (("sets", FEW), ("all", 100)):
            monkeypatch.setattr(relatives_of, "FEW", few)
            result = share(relatives, tmp_path / f"{way}{seed}", **settings)
            reports[way].append(result.report)
    in_sets, at_once = (fmean(report.loss for report in of_way) for of_way in reports.values())
    assert in_sets < 1.02 * at_once
    in_sets, at_once = (of_way[0] for of_way in reports.values())
    halves = [in_sets.checkpoints[:ALIKE], in_sets.checkpoints[ALIKE:]]
    named = [{tag.name for row in half for tag in parse_tags(in_sets.tags(row))} for half in halves]
    assert not set.intersection(*named)
    assert set.union(*named) == set(in_sets.loras)
    card = json.loads((tmp_path / "sets0/Lora" / f"{in_sets.loras[0]}.json").read_text())
    assert f"for {ALIKE} of the {COUNT} LoRAs" in card["description"]
    assert [line.partition(":")[0] for line in card["notes"].splitlines()] == [
        row.name for row in halves[0]
    ]
    all_tags = [len(parse_tags(at_once.tags(row))) for row in at_once.checkpoints]
    assert set(all_tags) == {len(at_once.loras)}


def test_sets_too_small_for_a_file_are_joined(tmp_path, relatives):
    faint = {m: (up * 1e-3, down) for m, (up, down) in factors(4, 900).items()}
    path = write(tmp_path / "faint.safetensors", kohya(faint, dtype=torch.float16))
    paths = [*relatives, path]
    sets = sets_of(paths, tmp_path)
    assert sorted(len(one.places) for one in sets) == [ALIKE, ALIKE + 1]
    assert 0.95 * budget(paths) < sum(one.budget for one in sets) <= budget(paths)


def test_who_changes_few_layers_is_seen_by_the_sample(tmp_path, relatives, monkeypatch):
    paths = [*relatives, write_lora(tmp_path / "one.safetensors", 50, rank=8, modules=[CONV])]
    monkeypatch.setattr(relatives_of, "_LEAST_FILES", 0.0)
    sets = sets_of(paths, tmp_path)
    monkeypatch.setattr(relatives_of, "_LEAST_SEEN", 1)
    monkeypatch.setattr(relatives_of, "_SAMPLE", 1)  # which leaves that layer out
    fewer = sets_of(paths, tmp_path)
    assert [x.places for x in sets] == [x.places for x in fewer]
    assert len(sets) == 3
    assert fewer[-1].budget == pytest.approx(sets[-1].budget, rel=0.25)


def test_who_changes_nothing_is_with_others(tmp_path, relatives):
    zeros = {module: (0 * up, down) for module, (up, down) in factors(4, 900).items()}
    path = write(tmp_path / "zeros.safetensors", kohya(zeros))
    result = share([*relatives, path], tmp_path / "models", target=0.6)
    users = {x for row in result.report.checkpoints for x in named_by(result, row)}
    assert users == {lora.stem for lora in result.loras}
    assert result.report.checkpoints[-1].explained == pytest.approx(1)


def test_the_progress_names_the_set_and_never_goes_back(tmp_path, relatives):
    reports = []
    settings = {"name": "mix", "budget": budget(relatives), "output": tmp_path, **DEFAULTS}
    recipe = Recipe(models=tuple(relatives), **settings)
    progress = Progress(lambda phase, fraction: reports.append((phase, fraction)))
    run_share(preflight_share(recipe), progress, SearchEffort.QUICK)
    fractions = [fraction for _, fraction in reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    phases = [phase for phase, _ in reports]
    assert "comparing the LoRAs" in phases
    first, second = (phases.index(f"solving for the LoRAs (set {n} of 2)") for n in (1, 2))
    assert first < second


def test_the_plan_of_a_sample_is_about_that_of_all_layers(tmp_path, relatives, monkeypatch):
    settings = {"name": "mix", "budget": budget(relatives), "output": tmp_path, **DEFAULTS}
    preflight = preflight_share(Recipe(models=tuple(relatives), **settings))
    whole = plan_share(preflight, Progress())
    monkeypatch.setattr(relatives_of, "_SAMPLE", 2)
    monkeypatch.setattr(relatives_of, "_LEAST_SEEN", 1)
    sampled = plan_share(preflight, Progress())
    assert sampled.requested.shared != whole.requested.shared
    assert sampled.requested.shared == pytest.approx(whole.requested.shared, abs=0.05)
    assert sampled.requested.size == whole.requested.size
    result = share(relatives, tmp_path / "models", budget=budget(relatives)).report
    mean = fmean(row.explained for row in result.checkpoints)
    assert mean == pytest.approx(fmean(sampled.requested.shared), abs=0.05)


def test_where_nothing_is_shared_they_are_private_ones(tmp_path):
    paths = [write_lora(tmp_path / f"{c}.safetensors", c, rank=8) for c in range(COUNT)]
    report = share(paths, tmp_path / "models", budget=budget(paths)).report
    assert report.loss < 1.03 * report.private_loss
    assert len(report.loras) == COUNT


def test_few_blocks_for_copies_of_one(tmp_path):
    paths = []
    for c in range(COUNT):
        pairs = {m: ((1 + 0.1 * c) * up, down) for m, (up, down) in factors(4, 0).items()}
        paths.append(write(tmp_path / f"{c}.safetensors", kohya(pairs)))
    report = share(paths, tmp_path / "models", ranks=(4,), lora_dtype="same").report
    assert report.loss < 1e-4


def test_a_target_beyond_all_is_refused(tmp_path, relatives):
    with pytest.raises(RecipeError, match="cannot be reached"):
        share(relatives, tmp_path / "models", target=0.999999, lora_dtype="float16")
