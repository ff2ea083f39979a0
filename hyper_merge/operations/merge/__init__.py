"""Merges checkpoints into a hyper-model and shared LoRAs."""

from hyper_merge.operations.merge.merge import run_merge

__all__ = ["run_merge"]
