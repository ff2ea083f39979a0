"""Recipes: read, refused, written back."""

import dataclasses
import json
import pickle
import re
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from recipe_yaml import to_yaml

from hyper_merge.errors import RecipeError
from hyper_merge.recipe.default_ranks import default_ranks
from hyper_merge.recipe.loading import load_recipe, recipe_from_options
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.recipe.recipe import FIELDS, Recipe, option_help

BASE = "name: example\nmodels: [a.safetensors, b.safetensors]\n"
MODELS = (Path("a.safetensors"), Path("b.safetensors"))
ORIGINAL = """\
name: example
models: [path1.safetensors, path2.safetensors]
device: cuda
dtype: float16
iterations: 6
ranks: [128, 64, 32, 16]
"""


@pytest.fixture
def write(tmp_path):
    """Writes a recipe and gives its path."""

    def write(text):
        path = tmp_path / "config.yaml"
        if isinstance(text, bytes):
            path.write_bytes(text)
        else:
            path.write_text(text, encoding="utf-8")
        return path

    return write


# the table


def test_the_table_and_the_recipe_agree_both_ways():
    assert [field.name for field in FIELDS] == [f.name for f in dataclasses.fields(Recipe)]


def test_every_parser_takes_its_own_results_unchanged():
    recipe = Recipe("x", MODELS, weights=(1.0, 2.0), base="c.ckpt", device="cuda:1")
    for field in FIELDS:
        value = getattr(recipe, field.name)
        assert field.parse(value) == value


def test_metadata_holds_all_settings_but_paths_on_disk():
    names = set(Recipe("x", MODELS).to_metadata())
    assert {field.name for field in FIELDS} - names == {"output", "overwrite", "damaged", "memory"}


def test_every_option_is_explained_with_its_default():
    helps = {field.name: option_help(field) for field in FIELDS}
    assert helps["ranks"].endswith("(default: medium)")
    assert helps["seed"].endswith("(default: 0)")
    assert "default" not in helps["name"]
    assert all(field.metavar for field in FIELDS if field.takes != "flag")


# reading


def test_the_original_projects_file_is_read(write):
    recipe = load_recipe(write(ORIGINAL))
    assert recipe == Recipe(
        name="example",
        models=(Path("path1.safetensors"), Path("path2.safetensors")),
        device="cuda",
        dtype="float16",
        iterations=6,
        ranks=(128, 64, 32, 16),
    )


def test_an_omitted_setting_has_the_documented_default(write):
    recipe = load_recipe(write(BASE))
    assert recipe.ranks == default_ranks(2)
    assert (recipe.device, recipe.dtype, recipe.base) == ("auto", "float16", "average")
    assert (recipe.method, recipe.vae, recipe.seed) == ("joint", "first", 0)
    assert (recipe.weights, recipe.output, recipe.overwrite) == (None, Path("models"), False)


@pytest.mark.parametrize(
    "text", ["[128, 64]", '"128, 64"', "128, 64", "128 64", "\n  - 128\n  - 64"]
)
def test_ranks_may_be_a_list_or_a_text(write, text):
    assert load_recipe(write(f"{BASE}ranks: {text}\n")).ranks == (128, 64)


@pytest.mark.parametrize("text", ["large", " Large", "[large]", "[LARGE]"])
def test_ranks_may_be_a_word(write, text):
    assert load_recipe(write(f"{BASE}ranks: {text}\n")).ranks == default_ranks(2, "large")


@pytest.mark.parametrize(
    ("count", "ranks"), [(2, (120, 120)), (3, (80,) * 3), (8, (30,) * 8), (50, (30,) * 8)]
)
def test_there_are_as_many_loras_as_checkpoints_but_eight_at_most(count, ranks):
    models = tuple(Path(f"{number}.safetensors") for number in range(count))
    assert Recipe("x", models).ranks == ranks
    assert Recipe("x", models, budget=10**9).ranks == ranks, "for estimates, before they are found"


