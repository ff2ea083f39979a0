"""Runs work with a fault at its n-th use of the file system, for every n, each in a process of its own.

    python tests/fault_injection.py            # all, a quarter of an hour
    python tests/fault_injection.py --sample 40

A fault is an error (no space, I/O error, refused, in use as Windows has it) or the sudden end of the
process. After it every earlier file is as it was, or the whole new set is there; the next run succeeds
and leaves nothing over. The exit code is 1 where one of that fails.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from tiny_family import TINY, merge, write  # noqa: E402

from hyper_merge.checkpoints.io.leftovers import remove_leftovers  # noqa: E402
from hyper_merge.checkpoints.io.temporary_names import owner_of  # noqa: E402
from hyper_merge.errors import HyperMergeError  # noqa: E402
from hyper_merge.operations.fit.fit import run_fit  # noqa: E402
from hyper_merge.operations.fit.request import FitRequest  # noqa: E402
from hyper_merge.operations.restore.request import RestoreRequest  # noqa: E402
from hyper_merge.operations.restore.restore import run_restore  # noqa: E402
from hyper_merge.recipe.request import key_place  # noqa: E402
from hyper_merge.runs.deletion import delete_run  # noqa: E402
from hyper_merge.runs.folders import Folders  # noqa: E402
from hyper_merge.runs.run import list_runs, load_run  # noqa: E402
from hyper_merge.runtime import file_lock  # noqa: E402
from hyper_merge.runtime.progress import Progress  # noqa: E402
from hyper_merge.synthetic.writer import tensors  # noqa: E402

Kind = str  # of a fault: one of KINDS, or END
State = Mapping[str, bytes]  # content by path relative to the models folder

END: Final = "end of the process"
FULL: Final = "no space"  # also for all later writes
BROKEN: Final = "I/O error"
REFUSED: Final = "refused once"
IN_USE: Final = "in use"  # the same file also later
KINDS: Final = (FULL, BROKEN, REFUSED, IN_USE)

_ERRORS: Final = {
    FULL: errno.ENOSPC,
    BROKEN: errno.EIO,
    REFUSED: errno.EACCES,
    IN_USE: errno.EACCES,
}
_WRITES: Final = ("write", "pwrite", "fsync", "posix_fallocate")
_EVENTS: Final = {
    "open": "open",
    "os.rename": "rename",
    "os.link": "link",
    "os.remove": "unlink",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
    "os.utime": "utime",
}
_MAPPED: Final = "mmap read"
# What marks a file as SD 1.x, with a few layers: each tensor is read several times.
_KEPT: Final = re.compile(
    r"model\.diffusion_model\.(input_blocks\.(0\.0\.weight|[369]\.0\.op\.bias"
    r"|[147]\.1\.transformer_blocks\.0\.norm1\.bias"
    r"|1\.1\.transformer_blocks\.0\.attn2\.to_[kq]\.weight)"
    r"|middle_block\.1\.transformer_blocks\.0\.attn2\.to_k\.weight|out\.2\.weight)"
    r"|.*text_model\.encoder\.layers\.0\.mlp\.fc1\.weight|first_stage_model\.quant_conv\.weight"
)
_ENDED: Final = 9  # exit code of a process that a fault has ended


@dataclass(frozen=True)
class Fault:
    """A fault at the n-th use of the file system; n = 0 for none."""

    n: int = 0
    kind: Kind = END


@dataclass(frozen=True)
class Outcome:
    """What came of the work: "done", "ended", "refused" in our words, or "failed" in others."""

    how: str
    words: str
    uses: int  # of the file system, up to the end
    use: str  # that the fault was injected in; empty where it was not reached


class Injector:
    """Counts the uses of the file system below a folder, and injects a fault into one of them.

    It stays for the rest of the process. Files are watched where Python itself reports them (audit
    events), so that no way around it exists; reads of mapped files by their call.
    """

    def __init__(self, folder: Path, fault: Fault) -> None:
        """Watches a folder from now on."""
        self.uses: Counter[str] = Counter()
        self.use = ""
        self._folder = os.path.realpath(folder)
        self._fault = fault
        self._refused: set[str] = set()
        sys.addaudithook(self._audit)
        for name in _WRITES:
            self._watch_writes(name)
        self._watch_mapped()

    @property
    def total(self) -> int:
        """The number of uses so far."""
        return sum(self.uses.values())

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            paths = [os.path.abspath(os.fsdecode(a)) for a in arguments[:2] if _is_path(a)]
            if any(path.startswith(self._folder) for path in paths):
                self._count(_EVENTS[event], paths)

    def _watch_writes(self, name: str) -> None:
        act = getattr(os, name)

        def watched(file: int, *arguments: Any) -> Any:
            path = os.path.realpath(f"/proc/self/fd/{file}")
            if path.startswith(self._folder):

                def write_half() -> None:
                    if name == "pwrite":
                        act(file, bytes(arguments[0])[: len(arguments[0]) // 2], arguments[1])

                self._count(name, [path], write_half)
            return act(file, *arguments)

        setattr(os, name, watched)

    def _watch_mapped(self) -> None:
        for module in list(sys.modules.values()):
            if module.__name__.startswith("hyper_merge.") and hasattr(module, "safe_open"):
                module.safe_open = self._open_watched  # type: ignore[attr-defined]

    def _open_watched(self, path: str, **options: Any) -> Any:
        from safetensors import safe_open

        self._count(_MAPPED, [path])
        return _Mapped(safe_open(path, **options), lambda: self._count(_MAPPED, [path]))

    def _count(self, use: str, paths: list[str], half: Callable[[], None] = lambda: None) -> None:
        self.uses[use] += 1
        changes = use not in (_MAPPED, "open")
        if self.total == self._fault.n:
            self.use = use
            if self._fault.kind == END:
                half()
                os._exit(_ENDED)
            self._refused.update(paths)
        elif not self.use:
            return
        elif self._fault.kind == FULL and use in _WRITES:
            pass
        elif self._fault.kind == IN_USE and changes and self._refused.intersection(paths):
            pass
        else:
            return
        number = errno.EIO if use == _MAPPED else _ERRORS[self._fault.kind]
        raise OSError(number, os.strerror(number), paths[0])


class _Mapped:
    """A mapped file whose reads are counted."""

    def __init__(self, file: Any, count: Callable[[], None]) -> None:
        self._file, self._count = file, count

    def get_tensor(self, key: str) -> torch.Tensor:
        self._count()
        return self._file.get_tensor(key)

    def __enter__(self) -> _Mapped:
        self._file.__enter__()
        return self

    def __exit__(self, *rest: object) -> None:
        self._file.__exit__(*rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _is_path(argument: object) -> bool:
    return isinstance(argument, str | bytes | os.PathLike)


def attempt(work: Callable[[], object], folder: Path, fault: Fault | None = None) -> Outcome:
    """Does work in a forked process, with a fault in a folder; returns what came of it."""
    receive, send = os.pipe()
    process = os.fork()
    if not process:
        os.close(receive)
        try:
            _report(send, *_work(work, folder, fault or Fault()))
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(process, 0)
    if os.waitstatus_to_exitcode(status) == _ENDED and fault:
        return Outcome("ended", "", fault.n, "?")
    return Outcome(*json.loads(data))


def _work(work: Callable[[], object], folder: Path, fault: Fault) -> tuple[str, str, int, str]:
    file_lock._MOMENT = 0.1  # type: ignore[misc]
    injector = Injector(folder, fault)
    how, words = "done", ""
    try:
        work()
        words = ", ".join(f"{number} {use}" for use, number in injector.uses.most_common())
    except HyperMergeError as error:
        how, words = "refused", str(error)
    except BaseException:
        how, words = "failed", traceback.format_exc()
    return how, words, injector.total, injector.use


def _report(send: int, *outcome: object) -> None:
    with os.fdopen(send, "wb") as stream:
        stream.write(json.dumps(outcome).encode())


@dataclass(frozen=True)
class Scenario:
    """Work on a models folder that is tried with faults.

    Attributes:
        name: Of the work.
        prepare: What was done before it.
        work: Itself, given the models folder.
    """

    name: str
    prepare: tuple[Callable[[Path], object], ...]
    work: Callable[[Path], object]


class Trial:
    """A scenario, tried with one fault after another."""

    def __init__(self, scenario: Scenario, sources: Path, place: Path) -> None:
        """Does the work once without a fault.

        Args:
            scenario: the work.
            sources: a models folder with the checkpoints and files of others.
            place: an empty folder for all of it.
        """
        self._scenario = scenario
        self._root = place / "models"
        self._start = place / "start"
        shutil.copytree(sources, self._root)
        for step in scenario.prepare:
            self._require(self._attempt(step))
        shutil.copytree(self._root, self._start)
        self._before = state_of(self._root)
        outcome = self._require(self._attempt(scenario.work))
        self._after = state_of(self._root)
        self.uses = outcome.uses
        self.uses_by_kind = outcome.words
        self.injected: Counter[str] = Counter()

    def try_fault(self, fault: Fault) -> bool:
        """Does the work with a fault; returns False where it ends before.

        Raises:
            AssertionError: something is lost, or the next run does not succeed.
        """
        shutil.rmtree(self._root)
        shutil.copytree(self._start, self._root)
        outcome = self._attempt(self._scenario.work, fault)
        if not outcome.use:
            return False
        self.injected[fault.kind] += 1
        words = f"{self._scenario.name}, {fault.kind} at {fault.n} ({outcome.use}): "
        try:
            self._check(fault, outcome)
        except AssertionError as error:
            raise AssertionError(f"{words}{error}\n{outcome.words}") from error
        return True

    def _check(self, fault: Fault, outcome: Outcome) -> None:
        assert outcome.how != "failed", "an unexpected error"
        state = state_of(self._root)
        self._require_whole_files(state)
        if fault.kind not in (END, IN_USE):
            self._require_all_or_none(state)
            assert outcome.how != "done" or state == self._after, "done, but it is not there"
        if fault.n % 2:  # else the next run comes at once
            settle(self._root)
            self._require_all_or_none(state_of(self._root))
        again = self._attempt(self._scenario.work)
        state = state_of(self._root)
        assert state == self._after, f"the next run gives {_changes(self._after, state)}: {again}"
        assert again.how != "failed", again.words
        files = [path for path in left_over(self._root) if path.stat().st_size]
        assert not files or again.how == "refused", (
            f"left over: {files}"
        )  # all is done already then
        settle(self._root)  # as by any further work in all folders: the locks' empty files go too
        assert not left_over(self._root), f"left over: {left_over(self._root)}"

    def _require_whole_files(self, state: State) -> None:
        for name in state:
            whole = state[name] in (self._before.get(name), self._after.get(name))
            assert whole, f"{name} is neither the old one nor the new one"

    def _require_all_or_none(self, state: State) -> None:
        assert state in (self._before, self._after), (
            f"neither all old ({_changes(self._before, state)}) nor all new"
            f" ({_changes(self._after, state)})"
        )

    def _attempt(self, work: Callable[[Path], object], fault: Fault | None = None) -> Outcome:
        return attempt(lambda: work(self._root), self._root, fault)

    def _require(self, outcome: Outcome) -> Outcome:
        if outcome.how != "done":
            raise RuntimeError(f"{self._scenario.name} without a fault: {outcome.words}")
        return outcome


def state_of(root: Path) -> State:
    """Returns all files of a models folder but the cache and what is there for a moment only."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "cache" not in path.parts and not _is_passing(path)
    }


