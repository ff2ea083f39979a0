"""Processes that share a models folder, its runs and its cache: neither ends or spoils the other's work.

HYPER_MERGE_ROUNDS=50 makes each of the races many times over.
"""

import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from lora_files import QUERY, write_lora
from other_processes import Other
from tiny_family import few_of, merge, recipe, temporaries, write

from hyper_merge.analysis.cache import analysis_path, clear_analyses, prune_analyses
from hyper_merge.analysis.store import open_analysis, solutions_path
from hyper_merge.analysis.turns import analysis_turn
from hyper_merge.analysis.use_markers import in_use, mark_used, unused
from hyper_merge.errors import CacheError, InterruptedRun, NameTakenError
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.lora_runs import load_lora_run
from hyper_merge.runs.name_locks import Hold, held
from hyper_merge.runs.run import list_runs, load_run
from hyper_merge.runtime.checked_json import read_sealed
from hyper_merge.runtime.damaged_files import DamagedFiles
from hyper_merge.runtime.file_lock import FileLock, LockState, alone
from hyper_merge.runtime.progress import Progress

ROUNDS = int(os.environ.get("HYPER_MERGE_ROUNDS", "1"))
KINDS = [
    "locks",
    "no locks",
    pytest.param(
        "windows",
        marks=pytest.mark.skipif(
            not sys.platform.startswith("linux") or sys.version_info < (3, 11),
            reason="what is open elsewhere is found in /proc",
        ),
    ),
]


@pytest.fixture(scope="module")
def processes():
    """Two processes; each takes seconds to start."""
    with Other(dict(os.environ)) as one, Other(dict(os.environ)) as two:
        one.work_beside([two])
        two.work_beside([one])
        yield one, two


@pytest.fixture(params=KINDS)
def others(request, processes):
    """Two processes on a file system of one kind, and that kind."""
    for process in processes:
        process.become(request.param)
    return *processes, request.param


@pytest.fixture(params=range(ROUNDS))
def root(request, tmp_path):
    """A models folder for each round."""
    return tmp_path / "models"


def merging(files, root, name="mix", ranks="4,2", iterations=3):
    """Returns the command of a merge."""
    words = ["merge", "--name", name, "--models", *files, "--output", root, "--create"]
    return [*words, "--ranks", ranks, "--iterations", str(iterations), "--device", "cpu"]


def planning(files, root):
    return ["plan", *merging(files, root)[1:]]


def require_whole(root, *names):
    """Requires every run with all its files, and nothing temporary."""
    runs, problems = list_runs(Folders.under(root))
    assert problems == []
    assert sorted(run.name for run in runs) == sorted(names)
    assert [run.missing for run in runs] == [()] * len(runs)
    assert temporaries(root) == []
    assert [*root.rglob("*.lock"), *root.rglob("*.making")] == []


def until_it_ends(working, meanwhile):
    """Repeats something until the command of a process ends, with pauses that leave it the processor."""
    outcome = []
    waiting = threading.Thread(target=lambda: outcome.append(working.end()))
    waiting.start()
    while waiting.is_alive():
        meanwhile()
        time.sleep(0.02)
    return outcome[0]


@pytest.fixture(scope="module")
def remembered(few_layers, tmp_path_factory):
    """The cache of a merge of these files."""
    return merge(few_layers, tmp_path_factory.mktemp("earlier")).place.folder.parent / "cache"


def test_plans_leave_a_merge_of_the_same_files_running(others, few_layers, root, remembered):
    one, two, _ = others
    shutil.copytree(remembered, root / "hyper-merge/cache")
    one.begin(*merging(few_layers, root, iterations=5))
    plans = []
    ended = until_it_ends(one, lambda: plans.append(two.run(*planning(few_layers, root))))
    assert ended == (0, "")
    assert set(plans) == {(0, "")}
    require_whole(root, "mix")


def test_runs_of_the_same_loras_do_not_spoil_one_another(others, tmp_path, root):
    one, two, kind = others
    paths = [write_lora(tmp_path / f"{seed}.safetensors", seed, modules=[QUERY]) for seed in (1, 2)]
    new = write_lora(tmp_path / "new.safetensors", 3, modules=[QUERY])

    def sharing(name, ranks="2,1"):
        words = ["--ranks", ranks, "--iterations", "2", "--output", root, "--create"]
        return ["loras", *paths, "--name", name, *words]

    one.begin(*sharing("one"))
    two.begin(*sharing("two"))
    assert [one.end(), two.end()] == [(0, ""), (0, "")]
    fitting = ["fit", "one", new, "--output", root]
    one.begin(*sharing("one", "3"), "--overwrite")
    two.begin(*fitting)
    ended = one.end(), two.end()
    assert {code for code, _ in ended} <= {0, 2}
    assert (0, "") in ended
    folders = Folders.under(root)
    for name in ("one", "two"):
        run = load_lora_run(folders, name)
        assert run.missing == ()
        fits, problems = load_fits(run)
        # Without locks it may have been made just before the run was replaced, in the same second too:
        # then it is left out.
        left_out = ("was replaced since", "another number of multipliers")
        assert not problems or kind == "no locks", problems
        assert all(any(reason in problem for reason in left_out) for problem in problems), problems
        assert all(len(record.row.multipliers) == len(run.report.loras) for record in fits)
    assert two.run(*fitting, "--overwrite") == (0, "")
    assert temporaries(root) == []


