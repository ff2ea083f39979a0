"""Hyper-Merge: many Stable Diffusion checkpoints as one average and a few shared LoRAs."""

__version__ = "0.1.0"
