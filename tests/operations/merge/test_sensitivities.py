"""A merge runs its average once, remembers what it found, and does without where that is not possible."""

import json
import math
import shutil
import zlib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fitting import fit
from narrow_layouts import one
from random_checkpoints import files as write_files
from random_checkpoints import sane_weights
from safetensors.torch import load_file, save_file
from tiny_family import (
    QUERY,
    Stop,
    added,
    layers_of,
    load,
    merge,
    recipe,
    snapshot,
    temporaries,
)

from hyper_merge.analysis.sensitivities import read_sensitivities, write_sensitivities
from hyper_merge.calibration.measure import PHASE, Samples, measure_sensitivities
from hyper_merge.decomposition.sensitivity import Sensitivity
from hyper_merge.decomposition.stretch import Stretch
from hyper_merge.errors import InterruptedRun
from hyper_merge.operations import sensitivities
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.plan import make_plan
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress

CACHE = "hyper-merge/cache"
MANIFEST = "hyper-merge/mix/manifest.json"


def only(folder):
    """Returns the one file of sensitivities in the cache."""
    (path,) = (folder / CACHE).glob("*.sensitivities.safetensors")
    return path


def manifest_of(merged):
    return json.loads((merged.place.folder / "manifest.json").read_text())


def made_up(layer, value=None):
    """Returns a layer's sensitivity, with two directions of each side that count more."""
    generator = torch.Generator().manual_seed(zlib.crc32(layer.module.encode()))
    left, right = (
        Stretch(
            torch.linalg.qr(torch.randn(size, min(size, 2), generator=generator))[0].half(),
            torch.tensor([20.0, 3.0])[: min(size, 2)],
        )
        for size in (layer.m, layer.n)
    )
    mean = 1 / (1 + len(layer.module))
    return Sensitivity(mean if value is None else value, 0.3, left, right)


def numbers(sensitivities):
    """Returns all numbers of sensitivities as files hold them, to compare them."""
    return {
        module: (
            value.mean,
            value.rest,
            *(
                part.half().tolist()
                for side in (value.left, value.right)
                for part in (side.directions, side.factors)
            ),
        )
        for module, value in sensitivities.items()
    }


class Runner:
    """Stands in for runs of the network: the first layers count most."""

    def __init__(self):
        self.devices, self.seeds = [], []
        self.value = None  # of all layers in place of the usual ones
        self.others = {}  # by module, in addition
        self.error = None  # raised once

    def __call__(self, tensor, shapes, layout, device, progress, seed=0):
        self.devices.append(device)
        self.seeds.append(seed)
        for fraction in (0.0, 0.5):
            progress.report(PHASE, fraction)
        assert tensor(layout.layers[0].key).shape == shapes[layout.layers[0].key]
        if self.error:
            error, self.error = self.error, None
            raise error
        progress.report(PHASE, 1.0)
        return {layer.module: made_up(layer, self.value) for layer in layout.layers} | self.others


@pytest.fixture
def runner(monkeypatch):
    """Takes the place of the network, which then can be run for all files."""
    stub = Runner()
    monkeypatch.setattr(sensitivities, "can_run", lambda layout, shapes: True)
    monkeypatch.setattr(sensitivities, "measure_sensitivities", stub)
    return stub


def numbers_for(preflight, state, progress):
    """Returns the numbers that a merge uses; None where it runs nothing."""
    if preflight.network is None:
        return None
    device = preflight.pass_options.device
    values = preflight.network.sensitivities(state.__getitem__, device, progress)
    return values and numbers(values)


@pytest.fixture
def find(files, tmp_path, runner):
    """Finds the sensitivities of a merge of the three files, by a recipe's settings."""
    state = load(files[0])

    def find(progress=None, models=files, **settings):
        preflight = run_preflight(recipe(models, tmp_path, **settings))
        return numbers_for(preflight, state, progress or Progress())

    return find


def multipliers(merged):
    return [[*row.multipliers, *row.text_multipliers] for row in merged.report.checkpoints]


def test_the_average_runs_once_for_all_merges(files, tmp_path, runner, find, log):
    first = find(log.progress)
    assert runner.devices == [torch.device("cpu")]
    assert first.keys() == {layer.module for layer in layers_of(files[0], ends=True)}
    assert find(log.progress, ranks=(3,), name="other", fit_weights=(3, 1, 1)) == first
    assert len(runner.devices) == 1
    layers = layers_of(files[0], ends=True)
    assert numbers(read_sensitivities(only(tmp_path), layers)) == first
    find(log.progress, models=files[:2])
    assert len(runner.devices) == 2
    assert log.warnings == []


def test_inputs_of_another_seed_are_run_too(runner, find, tmp_path):
    find(seed=5)
    find(seed=6)
    find(seed=5)
    assert runner.seeds == [5, 6]
    assert len(list((tmp_path / CACHE).iterdir())) == 2


