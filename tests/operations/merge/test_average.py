"""The hyper-model alone, without LoRAs."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_family import (
    POSITION_IDS,
    Stop,
    merge,
    recipe,
    snapshot,
)

from hyper_merge.errors import InterruptedRun, OutputError, RecipeError
from hyper_merge.operations.merge.average import run_average
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runtime.progress import Progress


def test_average_alone_is_the_merges_hyper_model(files, tmp_path, merged):
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


def test_average_alone_refuses_a_base_and_stops(files, tmp_path):
    with pytest.raises(RecipeError, match="base"):
        run_average(run_preflight(recipe(files[1:], tmp_path, base=str(files[0]))), Progress())
    with pytest.raises(InterruptedRun):
        run_average(run_preflight(recipe(files, tmp_path)), Stop(0.5, "stop").progress)
    assert snapshot(tmp_path) == {}
