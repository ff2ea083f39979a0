"""A checkpoint outside of a merge is placed on its LoRAs exactly, or refused by name with nothing written."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
from fitting import FIT, fit
from safetensors.torch import load_file, save_file
from tiny_family import (
    NORM,
    VAE,
    added,
    layers_of,
    load,
    merge,
    snapshot,
    temporaries,
    write,
)

from hyper_merge.analysis.loss_weights import layer_factors
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import (
    HyperMergeError,
    InterruptedRun,
    NameTakenError,
    OutputError,
)
from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.operations.fit.text import format_style
from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runs.weighted_loras import weighted_loras_of
from hyper_merge.runtime.progress import Progress

PLANTED = {"unet": (0.7, -1.3), "text_encoder": (-0.4, 2.1)}


@pytest.fixture(scope="session")
def single(tmp_path_factory, state_of):
    """A float32 merge of float32 files, and a folder for more; not to be changed."""
    folder = tmp_path_factory.mktemp("single")
    models = [
        write(folder / f"{name}.safetensors", state_of(c, torch.float32))
        for c, name in enumerate("abc")
    ]
    merged = merge(models, folder / "models", dtype="float32", exact="norms")
    return SimpleNamespace(models=models, merged=merged, root=folder / "models")


@pytest.fixture(scope="session")
def planted(single):
    """The hyper-model with known multiples of the LoRAs."""
    state = load(single.merged.place.hyper_model)
    files = [load_file(path) for path in single.merged.loras]
    loras = [{**main, **companion} for main, companion in zip(files[:2], files[2:], strict=True)]
    for layer in layers_of(single.models[0], ends=True):
        weight = state[layer.key].double()
        rows = slice(*layer.rows) if layer.rows else slice(None)
        for x, lora in zip(PLANTED[layer.part], loras, strict=True):
            weight[rows] += (x * added(lora, layer.module).expand(layer.m, layer.n)).reshape(
                weight[rows].shape
            )
        state[layer.key] = weight.float()
    return write(single.root.parent / "planted.safetensors", state)


def dense(path, hyper_model, terms):
    """Returns energies of the differences and of the LoRAs' errors, by layer, from the files on disk."""
    base, state = load(hyper_model), load(path)
    loras = [(term, load_file(term.path)) for term in terms]
    energies, errors = [], []
    for layer in layers_of(path):
        rows = slice(*layer.rows) if layer.rows else slice(None)
        rest = (state[layer.key][rows].double() - base[layer.key][rows].double()).flatten(1)
        energies.append(float(rest.square().sum()))
        for term, lora in loras:
            rest = rest - term.times(layer.part) * added(lora, layer.module)
        errors.append(float(rest.square().sum()))
    return torch.tensor(energies).double(), torch.tensor(errors).double()


def layer_weights(path, hyper_model):
    """Returns how much the merge counts squared errors in each layer."""
    base, layers = load(hyper_model), layers_of(path)
    sizes = torch.stack([base[layer.key].double().square().sum() for layer in layers])
    return layer_factors("output", sizes, layers)


def test_a_planted_mixture_gives_its_multipliers_back(single, planted, tmp_path):
    root = shutil.copytree(single.root, tmp_path / "models")
    fitted = fit(Folders.under(root), planted)
    result = [fitted.row.multipliers_of(part) for part in PLANTED]
    expected = torch.tensor([*PLANTED.values()]).double()
    torch.testing.assert_close(torch.tensor(result).double(), expected, atol=1e-5, rtol=0)
    assert fitted.row.explained == pytest.approx(1, abs=1e-6)
    assert fitted.row.not_carried == 0
    assert fitted.differs


