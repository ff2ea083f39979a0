"""Element types of .safetensors files: their names, sizes and torch's types for them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

# The library's own order, smallest alignment first: it decides where tensors lie in a file.
_STORED: Final = (
    # name in the file, bits, name in torch (None: read by nobody here)
    ("BOOL", 8, "bool"),
    ("F4", 4, None),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("U8", 8, "uint8"),
    ("I8", 8, "int8"),
    ("F8_E5M2", 8, "float8_e5m2"),
    ("F8_E4M3", 8, "float8_e4m3fn"),
    ("F8_E8M0", 8, None),
    ("I16", 16, "int16"),
    ("U16", 16, None),
    ("F16", 16, "float16"),
    ("BF16", 16, "bfloat16"),
    ("I32", 32, "int32"),
    ("U32", 32, None),
    ("F32", 32, "float32"),
    ("C64", 64, None),
    ("F64", 64, "float64"),
    ("I64", 64, "int64"),
    ("U64", 64, None),
)

_AT_ONCE: Final = 2**18  # values of 8 bits: their places in the table have four times as many bytes

STORED_BITS: Final[Mapping[str, int]] = MappingProxyType({name: bits for name, bits, _ in _STORED})
"""Size of one element in bits, by the type's name in the file."""

# The wider unsigned integers are no weights, and torch and the library disagree on them by version.
TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {name: getattr(torch, word) for name, _, word in _STORED if word and hasattr(torch, word)}
)
"""torch's type by the type's name in the file, as far as the installed torch has it."""

STORED_NAMES: Final[Mapping[torch.dtype, str]] = MappingProxyType(
    {dtype: name for name, dtype in TORCH_DTYPES.items()}
)
"""The type's name in the file by torch's type."""

ALIGNMENT_ORDER: Final[Mapping[torch.dtype, int]] = MappingProxyType(
    {TORCH_DTYPES[name]: i for i, (name, _, _) in enumerate(_STORED) if name in TORCH_DTYPES}
)
"""Place of a type in the library's order; tensors of a higher place come first in a file."""

EIGHT_BIT_FLOATS: Final = tuple(
    dtype for dtype in TORCH_DTYPES.values() if dtype.is_floating_point and dtype.itemsize == 1
)
"""Types that torch stores but does not calculate with; float16 holds their values exactly."""

FLOAT8: Final = torch.float8_e4m3fn
"""The 8-bit float that programs read LoRAs in: three bits of fraction, from 2**-9 to 448."""

DTYPES_BY_WORD: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "float8": FLOAT8,
    }
)
"""torch's type by its name in recipes."""


def widened(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns values in a type that holds them exactly; 8 bits on a CPU in less time than torch takes."""
    if tensor.dtype not in EIGHT_BIT_FLOATS or tensor.device.type != "cpu":
        return tensor.to(dtype)
    values = _values(tensor.dtype, dtype)
    result = torch.empty(tensor.shape, dtype=dtype)
    sides = tensor.view(torch.uint8).flatten(), result.view(-1)
    parts = (torch.split(side, _AT_ONCE) for side in sides)
    for bits, target in zip(*parts, strict=True):
        torch.index_select(values, 0, bits.int(), out=target)
    return result


@cache
def _values(stored: torch.dtype, dtype: torch.dtype) -> Tensor:  # (256,)
    """Returns what all patterns of 8 bits mean."""
    return torch.arange(256, dtype=torch.uint8).view(stored).to(dtype)
