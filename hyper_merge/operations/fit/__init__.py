"""Fits a checkpoint onto the LoRAs of a run."""

from hyper_merge.operations.fit.fit import run_fit

__all__ = ["run_fit"]
