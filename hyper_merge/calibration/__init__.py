"""Measures how much the output of a checkpoint's network depends on each of its layers."""
