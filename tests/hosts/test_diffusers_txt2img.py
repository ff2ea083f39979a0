"""Pictures by diffusers on narrow checkpoints, offline: the app's Compare from end to end."""

import shutil
import warnings
from dataclasses import replace
from importlib.util import find_spec

import pytest
from tiny_diffusers import write_sd1_configuration
from tiny_family import load, merge, write

from hyper_merge.errors import InterruptedRun, PictureError
from hyper_merge.hosts import diffusers_txt2img
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.operations.compare.compare import run_compare
from hyper_merge.operations.compare.image_difference import mean_difference
from hyper_merge.operations.compare.request import CompareRequest, Picture, PictureSettings
from hyper_merge.operations.restore.request import RestoreRequest
from hyper_merge.operations.restore.restore import run_restore
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.writer import NARROW, write_family

absent = [name for name in diffusers_txt2img.PACKAGES if find_spec(name) is None]
needs_diffusers = pytest.mark.skipif(bool(absent), reason=f"not installed here: {absent}")

SPEC = replace(NARROW, count=2, width=16, context=24, vocabulary=60, vae_width=8, size=0.6, terms=6)
SETTINGS = PictureSettings(("a cat",), "", "Euler", 3, 5.0, 64, 64, (1,))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A models folder with two narrow checkpoints, their merge, and what diffusers would fetch."""
    root = tmp_path_factory.mktemp("narrow")
    files = write_family(root / "Stable-diffusion", SPEC, ["one", "two"])
    merge(files, root, ranks=(6, 4), method="greedy", iterations=1, dtype="float32")
    write_sd1_configuration(root / "hyper-merge/diffusers/sd1", SPEC)
    return root


@pytest.fixture
def host(narrow):
    return Standalone(narrow)


@needs_diffusers
def test_hyper_model_with_tags_draws_as_the_restored_checkpoint(host, narrow, tmp_path):
    folders = host.folders()
    run = load_run(folders, "mix")
    row = run.report.checkpoints[1]
    assert row.text_multipliers
    request = RestoreRequest(
        "mix", {row.name: 1.0}, tmp_path / "whole.safetensors", dtype="float32"
    )
    whole = run_restore(request, folders, Progress()).path
    with host.drawing("task(x)") as (progress, generator):
        tagged, plain, restored = (
            generator.draw(Picture(model, prompt, 1, SETTINGS), progress)
            for model, prompt in (
                (run.hyper_model, f"a cat {run.report.tags(row)}"),
                (run.hyper_model, "a cat"),
                (whole, "a cat"),
            )
        )
    assert mean_difference(tagged, restored) < 1
    assert mean_difference(plain, restored) > 5


@needs_diffusers
def test_companions_are_added_and_taken_away_again(tmp_path):
    one, two = (load(path) for path in write_family(tmp_path, SPEC, ["x", "y"]))
    ends = ("input_blocks.0.0.weight", "time_embed.2.weight", "out.2.weight", "out.0.weight")
    for key in one:
        two[key] = (one[key] + 4 * (two[key] - one[key])) if key.endswith(ends) else one[key]
    files = [write(tmp_path / f"{name}.safetensors", x) for name, x in (("1", one), ("2", two))]
    root = tmp_path / "models"
    settings = {"ranks": (64,), "allocation": "even", "method": "greedy"}
    settings |= {"exact": "norms", "dtype": "float32"}
    merged = merge(files, root, **settings)
    write_sd1_configuration(root / "hyper-merge/diffusers/sd1", SPEC)
    model, report = merged.place.hyper_model, merged.report
    tags = report.tags(report.checkpoints[1])
    with Standalone(root).drawing("task(x)") as (progress, generator):
        plain, tagged, again, original = (
            generator.draw(Picture(path, prompt, 1, SETTINGS), progress)
            for path, prompt in (
                (model, "a cat"),
                (model, f"a cat {tags}"),
                (model, "a cat"),
                (files[1], "a cat"),
            )
        )
    assert mean_difference(plain, original) > 2
    assert mean_difference(tagged, original) < 0.5
    assert mean_difference(plain, again) == 0


@needs_diffusers
def test_a_comparison_is_drawn_and_saved(host, narrow):
    phases = []
    request = CompareRequest("mix", ("one", "two"), SETTINGS, average=True, difference=True)
    with host.drawing("task(x)") as (_, generator):
        progress = Progress(lambda phase, fraction: phases.append(fraction))
        record = run_compare(request, host.folders(), progress, generator)
    assert record.originals == {"one": "one.safetensors", "two": "two.safetensors"}
    assert record.host == "diffusers"
    assert all(row.pixels.keys() == {"restored", "average"} for row in record.figures)
    assert phases == sorted(phases)
    assert (narrow / "hyper-merge/mix/pictures/comparison-1.png").exists()


@needs_diffusers
def test_drawing_stops_between_two_steps(host, narrow):
    fractions = []
    progress = Progress(lambda _, x: fractions.append(x), lambda: len(fractions) == 1)
    request = Picture(load_run(host.folders(), "mix").hyper_model, "x", 1, SETTINGS)
    with host.drawing("task(x)") as (_, generator), pytest.raises(InterruptedRun):
        generator.draw(request, progress)
    assert fractions == [pytest.approx(1 / 3)]


@needs_diffusers
def test_a_tag_of_no_lora_is_refused(host):
    model = load_run(host.folders(), "mix").hyper_model
    with host.drawing("task(x)") as (progress, generator):
        for name in ("gone", "../Lora/mix_0-6"):
            with pytest.raises(PictureError, match="there is no LoRA"):
                generator.draw(Picture(model, f"x <lora:{name}:1>", 1, SETTINGS), progress)


@needs_diffusers
def test_a_missing_network_names_the_files_to_provide(narrow, tmp_path, monkeypatch):
    root = tmp_path / "alone"
    shutil.copytree(narrow, root)
    shutil.rmtree(root / "hyper-merge/diffusers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    host = Standalone(root)
    model = load_run(host.folders(), "mix").hyper_model
    with (
        host.drawing("task(x)") as (progress, generator),
        pytest.raises(PictureError, match=r"be online, or put them into .*diffusers.sd1"),
    ):
        generator.draw(Picture(model, "x", 1, SETTINGS), progress)


def test_missing_diffusers_names_what_to_install(host, monkeypatch):
    monkeypatch.setattr(diffusers_txt2img, "PACKAGES", ("diffusers_that_is_not_there",))
    assert host.generator_info().samplers == ()
    assert "pip install -c constraints.txt -e '.[app,pictures]'" in host.generator_info().problem
    with pytest.raises(PictureError, match="install"), host.drawing("task(x)"):
        pass


def test_a_file_that_diffusers_cannot_draw_with_is_named(narrow, tmp_path):
    checkpoint = narrow / "Stable-diffusion/one.safetensors"
    assert diffusers_txt2img.why_not_drawable(checkpoint) == ""
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    assert "broken.safetensors" in diffusers_txt2img.why_not_drawable(broken)


@pytest.mark.filterwarnings("ignore")
def test_every_sampler_is_one_of_diffusers(host):
    diffusers = pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sampler in diffusers_txt2img._SAMPLERS.values():
            kind = getattr(diffusers, sampler.scheduler)
            assert kind.from_config({**kind().config, **sampler.settings})
