"""AUTOMATIC1111's WebUI and Forge as hosts."""