def left_over(root: Path) -> list[Path]:
    """Returns the files that no work leaves."""
    return [path for path in root.rglob("*") if _is_passing(path)]


def settle(root: Path) -> None:
    """Does what the next start and the next transaction in each folder begin with."""
    folders = Folders.under(root)
    list_runs(folders)
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        remove_leftovers(folder)


def _is_passing(path: Path) -> bool:
    passing = (".lock", ".making", ".damaged")
    return owner_of(path.name) is not None or path.name.endswith(passing)


def _changes(one: State, other: State) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _sources(root: Path) -> list[Path]:
    return [root / "Stable-diffusion" / f"{name}.safetensors" for name in "abcd"]


def _merge(root: Path, *which: int, **settings: Any) -> None:
    files = _sources(root)
    settings = {"ranks": (2, 1), "iterations": 1, "method": "greedy", **settings}
    merge([files[i] for i in which or (0, 1, 2)], root, **settings)


def _rerun(root: Path) -> None:
    _merge(root, ranks=(1,))


def _overwrite(root: Path) -> None:
    _merge(root, 2, 1, ranks=(3,), overwrite=True)


def _fit(root: Path) -> None:
    values = {"run": "mix", "checkpoint": _sources(root)[3], "topup": "2"}
    run_fit(FitRequest.parse(values, key_place), Folders.under(root), Progress())


