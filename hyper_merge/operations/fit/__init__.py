"""Fits a further checkpoint to the LoRAs of a run."""
