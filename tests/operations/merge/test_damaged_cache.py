"""A merge names damaged files of the cache, makes them again, and comes to the same result."""

import os
from pathlib import Path

import pytest
import torch
from damaged_analyses import DAMAGES, as_before, flipped, with_spectra, without
from mutations import NESTED
from safetensors.torch import load_file
from tiny_family import merge, recipe, snapshot

from hyper_merge.analysis.cache import (
    cache_bytes,
    clear_analyses,
    find_analysis,
    prune_analyses,
)
from hyper_merge.analysis.store import open_analysis
from hyper_merge.errors import DamagedCacheError
from hyper_merge.operations.merge.plan import make_plan
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.operations.merge.rank_search import solve_with_rank_search
from hyper_merge.runtime.checked_json import read_sealed
from hyper_merge.runtime.damaged_files import DamagedFiles
from hyper_merge.runtime.progress import Progress

VISIBLE = ["infinite bases", "a core of NaN", "zero bases", "zero_tail", "without grams"]


def only(folder, suffix):
    (path,) = folder.glob(f"*{suffix}")
    return path


@pytest.fixture
def cache(started):
    return started / "hyper-merge/cache"


@pytest.fixture
def solutions(cache):
    return only(cache, ".solutions.json")


@pytest.fixture
def analysis(cache):
    """The analysis alone, without the solutions beside it."""
    only(cache, ".solutions.json").unlink()
    return only(cache, ".analysis.safetensors")


def loras_of(merged):
    """Returns the tensors' bytes of all LoRAs, and the multipliers."""
    rows = [row.multipliers for row in merged.report.checkpoints]
    return [load_file(path) for path in merged.loras], rows


