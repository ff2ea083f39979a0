"""Implements the hosts AUTOMATIC1111's WebUI and Forge."""
