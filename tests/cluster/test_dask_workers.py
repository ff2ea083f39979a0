"""Maps over real workers: in order, whatever becomes of a worker, and over when nobody waits any more."""

import time

import pytest
from remote_work import (
    add,
    eat,
    fail_always,
    fail_once,
    go_on_until_stopped,
    kill,
    pause,
    refuse_odd,
)

from hyper_merge.errors import ClusterError, InterruptedRun, RecipeError
from hyper_merge.runtime.progress import Progress
from hyper_merge.runtime.remote import AHEAD

for needed in ("distributed", "cryptography"):
    pytest.importorskip(needed, reason="needs the extra cluster")

go_on = Progress().check


def test_results_come_in_order_from_all_workers(workers):
    with workers.mapped(add, 100, range(20), go_on) as results:
        sums, processes = zip(*results, strict=True)
    assert sums == tuple(range(100, 120))
    assert len(set(processes)) == 2
    assert workers.slots == 2
    assert [worker.slots for worker in workers.workers] == [1, 1]


def test_few_items_are_on_their_way(workers):
    taken = []

    def items():
        for item in range(50):
            taken.append(item)
            yield item

    with workers.mapped(add, 0, items(), go_on) as results:
        for done, _ in enumerate(results, 1):
            assert len(taken) <= done + AHEAD * workers.slots


def test_what_a_killed_worker_did_is_done_again(workers):
    seen = []
    with workers.mapped(pause, 0.1, range(16), go_on) as results:
        for item, process in results:
            seen.append((item, process))
            if item == 3:
                kill(process)
    assert [item for item, _ in seen] == list(range(16))


def test_an_item_that_needs_too_much_memory_is_named(workers):
    with workers.mapped(eat, None, range(4), go_on) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(
            ClusterError, match=r"was lost with the same piece of work: 2; .*memory"
        ):
            next(results)
    with workers.mapped(add, 1, range(3), go_on) as results:  # there are new ones
        assert [total for total, _ in results] == [1, 2, 3]


def test_a_refusal_comes_as_it_is_and_in_its_turn(workers):
    with workers.mapped(refuse_odd, None, [2, 4, 5, 7], go_on) as results:
        assert [next(results), next(results)] == [2, 4]
        with pytest.raises(RecipeError) as caught:
            next(results)
    assert str(caught.value) == "5 is odd; give another"
    assert caught.value.key == "number"


def test_another_error_is_tried_again(workers, tmp_path):
    with workers.mapped(fail_once, tmp_path, range(3), go_on) as results:
        assert list(results) == [0, 1, 2]


def test_an_error_that_stays_is_raised(workers):
    for error in (TimeoutError, ValueError):
        with workers.mapped(fail_always, error, range(1), go_on) as results, pytest.raises(error):
            next(results)


def test_nothing_goes_on_when_the_caller_stops(workers, tmp_path):
    begun = time.monotonic()

    def check():
        if list(tmp_path.iterdir()):
            raise InterruptedRun("enough")

    with (
        pytest.raises(InterruptedRun, match="enough"),
        workers.mapped(go_on_until_stopped, tmp_path, range(9), check) as results,
    ):
        next(results)
    # Those that had begun have ended, and no other one began.
    ends = [path.read_text() for path in tmp_path.iterdir()]
    assert 1 <= len(ends) <= 2  # a worker that was lost before may not be replaced yet
    assert set(ends) == {"InterruptedRun"}
    assert time.monotonic() - begun < 60


def test_a_function_runs_once_on_each_worker(workers):
    results = workers.on_each(divmod, 7, 2)
    assert set(results.values()) == {(3, 1)}
    assert len(results) in (1, 2)  # one that an earlier test has lost may come only now, or never
    assert results.keys() <= {worker.name for worker in workers.workers}
    with pytest.raises(ClusterError, match=r"the worker tls://.* fails: ZeroDivisionError"):
        workers.on_each(divmod, 7, 0)