@pytest.mark.parametrize("c", range(3))
def test_a_merged_checkpoint_gets_the_merges_multipliers_and_share(files, at, merged, c):
    fitted = fit(at, files[c])
    row = merged.report.checkpoints[c]
    for part in PLANTED:
        torch.testing.assert_close(
            torch.tensor(fitted.row.multipliers_of(part)),
            torch.tensor(row.multipliers_of(part)),
            atol=1e-4,
            rtol=0,
        )
    figures = ("explained", "explained_unet", "explained_text_encoder", "error", "not_carried")
    for name in figures:
        assert getattr(fitted.row, name) == pytest.approx(getattr(row, name), abs=1e-5), name
    terms = weighted_loras_of(load_run(at, "mix"), row.name)
    assert [term.multiplier for term in terms] == list(row.multipliers)  # the merge's come first


@pytest.mark.parametrize("settings", [{"multipliers": "shared"}, {"layer_weights": "plain"}])
def test_multipliers_are_fitted_as_the_merge_fits_them(files, tmp_path, settings):
    merged = merge(files, tmp_path, **settings)
    fitted = fit(Folders.under(tmp_path), files[1])
    row = merged.report.checkpoints[1]
    assert len(fitted.row.text_multipliers) == len(row.text_multipliers)
    for part in PLANTED:
        result, expected = (item.multipliers_of(part) for item in (fitted.row, row))
        assert result == pytest.approx(expected, abs=1e-4)


def test_the_remainder_is_that_of_the_files_on_disk(at, other):
    fitted = fit(at, other)
    run = load_run(at, "mix")
    energies, errors = dense(other, run.hyper_model, weighted_loras_of(run, "new one"))
    assert fitted.row.explained == pytest.approx(1 - float(errors.sum() / energies.sum()), abs=1e-6)
    assert 0.2 < fitted.row.explained < 0.99
    total = sum(part.energy for part in fitted.parts), sum(part.lost for part in fitted.parts)
    assert total == pytest.approx((1, 1 - fitted.row.explained), abs=1e-6)
    sections = [layer.section for layer in layers_of(other)]
    inside = torch.tensor([section == "MID" for section in sections])
    middle = next(part for part in fitted.parts if part.name == "MID")
    assert middle.lost == pytest.approx(float(errors[inside].sum() / energies.sum()), abs=1e-6)
    state, base = load(other), load(run.hyper_model)
    outside = (state[VAE].double() - base[VAE].double()).square().sum()
    assert outside > 0
    assert fitted.not_carried["VAE"] > 0
    assert fitted.row.not_carried == pytest.approx(sum(fitted.not_carried.values()))


def test_no_other_multipliers_explain_more(at, other):
    fit(at, other)
    run = load_run(at, "mix")
    terms = weighted_loras_of(run, "new one")
    weights = layer_weights(other, run.hyper_model)
    best = weights @ dense(other, run.hyper_model, terms)[1]
    for change in ({"multiplier": 0.01}, {"text_multiplier": -0.01}):
        (name, step) = next(iter(change.items()))
        changed = [replace(terms[0], **{name: getattr(terms[0], name) + step}), *terms[1:]]
        assert weights @ dense(other, run.hyper_model, changed)[1] > best


def test_companions_take_the_unets_multipliers_and_report_their_share(single, tmp_path):
    root = shutil.copytree(single.root, tmp_path / "models")
    folders = Folders.under(root)
    fitted = fit(folders, single.models[2])
    run = load_run(folders, "mix")
    expected = single.merged.report.recovered
    assert [item.kind for item in fitted.recovered] == [item.kind for item in expected]
    tags = parse_tags(fitted.tags(run))
    assert [tag.name for tag in tags] == [path.stem for path in run.loras]
    assert [tag.multiplier for tag in tags[2:]] == [tag.multiplier for tag in tags[:2]]
    base, state = load(run.hyper_model), load(single.models[2])
    change = sum(
        x * load_file(path)["lora_unet_middle_block_1_norm.w_norm"].double()
        for x, path in zip(fitted.row.multipliers, run.loras[2:], strict=True)
    )
    energy = left = 0.0
    for end, key in (("w_norm", NORM), ("b_norm", NORM.replace("weight", "bias"))):
        delta = state[key].double() - base[key].double()
        change = sum(
            x * load_file(path)[f"lora_unet_middle_block_1_norm.{end}"].double()
            for x, path in zip(fitted.row.multipliers, run.loras[2:], strict=True)
        )
        energy += float(delta.square().sum())
        left += float((delta - change).square().sum())
    assert left < energy
    assert 0 < fitted.recovered[0].share <= 1


