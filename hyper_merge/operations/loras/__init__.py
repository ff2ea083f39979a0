"""Takes LoRAs as input: shares many of one base, resizes, combines, adds to checkpoints."""
