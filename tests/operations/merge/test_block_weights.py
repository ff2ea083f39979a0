"""Weights by block: those of supermerger, for an average of any number of checkpoints."""

import pytest
import torch
from narrow_layouts import NARROW, UNET, few
from random_checkpoints import files as random_files
from random_checkpoints import state
from tiny_family import load, merge, recipe, snapshot

from hyper_merge.errors import RecipeError
from hyper_merge.operations.merge.average import run_average
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runtime.progress import Progress

TEXTS = {
    "sd1": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    "sdxl": "conditioner.embedders.1.model.ln_final.weight",
}
PLACES = {  # key -> its number
    "sd1": {
        TEXTS["sd1"]: 0,
        UNET + "time_embed.0.weight": 1,
        UNET + "input_blocks.0.0.weight": 1,
        UNET + "input_blocks.11.0.in_layers.2.weight": 12,
        UNET + "middle_block.1.norm.weight": 13,
        UNET + "output_blocks.0.0.in_layers.2.weight": 14,
        UNET + "output_blocks.11.0.in_layers.2.weight": 25,
        UNET + "out.2.weight": 25,
    },
    "sdxl": {
        TEXTS["sdxl"]: 0,
        UNET + "label_emb.0.0.weight": 1,
        UNET + "input_blocks.8.0.in_layers.2.weight": 9,
        UNET + "middle_block.0.in_layers.2.weight": 10,
        UNET + "output_blocks.0.0.in_layers.2.weight": 11,
        UNET + "output_blocks.8.0.in_layers.2.weight": 19,
        UNET + "out.2.bias": 19,
    },
}


def shapes_of(name):
    """Returns the shapes of a small checkpoint of a family, with those keys."""
    shapes = NARROW[name]()
    return few(shapes) | {key: shapes[key] for key in PLACES.get(name, ())}


def average(models, folder, **settings):
    chosen = recipe(models, folder, name="mean", dtype="float32", **settings)
    return load(run_average(run_preflight(chosen), Progress()))


@pytest.mark.parametrize("name", PLACES)
def test_every_block_is_averaged_with_its_own_weights(name, tmp_path):
    models = random_files(tmp_path, *(state(shapes_of(name), seed) for seed in range(3)))
    count = {"sd1": 26, "sdxl": 20}[name]
    rows = [[1.0] * count, [x / count for x in range(count)], [0.5 + x % 3 for x in range(count)]]
    texts = ["1", "SOME_NAME:" + ",".join(map(str, rows[1])), rows[2]]
    mean = average(models, tmp_path / "models", weights=(1.0, 2.0, 3.0), block_weights=texts)
    tensors = [load(path) for path in models]
    for key, place in PLACES[name].items():
        weights = [w * row[place] for w, row in zip((1.0, 2.0, 3.0), rows, strict=True)]
        parts = zip(weights, tensors, strict=True)
        expected = sum(w * part[key].double() for w, part in parts) / sum(weights)
        torch.testing.assert_close(mean[key], expected.float(), rtol=1e-5, atol=1e-5)


def test_an_average_of_two_blends_as_supermerger_does(tmp_path):
    one, two = random_files(tmp_path, *(state(shapes_of("sd1"), seed) for seed in range(2)))
    alpha = [x / 25 for x in range(26)]
    texts = [",".join(str(1 - x) for x in alpha), "GRAD:" + ",".join(map(str, alpha))]
    mean = average((one, two), tmp_path / "models", block_weights=texts)
    first, second = load(one), load(two)
    for key, place in PLACES["sd1"].items():
        expected = first[key] * (1 - alpha[place]) + second[key] * alpha[place]
        torch.testing.assert_close(mean[key], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "texts", "message"),
    [
        ("sd1", ["1", "0," * 24 + "1"], "item 2: expected 26 numbers, or 20 for XL.*25 here"),
        ("sd1", ["1", "-1"], "item 2: expected 26 numbers"),
        ("sd1", ["1"], "expected 2 texts, one per checkpoint, got 1"),
        ("sd1", ["1", ",".join("1" * 20)], "has 26 blocks, got weights for 20"),
        ("sdxl", ["1", ",".join("1" * 26)], "has 20 blocks, got weights for 26"),
        ("flux_dev", ["1", "2"], "Flux dev has no blocks of a UNet"),
        (
            "sd1",
            ["0", "1," * 3 + "0," + ",".join("1" * 22)],
            "no checkpoint has a weight in .*IN02",
        ),
    ],
)
def test_what_does_not_go_is_refused_before_any_work(family, texts, message, tmp_path):
    models = random_files(tmp_path, *(state(shapes_of(family), seed) for seed in range(2)))
    before = snapshot(tmp_path)
    with pytest.raises(RecipeError, match=message):
        average(models, tmp_path / "models", block_weights=texts)
    assert snapshot(tmp_path) == before


def test_a_merge_says_how_to_have_them(tmp_path):
    models = random_files(tmp_path, *(state(shapes_of("sd1"), seed) for seed in range(2)))
    before = snapshot(tmp_path)
    with pytest.raises(RecipeError, match=r"are of an average, and the base is a\.safetensors"):
        merge(files, tmp_path / "models", base=str(files[0]), block_weights=BLOCKS)
    assert snapshot(tmp_path) == before
