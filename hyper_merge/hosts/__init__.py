"""Adapts Hyper-Merge to its host: AUTOMATIC1111's WebUI, Forge, or the app without a WebUI."""