def _restore(root: Path) -> None:
    values = {"run": "mix", "shares": {"a": 1.0}}
    run_restore(RestoreRequest.parse(values, key_place), Folders.under(root), Progress())


def _delete(root: Path) -> None:
    folders = Folders.under(root)
    delete_run(load_run(folders, "mix"), folders)


SCENARIOS: Final = (
    Scenario("merge", (), _merge),
    Scenario("re-run", (_merge,), _rerun),
    Scenario("fit", (_merge,), _fit),
    Scenario("restore", (_merge,), _restore),
    Scenario("overwrite", (_merge, _fit), _overwrite),
    Scenario("deletion", (_merge, _fit), _delete),
)


def write_sources(root: Path) -> None:
    """Writes four tiny checkpoints, and files of others beside them."""
    (root / "Stable-diffusion").mkdir(parents=True)
    (root / "Lora").mkdir()
    exact = {key: stack for key, stack in tensors(replace(TINY, count=4)) if _KEPT.fullmatch(key)}
    for c, path in enumerate(_sources(root)):
        state = {
            key: stack[c].to(torch.float16 if stack.is_floating_point() else stack.dtype)
            for key, stack in exact.items()
        }
        write(path, {key: tensor.contiguous() for key, tensor in state.items()})
    (root / "Lora" / "mix_notes.txt").write_text("mine")
    (root / "Lora" / "mine.safetensors").write_bytes(b"mine")


