"""Who works and how far: the queue's lock, the state, the progress, the thread for models."""

import threading
import time
from collections import deque

import torch


class Devices:
    """`modules.devices`: which one computes, and how often cached memory was freed."""

    def __init__(self, flavour, cmd_opts):
        self.collected = 0
        self.flavour, self.cmd_opts = flavour, cmd_opts

    def get_device_for(self, task):
        if self.flavour != "a1111":  # among the options of its manager of models
            return torch.device("cpu" if self.cmd_opts.always_cpu else "cuda:0")
        if task in self.cmd_opts.use_cpu or "all" in self.cmd_opts.use_cpu:
            return torch.device("cpu")
        number = self.cmd_opts.device_id
        return torch.device("cuda" if number is None else f"cuda:{number}")

    def torch_gc(self):
        self.collected += 1


class FifoLock:
    """First come, first served; no time limit."""

    def __init__(self):
        self._lock = threading.Lock()
        self._inner = threading.Lock()
        self._waiting = deque()

    def acquire(self, blocking=True):
        with self._inner:
            if self._lock.acquire(blocking=False):
                return True
            if not blocking:
                return False
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()
        return self._lock.acquire()

    def release(self):
        with self._inner:
            if self._waiting:
                self._waiting.popleft().set()
            self._lock.release()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *exception):
        self.release()

    @property
    def held(self):
        return self._lock.locked()


class State:
    """`shared.state`: `begin` forgets an earlier Interrupt and sets job_count to -1."""

    def __init__(self, devices):
        self._devices = devices
        self.jobs = []  # those that began, for tests
        self.job, self.job_no, self.job_count = "", 0, 0
        self.sampling_step, self.sampling_steps = 0, 0
        self.skipped = self.interrupted = self.stopping_generation = False
        self.current_latent = self.current_image = self.textinfo = None
        self.time_start = None
        self.server_command = None

    def skip(self):
        self.skipped = True

    def interrupt(self):
        self.interrupted = True

    def stop_generating(self):
        self.stopping_generation = True

    def request_restart(self):
        self.interrupt()
        self.server_command = "restart"

    def begin(self, job="(unknown)"):
        self.jobs.append(job)
        self.sampling_step, self.job_count, self.job_no = 0, -1, 0
        self.time_start = time.time()
        self.current_latent = self.current_image = self.textinfo = None
        self.skipped = self.interrupted = self.stopping_generation = False
        self.job = job
        self._devices.torch_gc()

    def nextjob(self):
        self.job_no += 1
        self.sampling_step = 0

    def end(self):
        self.job, self.job_count = "", 0
        self._devices.torch_gc()

    def dict(self):
        names = ("skipped", "interrupted", "stopping_generation", "job", "job_count", "job_no")
        return {name: getattr(self, name) for name in (*names, "sampling_step", "sampling_steps")}


class Progress:
    """`modules.progress`, with what its HTTP route answers."""

    def __init__(self, state):
        self._state = state
        self.current_task = None
        self.pending_tasks = {}
        self.finished_tasks = []
        self.recorded_results = []

    def add_task_to_queue(self, task):
        self.pending_tasks[task] = time.time()

    def start_task(self, task):
        self.current_task = task
        self.pending_tasks.pop(task, None)

    def finish_task(self, task):
        if self.current_task == task:
            self.current_task = None
        self.finished_tasks = [*self.finished_tasks, task][-16:]

    def record_results(self, task, result):
        self.recorded_results = [*self.recorded_results, (task, result)][-2:]

    def answer(self, task):
        """Returns the answer of POST /internal/progress for a task id."""
        common = {
            "active": task == self.current_task,
            "queued": task in self.pending_tasks,
            "completed": task in self.finished_tasks,
            "progress": None,
            "eta": None,
            "live_preview": None,
            "id_live_preview": -1,
        }
        if not common["active"]:
            text = "Waiting..."
            if common["queued"]:
                queued = sorted(self.pending_tasks, key=self.pending_tasks.get)
                text = f"In queue: {queued.index(task) + 1}/{len(queued)}"
            return {**common, "textinfo": text}
        state, done = self._state, 0.0
        if state.job_count > 0:
            done += state.job_no / state.job_count
            if state.sampling_steps > 0:
                done += state.sampling_step / state.sampling_steps / state.job_count
        done = min(done, 1)
        elapsed = time.time() - state.time_start
        eta = elapsed / done - elapsed if done > 0 else None
        return {**common, "progress": done, "eta": eta, "textinfo": state.textinfo}


class MainThread:
    """`modules_forge.main_thread`: work for the model thread; an error there gives None.

    Forge keeps the error as `last_exception`, Neo its text; reForge and Classic print it alone.
    """

    def __init__(self, flavour):
        self._flavour = flavour
        if flavour in ("forge", "neo"):
            self.last_exception = None
        self.calls = []  # for tests

    def run_and_wait_result(self, func, *args, **kwargs):
        result = []

        def work():
            self.calls.append(func)
            try:
                result.append(func(*args, **kwargs))
                self._told(None)
            except Exception as error:  # as the original: told, not raised
                self._told(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return result[0] if result else None

    def _told(self, error):
        if self._flavour == "forge":
            self.last_exception = error
        elif self._flavour == "neo":
            self.last_exception = error and f"{type(error).__name__}: {error}"
        elif error:
            print(error)  # noqa: T201 - as the original
