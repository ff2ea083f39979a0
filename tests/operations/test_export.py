"""Export: one LoRA that adds what a run's LoRAs add with one checkpoint's multipliers."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_family import RANKS, added, merge, snapshot, temporaries, write

from hyper_merge.errors import (
    ExtractionError,
    InterruptedRun,
    OutputError,
    RecipeError,
    RunError,
)
from hyper_merge.operations import export
from hyper_merge.operations.export import ExportRequest, multipliers_of, run_export
from hyper_merge.operations.export_text import format_export
from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress


def exported(folder, *checkpoints, run="mix", progress=None, **settings):
    request = ExportRequest(run, checkpoints or None, **settings)
    return run_export(request, Folders.under(folder), progress or Progress())


def sums(folder, row, run="mix"):
    """Returns by module what the run's LoRAs add with a checkpoint's multipliers, dense."""
    loras = [load_file(folder / "Lora" / f"{name}.safetensors") for name in names_of(folder, run)]
    modules = {key.partition(".")[0] for lora in loras for key in lora}
    return {
        module: sum(
            x * added(lora, module)
            for x, lora in zip(row.multipliers_of(part_of(module)), loras, strict=True)
            if f"{module}.alpha" in lora
        )
        for module in modules
    }


def part_of(module):
    return "text_encoder" if module.startswith("lora_te_") else "unet"


def names_of(folder, run="mix"):
    return load_run(Folders.under(folder), run).report.loras


def row_of(folder, checkpoint, run="mix"):
    rows = load_run(Folders.under(folder), run).report.checkpoints
    return next(row for row in rows if row.name == checkpoint)


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def manifest_path(folder, run="mix"):
    return folder / "hyper-merge" / run / "manifest.json"


def edit_manifest(folder, change, run="mix"):
    path = manifest_path(folder, run)
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def in_float32(files, tmp_path_factory):
    """A merge stored in float32; not to be changed."""
    folder = tmp_path_factory.mktemp("in_float32")
    merge(files, folder, dtype="float32")
    return folder


def test_an_export_in_float32_adds_exactly_the_runs_sum(in_float32, tmp_path):
    folder = shutil.copytree(in_float32, tmp_path / "models")
    for result in exported(folder):
        lora = load_file(result.path)
        for module, total in sums(folder, row_of(folder, result.checkpoint)).items():
            scale = float(total.abs().max())
            torch.testing.assert_close(added(lora, module), total, rtol=0, atol=1e-6 * scale)
        assert result.lost < 1e-12
        assert {t.dtype for t in lora.values()} == {torch.float32}


def test_an_export_in_float16_reports_its_rounding_error(started):
    for result in exported(started):
        lora, energy, lost = load_file(result.path), 0.0, 0.0
        for module, total in sums(started, row_of(started, result.checkpoint)).items():
            energy += float(total.square().sum())
            lost += float((added(lora, module) - total).square().sum())
        assert 1e-9 < lost / energy < 1e-6
        assert result.lost == pytest.approx(lost / energy, rel=1e-3)


def test_an_export_has_summed_ranks_and_both_names(started):
    (one,) = exported(started, "b")
    assert one.path == started / "Lora/mix_b.safetensors"
    ranks = Counter()
    for name in names_of(started):
        for key, tensor in load_file(started / "Lora" / f"{name}.safetensors").items():
            if key.endswith("lora_down.weight"):
                ranks[key] += len(tensor)
    lora = load_file(one.path)
    sizes = {key: len(lora[key]) for key in ranks}
    most = {key: min(added(lora, key.partition(".")[0]).shape) for key in ranks}
    assert sizes == {key: min(rank, most[key]) for key, rank in ranks.items()}
    assert one.rank == max(sizes.values()) > sum(RANKS)  # for ranks differ by layer
    row = row_of(started, "b")
    assert one.explained == row.fidelity != pytest.approx(row.explained, abs=1e-3)
    assert one.size == one.path.stat().st_size
    details = metadata(one.path)
    assert details["hyper_merge.kind"] == "lora-alone"
    assert (details["hyper_merge.run"], details["hyper_merge.checkpoint"]) == ("mix", "b")
    assert (details["hyper_merge.name"], details["ss_output_name"]) == ("mix", "mix_b")
    assert details["ss_network_alpha"] == f"{one.rank}.0"
    assert float(details["hyper_merge.explained"]) == one.explained
    sources = load_run(Folders.under(started), "mix").sources
    lineage = json.loads(details["hyper_merge.lineage"])
    assert [s["sha256"] for s in lineage] == [source.sha256 for source in sources]
    card = json.loads(one.path.with_suffix(".json").read_text())
    assert card["description"] == f"Turns mix into b, by itself; rank {one.rank}."
    assert card["sd version"] == "SD1"
    assert one.path.with_suffix(".png").exists()
    text = format_export([one], None)
    assert text.endswith("To get b, load mix and put this into the prompt:\n<lora:mix_b:1.00000>")
    assert exported(started, "a.safetensors")[0].checkpoint == "a"


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_cut_export_reports_the_lost_singular_tail(in_float32, tmp_path, rank):
    folder = shutil.copytree(in_float32, tmp_path / "models")
    (one,) = exported(folder, "c", rank=rank)
    lora, energy, tail = load_file(one.path), 0.0, 0.0
    for module, total in sums(folder, row_of(folder, "c")).items():
        values = torch.linalg.svdvals(total).square()
        energy += float(values.sum())
        tail += float(values[rank:].sum())
        lost = float((added(lora, module) - total).square().sum())
        assert lost == pytest.approx(float(values[rank:].sum()), rel=1e-4, abs=1e-9 * energy)
    assert one.lost == pytest.approx(tail / energy, rel=1e-4, abs=1e-12)
    assert one.rank == rank
    # what it explains of the checkpoint is not known exactly
    assert ("hyper_merge.explained" in metadata(one.path)) is False
    assert "lost by cutting" in format_export([one], rank)


def test_companions_remain_in_the_prompt_of_an_export(files, tmp_path):
    merge(files, tmp_path, exact="norms")
    (one,) = exported(tmp_path, "a")
    row = row_of(tmp_path, "a")
    tags = load_run(Folders.under(tmp_path), "mix").report.tags(row).split()
    assert one.companions.split() == tags[2:] != []
    assert format_export([one], None).endswith(f"\n<lora:mix_a:1.00000> {one.companions}")


def test_an_export_of_a_taken_name_is_numbered(files, started):
    """A checkpoint called like a LoRA of the run, and a file of somebody else."""
    lora = started / "Lora/mix_0-4.safetensors"
    before = lora.read_bytes()
    (started / "Lora/mix_b.safetensors").write_bytes(b"mine")

    def rename(manifest):
        rows = manifest["report"]["checkpoints"]
        rows[0]["name"] = "0-4"

    edit_manifest(started, rename)
    details = exported(started, "0-4", "b", overwrite=True)
    assert [result.path.name for result in details] == [
        "mix_0-4-2.safetensors",
        "mix_b-2.safetensors",
    ]
    assert lora.read_bytes() == before
    assert (started / "Lora/mix_b.safetensors").read_bytes() == b"mine"
    again = exported(started, "b", overwrite=True)
    assert again[0].path.name == "mix_b-2.safetensors"


def test_checkpoints_with_alike_names_get_lasting_numbers(started):
    def rename(manifest):
        rows = manifest["report"]["checkpoints"]
        rows[0]["name"], rows[1]["name"] = "my [v1]", "my <v1>"

    edit_manifest(started, rename)
    (second,) = exported(started, "my <v1>")
    assert second.path.name == "mix_my -v1-2.safetensors"
    assert [result.path.name for result in exported(started, "my [v1]")] == [
        "mix_my -v1.safetensors"
    ]


def test_an_existing_export_is_replaced_only_on_request(started):
    path = exported(started, "a")[0].path
    before = snapshot(started)
    with pytest.raises(OutputError, match=r"mix_a\.safetensors exists; choose another name, or"):
        exported(started, "a", rank=2)
    assert snapshot(started) == before
    assert exported(started, "a", rank=2, overwrite=True)[0].path == path
    assert path.read_bytes() != before["Lora/mix_a.safetensors"]


def refusal(folder, *checkpoints, error=RunError, **settings):
    """Returns the message of a refusal that wrote nothing."""
    before = snapshot(folder)
    with pytest.raises(error) as caught:
        exported(folder, *checkpoints, **settings)
    assert snapshot(folder) == before
    return str(caught.value)


def test_an_unknown_run_or_checkpoint_is_refused_with_suggestions(started):
    assert refusal(started, "a", run="mux") == (
        f'there is no run mux in {started / "hyper-merge"}; did you mean "mix"? There are mix'
    )
    edit_manifest(started, lambda m: m["report"]["checkpoints"][0].update(name="portrait"))
    assert refusal(started, "portait") == (
        'the run mix has no checkpoint portait; did you mean "portrait"? It has portrait, b, c'
    )
    assert refusal(started, "q") == "the run mix has no checkpoint q. It has portrait, b, c"


def test_a_missing_lora_is_refused(started):
    (started / "Lora/mix_1-2.safetensors").unlink()
    assert refusal(started) == (
        f"mix_1-2.safetensors of the run mix is missing in {started / 'Lora'}; copy it back from a"
        " backup, or merge again into another name than mix"
    )


def test_a_missing_hyper_model_is_a_warning(started):
    (started / "Stable-diffusion/mix.safetensors").unlink()
    edit_manifest(
        started, lambda m: m.update(hyper_model=str(started / "Stable-diffusion/mix.safetensors"))
    )
    messages = []
    assert exported(started, "a", progress=Progress(warn=messages.append))
    assert [message.partition(" is missing or another file;")[2] for message in messages] == [
        " these LoRAs go with no other"
    ]


@pytest.mark.parametrize("hashes", [True, False], ids=["manifest", "manifest of 0.1"])
def test_a_lora_that_was_edited_or_replaced_is_refused(files, started, tmp_path, hashes):
    if not hashes:
        edit_manifest(started, lambda m: m.pop("files"))
    assert len(exported(started)) == 3  # as they are all is well
    path = started / "Lora/mix_0-4.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}  # not mapped
    words, key = metadata(path), next(iter(tensors))
    save_file({**tensors, key: tensors[key] + 1}, path, words)  # the old hash is still in it
    message = (
        "mix_0-4.safetensors was edited or replaced since the run mix wrote it; copy it back from a"
        " backup, or merge again into another name than mix"
    )
    assert refusal(started, overwrite=True) == message
    merge((files[0], files[2]), tmp_path / "other")
    shutil.copy(tmp_path / "other/Lora/mix_0-4.safetensors", path)
    assert refusal(started, overwrite=True) == message
    save_file(tensors, path, {**words, "note": "mine"})  # words may be changed
    assert len(exported(started, overwrite=True)) == 3


def test_a_newer_run_or_unknown_family_is_refused(started):
    edit_manifest(started, lambda m: m.update(family="sd9"))
    assert refusal(started) == "the run mix is of the family sd9, unknown to this version"
    edit_manifest(started, lambda m: m.update(version=99))
    assert "update Hyper-Merge to open or delete it" in refusal(started)


def test_a_checkpoint_equal_to_the_hyper_model_is_refused(tmp_path, state_of):
    paths = [write(tmp_path / f"{n}.safetensors", state_of(0)) for n in "xy"]
    merge(paths, tmp_path)
    assert refusal(tmp_path, "x", error=ExtractionError) == (
        "all multipliers of x are 0: mix.safetensors is that checkpoint already, as far as LoRAs go;"
        " there is nothing to export"
    )


@pytest.mark.parametrize("rank", [0, -1, 2.5, "4"])
def test_an_impossible_rank_is_refused(started, rank):
    assert 'key "rank": expected a whole number from 1 to 4096' in refusal(
        started, error=RecipeError, rank=rank
    )


@pytest.mark.parametrize("phase", ["checking", "folding", "writing"])
def test_an_interrupt_at_any_moment_leaves_nothing(started, phase):
    messages, before = [], snapshot(started)
    progress = Progress(
        lambda words, _fraction: messages.append(words),
        lambda: bool(messages) and messages[-1].startswith(phase),
    )
    with pytest.raises(InterruptedRun):
        exported(started, progress=progress)
    assert snapshot(started) == before
    assert temporaries(started) == []


def test_all_exports_appear_or_none(started, monkeypatch):
    original, written = export.write_lora, []

    def fails_at_last(*arguments):
        if len(written) == 2:
            raise OutputError("the disk is full")
        written.append(arguments)
        original(*arguments)

    monkeypatch.setattr(export, "write_lora", fails_at_last)
    assert refusal(started, error=OutputError) == "the disk is full"


def test_progress_never_falls_and_ends_at_one(started):
    fractions = []
    exported(started, progress=Progress(lambda _phase, fraction: fractions.append(fraction)))
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_deleting_the_run_leaves_exports_where_they_are(started):
    path = exported(started, "a")[0].path
    folders = Folders.under(started)
    delete_run(load_run(folders, "mix"), folders)
    assert path.exists()


def test_the_manifest_has_every_loras_and_companions_hash(files, tmp_path):
    merge(files, tmp_path, exact="norms")
    run = load_run(Folders.under(tmp_path), "mix")
    assert [*run.hashes] == [path.stem for path in run.loras]
    for path in run.loras:
        assert metadata(path)["sshs_model_hash"] == run.hashes[path.stem]
    edit_manifest(tmp_path, lambda m: m.update(files={"mix_0-4": 3}))
    with pytest.raises(RunError, match='"mix_0-4" is missing or of the wrong kind'):
        load_run(Folders.under(tmp_path), "mix")


def test_a_layers_multipliers_are_those_of_its_part(started):
    row = replace(row_of(started, "a"), multipliers=(0.25, -1.0), text_multipliers=(0.5, 1.0))
    assert multipliers_of(row, "unet") == (0.25, -1.0)
    assert multipliers_of(row, "text_encoder") == (0.5, 1.0)
    row = replace(row, text_multipliers=(), topup="mix_a-own")
    assert multipliers_of(row, "text_encoder") == (0.25, -1.0, 1.0)
