"""Tensors that are put aside: the same ones, in a bounded part of the memory."""

import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from hyper_merge.runtime import parallel, scratch
from hyper_merge.runtime.scratch import RESIDENT, Scratch

SIZE = 2**18  # entries of a tensor, 1 MiB


def anonymous():
    """Returns the bytes of memory of this process that are no mapping of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def numbered(count, size=SIZE):
    for number in range(count):
        yield torch.full((size,), float(number))


@pytest.mark.parametrize("resident", [RESIDENT, 0])
def test_kept_tensors_are_the_same_in_the_same_order_of_memory(tmp_path, resident):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(3, 50, 70, generator=generator),
        torch.randn(2, 90, 41, generator=generator).mT,
        torch.randn(333, 17, generator=generator).half(),
        torch.randn(100, 100, generator=generator)[:, :30],
        torch.zeros(5, 0),
        torch.tensor(2.5, dtype=torch.float64),
    ]
    with closing(Scratch(tmp_path, resident)) as put_aside:
        kept = put_aside.keep(tensors)
    for before, after in zip(tensors, kept, strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)
    places = [0, 1, 2]
    assert [kept[i].stride() for i in places] == [tensors[i].stride() for i in places]
    assert all(kept[i].data_ptr() != tensors[i].data_ptr() for i in places)


def test_a_closed_scratch_leaves_its_tensors_and_no_file(tmp_path):
    with_file = Scratch(tmp_path, 0)
    kept = [with_file.keep([tensor])[0] for tensor in numbered(3)]
    with_file.close()
    assert [float(tensor.mean()) for tensor in kept] == [0, 1, 2]
    (last,) = with_file.keep([torch.ones(SIZE)])
    assert float(last.mean()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_within_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "_GROWTH", 4 * SIZE)
    monkeypatch.setattr(parallel, "_LOOK_EVERY", 0.0)  # in which much more than that can be freed
    put_aside = Scratch(tmp_path, 8 * 4 * SIZE)
    before = anonymous()
    kept = [put_aside.keep([tensor])[0] for tensor in numbered(64)]
    assert anonymous() - before < 12 * 4 * SIZE
    assert [float(tensor.mean()) for tensor in kept] == list(range(64))
    put_aside.close()


def test_room_of_tensors_that_ended_is_used_again(tmp_path, monkeypatch):
    ends = []
    write = scratch._write_at

    def recorded(file, start, content):
        ends.append(start + len(content))
        write(file, start, content)

    monkeypatch.setattr(scratch, "_write_at", recorded)
    put_aside = Scratch(tmp_path, 0)
    for _ in range(4):  # as sweeps do: a new set while the old one is given away
        kept = [put_aside.keep([tensor])[0] for tensor in numbered(8)]
        newer = []
        while kept:
            newer += put_aside.keep([kept.pop(0)[: SIZE // 2], torch.ones(SIZE // 4)])
        assert [float(tensor.mean()) for tensor in newer[::2]] == list(range(8))
        del newer
    assert max(ends) <= 12 * 4 * SIZE
    put_aside.close()


@pytest.mark.parametrize("fails", ["opening", "writing"])
def test_where_the_disk_has_no_room_memory_takes_all(tmp_path, monkeypatch, fails):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    if fails == "opening":
        monkeypatch.setattr(scratch.tempfile, "TemporaryFile", full)
    else:
        monkeypatch.setattr(scratch, "_write_at", full)
    put_aside = Scratch(tmp_path, 0)
    tensors = list(numbered(3))
    kept = [put_aside.keep([tensor])[0] for tensor in tensors]
    assert all(a is b for a, b in zip(kept, tensors, strict=True))
    put_aside.close()


def test_small_tensors_stay_where_they_are(tmp_path):
    tensor = torch.ones(100)
    assert Scratch(tmp_path, 0).keep([tensor])[0] is tensor
