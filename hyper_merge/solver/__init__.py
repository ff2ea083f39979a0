"""Solves for LoRA factors, from compressed deviations to the numbers that files store."""
