"""Compares pictures that a checkpoint draws with those of its reconstruction."""

from hyper_merge.operations.compare.compare import run_compare

__all__ = ["run_compare"]
