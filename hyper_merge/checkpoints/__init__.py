"""Checkpoint files: reading, writing and recognising them; no mathematics, no devices."""
