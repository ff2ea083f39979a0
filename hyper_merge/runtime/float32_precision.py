"""Has GPUs multiply in full float32 for a while: with TF32, which hosts switch on, results differ."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

_HIGHEST: Final = "ieee"


class _Precision:
    """The setting of the process, and how many blocks want it at its highest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before: list[Any] = []

    def raise_(self) -> None:
        """Sets the highest precision, in the first block."""
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._before = _set([], highest=True)

    def restore(self) -> None:
        """Sets what was set before, after the last block."""
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                _set(self._before, highest=False)


_PRECISION: Final = _Precision()


@contextmanager
def highest_precision() -> Iterator[None]:
    """Multiplies and convolves float32 on GPUs without TF32 within the block, in all threads.

    Blocks may overlap: the first one saves what is set, the last one restores it.
    """
    _PRECISION.raise_()
    try:
        yield
    finally:
        _PRECISION.restore()


def _set(values: list[Any], *, highest: bool) -> list[Any]:
    """Sets the values, or the highest precision; returns what was set before.

    From torch 2.9 on there are settings in words, beside which the old ones must not be touched: an
    old one raises wherever it is read while both differ.
    """
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):
        settings = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        before: list[Any] = [setting.fp32_precision for setting in settings]
        for place, setting in enumerate(settings):
            setting.fp32_precision = _HIGHEST if highest else values[place]
        return before
    before = [torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32]
    matmul, cudnn = ("highest", False) if highest else values
    torch.set_float32_matmul_precision(matmul)
    backends.cudnn.allow_tf32 = cudnn
    return before
