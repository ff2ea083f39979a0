"""From checkpoint files to their average and the compressed deviations of every layer."""
