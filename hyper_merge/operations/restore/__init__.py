"""Restores a checkpoint from a hyper-model and LoRAs."""

from hyper_merge.operations.restore.restore import run_restore

__all__ = ["run_restore"]
