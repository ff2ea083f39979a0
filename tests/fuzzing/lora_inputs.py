"""A folder with LoRAs of every spelling, a run that shares some, and a checkpoint to add them to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from lora_files import CONV, DIFFUSERS, KEY, OUT, QUERY, factors, kohya, share, spelled, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.loras.fit import run_lora_fit
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.presets import save_preset
from hyper_merge.runtime.progress import Progress

FOLDER = "of LoRAs"
"""Name of the folder beside the others, so that the runs of LoRAs stand apart."""

_MODULES = (QUERY, KEY)
_PROJECTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_ADAPTER = {
    "unet.lora_alpha": 4,
    "unet.r": 2,
    "unet.use_rslora": True,
    "unet.alpha_pattern": {DIFFUSERS[KEY].removeprefix("unet."): 2},
}


def write_lora_samples(root: Path, checkpoint: Path) -> None:
    """Writes a models folder with valid samples.

    Args:
        root: of the models folder, which is made.
        checkpoint: a tiny one.
    """
    inputs = root / "inputs"
    inputs.mkdir(parents=True)
    pairs = [factors(2, seed, _MODULES) for seed in range(3)]
    paths = [
        write(inputs / f"{name}.safetensors", kohya(pair, 1.0))
        for name, pair in zip("abc", pairs, strict=True)
    ]
    write(inputs / "lycoris.safetensors", _lycoris())
    peft = spelled(pairs[0], DIFFUSERS, "lora_B.weight", "lora_A.weight")
    metadata = {"lora_adapter_metadata": json.dumps(_ADAPTER)}
    write(inputs / "peft.safetensors", peft, metadata)
    save_file(_for_checkpoint(load_file(checkpoint)[_PROJECTION]), inputs / "tiny.safetensors")
    share(paths[:2], root, ranks=(2, 1), iterations=1)
    run_lora_fit(FitRequest("mix", paths[2]), Folders.under(root), Progress())
    save_preset(root / "hyper-merge", "mine", {"ranks": "4, 2", "models": ["a", "b"]})


def _lycoris() -> Mapping[str, Tensor]:
    """Returns tensors of every kind that LyCORIS writes."""
    torch.manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape) / 50

    parts = {
        QUERY: {
            **{f"hada_w{i}_{side}": some(*s) for i in "12" for side, s in _sides(2, 320).items()},
        },
        KEY: {
            "lokr_w1": some(4, 8),
            "lokr_w2_a": some(80, 2),
            "lokr_w2_b": some(2, 96),
        },
        OUT: {"diff": some(320, 320)},
        CONV: {
            "lora_up.weight": some(320, 2, 1, 1),
            "lora_down.weight": some(2, 320, 1, 1),
            "lora_mid.weight": some(2, 2, 3, 3),
        },
        CONV.replace("conv1", "conv2"): {
            **{f"hada_w{i}_{side}": some(2, 320) for i in "12" for side in "ab"},
            **{f"hada_t{i}": some(2, 2, 3, 3) for i in "12"},
        },
        CONV.replace("resnets_0_conv1", "resnets_1_conv1"): {
            "lokr_w1_a": some(4, 2),
            "lokr_w1_b": some(2, 4),
            "lokr_t2": some(2, 2, 3, 3),
            "lokr_w2_a": some(2, 80),
            "lokr_w2_b": some(2, 80),
        },
    }
    state = {f"{module}.{end}": x for module, some in parts.items() for end, x in some.items()}
    return state | {f"{module}.alpha": torch.tensor(1.0) for module in parts if module != OUT}


def _sides(rank: int, size: int) -> dict[str, tuple[int, int]]:
    return {"a": (size, rank), "b": (rank, size)}


def _for_checkpoint(weight: Tensor) -> dict[str, Tensor]:
    """Returns a LoRA for one layer of the checkpoint."""
    m, n = weight.shape
    return {
        f"{KEY}.lora_up.weight": torch.ones(m, 1).half(),
        f"{KEY}.lora_down.weight": torch.ones(1, n).half(),
        f"{KEY}.alpha": torch.tensor(1.0),
    }