def test_code_may_give_a_word_too():
    models = (Path("a.safetensors"), Path("b.safetensors"))
    recipe = Recipe.from_settings(
        {"name": "x", "models": [*map(str, models)], "ranks": "small"}, "it"
    )
    assert recipe == Recipe("x", models, ranks="small") == Recipe("x", models, ranks=(60, 60))


@pytest.mark.parametrize("word", ["Small", "tiny"])
def test_code_is_told_of_another_word(word):
    with pytest.raises((RecipeError, TypeError), match="ranks"):
        Recipe("x", (Path("a.safetensors"), Path("b.safetensors")), ranks=word)


def test_a_lone_rank_needs_no_brackets(write):
    assert load_recipe(write(f"{BASE}ranks: 128\n")).ranks == (128,)


@pytest.mark.parametrize("text", ["5e-4", "0.0005", "5.e-4"])
def test_every_spelling_of_a_number_is_one(write, text):
    assert load_recipe(write(f"{BASE}tolerance: {text}\n")).tolerance == 5e-4


def test_options_alone_can_give_every_value():
    options = {
        "name": "123",
        "models": ["1.5", "b.safetensors"],
        "ranks": ["8,", "4"],
        "budget": "null",
        "target": "null",
        "topup": "90%",
        "device": "cuda:1",
        "dtype": "float32",
        "iterations": "7",
        "tolerance": "1e-3",
        "weights": "1, 2.5",
        "block_weights": ["1", "A:" + ",".join("2" * 20)],
        "base": "c.ckpt",
        "output": "out",
        "overwrite": "true",
        "seed": "9",
        "method": "greedy",
        "allocation": "even",
        "multipliers": "shared",
        "fit_weights": "3 0",
        "layer_weights": "relative",
        "vae": "average",
        "exact": "norms",
        "lora_dtype": "float8",
        "damaged": "accept",
        "memory": "2GB",
        "training": "20",
    }
    assert set(options) == {field.name for field in FIELDS}
    assert recipe_from_options(options) == Recipe(
        name="123",
        models=(Path("1.5"), Path("b.safetensors")),
        ranks=(8, 4),
        topup=PrivateLoraTarget(share=0.9),
        device="cuda:1",
        dtype="float32",
        iterations=7,
        tolerance=1e-3,
        weights=(1.0, 2.5),
        block_weights=((1.0,), (2.0,) * 20),
        base="c.ckpt",
        output=Path("out"),
        overwrite=True,
        damaged="accept",
        memory=2 * 10**9,
        training=20,
        seed=9,
        method="greedy",
        allocation="even",
        multipliers="shared",
        fit_weights=(3.0, 0.0),
        layer_weights="relative",
        vae="average",
        exact="norms",
        lora_dtype="float8",
    )


def test_the_command_line_wins_over_the_file(write):
    path = write(f"{BASE}ranks: [4]\nseed: 1\nweights: [1, 2]\n")
    recipe = load_recipe(path, {"ranks": "8 2", "weights": "null", "models": ["c", "d"]})
    assert (recipe.ranks, recipe.seed, recipe.weights) == ((8, 2), 1, None)
    assert recipe.models == (Path("c"), Path("d"))


