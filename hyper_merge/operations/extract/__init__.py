"""Extracts the difference of two checkpoints as a LoRA."""
