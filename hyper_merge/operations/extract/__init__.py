"""Extracts a LoRA from two checkpoints."""

from hyper_merge.operations.extract.extract import run_extract

__all__ = ["run_extract"]