def test_the_hyper_model_itself_has_nothing_to_explain(at):
    run = load_run(at, "mix")
    fitted = fit(at, run.hyper_model, topup="16")
    assert fitted.row.multipliers == (0.0, 0.0)
    assert fitted.row.text_multipliers == (0.0, 0.0)
    assert (fitted.row.explained, fitted.row.error, fitted.row.not_carried) == (1, 0, 0)
    assert fitted.topups == ()
    text = (at.runs / "mix/fits/mix.txt").read_text()
    assert "in all layers it is mix.safetensors itself, and all multipliers are 0" in text


def test_a_fit_is_written_and_read_back(at, other, started):
    before = snapshot(started)
    fitted = fit(at, other)
    run = load_run(at, "mix")
    after = snapshot(started)
    assert {*after} - {*before} == {f"{FIT}/new one.json", f"{FIT}/new one.txt"}
    assert {name: after[name] for name in before} == before
    assert load_fits(run) == ((fitted,), ())
    assert fitted.path == str(other)
    text = after[f"{FIT}/new one.txt"].decode()
    assert fitted.row.fidelity != pytest.approx(fitted.row.explained, abs=1e-3)
    assert f"explained: {fitted.row.fidelity:.2%} of its difference in the layers\n" in text
    assert f"in weights: {fitted.row.explained:.2%} (" in text
    assert text.endswith(fitted.tags(run) + "\n")
    assert format_style(fitted, run) == f"mix: new one,{fitted.tags(run)},"


def test_a_top_up_beats_one_rank_for_all_layers(at, other, started):
    before = snapshot(started)
    fitted = fit(at, other, topup="3")
    (topup,) = fitted.topups
    assert topup.name == "mix_fit-new one-3"
    written = {*snapshot(started)} - {*before}
    beside = {f"Lora/{topup.name}.{end}" for end in ("json", "png", "safetensors")}
    assert written == beside | {f"{FIT}/new one.json", f"{FIT}/new one.txt"}
    run = load_run(at, "mix")
    terms = weighted_loras_of(run, "new one")
    assert [term.path.stem for term in terms] == ["mix_0-4", "mix_1-2", topup.name]
    energies, errors = dense(other, run.hyper_model, terms)
    assert topup.explained == pytest.approx(1 - float(errors.sum() / energies.sum()), abs=1e-6)
    base, state = load(run.hyper_model), load(other)
    loras = [(term, load_file(term.path)) for term in terms[:2]]
    lora, least, even = load_file(terms[-1].path), 0.0, 0.0
    values, cost = 0, 0
    weights = layer_weights(other, run.hyper_model)
    for layer, weight in zip(layers_of(other), weights.tolist(), strict=True):
        rows = slice(*layer.rows) if layer.rows else slice(None)
        rest = (state[layer.key][rows].double() - base[layer.key][rows].double()).flatten(1)
        rest = rest - sum(
            term.times(layer.part) * added(lora, layer.module) for term, lora in loras
        )
        squares = weight * torch.linalg.svdvals(rest).square()
        down = lora.get(f"{layer.module}.lora_down.weight")
        rank = 0 if down is None or not down.any() else len(down)
        least += float(squares[rank:].sum())
        even += float(squares[3:].sum())
        values += rank * (layer.m + layer.n)
        cost += 3 * (layer.m + layer.n)
    assert least <= float(weights @ errors) <= 1.002 * least < even
    assert 0.95 * cost < values <= cost
    assert parse_tags(fitted.tags(run))[-1] == (topup.name, 1.0, 1.0)
    metadata = load_metadata(terms[-1].path)
    assert metadata["hyper_merge.kind"] == "lora"
    assert metadata["hyper_merge.checkpoint"] == "new one"
    assert "new one.safetensors" in metadata["hyper_merge.lineage"]
    card = json.loads((started / f"Lora/{topup.name}.json").read_text())
    assert card["description"].startswith("Private LoRA of new one, rank 3: what the shared LoRAs")


