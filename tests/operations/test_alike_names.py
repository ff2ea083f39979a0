"""Checkpoints whose names become one word: none of their files replaces another's without a word."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_family import load, merge, recipe, write

from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.errors import NameTakenError
from hyper_merge.loras.prompt_tags import tag_names
from hyper_merge.operations.deletable import find_deletable
from hyper_merge.operations.deletable_text import format_deletion_report
from hyper_merge.operations.export import ExportRequest, run_export
from hyper_merge.operations.extract.extract import ExtractRequest, run_extract
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.operations.restore.request import RestoreRequest
from hyper_merge.operations.restore.restore import run_restore
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.runs.deletion import delete_run, files_of
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.names import name_key
from hyper_merge.runtime.progress import Progress

FAR_EAST = ("写实人像_v2", "动漫风_v2", "风景画_v2", "水彩_v2")
FAMILIES = {
    "letters of other scripts": FAR_EAST,
    "alike in their first 60 letters": tuple("x" * 60 + f"-{c}" for c in "abcd"),
    "case alone": ("model", "Model", "MODEL", "mODEL"),
    "punctuation": ("v2 (a)", "v2 [a]", "v2 {a}", "v2 #a#"),
}


@pytest.fixture(scope="session")
def states(state_of):
    """Four checkpoints that are unlike in the same measure."""
    average = {key: sum(state_of(c)[key].float() for c in range(3)) / 3 for key in state_of(0)}
    results = []
    for c in range(4):
        dice = torch.Generator().manual_seed(c)
        results.append(
            {
                key: (value + 0.1 * value.std() * torch.randn(value.shape, generator=dice)).half()
                if state_of(0)[key].is_floating_point() and value.numel() > 1
                else state_of(0)[key]
                for key, value in average.items()
            }
        )
    return results


@pytest.fixture
def family(states, root):
    """Writes checkpoints of these names into a models folder of the test."""
    return lambda names: write_all(root, names, states)


@pytest.fixture(scope="session")
def wished_of(states, tmp_path_factory):
    """Returns a merge of checkpoints of these names with private LoRAs; not to be changed."""
    known = {}

    def merged(kind):
        if kind not in known:
            root = tmp_path_factory.mktemp("wished") / "root"
            files = write_all(root, FAMILIES[kind], states)
            known[kind] = merge(files, root, ranks=(1,), topup="95%")
        return known[kind]

    return merged


@pytest.fixture
def wished(wished_of, root, request):
    """A copy of that merge, of Far Eastern names if of no others, as if it had been made there."""
    merged = wished_of(getattr(request, "param", "letters of other scripts"))
    first = merged.place.loras.parent
    shutil.copytree(first, root)
    manifest = root / "hyper-merge/mix/manifest.json"
    manifest.write_text(manifest.read_text().replace(str(first), str(root)))
    return merged


def write_all(root, names, states):
    """Writes checkpoints of these names into a models folder."""
    models = root / "Stable-diffusion"
    models.mkdir(parents=True, exist_ok=True)
    pairs = zip(names, states, strict=False)
    return [write(models / f"{name}.safetensors", state) for name, state in pairs]


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_checkpoint_has_a_private_lora_of_its_own(wished_of, kind):
    merged = wished_of(kind)
    root = merged.place.loras.parent
    topups = merged.report.topups
    assert len({name_key(name) for name in topups}) == 4
    for row in merged.report.checkpoints:
        path = root / f"Lora/{row.topup}.safetensors"
        assert metadata(path)["hyper_merge.checkpoint"] == row.name
        assert row.topup in tag_names(merged.report.tags(row))
    run = load_run(Folders.under(root), "mix")
    assert (run.missing, run.lost, run.problems) == ((), (), ())
    assert run.report == merged.report


def test_a_restored_checkpoint_has_the_reported_share(wished, root):
    folders = Folders.under(root)
    for row in wished.report.checkpoints:
        restored = run_restore(RestoreRequest("mix", {row.name: 1.0}), folders, Progress())
        assert restored.path.name == f"{row.name}-restored.safetensors"
        assert restored.compared.explained == pytest.approx(row.explained, abs=2e-3)
        assert row.fidelity >= 0.945


def test_letters_stay_and_plain_names_are_as_before(family, root):
    names = ("写实人像_v2", "plain_v1.5", "b", "c")
    merged = merge(family(names), root, ranks=(1,), topup="99%")
    words = [name.removeprefix("mix_top-").rpartition("-")[0] for name in merged.report.topups]
    assert words == ["写实人像_v2", "plain_v1.5", "b", "c"]


def lose(root, names):
    """Turns a run into that of an earlier version, where names became one word: one LoRA for all."""
    path = root / "hyper-merge/mix/manifest.json"
    manifest = json.loads(path.read_text())
    for row in manifest["report"]["checkpoints"]:
        if row["name"] in names:
            manifest["files"].pop(row["topup"])
            (root / f"Lora/{row['topup']}.safetensors").unlink()
            row["topup"] = ""
    path.write_text(json.dumps(manifest))


def test_a_lost_private_lora_lowers_the_prompts_reported_share(wished, root):
    folders = Folders.under(root)
    assert all(verdict.safe for verdict in find_deletable("mix", 0.7, folders, Progress()).verdicts)
    lose(root, FAR_EAST[:1])
    run = load_run(folders, "mix")
    assert run.lost == FAR_EAST[:1]
    assert run.report.checkpoints[0].explained < 0.6
    assert run.report.checkpoints[1:] == wished.report.checkpoints[1:]
    (problem,) = run.problems
    assert FAR_EAST[0] in problem
    row, *others = run.report.checkpoints
    row = replace(row, explained=0.4, explained_weighted=0.9)
    (problem,) = replace(run, report=replace(run.report, checkpoints=(row, *others))).problems
    assert "90.00% of that checkpoint is restored" in problem  # as `safe` and `runs` say
    restored = run_restore(RestoreRequest("mix", {FAR_EAST[0]: 1.0}), folders, Progress())
    assert restored.compared.explained == pytest.approx(
        run.report.checkpoints[0].explained, abs=2e-3
    )
    results = find_deletable("mix", 0.7, folders, Progress())
    assert [verdict.safe for verdict in results.verdicts] == [False, True, True, True]
    assert "its private LoRA is missing" in format_deletion_report(results)


@pytest.mark.parametrize("state", ["gone", "of another checkpoint", "of another merge"])
def test_a_private_lora_unlike_the_prompts_is_reported(wished, root, state):
    folders = Folders.under(root)
    first, second = (root / f"Lora/{name}.safetensors" for name in wished.report.topups[:2])
    if state == "gone":
        first.unlink()
    elif state == "of another checkpoint":
        shutil.copy(second, first)
    else:
        text = {**metadata(first), "sshs_model_hash": "0" * 64}
        save_file(load(second), first, text)
    run = load_run(folders, "mix")
    assert run.missing == (first,)
    assert run.lost == FAR_EAST[:1]
    results = find_deletable("mix", 0.8, folders, Progress())
    assert not any(verdict.safe for verdict in results.verdicts)
    assert first.name in results.problem


def test_fits_of_such_names_each_have_a_private_lora(family, root, tmp_path):
    first, second, *others = family(FAMILIES["punctuation"])
    merge(others, root, ranks=(1,))
    folders = Folders.under(root)
    names = []
    for path in (first, second):
        fitted = run_fit(
            FitRequest("mix", path, topup=PrivateLoraTarget(2), device="cpu"), folders, Progress()
        )
        names.append(fitted.topups[0].name)
    again = run_fit(
        FitRequest("mix", second, topup=PrivateLoraTarget(2), device="cpu", overwrite=True),
        folders,
        Progress(),
    )
    assert [again.topups[0].name] == names[1:]
    assert len({name_key(name) for name in names}) == 2
    fits, problems = load_fits(load_run(folders, "mix"))
    assert problems == ()
    assert {item.topups[0].name for item in fits} == set(names)
    for item in fits:
        text = metadata(root / f"Lora/{item.topups[0].name}.safetensors")
        assert text["hyper_merge.checkpoint"] == item.row.name


def test_a_fit_whose_record_would_replace_another_is_refused(family, root):
    first, second, *others = family(FAMILIES["case alone"])
    merge(others, root, ranks=(1,))
    folders = Folders.under(root)
    run_fit(FitRequest("mix", first, device="cpu"), folders, Progress())
    for overwrite in (False, True):
        extraction = FitRequest("mix", second, device="cpu", overwrite=overwrite)
        with pytest.raises(NameTakenError, match="the fit of model exists already, and Model"):
            run_fit(extraction, folders, Progress())
    run_fit(FitRequest("mix", second, name="other", device="cpu"), folders, Progress())


def test_a_fit_reports_a_replaced_private_lora(family, root):
    first, second, *others = family(FAR_EAST)
    merge(others, root, ranks=(1,))
    folders = Folders.under(root)
    fits = [
        run_fit(
            FitRequest("mix", path, topup=PrivateLoraTarget(2), device="cpu"), folders, Progress()
        )
        for path in (first, second)
    ]
    one, other = (root / f"Lora/{item.topups[0].name}.safetensors" for item in fits)
    shutil.copy(other, one)
    _, (problem,) = load_fits(load_run(folders, "mix"))
    assert one.name in problem


@pytest.mark.parametrize("wished", ["case alone", "punctuation"], indirect=True)
def test_exports_are_apart_and_keep_their_names(wished, root):
    folders = Folders.under(root)
    exported = run_export(ExportRequest("mix"), folders, Progress())
    names = [item.path.stem for item in exported]
    assert len({name_key(name) for name in names}) == 4
    assert not any("checkpoint" in name for name in names)
    again = run_export(ExportRequest("mix", overwrite=True), folders, Progress())
    assert [item.path.stem for item in again] == names


def test_extractions_of_long_names_do_not_replace_each_other(states, tmp_path, root):
    names = ["x" * 110 + c for c in "ab"]
    base = write(tmp_path / "base.safetensors", states[2])
    results = []
    for name, state in zip(names, states, strict=False):
        path = write(tmp_path / f"{name}.safetensors", state)
        extraction = ExtractRequest(base, path, rank=1, output=root, device="cpu", overwrite=True)
        results += [run_extract(extraction, None, Progress()).path for _ in range(2)]
    assert results[0] == results[1] != results[2] == results[3]
    assert [metadata(path)["hyper_merge.checkpoint"] for path in results[::2]] == names


def test_mixtures_of_long_names_do_not_replace_each_other(family, root):
    names = tuple(f"{c}" * 60 for c in "abcd")
    merge(family(names), root, ranks=(1,))
    folders = Folders.under(root)
    shares = [{names[0]: 0.5, names[1]: 0.5}, {names[0]: 0.5, names[1]: 0.25}]
    paths = [
        run_restore(RestoreRequest("mix", item, overwrite=True), folders, Progress()).path
        for item in (*shares, *shares)
    ]
    assert paths[:2] == paths[2:]
    assert paths[0] != paths[1]


def test_names_that_windows_keeps_for_itself_are_not_given(states, tmp_path, root):
    path = write(tmp_path / "con.tar.safetensors", states[0])
    base = write(tmp_path / "base.safetensors", states[1])
    made = run_extract(
        ExtractRequest(base, path, rank=1, output=root, device="cpu"), None, Progress()
    ).path
    assert made.name.partition(".")[0].lower() != "con"


def test_a_line_break_in_a_name_breaks_no_line(family, root):
    names = ("a\nb", "c", "a:b", "tail ")
    merged = merge(family(names), root, ranks=(1,), topup="99%")
    lines = (root / "hyper-merge/mix/multipliers.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["a\\nb", "c", "a:b", "tail "]
    assert [line.partition(": ")[2] for line in lines] == [
        merged.report.tags(row) for row in merged.report.checkpoints
    ]
    report = (root / "hyper-merge/mix/report.txt").read_text()
    assert (
        sum(line.startswith(("a\\nb ", "c  ", "a:b ", "tail ")) for line in report.splitlines())
        == 4
    )
    card = json.loads((root / "Lora/mix_0-1.json").read_text())
    assert len(card["notes"].splitlines()) == 4
    folders = Folders.under(root)
    for name in names:
        path = run_restore(RestoreRequest("mix", {name: 1.0}), folders, Progress()).path
        assert path.exists()
        assert not set(path.name) & set('<>:"/\\|?*\n')


def test_a_fit_of_a_non_portable_name_is_listed(family, root):
    first, second, *others = family(("a\nb", "a:b", "c", "d"))
    merge(others, root, ranks=(1,))
    folders = Folders.under(root)
    run_fit(FitRequest("mix", first, topup=PrivateLoraTarget(1), device="cpu"), folders, Progress())
    with pytest.raises(NameTakenError, match="choose another name for it"):
        run_fit(FitRequest("mix", second, device="cpu"), folders, Progress())
    run = load_run(folders, "mix")
    (fitted,), problems = load_fits(run)
    assert (fitted.row.name, problems) == ("a\nb", ())
    run_fit(FitRequest("mix", first, device="cpu", overwrite=True), folders, Progress())
    assert not [path for path in files_of(run, folders) if "_fit-" in path.name]
    delete_run(run, folders)
    assert not (root / "hyper-merge/mix").exists()


def test_runs_differing_only_by_case_are_kept_apart(family, root):
    files = family(("a", "b", "c", "d"))
    merge(files[:2], root, name="Mix", ranks=(1,))
    second = merge(files[2:], root, name="mix", ranks=(1,))
    assert second.place.run == "mix-2"
    extraction = recipe(files[:3], root, name="mIX", ranks=(1,), overwrite=True)
    with pytest.raises(NameTakenError, match="differs from mIX by case alone"):
        run_merge(run_preflight(extraction), Progress(), effort=SearchEffort.QUICK)


def test_overwriting_a_run_never_takes_another_runs_lora(family, root):
    files = family(("a_0", "b", "c", "d"))
    merge(files[1:], root, ranks=(1,))
    folders = Folders.under(root)
    run_fit(
        FitRequest("mix", files[0], topup=PrivateLoraTarget(2), device="cpu"), folders, Progress()
    )
    path = root / "Lora/mix_fit-a_0-2.safetensors"
    before = path.read_bytes()
    extraction = recipe(files[1:], root, name="mix_fit-a", ranks=(2,), overwrite=True)
    with pytest.raises(NameTakenError, match="mix_fit-a_0-2 is a LoRA of the run mix"):
        run_merge(run_preflight(replace(extraction)), Progress(), effort=SearchEffort.QUICK)
    assert path.read_bytes() == before
