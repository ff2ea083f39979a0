import errno
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hyper_merge.checkpoints.io.atomic_file import StagedFile
from hyper_merge.checkpoints.io.hashes import file_sha256
from hyper_merge.checkpoints.io.journal import Step
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.checkpoints.reader import TensorInfo
from hyper_merge.errors import NameTakenError, OutputError

DECLARED = {"a": TensorInfo(torch.float32, (3,))}


def stage_all(outputs, folder):
    with outputs.safetensors(folder / "Lora" / "deep" / "x.safetensors", DECLARED, {}) as writer:
        writer.write("a", torch.ones(3))
    outputs.text(folder / "multipliers.txt", "é\n")
    outputs.bytes(folder / "raw", b"\0\1")
    return writer


def run(folder, then=lambda outputs: None, **options):
    """A transaction of the usual files with something happening before its end."""
    with FileTransaction(**options) as outputs:
        stage_all(outputs, folder)
        then(outputs)


def fail_with(error):
    def function(*args, **kwargs):
        raise error

    return function


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_staged_file_can_be_read(tmp_path):
    with FileTransaction() as outputs:
        stage_all(outputs, tmp_path)
        path = tmp_path / "Lora" / "deep" / "x.safetensors"
        with outputs.reading(path) as tensor:
            assert torch.equal(tensor("a"), torch.ones(3))
        assert not path.exists()
    assert torch.equal(load_file(path)["a"], torch.ones(3))


def test_nothing_appears_before_the_end_and_everything_after_it(tmp_path):
    with FileTransaction() as outputs:
        stage_all(outputs, tmp_path)
        assert not (tmp_path / "multipliers.txt").exists()
        assert not (tmp_path / "Lora/deep/x.safetensors").exists()
    assert everything(tmp_path) == [
        "Lora",
        "Lora/deep",
        "Lora/deep/x.safetensors",
        "multipliers.txt",
        "raw",
    ]
    assert (tmp_path / "multipliers.txt").read_bytes() == "é\n".encode()
    assert (tmp_path / "raw").read_bytes() == b"\0\1"
    assert load_file(tmp_path / "Lora/deep/x.safetensors")["a"].tolist() == [1, 1, 1]


def test_a_staged_file_can_be_hashed(tmp_path):
    with FileTransaction() as outputs:
        writer = stage_all(outputs, tmp_path)
        digest = file_sha256(writer.staged.temporary)
    assert digest == file_sha256(tmp_path / "Lora/deep/x.safetensors")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_removes_files_and_new_folders(tmp_path, error):
    (tmp_path / "multipliers.txt").write_text("old")
    with pytest.raises(error):
        run(tmp_path, then=fail_with(error()), overwrite=True)
    assert everything(tmp_path) == ["multipliers.txt"]
    assert (tmp_path / "multipliers.txt").read_text() == "old"


def test_a_folder_that_somebody_else_uses_by_now_stays(tmp_path):
    def put_something_there_and_fail(outputs):
        (tmp_path / "Lora" / "other").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run(tmp_path, then=put_something_there_and_fail)
    assert everything(tmp_path) == ["Lora", "Lora/other"]


def test_an_exception_in_a_writer_removes_all_files(tmp_path):
    def fail_while_writing(outputs):
        with outputs.safetensors(tmp_path / "y.safetensors", DECLARED, {}):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, then=fail_while_writing)
    assert everything(tmp_path) == []


@pytest.mark.parametrize("enter", [True, False])
def test_an_unfinished_writer_stops_all(tmp_path, enter):
    def forget_to_write(outputs):
        writer = outputs.safetensors(tmp_path / "y.safetensors", DECLARED, {})
        if enter:
            writer.__enter__()

    with pytest.raises(ValueError, match=r"y\.safetensors lacks 1 of 1"):
        run(tmp_path, then=forget_to_write)
    assert everything(tmp_path) == []


def test_existing_files_are_refused_when_staged(tmp_path):
    (tmp_path / "raw").write_text("old")
    reached = []
    with pytest.raises(OutputError, match="raw exists; choose another name, or --overwrite"):
        run(tmp_path, then=reached.append)
    assert not reached
    assert everything(tmp_path) == ["raw"]
    assert (tmp_path / "raw").read_text() == "old"


def test_an_existing_checkpoint_is_refused_before_writing(tmp_path):
    (tmp_path / "x.safetensors").touch()
    with FileTransaction() as outputs, pytest.raises(OutputError, match=r"x\.safetensors exists"):
        outputs.safetensors(tmp_path / "x.safetensors", DECLARED, {})


def test_a_file_that_appears_meanwhile_is_refused(tmp_path, monkeypatch):
    placed = []
    monkeypatch.setattr(Step, "apply", lambda self, **options: placed.append(self.path))
    with pytest.raises(OutputError, match="raw exists"):
        run(tmp_path, then=lambda outputs: (tmp_path / "raw").write_text("somebody else's"))
    assert not placed
    assert everything(tmp_path) == ["raw"]
    assert (tmp_path / "raw").read_text() == "somebody else's"


def test_with_overwrite_all_files_are_replaced(tmp_path):
    for name in ("raw", "multipliers.txt"):
        (tmp_path / name).write_text("old")
    with FileTransaction(overwrite=True) as outputs:
        stage_all(outputs, tmp_path)
    assert (tmp_path / "raw").read_bytes() == b"\0\1"
    assert (tmp_path / "multipliers.txt").read_text(encoding="utf-8") == "é\n"
    assert not [name for name in everything(tmp_path) if "hyper-merge" in name]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("error", [OutputError("the disk failed"), KeyboardInterrupt()])
