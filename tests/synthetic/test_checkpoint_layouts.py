import math

from hyper_merge.synthetic.checkpoint_layouts import (
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    sd1_layout,
)


def count(layout, prefix):
    return sum(key.startswith(prefix) for key in layout)


def size(layout, prefix):
    return sum(
        math.prod(shape)
        for key, shape in layout.items()
        if key.startswith(prefix) and not key.endswith("position_ids")
    )


def test_the_full_layout_has_known_counts():
    layout = sd1_layout()
    assert [count(layout, p) for p in (UNET_PREFIX, TEXT_PREFIX, VAE_PREFIX)] == [686, 197, 248]
    assert size(layout, UNET_PREFIX) == 859_520_964  # as every model card says
    assert size(layout, TEXT_PREFIX) == 123_060_480
    assert size(layout, VAE_PREFIX) == 83_653_863


def test_a_narrow_layout_has_the_same_keys():
    narrow = sd1_layout(width=32, context=48, vocabulary=100, vae_width=16)
    assert list(narrow) == list(sd1_layout())
    assert all(len(narrow[key]) == len(shape) for key, shape in sd1_layout().items())
