"""A merge with a training writes better LoRAs, says how much better they are, and spoils nothing."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from narrow_layouts import NARROW
from random_checkpoints import files as write_files
from random_checkpoints import networks
from safetensors.torch import load_file
from sparse_checkpoints import full_size
from tiny_family import added, layers_of, load, merge, recipe, snapshot, tags_of

from hyper_merge.calibration import distillation
from hyper_merge.calibration.distillation import PHASE
from hyper_merge.calibration.network import Network
from hyper_merge.calibration.student import Course
from hyper_merge.checkpoints.architectures.families.sd1 import SD1
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import InterruptedRun, NonFiniteError, RecipeError
from hyper_merge.operations.merge import training
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.operations.merge.training_rounds import MOST_ROUNDS, training_rounds
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.report_text import format_report
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.html.common import format_merge_plan

ROUNDS = 6
SETTINGS = {"ranks": (2, 1), "layer_weights": "layout", "lora_dtype": "float8"}


@pytest.fixture(autouse=True)
def course(monkeypatch):
    """Trainings see small batches of small latents."""
    small = partial(Course, batch=2, side=8, drawing=2)
    monkeypatch.setattr(training, "Course", small)
    return small


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three whole narrow files of SD 1.x around a network whose activations are sound."""
    return networks(tmp_path_factory.mktemp("whole"), 3)


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory):
    """Merges in 8 bits, without a training and with one."""
    folder = tmp_path_factory.mktemp("merged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Course", partial(Course, batch=2, side=8))
        make = partial(merge, models, folder, **SETTINGS)
        return SimpleNamespace(
            folder=folder,
            plain=make(name="plain"),
            trained=make(name="trained", training=ROUNDS),
        )


def with_loras(result, models, tags):
    """Returns the hyper-model with the written LoRAs, as hosts add them."""
    state = {key: x.float() for key, x in load(result.place.hyper_model).items()}
    loras = {path.stem: load_file(path) for path in result.loras}
    for layer in layers_of(models[0], ends=True):
        for tag in tags:
            factor = tag.text_multiplier if layer.part == "text_encoder" else tag.multiplier
            change = factor * added(loras[tag.name], layer.module).float()
            if change.dim():
                weight = state[layer.key]
                state[layer.key] = weight + change.expand(layer.m, layer.n).reshape(weight.shape)
    return state


def outputs(state, average, header, course, rounds):
    """Returns what a network gives for the inputs that no round sees, which the average draws."""
    network, artist = (
        Network(lambda key, weights=weights: weights[key].float(), header.shapes, SD1)
        for weights in (state, average)
    )
    results = []
    for number in (rounds, rounds + 1):
        steps = course(rounds).samples.steps(number)
        first, second = (torch.Generator().manual_seed(number) for _ in range(2))
        drawn = artist.draw(steps, 8, first, course(rounds).drawing)
        with torch.no_grad():
            results.append(network.run(steps, 8, second, drawn))
    return torch.cat(results)


def measured(result, models, course):
    """Returns what the written files leave of each checkpoint's outputs."""
    header, shares = read_header(models[0]), []
    hyper_model = load(result.place.hyper_model)
    average = outputs(hyper_model, hyper_model, header, course, ROUNDS)
    for path, tags in zip(models, tags_of(result), strict=True):
        own = outputs(load(path), hyper_model, header, course, ROUNDS)
        mine = outputs(with_loras(result, models, tags), hyper_model, header, course, ROUNDS)
        shares.append(float((mine - own).square().sum() / (average - own).square().sum()))
    return shares


def test_written_files_are_as_much_better_as_the_report_says(merged, models, course):
    report = merged.trained.report.training
    assert report.rounds == ROUNDS
    assert report.before == pytest.approx(measured(merged.plain, models, course), rel=0.01)
    assert report.after == pytest.approx(measured(merged.trained, models, course), rel=0.01)
    assert sum(report.after) < 0.97 * sum(report.before)
    assert merged.plain.report.training is None


def test_only_the_factors_are_others(merged):
    plain, trained = ([load_file(path) for path in x.loras] for x in (merged.plain, merged.trained))
    for one_file, other in zip(plain, trained, strict=True):
        assert {key: x.shape for key, x in one_file.items()} == {
            key: x.shape for key, x in other.items()
        }
    rows = [
        [(row.multipliers, row.text_multipliers) for row in x.report.checkpoints]
        for x in (merged.plain, merged.trained)
    ]
    assert rows[0] == rows[1]
    ups = [x for x in plain[0] if x.endswith("lora_up.weight")]
    assert any(not torch.equal(plain[0][x].float(), trained[0][x].float()) for x in ups)


def test_the_report_tells_of_the_training(merged):
    text = format_report(merged.trained.report)
    assert f"before a training of {ROUNDS} rounds" in text
    mean = 100 * sum(merged.trained.report.training.after) / 3
    assert (
        f"measured by runs of the checkpoints for random prompts, {mean:.1f} remain in the mean"
        in text
    )
    shares = [row.fidelity for row in merged.trained.report.checkpoints]
    assert shares == [1 - left for left in merged.trained.report.training.after]
    assert "training" not in format_report(merged.plain.report)
    known = load_run(Folders.under(merged.folder), "trained")
    assert known.report.training == merged.trained.report.training
    assert known.recipe.training == ROUNDS
    manifest = json.loads((merged.plain.place.folder / "manifest.json").read_text())
    assert "training" not in manifest["report"]


