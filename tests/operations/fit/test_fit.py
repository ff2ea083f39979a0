"""A checkpoint outside of a merge is placed on its LoRAs exactly, or refused by name with nothing written."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_family import (
    NORM,
    QUERY,
    VAE,
    added,
    layers_of,
    load,
    merge,
    snapshot,
    temporaries,
    write,
    write_unfinished,
)

from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.decomposition.rank_allocation import ranks_within
from hyper_merge.errors import (
    CheckpointError,
    HyperMergeError,
    InterruptedRun,
    MismatchError,
    NameTakenError,
    NonFiniteError,
    OutputError,
    RecipeError,
    RunError,
)
from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.fit.text import format_style
from hyper_merge.recipe.parsing import PrivateLoraTarget, parse_private_lora_target
from hyper_merge.recipe.request import key_place
from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runs.weighted_loras import weighted_loras_of
from hyper_merge.runtime.progress import Progress

FIT = "hyper-merge/mix/fits"
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
    loras = [load_file(path) for path in single.merged.loras[:2]]
    for layer in layers_of(single.models[0]):
        weight = state[layer.key].double()
        rows = slice(*layer.rows) if layer.rows else slice(None)
        for x, lora in zip(PLANTED[layer.part], loras, strict=True):
            weight[rows] += (x * added(lora, layer.module).expand(layer.m, layer.n)).reshape(
                weight[rows].shape
            )
        state[layer.key] = weight.float()
    return write(single.root.parent / "planted.safetensors", state)


@pytest.fixture
def at(started, merged):
    """The folders of a merge, with a manifest as if it had been made there."""
    manifest, root = started / "hyper-merge/mix/manifest.json", merged.place.loras.parent
    manifest.write_text(manifest.read_text().replace(str(root), str(started)))
    return Folders.under(started)


@pytest.fixture
def other(tmp_path, state_of):
    """A checkpoint of the family that is no other's: a mixture with something of its own."""
    state = state_of(0, torch.float32)
    second = state_of(1, torch.float32)
    generator = torch.Generator().manual_seed(7)
    for key, tensor in state.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * tensor.std().nan_to_num()
            state[key] = (0.3 * tensor + 0.7 * second[key] + 0.002 * noise).half()
    return write(tmp_path / "new one.safetensors", state)


def dense(path, hyper_model, terms):
    """Energies of the differences and of what LoRAs leave, by layer, from the files on disk."""
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


def fit(folders, path, progress=None, **settings):
    request = FitRequest.parse({"run": "mix", "checkpoint": path, **settings}, key_place)
    return run_fit(request, folders, progress or Progress())


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
def test_a_checkpoint_of_the_merge_has_the_merges_own_multipliers_and_share(files, at, merged, c):
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


def test_what_remains_is_that_of_the_files_on_disk(at, other):
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
    best = dense(other, run.hyper_model, terms)[1].sum()
    for change in ({"multiplier": 0.01}, {"text_multiplier": -0.01}):
        (name, step) = next(iter(change.items()))
        changed = [replace(terms[0], **{name: getattr(terms[0], name) + step}), *terms[1:]]
        assert dense(other, run.hyper_model, changed)[1].sum() > best


def test_companions_take_the_multipliers_of_the_unet_and_what_they_bring_back_is_told(
    single, tmp_path
):
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
    assert f"explained: {fitted.row.explained:.2%} of its difference in the layers" in text
    assert text.endswith(fitted.tags(run) + "\n")
    assert format_style(fitted, run) == f"mix: new one,{fitted.tags(run)},"


def test_a_top_up_of_a_rank_is_better_than_the_best_of_that_rank_in_every_layer(at, other, started):
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
    for layer in layers_of(other):
        rows = slice(*layer.rows) if layer.rows else slice(None)
        rest = (state[layer.key][rows].double() - base[layer.key][rows].double()).flatten(1)
        rest = rest - sum(
            term.times(layer.part) * added(lora, layer.module) for term, lora in loras
        )
        squares = torch.linalg.svdvals(rest).square()
        down = lora.get(f"{layer.module}.lora_down.weight")
        rank = 0 if down is None or not down.any() else len(down)
        least += float(squares[rank:].sum())
        even += float(squares[3:].sum())
        values += rank * (layer.m + layer.n)
        cost += 3 * (layer.m + layer.n)
    assert least <= float(errors.sum()) <= 1.002 * least < even
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


