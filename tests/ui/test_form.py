"""From the form's values to a recipe, and back; what cannot be is said by the field's label."""

import os
from dataclasses import fields, replace

import pytest
from at_the_tab import FORM, NAMES

from hyper_merge.errors import CheckpointError, RecipeError
from hyper_merge.recipe.default_ranks import RANK_WORDS
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.recipe.recipe import FIELDS, Recipe
from hyper_merge.ui.form import Form, form_from_recipe, recipe_from_form
from hyper_merge.ui.form_fields import (
    BASE_AVERAGE,
    EXACT_CHOICES,
    LABELS,
    VAE_CHOICES,
    form_field,
)


@pytest.fixture
def recipe(host):
    """Returns the recipe of the form with changes."""

    def recipe(**changes):
        return recipe_from_form(replace(FORM, **changes), host.checkpoints(), host.folders())

    return recipe


def test_the_form_becomes_the_recipe_it_describes(recipe, checkpoints, root):
    assert recipe(weights="1, 2 0.5", seed=7.0, iterations=12.0, vae="average of all") == Recipe(
        name="mix",
        models=tuple(checkpoints / name for name in NAMES),
        ranks=(4, 2),
        lora_dtype="same",
        weights=(1.0, 2.0, 0.5),
        device="cpu",
        iterations=12,
        tolerance=2e-3,
        seed=7,
        vae="average",
        output=root,
        exact="none",
    )


@pytest.mark.parametrize(("text", "nbytes"), [("", None), (None, None), ("4 GB", 4 * 10**9)])
def test_the_limit_of_memory_is_a_size(recipe, text, nbytes):
    assert recipe(memory=text).memory == nbytes


def test_models_keep_the_order_of_picks(recipe, checkpoints):
    models = recipe(checkpoints=NAMES[::-1]).models
    assert models == tuple(checkpoints / name for name in NAMES[::-1])


def test_a_checkpoint_of_the_list_can_be_the_base(recipe, checkpoints):
    assert recipe(base="b.safetensors").base == str(checkpoints / "b.safetensors")


def test_each_word_for_ranks_asks_for_twice_the_bytes_of_the_last(recipe):
    small, medium, large = (sum(recipe(ranks=word).ranks) for word in RANK_WORDS)
    assert small * 4 == medium * 2 == large


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": "four, 2"}, 'Ranks: item 1: expected a whole number from 1 to 4096, got "four"'),
        ({"ranks": "4, 2.5"}, "Ranks: item 2: expected a whole number from 1 to 4096, got the number 2.5"),
        ({"ranks": "0"}, "Ranks: item 1: .* got the number 0"),
        ({"ranks": ""}, "Ranks: expected a list of whole numbers, such as 128, 64, 32, 16, or small, medium, large, got nothing"),
        ({"ranks": "  "}, "Ranks: expected .*, got nothing"),
        ({"ranks": None}, "Ranks: expected .*, got nothing"),
        ({"weights": "1, 2"}, "Weights: expected 3 numbers, one per checkpoint, got 2"),
        ({"weights": "1, 2, x"}, 'Weights: item 3: expected a number of 0 or more, got "x"'),
        ({"weights": "0 0 0"}, "Weights: expected weights with a sum above 0"),
        ({"weights": "1, -1, 1"}, "Weights: item 2: .* got the number -1"),
        ({"block_weights": "1\n0.5"}, "Weights by block: expected 3 texts, one per checkpoint, got 2"),
        ({"block_weights": "1\n1,2\n0.5"},
         r"Weights by block: item 2: expected 26 numbers, or 20 for XL, .* \(2 here\)"),
        ({"block_weights": "1\n" + ",".join("1" * 20) + "\n" + ",".join("1" * 26)},
         "Weights by block: some checkpoints have 20 weights and others 26"),
        ({"name": "a/b"}, 'Name: the path separator "/" is not allowed'),
        ({"name": "../mix"}, "Name: the path separator"),
        ({"name": "mix:2"}, 'Name: the character ":" is not allowed'),
        ({"name": "x" * 101}, "Name: expected a name of at most 100 characters"),
        ({"name": None}, "Name: expected text, got nothing"),
        ({"iterations": None}, "Rounds at most: expected a whole number from 1 to 10000, got nothing"),
        ({"iterations": 2.5}, "Rounds at most: expected .* got the number 2.5"),
        ({"iterations": float("nan")}, "Rounds at most: expected .* got the number nan"),
        ({"tolerance": None}, "Stop early: expected a number from 0 to 1, got nothing"),
        ({"tolerance": 5}, "Stop early: expected a number from 0 to 1, got the number 5"),
        ({"seed": -1.0}, "Seed: expected a whole number from 0 to .*, got the number -1"),
        ({"seed": None}, "Seed: expected .* got nothing"),
        ({"memory": "much"}, 'Memory at most: expected a size, such as "300MB" or "1.5GB", got "much"'),
        ({"memory": "4"}, "Memory at most: expected a size of 1kB or more"),
        ({"dtype": "float8"}, "Precision: expected one of float16, bfloat16, float32"),
        ({"dtype": None}, "Precision: expected one of"),
        ({"lora_dtype": "fp8"}, "Precision of the LoRAs: expected one of auto, same, float16"),
        ({"device": "gpu"}, "Device: expected auto, cpu, cuda or cuda:N"),
        ({"device": None}, "Device: expected"),
        ({"vae": "none of them"}, 'VAE: expected one of first, average, got "none of them"'),
        ({"vae": None}, "VAE: expected one of"),
        ({"checkpoints": NAMES[:1]}, "Checkpoints: Fewer than two checkpoints"),
        ({"checkpoints": []}, "Checkpoints: Fewer than two checkpoints"),
    ],
)  # fmt: skip
def test_invalid_values_are_refused_by_their_label(recipe, changes, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        recipe(**changes)


@pytest.mark.parametrize("field", ["checkpoints", "base"])
@pytest.mark.parametrize(
    "typed", ["/etc/passwd", "../Stable-diffusion/a.safetensors", "a", "", "gone.safetensors"]
)
def test_only_names_of_the_list_are_ever_files(recipe, field, typed):
    value = [*NAMES, typed] if field == "checkpoints" else typed
    with pytest.raises(CheckpointError, match="is no longer in the list; press Refresh and pick"):
        recipe(**{field: value})


def test_the_path_of_an_existing_checkpoint_is_refused(recipe, files):
    assert files[0].exists()
    for changes in ({"checkpoints": [NAMES[0], str(files[0])]}, {"base": str(files[0])}):
        with pytest.raises(CheckpointError, match="no longer in the list"):
            recipe(**changes)


def test_every_setting_of_the_form_has_a_label():
    special = {"checkpoints": {"models"}, "save_styles": set(), "separate": {"multipliers"}}
    special["ranks"] = {"ranks", "budget", "target"}  # one field for all three
    in_form = set().union(*(special.get(field.name, {field.name}) for field in fields(Form)))
    assert set(LABELS) == in_form
    assert in_form <= {field.name for field in FIELDS}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("300 MB", {"budget": 300_000_000}),
        ("1.5gb", {"budget": 1_500_000_000}),
        ("95 %", {"target": 0.95}),
        ("4, 2", {"ranks": (4, 2)}),
    ],
)
def test_the_ranks_field_takes_size_or_share(recipe, text, size):
    parsed = recipe(ranks=text)
    assert {key: getattr(parsed, key) for key in size} == size
    assert parsed.finds_ranks == ("ranks" not in size)
    again = recipe(ranks=form_from_recipe(parsed, {}, save_styles=False).ranks)
    assert {key: getattr(again, key) for key in size} == size


