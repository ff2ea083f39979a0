"""A merge stays within the memory that is allowed, and makes the same files in it."""

from dataclasses import replace

import pytest
from sparse_checkpoints import full_size
from tiny_family import merge, recipe, snapshot

from hyper_merge.analysis import store
from hyper_merge.analysis.cache import analysis_path
from hyper_merge.errors import RecipeError
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.memory import MemoryLimits, MemoryNeeds
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runtime.scratch import RESIDENT, Scratch

NEEDS = MemoryNeeds(always=100, solving=300, reading=50, largest=400)


def test_what_is_left_beside_the_needs_may_be_kept_and_analysed():
    assert NEEDS.least == 550
    assert NEEDS.limits(None) == MemoryLimits()
    assert NEEDS.limits(600) == MemoryLimits(resident=200, in_flight=450)
    assert NEEDS.peak(NEEDS.limits(600), kept=10**9, tensors=450) == 600
    assert NEEDS.peak(NEEDS.limits(600), kept=10, tensors=None) == 410


def test_too_little_is_refused_with_the_least_that_works(files, tmp_path):
    needs = run_preflight(recipe(files, tmp_path)).memory_needs
    with pytest.raises(
        RecipeError, match=r"need \d+ MB of memory at least, and 1 MB are"
    ) as caught:
        run_preflight(recipe(files, tmp_path, memory="1MB"))
    size = caught.value.hint.split(" or more")[0].removeprefix("give ")
    least = run_preflight(recipe(files, tmp_path, memory=size))
    assert 0 <= least.limits.resident < least.recipe.memory - needs.least + 10**9
    with pytest.raises(RecipeError):
        run_preflight(recipe(files, tmp_path, memory=needs.least - 1))


def test_the_estimate_follows(tmp_path):
    models = [full_size(tmp_path / f"{name}.safetensors", name) for name in "abcd"]
    plain = run_preflight(recipe(models, tmp_path, ranks=(128, 64, 32, 16)))
    usual, least = estimate_merge(plain).memory, plain.memory_needs.least
    assert least < usual
    for memory in (least, (least + usual) // 2):
        limited = run_preflight(recipe(models, tmp_path, ranks=(128, 64, 32, 16), memory=memory))
        assert estimate_merge(limited).memory == pytest.approx(memory, rel=0.01)
    much = run_preflight(recipe(models, tmp_path, ranks=(128, 64, 32, 16), memory="64GB"))
    assert much.limits.resident > RESIDENT


def test_the_files_are_the_same_in_less_memory(files, tmp_path, monkeypatch):
    limits = []

    def noted(folder, resident):
        limits.append(resident)
        return Scratch(folder, 0 if len(limits) > 1 else resident)

    monkeypatch.setattr(store, "Scratch", noted)
    plain = merge(files, tmp_path / "plain", topup="2")
    needs = run_preflight(recipe(files, tmp_path, topup="2")).memory_needs
    little = merge(files, tmp_path / "little", topup="2", memory=needs.least)
    assert limits[0] == RESIDENT > limits[1] == needs.limits(needs.least).resident
    first, second = (snapshot(merged.place.hyper_model.parents[1]) for merged in (plain, little))
    assert first.keys() == second.keys()
    tensors = [name for name in first if name.endswith(".safetensors")]
    for name in tensors:  # all but the date in the header
        bodies = [
            content[name][8 + int.from_bytes(content[name][:8], "little") :]
            for content in (first, second)
        ]
        assert bodies[0] == bodies[1]
    assert plain.report == little.report


def test_the_limit_is_no_part_of_what_decides_the_files(files, tmp_path):
    plain, limited = (
        run_preflight(recipe(files, tmp_path, memory=memory)) for memory in (None, "50GB")
    )
    assert plain.average_id == limited.average_id
    assert plain.recipe.to_metadata() == limited.recipe.to_metadata()
    paths = [analysis_path(tmp_path, x.inputs, x.pass_options) for x in (plain, limited)]
    assert paths[0] == paths[1]
    assert plain.pass_options == replace(limited.pass_options, in_flight=0)
