"""Many LoRAs take a quick way: it says what dense numpy finds, and loses little beside the slow one."""

import numpy as np
import pytest
import torch
from lora_files import (
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

from hyper_merge.analysis import factored as analysis
from hyper_merge.errors import RecipeError
from hyper_merge.operations.loras import analysis as reading

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


def slow(monkeypatch):
    """Takes the way of few inputs."""
    monkeypatch.setattr(analysis, "FEW", 100)
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


def test_where_nothing_is_shared_they_are_private_ones(tmp_path):
    paths = [write_lora(tmp_path / f"{c}.safetensors", c, rank=8) for c in range(COUNT)]
    report = share(paths, tmp_path / "models", budget=budget(paths)).report
    assert report.loss < 1.02 * report.private_loss
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
