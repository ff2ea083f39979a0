"""Tiny checkpoints of the real structure, and merges of them in a fraction of a second."""

import gc
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from pinned_host import is_of_another_host
from tiny_family import KEPT, TINY, Exact, State, WarningLog, few_of, merge, write

from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.operations.merge.merge import MergeResult
from hyper_merge.solver import solve
from hyper_merge.synthetic.writer import tensors

# The gate draws the same examples every time; elsewhere each run looks for new ones. A busy machine
# is no failure.
settings.register_profile("gate", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("gate" if os.environ.get("CI") else "search")

# Several workers that each wait for threads of their own take half as long again.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for the processes that tests start
    torch.set_num_threads(1)

# Each process that a test starts would compile the package again, which takes longer than most tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

SCREENS = {"api", "cli", "hosts", "ui"}  # rooms of tests


def room_of(path: Path) -> str:
    """Returns the folder of tests that a file is in, or its name where it is in none."""
    return path.relative_to(Path(__file__).parent).parts[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what plays a WebUI of other pins than those at hand."""
    others = [item for item in items if is_of_another_host(item)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if not is_of_another_host(item)]


@pytest.fixture(autouse=True)
def _quick_search_of_screens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Shortens the search for a start where a screen begins a merge, and nowhere else.

    Screens have no setting for the effort. All other tests pass `SearchEffort.QUICK` as an argument,
    most of them through `tiny_family.merge`, or run the search that ships.
    """
    if room_of(request.path) in SCREENS:
        monkeypatch.setattr(solve, "DEFAULT_EFFORT", SearchEffort.QUICK)


@pytest.fixture(autouse=True, scope="module")
def _no_wait_for_disks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leaves it to the system when files come to be on the disk, but in the tests of files themselves.

    A merge waits forty times, a sixth of its time. What is lost where the machine itself ends is no
    matter of these tests; and processes that they start wait as ever.
    """
    with pytest.MonkeyPatch.context() as patch:
        if room_of(request.path) != "checkpoints":
            patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="session")
def exact() -> Exact:
    """The family's numbers before they are rounded to a file's type."""
    return {key: stack for key, stack in tensors(TINY) if KEPT.fullmatch(key)}


@pytest.fixture(scope="session")
def state_of(exact: Exact) -> Callable[..., State]:
    """The state dict of checkpoint c in a type."""

    def state(c: int, dtype: torch.dtype = torch.float16) -> State:
        return {
            key: stack[c].to(dtype if stack.is_floating_point() else stack.dtype).contiguous()
            for key, stack in exact.items()
        }

    return state


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, state_of) -> tuple[Path, ...]:
    """Three float16 checkpoints, a.safetensors and so on; not to be changed."""
    folder = tmp_path_factory.mktemp("files")
    return tuple(write(folder / f"{name}.safetensors", state_of(c)) for c, name in enumerate("abc"))


@pytest.fixture(scope="session")
def few_layers(tmp_path_factory: pytest.TempPathFactory, state_of) -> tuple[Path, ...]:
    """Three such files of a few layers, for what does not depend on their number; not to be changed."""
    folder = tmp_path_factory.mktemp("few_layers")
    return tuple(
        write(folder / f"{name}.safetensors", few_of(state_of(c))) for c, name in enumerate("abc")
    )


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory, files: tuple[Path, ...]) -> MergeResult:
    """The three files merged by the defaults of `recipe`; not to be changed."""
    return merge(files, tmp_path_factory.mktemp("merged"))


@pytest.fixture
def started(tmp_path: Path, merged: MergeResult) -> Path:
    """A copy of the models folder of this merge, its cache too."""
    root = merged.place.loras.parent
    return Path(shutil.copytree(root, tmp_path / "started"))


@pytest.fixture
def analysed(tmp_path: Path, merged: MergeResult) -> Path:
    """A models folder with the analysis of the three files alone: a merge of them takes half as long."""
    cache = "hyper-merge/cache"
    solutions = shutil.ignore_patterns("*.solutions.json")
    shutil.copytree(
        merged.place.loras.parent / cache, tmp_path / "analysed" / cache, ignore=solutions
    )
    return tmp_path / "analysed"


@pytest.fixture
def gradio_leaves_sockets() -> Iterator[None]:
    """Has the sockets that gradio's servers leave open collected before the next test, unheard.

    For every test that starts one: else the garbage collector finds them in any later test.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture
def log() -> WarningLog:
    """The warnings of the test's run."""
    return WarningLog()
