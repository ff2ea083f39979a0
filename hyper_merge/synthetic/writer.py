"""Families of made-up checkpoints with known structure, for the demo, tests and benchmarks.

Each family is a base, a few latent fine-tunes that all checkpoints mix, and something that each one
alone has. Everything follows from the `FamilySpec`, tensor by tensor, whatever the order or the threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.architectures.detection import detect_family
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.io.header import Header, Shape, TensorInfo
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.runtime.parallel import import_numpy_in_torch
from hyper_merge.synthetic.checkpoint_layouts import sd1_layout, sd2_layout, sdxl_layout
from hyper_merge.synthetic.family import NARROW, FamilyPlan, FamilySpec, mixture, weights

__all__ = ["NARROW", "FamilySpec", "mixture", "tensors", "write_family"]

_THREADS: Final = 2  # random numbers come from one core per tensor; more would cost memory

OnProgress = Callable[[int, int], None]


def write_family(
    folder: Path,
    spec: FamilySpec,
    names: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
    *,
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Writes the family as .safetensors files that appear together, in the memory of a few tensors.

    Args:
        folder: of the files; made where it is missing.
        spec: the family.
        names: file stems, one per checkpoint; "synthetic_0", ... without them.
        on_progress: called with elements done and elements in all after each tensor, from this
            thread; what it raises ends the work and nothing is left behind.
        overwrite: whether existing files may be replaced.

    Returns:
        The files, in the order of the family.

    Raises:
        ValueError: another number of names than of checkpoints.
        OutputError: a file exists, or cannot be written.
    """
    stems = [f"synthetic_{c}" for c in range(spec.count)] if names is None else list(names)
    if len(stems) != spec.count:
        raise ValueError(f"{spec.count} checkpoints need as many names, got {len(stems)}")
    paths = tuple(folder / f"{stem}.safetensors" for stem in stems)
    header = _header(spec)
    with ExitStack() as stack:
        outputs = stack.enter_context(FileTransaction(overwrite=overwrite))
        writers = [
            stack.enter_context(outputs.safetensors(path, header.tensors, {})) for path in paths
        ]
        _write_all(spec, header, writers, on_progress)
    return paths


def tensors(
    spec: FamilySpec,
) -> Iterator[tuple[str, Tensor]]:  # key, (count, *shape)
    """Yields the exact numbers in float32, before rounding to the files' type, in their order.

    Position ids are int64.
    """
    for plan in _plans(_header(spec)):
        yield plan.key, torch.stack(list(weights(spec, plan)))


def _header(spec: FamilySpec) -> Header:
    """Returns the header that each file of the family will have."""
    shapes = _shapes(spec)
    infos = {
        key: TensorInfo(torch.int64 if key.endswith("position_ids") else spec.dtype, shape)
        for key, shape in shapes.items()
    }
    return Header(Path("synthetic.safetensors"), infos, metadata={}, size=0, mtime_ns=0)


def _shapes(spec: FamilySpec) -> dict[str, Shape]:
    sizes = spec.vocabulary, spec.vae_width
    if spec.architecture == "sdxl":
        return sdxl_layout(spec.width, (spec.context, spec.second_context), *sizes)
    layouts = {"sd1": sd1_layout, "sd2": sd2_layout}
    return layouts[spec.architecture](spec.width, spec.context, *sizes)


def _plans(header: Header) -> list[FamilyPlan]:
    treatments = layout_of(header, detect_family(header)).treatments
    return [FamilyPlan(key, info, treatments[key]) for key, info in header.tensors.items()]


def _write_all(
    spec: FamilySpec,
    header: Header,
    writers: Sequence[SafetensorsWriter],
    on_progress: OnProgress | None,
) -> None:
    def write(plan: FamilyPlan) -> int:
        for writer, tensor in zip(writers, weights(spec, plan), strict=True):
            writer.write(plan.key, tensor)
        return plan.info.numel

    # The largest first, or one thread ends alone with a large one.
    plans = sorted(_plans(header), key=lambda plan: -plan.info.numel)
    total = sum(plan.info.numel for plan in plans)
    import_numpy_in_torch()
    with ThreadPoolExecutor(_THREADS) as pool:
        _drain(pool, [pool.submit(write, plan) for plan in plans], total, on_progress)


def _drain(
    pool: ThreadPoolExecutor,
    futures: Sequence[Future[int]],
    total: int,
    on_progress: OnProgress | None,
) -> None:
    done = 0
    try:
        for future in as_completed(futures):
            done += future.result()
            if on_progress is not None:
                on_progress(done, total)
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
