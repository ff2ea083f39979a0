"""Architectures of checkpoints: family, layout, names of the modules in LoRA files."""
