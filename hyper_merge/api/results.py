"""Makes the results of jobs that make no run; files are named without their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hyper_merge.operations.compare.records import ComparisonRecord
from hyper_merge.operations.deletable import DeletionReport
from hyper_merge.operations.export import ExportResult
from hyper_merge.operations.extract.extract import ExtractResult
from hyper_merge.operations.loras.apply import ApplyResult
from hyper_merge.operations.loras.combine import CombineResult
from hyper_merge.operations.restore.restore import RestoreResult

Result = dict[str, Any]


def restore_result(restored: RestoreResult) -> Result:
    """Returns the written file, and how close it is to its original."""
    compared = restored.compared
    return {
        "file": restored.path.name,
        "size": restored.size,
        "dtype": restored.dtype,
        "shares": dict(restored.shares),
        "explained_in_weights": None if compared is None else compared.explained,
        "everything_in_weights": None if compared is None else compared.everything,
        "problem": restored.problem,
    }


def export_result(loras: Sequence[ExportResult]) -> Result:
    """Returns the written LoRAs."""
    return {
        "loras": [
            {
                "checkpoint": lora.checkpoint,
                "name": lora.path.stem,
                "companions": lora.companions,
                "rank": lora.rank,
                "size": lora.size,
                "explained": lora.explained,
                "lost": lora.lost,
            }
            for lora in loras
        ]
    }


def extract_result(lora: ExtractResult) -> Result:
    """Returns the written LoRA, and the share that it explains."""
    return {
        "name": lora.path.stem,
        "rank": lora.rank,
        "size": lora.size,
        "explained": lora.explained,
        "parts": dict(lora.parts),
        "not_carried": dict(lora.not_carried),
    }


def safe_result(report: DeletionReport) -> Result:
    """Returns yes or no for every original."""
    originals = [
        {name: value for name, value in asdict(verdict).items() if name != "path"}
        for verdict in report.verdicts
    ]
    return {"originals": originals, "frees": report.frees, "problem": report.problem}


def compare_result(record: ComparisonRecord) -> Result:
    """Returns the comparison's name, and its figures."""
    return {
        "name": record.name,
        "notes": list(record.notes),
        "figures": [asdict(figures) for figures in record.figures],
        "measure": record.measure,
    }


def combine_result(lora: CombineResult) -> Result:
    """Returns the written LoRA, and how much of the exact sum it holds."""
    return {
        "name": lora.path.stem,
        "size": lora.size,
        "size_before": lora.size_before,
        "rank": lora.rank,
        "kept": lora.kept,
        "parts": dict(lora.parts),
    }


def apply_result(applied: ApplyResult) -> Result:
    """Returns the written checkpoint, and how much LoRAs changed it."""
    return {
        "file": applied.path.name,
        "size": applied.size,
        "layers": applied.layers,
        "changed": applied.changed,
    }


def average_result(path: Path) -> Result:
    """Returns the written file."""
    return {"file": path.name, "size": path.stat().st_size}