def test_paths_are_found_here_or_beside_the_file(write, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    for path in (here / "a.safetensors", tmp_path / "a.safetensors", tmp_path / "b.safetensors"):
        path.touch()
    monkeypatch.chdir(here)
    models = load_recipe(write("name: x\nmodels: [a.safetensors, b.safetensors, c]\n")).models
    assert models == (Path("a.safetensors"), tmp_path / "b.safetensors", Path("c"))


def test_a_base_is_found_beside_the_file_too(write, tmp_path):
    (tmp_path / "base.safetensors").touch()
    recipe = load_recipe(write(f"{BASE}base: base.safetensors\n"))
    assert recipe.base == str(tmp_path / "base.safetensors")


def test_a_recipe_is_frozen_hashable_and_survives_pickling():
    recipe = Recipe("x", MODELS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert len({recipe, Recipe("x", MODELS)}) == 1


# writing

DEVICE = re.compile(r"con|prn|aux|nul|(com|lpt)\d|none", re.IGNORECASE)  # no names of files
NAMES = (
    st.text(string.ascii_letters + string.digits + "._ +-", min_size=1, max_size=100)
    .map(str.strip)
    .filter(lambda n: n.strip("._ ") == n and n and "__" not in n and n.lower() != "none")
)
PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
RECIPES = st.builds(
    Recipe,
    name=NAMES.filter(lambda n: not DEVICE.fullmatch(n.split(".")[0])),
    models=st.lists(PATHS.map(Path), min_size=2, max_size=4).map(tuple),
    ranks=st.lists(st.integers(1, 4096), min_size=1, max_size=64).map(tuple),
    device=st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    lora_dtype=st.sampled_from(["auto", "same", "float16", "bfloat16", "float32", "float8"]),
    iterations=st.integers(1, 10_000),
    tolerance=st.floats(0, 1),
    base=st.just("average") | PATHS,
    output=PATHS.map(Path),
    overwrite=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    method=st.sampled_from(["joint", "greedy"]),
    allocation=st.sampled_from(["adaptive", "even"]),
    layer_weights=st.sampled_from(["output", "layout", "relative", "plain"]),
    multipliers=st.sampled_from(["separate", "shared"]),
    vae=st.sampled_from(["first", "average"]),
).flatmap(
    lambda recipe: (
        st.just(recipe)
        | st.lists(
            st.tuples(st.floats(1e-300, 1e300), st.floats(1e-300, 1e300)),
            min_size=len(recipe.models),
            max_size=len(recipe.models),
        )
        .map(lambda pairs: tuple(zip(*pairs, strict=True)))
        .map(lambda lists: dataclasses.replace(recipe, weights=lists[0], fit_weights=lists[1]))
    )
)


@given(recipe=RECIPES)
def test_a_recipe_survives_yaml(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("round", numbered=True)
    path = folder / "config.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@given(recipe=RECIPES)
def test_other_readers_of_yaml_agree(recipe):
    read = yaml.safe_load(to_yaml(recipe))
    assert read["name"] == recipe.name
    assert read["ranks"] == list(recipe.ranks)
    assert read["models"] == [str(path) for path in recipe.models]
    assert float(read["tolerance"]) == recipe.tolerance


@given(recipe=RECIPES)
def test_settings_survive_json(recipe):
    settings = json.loads(json.dumps(recipe.to_settings()))
    read = Recipe.from_settings(settings, "manifest")
    absolute = {
        "models": tuple(path.absolute() for path in recipe.models),
        "output": recipe.output.absolute(),
        "base": recipe.base if recipe.base == "average" else str(Path(recipe.base).absolute()),
    }
    assert read == dataclasses.replace(recipe, **absolute)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, 'run mix, key "colour": unknown key'),
        ({"ranks": [0]}, 'run mix, key "ranks": item 1: expected a whole number'),
        ({"models": ["a"]}, 'run mix, key "models": Fewer than two checkpoints'),
        ({"tolerance": float("nan")}, 'run mix, key "tolerance": expected a number'),
    ],
)
def test_impossible_json_settings_are_refused_by_place(changes, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.from_settings(Recipe("x", MODELS).to_settings() | changes, "run mix")


@given(recipe=RECIPES)
def test_metadata_is_text_that_json_can_hold(recipe):
    metadata = recipe.to_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert json.loads(json.dumps(metadata)) == metadata


def test_no_folder_leaks_into_metadata():
    recipe = Recipe(
        "x",
        (Path("/home/me/secret/a.safetensors"), Path("C:\\Users\\me\\secret\\b.ckpt")),
        base="/home/me/secret/base.safetensors",
        output=Path("/home/me/secret"),
        weights=(1.0, 3.0),
    )
    metadata = recipe.to_metadata()
    assert json.loads(metadata["models"]) == ["a.safetensors", "b.ckpt"]
    assert metadata["base"] == "base.safetensors"
    assert metadata["weights"] == "1.0, 3.0"
    assert "secret" not in json.dumps(metadata)