def test_a_training_that_gains_nothing_leaves_the_loras(merged, models, tmp_path, monkeypatch, log):
    monkeypatch.setattr(distillation, "_RATE", 10.0)
    monkeypatch.setattr(distillation, "_MOST", 1.0)
    result = merge(models, merged.folder, log.progress, name="wild", training=1, **SETTINGS)
    assert not result.report.training.has_gained
    assert [text for text in log.warnings if "more alike" in text]
    assert "gained nothing" in format_report(result.report)
    for mine, plain in zip(result.loras, merged.plain.loras, strict=True):
        one_file, other = load_file(mine), load_file(plain)
        assert all(torch.equal(one_file[key].float(), other[key].float()) for key in other)


def test_factors_that_no_file_holds_are_those_of_the_solve(merged, models, monkeypatch, log):
    def refuse(*_):
        raise NonFiniteError("a factor holds too much")

    monkeypatch.setattr(training, "rounded_again", refuse)
    result = merge(models, merged.folder, log.progress, name="large", training=1, **SETTINGS)
    assert [text for text in log.warnings if "holds too much" in text]
    assert result.report.training is None
    assert len(result.loras) == 2


def test_a_stop_within_the_training_leaves_nothing(merged, models):
    before = snapshot(merged.folder)
    phases = []
    progress = Progress(lambda phase, _: phases.append(phase), lambda: PHASE in phases)
    with pytest.raises(InterruptedRun):
        merge(models, merged.folder, progress, name="stopped", training=2, **SETTINGS)
    assert phases.count(PHASE) == 1
    assert snapshot(merged.folder) == before


def test_time_and_memory_of_a_training_are_foretold(merged, models):
    def estimate(**settings):
        folders = Folders.under(merged.folder)
        # The factors are more than the cores, however many workers solve for them.
        settings = {**SETTINGS, "ranks": (32, 16), **settings}
        return estimate_merge(run_preflight(recipe(models, merged.folder, **settings), folders))

    without, short, long = estimate(), estimate(training=20), estimate(training=40)
    assert 1.7 < (long.seconds - without.seconds) / (short.seconds - without.seconds) < 2.1
    assert without.memory < short.memory == long.memory


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"target": 0.5}, "target"), ({"training": -1}, "training"), ({"training": 1.5}, "training")],
)
def test_what_cannot_be_trained_is_refused(models, tmp_path, settings, text):
    with pytest.raises(RecipeError, match=text):
        run_preflight(recipe(models, tmp_path, **{"training": 2, **settings}))


def test_families_whose_network_is_not_run_are_refused(tmp_path):
    shapes = NARROW["sd3_medium"]()
    generator = torch.Generator().manual_seed(0)
    states = [
        {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        for _ in range(2)
    ]
    with pytest.raises(RecipeError, match="cannot be run here"):
        run_preflight(recipe(write_files(tmp_path, *states), tmp_path / "models", training=2))


def rounds(models, folder, **settings):
    """Returns the rounds of a merge that does as many as take minutes."""
    settings = {"layer_weights": "output", **settings, "training": "auto"}
    return run_preflight(recipe(models, folder, **settings)).rounds


def test_a_training_of_minutes_is_done(models, tmp_path):
    assert rounds(models, tmp_path) == MOST_ROUNDS
    for settings in ({"layer_weights": "layout"}, {"method": "greedy"}, {"target": 0.5}):
        assert rounds(models, tmp_path, **settings) == 0


def test_a_training_is_left_out_where_memory_is_short(models, tmp_path):
    def plan(**settings):
        settings = {"layer_weights": "output", "training": "auto", **settings}
        return run_preflight(recipe(models, tmp_path, ranks=(64, 60, 56, 52), **settings))

    trains, does_not = plan().memory_needs.least, plan(training=0).memory_needs.least
    assert does_not < trains
    assert [plan(memory=size).rounds for size in (trains, trains - 1)] == [MOST_ROUNDS, 0]
    with pytest.raises(RecipeError, match="of memory at least"):
        plan(training=MOST_ROUNDS, memory=trains - 1)


@pytest.mark.parametrize(
    ("count", "device", "expected"), [(4, "cpu", 0), (2, "cpu", 0), (4, "cuda", MOST_ROUNDS)]
)
def test_rounds_follow_the_time_of_a_usual_device(tmp_path, count, device, expected):
    """At full size: minutes on a GPU, an hour and more on a CPU."""
    models = [full_size(tmp_path / f"{c}.safetensors", str(c)) for c in range(count)]
    settings = recipe(models, tmp_path, layer_weights="output", training="auto")
    inputs = run_preflight(settings).inputs
    assert training_rounds(settings, inputs, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "too little memory for the training"),
        (RuntimeError("no such kernel\nat all"), "the training failed (no such kernel);"),
    ],
)
def test_a_device_that_cannot_train_leaves_the_loras(merged, models, monkeypatch, log, error, told):
    def fail(*_):
        raise error

    monkeypatch.setattr(training, "distil", fail)
    settings = {**SETTINGS, "layer_weights": "output", "name": "short"}
    result = merge(models, merged.folder, log.progress, training="auto", overwrite=True, **settings)
    assert [text for text in log.warnings if told in text]
    assert result.report.training is None
    with pytest.raises(type(error)):
        merge(models, merged.folder, training=1, overwrite=True, **settings)


@pytest.mark.parametrize(("asked", "expected"), [("auto", True), (0, False)])
def test_a_plan_says_how_many_rounds_there_are(models, tmp_path, asked, expected):
    preflight = run_preflight(recipe(models, tmp_path, layer_weights="output", training=asked))
    text = format_merge_plan(preflight, preflight.find_place())
    assert (f" with a training of {MOST_ROUNDS} rounds, " in text) == expected
    assert ("training" in text) == expected