def same(one, other):
    for left, right in zip(one[0], other[0], strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert one[1] == other[1]


@pytest.fixture(scope="session")
def afresh(tmp_path_factory, files):
    """The LoRAs of a merge with other ranks where nothing is remembered."""
    return loras_of(merge(files, tmp_path_factory.mktemp("afresh"), ranks=(5,)))


@pytest.mark.parametrize(  # more of them in analysis/test_solutions.py
    "text", [NESTED, '{"4; a": {"unet": [[NaN], [1]]}}'], ids=["no JSON", "no number"]
)
def test_damaged_solutions_do_not_change_a_merge(started, files, solutions, afresh, log, text):
    solutions.write_text(text)
    made = merge(files, started, log.progress, ranks=(5,), name="other")
    same(loras_of(made), afresh)
    assert made.reused_analysis
    (warning,) = log.warnings
    assert str(solutions) in warning
    assert f"set aside as {solutions.name}.damaged" in warning
    assert solutions.with_name(solutions.name + ".damaged").read_text() == text
    (first,) = read_sealed(solutions)
    assert first.startswith("5;")


def test_folder_named_as_solutions_is_no_error(started, files, solutions, afresh, log):
    solutions.unlink()
    solutions.mkdir()
    made = merge(files, started, log.progress, ranks=(5,), name="other")
    same(loras_of(made), afresh)
    (warning,) = log.warnings
    assert "are not remembered" in warning


@pytest.fixture(scope="module")
def inputs(files, tmp_path_factory):
    return run_preflight(recipe(files, tmp_path_factory.mktemp("inputs"))).inputs


def read_whole(path, inputs):
    """Reads all that a merge can read of an analysis."""
    with open_analysis(path, inputs) as opened:
        for index in range(len(opened.layers)):
            opened.core(index), opened.rounding(index), opened.bases(index)
        return opened.grams, opened.weights, opened.not_carried


def test_a_sound_analysis_is_read_without_complaint(analysis, inputs):
    read_whole(analysis, inputs)
    with_spectra(analysis)
    read_whole(analysis, inputs)
    without("checksums")(analysis)
    read_whole(analysis, inputs)


@pytest.mark.parametrize("how", ["flipped 17.core", "other checksums", "without 17.core"])
def test_damage_of_an_analysis_with_spectra_is_noticed(analysis, inputs, how):
    with_spectra(analysis)
    DAMAGES[how](analysis)
    with pytest.raises(DamagedCacheError):
        read_whole(analysis, inputs)


def test_spectra_are_among_the_counted_checksums(analysis, inputs):
    with_spectra(analysis)
    without("17.rows")(analysis)
    with pytest.raises(DamagedCacheError, match="its tensor checksums is missing or another"):
        read_whole(analysis, inputs)


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damage_of_an_analysis_is_noticed(analysis, inputs, how):
    good = analysis.read_bytes()
    DAMAGES[how](analysis)
    assert analysis.read_bytes() != good
    with pytest.raises(DamagedCacheError):
        read_whole(analysis, inputs)


@pytest.mark.parametrize("how", VISIBLE)
def test_visible_damage_of_old_analyses_is_noticed(analysis, inputs, how):
    as_before(analysis)
    DAMAGES[how](analysis)
    with pytest.raises(DamagedCacheError):
        read_whole(analysis, inputs)


# One for each place where a merge comes upon it: the header, the settings, the solver, the writing.
@pytest.mark.parametrize("how", ["truncated", "of_others", "flipped 17.core", "flipped 17.left"])
def test_damaged_analysis_is_set_aside_and_remade(started, files, analysis, afresh, log, how):
    DAMAGES[how](analysis)
    bad = analysis.read_bytes()
    made = merge(files, started, log.progress, ranks=(5,), name="other")
    same(loras_of(made), afresh)
    assert not made.reused_analysis
    (warning,) = log.warnings
    assert warning.startswith(f"{analysis} is damaged (")
    assert warning.endswith(
        f"; it is set aside as {analysis.name}.damaged, and its content is computed again"
    )
    assert analysis.with_name(analysis.name + ".damaged").read_bytes() == bad
    assert analysis.exists()


@pytest.mark.parametrize("make_old", [with_spectra, as_before])
def test_an_analysis_of_an_earlier_version_serves(started, files, analysis, afresh, log, make_old):
    make_old(analysis)
    made = merge(files, started, log.progress, ranks=(5,), name="other")
    assert made.reused_analysis
    same(loras_of(made), afresh)
    assert log.warnings == []


def test_a_damaged_analysis_of_an_earlier_version_is_remade(started, files, analysis, afresh, log):
    as_before(analysis)
    DAMAGES["zero bases"](analysis)
    made = merge(files, started, log.progress, ranks=(5,), name="other")
    assert not made.reused_analysis
    same(loras_of(made), afresh)
    assert len(log.warnings) == 1


def test_a_plan_makes_a_damaged_analysis_again(started, files, analysis, log):
    preflight = run_preflight(recipe(files, started, name="other"))
    good = make_plan(preflight, Progress())
    flipped("17.core")(analysis)
    assert make_plan(preflight, log.progress) == good
    assert len(log.warnings) == 1
    assert make_plan(preflight, log.progress) == good
    assert len(log.warnings) == 1


def test_immovable_damaged_analysis_is_passed_over(
    started, files, analysis, afresh, log, monkeypatch
):
    flipped("17.core")(analysis)
    move = Path.replace

    def refuse(self, target):
        if self == analysis:
            raise PermissionError(13, "in use")
        return move(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        made = merge(files, started, log.progress, ranks=(5,), name="other")
        same(loras_of(made), afresh)
    (warning,) = log.warnings
    assert "cannot be set aside (in use); this run does without it" in warning
    assert analysis.exists()
    beside = analysis.with_name(analysis.name.replace("-", "-2-"))
    assert beside.exists()
    assert merge(files, started, log.progress, ranks=(3,), name="third").reused_analysis


def test_analysis_damaged_at_once_ends_the_merge(started, files, analysis, log, monkeypatch):
    analysis.unlink()
    before = snapshot(started)
    monkeypatch.setattr("hyper_merge.analysis.writer.checksum", lambda tensor: 0)
    with pytest.raises(DamagedCacheError, match="check the disk and the memory"):
        merge(files, started, log.progress, ranks=(5,), name="other")
    assert len(log.warnings) == 1
    assert snapshot(started) == before


def test_analysis_removed_by_another_process_is_remade(
    started, files, analysis, afresh, log, monkeypatch
):
    def removed_meanwhile(*rest):
        if analysis.exists():
            analysis.rename(analysis.with_name("elsewhere"))
            monkeypatch.undo()
        return solve_with_rank_search(*rest)

    monkeypatch.setattr(
        "hyper_merge.operations.merge.solving.solve_with_rank_search", removed_meanwhile
    )
    made = merge(files, started, log.progress, ranks=(5,), name="other")
    same(loras_of(made), afresh)
    assert log.warnings == []


def test_one_damaged_file_of_each_kind_stays(tmp_path, log):
    kept = DamagedFiles(log.warnings.append)
    names = [
        f"{stem}-512.{kind}"
        for stem in "abc"
        for kind in ("analysis.safetensors", "solutions.json")
    ]
    for name in names:
        (tmp_path / name).write_bytes(bytes(100))
        kept.take(tmp_path / name, "of a kind")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"c-512.analysis.safetensors.damaged", "c-512.solutions.json.damaged"}
    assert cache_bytes(tmp_path) == 200
    new = tmp_path / "d-512.analysis.safetensors"
    new.write_bytes(bytes(100))
    os.utime(new, (1, 1))
    prune_analyses(tmp_path, 100)
    assert [path.name for path in tmp_path.iterdir()] == [new.name]
    kept.take(new, "of a kind")
    assert clear_analyses(tmp_path) == 100
    assert list(tmp_path.iterdir()) == []


def test_files_with_strange_names_are_passed_over(started, files, analysis):
    preflight = run_preflight(recipe(files, started))
    inputs, options = preflight.inputs, preflight.pass_options
    for name in ("x", "-1", "1e3", "٣"):
        stem = analysis.name.partition("-")[0]
        (analysis.parent / f"{stem}-{name}.analysis.safetensors").write_bytes(b"?")
    assert find_analysis(analysis.parent, inputs, options, (4, 2)) == analysis
    with open_analysis(analysis, inputs) as opened:
        assert opened.grams.isfinite().all()
