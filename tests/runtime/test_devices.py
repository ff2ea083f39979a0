"""Jobs on a GPU: its failures, its memory, its precision and its rate; and which one `auto` is."""

import itertools
import threading

import pytest
import torch
from pretended_gpu import GPU, pretended_gpu

from hyper_merge.runtime import throughput
from hyper_merge.runtime.device_memory import DeviceRoom
from hyper_merge.runtime.devices import AUTO, device_job, resolve_device, try_device
from hyper_merge.runtime.float32_precision import highest_precision

CPU = torch.device("cpu")


def raising(error, devices):
    """Returns work that fails on the GPU, with a tensor of its own there."""

    def work(device):
        devices.append(device)
        held = torch.zeros(1000, device=device)
        if device.type != "cpu":
            raise type(error)(*error.args)  # a new one, whose traceback nothing else keeps
        return held

    return work


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), "cuda:0 has too little memory"),
        (
            RuntimeError("CUDA error: no kernel image is available\nCompile with x for y."),
            "cuda:0 fails (CUDA error: no kernel image is available)",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "cuda:0 fails (CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`)",
        ),
        (
            torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge."),
            "cuda:0 fails (linalg.eigh: The algorithm failed to converge)",
        ),
    ],
)
def test_cpu_does_what_a_gpu_cannot_once_its_memory_is_free(error, failure):
    devices, failures = [], []
    with pretended_gpu() as gpu:
        assert len(try_device(GPU, raising(error, devices), 0, failures.append)) == 1000
        # What the failed attempt held is free before the CPU begins.
        assert gpu.emptied == [0]
    assert (devices, failures) == ([GPU, CPU], [failure])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Expected all tensors to be on the same device, cuda:0 and cpu!"),
        ValueError("CUDA error"),
    ],
)
def test_other_errors_are_not_hidden(error):
    devices = []
    with pretended_gpu(), pytest.raises(type(error)):
        try_device(GPU, raising(error, devices))
    assert devices == [GPU]


def test_work_that_never_fits_goes_to_the_cpu_at_once():
    failures = []
    with pretended_gpu(limit=1000):
        assert try_device(GPU, lambda device: device, 800, failures.append) == GPU
        assert try_device(GPU, lambda device: device, 950, failures.append) == CPU
    assert failures == ["cuda:0 has too little memory"]


def test_work_waits_for_the_memory_that_other_work_holds():
    entered, order = threading.Event(), []

    def wait_for_room(room):
        entered.set()
        with room.holding(600):
            order.append("second")

    with pretended_gpu(limit=1000):
        room = DeviceRoom(GPU)
        with room.holding(600), room.holding(200):  # both fit
            thread = threading.Thread(target=wait_for_room, args=(room,))
            thread.start()
            entered.wait()
            thread.join(0.05)
            order.append("first")
        thread.join()
    assert order == ["first", "second"]


def precision():
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        return [cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision]
    return [torch.get_float32_matmul_precision(), cuda.allow_tf32, cudnn.allow_tf32]


@pytest.mark.parametrize("allowed", [True, False])
def test_jobs_multiply_in_full_float32_and_restore_what_a_host_has_set(allowed):
    before = precision()
    try:
        torch.backends.cuda.matmul.allow_tf32 = allowed  # as A1111 does
        torch.backends.cudnn.allow_tf32 = allowed
        chosen = precision()
        with pretended_gpu(), device_job(GPU):
            inside = precision()
            with highest_precision():
                assert precision() == inside
            assert precision() == inside
        assert set(inside) in ({"ieee"}, {"highest", False})
        assert precision() == chosen
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = True
        if hasattr(torch.backends.cudnn, "conv"):
            torch.backends.cuda.matmul.fp32_precision = before[0]
    assert precision() == before


def test_the_rate_of_a_gpu_is_measured_by_jobs_alone():
    with pretended_gpu() as gpu:
        described = throughput.estimate_seconds(1e12, GPU)
        assert not gpu.launches
        with device_job(GPU):
            assert gpu.launches["mm"] == 12
        assert gpu.emptied
        assert throughput.estimate_seconds(1e12, GPU) != described
        with device_job(GPU):
            assert gpu.launches["mm"] == 12


def test_a_few_products_that_are_held_up_do_not_change_the_rate(monkeypatch):
    seconds = itertools.cycle([0.01, 0.01, 0.5])
    monkeypatch.setattr(throughput, "_multiply", lambda _matrix: next(seconds))
    rate = throughput._measure(torch.device("cpu"))
    assert rate == pytest.approx(2 * throughput._SIDE["cpu"] ** 3 / 0.01)


def test_a_gpu_that_cannot_multiply_does_not_end_a_job_before_it_begins():
    def fail(_name):
        raise RuntimeError("CUDA error: no kernel image is available")

    with pretended_gpu() as gpu:
        gpu.inject = fail
        with device_job(GPU):
            gpu.inject = lambda _name: None
            assert throughput.estimate_seconds(1e12, GPU) > 0


@pytest.mark.parametrize(
    ("choice", "device"), [("cpu", CPU), ("cuda:0", GPU), ("cuda:3", CPU), ("mps", CPU)]
)
def test_auto_is_what_the_host_computes_on(choice, device, monkeypatch):
    with pretended_gpu():
        assert resolve_device("auto") == torch.device("cuda")
        monkeypatch.setattr(AUTO, "choose", lambda: choice)
        assert resolve_device("auto") == device
