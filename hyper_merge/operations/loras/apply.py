"""Adds LoRAs to a checkpoint, or takes them away, tensor by tensor; every tensor keeps its type."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.checkpoints.architectures.detection import detect_family, require_supported
from hyper_merge.checkpoints.architectures.layout import Layer, Layout, layout_of
from hyper_merge.checkpoints.io.downloads import require_downloaded
from hyper_merge.checkpoints.io.dtypes import EIGHT_BIT_FLOATS
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.io.transaction import FileTransaction, require_free
from hyper_merge.checkpoints.prediction_type import (
    find_config_file,
    v_prediction_config,
    with_prediction_type,
)
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.decomposition.linalg import add_products, share
from hyper_merge.errors import NonFiniteError
from hyper_merge.loras.input_keys import split_keys
from hyper_merge.loras.input_lora import InputLora
from hyper_merge.loras.input_modules import LoraModules
from hyper_merge.loras.metadata import Lineage, checkpoint_metadata
from hyper_merge.loras.module_names import ModuleIndex
from hyper_merge.operations.loras.request import ApplyRequest
from hyper_merge.operations.loras.unfinished import require_complete
from hyper_merge.runs.folders import require_no_source
from hyper_merge.runs.hash_cache import current_time, hash_sources
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.names import prompt_word
from hyper_merge.runtime.parallel import parallel_map
from hyper_merge.runtime.progress import Progress

_KIND: Final = "with-loras"  # `hyper_merge.kind` of the written checkpoint
_ENTRY: Final = 1.0  # costs: of an entry that is copied
_CHANGED: Final = 8.0  # and of one that is changed


@dataclass(frozen=True)
class ApplyResult:
    """The written checkpoint."""

    path: Path
    checkpoint: str  # file names without suffix
    loras: tuple[str, ...]
    multipliers: tuple[float, ...]  # as they were added: negative where LoRAs were taken away
    layers: int  # that were changed
    changed: float  # norm of the change, as a fraction of that of the changed weights
    size: int


@dataclass(frozen=True, eq=False)
class _Application:
    """A checkpoint and the LoRAs that are added to it."""

    inputs: MergeInputs  # the checkpoint alone
    loras: tuple[LoraModules, ...]
    multipliers: tuple[float, ...]
    path: Path
    request: ApplyRequest

    @property
    def header(self) -> Header:
        """The checkpoint's header."""
        return self.inputs.headers[0]

    def multipliers_in(self, layer: Layer) -> tuple[float, ...]:
        """Returns the multiplier of every LoRA in a layer."""
        sign = -1.0 if self.request.subtract else 1.0
        return tuple(sign * x for x in self.request.multipliers_in(layer))

    @property
    def changed(self) -> set[str]:
        """The modules that any LoRA has."""
        return {module for lora in self.loras for module in lora.layers}


def run_apply(request: ApplyRequest, progress: Progress) -> ApplyResult:
    """Writes the checkpoint; on any failure every existing file stays as it was.

    Args:
        request: files and options.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: a file is no checkpoint or no LoRA, they do not go together, the place is
            taken, a value is too large for its type, a full disk, or the user's interrupt.
    """
    application = _prepare(request, progress)
    hashing, adding = progress.split((1.0, 4.0))
    headers = [application.header, *(lora.header for lora in application.loras)]
    sources = hash_sources(headers, None, hashing)
    path, header = application.path, application.header
    lineage = Lineage(
        path.stem, application.inputs.layout.family, _recipe(request), sources, current_time()
    )
    with FileTransaction(overwrite=request.overwrite) as outputs:
        config = v_prediction_config(header, lineage.family)
        if config is not None:
            outputs.text(find_config_file(path), config)
        metadata = _metadata(application, lineage)
        with outputs.safetensors(path, header.tensors, metadata) as writer:
            weights, change = _write(application, writer, adding)
        progress.report("putting the file in place", 1.0)
    return ApplyResult(
        path=path,
        checkpoint=header.stem,
        loras=tuple(lora.header.stem for lora in application.loras),
        multipliers=application.multipliers,
        layers=sum(x.module in application.changed for x in application.inputs.layout.layers),
        changed=share(change, weights) ** 0.5,
        size=path.stat().st_size,
    )


def _prepare(request: ApplyRequest, progress: Progress) -> _Application:
    header = read_header(request.checkpoint)
    if not request.accepts_damaged:
        require_downloaded(header.path)
    require_supported(header)
    family = with_prediction_type(header, detect_family(header))
    request.require_blocks_of(family)
    layout = layout_of(header, family.as_lora_input())
    loras = tuple(_modules(path, layout) for path in request.loras)
    for lora in loras:
        require_complete(lora, progress.warn, accepts_damaged=request.accepts_damaged)
    sign = -1.0 if request.subtract else 1.0
    stem = _stem(request, header)
    path = request.to or header.path.with_name(f"{stem}.safetensors")
    require_no_source(path, (request.checkpoint, *request.loras))
    require_free(path, overwrite=request.overwrite)
    require_disks({path.parent: sum(info.nbytes for info in header.tensors.values())})
    inputs = MergeInputs((header,), None, layout, (1.0,), torch.float32)
    return _Application(inputs, loras, tuple(sign * x for x in request.weights), path, request)


