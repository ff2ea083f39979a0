"""Whole checkpoints of every family, narrow and of full size: keys and shapes, no tensors."""

import re

from hyper_merge.synthetic.checkpoint_layouts import sd1_layout, sd2_layout, sdxl_layout, under
from hyper_merge.synthetic.family_layouts import flux_layout, refiner_layout, sd3_layout
from hyper_merge.synthetic.mmdit_layouts import FluxShape, JointShape
from hyper_merge.synthetic.transformer_layouts import (
    anima,
    chroma,
    flux2,
    lumina2,
    qwen_image,
    wan,
    z_image,
)

UNET = "model.diffusion_model."
JOINT = JointShape(blocks=3, head=4, context=8, labels=6, positions=4)
FLUX = {"double": 2, "single": 2, "width": 8, "head": 4, "context": 8, "labels": 6, "channels": 4}

EDM = {"edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1)}
EDM_V = {"edm_vpred.sigma_max": (), "edm_vpred.sigma_min": ()}


def joint(**changes):
    return sd3_layout(JointShape(**{**vars(JOINT), **changes}), 4)


def with_channels(layout, channels):
    return lambda: layout(input_channels=channels)


def one(**settings):
    return sd1_layout(**{"width": 16, "context": 24, "vocabulary": 20, "vae_width": 4, **settings})


def two(**settings):
    return sd2_layout(**{"width": 16, "context": 24, "vocabulary": 20, "vae_width": 4, **settings})


def xl(**settings):
    sizes = {"width": 16, "contexts": (8, 16), "vocabulary": 20, "vae_width": 4}
    return sdxl_layout(**{**sizes, **settings})


def alone(transformer, *arguments, **settings):
    """Returns what makes the layout of a transformer alone."""
    return lambda: under(UNET, transformer(*arguments, **settings))


EDIT = {UNET + "__index_timestep_zero__": (0,)}

NARROW = {
    "sd1": one,
    "sd1_inpainting": with_channels(one, 9),
    "sd1_pix2pix": with_channels(one, 8),
    "sd2": two,
    "sd2_inpainting": with_channels(two, 9),
    "sd2_depth": with_channels(two, 5),
    "sdxl": xl,
    "sdxl_inpainting": with_channels(xl, 9),
    "sdxl_pix2pix": with_channels(xl, 8),
    "sdxl_edm": lambda: {**xl(), **EDM},
    "sdxl_edm_v": lambda: {**xl(), **EDM_V},
    "sdxl_refiner": lambda: refiner_layout(16, 24, 20, 4),
    "sd3_medium": joint,
    "sd35_medium": lambda: joint(second_attention=2, normed=True),
    "sd35_large": lambda: joint(normed=True),
    "flux_dev": lambda: flux_layout(FluxShape(**FLUX)),
    "flux_schnell": lambda: flux_layout(FluxShape(**FLUX, guidance=False)),
    "chroma": alone(chroma, FluxShape(**FLUX, guidance=False), 8),
    "flux2_klein": alone(flux2, 8, (2, 2), 8, head=4, channels=4),
    "flux2_dev": alone(flux2, 8, (2, 2), 8, guidance=True, head=4, channels=4),
    "z_image": alone(z_image, 12, 2, 4),
    "lumina_2": alone(lumina2, 12, 2, 4),
    "anima": alone(anima, 8, 2, 8, 20),
    "qwen_image": alone(qwen_image, 8, 2, 8, 4),
    "qwen_image_edit_2511": lambda: {**under(UNET, qwen_image(8, 2, 8, 4)), **EDIT},
    "wan": alone(wan, 8, 12, 2, 4),
    "wan_i2v": alone(wan, 8, 12, 2, 4, reads_image=True),
}

FULL = {
    "sd1": sd1_layout,
    "sd1_inpainting": with_channels(sd1_layout, 9),
    "sd1_pix2pix": with_channels(sd1_layout, 8),
    "sd2": sd2_layout,
    "sd2_inpainting": with_channels(sd2_layout, 9),
    "sd2_depth": with_channels(sd2_layout, 5),
    "sdxl": sdxl_layout,
    "sdxl_inpainting": with_channels(sdxl_layout, 9),
    "sdxl_pix2pix": with_channels(sdxl_layout, 8),
    "sdxl_edm": lambda: {**sdxl_layout(), **EDM},
    "sdxl_edm_v": lambda: {**sdxl_layout(), **EDM_V},
    "sdxl_refiner": refiner_layout,
    "sd3_medium": sd3_layout,
    "sd35_medium": lambda: sd3_layout(JointShape(positions=384, second_attention=13, normed=True)),
    "sd35_large": lambda: sd3_layout(JointShape(blocks=38, normed=True)),
    "flux_dev": flux_layout,
    "flux_schnell": lambda: flux_layout(FluxShape(guidance=False)),
    "chroma": alone(chroma),
    "flux2_klein": alone(flux2),
    "flux2_dev": alone(flux2, 6144, (8, 48), 15360, guidance=True),
    "z_image": alone(z_image),
    "lumina_2": alone(lumina2),
    "anima": alone(anima),
    "qwen_image": alone(qwen_image),
    "qwen_image_edit_2511": lambda: {**under(UNET, qwen_image()), **EDIT},
    "wan": alone(wan),
    "wan_i2v": alone(wan, channels=36, reads_image=True),
}


# What `few` leaves out of a UNet and its text encoders: blocks of which others of the kind remain.
REPEATED = re.compile(
    r"model\.diffusion_model\."
    r"(?!(time_embed|label_emb|input_blocks\.[0134]|middle_block|output_blocks\.(2\.0|11)|out)\.)"
    r"(?!.*\.(norm1|op)\.bias$).*"
    r"|.*_blocks\.\d+\.1\.transformer_blocks\.[1-8]\.(?!norm1\.bias).*"
    r"|.*\.(layers\.([2-9]|10)|resblocks\.([5-9]|1\d|2[0-1]|2[4-9]|30))\..*"
)


def few(shapes):
    """Keeps a few blocks of each kind and what identifies a family: a merge takes a quarter."""
    if not any("input_blocks." in key for key in shapes):
        return shapes
    return {key: shape for key, shape in shapes.items() if not REPEATED.fullmatch(key)}


def renamed(shapes, old, new):
    return {key.replace(old, new, 1): shape for key, shape in shapes.items()}


def parts(shapes, *prefixes):
    return {key: shape for key, shape in shapes.items() if key.startswith(prefixes)}


def without(shapes, *fragments):
    return {key: v for key, v in shapes.items() if not any(f in key for f in fragments)}


def other_way_round(shapes):
    """Swaps matrices and 1x1 convolutions around the transformers of the family."""
    projections = ("proj_in.weight", "proj_out.weight")
    return {
        key: (shape[:2] if len(shape) == 4 else (*shape, 1, 1))
        if key.startswith(UNET) and key.endswith(projections)
        else shape
        for key, shape in shapes.items()
    }
