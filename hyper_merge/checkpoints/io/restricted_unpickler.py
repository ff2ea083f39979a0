"""An unpickler for .ckpt files that training programs wrote: tensors, containers, and inert stand-ins.

It allows the names that A1111's `modules/safe.py` allows, and all of Lightning's, which ComfyUI replaces by
empty objects too. Nothing is imported by a name of the file, and nothing that the file names is run: a
tensor is made by our own functions, everything else is a `StandIn`.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import IO, Any, Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.io.dtypes import TORCH_DTYPES

_LIGHTNING: Final = ("pytorch_lightning", "lightning")
_NUMPY: Final = ("numpy.core.multiarray", "numpy._core.multiarray")
_TORCH_BY_CODE: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "f2": torch.float16,
        "f4": torch.float32,
        "f8": torch.float64,
        "i1": torch.int8,
        "u1": torch.uint8,
        "i2": torch.int16,
        "i4": torch.int32,
        "i8": torch.int64,
    }
)


class StandIn:
    """Takes the place of an object that nobody reads, whatever it is made of."""

    def __new__(cls, *_values: object, **_settings: object) -> StandIn:
        """Takes what the object would be made of, and forgets it."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Forgets the object's state."""

    def __setitem__(self, key: object, value: object) -> None:
        """Forgets an entry of what would be a mapping."""

    def append(self, value: object) -> None:
        """Forgets an entry of what would be a list."""


class _ArrayType(StandIn):
    """A type of numpy by its code, such as "f4"."""

    def __init__(self, code: object = "", *_settings: object) -> None:
        self.code = str(code)
        self.swapped = False

    def __setstate__(self, state: object) -> None:
        self.swapped = isinstance(state, tuple) and ">" in state[:2]


class _Array(StandIn):
    """The content of an array of numpy, which is made into a tensor on demand."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Function:
    """A function that a file may call but not change."""

    def __init__(self, run: Callable[..., object]) -> None:
        self._run = run

    def __call__(self, *values: object) -> object:
        return self._run(*values)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function has no state")


def _rebuild_tensor(
    storage: object,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_gradients: object,
) -> Tensor:
    rebuild: Callable[..., Tensor] = torch._utils._rebuild_tensor_v2
    return rebuild(storage, offset, size, stride, False, OrderedDict())


def _rebuild_from_array(array: object, dtype: object, *_device: object) -> Tensor:
    """Returns the tensor that a Mac or TPU saved as an array of numpy."""
    if not isinstance(array, _Array) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor is made of no array")
    if not isinstance(array.state, tuple) or len(array.state) != 5:
        raise pickle.UnpicklingError("an array has no content")
    _, shape, kind, by_columns, content = array.state
    code = kind.code if isinstance(kind, _ArrayType) and not kind.swapped else ""
    if code not in _TORCH_BY_CODE or by_columns or not isinstance(content, bytes):
        raise pickle.UnpicklingError(f"an array of numpy is of an unusual type ({code})")
    stored = _TORCH_BY_CODE[code]
    flat = torch.frombuffer(bytearray(content), dtype=stored) if content else torch.empty(0)
    return flat.reshape(shape).to(dtype)


def _encode(text: object, encoding: object) -> bytes:
    """Returns the bytes that a pickle of an old protocol holds as text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"text is encoded as {encoding!r}")
    return text.encode("latin1")


_ALLOWED: Final[Mapping[tuple[str, str], object]] = MappingProxyType(
    {
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
        ("__builtin__", "bytes"): _Function(lambda: b""),  # as an empty array is stored
        ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
        ("torch._utils", "_rebuild_parameter"): _Function(lambda tensor, *_gradients: tensor),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"): _Function(_rebuild_from_array),
        ("torch.nn.modules.container", "ParameterDict"): StandIn,
        ("numpy", "dtype"): _ArrayType,
        ("numpy", "ndarray"): StandIn,
        **{(module, "scalar"): StandIn for module in _NUMPY},
        **{(module, "_reconstruct"): _Function(lambda *_form: _Array()) for module in _NUMPY},
        ("_codecs", "encode"): _Function(_encode),
        **{("torch", str(t).removeprefix("torch.")): t for t in TORCH_DTYPES.values()},
    }
)


class RestrictedUnpickler(pickle._Unpickler):
    """Unpickles the allowed names, storages by torch's own wrapper, and nothing else.

    It is Python's own in Python: the faster one in C makes room for every object up to the largest number
    that a file gives one, 22 GB for three damaged bytes.
    """

    def find_class(self, module: str, name: str) -> object:
        """Returns what stands for a name of the file.

        Raises:
            UnpicklingError: the name is not allowed.
        """
        if module.split(".", maxsplit=1)[0] in _LIGHTNING:
            return StandIn
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"Unsupported class {module}.{name}")
        return _ALLOWED[module, name]


def _load(stream: IO[bytes], **settings: Any) -> object:
    return RestrictedUnpickler(stream, **settings).load()


RESTRICTED_PICKLE: Final = SimpleNamespace(
    __name__=__name__, Unpickler=RestrictedUnpickler, load=_load
)
"""The restricted unpickler in the form of a module, as `torch.load` takes it."""
