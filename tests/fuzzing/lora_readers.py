"""What reads LoRAs of others, runs that share LoRAs, and presets, and uses all that it read."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from lora_files import share

from fuzzing.lora_inputs import FOLDER
from fuzzing.workshop import Workshop
from hyper_merge.errors import HyperMergeError
from hyper_merge.loras.input_lora import InputLora
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.inspect import inspect_files
from hyper_merge.operations.loras.apply import run_apply
from hyper_merge.operations.loras.combine import run_combine
from hyper_merge.operations.loras.fit import run_lora_fit
from hyper_merge.operations.loras.fit_text import format_lora_fit
from hyper_merge.operations.loras.inputs import read_loras
from hyper_merge.operations.loras.request import ApplyRequest, CombineRequest
from hyper_merge.operations.loras.text import format_application, format_combination, format_share
from hyper_merge.runs.fit_records import load_fits, prompts_of, styles_of
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.lora_runs import is_lora_run, load_lora_run
from hyper_merge.runs.presets import delete_preset, load_presets, save_preset
from hyper_merge.runs.report_text import format_report
from hyper_merge.runtime.progress import Progress


def factors(_workshop: Workshop, path: Path) -> None:
    """Reads a LoRA of any trainer module by module."""
    with suppress(HyperMergeError):
        inspect_files(path)
    loras = read_loras([path])
    with InputLora(loras.files[0]) as lora:
        for name, layer in lora.modules.items():
            up, down = lora.factors(name)
            assert (len(up), down.shape[1]) == (layer.m, layer.n)
            assert up.isfinite().all()
            assert down.isfinite().all()


def combined(_workshop: Workshop, path: Path) -> None:
    """Combines a LoRA with another one, whole and cut to a rank."""
    other = path.with_name("b.safetensors")
    for rank in (None, 1):
        request = CombineRequest((path, other), rank=rank, to=path.with_name(f"{rank}.safetensors"))
        result = run_combine(request, Progress())
        assert math.isfinite(result.kept)
        format_combination(result).encode()


def shared(workshop: Workshop, path: Path) -> None:
    """Shares a LoRA with another one."""
    root = workshop.root / FOLDER
    result = share([path, path.with_name("b.safetensors")], root, name="new", iterations=1)
    format_share(result).encode()


def added(workshop: Workshop, path: Path) -> None:
    """Adds a LoRA to a checkpoint."""
    to = path.with_name("new.safetensors")
    result = run_apply(ApplyRequest((path,), to=to, checkpoint=workshop.sources[0]), Progress())
    assert math.isfinite(result.changed)
    format_application(result).encode()


def run(workshop: Workshop, path: Path) -> None:
    """Shows a run that shares LoRAs, and fits a LoRA onto it."""
    folders = Folders.under(workshop.root / FOLDER)
    folders.lora_files_of("mix")
    folders.fit_files_of("mix")
    folders.lora_owners()
    assert is_lora_run(folders, "mix")
    run = load_lora_run(folders, "mix")
    format_report(run.report, of_loras=True).encode()
    fits, _ = load_fits(run)
    for fit in fits:
        format_lora_fit(fit, run).encode()
    for text in (*prompts_of(run).values(), *styles_of(run)):
        text.encode()
    request = FitRequest("mix", folders.runs.parent / "inputs/c.safetensors", overwrite=True)
    record = run_lora_fit(request, folders, Progress())
    format_lora_fit(record, run).encode()


def presets(_workshop: Workshop, path: Path) -> None:
    """Lists, adds and deletes presets."""
    for name, settings in load_presets(path.parent).items():
        assert dict(settings) is not None
        assert isinstance(name, str)
    save_preset(path.parent, "new", {"a": 1})
    assert "new" in load_presets(path.parent)
    delete_preset(path.parent, "new")
