"""Reads and writes LoRA files, their metadata and cards, and the tags that use them."""
