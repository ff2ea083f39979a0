"""Merges and what follows them on files as Windows has them: nothing is lost, and words say why."""

import mmap
import sys
from contextlib import contextmanager

import pytest
import torch
from fault_scenarios import SCENARIOS, lora_paths, write_loras, write_sources
from fault_trials import left_over, settle, state_of
from lora_files import share
from tiny_family import merge
from windows_files import ignore_case, keep_open_files

from hyper_merge.errors import NameTakenError, OutputError
from hyper_merge.runtime import file_lock

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info < (3, 11),
    reason="open files are found in /proc, and pathlib looks functions of os up when it is used",
)

IN_USE = r"another program uses the file|close the programs that use it"
MODEL = "Stable-diffusion/mix.safetensors"
LORA = "Lora/mix_0-2.safetensors"
WORK = {scenario.name: scenario.work for scenario in SCENARIOS}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A models folder with checkpoints, on such a file system."""
    write_sources(tmp_path / "models")
    monkeypatch.setattr(file_lock, "_MOMENT", 0.1)
    monkeypatch.setattr(file_lock, "_REMOVED_WHILE_OPEN", False)
    keep_open_files(monkeypatch.setattr)
    ignore_case(monkeypatch.setattr)
    return tmp_path / "models"


@contextmanager
def opened(path):
    """Has a file open, as a virus scanner does."""
    with path.open("rb"):
        yield


@contextmanager
def mapped(path):
    """Has a file mapped and no longer open, as the library for .safetensors files does."""
    tensor = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    yield
    del tensor


@contextmanager
def read_only(path):
    """Has a file mapped as we do."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ):
        yield


def test_all_work_is_done_and_leaves_nothing_over(root):
    for name in ("merge", "fit", "restore", "overwrite", "deletion"):
        WORK[name](root)
        assert [path for path in left_over(root) if path.stat().st_size] == [], name
    settle(root)
    assert left_over(root) == []
    assert not (root / "hyper-merge/mix").exists()


def test_work_on_loras_is_done_or_refused_and_leaves_nothing_over(root):
    write_loras(root)
    for name in ("sharing", "fit of a LoRA", "combination"):
        WORK[name](root)
        assert [path for path in left_over(root) if path.stat().st_size] == [], name
    before = state_of(root)
    for use in (opened, read_only):
        with use(root / "Lora/few_0-2.safetensors"), pytest.raises(OutputError, match=IN_USE):
            WORK["sharing again"](root)
        assert state_of(root) == before
    for run in ("FEW", "few"):
        with pytest.raises(NameTakenError, match=run):
            share(lora_paths(root)[:2], root, name=run, ranks=(2, 1), iterations=1)
    WORK["sharing again"](root)
    settle(root)
    assert left_over(root) == []
    assert not (root / "Lora/few_0-2.safetensors").exists()


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (opened, MODEL),
        (mapped, MODEL),
        (read_only, MODEL),
        (opened, LORA),  # which goes: a file that is mapped alone can be renamed for that
        (read_only, LORA),
    ],
)
def test_an_overwrite_of_a_file_in_use_is_refused_and_loses_nothing(root, use, name):
    WORK["merge"](root)
    WORK["fit"](root)
    before = state_of(root)
    with use(root / name), pytest.raises(OutputError, match=IN_USE):
        WORK["overwrite"](root)
    assert state_of(root) == before
    WORK["overwrite"](root)
    assert state_of(root) != before
    settle(root)
    assert left_over(root) == []


@pytest.mark.parametrize(
    ("use", "name"), [(opened, MODEL), (mapped, MODEL), (read_only, LORA), (mapped, LORA)]
)
def test_a_deletion_of_a_file_in_use_is_whole_or_refused(root, use, name):
    WORK["merge"](root)
    before = state_of(root)
    with use(root / name):
        if use is mapped:  # it can be renamed; its bytes go with the next work there
            WORK["deletion"](root)
            assert [path.suffix for path in left_over(root) if path.suffix == ".old"] == [".old"]
        else:
            with pytest.raises(OutputError, match=IN_USE):
                WORK["deletion"](root)
            assert state_of(root) == before
    settle(root)
    assert left_over(root) == []
    if use is not mapped:
        WORK["deletion"](root)
    assert not (root / name).exists()
    assert {k: v for k, v in state_of(root).items() if k in before}.items() <= before.items()


def test_a_name_that_differs_by_case_alone_is_taken(root):
    WORK["merge"](root)
    before = state_of(root)
    models = [root / "Stable-diffusion" / f"{name}.safetensors" for name in "BCD"]
    with pytest.raises(NameTakenError, match="MIX"):
        merge(models, root, name="MIX", ranks=(2, 1), iterations=1, method="greedy")
    assert state_of(root) == before
