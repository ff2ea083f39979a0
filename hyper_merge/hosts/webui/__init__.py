"""Implements AUTOMATIC1111's WebUI and its relatives as hosts."""
