"""Work on a tiny models folder that is tried with faults."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from lora_files import KEY, QUERY, share, write_lora
from safetensors.torch import load_file
from tiny_family import TINY, merge, write

from hyper_merge.checkpoints.io.transaction import FileTransaction
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.loras.apply import run_apply
from hyper_merge.operations.loras.combine import run_combine
from hyper_merge.operations.loras.fit import run_lora_fit
from hyper_merge.operations.loras.request import ApplyRequest, CombineRequest
from hyper_merge.operations.restore.request import RestoreRequest
from hyper_merge.operations.restore.restore import run_restore
from hyper_merge.recipe.request import key_place
from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.writer import tensors

# What marks a file as SD 1.x, with a few layers: each tensor is read several times.
_KEPT: Final = re.compile(
    r"model\.diffusion_model\.(input_blocks\.(0\.0\.weight|[369]\.0\.op\.bias"
    r"|[147]\.1\.transformer_blocks\.0\.norm1\.bias"
    r"|1\.1\.transformer_blocks\.0\.attn2\.to_[kq]\.weight)"
    r"|middle_block\.1\.transformer_blocks\.0\.attn2\.to_k\.weight|out\.2\.weight)"
    r"|.*text_model\.encoder\.layers\.0\.mlp\.fc1\.weight|first_stage_model\.quant_conv\.weight"
)
_PROJECTION: Final = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@dataclass(frozen=True)
class Scenario:
    """Work on a models folder.

    Attributes:
        name: Of the work.
        before: What was done before it.
        work: Itself.
        every_kind: Whether each use is tried with every kind of error, not with one of them.
    """

    name: str
    before: tuple[Callable[[Path], object], ...]
    work: Callable[[Path], object]
    every_kind: bool = False


def write_sources(root: Path) -> None:
    """Writes a models folder of four tiny checkpoints, and files of others."""
    (root / "Stable-diffusion").mkdir(parents=True)
    (root / "Lora").mkdir()
    exact = {key: stack for key, stack in tensors(replace(TINY, count=4)) if _KEPT.fullmatch(key)}
    for c, path in enumerate(_sources(root)):
        state = {
            key: stack[c].to(torch.float16 if stack.is_floating_point() else stack.dtype)
            for key, stack in exact.items()
        }
        write(path, {key: tensor.contiguous() for key, tensor in state.items()})
    (root / "Lora/mix_notes.txt").write_text("mine")
    (root / "Lora/mine.safetensors").write_bytes(b"mine")


def _sources(root: Path) -> list[Path]:
    return [root / "Stable-diffusion" / f"{name}.safetensors" for name in "abcd"]


def _change(root: Path) -> None:
    """Changes files in several folders in one transaction."""
    with FileTransaction(overwrite=True) as outputs:
        outputs.text(root / "Lora/mix_notes.txt", "new")
        outputs.text(root / "new/deep.txt", "new")
        outputs.text(root / "Lora/deep.txt", "new")
        outputs.remove(root / "Lora/mine.safetensors")
        outputs.remove(root / "Stable-diffusion/d.safetensors")


def _change_without_links(root: Path) -> None:
    """Does the same on a file system without hard links, such as FAT."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.link = refuse
    _change(root)


def _merge(root: Path, *which: int, **settings: Any) -> None:
    files = _sources(root)
    settings = {"ranks": (2, 1), "iterations": 1, "method": "greedy", **settings}
    merge([files[i] for i in which or (0, 1, 2)], root, **settings)


def _rerun(root: Path) -> None:
    _merge(root, ranks=(1,))


def _overwrite(root: Path) -> None:
    _merge(root, 2, 1, ranks=(3,), overwrite=True)


def _fit(root: Path) -> None:
    values = {"run": "mix", "checkpoint": _sources(root)[3], "topup": "2"}
    run_fit(FitRequest.parse(values, key_place), Folders.under(root), Progress())


def _restore(root: Path) -> None:
    values = {"run": "mix", "shares": {"a": 1.0}}
    run_restore(RestoreRequest.parse(values, key_place), Folders.under(root), Progress())


def write_loras(root: Path) -> None:
    """Writes three LoRAs into the folder of LoRAs."""
    for seed, path in enumerate(lora_paths(root)):
        write_lora(path, seed, rank=2, modules=(QUERY, KEY))


def lora_paths(root: Path) -> list[Path]:
    """Returns the paths of these LoRAs."""
    return [root / "Lora" / f"{name}.safetensors" for name in ("one", "two", "three")]


def _share(root: Path, *which: int, **settings: Any) -> None:
    files = lora_paths(root)
    settings = {"name": "few", "ranks": (2, 1), "iterations": 1, "topup": "1", **settings}
    share([files[i] for i in which or (0, 1)], root, **settings)


def _share_again(root: Path) -> None:
    _share(root, 1, 0, ranks=(3,), topup=None, overwrite=True)


def _fit_lora(root: Path) -> None:
    run_lora_fit(FitRequest("few", lora_paths(root)[2]), Folders.under(root), Progress())


def _combine(root: Path) -> None:
    run_combine(CombineRequest(tuple(lora_paths(root)), rank=1), Progress())


def _add(root: Path) -> None:
    to = root / "Stable-diffusion/new.safetensors"
    run_apply(
        ApplyRequest((root / "Lora/tiny.safetensors",), checkpoint=_sources(root)[0], to=to),
        Progress(),
    )


def _write_tiny_lora(root: Path) -> None:
    m, n = load_file(_sources(root)[0])[_PROJECTION].shape
    ends = {"up": torch.ones(m, 1), "down": torch.ones(1, n)}
    state = {f"{KEY}.lora_{end}.weight": tensor for end, tensor in ends.items()}
    write(root / "Lora/tiny.safetensors", state)


def _delete(root: Path) -> None:
    folders = Folders.under(root)
    delete_run(load_run(folders, "mix"), folders)


SCENARIOS: Final = (
    Scenario("transaction", (), _change, every_kind=True),
    Scenario("transaction without links", (), _change_without_links, every_kind=True),
    Scenario("merge", (), _merge),
    Scenario("re-run", (_merge,), _rerun),
    Scenario("fit", (_merge,), _fit),
    Scenario("restore", (_merge,), _restore),
    Scenario("overwrite", (_merge, _fit), _overwrite),
    Scenario("deletion", (_merge, _fit), _delete),
    Scenario("sharing", (write_loras,), _share),
    Scenario("sharing again", (write_loras, _share, _fit_lora), _share_again),
    Scenario("fit of a LoRA", (write_loras, _share), _fit_lora),
    Scenario("combination", (write_loras,), _combine),
    Scenario("addition", (_write_tiny_lora,), _add),
)