def load_metadata(path):
    with CheckpointReader(path) as file:
        return file.header.metadata


def test_a_top_up_to_a_share_barely_exceeds_it(at, other):
    fitted = fit(at, other, topup="97%")
    (topup,) = fitted.topups
    assert fitted.row.fidelity < 0.97
    assert 0.97 <= topup.explained_weighted == fitted.fidelity < 0.975


def test_a_top_up_holds_no_end_layers_but_counts_their_error(single, other, tmp_path):
    folders = Folders.under(shutil.copytree(single.root, tmp_path / "models"))
    wanted = round(fit(folders, other).fidelity + 0.004, 4)
    fitted = fit(folders, other, topup=f"{wanted:.2%}", overwrite=True)
    assert wanted <= fitted.fidelity < wanted + 0.002  # about a rank more
    fitted = fit(folders, other, topup="3", overwrite=True)
    lora = load_file(folders.loras / f"{fitted.topups[0].name}.safetensors")
    layers = layers_of(other)  # without ends
    downs = {layer: lora.get(f"{layer.module}.lora_down.weight") for layer in layers}
    values = sum(len(d) * (layer.m + layer.n) for layer, d in downs.items() if d is not None)
    assert 2.9 < values / sum(layer.m + layer.n for layer in layers) <= 3


def test_a_share_that_end_layers_put_out_of_reach_is_one_of_the_others(single, other, tmp_path):
    folders = Folders.under(shutil.copytree(single.root, tmp_path / "models"))
    warnings = []
    progress = Progress(warn=warnings.append)
    fitted = fit(folders, other, progress, topup="99%")
    (warning,) = warnings
    assert warning.startswith(
        "no private LoRA reaches 99.0%: what it does not hold, end layers above"
    )
    assert 0.975 < fitted.fidelity < 0.99  # 99 % of what it can hold
    lora = load_file(folders.loras / f"{fitted.topups[0].name}.safetensors")
    full = sum(min(layer.m, layer.n) for layer in layers_of(other))
    ranks = [len(t) for key, t in lora.items() if key.endswith("lora_down.weight")]
    assert 0 < sum(ranks) < 0.6 * full  # not all that there are


def test_a_share_already_reached_needs_no_top_up(at, other, started):
    before = snapshot(started)
    fitted = fit(at, other, topup="1%")
    assert fitted.topups == ()
    assert {*snapshot(started)} - {*before} == {f"{FIT}/new one.json", f"{FIT}/new one.txt"}


def test_an_earlier_fit_stays_unless_overwriting_is_allowed(at, other, started):
    fit(at, other, topup="3")
    fit(at, other, topup="2", name="new one-x")
    before = snapshot(started)
    with pytest.raises(OutputError, match=r"new one.json exists"):
        fit(at, other, topup="4")
    assert snapshot(started) == before
    fit(at, other, topup="4", overwrite=True)
    names = {path.name for path in started.glob("Lora/*fit*")}
    stems = ("mix_fit-new one-4", "mix_fit-new one-x-2")
    assert names == {f"{stem}.{end}" for stem in stems for end in ("json", "png", "safetensors")}
    fit(at, other, topup="4", overwrite=True)
    assert {path.name for path in started.glob("Lora/*fit*")} == names
    assert temporaries(started) == []


def test_somebody_elses_lora_of_the_top_ups_name_stays(at, other, started):
    save_file({"x": torch.zeros(1)}, started / "Lora/mix_fit-new one-9.safetensors")
    before = snapshot(started)
    for overwrite in (False, True):
        with pytest.raises(NameTakenError, match=r"mix_fit-new one-9\.safetensors exists already"):
            fit(at, other, topup="3", overwrite=overwrite)
        assert snapshot(started) == before


