"""Compares pictures of a checkpoint with those of its reconstruction."""
