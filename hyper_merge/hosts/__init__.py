"""The programs around Hyper-Merge: AUTOMATIC1111's WebUI, Forge, or the app without a WebUI."""
