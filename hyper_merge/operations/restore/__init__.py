"""Restores a checkpoint from a hyper-model and LoRAs."""
