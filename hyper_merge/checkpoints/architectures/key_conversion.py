"""Converts headers of other spellings to the standard keys and shapes, and joins 8-bit floats' scales.

All other modules see one spelling, so that such files merge with others of their family, and what
is written loads everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch

from hyper_merge.checkpoints.architectures.families import DIFFUSERS_LAYOUTS, find_family
from hyper_merge.checkpoints.architectures.signatures import LABELS, TEXTS, UNET, KeySignature
from hyper_merge.checkpoints.io.header import Header, Shape, TensorInfo

_WEIGHT: Final = ".weight"
_CLIP: Final = "cond_stage_model.transformer."
_SGM: Final = "conditioner.embedders.0.model."
_BARE: Final = (
    *("input_blocks.0.0.", "double_blocks.0.img_attn.qkv.", "joint_blocks.0.x_block."),
    *("noise_refiner.0.attention.", "blocks.0.mlp.layer1.", "txt_norm.", "blocks.0.ffn.0."),
)
# Before the keys of a network in place of the usual prefix.
_PREFIXES: Final = ("net.", "diffusion_model.", "model.model.")
_OF_A_LORA: Final = (".lora_A.weight", ".lora_down.weight", ".diff", ".diff_b")
_NORMS: Final = UNET + "distilled_guidance_layer.norms."
_MOST_NORMS: Final = 10  # Chroma has five
# Around the transformers of an LDM UNet: convolutions or matrices, by the family.
_PROJECTIONS: Final = (".proj_in.weight", ".proj_out.weight")
# An OpenCLIP text encoder multiplies by this matrix from the right; diffusers' converter leaves it as the
# weight of a linear layer, which is its transpose.
_ENCODERS: Final = ("conditioner.embedders.1.model.", _SGM, "cond_stage_model.model.")
_PROJECTION: Final = "text_projection"
_LAST_NORM: Final = ".adaLN_modulation.1"
_MARKERS: Final = ("v_pred", "ztsnr", "edm_")
_OTHERS: Final = (*TEXTS, *_MARKERS, "first_stage_model.", "vae.", "model_ema.")
# ComfyUI's two names for the number that an 8-bit weight is multiplied by, and what goes with them:
# the scale of the layer's input, marks of the whole network. Files without scales have none of it.
_SCALES: Final = (".scale_weight", ".weight_scale")
_SCALED: Final = (*_SCALES, "scaled_fp8")
_SCALING: Final = (*_SCALED, ".scale_input", ".input_scale", ".comfy_quant")


@dataclass(frozen=True)
class _Rename:
    """Parts of keys that stand for others in some files, and how such a file is recognised."""

    applies: Callable[[KeySignature], bool]
    prefixes: tuple[tuple[str, str], ...] = ()  # in the file, standard
    suffixes: tuple[tuple[str, str], ...] = ()
    exceptions: tuple[str, ...] = ()  # keys that begin so stay


def _without(prefix: str) -> _Rename:
    """Returns the rename of networks whose keys begin with another prefix than the usual one."""
    starts = tuple(prefix + start for start in _BARE)
    return _Rename(lambda s: s.has(*starts), ((prefix, UNET),))


_RENAMES: Final = (
    *(_without(prefix) for prefix in _PREFIXES),
    # A network alone, as Flux and SD 3 are often given away.
    _Rename(lambda s: s.has(*_BARE) and not s.has(UNET), (("", UNET),), exceptions=_OTHERS),
    # Files of 2022 that older tools saved.
    _Rename(
        lambda s: s.has(_CLIP + "encoder.layers."),
        tuple(
            (_CLIP + part, f"{_CLIP}text_model.{part}")
            for part in ("encoder.", "embeddings.", "final_layer_norm.")
        ),
    ),
    # Flux and Chroma as ComfyUI saves them, whose norms are torch's own.
    _Rename(
        lambda s: s.has(UNET + "double_blocks.0."),
        tuple((f"{_NORMS}{i}{_WEIGHT}", f"{_NORMS}{i}.scale") for i in range(_MOST_NORMS)),
        tuple((f".{part}_norm{_WEIGHT}", f".{part}_norm.scale") for part in ("query", "key")),
    ),
    # SD 2 in the spelling of SDXL's repository: SD-Turbo.
    _Rename(
        lambda s: s.has(_SGM) and not s.has(LABELS, "conditioner.embedders.1."),
        ((_SGM, "cond_stage_model.model."),),
    ),
)


def with_standard_keys(header: Header) -> Header:
    """Returns the header with the standard keys and shapes; itself where it has them, or is a LoRA's.

    Scales are no longer among its tensors: a weight that has one counts as float32, and
    `CheckpointReader.tensor` multiplies and reshapes it.
    """
    if any(key.endswith(_OF_A_LORA) for key in header.tensors):
        return header  # its names look like a network's under another prefix
    signature = KeySignature.from_header(header)
    header = _joined(header) if signature.mentions(*_SCALED) else header
    for rename in _RENAMES:
        if rename.applies(signature):
            header = _renamed(header, rename)
            signature = KeySignature.from_header(header)
    header = _from_diffusers(_with_usual_projection(header))
    signature = KeySignature.from_header(header)
    shapes = dict(_shapes(header, signature))
    return _reshaped(header, shapes) if shapes else header


def _shapes(header: Header, signature: KeySignature) -> Iterator[tuple[str, Shape]]:
    """Yields key and standard shape of every projection that some tool saved in the other shape."""
    family = find_family(signature)
    projections = [key for key in header.tensors if key.endswith(_PROJECTIONS)]
    for part in family.parts if family else ():
        for key in projections:
            if key.startswith(part.prefix):
                stored = header.tensors[key].shape
                path = key.removeprefix(part.prefix).removesuffix(_WEIGHT)
                for module in part.modules(path, stored):
                    if module.shape != stored and math.prod(module.shape) == math.prod(stored):
                        yield key, module.shape


def _reshaped(header: Header, shapes: Mapping[str, Shape]) -> Header:
    changed = {key: replace(header.tensors[key], shape=shape) for key, shape in shapes.items()}
    return replace(header, tensors={**header.tensors, **changed})


def _renamed(header: Header, rename: _Rename) -> Header:
    names = {key: _name(key, rename) for key in (*header.tensors, *header.unsupported)}
    if len(set(names.values())) < len(names):
        return header  # both spellings in one file: nothing is sure
    if all(key == name for key, name in names.items()):
        return header
    stored = {name: header.stored.get(key, key) for key, name in names.items() if key != name}
    return replace(
        header,
        tensors={names[key]: info for key, info in header.tensors.items()},
        unsupported={names[key]: kind for key, kind in header.unsupported.items()},
        stored={**header.stored, **stored},
        scales={names[key]: scale for key, scale in header.scales.items()},
    )


def _with_usual_projection(header: Header) -> Header:
    """Returns the header with text projections under their usual keys, to be transposed when read."""
    for encoder in _ENCODERS:
        usual, linear = encoder + _PROJECTION, encoder + _PROJECTION + _WEIGHT
        info = header.tensors.get(linear)
        if info is not None and len(info.shape) == 2:
            rename = _Rename(lambda _: True, ((linear, usual),))
            renamed = _renamed(header, rename)
            if renamed is not header:
                turned = {usual: info.shape[::-1]}
                keys = header.transposed | {usual}
                header = replace(_reshaped(renamed, turned), transposed=keys)
    return header


def _from_diffusers(header: Header) -> Header:
    """Returns the header of a transformer in diffusers' layout with the checkpoint's tensors.

    Quantised files keep their layout, and are refused by it.
    """
    prefix = UNET if any(key.startswith(UNET) for key in header.tensors) else ""
    own = {
        key.removeprefix(prefix): header.stored.get(key, key)
        for key in header.tensors
        if key.startswith(prefix) and (prefix or not key.startswith(_OTHERS))
    }
    if header.scales or header.unsupported or header.rounded_as:
        return header
    sources = (layout.sources(own) for layout in DIFFUSERS_LAYOUTS)
    found = next((x for x in sources if x is not None), None)
    if found is None:
        return header
    infos = {
        key: _joint_info([header.tensors[prefix + x] for x in xs]) for key, xs in found.items()
    }
    if None in infos.values():
        return header
    stored = {key: tuple(own[part] for part in parts) for key, parts in found.items()}
    others = {k: x for k, x in header.tensors.items() if k.removeprefix(prefix) not in own}
    tensors = {UNET + key: info for key, info in infos.items() if info is not None}
    return replace(
        header,
        tensors={**tensors, **others},
        parts={UNET + key: parts for key, parts in stored.items() if len(parts) > 1},
        stored={
            **{key: x for key, x in header.stored.items() if key in others},
            **{UNET + key: parts[0] for key, parts in stored.items() if len(parts) == 1},
        },
        turned=frozenset(_turned(tensors)),
    )


def _joint_info(parts: list[TensorInfo]) -> TensorInfo | None:
    """Returns type and shape of the tensor that some are rows of; None where they do not go together."""
    if len({(info.dtype, info.shape[1:]) for info in parts}) > 1 or not parts[0].shape:
        return parts[0] if len(parts) == 1 else None
    rows = sum(info.shape[0] for info in parts)
    return TensorInfo(parts[0].dtype, (rows, *parts[0].shape[1:]))


def _turned(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Yields the keys of last norms, which make shift and scale: diffusers has scale and shift."""
    for key, info in tensors.items():
        stem = key.removesuffix(_WEIGHT)
        is_matrix = key.endswith(_LAST_NORM + _WEIGHT) and len(info.shape) == 2
        if is_matrix and info.shape[0] == 2 * info.shape[1]:
            yield from (x for x in (key, stem + ".bias") if x in tensors)


def _name(key: str, rename: _Rename) -> str:
    for old, new in rename.prefixes:
        if key.startswith(old) and not key.startswith(rename.exceptions):
            return new + key.removeprefix(old)
    for old, new in rename.suffixes:
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _joined(header: Header) -> Header:
    scales = dict(_scales(header.tensors))
    kept = {
        key: info
        for key, info in header.tensors.items()
        if not key.endswith(_SCALING) or (key.endswith(_SCALES) and key not in scales.values())
    }  # a scale of another kind stays, and is refused later
    joined = {key: TensorInfo(torch.float32, kept[key].shape) for key in scales}
    return replace(header, tensors={**kept, **joined}, scales=scales)


def _scales(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    """Yields the key of every weight that has a scale, or one for each row, and the scale's key."""
    for key in tensors:
        end = next((end for end in _SCALES if key.endswith(end)), None)
        weight = tensors.get(key.removesuffix(end) + _WEIGHT) if end else None
        fits = weight and weight.dtype.is_floating_point and weight.shape
        if end and weight and fits and tensors[key].numel in (1, weight.shape[0]):
            yield key.removesuffix(end) + _WEIGHT, key
