"""Where Hyper-Merge runs: AUTOMATIC1111's WebUI, Forge, or a folder of its own."""
