"""What was read of a file is used again as long as nothing can have changed in it, and no longer."""

import os
import time

import pytest
from tiny_family import write

from hyper_merge.checkpoints import reader
from hyper_merge.checkpoints.fingerprint import fingerprint
from hyper_merge.checkpoints.io.file_stamp import is_settled, stamp_of
from hyper_merge.checkpoints.reader import read_header


@pytest.mark.parametrize(("age", "settled"), [(0, False), (1.9, False), (2.1, True), (-60, False)])
def test_a_file_that_was_written_just_now_is_not_settled(age, settled):
    then, old = time.time_ns() - int(age * 1e9), 10**9
    assert is_settled((1, 2, then, old)) == is_settled((1, 2, old, then)) == settled


def test_a_settled_file_is_read_once_until_it_changes(tmp_path, state_of, monkeypatch):
    path = write(tmp_path / "a.safetensors", state_of(0))
    assert read_header(path) is not read_header(path), "it is too young"
    for module in ("reader", "fingerprint"):
        monkeypatch.setattr(f"hyper_merge.checkpoints.{module}.is_settled", lambda stamp: True)
    before, print_before = read_header(path), fingerprint(read_header(path))
    assert read_header(path) is before
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"first_stage_model", b"first_stage_modle"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert stamp_of(path.stat()) != stamp_of(status), "by the time of any change"
    assert read_header(path).tensors.keys() != before.tensors.keys()
    assert fingerprint(read_header(path)) != print_before


def test_files_of_the_same_tensors_share_their_table(tmp_path, state_of, monkeypatch):
    monkeypatch.setattr(reader, "is_settled", lambda stamp: True)
    state = state_of(0)
    first, second, other = (
        read_header(write(tmp_path / f"{name}.safetensors", kept))
        for name, kept in (("a", state), ("b", state), ("c", dict(list(state.items())[1:])))
    )
    assert first.tensors is second.tensors
    assert other.tensors != first.tensors
    assert (first.name, second.name) == ("a.safetensors", "b.safetensors")
