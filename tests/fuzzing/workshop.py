"""A models folder with one valid file of every kind that is read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from fault_scenarios import write_sources
from PIL import Image
from safetensors.torch import load_file
from tiny_family import merge, recipe

from fuzzing.lora_inputs import FOLDER, write_lora_samples
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.sensitivities import write_sensitivities
from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.io.temporary_names import JOURNAL, LOCK
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.decomposition.sensitivity import Sensitivity
from hyper_merge.decomposition.stretch import Stretch
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.operations.compare.records import (
    ComparisonFigures,
    ComparisonRecord,
    save_comparison,
)
from hyper_merge.operations.compare.request import PictureSettings
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.request import key_place
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.checked_json import sealed
from hyper_merge.runtime.progress import Progress

_OWNER = "0123456789abcdef"
_RECIPE = """name: mix
models:
  - {root}/Stable-diffusion/a.safetensors
  - "{root}/Stable-diffusion/b.safetensors"
ranks: [4, 2]
weights: 1, 2.5
target: ~
budget:
topup: 95%
output: {root}
exact: all
device: cpu
seed: 7
tolerance: 1e-3
overwrite: no
"""
_CONFIGURATION = """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
    denoiser_config: {params: {scaling_config: {target: sgm.modules.VScaling}}}
"""


def _stretch(size: int) -> Stretch:
    """Returns a map that stretches the first direction."""
    return Stretch(torch.eye(size, 1).half(), torch.tensor([3.0]))


class Workshop:
    """The folder; files that an input replaces or removes come back with `restore`."""

    def __init__(self, root: Path) -> None:
        """Makes all files."""
        self.root = root
        self.folders = Folders.under(root)
        self.host = Standalone(root)
        write_sources(root)
        merge(self.sources[:3], root, ranks=(2, 1), iterations=1, exact="all")
        values = {"run": "mix", "checkpoint": self.sources[3], "topup": "2"}
        run_fit(FitRequest.parse(values, key_place), self.folders, Progress())
        self._write_pickles()
        self._save_comparison()
        header = read_header(self.sources[0])
        sensitivities = {
            layer.module: Sensitivity(0.5, 0.1, _stretch(layer.m), _stretch(layer.n))
            for layer in layout_of(header, require_supported(header)).layers
        }
        path = self.folders.cache / f"{'0' * 32}-0-2.sensitivities.safetensors"
        write_sensitivities(path, sensitivities, Progress().warn)
        (root / "mix.yaml").write_text(_RECIPE.format(root=root))
        (root / "Stable-diffusion/v.yaml").write_text(_CONFIGURATION)
        (root / "names").write_text("a\nb")
        self._write_journal()
        write_lora_samples(root / FOLDER, self.sources[0])
        self.inputs = self._inputs()
        self._files = {
            path: (path.read_bytes(), _stamp(path)) for path in root.rglob("*") if path.is_file()
        }

    @property
    def sources(self) -> list[Path]:
        """The checkpoints that were merged, and the one that was fitted."""
        return [self.root / "Stable-diffusion" / f"{name}.safetensors" for name in "abcd"]

    @property
    def journal(self) -> Path:
        """The journal of a transaction that a process did not bring to its end."""
        return self.root / "left" / f".hyper-merge-{_OWNER}{JOURNAL}"

    def cached(self, pattern: str) -> Path:
        """Returns the file of the cache whose name a pattern fits."""
        (path,) = (p for p in self._files if p.parent == self.folders.cache and p.match(pattern))
        return path

    def content(self, path: Path) -> bytes:
        """Returns the bytes of a valid sample."""
        return self._files[path][0]

    def put(self, path: Path, data: bytes) -> None:
        """Puts a file in the place of another, with all others as they were at first."""
        self.restore()
        path.write_bytes(data)

    def restore(self) -> None:
        """Writes all files that are not as they were, and removes those that were not there."""
        known = {folder for path in self._files for folder in path.parents}
        for path in sorted(self.root.rglob("*"), reverse=True):
            if path not in self._files and path not in known:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for path, (content, stamp) in self._files.items():
            if not path.exists() or _stamp(path) != stamp:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                os.utime(path, ns=stamp[:1] * 2)

    def changed(self, *but: Path) -> list[Path]:
        """Returns the files that are not as they were, other than some."""
        return [
            path
            for path, (content, _) in self._files.items()
            if path not in but and (not path.is_file() or path.read_bytes() != content)
        ]

    def _inputs(self) -> MergeInputs:
        settings = {"ranks": (2, 1), "exact": "all", "name": "other"}
        return run_preflight(recipe(self.sources[:3], self.root, **settings)).inputs

    def _write_pickles(self) -> None:
        state = load_file(self.sources[0])
        folder = self.root / "Stable-diffusion"
        torch.save({"state_dict": state, "epoch": 3}, folder / "e.ckpt")
        old = {"state_dict": state, "optimizer": {"lr": [1e-4]}}
        torch.save(old, folder / "old.ckpt", _use_new_zipfile_serialization=False)

        loop = {"best": np.float64(0.5), "array": np.zeros(3), "seen": {1, 2}}
        torch.save({"state_dict": state, "loops": loop}, folder / "f.ckpt")

    def _save_comparison(self) -> None:
        run = load_run(self.folders, "mix")
        figures = ComparisonFigures("a", "a cat", 1, {"restored": 1.5, "average": 3.0}, {})
        record = ComparisonRecord(
            *("mix", "comparison-1", run.created, "a test", "mix"),
            PictureSettings(("a cat",), seeds=(1, 2**32 - 1)),
            *({"a": "<lora:x:1>"}, {"a": "a.safetensors"}, ("a note",), (figures,)),
        )
        save_comparison(run, record, Image.new("RGB", (64, 48), "red"))

    def _write_journal(self) -> None:
        folder = self.journal.parent
        folder.mkdir()
        for name in ("new.txt", "kept.txt"):
            (folder / name).write_text(name)
        (folder / self.journal.with_suffix(LOCK).name).touch()
        kept = self.journal.with_name(f".hyper-merge-{_OWNER[:8]}{'1' * 8}.old")
        kept.write_text("before")
        status = (folder / "new.txt").stat()
        steps = [
            {
                "path": "new.txt",
                "kept": kept.name,
                "temporary": f".hyper-merge-{_OWNER[:8]}{'2' * 8}.tmp",
                "was_free": False,
                "written": [status.st_size, status.st_mtime_ns],
            },
            {
                "path": "gone.txt",
                "kept": kept.name,
                "temporary": "",
                "was_free": False,
                "written": [],
            },
        ]
        self.journal.write_text(sealed({"folders": [".", "../Lora"], "steps": steps}))


def _stamp(path: Path) -> tuple[int, int]:
    """Returns time of change and size of a file."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
