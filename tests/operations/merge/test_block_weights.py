"""Weights by block: those of supermerger, for an average of any number of checkpoints."""

import pytest
import torch
from narrow_layouts import NARROW, UNET, few
from random_checkpoints import files as random_files
from random_checkpoints import state
from tiny_family import load, losses, merge, recipe, reported_shares, snapshot, tags_of

from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.errors import RecipeError
from hyper_merge.operations.extend import ExtendRequest, run_extend
from hyper_merge.operations.merge.average import run_average
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
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


BLOCKS = (
    ",".join(str(1 + x) for x in range(26)),
    "RISE:" + ",".join(str(x / 25) for x in range(26)),
    "0.5",
)


def test_loras_of_a_merge_are_deviations_from_that_average(files, tmp_path):
    """The figures are those of the files on disk, and of a merge around the same average as a base."""
    settings = {"layer_weights": "plain", "dtype": "float32"}
    merged = merge(files, tmp_path / "one", block_weights=BLOCKS, **settings)
    alone = run_average(
        run_preflight(
            recipe(files, tmp_path / "two", name="mean", dtype="float32", block_weights=BLOCKS)
        ),
        Progress(),
    )
    average, expected = load(merged.place.hyper_model), load(alone)
    assert average.keys() == expected.keys()
    assert all(torch.equal(average[key], expected[key]) for key in average)
    loss, shares = losses(files, merged, tags_of(merged))
    assert merged.report.loss == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(reported_shares(merged).double(), shares, atol=1e-4, rtol=0)
    around = merge(files, tmp_path / "three", base=str(alone), **settings)
    assert merged.report.loss == pytest.approx(around.report.loss, rel=0.02)
    assert merged.report.bound == pytest.approx(around.report.bound, rel=1e-3)
    plain = merge(files, tmp_path / "four", **settings)
    assert plain.report.loss != pytest.approx(loss, rel=0.02)


def test_one_weight_for_all_blocks_is_an_ordinary_merge(files, tmp_path):
    settings = {"layer_weights": "plain", "ranks": (64,), "dtype": "float32"}
    ordinary = merge(files, tmp_path / "one", weights=(2, 1, 4), **settings)
    merged = merge(files, tmp_path / "two", block_weights=["2", "1", "4"], **settings)
    average, expected = load(merged.place.hyper_model), load(ordinary.place.hyper_model)
    for key, tensor in expected.items():
        torch.testing.assert_close(average[key], tensor, rtol=0, atol=1e-7)
    assert merged.report.loss == pytest.approx(ordinary.report.loss, rel=0.02)
    assert merged.report.bound == pytest.approx(ordinary.report.bound, rel=1e-3)


def test_another_merge_of_the_files_finds_neither_its_analysis_nor_its_average(files, tmp_path):
    few = {"iterations": 1, "layer_weights": "plain"}
    first = merge(files, tmp_path, block_weights=BLOCKS, **few)
    other = merge(files, tmp_path, name="other", block_weights=("1", "2", BLOCKS[1]), **few)
    plain = merge(files, tmp_path, name="plain", **few)
    again = merge(files, tmp_path, name="again", block_weights=BLOCKS, **{**few, "ranks": (2,)})
    assert [x.reused_analysis for x in (first, other, plain, again)] == [False] * 3 + [True]
    models = [x.place.hyper_model.name for x in (first, other, plain, again)]
    assert models == ["mix.safetensors", "other.safetensors", "plain.safetensors", models[0]]


def test_a_run_of_them_is_read_back_and_extended(files, tmp_path, state_of):
    merge(files[:2], tmp_path, block_weights=BLOCKS[:2])
    folders = Folders.under(tmp_path)
    weights = load_run(folders, "mix").recipe.block_weights
    assert weights == (tuple(1.0 + x for x in range(26)), tuple(x / 25 for x in range(26)))
    request = ExtendRequest("mix", (files[2],), "more")
    run_extend(request, folders, Progress(), effort=SearchEffort.QUICK)
    *same, new = load_run(folders, "more").recipe.block_weights
    assert tuple(same) == weights
    assert new == pytest.approx([(1 + x + x / 25) / 2 for x in range(26)])


def test_a_base_has_no_use_for_them(files, tmp_path):
    before = snapshot(tmp_path)
    with pytest.raises(RecipeError, match=r"are of an average, and the base is a\.safetensors"):
        merge(files, tmp_path / "models", base=str(files[0]), block_weights=BLOCKS)
    assert snapshot(tmp_path) == before
