"""A budget is used to the last rank that fits, all files counted, and never exceeded."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_family import layers_of, merge, recipe

from hyper_merge.errors import RecipeError
from hyper_merge.operations.merge.preflight import run_preflight

NUMBERS = 400  # bytes by which the numbers' texts may be shorter than foreseen, in all files
ENDING = ".lora_down.weight"


def file_bytes(merged):
    return sum(path.stat().st_size for path in merged.loras)


def cheapest_rank(merged, models, dtype):
    """Returns the least bytes of one more rank, where a file has its layer already."""
    sizes = {layer.module: layer.m + layer.n for layer in layers_of(models[0], ends=True)}
    present = {
        key.removesuffix(ENDING)
        for path in merged.loras
        for key in load_file(path)
        if ENDING in key
    }
    return dtype.itemsize * min(sizes[module] for module in present)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (45_000, {}),
        (80_000, {"exact": "all"}),
        (200_000, {"lora_dtype": "float8"}),
        (200_000, {"lora_dtype": "float32", "multipliers": "shared"}),
        (60_000, {"topup": "1"}),
        (60_000, {"topup": "99.9%", "exact": "norms"}),
        (200_000, {"topup": "1%"}),
    ],
    ids=str,
)
def test_a_budget_is_used_to_the_last_rank(files, tmp_path, size, settings):
    merged = merge(files, tmp_path, ranks=(1,), budget=size, **settings)
    dtype = {"float8": torch.float8_e4m3fn, "float32": torch.float32}
    rank = cheapest_rank(merged, files, dtype.get(settings.get("lora_dtype"), torch.float16))
    assert size - rank - NUMBERS < file_bytes(merged) <= size
    assert file_bytes(merged) > 0.99 * size
    private = [path.stem for path in merged.loras if "_top-" in path.stem]
    assert bool(private) == (settings.get("topup") not in (None, "1%"))
    if size == 45_000:  # layers without ranks take no bytes of a file
        modules = [{key.partition(".")[0] for key in load_file(path)} for path in merged.loras]
        assert all(0 < len(part) < len(layers_of(files[0])) for part in modules)


@pytest.mark.parametrize("word", ["none", "all"])
def test_the_least_budget_is_that_of_a_lora_of_rank_one(files, tmp_path, word):
    with pytest.raises(RecipeError, match="the budget of 2 kB is too small") as refusal:
        run_preflight(recipe(files, tmp_path, budget=2_000, exact=word))
    one = merge(files, tmp_path, ranks=(1,), allocation="even", exact=word)
    least = float(refusal.value.hint.removeprefix("give ").split()[0]) * 1000
    assert least == pytest.approx(file_bytes(one), abs=2_000)  # in kB, numbers at their longest
