"""The table of what is read: for each a valid sample, how it is damaged, and the code that reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from fuzzing import lora_readers, readers
from fuzzing.hostile_bytes import (
    damaged_bytes,
    damaged_checkpoint_pickle,
    damaged_safetensors,
)
from fuzzing.hostile_json import damaged_json, damaged_sealed, damaged_yaml
from fuzzing.lora_inputs import FOLDER
from fuzzing.workshop import Workshop
from hyper_merge.errors import HyperMergeError

Damage = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Target:
    """A file that is read.

    Attributes:
        name: Of what is read.
        file: Path of the valid sample within the workshop, which damaged ones take the place of.
        damage: Returns the bytes of a damaged file.
        read: Reads it, and uses all that was read.
        cost: Inputs of the cheapest target that take as long as one of this.
    """

    name: str
    file: Callable[[Workshop], Path]
    damage: Damage
    read: Callable[[Workshop, Path], object]
    cost: int = 1

    def damaged(self, workshop: Workshop, number: int) -> bytes:
        """Returns the input of a number, always the same one."""
        random = Random(f"{self.name} {number}")
        damage = damaged_bytes if random.random() < 0.15 else self.damage
        return damage(workshop.content(self.file(workshop)), random)

    def is_taken(self, workshop: Workshop, data: bytes) -> bool:
        """Has an input read; returns False where it is refused as it should be.

        Raises:
            Exception: a fault.
        """
        path = self.file(workshop)
        workshop.put(path, data)
        try:
            self.read(workshop, path)
        except HyperMergeError as error:
            str(error).encode()  # nothing that a screen or a log could not show
            return False
        return True


def _checkpoint(name: str) -> Callable[[Workshop], Path]:
    return lambda workshop: workshop.root / "Stable-diffusion" / name


def _of_run(name: str) -> Callable[[Workshop], Path]:
    return lambda workshop: workshop.root / "hyper-merge/mix" / name


def _cached(pattern: str) -> Callable[[Workshop], Path]:
    return lambda workshop: workshop.cached(pattern)


def _of_loras(name: str) -> Callable[[Workshop], Path]:
    return lambda workshop: workshop.root / FOLDER / name


def _lora(name: str) -> Callable[[Workshop], Path]:
    return lambda workshop: workshop.root / "Lora" / name


TARGETS: Final = (
    Target("checkpoint", _checkpoint("a.safetensors"), damaged_safetensors, readers.checkpoint),
    Target(
        "checkpoint, merged", _checkpoint("a.safetensors"), damaged_safetensors, readers.merged, 9
    ),
    Target(
        "hyper-model", _checkpoint("mix.safetensors"), damaged_safetensors, readers.run_restored, 5
    ),
    Target("pickle", _checkpoint("e.ckpt"), damaged_checkpoint_pickle, readers.checkpoint),
    Target("pickle of old", _checkpoint("old.ckpt"), damaged_checkpoint_pickle, readers.checkpoint),
    Target("pickle of numpy", _checkpoint("f.ckpt"), damaged_checkpoint_pickle, readers.checkpoint),
    Target("configuration", _checkpoint("v.yaml"), damaged_yaml, readers.configuration),
    Target("LoRA", _lora("mix_0-2.safetensors"), damaged_safetensors, readers.lora, 2),
    Target("companion", _lora("mix_0-2-exact.safetensors"), damaged_safetensors, readers.lora, 2),
    Target(
        "private LoRA",
        lambda w: next((w.root / "Lora").glob("mix_fit-d-*.safetensors")),
        damaged_safetensors,
        readers.run_restored,
        5,
    ),
    Target("manifest", _of_run("manifest.json"), damaged_json, readers.run),
    Target("fit record", _of_run("fits/d.json"), damaged_json, readers.run),
    Target("manifest, restored", _of_run("manifest.json"), damaged_json, readers.run_restored, 5),
    Target("fit record, restored", _of_run("fits/d.json"), damaged_json, readers.run_restored, 5),
    Target("plots of a manifest", _of_run("manifest.json"), damaged_json, readers.plots, 40),
    Target("comparison", _of_run("pictures/comparison-1.json"), damaged_json, readers.comparison),
    Target(
        "grid of pictures", _of_run("pictures/comparison-1.png"), damaged_bytes, readers.comparison
    ),
    Target("analysis", _cached("*.analysis.safetensors"), damaged_safetensors, readers.analysis),
    Target(
        "analysis, merged", _cached("*.analysis.safetensors"), damaged_safetensors, readers.rerun, 9
    ),
    Target("solutions", _cached("*.solutions.json"), damaged_sealed, readers.analysis),
    Target("solutions, merged", _cached("*.solutions.json"), damaged_sealed, readers.rerun, 9),
    Target(
        "sensitivities",
        _cached("*.sensitivities.safetensors"),
        damaged_safetensors,
        readers.sensitivities,
    ),
    Target("hashes", _cached("hashes.json"), damaged_sealed, readers.hashes),
    Target("recipe", lambda workshop: workshop.root / "mix.yaml", damaged_yaml, readers.recipe),
    Target("journal", lambda workshop: workshop.journal, damaged_sealed, readers.journal),
    Target("use marker", _cached("*.used"), damaged_bytes, readers.caches),
    Target(
        "file names", lambda workshop: workshop.root / "names", readers.damaged_names, readers.names
    ),
    *(
        Target(
            f"input LoRA, {name}",
            _of_loras(f"inputs/{name}.safetensors"),
            damaged_safetensors,
            lora_readers.factors,
        )
        for name in ("a", "lycoris", "peft")
    ),
    *(
        Target(
            f"input LoRA, {read.__name__}",
            _of_loras(f"inputs/{name}.safetensors"),
            damaged_safetensors,
            read,
            cost,
        )
        for read, name, cost in (
            (lora_readers.combined, "lycoris", 9),
            (lora_readers.shared, "a", 9),
            (lora_readers.added, "tiny", 3),
        )
    ),
    Target(
        "run of LoRAs", _of_loras("hyper-merge/mix/loras.json"), damaged_json, lora_readers.run, 3
    ),
    Target(
        "fit of a LoRA",
        _of_loras("hyper-merge/mix/fits/c.json"),
        damaged_json,
        lora_readers.run,
        3,
    ),
    Target(
        "shared LoRA", _of_loras("Lora/mix_0-2.safetensors"), damaged_safetensors, lora_readers.run
    ),
    Target("presets", _of_loras("hyper-merge/presets.json"), damaged_sealed, lora_readers.presets),
)
