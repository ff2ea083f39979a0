"""Reads checkpoints into their average and the compressed deviations of every layer."""
