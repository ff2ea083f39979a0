"""LoRAs are combined and resized as dense numpy does it; what is said of a file holds for the file."""

import numpy as np
import pytest
import torch
from lora_files import (
    DIFFUSERS,
    KEY,
    QUERY,
    SHAPES,
    TEXT,
    dense,
    distance,
    energy,
    factors,
    kohya,
    spelled,
    write,
    write_lora,
)
from safetensors import safe_open
from safetensors.torch import load_file

from hyper_merge.errors import ExtractionError, OutputError, RecipeError
from hyper_merge.operations.loras.combine import run_combine
from hyper_merge.operations.loras.request import CombineRequest
from hyper_merge.runtime.progress import Progress


def combine(*paths, **settings):
    return run_combine(CombineRequest(tuple(paths), **settings), Progress())


def spectrum(changes):
    return {
        module: np.linalg.svd(change, compute_uv=False) ** 2 for module, change in changes.items()
    }


def test_a_sum_is_exact(tmp_path):
    one = write_lora(tmp_path / "a.safetensors", 0, rank=4, alpha=2)
    two = write_lora(tmp_path / "b.safetensors", 1, rank=3, modules=[KEY, TEXT])
    result = combine(one, two, multipliers=(1.0, -0.5), to=tmp_path / "c.safetensors")
    expected = dense(one)
    for module, change in dense(two).items():
        expected[module] = expected[module] - 0.5 * change
    assert distance(dense(result.path), expected) < 1e-6 * energy(expected)
    assert result.kept == pytest.approx(1, abs=1e-6)
    assert (result.rank, result.layers) == (7, len(SHAPES))


def test_spellings_may_differ(tmp_path):
    one = write_lora(tmp_path / "a.safetensors", 0)
    pairs = factors(4, 1)
    two = write(
        tmp_path / "b.safetensors", spelled(pairs, DIFFUSERS, "lora_B.weight", "lora_A.weight")
    )
    same = write(tmp_path / "same.safetensors", kohya(pairs))
    result = combine(one, two, to=tmp_path / "c.safetensors", dtype="float32")
    expected = {module: change + dense(same)[module] for module, change in dense(one).items()}
    assert distance(dense(result.path), expected) < 1e-10 * energy(expected)


@pytest.mark.parametrize("rank", [1, 3, 99])
def test_a_rank_keeps_the_best_of_each_layer(tmp_path, rank):
    path = write_lora(tmp_path / "a.safetensors", 0, rank=6)
    result = combine(path, rank=rank, to=tmp_path / "b.safetensors", dtype="float32")
    before = dense(path)
    left = sum(values[rank:].sum() for values in spectrum(before).values())
    assert distance(dense(result.path), before) == pytest.approx(
        left, rel=1e-4, abs=1e-9 * energy(before)
    )
    assert result.kept == pytest.approx(1 - left / energy(before), abs=1e-5)
    assert result.rank == min(rank, 6)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
def test_a_share_is_kept_with_few_bytes(tmp_path, keep):
    path = write_lora(tmp_path / "a.safetensors", 0, rank=8)
    result = combine(path, keep=keep, to=tmp_path / "b.safetensors")
    before = dense(path)
    kept = 1 - distance(dense(result.path), before) / energy(before)
    assert keep - 1e-4 <= kept == pytest.approx(result.kept, abs=1e-6)
    # One rank less where it matters least would fall below the share.
    values, last = spectrum(before), []
    for key, down in load_file(result.path).items():
        if key.endswith(".lora_down.weight"):
            module = key.removesuffix(".lora_down.weight")
            gain = values[module][len(down) - 1]
            last.append((gain / sum(before[module].shape), gain))
    assert kept - min(last)[1] / energy(before) < keep


@pytest.mark.parametrize("size", [30_000, 90_000])
def test_a_size_is_filled_and_not_exceeded(tmp_path, size):
    path = write_lora(tmp_path / "a.safetensors", 0, rank=8)
    result = combine(path, size=size, to=tmp_path / "b.safetensors")
    actual = result.path.stat().st_size
    assert actual == result.size <= size
    assert actual > size - 2 * (320 + 320) - 500  # no smallest rank more
    before = dense(path)
    kept = 1 - distance(dense(result.path), before) / energy(before)
    assert result.kept == pytest.approx(kept, abs=1e-5)


def test_layers_that_are_left_out_count_as_lost(tmp_path):
    pairs = factors(2, 0, [QUERY, TEXT])
    pairs[TEXT] = (pairs[TEXT][0] * 1e-3, pairs[TEXT][1])
    path = write(tmp_path / "a.safetensors", kohya(pairs, dtype=torch.float32))
    result = combine(path, size=6000, to=tmp_path / "b.safetensors", dtype="float32")
    assert set(dense(result.path)) == {QUERY}
    assert result.parts["text_encoder"] == 0.0
    kept = 1 - distance(dense(result.path), dense(path)) / energy(dense(path))
    assert result.kept == pytest.approx(kept, abs=1e-6)


def test_the_type_stays_unless_another_is_asked_for(tmp_path):
    path = write_lora(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    for word, dtype in (("same", torch.bfloat16), ("float16", torch.float16)):
        result = combine(path, rank=2, dtype=word, to=tmp_path / f"{word}.safetensors")
        state = load_file(result.path)
        assert {x.dtype for key, x in state.items() if not key.endswith("alpha")} == {dtype}


def test_a_file_says_what_it_was_made_of_and_keeps_the_trigger_words(tmp_path):
    metadata = {"ss_tag_frequency": '{"x": {"cat": 3}}', "ss_network_dim": "4", "ss_seed": "1"}
    path = write(tmp_path / "a.safetensors", kohya(factors()), metadata)
    result = combine(path, rank=2)
    assert result.path == tmp_path / "a-rank2.safetensors"
    with safe_open(result.path, "pt") as file:
        written = file.metadata()
    assert written["ss_tag_frequency"] == metadata["ss_tag_frequency"]
    assert written["ss_network_dim"] == "2"
    assert "ss_seed" not in written
    assert '"a.safetensors"' in written["hyper_merge.lineage"]
    assert "ss_sd_model_name" not in written


def test_nothing_is_replaced_unasked(tmp_path):
    path = write_lora(tmp_path / "a.safetensors")
    other = write_lora(tmp_path / "b.safetensors", 5)
    content = other.read_bytes()
    with pytest.raises(OutputError):
        combine(path, rank=2, to=other)
    assert other.read_bytes() == content
    with pytest.raises(OutputError):
        combine(path, rank=2, to=path, overwrite=True)
    combine(path, rank=2, to=other, overwrite=True)
    assert other.read_bytes() != content


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 2, "keep": 0.5}, "one of rank, size and keep"),
        ({"multipliers": (1.0, 2.0)}, "expected 1 numbers"),
        ({"multipliers": (0.0,)}, "other than 0"),
        ({"size": 2000}, "too small"),
    ],
)
def test_impossible_requests_are_refused(tmp_path, settings, words):
    path = write_lora(tmp_path / "a.safetensors")
    with pytest.raises(RecipeError, match=words):
        combine(path, to=tmp_path / "b.safetensors", **settings)
    assert not (tmp_path / "b.safetensors").exists()


def test_loras_that_cancel_each_other_make_none(tmp_path):
    state = kohya({QUERY: (np.zeros((320, 2), "f4"), np.ones((2, 320), "f4"))})
    path = write(tmp_path / "a.safetensors", state)
    with pytest.raises(ExtractionError, match="nothing"):
        combine(path, keep=0.5, to=tmp_path / "b.safetensors")
