"""From compressed deviations to LoRA factors as they are stored."""
