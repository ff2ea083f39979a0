"""A GPU for machines without one: tensors that say they are on cuda:0 and lie in ordinary memory.

    with pretended_gpu() as gpu:
        merge(files, place, device="cuda:0")
    assert gpu.waits["cpu"] < 100

An operation on tensors of both places raises `MixedDevicesError`, as CUDA refuses it. What CUDA would wait
for is counted by kind and by place in our code; memory is counted by storage, and refused beyond a
limit; an error can be injected into any operation.
"""

import collections
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from hyper_merge.runtime import parallel, throughput

GPU = torch.device("cuda", 0)
TOTAL = 8 * 2**30

_NOW: list["PretendedGpu"] = []  # the one that is pretended, if any

# CUDA takes indices from either place, and numbers (tensors without dimensions) from the CPU.
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Operations after which CUDA is waited for: they return numbers, or look at what LAPACK's say.
_WAITING = {
    "_local_scalar_dense": "number",
    "is_nonzero": "number",
    "equal": "number",
    "nonzero": "nonzero",
    "_linalg_check_errors": "check",
    "_linalg_eigh": "solver",
    "_linalg_svd": "solver",
}


class MixedDevicesError(RuntimeError):
    """Tensors of both places came together."""


class PretendedGpu:
    """What the pretended device has seen.

    Attributes:
        launches: Operations on it by name.
        waits: What the CPU waited for, by kind.
        places: The same by file and function of ours.
        largest: Rows of the largest matrix that each solver had.
        peak: Bytes that were taken at once.
        emptied: How often the cache was emptied, with the bytes that were taken then.
        inject: Called with every operation's name; may raise.
    """

    def __init__(self, limit=None):
        self.limit, self.live, self.peak, self.refused = limit or TOTAL, 0, 0, 0
        self.launches, self.waits = collections.Counter(), collections.Counter()
        self.places, self.largest = collections.Counter(), {}
        self.emptied = []
        self.inject = lambda name: None
        self.lock = threading.RLock()

    def wait(self, kind):
        with self.lock:
            self.waits[kind] += 1
            self.places[kind, _place()] += 1

    def take(self, size):
        with self.lock:
            if self.live + size > self.limit:
                self.refused += 1
                raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size}")
            self.live += size
            self.peak = max(self.peak, self.live)

    def give_back(self, size):
        with self.lock:
            self.live -= size


class _Allocation:
    """The memory of one storage, for as long as a tensor has it."""

    def __init__(self, size):
        self.size, self.gpu = 0, _NOW[-1] if _NOW else None
        if self.gpu:
            self.gpu.take(size)
            self.size = size

    def __del__(self):
        if self.gpu:
            self.gpu.give_back(self.size)


class GpuTensor(torch.Tensor):
    """A tensor on the pretended device; torch itself takes it for one without data."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, allocation=None):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",  # a build for CPUs knows how to hold these, but not those of CUDA
        )
        made.inner = inner
        made.allocation = allocation or _Allocation(inner.untyped_storage().nbytes())
        return made

    def __init__(self, inner, allocation=None):
        pass

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def __repr__(self):
        return f"GpuTensor({self.inner})"

    # Conversions of Python would ask a CUDA build for its device first.
    def _waited(self):
        if _NOW:
            _NOW[-1].wait("number")
        return self.inner

    def __float__(self):
        return float(self._waited())

    def __int__(self):
        return int(self._waited())

    def __bool__(self):
        return bool(self._waited())

    def __index__(self):
        return self._waited().__index__()

    def item(self):
        return self._waited().item()

    def tolist(self):
        return self._waited().tolist()

    def numpy(self, *_args, **_kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    # Of a list of indices torch would make a tensor where this one seems to be: one without data.
    def __getitem__(self, index):
        return torch.Tensor.__getitem__(self, _as_tensors(index))

    def __setitem__(self, index, value):
        torch.Tensor.__setitem__(self, _as_tensors(index), value)

    @classmethod
    def __torch_dispatch__(cls, func, _types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees also what makes tensors, and what copies those of the CPU; in one thread."""

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


class _Pool(ThreadPoolExecutor):
    """Has the mode in every worker."""

    def submit(self, function, /, *args, **kwargs):
        def run():
            with _Mode():
                return function(*args, **kwargs)

        return super().submit(run)