def test_fits_go_with_their_run_and_with_its_replacement(at, other, files, started):
    fit(at, other, topup="3")
    merge(files, started, overwrite=True)
    assert load_fits(load_run(at, "mix")) == ((), ())
    assert [*started.glob("Lora/*fit*")] == []
    fit(at, other, topup="3")
    run = load_run(at, "mix")
    delete_run(run, at)
    assert [*started.glob("Lora/*.safetensors")] == []
    assert not run.folder.exists()


def test_a_damaged_or_outdated_fit_is_reported_and_skipped(at, other, started):
    fit(at, other)
    record = started / FIT / "new one.json"
    good = record.read_text()
    created = load_run(at, "mix").created
    for text, message in (
        (good.replace(created, "2020-01-01T00:00:00+00:00", 1), "is of an earlier run mix"),
        (good.replace('"version": 1', '"version": 2', 1), "update Hyper-Merge to use it"),
        (good[:-20], "is damaged"),
        (good.replace('"new one"', '"else"', 1), "is damaged"),
        ("[]", "is damaged"),
        (good.replace('"topup": ""', '"topup": "a:b"', 1), "expected a name without : < > ="),
        (good.replace('"topup": ""', '"topup": "../mine"', 1), "has a folder in its name"),
    ):
        record.write_text(text)
        fits, problems = load_fits(load_run(at, "mix"))
        assert fits == ()
        assert message in problems[0]


def test_a_cancel_at_any_step_leaves_nothing(at, other, started):
    messages = []
    fit(
        at,
        other,
        Progress(lambda phase, fraction: messages.append(fraction)),
        topup="3",
        name="x",
    )
    assert messages == sorted(messages)
    assert messages[-1] == 1
    before = snapshot(started)
    for fraction in (0.0, 0.1, 0.3, 0.6, 0.8, 0.97):
        at_now = [0.0]

        def on_progress(phase, now, at_now=at_now):
            at_now[0] = now

        def should_stop(at_now=at_now, fraction=fraction):
            return at_now[0] >= fraction

        with pytest.raises(InterruptedRun):
            fit(at, other, Progress(on_progress, should_stop), topup="3")
        assert snapshot(started) == before
        assert temporaries(started) == []


def test_a_full_disk_leaves_nothing(at, other, started, monkeypatch):
    before = snapshot(started)

    def refuse(needed):
        raise OutputError("no room")

    monkeypatch.setattr("hyper_merge.operations.fit.top_up.require_disks", refuse)
    with pytest.raises(HyperMergeError, match="no room"):
        fit(at, other, topup="3")
    assert snapshot(started) == before


def test_few_tensors_are_in_memory_at_a_time(at, other, monkeypatch):
    alive, most = WeakSet(), [0]
    tensor = CheckpointReader.tensor

    def counted(self, key):
        result = tensor(self, key)
        alive.add(result)
        most[0] = max(most[0], len(alive))
        return result

    monkeypatch.setattr(CheckpointReader, "tensor", counted)
    fit(at, other, topup="2")
    assert 2 <= most[0] < 60  # of some hundreds


def test_private_loras_of_a_run_join_no_fit(files, other, tmp_path):
    merged = merge(files, tmp_path / "m", topup="2")
    folders = Folders.under(tmp_path / "m")
    fitted = fit(folders, other)
    run = load_run(folders, "mix")
    assert run.report.topups
    names = [tag.name for tag in parse_tags(fitted.tags(run))]
    assert names == list(run.report.loras)
    energies, errors = dense(other, run.hyper_model, weighted_loras_of(run, "new one"))
    assert fitted.row.explained == pytest.approx(1 - float(errors.sum() / energies.sum()), abs=1e-6)
    for row, path in zip(merged.report.checkpoints, files, strict=True):
        terms = weighted_loras_of(run, row.name)
        assert [term.path.stem for term in terms][2:] == ([row.topup] if row.topup else [])
        energies, errors = dense(path, run.hyper_model, terms)
        share = 1 - float(errors.sum() / energies.sum())
        assert share == pytest.approx(row.explained, abs=1e-5)
