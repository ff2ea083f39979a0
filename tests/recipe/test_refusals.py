"""Recipes that are refused: with the file, the line, what was expected, what came, what is near."""

import string
from pathlib import Path

import pytest

from hyper_merge.errors import HyperMergeError, RecipeError
from hyper_merge.recipe.loading import load_recipe, recipe_from_options
from hyper_merge.recipe.recipe import Recipe

BASE = "name: example\nmodels: [a.safetensors, b.safetensors]\n"
MODELS = (Path("a.safetensors"), Path("b.safetensors"))


def refusal(path, text):
    """Returns the message about a file with `text`, without the file's path."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def problem(**values):
    """Returns the message about a recipe made in code."""
    with pytest.raises(RecipeError) as caught:
        Recipe(**{"name": "x", "models": MODELS, **values})
    return str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("rank: [4]", ', line 3, key "rank": unknown key; did you mean "ranks"? Known keys are name, '),
        ("qqq: 1", ', line 3, key "qqq": unknown key. Known keys are name, models'),
        ("<<: 1", ', line 3, key "<<": unknown key. Known'),
        ("seed: 1\nseed: 2", ', line 4, key "seed": given twice, first in line 3; keep one'),
        ("dtype: fp16", 'line 3, key "dtype": expected one of float16, bfloat16, float32, got "fp16"; did you mean "float16"?'),
        ("device: cud", 'expected auto, cpu, cuda or cuda:N, got "cud"; did you mean "cuda"?'),
        ("budget: 300", 'line 3, key "budget": expected a size of 1kB or more, such as "300MB", got the number 300; did you mean 300MB?'),
        ('budget: "1.5"', 'got "1.5"; did you mean 1.5MB?'),
        ("budget: 300B", 'expected a size of 1kB or more, such as "300MB", got "300B"'),
        ("device: 0", "expected auto, cpu, cuda or cuda:N, got the number 0"),
        ("method: gredy", 'expected one of joint, greedy, got "gredy"; did you mean "greedy"?'),
        ("allocation: adaptve", 'expected one of adaptive, even, got "adaptve"; did you mean "adaptive"?'),
        ("multipliers: both", 'expected one of separate, shared, got "both"'),
        ("layer_weights: relativ", 'expected one of output, layout, relative, plain, got "relativ"; did you mean "relative"?'),
        ("fit_weights: [1]", 'line 3, key "fit_weights": expected 2 numbers, one per checkpoint, got 1'),
        ("fit_weights: [0, 0]", 'key "fit_weights": expected weights with a sum above 0, got the sum 0'),
        ("fit_weights: [1, -1]", "item 2: expected a number of 0 or more, got the number -1"),
        ("vae: second", 'expected one of first, average, got "second"'),
        ("iterations: 0", 'line 3, key "iterations": expected a whole number from 1 to 10000, got the number 0'),
        ("iterations: 6.0", "got the number 6.0"),
        ("iterations: true", "got the yes/no value true"),
        ('iterations: "6"', 'expected a whole number from 1 to 10000, got "6"'),
        ("iterations:", "expected a whole number from 1 to 10000, got nothing"),
        ("tolerance: 1.5", "expected a number from 0 to 1, got the number 1.5"),
        ("tolerance: -1", "expected a number from 0 to 1, got the number -1"),
        ("tolerance: .nan", 'expected a number from 0 to 1, got ".nan"'),
        ("tolerance: no", "got the yes/no value false"),
        ("seed: -1", "expected a whole number from 0 to 9223372036854775807, got the number -1"),
        ("seed: 9223372036854775808", "got the number 9223372036854775808"),
        (f"seed: {'9' * 5000}", "got the number inf"),
        ("seed: 1:30", 'got "1:30"'),
        ("overwrite: 1", 'line 3, key "overwrite": expected true or false, got the number 1'),
        ('overwrite: "yes"', 'expected true or false, got "yes"'),
        ("ranks: []", "expected 1 to 64 ranks, one per LoRA, got none"),
        ('ranks: ""', "expected 1 to 64 ranks, one per LoRA, got none"),
        (f"ranks: [{'1, ' * 65}]", "expected 1 to 64 ranks, one per LoRA, got 65"),
        ("ranks: [4, 0]", "item 2: expected a whole number from 1 to 4096, got the number 0"),
        ("ranks: [-4]", "item 1: expected a whole number from 1 to 4096, got the number -4"),
        ("ranks: [1.5]", "got the number 1.5"),
        ("ranks: [4097]", "got the number 4097"),
        ("ranks: [abc]", 'got "abc"'),
        ("ranks: abc", '128, 64, 32, 16, or small, medium, large, got "abc"'),
        ("ranks: large, 4", 'item 1: expected a whole number from 1 to 4096, got "large"'),
        ("ranks: [true]", "got the yes/no value true"),
        ("ranks: [[4]]", "item 1: expected a whole number from 1 to 4096, got a list"),
        ("ranks: 8,,4", "item 2: expected a whole number from 1 to 4096, got nothing"),
        ("ranks: {a: 1}", "128, 64, 32, 16, or small, medium, large, got a mapping"),
        ("ranks: null", "expected a list of whole numbers, such as 128, 64, 32, 16, or small, medium"),
        ("weights: [1]", 'line 3, key "weights": expected 2 numbers, one per checkpoint, got 1'),
        ("weights: [0, 0]", "expected weights with a sum above 0, got the sum 0"),
        ("weights: [1, -1]", "item 2: expected a number of 0 or more, got the number -1"),
        ("weights: [1, 1e999]", "item 2: expected a number of 0 or more, got the number inf"),
        ("weights: [1e308, 1e308]", "got the sum inf"),
        ("base: 1.5", "expected text, got the number 1.5; put quotes around it"),
        ('base: " "', "expected text, got only blanks"),
        ("output:", "expected text, got nothing"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_with_the_line(tmp_path, lines, message):
    assert message in refusal(tmp_path / "config.yaml", BASE + lines + "\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ': expected lines of the form "key: value", got an empty file'),
        ("- a\n", ', line 1: expected lines of the form "key: value", got a list'),
        ("\nhello\n", ', line 2: expected lines of the form "key: value", got "hello"'),
        ("? [a]\n: 1\n", ", line 1: expected a word as key, got a list"),
        ("models: [a, b]\n", ': expected the key "name", got only models; add name: in the YAML'),
        ("name: x\n", ': expected the key "models", got only name; add models:'),
        ("name: x\nmodels: a, b\n", ', line 2, key "models": expected a list of paths, got "a, b"'),
        ("name: x\nmodels: [a]\n", ', line 2, key "models": Fewer than two checkpoints: expected 2 paths or more, got 1'),
        ("name: x\nmodels: []\n", "Fewer than two checkpoints: expected 2 paths or more, got 0"),
        ("name: x\nmodels: [a, 7]\n", "item 2: expected text, got the number 7; put quotes around"),
        ("name: x\nmodels: [a, [b]]\n", "item 2: expected text, got a list"),
        ("name: 123\nmodels: [a, b]\n", ', line 1, key "name": expected text, got the number 123; put quotes around it'),
        ("name: yes\nmodels: [a, b]\n", "expected text, got the yes/no value true; put quotes"),
        ("name: x\nmodels: [a, b\n", ", line 3, column 1: not valid YAML: while parsing a flow seq"),
        ("name: x\n\tmodels: 1\n", ", line 2, column 1: not valid YAML: while scanning"),
        ('name: x\nmodels: ["C:\\m\\a"]\n', "write Windows paths without quotes, or between single"),
        ("name: x\nbase: *a\n", ", line 2, column 7: not valid YAML: found undefined alias 'a'"),
        ("name: x\n---\nname: y\n", "not valid YAML: expected a single document in the stream"),
        ("name: x\nbase: \a\n", ", line 2: not valid YAML: special characters are not allowed"),
        ("[" * 20_000, ": not a recipe: brackets nested too deeply"),
        (b"name: \xff\n", ": expected text in UTF-8, got the byte 0xff at position 6"),
        (b"\0" * (1 << 20) + b"\0", ": expected a YAML recipe, got 1048577 bytes; give checkpoints"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_the_line(tmp_path, text, message):
    assert message in refusal(tmp_path / "config.yaml", text)


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"no\.yaml: the recipe cannot be read: No such file"):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(RecipeError, match=r"the recipe cannot be read: Is a directory"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rnks": "4"}, 'option --rnks: unknown key; did you mean "ranks"?'),
        ({"ranks": "4.5"}, "option --ranks: item 1: expected a whole number from 1 to 4096, got the"),
        ({"ranks": "4 x"}, 'option --ranks: item 2: expected a whole number from 1 to 4096, got "x"'),
        ({"seed": "abc"}, 'option --seed: expected a whole number from 0 to 9223372036854775807, got "abc"'),
        ({"tolerance": "nan"}, 'option --tolerance: expected a number from 0 to 1, got "nan"'),
        ({"models": "a.safetensors"}, "option --models: Fewer than two checkpoints"),
        ({"name": "a/b"}, 'option --name: the path separator "/" is not allowed (character 2 of "a/b")'),
    ],
)  # fmt: skip
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(RecipeError) as caught:
        recipe_from_options({"name": "x", "models": ["a", "b"], **options})
    assert str(caught.value).startswith(message)


def test_options_alone_need_a_name_and_models():
    with pytest.raises(RecipeError, match=r'^command line: expected the key "name", got only seed'):
        recipe_from_options({"seed": "1"})


@pytest.mark.parametrize("name", ["x", "a b", "v1.5+vae", "A-B_c", "nonesuch", "x" * 100, "007"])
def test_names_that_files_and_prompts_can_hold_are_taken(name):
    assert Recipe(name, MODELS).name == name


@pytest.mark.parametrize(
    "char", [c for c in string.printable if c not in string.whitespace] + ["é"]
)
def test_a_character_is_allowed_or_named(char):
    name = f"a{char}b"
    if char in string.ascii_letters + string.digits + "._+-":
        assert Recipe(name, MODELS).name == name
        return
    message = problem(name=name)
    assert f'"{char}" is not allowed (character 2 of "{name}")' in message
    assert message.endswith("allowed are A-Z a-z 0-9 . _ + - and blanks inside")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (" x", "without a blank at its start or end"),
        ("x ", "without a blank at its start or end"),
        (".x", "without a dot at its start or end"),
        ("x.", "without a dot at its start or end"),
        ("a__b", 'without "__"'),
        ("a_", 'without "_" at its end'),
        ("none", "not reserved"),
        ("None", "not reserved"),
        ("con", "not reserved"),
        ("LPT1.x", "not reserved"),
        ("x" * 101, "at most 100 characters (101 here)"),
        ("", "expected text, got only blanks"),
        ("a\nb", r'the character "\n" is not allowed (character 2 of "a\nb")'),
        ("a\\b", r'the path separator "\" is not allowed'),
        ("a:b/c", 'the character ":" is not allowed'),
    ],
)
def test_names_that_would_break_files_or_prompts_are_refused(name, message):
    assert message in problem(name=name)


def test_a_refusal_without_a_file_names_the_key():
    assert problem(ranks=(0,)).startswith('recipe, key "ranks": item 1: expected a whole number')
    assert issubclass(RecipeError, HyperMergeError)
