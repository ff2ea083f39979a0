"""Refusals as data: their text is made of the parts, wherever those were added."""

import pickle
from pathlib import Path

import pytest

from hyper_merge import errors
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import HyperMergeError, OutputError, RecipeError, settings_placed
from hyper_merge.recipe.parsing import parse_ranks
from hyper_merge.recipe.recipe import Recipe

MODELS = (Path("a.safetensors"), Path("b.safetensors"))
CLASSES = [
    error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, HyperMergeError)
]


def option(key):
    """The place of a setting on the command line."""
    return f"option --{key}"


def test_the_text_has_place_message_and_hint():
    assert str(RecipeError("expected 1")) == "expected 1"
    assert str(RecipeError("expected 1", hint="give 1")) == "expected 1; give 1"
    assert str(RecipeError("expected 1", hint="give 1", where="line 3")) == (
        "line 3: expected 1; give 1"
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_survives_pickling_whole(kind):
    if kind is errors.DamagedCacheError:
        error = kind(Path("cache.safetensors"), "cut off")
    elif kind is errors.SameMergeError:
        error = kind("made already", "mix", hint="choose another name")
    else:
        error = kind("full", hint="free some", where="disk", file=Path("x"), key="k")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_the_outermost_block_names_the_place_of_a_setting():
    with (
        pytest.raises(RecipeError) as caught,
        settings_placed(option),
        settings_placed(str, "ranks"),
    ):
        parse_ranks("4, x")
    error = caught.value
    assert (error.key, error.where) == ("ranks", "option --ranks")
    assert error.message == 'item 2: expected a whole number from 1 to 4096, got "x"'
    assert str(error) == f"option --ranks: {error.message}"


def test_refusals_that_name_no_setting_get_no_place():
    with pytest.raises(OutputError, match=r"^the disk is full$"), settings_placed(option):
        raise OutputError("the disk is full")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"ranks": "0"}, "ranks"),
        ({"budget": "300MB", "target": "95%"}, "target"),
        ({"budget": "300MB", "allocation": "even"}, "budget"),
        ({"weights": [1]}, "weights"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_parsed_recipe_is_refused_by_key_and_place(values, key):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"name": "x", "models": MODELS, **values}, option)
    assert (caught.value.key, caught.value.where) == (key, f"option --{key}")


def test_a_constructor_takes_typed_values_only():
    with pytest.raises(
        TypeError, match=r"Recipe\.ranks: expected tuple\[int, \.\.\.\], got '4, 2'"
    ):
        Recipe("x", MODELS, ranks="4, 2")
    assert Recipe.parse({"name": "x", "models": MODELS, "ranks": "4, 2"}, option).ranks == (4, 2)


def test_a_checkpoint_that_is_missing_is_named_as_data(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(errors.CheckpointError) as caught:
        read_header(path)
    assert (caught.value.file, caught.value.hint) == (path, "check the path")
    path.write_bytes(b"12345678")
    with pytest.raises(errors.CheckpointError) as caught:
        read_header(path)
    assert caught.value.file == path
