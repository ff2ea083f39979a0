"""Merges checkpoints into a hyper-model and shared LoRAs."""
