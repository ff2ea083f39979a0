"""Compares pictures of a checkpoint with those of its reconstruction."""

from hyper_merge.operations.compare.compare import run_compare

__all__ = ["run_compare"]
