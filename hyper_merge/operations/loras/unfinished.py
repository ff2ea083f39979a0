"""Finds LoRA files whose download was not finished: some programs give a file its whole size at once.

What is missing holds zeros then, up to the end of the file. Trainers begin with an `up` of zeros and a
random `down`, so that the one may stay blank, and never both. Blank modules elsewhere are parts that
someone switched off, and files of Hyper-Merge fill groups of layers up with zeros of rank 1.
"""

from __future__ import annotations

from collections.abc import Callable

from hyper_merge.checkpoints.io.downloads import require_downloaded
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import CheckpointError
from hyper_merge.loras.input_modules import LoraModules


def require_complete(
    modules: LoraModules, warn: Callable[[str], None], *, accepts_damaged: bool
) -> None:
    """Returns if a LoRA file is all there, as far as can be seen.

    Args:
        modules: of the file.
        warn: takes what is accepted although it looks unfinished.
        accepts_damaged: whether such files are accepted.

    Raises:
        CheckpointError: a file beside it says that it is still being downloaded, or its last module
            holds nothing but zeros.
    """
    header = modules.header
    if not accepts_damaged:
        require_downloaded(header.path)
    blank = _blank_end(modules)
    if blank is None:
        return
    fault = f"{header.name} lacks data: it holds nothing but zeros in {blank}, its last module"
    if accepts_damaged:
        warn(f"{fault}; compare it with its source if nobody meant that")
        return
    raise CheckpointError(
        fault,
        hint="its download was not finished or the copy is damaged: download it again, or leave it"
        " out; if it is as it should be, set damaged to accept",
        file=header.path,
        key=blank,
    )


def _blank_end(modules: LoraModules) -> str | None:
    """Returns the module that ends a file if all its factors are zeros; headers are in the data's order."""
    last = {key: part for part in modules.parts for key in part.factor_keys}
    part = next(last[key] for key in reversed(list(modules.header.tensors)) if key in last)
    if part.shape.rank < 2:
        return None
    with CheckpointReader(modules.header.path, expected=modules.header) as file:
        is_blank = not any(bool(file.tensor(key).float().any()) for key in part.factor_keys)
    return part.spelled.name if is_blank else None
