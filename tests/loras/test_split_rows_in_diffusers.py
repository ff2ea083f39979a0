"""The rows of every module that diffusers splits or renames are those of diffusers' conversion of checkpoints."""

import warnings

import pytest
import torch
from narrow_layouts import FULL, UNET

from hyper_merge.checkpoints.architectures.detection import detect_family
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.loras.module_names import ModuleIndex

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the library, on being imported
    converters = pytest.importorskip("diffusers.loaders.single_file_utils")

# Family: how the converter's name begins, and how many of diffusers' modules are of a layer.
CASES = {
    "flux_dev": ("flux_transformer_checkpoint", 19 * 14 + 38 * 6 + 10),
    "flux_schnell": ("flux_transformer_checkpoint", 19 * 14 + 38 * 6 + 8),
    "chroma": ("chroma_transformer_checkpoint", 19 * 12 + 38 * 5),
    "sd3_medium": ("sd3_transformer_checkpoint", 24 * 14 - 3),
    "sd35_large": ("sd3_transformer_checkpoint", 38 * 14 - 3),
    "sd35_medium": ("sd3_transformer_checkpoint", 24 * 14 - 3 + 13 * 4),
    "z_image": ("z_image_transformer_checkpoint", 34 * 7 + 32),
    "lumina_2": ("lumina2", 30 * 7 + 28),
    "flux2_klein": ("flux2_transformer_checkpoint", 8 * 12 + 24 * 2 + 3),
    "wan": ("wan_transformer", 400),
    "wan_i2v": ("wan_transformer", 480),
}
STEP = 1_000_000  # more than any matrix has rows


def numbered_rows(shapes):
    """Returns tensors of one column that say of each row where it stands: place of the key * STEP + row."""
    return {
        key.removeprefix(UNET): torch.arange(shape[0]).reshape(-1, *(1,) * (len(shape) > 1))
        + place * STEP
        for place, (key, shape) in enumerate(shapes.items())
    }


def rows_of(place):
    """Returns the rows of the stored matrix in the order in which the module of a file has them."""
    first = (place.layer.rows or (0, 0))[0]
    rows = torch.arange(*place.rows) + first
    return torch.cat(rows.chunk(2)[::-1]) if place.swapped else rows


@pytest.mark.parametrize("name", CASES)
def test_every_row_is_where_diffusers_takes_it_from(name):
    kind, count = CASES[name]
    convert = getattr(converters, f"convert_{kind}_to_diffusers", None)
    if convert is None:
        pytest.skip("this version of diffusers does not convert it")
    shapes = {key: shape for key, shape in FULL[name]().items() if key.startswith(UNET)}
    tensors = {key: TensorInfo(torch.bfloat16, shape) for key, shape in shapes.items()}
    header = Header("x.safetensors", tensors, {}, 0, 0)
    layout = layout_of(header, detect_family(header))
    index = ModuleIndex(layout.layers, layout.family)
    layers, keys = {layer.key for layer in layout.layers}, list(shapes)
    compared = 0
    for key, tensor in convert(numbered_rows(shapes)).items():
        if not key.endswith(".weight") or tensor.dim() != 2:
            continue
        stored = keys[int(tensor[0, 0]) // STEP]
        places = index.find(f"transformer.{key.removesuffix('.weight')}")
        assert bool(places) == (stored in layers), key
        for place in places:
            assert place.layer.key == stored
            assert torch.equal(rows_of(place), tensor[:, 0] % STEP), key
            compared += 1
    assert compared == count