def test_lines_of_weights_by_block_are_read_and_written(recipe):
    rows = ["NAME: 1," + ", ".join("0.333333333" for _ in range(25)), "", "  2 ", "0"]
    parsed = recipe(block_weights="\n".join(rows))
    assert parsed.block_weights == ((1.0, *[0.333333333] * 25), (2.0,), (0.0,))
    again = recipe(block_weights=form_from_recipe(parsed, {}, save_styles=False).block_weights)
    assert again.block_weights == parsed.block_weights
    assert recipe(block_weights=" \n").block_weights is None


def test_a_share_above_one_is_refused(recipe):
    with pytest.raises(
        RecipeError, match=r'Share, at worst: expected a share, such as "95%" or 0\.95, got'
    ):
        recipe(ranks="120 %")


def test_advanced_fields_reach_the_recipe(recipe):
    parsed = recipe(
        topup="95%",
        separate=False,
        fit_weights="1, 2, 1",
        allocation="adaptive: where they help most",
        layer_weights="by their effect on the picture",
        training=" 20",
        damaged="refuse them",
    )
    assert parsed.training == 20
    assert form_from_recipe(parsed, {}, save_styles=False).training == "20"
    assert [recipe(training=text).training for text in ("", "0", "auto")] == [0, 0, "auto"]
    assert form_field("training").default == "0"
    assert form_field("weights").default == ""
    assert parsed.topup == PrivateLoraTarget(share=0.95)
    assert parsed.multipliers == "shared"
    assert parsed.fit_weights == (1.0, 2.0, 1.0)
    assert (parsed.allocation, parsed.layer_weights) == ("adaptive", "output")
    assert form_from_recipe(parsed, {}, save_styles=False).topup == "95%"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weights": "1, 2, 0.5", "ranks": "8, 4, 4, 2", "name": "my mix"},
        {"base": "b.safetensors", "dtype": "bfloat16", "device": "auto", "tolerance": 1e-6},
        {"vae": "average of all", "seed": 12, "iterations": 100, "checkpoints": NAMES[1:]},
        {"memory": "4500 MB"},
        {"save_styles": False},
        {"lora_dtype": "float8"},
        {"exact": "these and the norms (A1111, Forge, ComfyUI)"},
    ],
)
def test_the_form_of_a_recipe_describes_it_again(recipe, host, changes):
    form = replace(FORM, **changes)
    made = recipe(**changes)
    assert form_from_recipe(made, host.checkpoints(), save_styles=form.save_styles) == form


def test_the_form_omits_missing_checkpoints_and_base(recipe, host, checkpoints):
    made = recipe(base="b.safetensors")
    (checkpoints / "b.safetensors").unlink()
    form = form_from_recipe(made, host.checkpoints(), save_styles=False)
    assert form.checkpoints == ["a.safetensors", "c.safetensors"]
    assert form.base == BASE_AVERAGE


def test_a_checkpoint_behind_a_link_is_recognised(recipe, host, root, tmp_path):
    os.symlink(root, tmp_path / "link")  # noqa: PTH211 - the shorter word
    made = replace(
        recipe(),
        models=tuple(tmp_path / "link" / "Stable-diffusion" / name for name in NAMES),
    )
    assert form_from_recipe(made, host.checkpoints(), save_styles=False).checkpoints == NAMES


def test_every_vae_policy_has_words():
    parse = next(field.parse for field in FIELDS if field.name == "vae")
    assert [parse(value) for value in VAE_CHOICES.values()] == ["first", "average"]


def test_every_kind_of_companions_has_words():
    parse = next(field.parse for field in FIELDS if field.name == "exact")
    assert [parse(value) for value in EXACT_CHOICES.values()] == [
        "auto",
        "none",
        "ends",
        "norms",
        "all",
    ]
