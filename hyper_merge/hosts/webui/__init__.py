"""AUTOMATIC1111's WebUI and its kin as hosts."""
