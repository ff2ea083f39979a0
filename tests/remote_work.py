"""Functions that workers call in tests, and workers that are none but calls in this process."""

import os
import pickle
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from hyper_merge.errors import RecipeError
from hyper_merge.runtime.remote import RemoteWorker, RemoteWorkers

GB = 2**30


class PretendedWorkers(RemoteWorkers):
    """Calls functions here, with what a connection would bring."""

    def __init__(self, *, slots=2, memory=None):
        self.workers_there = [RemoteWorker("pretended", slots, memory)]
        self.items = []

    @property
    def workers(self):
        return self.workers_there

    @contextmanager
    def mapped(self, function, common, items, check):
        def call(item):
            self.items.append(item)
            check()
            sent = pickle.loads(pickle.dumps((function, common, item)))
            return pickle.loads(pickle.dumps(sent[0](*sent[1:], check)))

        threads = torch.get_num_threads()
        try:
            yield map(call, items)
        finally:
            torch.set_num_threads(threads)  # a worker sets those of its own process

    def on_each(self, function, *arguments):
        function, *arguments = pickle.loads(pickle.dumps((function, *arguments)))
        return {"pretended": function(*arguments)}


def add(common, item, check):
    """Returns the sum, and the process that made it."""
    check()
    return common + item, os.getpid()


def pause(seconds, item, check):
    """Takes a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.02)
        check()
    return item, os.getpid()


def refuse_odd(_common, item, _check):
    """Refuses odd numbers."""
    if item % 2:
        raise RecipeError(f"{item} is odd", hint="give another", key="number")
    return item


def fail_once(folder, item, _check):
    """Fails where it is called for the first time with an item."""
    marker = Path(folder) / str(item)
    if not marker.exists():
        marker.touch()
        raise OSError("the disk is away")
    return item


def fail_always(error, item, _check):
    """Fails with an error of a class."""
    raise error(item)


def eat(_common, item, _check):
    """Takes ever more memory where the item is 2."""
    memory = []
    while item == 2:
        memory.append(bytearray(os.urandom(2**20)) * 16)
        time.sleep(0.01)
    return item


def go_on_until_stopped(folder, item, check):
    """Says in a file how it ended."""
    path = Path(folder) / str(item)
    path.write_text("goes on")
    try:
        while True:
            time.sleep(0.02)
            check()
    except BaseException as error:
        path.write_text(type(error).__name__)
        raise


def kill(pid):
    """Ends a process as the system does that has no memory left."""
    os.kill(pid, signal.SIGKILL)
