"""Families of made-up checkpoints with known structure, for the demo, tests and benchmarks.

Each family is a base, a few latent fine-tunes that all checkpoints mix, and something of each one's
own. Everything follows from the `FamilySpec`, tensor by tensor, whatever the order or the threads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyper_merge.checkpoints.family import identify
from hyper_merge.checkpoints.header import Header, Shape, TensorInfo
from hyper_merge.checkpoints.layers import Treatment, layout_of, position_ids
from hyper_merge.checkpoints.outputs import Outputs
from hyper_merge.checkpoints.synthetic_layout import sd1_layout, sd2_layout, sdxl_layout
from hyper_merge.checkpoints.writer import SafetensorsWriter
from hyper_merge.workers import before_threads

_EMBEDDING_STD: Final = 0.02  # as CLIP is initialised
_NORM_STD: Final = 0.1
_BIAS_STD: Final = 0.02
_QUIET: Final = 1 / 3  # norms, biases, embeddings move less than the layers
_THREADS: Final = 2  # random numbers come from one core per tensor; more would cost memory


@dataclass(frozen=True)
class FamilySpec:
    """What decides a family; the defaults are the real sizes of SD 1.x and SDXL.

    A layer `(m, n)` of checkpoint c is its base plus, in units of `size * norm of the base` times
    a log-normal amplitude per layer,

        sum over i of mix[c, i] * latent_i  +  own * latent of c alone  +  noise * white noise,

    each term of norm about 1, each latent of rank `min(m, n, terms)` with the singular values
    j ** -alpha. A family with more checkpoints begins with the same ones.

    Attributes:
        count: Checkpoints.
        latents: Fine-tunes that they all mix.
        architecture: "sd1", "sd2" or "sdxl".
        width: Channels of the UNet's first level.
        context: Width of the text encoder; of SDXL's first one.
        second_context: Width of SDXL's second text encoder.
        vocabulary: Tokens of the text encoders.
        vae_width: Channels of the VAE's first level.
        alpha: Exponent of the singular values.
        terms: Rank of a latent at most.
        own: Norm of what a checkpoint has for itself.
        noise: Norm of its white noise.
        spread: Standard deviation of the logarithm of the layers' amplitudes.
        size: Norm of a deviation from the base, as a fraction of the base's, in the median layer.
        seed: Of everything random.
        dtype: Of the written files.
        vae_differs: Whether each checkpoint has a VAE of its own.
    """

    count: int = 4
    latents: int = 3
    architecture: str = "sd1"
    width: int = 320
    context: int = 768
    second_context: int = 1280
    vocabulary: int = 49408
    vae_width: int = 128
    alpha: float = 0.5
    terms: int = 320
    own: float = 0.3
    noise: float = 0.3
    spread: float = 0.8
    size: float = 0.05
    seed: int = 0
    dtype: torch.dtype = torch.float16
    vae_differs: bool = False


NARROW: Final = FamilySpec(width=32, context=48, vocabulary=100, vae_width=16, terms=32)
"""All 1131 keys of the real layout in 20 MB a checkpoint."""

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
        on_progress: told elements done and elements in all after each tensor, from this thread;
            what it raises ends the work and nothing is left behind.
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
        outputs = stack.enter_context(Outputs(overwrite=overwrite))
        writers = [
            stack.enter_context(outputs.safetensors(path, header.tensors, {})) for path in paths
        ]
        _write_all(spec, header, writers, on_progress)
    return paths


def tensors(
    spec: FamilySpec,
) -> Iterator[tuple[str, Tensor]]:  # key, (count, *shape)
    """The exact numbers in float32 before they are rounded to the files' type, in the files' order.

    Position ids are int64.
    """
    for plan in _plans(_header(spec)):
        yield plan.key, torch.stack(list(_weights(spec, plan)))


def mixture(
    spec: FamilySpec,
) -> Tensor:  # (count, latents)
    """How much of each latent fine-tune each checkpoint has, in all layers alike."""
    rows = [
        torch.randn(spec.latents, generator=_generator(spec, f"mixture {c}"))
        for c in range(spec.count)
    ]
    return torch.stack(rows)


@dataclass(frozen=True)
class _Plan:
    """A tensor to make."""

    key: str
    info: TensorInfo
    treatment: Treatment


def _header(spec: FamilySpec) -> Header:
    """What each file of the family will have for a header."""
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


def _plans(header: Header) -> list[_Plan]:
    treatments = layout_of(header, identify(header)).treatments
    return [_Plan(key, info, treatments[key]) for key, info in header.tensors.items()]


def _write_all(
    spec: FamilySpec,
    header: Header,
    writers: Sequence[SafetensorsWriter],
    on_progress: OnProgress | None,
) -> None:
    def write(plan: _Plan) -> int:
        for writer, tensor in zip(writers, _weights(spec, plan), strict=True):
            writer.write(plan.key, tensor)
        return plan.info.numel

    # The largest first, or one thread ends alone with a large one.
    plans = sorted(_plans(header), key=lambda plan: -plan.info.numel)
    total = sum(plan.info.numel for plan in plans)
    before_threads()
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


def _weights(
    spec: FamilySpec, plan: _Plan
) -> Iterator[Tensor]:  # count times (*shape), float32 or int64
    """One tensor of each checkpoint in turn: only one of them need be in memory."""
    shape = plan.info.shape
    generator = _generator(spec, plan.key)
    if not plan.info.dtype.is_floating_point:
        yield from (position_ids(shape) for _ in range(spec.count))
        return
    base = _base(plan.key, shape, generator)
    if plan.treatment is Treatment.LAYER:
        yield from _layer_weights(spec, base, generator)
        return
    moves = plan.treatment is not Treatment.VAE or spec.vae_differs
    step = _QUIET * spec.size * float(base.norm()) / math.sqrt(base.numel())
    for _ in range(spec.count):
        yield torch.randn(shape, generator=generator).mul_(step).add_(base) if moves else base


def _layer_weights(
    spec: FamilySpec, base: Tensor, generator: torch.Generator
) -> Iterator[Tensor]:  # count times (*shape)
    weight = base.flatten(1)
    m, n = weight.shape
    amplitude = math.exp(spec.spread * float(torch.randn((), generator=generator)))
    unit = spec.size * float(base.norm()) * amplitude
    latents = [torch.mm(*_latent(spec, m, n, generator)) for _ in range(spec.latents)]
    for row in mixture(spec).tolist():
        # In place throughout: fresh memory costs as much as the arithmetic.
        noisy = torch.randn(m, n, generator=generator).mul_(unit * spec.noise / math.sqrt(m * n))
        noisy.add_(weight).addmm_(*_latent(spec, m, n, generator), alpha=unit * spec.own)
        for share, latent in zip(row, latents, strict=True):
            noisy.add_(latent, alpha=unit * share)
        yield noisy.view(base.shape)


def _latent(
    spec: FamilySpec, m: int, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # (m, terms) and (terms, n): their product has norm about 1
    terms = min(m, n, spec.terms)
    values = torch.arange(1, terms + 1, dtype=torch.float32) ** -spec.alpha
    values /= values.norm() * math.sqrt(m * n)
    left = torch.randn(m, terms, generator=generator)
    return left * values, torch.randn(terms, n, generator=generator)


def _base(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:  # (*shape)
    noise = torch.randn(shape, generator=generator)
    if key.endswith("bias"):
        return noise.mul_(_BIAS_STD)
    if len(shape) == 1:
        return noise.mul_(_NORM_STD).add_(1)
    if "_embedding" in key:
        return noise.mul_(_EMBEDDING_STD)
    return noise.div_(math.sqrt(math.prod(shape[1:])))


def _generator(spec: FamilySpec, name: str) -> torch.Generator:
    """A stream of random numbers that depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{spec.seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
