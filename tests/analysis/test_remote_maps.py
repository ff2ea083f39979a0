"""Maps over layers whose items are worked on elsewhere: the same results, and files that go away."""

import os
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from remote_work import PretendedWorkers
from tiny_family import temporaries

from hyper_merge.analysis import remote_maps
from hyper_merge.analysis.remote_maps import open_maps
from hyper_merge.errors import ClusterError, InterruptedRun, OutputError
from hyper_merge.runtime.parcels import SentOnce
from hyper_merge.runtime.progress import Progress

go_on = Progress().check


class Scale(SentOnce):
    """A value that all items need."""

    reads: ClassVar[Counter] = Counter()

    def __init__(self, factor):
        self.factor = factor

    @classmethod
    def received(cls, attributes):
        cls.reads["received"] += 1
        return super().received(attributes)


def scaled(scale, tensor, number):
    """Returns something large, something small, and what came."""
    return tensor * scale.factor, number + 1, (scale, tensor)


def refuse(number):
    """Refuses the third item."""
    if number == 2:
        raise OutputError("no")
    return torch.full((1000,), float(number))


def check_first(check, number):
    """Returns a tensor if it may."""
    check()
    return torch.full((1000,), float(number))


@pytest.fixture
def numbers():
    """Tensors of which some are large enough for a file on the way there."""
    return [torch.full((size,), float(size)) for size in (10, 2**15, 300, 2**15 + 1, 7)]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_results_are_those_of_a_map_here_and_go_on_from_map_to_map(tmp_path, numbers, slots):
    workers, scale = PretendedWorkers(slots=slots), Scale(3.0)
    Scale.reads.clear()
    with open_maps(workers, tmp_path) as opened, opened.open(go_on, "scaling") as maps:
        values = numbers
        for _ in range(3):
            results = list(maps.layers(partial(scaled, scale), values, range(5)))
            assert [number for _, number, _ in results] == [1, 2, 3, 4, 5]
            assert all(same is scale for _, _, (same, _) in results)
            assert all(
                torch.equal(came, sent)
                for (_, _, (_, came)), sent in zip(results, values, strict=True)
            )
            values = [value for value, _, _ in results]
            del results
        assert all(torch.equal(a, 27 * b) for a, b in zip(values, numbers, strict=True))
        # Only what is in use lies there, beside the scale and the lock.
        files = sorted(path.stat().st_size for path in tmp_path.glob("*.tmp"))
        assert sum(files) < 6 * 2**17 + 2**14
        assert Scale.reads["received"] == 1
    assert temporaries(tmp_path) == []
    assert all(torch.equal(a, 27 * b) for a, b in zip(values, numbers, strict=True))
    pieces = [str(item) for item in workers.items]
    assert pieces[0].startswith("scaling, part 1 of ")
    assert pieces[min(4 * slots, 5) - 1].startswith(f"scaling, part {min(4 * slots, 5)} of ")
    # Later maps name what lies in files, however large it is.
    assert all(len(item) < 1500 for piece in workers.items for item in piece.items)


def test_pieces_take_the_same_time_by_the_last_map(tmp_path):
    with open_maps(PretendedWorkers(slots=1), tmp_path) as opened:
        measured = ("refuse", 8)
        assert opened._sizes(measured) == [2, 2, 2, 2]
        opened._seconds[measured] = [5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0]
        assert opened._sizes(measured) == [1, 3, 3, 1]
        opened._seconds[measured] = [0.0] * 8
        assert sum(opened._sizes(measured)) == 8


def test_a_refusal_or_an_interrupt_leaves_nothing(tmp_path):
    with open_maps(PretendedWorkers(), tmp_path) as opened:
        with opened.open(go_on, "work") as maps, pytest.raises(OutputError, match="no"):
            list(maps.layers(refuse, range(5)))
        assert list(tmp_path.glob("*.tmp")) == []
        checks = []

        def should_stop():
            checks.append(len(list(tmp_path.glob("*.tmp"))))
            return len(checks) == 9

        progress = Progress(should_stop=should_stop)
        with opened.open(progress.check, "work") as maps, pytest.raises(InterruptedRun):
            list(maps.layers(partial(check_first, progress.check), range(20)))
        assert max(checks) >= 1
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize("change", ["cut", "gone"])
def test_a_file_that_is_not_what_was_written_is_refused(tmp_path, change):
    def spoil(path):
        if change == "gone":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size - 1)

    with open_maps(PretendedWorkers(), tmp_path) as opened, opened.open(go_on, "work") as maps:
        (first, *_) = list(maps.layers(refuse, range(2)))
        for path in tmp_path.glob("*.tmp"):
            spoil(path)
        with pytest.raises(ClusterError, match="is not what a process of this merge has written"):
            list(maps.layers(partial(scaled, Scale(2.0)), [first[1:]], [1]))

    class Spoiling(PretendedWorkers):
        """Workers whose files something happens to."""

        @contextmanager
        def mapped(self, *arguments):
            with super().mapped(*arguments) as results:
                yield (spoil(result.path) or result for result in results)

    with (
        open_maps(Spoiling(), tmp_path) as opened,
        opened.open(go_on, "work") as maps,
        pytest.raises(ClusterError, match="is not what a process of this merge has written"),
    ):
        list(maps.layers(refuse, range(2)))
    assert temporaries(tmp_path) == []


def test_a_value_of_another_content_is_refused(tmp_path):
    with open_maps(PretendedWorkers(), tmp_path) as opened, opened.open(go_on, "work") as maps:
        scale = Scale(2.0)
        name = opened._name_once(scale)
        Path(name.partition(" ")[2]).write_bytes(b"other")
        with pytest.raises(ClusterError, match="it has another hash"):
            list(maps.layers(partial(scaled, scale), [torch.ones(3)], [1]))


def test_a_full_disk_is_a_refusal(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hyper_merge.runtime.parcels.TensorFile.add", full)
    with (
        open_maps(PretendedWorkers(), tmp_path) as opened,
        opened.open(go_on, "work") as maps,
        pytest.raises(OutputError, match="the disk is full"),
    ):
        list(maps.layers(refuse, range(2)))
    assert temporaries(tmp_path) == []


def test_values_of_a_process_that_was_killed_are_forgotten():
    values = remote_maps._ReceivedValues()
    values._read = lambda path, _digest: Scale(str(path))
    names = [f"digest .hyper-merge-{number:08x}00000000.tmp" for number in range(7)]
    kept = [values.value_of(name) for name in names]
    assert len(values._values) <= remote_maps._JOBS
    assert values.value_of(names[-1]) is kept[-1]
    assert values.name_of(kept[-1]) == names[-1]
    assert len(values._names) <= remote_maps._JOBS