def spoilt(path, kind, layers):
    """Damages a file of sensitivities."""
    data = path.read_bytes()
    if kind == "text":
        path.write_text("[[")
    elif kind == "short":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "digit":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 64]) + data[-8:])
    elif kind == "shape":
        wrong = {layer.module: made_up(replace(layer, shape=(3, 2))) for layer in layers}
        write_sensitivities(path, wrong, print)
    elif kind == "no checksums":
        tensors = load_file(path)
        tensors.pop("checksums")
        save_file(tensors, path)


@pytest.mark.parametrize("kind", ["text", "short", "digit", "shape", "no checksums"])
def test_damaged_sensitivities_are_set_aside_and_measured(files, tmp_path, runner, find, log, kind):
    first = find()
    path = only(tmp_path)
    spoilt(path, kind, layers_of(files[0], ends=True))
    wrong = path.read_bytes()
    assert find(log.progress) == first
    assert len(runner.devices) == 2
    (warning,) = log.warnings
    assert str(path) in warning
    assert f"set aside as {path.name}.damaged" in warning
    assert path.with_name(path.name + ".damaged").read_bytes() == wrong
    assert find(log.progress) == first
    assert len(runner.devices) == 2


def test_sensitivities_of_other_layers_are_measured_again(files, tmp_path, runner, find, log):
    layers = layers_of(files[0], ends=True)
    first = find()
    write_sensitivities(only(tmp_path), {"lora_unet_other": made_up(layers[0])}, print)
    assert find(log.progress) == first
    assert len(runner.devices) == 2
    assert log.warnings == []


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_average_without_outputs_is_not_remembered(files, tmp_path, runner, find, log, value):
    layers = layers_of(files[0])
    runner.value = 0.0
    runner.others = {layers[0].module: made_up(layers[0], value)}
    assert find(log.progress) is None
    (warning,) = log.warnings
    assert warning.startswith("the average's network gives no finite outputs, so its layers count")
    assert not (tmp_path / CACHE).exists()


@pytest.mark.parametrize("weighting", ["relative", "plain"])
def test_other_weightings_run_nothing(files, tmp_path, runner, find, weighting):
    assert find(layer_weights=weighting) is None
    assert runner.devices == []
    find()
    assert find(layer_weights=weighting) is None
    preflight = run_preflight(recipe(files, tmp_path / "b", layer_weights=weighting))
    assert preflight.is_network_known
    assert preflight.known_sensitivities is None


def test_cpu_runs_what_the_device_has_no_memory_for(runner, find, log):
    runner.error = torch.cuda.OutOfMemoryError("CUDA out of memory (pretended)")
    reports = []
    assert find(Progress(lambda _phase, x: reports.append(x), warn=log.warnings.append))
    assert len(runner.devices) == 2
    assert reports == [0, 0.5, 0.5, 0.75, 1]
    assert log.warnings == [
        "cpu has too little memory for the network of the average; the CPU runs it"
    ]


def test_sensitivities_that_cannot_be_kept_are_used(tmp_path, runner, find, log):
    first = find()
    path = only(tmp_path)
    path.unlink()
    path.mkdir()
    assert find(log.progress) == first
    (warning,) = log.warnings
    assert warning.startswith("the sensitivities of the layers are not remembered: ")


# whole merges


def test_measured_layers_change_plan_merge_and_manifest(files, tmp_path, merged, runner):
    preflight = run_preflight(recipe(files, tmp_path))
    by_layout = make_plan(preflight, Progress())
    assert runner.devices == []
    made = merge(files, tmp_path)
    assert multipliers(made) != multipliers(merged)
    assert manifest_of(made)["report"]["metric"] == "output"
    assert make_plan(preflight, Progress()) != by_layout
    assert len(runner.devices) == 1


def test_average_without_outputs_counts_by_the_layout(files, tmp_path, merged, runner):
    runner.value = math.nan
    made = merge(files, tmp_path)
    assert multipliers(made) == multipliers(merged)
    assert manifest_of(made)["report"]["metric"] == "layout"


def test_partial_files_run_nothing(files, tmp_path, merged):
    assert manifest_of(merged)["report"]["metric"] == "layout"
    assert run_preflight(recipe(files, tmp_path)).is_network_known


def test_a_stop_while_the_average_runs_changes_no_file(files, tmp_path, runner):
    runner.error = InterruptedRun("stopped")
    with pytest.raises(InterruptedRun):
        merge(files, tmp_path)
    assert snapshot(tmp_path) == {}
    assert temporaries(tmp_path) == []
    assert not list((tmp_path / CACHE).glob("*.sensitivities.safetensors"))


