"""How a host reads the LoRA tags of a prompt."""

import re


def a1111(prompt):
    """The host's own parser: name, UNet's multiplier, text encoder's.

    Source: A1111 modules/extra_networks.py:175-191, extensions-builtin/Lora/extra_networks_lora.py.
    """
    tags = []
    for match in re.finditer(r"<(\w+):([^>]+)>", prompt):
        assert match[1] == "lora"
        positional = match[2].split(":")
        assert not any("=" in item for item in positional)
        te_multiplier = float(positional[1]) if len(positional) > 1 else 1.0
        unet_multiplier = float(positional[2]) if len(positional) > 2 else te_multiplier
        tags.append((positional[0], unet_multiplier, te_multiplier))
    return tags
