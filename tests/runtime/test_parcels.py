"""Values that go to other processes: tensors arrive bit by bit as they lay, and files end with them."""

import gc
from functools import partial
from pathlib import Path

import pytest
import torch

from hyper_merge.errors import InterruptedRun
from hyper_merge.runtime.aligned_bytes import ALIGNMENT, read_at
from hyper_merge.runtime.parcels import (
    MappedFiles,
    OnDemand,
    Packer,
    Place,
    SentOnce,
    TensorFile,
    Unpacker,
    checked_by,
    read_place,
)
from hyper_merge.runtime.progress import Progress
from hyper_merge.runtime.scratch import InMemory, Scratch


def tensors():
    """Returns tensors of all kinds that the solver has."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 40, 50, generator=generator)
    return [
        wide,
        wide.mT,
        wide[1:, :, 3:20],
        wide[1],
        wide[0, 0].expand(7, 50),
        torch.randn(30, 17, generator=generator).half(),
        torch.randn(9, generator=generator).double()[1:],
        torch.zeros(5, 0),
        torch.empty(0, 4, dtype=torch.float8_e4m3fn),
        torch.tensor(2.5, dtype=torch.float64),
        torch.arange(6).bool(),
    ]


def packer(path, least=2**40, place_of=lambda _tensor: None, name_of=str):
    return Packer(TensorFile(path), least, place_of, name_of)


def part_of(content, place, nbytes):
    return content[place.start : place.start + nbytes]


def require_alike(sent, arrived):
    assert (arrived.dtype, arrived.shape) == (sent.dtype, sent.shape)
    assert torch.equal(arrived.float(), sent.float())
    if sent.numel():
        assert arrived.stride() == sent.stride()
        assert (arrived.data_ptr() - sent.data_ptr()) % ALIGNMENT == 0


@pytest.mark.parametrize("least", [1, 10**9])
def test_tensors_arrive_as_they_lay(tmp_path, least):
    path = tmp_path / "tensors"
    packing = packer(path, least)
    packed = [packing.pack((tensor, {"again": tensor})) for tensor in tensors()]
    packing._file.close()
    assert path.exists() == (least == 1)
    unpacker = Unpacker(read_place, str)
    for sent, content in zip(tensors(), packed, strict=True):
        arrived, more = unpacker.unpack(content)
        require_alike(sent, arrived)
        require_alike(sent, more["again"])
    assert (len(packed[0]) > 4 * 3 * 40 * 50) == (least > 1)


def test_mapped_tensors_travel_as_places_and_their_file_ends_with_the_last(tmp_path):
    path = tmp_path / "tensors"
    packing = packer(path, 1)
    packed = packing.pack(tensors())
    packing._file.close()
    files = MappedFiles(Path.unlink)
    arrived = Unpacker(partial(part_of, files.open(path, packing._file.size)), str).unpack(packed)
    view = arrived[0][1:, :, :30]  # of what came
    again = packer(tmp_path / "other", 1, files.place_of)
    sent = again.pack([view, arrived[3]])
    assert again._file.size == 0
    assert len(sent) < 500
    for before, after in zip(
        [view, arrived[3]], Unpacker(read_place, str).unpack(sent), strict=True
    ):
        require_alike(before, after)
    del arrived, before, after
    gc.collect()
    assert path.exists()
    del view
    gc.collect()
    assert not path.exists()


def test_where_many_files_are_mapped_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("hyper_merge.runtime.parcels._MOST_MAPPED", 1)
    files, contents = MappedFiles(Path.unlink), []
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 100)
        contents.append(files.open(tmp_path / name, 100))
    assert [bytes(content.numpy()) for content in contents] == [b"a" * 100, b"b" * 100]
    assert files.place_of(contents[1][70:]) == Place(str(tmp_path / "b"), 70)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(bytes(100))
    with pytest.raises(OSError, match="cut off"):
        MappedFiles(Path.unlink).open(path, 101)
    with pytest.raises(OSError, match="cut off"):
        read_place(Place(str(path), 90), 11)


def test_reading_is_the_same_without_reads_at_a_place(tmp_path, monkeypatch):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(200)))
    for _ in range(2):
        with path.open("rb") as stream:
            read = read_at(stream, 70, 100)
        assert bytes(read.numpy()) == bytes(range(70, 170))
        assert read.data_ptr() % ALIGNMENT == 70 % ALIGNMENT
        monkeypatch.delattr("os.preadv", raising=False)


class Shared(SentOnce):
    """A value that is sent once."""


def test_what_is_sent_once_travels_by_its_name(tmp_path):
    value = Shared()
    packing = packer(tmp_path / "none", name_of=lambda sent: {id(value): "name"}[id(sent)])
    content = packing.pack(partial(max, [value, (value,)]))
    arrived = Unpacker(read_place, {"name": 7}.__getitem__).unpack(content)
    assert arrived.args == ([7, (7,)],)
    value.number = 5
    assert Shared.received(value.sent()).number == 5


def test_items_on_demand_are_unpacked_one_by_one(tmp_path):
    content = packer(tmp_path / "none").pack(OnDemand([torch.ones(3), torch.zeros(2)]))
    arrived = Unpacker(read_place, str).unpack(content)
    assert len(arrived) == 2
    assert torch.equal(arrived[1], torch.zeros(2))
    assert [len(item) for item in arrived] == [3, 2]


def test_progress_that_arrives_stops_by_the_check_of_its_task(tmp_path):
    def stop():
        raise InterruptedRun("enough")

    progress = Progress(should_stop=lambda: True)
    content = packer(tmp_path / "none").pack(progress.check)
    check = Unpacker(read_place, str).unpack(content)
    check()
    with checked_by(stop), pytest.raises(InterruptedRun, match="enough"):
        check()
    check()


def test_a_scratch_that_arrives_keeps_as_the_one_that_was_sent(tmp_path):
    content = packer(tmp_path / "none").pack(Scratch(tmp_path).keep)
    keep = Unpacker(read_place, str).unpack(content)
    assert isinstance(keep.__self__, InMemory)
    put_aside = Scratch(tmp_path, 0)
    for few in (tensors()[:4], tensors()[3:4], [torch.ones(3, 4, 2**12)[:, 1:2]]):
        for here, there in zip(put_aside.keep(few), keep(few), strict=True):
            require_alike(here, there)
    put_aside.close()
