"""Splits the keys of LoRA files of any trainer into modules, and says what each tensor is in its module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from hyper_merge.checkpoints.io.header import Header
from hyper_merge.errors import CheckpointError

_ROLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        # kohya's scripts and LyCORIS
        ".lora_up.weight": "up",
        ".lora_down.weight": "down",
        ".lora_mid.weight": "mid",
        ".alpha": "alpha",
        ".diff": "whole",
        **{f".hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        **{
            f".lokr_{name}": f"k_{name}"
            for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        },
        # PEFT, and diffusers of today and of 2023
        ".lora_B.weight": "up",
        ".lora_A.weight": "down",
        ".lora_B.default.weight": "up",
        ".lora_A.default.weight": "down",
        ".lora.up.weight": "up",
        ".lora.down.weight": "down",
        "_lora.up.weight": "up",
        "_lora.down.weight": "down",
        ".lora_linear_layer.up.weight": "up",
        ".lora_linear_layer.down.weight": "down",
    }
)
"""What a tensor is in its module, by the end of its key."""

_DORA: Final = "DoRA scales the weights of its base, which are not in the file"
_NO_MATRIX: Final = "a change of norms or biases, which no factors hold"
_MULTIPLIES: Final = "a change that is multiplied with the weights of its base, which are not here"
_REFUSED: Final = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector)(\.default)?(\.weight)?"), _DORA),
    (re.compile(r"\.(diff_b|w_norm|b_norm|bias_(indices|values|size)|lora_B\.bias)"), _NO_MATRIX),
    (re.compile(r"\.(oft_(blocks|diag|R(\.\w+)?)|on_input|[ab][12])(\.weight)?"), _MULTIPLIES),
    (re.compile(r"\.set_weight"), "a weight that replaces the one of its base"),
)
_FIRST: Final = ("base_model.model.", "lora_adapter.")
_PROCESSOR: Final = re.compile(r"\.processor(?=\.|$)")


@dataclass(frozen=True)
class SpelledModule:
    """One module of a file, under the name that the file gives it.

    Attributes:
        name: As the file spells it, without the tensors' ends.
        keys: The tensors' keys by what they are: "up", "down", "mid", "alpha", "whole"; "w1_a" and
            so on of a LoHa; "k_w1" and so on of a LoKr.
    """

    name: str
    keys: Mapping[str, str]


def split_keys(header: Header) -> tuple[SpelledModule, ...]:
    """Returns the modules of a LoRA file, in the file's order.

    Raises:
        CheckpointError: the file is no LoRA, or holds a tensor that no plain LoRA can take over; it
            is named, with the reason.
    """
    modules: dict[str, dict[str, str]] = {}
    for key in (*header.tensors, *header.unsupported):
        end = _end_of(key)
        if end is None:
            raise _refused(key, header)
        name = module_name(key.removesuffix(end))
        roles = modules.setdefault(name, {})
        role = _ROLES[end]
        if role in roles:
            raise CheckpointError(
                f"{header.name} holds {name} twice, as {roles[role]} and as {key}",
                hint="use a file with one spelling",
                file=header.path,
                key=key,
            )
        roles[role] = key
    if not any(set(roles) - {"alpha"} for roles in modules.values()):
        raise CheckpointError(
            f"{header.name} holds no LoRA", hint="choose LoRA files", file=header.path
        )
    return tuple(SpelledModule(name, roles) for name, roles in modules.items())


def module_name(spelled: str) -> str:
    """Returns a module's name without what frameworks put around it."""
    for first in _FIRST:
        spelled = spelled.removeprefix(first)
    return _PROCESSOR.sub("", spelled)


def _end_of(key: str) -> str | None:
    """Returns the longest known end of a key; None for a key without one."""
    ends = [end for end in _ROLES if key.endswith(end) and len(key) > len(end)]
    return max(ends, key=len, default=None)


def _refused(key: str, header: Header) -> CheckpointError:
    for pattern, reason in _REFUSED:
        if match := re.search(pattern.pattern + "$", key):
            return CheckpointError(
                f"{header.name} holds {key[: match.start()]}{match[0]}: {reason}",
                hint="use a LoRA that is plain factors: LoRA, LoCon, LoHa or LoKr",
                file=header.path,
                key=key,
            )
    return CheckpointError(
        f"{header.name} holds {key}, which is no tensor of a LoRA",
        hint="choose a LoRA of kohya's, diffusers' or ComfyUI's spelling",
        file=header.path,
        key=key,
    )