def test_a_failure_while_placing_brings_replaced_files_back(tmp_path, monkeypatch, error, links):
    for name in ("multipliers.txt", "raw"):
        (tmp_path / name).write_text("old")
    apply = Step.apply

    def failing(self, *, overwrite):
        if self.path.name == "raw":
            raise error
        apply(self, overwrite=overwrite)

    monkeypatch.setattr(Step, "apply", failing)
    if not links:
        monkeypatch.setattr(os, "link", fail_with(OSError(errno.EPERM, "not permitted")))
    with pytest.raises(type(error)):
        run(tmp_path, overwrite=True)
    assert everything(tmp_path) == ["multipliers.txt", "raw"]
    assert (tmp_path / "raw").read_text() == "old"
    assert (tmp_path / "multipliers.txt").read_text(encoding="utf-8") == "old"


def stage_text(outputs, path):
    outputs.text(path, "a")


def stage_checkpoint(outputs, path):
    with outputs.safetensors(path, DECLARED, {}):
        pass


@pytest.mark.parametrize("stage", [stage_text, stage_checkpoint])
def test_an_interrupt_while_a_file_is_created_leaves_nothing(tmp_path, monkeypatch, stage):
    create = Path.open

    def interrupted(self, *rest, **options):
        create(self, *rest, **options).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), FileTransaction() as outputs:
        stage(outputs, tmp_path / "x.safetensors")
    assert everything(tmp_path) == []


@pytest.mark.parametrize("stage", [stage_text, stage_checkpoint])
def test_an_interrupt_after_creation_leaves_nothing(tmp_path, monkeypatch, stage):
    create = StagedFile.create

    def interrupted(self):
        create(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(StagedFile, "create", interrupted)
    with pytest.raises(KeyboardInterrupt), FileTransaction() as outputs:
        stage(outputs, tmp_path / "x.safetensors")
    assert everything(tmp_path) == []


def test_a_path_can_be_staged_only_once(tmp_path):
    with pytest.raises(ValueError, match="raw is staged twice"):
        run(tmp_path, then=lambda outputs: outputs.text(tmp_path / "raw", ""))


@pytest.mark.parametrize("place", ["file/a.txt", "file/deep/a.txt"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=rf"cannot write .*{place}"):
        run(tmp_path, then=lambda outputs: outputs.text(tmp_path / place, "a"))
    assert everything(tmp_path) == ["file"]


def test_an_empty_text_is_a_file_too(tmp_path):
    with FileTransaction() as outputs:
        outputs.text(tmp_path / "empty.txt", "")
    assert (tmp_path / "empty.txt").read_bytes() == b""


def test_the_file_has_the_rights_that_new_files_have(tmp_path):
    (tmp_path / "plain").touch()
    with FileTransaction() as outputs:
        outputs.text(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_removal_is_undone_with_the_new_files(tmp_path, monkeypatch):
    old, gone, new = (tmp_path / name for name in ("old", "gone", "new"))
    for path in (old, gone):
        path.write_text("old")

    def stage(outputs):
        outputs.text(new, "new")
        outputs.remove(old)
        outputs.remove(gone)

    with suppress(KeyError), FileTransaction() as outputs:
        stage(outputs)
        raise KeyError
    assert contents(tmp_path) == {"old": "old", "gone": "old"}
    replace = Path.replace

    def refuse(self, target):
        if self == gone:
            raise PermissionError(13, "in use")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    message = f"cannot remove {gone}: in use; close the programs that use it"
    with pytest.raises(OutputError, match=re.escape(message)), FileTransaction() as outputs:
        stage(outputs)
    assert contents(tmp_path) == {"old": "old", "gone": "old"}
    monkeypatch.undo()
    with FileTransaction() as outputs:
        stage(outputs)
        gone.unlink()  # by somebody else: not an error
        assert contents(tmp_path)["old"] == "old"
    assert contents(tmp_path) == {"new": "new"}
    with FileTransaction(overwrite=True) as outputs:
        outputs.remove(new)
        for again in (lambda: outputs.remove(new), lambda: outputs.text(new, "x")):
            with pytest.raises(ValueError, match="staged twice"):
                again()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("one", "other"), [("a.txt", "A.txt"), ("é", "e\u0301"), ("x/y.txt", "X/Y.txt"), ("n", "n. ")]
)
def test_two_names_of_one_file_are_refused(tmp_path, one, other, overwrite):
    def both():
        with FileTransaction(overwrite=overwrite) as outputs:
            outputs.text(tmp_path / one, "1")
            outputs.text(tmp_path / other, "2")

    with pytest.raises(NameTakenError, match="is the same file on Windows"):
        both()
    assert everything(tmp_path) == []


@pytest.mark.parametrize("removed_first", [False, True])
def test_a_written_file_is_not_removed_by_another_spelling(tmp_path, removed_first):
    old, new = tmp_path / "A.txt", tmp_path / "a.txt"
    old.write_text("old")
    steps = [lambda outputs: outputs.remove(old), lambda outputs: outputs.text(new, "new")]

    def both():
        with FileTransaction(overwrite=True) as outputs:
            for step in steps if removed_first else steps[::-1]:
                step(outputs)

    with pytest.raises(NameTakenError):
        both()
    assert contents(tmp_path) == {"A.txt": "old"}


def test_two_spellings_may_be_removed_together(tmp_path):
    for name in ("a", "A"):
        (tmp_path / name).write_text(name)
    with FileTransaction() as outputs:
        outputs.remove(tmp_path / "a")
        outputs.remove(tmp_path / "A")
    assert everything(tmp_path) == []