def _modules(path: Path, layout: Layout) -> LoraModules:
    header = read_header(path)
    try:
        return LoraModules(header, split_keys(header), ModuleIndex(layout.layers, layout.family))
    except ValueError as error:
        _say_family(error, layout)
        raise


def _say_family(error: ValueError, layout: Layout) -> None:
    message = getattr(error, "message", None)
    if message and message.endswith("unknown to this family"):
        error.message = f"{message}, {layout.family.title}"  # type: ignore[attr-defined]


def _write(
    application: _Application, writer: SafetensorsWriter, progress: Progress
) -> tuple[float, float]:
    """Writes every tensor; returns the squared norms of the changed weights and of their change."""
    header = application.header
    changed = {
        layer.key
        for layer in application.inputs.layout.layers
        if layer.module in application.changed
    }
    costs = {
        key: info.numel * (_CHANGED if key in changed else _ENTRY)
        for key, info in header.tensors.items()
    }
    counter = progress.counter("adding the LoRAs", costs)
    sums = [0.0, 0.0]
    with ExitStack() as stack:
        file = stack.enter_context(CheckpointReader(header.path, expected=header))
        files = [stack.enter_context(InputLora(modules)) for modules in application.loras]
        parallel = stack.enter_context(parallel_map(torch.device("cpu"), counter.report))
        stack.enter_context(counter)
        take = partial(_take, application, file, files, changed)
        for key, (tensor, squares) in zip(costs, parallel(take, costs), strict=True):
            writer.write(key, tensor)
            sums = [a + b for a, b in zip(sums, squares, strict=True)]
            counter.finish(key)
    return sums[0], sums[1]


def _take(
    application: _Application,
    file: CheckpointReader,
    files: Sequence[InputLora],
    changed: set[str],
    key: str,
) -> tuple[Tensor, tuple[float, float]]:
    """Returns a tensor with the LoRAs' changes, and squared norms of both; copies are bit for bit."""
    tensor = file.tensor(key)
    if key not in changed:
        return tensor, (0.0, 0.0)
    before = tensor.float()
    total = before.clone()
    for rows, index in application.inputs.pieces(key):
        layer = application.inputs.layout.layers[index or 0]
        matrix = total[rows].view(layer.m, layer.n)
        pairs = zip(files, application.multipliers_in(layer), strict=True)
        add_products(
            matrix,
            [
                (*lora.factors(layer.module, torch.float32), multiplier)
                for lora, multiplier in pairs
                if layer.module in lora.modules
            ],
        )
    dtype = application.header.tensors[key].dtype
    _require_fit(key, total, dtype)
    return total.to(dtype), (_squared(before), _squared(total - before))


def _require_fit(key: str, total: Tensor, dtype: torch.dtype) -> None:
    largest = float(total.abs().amax()) if total.numel() else 0.0
    # Not by the cast: torch 2.1 makes NaN of what float8 cannot hold, newer ones the largest number.
    if largest <= torch.finfo(dtype).max:
        return
    word = str(dtype).removeprefix("torch.")
    hint = "use the fp16 version of the checkpoint" if dtype in EIGHT_BIT_FLOATS else ""
    raise NonFiniteError(
        f"{key} of the new checkpoint reaches {largest:.4g}, which {word} cannot hold",
        hint=hint or "choose smaller multipliers, or a checkpoint in bfloat16 or float32",
    )


def _squared(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64).square())


def _stem(request: ApplyRequest, header: Header) -> str:
    word = "minus" if request.subtract else "plus"
    return prompt_word(f"{header.stem}-{word}-" + "-".join(path.stem for path in request.loras[:3]))


def _recipe(request: ApplyRequest) -> dict[str, str]:
    return {
        "type": "loras subtracted" if request.subtract else "loras added",
        "checkpoint": request.checkpoint.name,
        "loras": json.dumps([path.name for path in request.loras], ensure_ascii=False),
        "multipliers": ", ".join(map(repr, request.weights)),
        **request.recipe_of_blocks(),
    }


def _metadata(application: _Application, lineage: Lineage) -> Mapping[str, str]:
    checkpoint, *loras = lineage.sources
    return {
        **checkpoint_metadata(replace(lineage, sources=(checkpoint,)), _KIND),
        "hyper_merge.loras": json.dumps(
            [
                {"name": source.name, "sha256": source.sha256, "multiplier": multiplier}
                for source, multiplier in zip(loras, application.multipliers, strict=True)
            ],
            ensure_ascii=False,
        ),
    }
