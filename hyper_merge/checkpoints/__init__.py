"""Checkpoint files: reading, writing, telling them apart; no mathematics, no devices."""