@contextmanager
def pretended_gpu(limit=None):
    """Pretends that there is one GPU; gives what it sees.

    Args:
        limit: bytes of its memory.
    """
    gpu = PretendedGpu(limit)
    with ExitStack() as stack:
        patches = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "empty_cache": lambda: gpu.emptied.append(gpu.live),
            "mem_get_info": lambda _device=None: (gpu.limit - gpu.live, gpu.limit),
            "get_per_process_memory_fraction": lambda _device=None: 1.0,
            "memory_reserved": lambda _device=None: gpu.live,
            "memory_allocated": lambda _device=None: gpu.live,
            "get_device_properties": lambda _device=None: SimpleNamespace(multi_processor_count=60),
        }
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value, create=True))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone))
        stack.enter_context(mock.patch.object(parallel, "ThreadPoolExecutor", _Pool))
        stack.enter_context(mock.patch.dict(throughput._MEASURED))
        stack.enter_context(mock.patch.dict(throughput._SIDE, cuda=8))
        _NOW.append(gpu)
        try:
            with _Mode():
                yield gpu
        finally:
            _NOW.pop()


def _dispatch(func, args, kwargs):
    gpu = _NOW[-1] if _NOW else None
    name = func._schema.name.removeprefix("aten::")
    device = kwargs.get("device")
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
    to_gpu = _is_gpu(device)
    if not on_gpu and not to_gpu:
        return func(*args, **kwargs)
    if gpu:
        gpu.inject(name)
    if name == "_to_copy":
        return _copy_between(gpu, func, args[0], kwargs, to_gpu=to_gpu or device is None)
    if name == "copy_":
        return _copy_into(gpu, *args)
    _refuse_mixture(gpu, name, args, tensors, kwargs)
    _count(gpu, func, name, args)
    plain = {**kwargs, **({"device": torch.device("cpu")} if device is not None else {})}
    plain.pop("pin_memory", None)
    out = func(*tree_map(_inner, args), **tree_map(_inner, plain))
    return out if device is not None and not to_gpu else _result(name, args, kwargs, out, on_gpu)


def _result(name, args, kwargs, out, on_gpu):
    """Returns what an operation's result is on the GPU: a view, what it changed, or new tensors."""
    allocations = {t.inner.untyped_storage()._cdata: t.allocation for t in on_gpu}

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        return GpuTensor(value, allocations.get(value.untyped_storage()._cdata))

    if name.endswith("_"):
        return args[0]
    return kwargs["out"] if "out" in kwargs else tree_map(wrap, out)


def _copy_between(gpu, func, source, kwargs, *, to_gpu):
    plain = {**kwargs, "device": torch.device("cpu")}
    waits = not plain.pop("non_blocking", False)
    plain.pop("pin_memory", None)
    if gpu and to_gpu != isinstance(source, GpuTensor):
        _count_copy(gpu, to_gpu=to_gpu, waits=waits)
    out = func(_inner(source), **plain)
    if out.untyped_storage()._cdata == _inner(source).untyped_storage()._cdata:
        out = out.clone()
    return GpuTensor(out) if to_gpu else out


def _copy_into(gpu, target, source, non_blocking=False):
    to_gpu = isinstance(target, GpuTensor)
    if gpu and to_gpu != isinstance(source, GpuTensor):
        _count_copy(gpu, to_gpu=to_gpu, waits=not non_blocking)
    _inner(target).copy_(_inner(source))
    return target


def _count_copy(gpu, *, to_gpu, waits):
    with gpu.lock:
        gpu.launches["to gpu" if to_gpu else "to cpu"] += 1
    if waits:
        gpu.wait("gpu" if to_gpu else "cpu")


def _count(gpu, func, name, args):
    if gpu is None or func.is_view:
        return
    with gpu.lock:
        gpu.launches[name] += 1
        if name in _WAITING and _WAITING[name] == "solver":
            gpu.largest[name] = max(gpu.largest.get(name, 0), min(args[0].shape[-2:]))
    if name in _WAITING:
        gpu.wait(_WAITING[name])


def _refuse_mixture(gpu, name, args, tensors, kwargs):
    strangers = [t for t in tensors if not isinstance(t, GpuTensor) and t.dim()]
    if name in _INDEXING:
        if gpu and any(i is not None and not isinstance(i, GpuTensor) for i in args[1]):
            gpu.wait("gpu")
        values = [part for part in args[2:3] if isinstance(part, torch.Tensor) and part.dim()]
        strangers = [t for t in (args[0], *values) if not isinstance(t, GpuTensor)]
    if strangers:
        shapes = [tuple(t.shape) for t in strangers]
        raise MixedDevicesError(f"{name} has tensors of the CPU {shapes} beside some of the GPU")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise MixedDevicesError(f"{name} has a generator of the CPU for the GPU")


def _inner(value):
    return value.inner if isinstance(value, GpuTensor) else value


def _is_gpu(device):
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _as_tensors(index):
    if isinstance(index, tuple):
        return tuple(map(_as_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _place():
    frame = sys._getframe(1)
    while frame:
        _, _, name = frame.f_code.co_filename.replace("\\", "/").rpartition("/hyper_merge/")
        if name != frame.f_code.co_filename.replace("\\", "/"):
            return f"{name} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