def faults(uses: int, sample: int) -> Iterator[Fault]:
    """Yields the end and an error at every use, also beyond the last; or a few of these at regular distances."""
    if not sample:
        for n in range(1, 10 * uses):
            yield Fault(n, END)
            yield Fault(n, KINDS[n % len(KINDS)])
        return
    for place in range(sample):
        n = 1 + place * uses // sample
        yield Fault(n, KINDS[place // 2 % len(KINDS)] if place % 2 else END)


def _at_one_time() -> None:
    """Gives all files the same date, so that the same work writes the same bytes."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith("hyper_merge.") and hasattr(module, "current_time"):
            module.current_time = lambda: "2030-01-01T00:00:00+00:00"  # type: ignore[attr-defined]


def main() -> int:
    """Tries all scenarios, prints how many faults were injected and what was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=0, help="faults per scenario; 0 for all")
    parser.add_argument("--only", help="name of a scenario")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _at_one_time()
    injected: Counter[str] = Counter()
    lost: list[str] = []
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_sources(work / "sources")
        for scenario in SCENARIOS:
            if options.only not in (None, scenario.name):
                continue
            trial = Trial(scenario, work / "sources", work / scenario.name)
            for fault in faults(trial.uses, options.sample):
                try:
                    if not trial.try_fault(fault):
                        break
                except AssertionError as error:
                    lost.append(str(error))
                    print(f"LOST {error}", flush=True)
            injected += trial.injected
            kinds = ", ".join(f"{number} {kind}" for kind, number in trial.injected.items())
            print(
                f"{scenario.name}: {trial.uses} uses ({trial.uses_by_kind}); {trial.injected.total()} faults: {kinds}",
                flush=True,
            )
    print(f"{injected.total()} faults injected, {len(lost)} with something lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