def test_two_first_merges_of_the_same_files_succeed(others, few_layers, root):
    one, two, _ = others
    one.begin(*merging(few_layers, root, "one"))
    two.begin(*merging(few_layers, root, "two", "3,2"))
    assert [one.end(), two.end()] == [(0, ""), (0, "")]
    require_whole(root, "one", "two")
    (analysis,) = (root / "hyper-merge/cache").glob("*.analysis.safetensors")
    solutions = read_sealed(solutions_path(analysis))
    assert {name.partition(";")[0] for name in solutions} <= {"4, 2", "3, 2"}


def test_two_merges_of_one_name_are_never_mixed(others, few_layers, root):
    one, two, kind = others
    one.begin(*merging(few_layers, root))
    two.begin(*merging(few_layers, root, ranks="3,2"))
    ended = sorted([one.end(), two.end()])
    assert ended[0] == (0, "")
    if ended[1][0] == 0:  # it began when the other had ended
        require_whole(root, "mix", "mix-2")
        return
    assert ended[1][0] == 2
    words = "exists" if kind == "no locks" else "the name mix is in use by another Hyper-Merge"
    assert words in ended[1][1]
    require_whole(root, "mix")


def test_a_merge_outlives_clearing_and_its_analysis_stays(others, few_layers, root):
    one, two, _ = others
    one.begin(*merging(few_layers, root, iterations=5))
    cleared = []
    assert until_it_ends(one, lambda: cleared.append(two.run("clear", root))) == (0, "")
    assert all(code == 0 or "in use" in message for code, message in cleared)
    require_whole(root, "mix")


def test_no_hash_and_no_solution_is_lost(others, few_layers, root, state_of, tmp_path):
    one, two, kind = others
    if kind == "no locks":
        pytest.skip("one of them may be lost, and is found again")
    more = [
        write(tmp_path / f"{name}.safetensors", few_of(state_of(c))) for c, name in enumerate("de")
    ]
    one.begin(*merging(few_layers, root, "one"))
    two.begin(*merging(more, root, "two"))
    assert [one.end(), two.end()] == [(0, ""), (0, "")]
    one.begin(*merging(few_layers, root, "three", "3,2"))
    two.begin(*merging(few_layers, root, "four", "5,2"))
    assert [one.end(), two.end()] == [(0, ""), (0, "")]
    known = read_sealed(root / "hyper-merge/cache/hashes.json")
    assert len(known) == 5
    solutions = [read_sealed(path) for path in root.rglob("*.solutions.json")]
    assert sorted(len(solution) for solution in solutions) == [1, 3]


def test_a_killed_merge_locks_out_nobody(few_layers, processes, tmp_path):
    root, two = tmp_path / "models", processes[1]
    two.become("locks")
    with Other(dict(os.environ)) as one:
        one.begin(*merging(few_layers, root, iterations=10_000))
        end = time.monotonic() + 120
        while not (begun := list(root.rglob("*.lock"))) and time.monotonic() < end:
            time.sleep(0.01)
        assert begun
        one.kill()
        assert two.run(*merging(few_layers, root)) == (0, "")
    runs, _ = list_runs(Folders.under(root))
    assert [run.name for run in runs] == ["mix"]
    assert [*root.rglob("*.lock"), *root.rglob("*.making")] == []


@pytest.fixture
def planned(files, tmp_path):
    """A requested merge, and the analysis that it needs."""
    preflight = run_preflight(recipe(files, tmp_path / "models"))
    folder = preflight.folders.cache
    return preflight, analysis_path(folder, preflight.inputs, preflight.pass_options)


def turn_of(preflight, progress):
    folder, ranks = preflight.folders.cache, preflight.recipe.ranks
    damaged = DamagedFiles(progress.warn)
    return analysis_turn(folder, preflight.inputs, preflight.pass_options, ranks, damaged, progress)


