"""What could be deleted is told, never done; a run grows into a new one and stays as it is."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_family import (
    WarningLog,
    load,
    losses,
    merge,
    recipe,
    reported_shares,
    snapshot,
    tags_of,
    write,
)

from hyper_merge.analysis import extension
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.errors import MismatchError, NameTakenError, RecipeError, RunError
from hyper_merge.operations import extend
from hyper_merge.operations.deletable import find_deletable
from hyper_merge.operations.deletable_text import format_deletion_report
from hyper_merge.operations.extend import ExtendRequest, run_extend
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.merge.average import run_average
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.hash_cache import hash_sources
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver import solve


def flip_a_byte(path):
    """Changes the first byte of a core."""
    file = read_header(path)
    key = next(key for key in file.tensors if key.endswith(".core"))
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start = json.loads(stream.read(length))[key]["data_offsets"][0]
        stream.seek(8 + length + start)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))


@pytest.fixture
def writable(files, merged, tmp_path):
    """A merge of three copied checkpoints, which may be changed, as if it had been made there."""
    old, root = merged.place.loras.parent, tmp_path / "models"
    shutil.copytree(old, root)
    copies = [shutil.copy2(path, root / "Stable-diffusion" / path.name) for path in files]
    (root / "hyper-merge/cache/hashes.json").unlink()  # those of the files at their first places
    hash_sources([*map(read_header, copies)], root / "hyper-merge/cache", Progress())
    manifest = root / "hyper-merge/mix/manifest.json"
    text = manifest.read_text().replace(str(old), str(root))
    manifest.write_text(text.replace(str(files[0].parent), str(root / "Stable-diffusion")))
    loras = [root / "Lora" / path.name for path in merged.loras]
    return SimpleNamespace(report=merged.report, loras=loras), Folders.under(root)


@pytest.fixture
def new(tmp_path, state_of):
    """A fourth checkpoint: a mixture of two with something of its own."""
    state, other = state_of(0, torch.float32), state_of(2, torch.float32)
    generator = torch.Generator().manual_seed(3)
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() > 1:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.std()
            state[key] = (1.5 * tensor - 0.5 * other[key] + 0.001 * noise).half()
    return write(tmp_path / "new.safetensors", state)


def safety(folders, threshold=0.99):
    return find_deletable("mix", threshold, folders, Progress())


def test_each_original_is_judged_by_threshold_and_none_deleted(writable):
    merged, folders = writable
    before = snapshot(folders.models.parent)
    rows = merged.report.checkpoints
    everything = sorted(row.fidelity * (1 - row.not_carried) for row in rows)
    deletion = safety(folders, everything[1])
    assert [verdict.safe for verdict in deletion.verdicts] == [
        row.fidelity * (1 - row.not_carried) >= everything[1] for row in rows
    ]
    sizes = {path.name: path.stat().st_size for path in folders.models.iterdir()}
    assert [item.frees for item in deletion.verdicts] == [
        sizes[item.name] for item in deletion.verdicts
    ]
    assert (
        deletion.frees
        == sum(sizes[verdict.name] for verdict in deletion.verdicts if verdict.safe)
        > 0
    )
    assert [item.explained for item in deletion.verdicts] == [row.fidelity for row in rows]
    for item, row in zip(deletion.verdicts, rows, strict=True):
        assert item.everything == pytest.approx(row.fidelity * (1 - row.not_carried))
        assert item.everything < item.explained
    assert [item.vae_differs for item in deletion.verdicts] == [False, True, True]
    text = format_deletion_report(deletion)
    assert "nothing was deleted; that is up to you" in text
    assert text.count("is restored)") == 1
    assert snapshot(folders.models.parent) == before


def test_a_missing_or_changed_original_is_reported(writable):
    _, folders = writable
    (folders.models / "a.safetensors").unlink()
    shutil.copy(folders.models / "b.safetensors", folders.models / "c.safetensors")
    deletion = safety(folders, 0.01)
    assert [verdict.safe for verdict in deletion.verdicts] == [False, True, False]
    assert deletion.verdicts[0].reason == "it no longer exists"
    assert deletion.verdicts[0].frees == 0
    assert deletion.verdicts[2].reason.startswith("it was changed since the merge")
    assert deletion.verdicts[2].frees == 0


def test_one_that_was_moved_is_found(writable):
    _, folders = writable
    deeper = folders.models / "deeper"
    deeper.mkdir()
    (folders.models / "a.safetensors").rename(deeper / "a.safetensors")
    assert not safety(folders, 0.01).verdicts[0].safe
    new = load_run(folders, "mix")
    run_fit(FitRequest("mix", deeper / "a.safetensors", name="x"), folders, Progress())
    deletion = safety(folders, 0.01).verdicts[0]
    assert (deletion.safe, deletion.path) == (
        True,
        deeper / "a.safetensors",
    )  # its hash is known now
    assert new.name == "mix"


@pytest.mark.parametrize("name", ["Lora/mix_1-2.safetensors", "Stable-diffusion/mix.safetensors"])
def test_nothing_is_safe_where_the_run_is_not_whole(writable, name):
    _, folders = writable
    path = folders.models.parent / name
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    if "Stable" in name:
        path.unlink()
    deletion = safety(folders, 0.01)
    assert deletion.problem
    assert not any(verdict.safe for verdict in deletion.verdicts)
    assert deletion.frees == 0
    assert "nothing is safe to delete: " in format_deletion_report(deletion)


def test_a_newer_manifest_or_unknown_run_is_refused(writable):
    _, folders = writable
    path = folders.runs / "mix/manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"version": 1', '"version": 99', 1))
    with pytest.raises(RunError, match=r"was made by Hyper-Merge .*; update"):
        safety(folders)
    path.write_text(text)
    with pytest.raises(RunError, match='did you mean "mix"'):
        find_deletable("mxi", 0.99, folders, Progress())


def test_a_lora_that_was_edited_since_makes_nothing_safe(writable):
    merged, folders = writable
    content = bytearray(merged.loras[0].read_bytes())
    content[-1] ^= 1
    merged.loras[0].write_bytes(content)
    deletion = safety(folders, 0.01)
    assert "was edited or replaced since the run mix wrote it" in deletion.problem
    assert not any(verdict.safe for verdict in deletion.verdicts)


def test_the_base_of_another_run_is_not_safe(writable, files):
    _, folders = writable
    models = [folders.models / f"{name}.safetensors" for name in "bc"]
    merge(models, folders.models.parent, name="based", base=str(folders.models / "a.safetensors"))
    deletion = safety(folders, 0.01)
    assert [verdict.safe for verdict in deletion.verdicts] == [False, True, True]
    assert deletion.verdicts[0].reason == "it is the hyper-model of based"


def test_a_link_frees_nothing(writable):
    _, folders = writable
    path = folders.models / "a.safetensors"
    path.rename(folders.models / "real.safetensors")
    path.symlink_to(folders.models / "real.safetensors")
    deletion = safety(folders, 0.01)
    assert deletion.verdicts[0].frees == 0
    assert deletion.verdicts[1].frees > 0


def test_fitted_checkpoints_are_held_against_it_too(writable, new):
    _, folders = writable
    fitted = run_fit(
        FitRequest("mix", new, topup=PrivateLoraTarget(share=0.99)), folders, Progress()
    )
    deletion = safety(folders, 0.5).verdicts[-1]
    assert (deletion.name, deletion.frees) == ("new.safetensors", new.stat().st_size)
    assert deletion.explained == fitted.fidelity > 0.99
    again = run_fit(
        FitRequest("mix", new, name="again", topup=PrivateLoraTarget(share=0.01)),
        folders,
        Progress(),
    )
    own_again = run_fit(
        FitRequest(
            "mix",
            folders.models / "a.safetensors",
            name="own",
            topup=PrivateLoraTarget(share=0.995),
        ),
        folders,
        Progress(),
    )
    deletion = safety(folders, 0.5)  # each file once, by what brings back most of it
    assert [item.name[:-12] for item in deletion.verdicts] == ["a", "b", "c", "new"]
    assert again.fidelity < fitted.fidelity == deletion.verdicts[-1].explained
    assert deletion.verdicts[-1].restored_as == "new"
    assert deletion.verdicts[0].explained == own_again.fidelity
    assert "(restored as own)" in format_deletion_report(deletion)
    (folders.loras / f"{fitted.topups[0].name}.safetensors").unlink()
    assert "mix_fit-new" in safety(folders, 0.5).problem


def absorb(folders, *paths, from_cache=True, **settings):
    request = ExtendRequest("mix", paths, from_cache=from_cache, **settings)
    return run_extend(request, folders, Progress(), effort=SearchEffort.QUICK)


def test_a_run_absorbs_a_checkpoint_into_a_new_one(writable, new, monkeypatch):
    _, folders = writable
    before = snapshot(folders.models.parent)
    fitted = run_fit(FitRequest("mix", new), folders, Progress())
    starts = []
    run_merge = extend.run_merge

    def messages(preflight, progress, *, start, **options):
        starts.append(start)
        return run_merge(preflight, progress, start=start, **options)

    monkeypatch.setattr(extend, "run_merge", messages)
    merged = absorb(folders, new)
    assert merged.place.run == "mix+1"
    assert [row.name for row in merged.report.checkpoints] == ["a", "b", "c", "new"]
    after = snapshot(folders.models.parent)
    assert {name: after[name] for name in before} == before
    old = load_run(folders, "mix")
    for part, rows in starts[0].items():
        expected = [row.multipliers_of(part) for row in old.report.checkpoints]
        expected.append(fitted.row.multipliers_of(part))
        torch.testing.assert_close(rows, torch.tensor(expected).double())
    mean = load(merged.place.hyper_model)
    plain = merge([*old.recipe.models, new], folders.models.parent / "plain", name="plain")
    for key, tensor in load(plain.place.hyper_model).items():
        if tensor.is_floating_point():
            step = torch.finfo(tensor.dtype).eps * tensor.float().abs().max()
            assert float((tensor.float() - mean[key].float()).abs().max()) <= step
    assert merged.report.loss <= plain.report.loss * 1.02
    assert merged.extended
    assert "were extended by the new checkpoints" in merged.note
    models = [*old.recipe.models, new]
    true_loss, shares = losses(models, merged, tags_of(merged))
    assert true_loss == pytest.approx(merged.report.loss, rel=1e-3)
    assert torch.allclose(shares.float(), reported_shares(merged), atol=1e-3)
    outside = [row.not_carried for row in plain.report.checkpoints]
    assert [row.not_carried for row in merged.report.checkpoints] == pytest.approx(
        outside, rel=1e-3
    )
    # Other ranks of the same checkpoints take what was made, and another absorption goes on from it.
    again = merge(models, folders.models.parent, name="again", ranks=(3,))
    assert again.reused_analysis
    assert again.place.hyper_model == merged.place.hyper_model


def test_all_is_read_again_unless_the_cache_is_asked_for(writable, new):
    _, folders = writable
    extended = absorb(folders, new)
    reread = absorb(folders, new, name="more", from_cache=False)
    assert (extended.extended, reread.extended, reread.reused_analysis) == (True, False, False)
    assert reread.note == ""
    assert absorb(folders, new, name="third", from_cache=False).reused_analysis


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "the cache has no analysis of the run mix any more"),
        (flip_a_byte, "its tensor .* does not have the checksum"),
        ("MOST_WRONG", "the old average is rounded so that"),
        ("MOST_UNKNOWN", "of the old deviations lie outside of"),
    ],
)
def test_all_is_read_where_the_cache_will_not_do(writable, new, monkeypatch, damage, reason):
    _, folders = writable
    (path,) = folders.cache.glob("*.analysis.safetensors")
    if isinstance(damage, str):
        monkeypatch.setattr(extension, damage, -1.0)
    else:
        damage(path)
    log = WarningLog()
    request = ExtendRequest("mix", (new,), from_cache=True)
    merged = run_extend(request, folders, log.progress, effort=SearchEffort.QUICK)
    assert not merged.extended
    assert merged.note == ""
    assert re.search(reason, " ".join(log.warnings))
    models = [*load_run(folders, "mix").recipe.models, new]
    average = run_average(
        run_preflight(recipe(models, folders.models.parent / "plain", name="plain")), Progress()
    )
    extended = load(merged.place.hyper_model)
    for key, tensor in load(average).items():
        assert torch.equal(tensor, extended[key])


def test_one_after_the_other_is_absorbed(writable, new, state_of):
    _, folders = writable
    state = {
        key: tensor * 1.001 if tensor.is_floating_point() else tensor
        for key, tensor in load(new).items()
    }
    other = write(new.with_name("other.safetensors"), state)
    absorb(folders, new)
    request = ExtendRequest("mix+1", (other,), name="both", from_cache=True)
    merged = run_extend(request, folders, Progress(), effort=SearchEffort.QUICK)
    assert merged.extended
    models = [*load_run(folders, "mix").recipe.models, new, other]
    true_loss, _ = losses(models, merged, tags_of(merged))
    assert true_loss == pytest.approx(merged.report.loss, rel=2e-3)


def test_a_merge_tries_the_start_that_it_is_given(files, tmp_path, monkeypatch):
    rows = torch.tensor([[1.0, 2], [-3, 0], [2, -2]], dtype=torch.float64)  # sums of 0
    tried = []

    def messages(problem, planned, earlier, generator, effort, on_progress, user_starts):
        tried.extend(user_starts)
        return best_start(problem, planned, earlier, generator, effort, on_progress, user_starts)

    best_start = solve.best_start
    monkeypatch.setattr(solve, "best_start", messages)
    preflight = run_preflight(recipe(files, tmp_path, allocation="even"))
    run_merge(preflight, Progress(), start={"unet": rows}, effort=SearchEffort.QUICK)
    _, start, _ = tried  # those of the solver besides: for the text encoder, and for the UNet
    back = preflight.inputs.contrasts.to_deviations @ start
    torch.testing.assert_close(back, torch.nn.functional.normalize(rows, dim=0))


def test_weights_are_extended_by_their_mean(files, new, tmp_path):
    merge(files, tmp_path / "m", weights=(3, 1, 2), fit_weights=(1, 1, 4))
    folders = Folders.under(tmp_path / "m")
    merged = absorb(folders, new, name="more")
    recipe = load_run(folders, merged.place.run).recipe
    assert recipe.weights == (3, 1, 2, 2)
    assert recipe.fit_weights == (1, 1, 4, 2)
    assert merged.place.run == "more"


@pytest.mark.parametrize(("ranks", "more"), [((40,) * 3, (30,) * 4), ((4, 2), (4, 2))])
def test_there_are_as_many_loras_as_checkpoints_again_where_a_word_was_for_them(
    files, new, tmp_path, ranks, more
):
    merge(files, tmp_path / "m", ranks=ranks)
    folders = Folders.under(tmp_path / "m")
    merged = absorb(folders, new)
    assert load_run(folders, merged.place.run).recipe.ranks == more
    assert len(merged.loras) == len(more)


def test_an_unsuitable_checkpoint_is_refused_with_nothing_written(writable, new, state_of):
    _, folders = writable
    before = snapshot(folders.models.parent)
    twin = shutil.copy(folders.models / "a.safetensors", new.with_name("twin.safetensors"))
    with pytest.raises(RunError, match=r"twin.safetensors has the content of a.safetensors, which"):
        absorb(folders, new.with_name("twin.safetensors"))
    with pytest.raises(NameTakenError, match=r"mix.safetensors is the hyper-model|exists"):
        absorb(folders, new, name="mix")
    with pytest.raises(RecipeError, match="is not allowed"):
        absorb(folders, new, name="a/b")
    lacking = write(
        new.with_name("lacking.safetensors"),
        {key: tensor for key, tensor in state_of(0).items() if "first_stage" not in key},
    )
    with pytest.raises(MismatchError, match="VAE"):
        absorb(folders, lacking)
    assert snapshot(folders.models.parent) == before
    assert twin
    (folders.models / "b.safetensors").unlink()
    shutil.copy(new, folders.models / "c.safetensors")
    before = snapshot(folders.models.parent)
    with pytest.raises(RunError, match=r"b.safetensors \(missing\), c.safetensors \(changed\)"):
        absorb(folders, new)
    assert snapshot(folders.models.parent) == before
