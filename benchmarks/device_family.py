"""Families of checkpoints whose numbers a GPU makes: full-size ones in seconds, unlike `synthetic`'s."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from hyper_merge.checkpoints.io.header import TensorInfo
from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.synthetic.checkpoint_layouts import sd1_layout, sdxl_layout
from hyper_merge.synthetic.family import FamilySpec

TERMS = 256  # rank of what the checkpoints share
ALL = re.compile(".*")


def write_family(
    folder: Path,
    spec: FamilySpec,
    family: str,
    device: torch.device,
    kept: re.Pattern[str] = ALL,
) -> list[Path]:
    """Writes checkpoints that share low-rank deviations from a base, computed on the device.

    Args:
        folder: of the files.
        spec: the number of checkpoints and their sizes.
        family: "sd1" or "sdxl".
        device: that computes them.
        kept: matches the keys of the tensors.
    """
    shapes = {key: shape for key, shape in layout(spec, family).items() if kept.fullmatch(key)}
    infos = {
        key: TensorInfo(torch.int64 if key.endswith("position_ids") else torch.float16, shape)
        for key, shape in shapes.items()
    }
    paths = [folder / f"{family}_{c}.safetensors" for c in range(spec.count)]
    generator = torch.Generator(device).manual_seed(0)
    mix = torch.randn(spec.count, 3, generator=torch.Generator().manual_seed(0)).tolist()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = stack.enter_context(FileTransaction(overwrite=True))
        writers = [stack.enter_context(files.safetensors(path, infos, {})) for path in paths]
        for key, shape in shapes.items():
            for writer, tensor in zip(
                writers, family_tensors(key, shape, mix, generator), strict=True
            ):
                writer.write(key, tensor)
    return paths


def layout(spec: FamilySpec, family: str) -> Mapping[str, tuple[int, ...]]:
    """Returns the shapes of a checkpoint's tensors."""
    sizes = spec.vocabulary, spec.vae_width
    if family == "sdxl":
        return sdxl_layout(spec.width, (spec.context, spec.second_context), *sizes)
    return sd1_layout(spec.width, spec.context, *sizes)


def family_tensors(
    key: str, shape: tuple[int, ...], mix: list[list[float]], generator: torch.Generator
) -> list[torch.Tensor]:
    """Returns one tensor of every checkpoint: a base, mixed directions of low rank, and noise."""
    device = generator.device
    if key.endswith("position_ids"):
        return [torch.arange(shape[-1])[None]] * len(mix)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    if len(shape) < 2:
        return [(1 + 0.01 * normal(*shape)).half() for _ in mix]
    m, n = shape[0], torch.Size(shape[1:]).numel()
    rank = min(m, n, TERMS)
    falling = torch.arange(1, rank + 1, device=device) ** -0.5
    directions = [normal(m, rank) * falling @ normal(rank, n) / rank**0.5 for _ in mix[0]]
    base = normal(m, n)
    return [
        (
            (
                base
                + 0.05 * sum(x * d for x, d in zip(row, directions, strict=True))
                + 0.01 * normal(m, n)
            )
            / n**0.5
        )
        .view(shape)
        .half()
        for row in mix
    ]