def test_a_top_up_to_a_share_reaches_it_and_hardly_more(at, other):
    fitted = fit(at, other, topup="97%")
    (topup,) = fitted.topups
    assert fitted.row.explained < 0.97
    assert 0.97 <= topup.explained < 0.975


def test_a_share_that_is_reached_already_needs_no_top_up(at, other, started):
    before = snapshot(started)
    fitted = fit(at, other, topup="1%")
    assert fitted.topups == ()
    assert {*snapshot(started)} - {*before} == {f"{FIT}/new one.json", f"{FIT}/new one.txt"}


def test_ranks_within_leave_no_more_than_allowed_and_hardly_less():
    spectra = [torch.tensor(values).double() for values in ([8.0, 4, 2, 1], [5.0, 5, 0.5])]
    ranks = ranks_within(spectra, [1, 2], 4.0)
    tails = [float(values[rank:].sum()) for values, rank in zip(spectra, ranks, strict=True)]
    assert sum(tails) <= 4.0
    assert ranks == [2, 2]
    assert ranks_within(spectra, [1, 2], 25.5) == [0, 0]
    assert ranks_within(spectra, [1, 2], 0.0) == [4, 3]


@pytest.mark.parametrize(
    ("words", "wish"),
    [
        ("16", PrivateLoraTarget(rank=16)),
        ("95%", PrivateLoraTarget(share=0.95)),
        (" 0.5 %", PrivateLoraTarget(share=0.005)),
        (None, None),
    ],
)
def test_a_top_up_is_a_rank_or_a_share(words, wish):
    assert parse_private_lora_target(words) == wish


@pytest.mark.parametrize("words", ["0", "-3", "1.5", "100%", "0%", "lots", "95 percent", "nan%"])
def test_other_top_ups_are_refused(words):
    with pytest.raises(RecipeError, match="expected a rank from 1 to 4096, or a share above 0%"):
        parse_private_lora_target(words)


def test_an_earlier_fit_stays_unless_it_may_be_replaced_with_its_top_up(at, other, started):
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
        with pytest.raises(
            NameTakenError, match=r"mix_fit-new one-9\.safetensors is there already"
        ):
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


