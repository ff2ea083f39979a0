"""What follows a merge, in every family: fit, restore, export, extract, add, and what may be deleted."""

import pytest
from narrow_layouts import NARROW
from random_checkpoints import files, state
from tiny_family import layers_of, load, merge

from hyper_merge.cli import main as cli


@pytest.fixture
def run(capsys):
    """Runs a command that succeeds; standard output."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


# One for each spelling of modules and factors; sd1 and sdxl have all other tests.
NAMES = [
    *("sd35_medium", "flux_dev", "chroma", "flux2_klein", "z_image", "lumina_2", "anima"),
    *("qwen_image", "wan"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_job_after_a_merge_takes_its_files(name, tmp_path, run):
    shapes = NARROW[name]()
    place = tmp_path / "models"
    states = (state(shapes, seed) for seed in range(3))
    a, b, c = files(place / "Stable-diffusion", *states)
    merge((a, b), place, dtype="float32")
    output = ("--output", place)
    assert "explained" in run("fit", "mix", c, *output)
    run("restore", "mix", "a", *output, "--to", tmp_path / "back.safetensors")
    run("export", "mix", "a", *output)
    run("safe", "mix", *output)
    run("extract", a, b, "--rank", "64", "--dtype", "float32", *output)
    run("add", a, place / "Lora/b-from-a.safetensors", "--to", tmp_path / "added.safetensors")
    before, after, added = (load(path) for path in (a, b, tmp_path / "added.safetensors"))
    for layer in layers_of(a):
        if layer.rows is None:
            left = (added[layer.key] - after[layer.key]).norm()
            assert left < 1e-5 * (before[layer.key] - after[layer.key]).norm(), layer.module
