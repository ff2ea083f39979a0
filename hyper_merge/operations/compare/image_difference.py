"""Measures the difference of two pictures: in their pixels, and to the eye where LPIPS is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from PIL import Image

LEVELS: Final = 255
"""The largest difference of two pixels in one colour."""

AMPLIFIED: Final = 4
"""The factor by which a drawn difference is amplified, or it would hardly be visible."""

PERCEPTUAL: Final = "LPIPS"
"""The name of the second figure: 0 for pictures that look the same."""

_BACKBONE: Final = "alexnet-owt-*.pth"  # in torch's own cache
_LEAST_SIDE: Final = 64  # pixels: below, that network has nothing left to look at

Distance: TypeAlias = "Callable[[Image.Image, Image.Image], float]"


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    """Returns the mean absolute difference over all pixels and the three colours, 0..255.

    Raises:
        ValueError: the pictures are not of one size.
    """
    return float(_difference(one, other).mean())


def difference_picture(one: Image.Image, other: Image.Image) -> Image.Image:
    """Returns a picture of four times the difference; it is black where two pictures are equal.

    Raises:
        ValueError: the pictures are not of one size.
    """
    amplified = (_difference(one, other) * AMPLIFIED).clip(0, LEVELS)
    return Image.fromarray(amplified.astype(np.uint8))


def _difference(one: Image.Image, other: Image.Image) -> Any:  # (height, width, 3)
    if one.size != other.size:
        raise ValueError(f"expected pictures of one size, got {one.size} and {other.size}")
    first, second = (np.asarray(picture.convert("RGB"), dtype=np.int16) for picture in (one, other))
    return np.abs(first - second)


def perceptual_distance(size: tuple[int, int]) -> Distance | None:
    """Returns LPIPS (Zhang et al., 2018) with AlexNet, or None where it cannot be computed.

    It cannot be computed where the package or its network is not on this machine, since nothing is
    downloaded for the sake of a figure, nor for pictures that are too small for it.

    Args:
        size: width and height of the pictures in pixels.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if min(size) < _LEAST_SIDE or any(find_spec(name) is None for name in ("lpips", "torchvision")):
        return None
    return _lpips if any(folder.glob(_BACKBONE)) else None


@cache
def _network() -> Any:
    import lpips  # noqa: PLC0415 - hosts may have it; it takes seconds to load

    return lpips.LPIPS(net="alex", verbose=False).eval()


def _lpips(one: Image.Image, other: Image.Image) -> float:
    with torch.no_grad():
        return float(_network()(_as_input(one), _as_input(other)))


def _as_input(picture: Image.Image) -> torch.Tensor:  # (1, 3, height, width), -1..1
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return (pixels.permute(2, 0, 1)[None].float() / (LEVELS / 2)) - 1
