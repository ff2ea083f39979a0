"""Checkpoint files: headers, tensors in, tensors out, whole or not at all."""
