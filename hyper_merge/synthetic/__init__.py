"""Generates checkpoints in the layouts of real ones, for the demo, tests and benchmarks."""