def edit_tensor(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def newer(path):
    path.write_text(path.read_text().replace('"version": 1', '"version": 99', 1))


def replaced(path):
    tensors = load_file(path)
    save_file(tensors, path)  # the same tensors, without the metadata


HYPER, LORA = "Stable-diffusion/mix.safetensors", "Lora/mix_1-2.safetensors"
REFUSED = [
    (HYPER, lambda path: path.unlink(), "the hyper-model of the run mix, is missing"),
    (HYPER, replaced, "is not the hyper-model that the LoRAs of the run mix go with"),
    (LORA, lambda path: path.unlink(), r"mix_1-2.safetensors of the run mix is missing"),
    (LORA, edit_tensor, "mix_1-2.safetensors was edited or replaced since the run mix"),
    ("hyper-merge/mix/manifest.json", newer, "was made by Hyper-Merge .*; update"),
]


@pytest.mark.parametrize(("name", "act", "message"), REFUSED)
def test_a_run_that_is_not_whole_is_refused_with_nothing_written(
    at, other, started, name, act, message
):
    act(started / name)
    before = snapshot(started)
    with pytest.raises(RunError, match=message):
        fit(at, other, topup="3")
    assert snapshot(started) == before


def test_a_link_in_place_of_the_folder_of_fits_is_not_followed(at, other, started, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (started / FIT).symlink_to(elsewhere, target_is_directory=True)
    before = snapshot(started)
    with pytest.raises(OutputError, match="fits is a link, and links are not followed"):
        fit(at, other, overwrite=True)
    assert list(elsewhere.iterdir()) == []
    assert snapshot(started) == before


def test_an_edited_lora_is_refused_also_where_the_manifest_knows_no_hashes(at, other, started):
    path = started / "hyper-merge/mix/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]
    path.write_text(json.dumps(manifest))
    fit(at, other)
    edit_tensor(started / LORA)
    with pytest.raises(RunError, match=r"mix_1-2\.safetensors was edited or replaced"):
        fit(at, other, name="again")


def test_unknown_runs_and_files_are_refused(at, other, started, tmp_path):
    before = snapshot(started)
    with pytest.raises(RunError, match=r'there is no run mxi in .*did you mean "mix"'):
        run_fit(FitRequest("mxi", other), at, Progress())
    with pytest.raises(CheckpointError, match=r"nowhere.safetensors does not exist"):
        fit(at, tmp_path / "nowhere.safetensors")
    with pytest.raises(RecipeError, match=r"is not allowed"):
        fit(at, other, name="a/b")
    assert snapshot(started) == before


def test_another_family_is_refused_in_words(at, started, tmp_path, state_of):
    state = {key: tensor for key, tensor in state_of(0).items() if "first_stage" not in key}
    lacking = write(tmp_path / "lacking.safetensors", state)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    wide = {**state_of(0), key: torch.zeros(state_of(0)[key].shape[0], 9, 3, 3).half()}
    inpainting = write(tmp_path / "inpainting.safetensors", wide)
    before = snapshot(started)
    with pytest.raises(MismatchError, match=r"1 is Stable Diffusion 1.x.*inpainting"):
        fit(at, inpainting)
    with pytest.raises(MismatchError, match=r"VAE.*choose files with the same parts"):
        fit(at, lacking)
    assert snapshot(started) == before


def test_a_spoilt_checkpoint_is_refused_by_key(at, started, tmp_path, state_of):
    state = state_of(0)
    state[QUERY] = state[QUERY].clone()
    state[QUERY][0, 0] = float("nan")
    before = snapshot(started)
    with pytest.raises(NonFiniteError, match=r"spoilt.safetensors holds NaN or infinity in 1 of"):
        fit(at, write(tmp_path / "spoilt.safetensors", state))
    assert snapshot(started) == before


def test_an_unfinished_download_cannot_be_fitted(at, other, started, tmp_path):
    spoilt = write_unfinished(tmp_path / "spoilt.safetensors", other, 0.6)
    before = snapshot(started)
    with pytest.raises(CheckpointError, match=r"spoilt\.safetensors lacks data"):
        fit(at, spoilt)
    sign = other.with_name(other.name + ".part")
    sign.touch()
    with pytest.raises(CheckpointError, match=r"the download of new one\.safetensors is not"):
        fit(at, other)
    assert snapshot(started) == before


def test_another_file_of_a_merged_checkpoints_name_needs_one_of_its_own(at, other, started):
    twin = other.with_name("a.safetensors")
    other.rename(twin)
    before = snapshot(started)
    with pytest.raises(
        NameTakenError, match="a is another checkpoint of the run mix; choose another"
    ):
        fit(at, twin)
    assert snapshot(started) == before
    assert fit(at, twin, name="mine").row.name == "mine"


def test_a_fit_of_a_replaced_run_or_a_damaged_one_is_told_and_left_out(at, other, started):
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
    ):
        record.write_text(text)
        fits, problems = load_fits(load_run(at, "mix"))
        assert fits == ()
        assert message in problems[0]


def test_a_wish_to_stop_is_heard_everywhere_and_leaves_nothing(at, other, started):
    messages = []
    fit(
        at,
        other,
        Progress(lambda phase, fraction: messages.append(fraction)),
        topup="90%",
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
            fit(at, other, Progress(on_progress, should_stop), topup="90%")
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


def test_private_loras_of_a_runs_checkpoints_have_no_part_in_a_fit(files, other, tmp_path):
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