def test_a_fit_counts_errors_as_the_merge_did(files, tmp_path, runner):
    merged = merge(files, tmp_path)
    row = merged.report.checkpoints[0]

    def fitted(name):
        return fit(Folders.under(tmp_path), files[0], name=name, device="cpu").row

    same = fitted("same")
    assert len(runner.devices) == 1
    shutil.rmtree(tmp_path / CACHE)
    again = fitted("again")  # runs the hyper-model
    assert len(runner.devices) == 2
    assert again.multipliers == pytest.approx(same.multipliers, abs=1e-6)
    assert again.explained_weighted == pytest.approx(same.explained_weighted, abs=1e-6)
    for part in ("unet", "text_encoder"):  # a merge counts what lies outside of its bases plainly
        assert same.multipliers_of(part) == pytest.approx(row.multipliers_of(part), abs=0.01)
    assert same.explained_weighted == pytest.approx(row.explained_weighted, abs=5e-3)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["report"]["metric"] = "layout"
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    other = fitted("other")
    assert other.multipliers != pytest.approx(same.multipliers, abs=1e-4)
    assert other.explained_weighted != pytest.approx(same.explained_weighted, abs=5e-4)


def test_manifests_of_earlier_versions_may_have_sensitivities(started):
    manifest = json.loads((started / MANIFEST).read_text())
    (started / MANIFEST).write_text(json.dumps(manifest | {"sensitivities": {"a": 1.0}}))
    assert load_run(Folders.under(started), "mix").name == "mix"


def multipliers_by_dense_metric(models, merged, values):
    """Solves the normal equations in the dense metric, from the files on disk, for the UNet."""
    base, states = load(merged.place.hyper_model), [load(path) for path in models]
    loras = [load_file(path) for path in merged.loras if "companion" not in path.stem]
    cross, gram = 0, 0
    for layer in layers_of(models[0]):
        if layer.part != "unet":
            continue
        weight = base[layer.key].double().flatten(1)
        size = float(weight.square().sum())
        value = values[layer.module]
        root = (value.mean * value.rest / size) ** 0.25

        def stretched(matrix, value=value, root=root):
            left, right = (side.root for side in (value.left, value.right))
            return (root * right.apply(left.apply(matrix.double()).mT).mT).flatten()

        blocks = torch.stack(
            [stretched(added(lora, layer.module).expand_as(weight)) for lora in loras]
        )
        deviations = torch.stack(
            [stretched(state[layer.key].double().flatten(1) - weight) for state in states]
        )
        cross, gram = cross + deviations @ blocks.T, gram + blocks @ blocks.T
    return cross @ torch.linalg.inv(gram)


def test_multipliers_are_least_squares_in_the_measured_metric(files, tmp_path, runner):
    merged = merge(files, tmp_path, dtype="float32", exact="none")
    values = read_sensitivities(only(tmp_path), layers_of(files[0], ends=True))
    expected = multipliers_by_dense_metric(files, merged, values)
    rows = [row.multipliers for row in merged.report.checkpoints]
    torch.testing.assert_close(torch.tensor(rows).double(), expected, rtol=0, atol=1e-3)


# with the network itself


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recipe of whole narrow files of SD 1.x, and the weights of one; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    state = {key: x.half() for key, x in sane_weights(one(width=32)).items()}
    models = write_files(folder, state, {**state, QUERY: -state[QUERY]})
    return SimpleNamespace(state=state, preflight=run_preflight(recipe(models, folder / "models")))


@pytest.fixture
def few(monkeypatch):
    """Merges run their average for two samples."""
    samples = Samples(passes=1, batch=2, side=8)
    measure = partial(measure_sensitivities, samples=samples)
    monkeypatch.setattr(sensitivities, "measure_sensitivities", measure)
    return samples


def test_the_average_is_measured_from_its_own_tensors(whole, few):
    reports = []
    progress = Progress(lambda *report: reports.append(report)).part(0.2, 0.6)
    layout = whole.preflight.inputs.layout
    shapes = {key: tuple(tensor.shape) for key, tensor in whole.state.items()}
    seconds = estimate_merge(whole.preflight).seconds
    values = numbers_for(whole.preflight, whole.state, progress)
    expected = measure_sensitivities(
        whole.state.__getitem__, shapes, layout, torch.device("cpu"), Progress(), few
    )
    assert values == numbers(expected)
    assert min(value.mean for value in expected.values()) > 0
    fractions = [fraction for _, fraction in reports]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) > 50
    assert (fractions[0], fractions[-1]) == (0.2, 0.6)
    known = estimate_merge(whole.preflight).seconds  # what is remembered takes no time
    recipe = replace(whole.preflight.recipe, layer_weights="relative")
    relative = estimate_merge(replace(whole.preflight, recipe=recipe)).seconds
    assert known == pytest.approx(relative, rel=0.05)  # but for the spectra in its metric
    assert known < 0.9 * seconds


def test_a_stop_within_the_network_ends_the_phase(whole, few, tmp_path):
    preflight = replace(whole.preflight, folders=Folders.under(tmp_path))
    stop = Stop(0.7, "stop")
    with pytest.raises(InterruptedRun):
        numbers_for(preflight, whole.state, stop.progress)
    assert stop.late == 0
    assert not (tmp_path / CACHE).exists()