def test_waiting_for_an_analysis_is_reported_and_can_stop(planned):
    preflight, path = planned
    phases = []

    def stop():
        return bool(phases)

    with turn_of(preflight, Progress()) as turn:
        assert (turn.path, turn.exists) == (path, False)
        waiting = Progress(lambda phase, _: phases.append(phase), stop)
        with pytest.raises(InterruptedRun), turn_of(preflight, waiting):
            pass
        assert phases == ["waiting for another merge of these files"]
        turn.end_making()
        with turn_of(preflight, Progress()) as next_turn:
            assert not next_turn.exists  # nothing came of the first
    assert not preflight.folders.runs.exists()


def test_the_mark_of_a_use_leaves_the_analysis_untouched(merged, started):
    (path,) = started.rglob("*.analysis.safetensors")
    before = path.stat()
    with in_use(path):
        mark_used(path)
    after = path.stat()
    assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)


def test_an_analysis_in_use_is_neither_cleared_nor_pruned(started):
    (path,) = started.rglob("*.analysis.safetensors")
    with in_use(path), in_use(path):
        with pytest.raises(CacheError, match=r"analysis\.safetensors: in use\); try again when"):
            clear_analyses(path.parent)
        prune_analyses(path.parent, 0)
        assert path.exists()
        assert solutions_path(path).exists()
    prune_analyses(path.parent, 0)
    assert [file.name for file in path.parent.iterdir()] == ["hashes.json"]


def test_without_locks_a_young_mark_says_in_use(started, monkeypatch):
    (path,) = started.rglob("*.analysis.safetensors")
    monkeypatch.setattr(
        "hyper_merge.runtime.file_lock._lock", lambda file, *, shared: LockState.IMPOSSIBLE
    )
    with in_use(path), unused(path) as free:
        assert not free
    marker = path.with_name(path.name.partition(".")[0] + ".used")
    os.utime(marker, (1, 1))
    with unused(path) as free:
        assert free
    marker.unlink()
    with unused(path) as free:
        assert free
    assert not marker.exists()


def test_an_open_analysis_outlasts_its_file(started, files):
    (path,) = started.rglob("*.analysis.safetensors")
    inputs = run_preflight(recipe(files, started)).inputs
    with open_analysis(path, inputs) as analysis:
        core = analysis.core(0).clone()
        path.unlink()
        assert bool((analysis.core(0) == core).all())


def test_a_cache_that_cannot_be_written_ends_no_merge(files, tmp_path, monkeypatch):
    replace, refused = Path.replace, []

    def refuse(self, target):
        if Path(target).suffix == ".json" and "cache" in Path(target).parts:
            refused.append(Path(target).name)
            raise PermissionError(13, "in use")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr("hyper_merge.runtime.file_lock._MOMENT", 0.1)
    merge(files, tmp_path / "models")
    assert refused.count("hashes.json") > 1  # it may be for a moment
    assert len({*refused}) == 2
    require_whole(tmp_path / "models", "mix")


def test_a_lock_of_several_kinds(tmp_path):
    one, two, three = (FileLock(tmp_path / "folder/x.lock") for _ in range(3))
    assert one.acquire(shared=True) is LockState.HELD
    assert two.acquire(shared=True) is LockState.HELD
    assert three.acquire() is LockState.TAKEN
    one.release()
    two.release()
    assert three.acquire() is LockState.HELD
    assert one.acquire(shared=True) is LockState.TAKEN
    three.release(remove=True)
    assert one.acquire() is LockState.HELD
    one.release(remove=True)
    assert list(tmp_path.iterdir()) == []  # the folder was made for it


def test_all_threads_changes_to_one_text_are_kept(tmp_path):
    path = tmp_path / "numbers"
    path.write_text("0")

    def count():
        for _ in range(20):
            with alone(path):
                path.write_text(str(int(path.read_text()) + 1))

    threads = [threading.Thread(target=count) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() == "100"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_in_use_is_not_deleted(started):
    folders = Folders.under(started)
    run = load_run(folders, "mix")
    with (
        held(folders.runs, Hold("model", run.hyper_model.name, shared=True)),
        pytest.raises(NameTakenError, match=r"^the hyper-model mix\.safetensors is in use by"),
    ):
        delete_run(run, folders)
    with (
        held(folders.runs, Hold("run", "MIX", shared=True)),
        pytest.raises(NameTakenError, match=r"^the run mix is in use by .*; try again when"),
    ):
        delete_run(run, folders)
    assert load_run(folders, "mix").missing == ()
    delete_run(run, folders)
    assert list(folders.runs.iterdir()) == [folders.cache]


def test_a_merge_of_a_locked_name_ends_before_working(files, tmp_path):
    folders = Folders.under(tmp_path / "models")
    with (
        held(folders.runs, Hold("merge", "mix")),
        pytest.raises(NameTakenError, match=r"^the name mix is in use .*choose another name$"),
    ):
        merge(files, tmp_path / "models")
    assert list(tmp_path.iterdir()) == []
