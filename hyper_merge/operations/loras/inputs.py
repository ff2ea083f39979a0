"""Recognises LoRA files of one base by their headers, and refuses what does not go together."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.checkpoints.architectures.families import KINDS
from hyper_merge.checkpoints.architectures.layout import Layer, Layout
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.compatibility import check_distinct
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.decomposition.contrasts import Contrasts, around_base
from hyper_merge.errors import CheckpointError, FamilyError, MismatchError
from hyper_merge.loras.input_keys import SpelledModule, split_keys
from hyper_merge.loras.input_modules import LoraModules
from hyper_merge.operations.loras.known_layers import KnownFamily, known_family, known_names
from hyper_merge.operations.loras.unfinished import require_complete

_ADVICE: Final = "choose LoRAs of one base"
_REMEMBERED: Final = 64  # files, each of which takes about a megabyte
_BASE: Final = "ss_base_model_version"
_SAME_BASE: Final = {"sdxl_base_v0-9": "sdxl_base_v1-0"}  # one architecture under two names
_PREDICTION: Final = "modelspec.prediction_type"
_TRAINED_ON: Final = "ss_sd_model_name"


@dataclass(frozen=True)
class LoraInputs(MergeInputs):
    """LoRA files as the inputs of a merge without a checkpoint: deviations from zero."""

    @cached_property
    def contrasts(self) -> Contrasts:
        """The coordinates of the LoRAs' changes: every file is one."""
        return around_base(len(self.headers))


@dataclass(frozen=True, eq=False)
class LoraSet:
    """LoRA files of one family.

    Attributes:
        known: Their family, with all layers of the network.
        files: The modules of every file.
        layers: Those that any file changes, and those that must be in a file with them, in the
            order of the computation.
        warnings: What the user should know.
    """

    known: KnownFamily
    files: tuple[LoraModules, ...]
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]

    @property
    def family(self) -> Family:
        """The family."""
        return self.known.family

    @property
    def headers(self) -> tuple[Header, ...]:
        """The headers of the files."""
        return tuple(file.header for file in self.files)

    def inputs(self, dtype: torch.dtype) -> LoraInputs:
        """Returns the files as the inputs of a merge."""
        layout = Layout(self.family, self.layers, {})
        return LoraInputs(self.headers, None, layout, (1.0,) * len(self.files), dtype)


def read_loras(paths: Sequence[Path], *, accepts_damaged: bool = False) -> LoraSet:
    """Returns the LoRAs of some files, by their headers and the ends of their data.

    Args:
        paths: of the files.
        accepts_damaged: whether files may be among them that look like unfinished downloads.

    Raises:
        CheckpointError: a file is missing, damaged, no LoRA, or holds what no factors hold.
        FamilyError: a file is of no family that is known.
        MismatchError: the files are of different families, by their shapes or by what they say.
    """
    headers = [read_header(path) for path in paths]
    found = [recognise(header) for header in headers]
    _require_equal(headers, [known.title for known, _ in found], "is a LoRA of")
    _require_same_words(headers)
    warnings = check_distinct(headers)
    warnings += _find_different_bases(headers)
    files = tuple(modules for _, modules in found)
    for file in files:
        require_complete(file, warnings.append, accepts_damaged=accepts_damaged)
    known = found[0][0]
    return LoraSet(known, files, _layers_of(known, files), tuple(warnings))


def recognise(header: Header) -> tuple[KnownFamily, LoraModules]:
    """Returns the family of a LoRA file, and its modules.

    Raises:
        CheckpointError: it is no LoRA, or holds what no factors hold.
        FamilyError: it fits no family; says by which module it misses the nearest one.
    """
    return _recognise(_HeaderAsKey(header))


class _HeaderAsKey:
    """A header that equals itself alone; a file that stays as it is has one header."""

    def __init__(self, header: Header) -> None:
        self.header = header

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HeaderAsKey) and other.header is self.header

    def __hash__(self) -> int:
        return id(self.header)


@functools.lru_cache(maxsize=_REMEMBERED)
def _recognise(key: _HeaderAsKey) -> tuple[KnownFamily, LoraModules]:
    header = key.header
    modules = split_keys(header)
    names = [module.name for module in modules]
    candidates = [known_family(name) for name in known_names()]
    unknown = [known.index.count_unknown(names) for known in candidates]
    fewest = min(unknown)
    nearest = [x for x, count in zip(candidates, unknown, strict=True) if count == fewest]
    if fewest:
        raise _unknown_module(header, modules, nearest[0], fewest)
    attempts = [_modules_or_fault(header, modules, known) for known in nearest]
    pairs = zip(nearest, attempts, strict=True)
    fitting = [(known, x) for known, x in pairs if isinstance(x, LoraModules)]
    if fitting:
        said = header.metadata.get(_BASE)
        own = [pair for pair in fitting if pair[0].family.ss_base_model_version == said]
        return max(own or fitting, key=lambda pair: _likelihood(pair[0], names))
    fault = next(attempt for attempt in attempts if isinstance(attempt, CheckpointError))
    titles = " or ".join(dict.fromkeys(known.title for known in nearest))
    raise FamilyError(
        f"{fault.message} (taken for {titles})", hint=fault.hint, file=header.path, key=fault.key
    )


def _likelihood(known: KnownFamily, names: Sequence[str]) -> tuple[bool, bool]:
    """Returns a key that is greater for the likelier of networks that have all modules of a file.

    Of the attention alone Flux has the names and sizes in diffusers that Qwen-Image has as its own.
    """
    return known.index.has_all_blocks(names), known.index.has_own_names(names)


def _modules_or_fault(
    header: Header, modules: Sequence[SpelledModule], known: KnownFamily
) -> LoraModules | CheckpointError:
    try:
        return LoraModules(header, modules, known.index)
    except CheckpointError as error:
        return error


def _unknown_module(
    header: Header, modules: Sequence[SpelledModule], known: KnownFamily, count: int
) -> FamilyError:
    first = next(module.name for module in modules if not known.index.find(module.name))
    if count == len(modules):
        return FamilyError(
            f"{header.name} is a LoRA of no architecture that is known here (first module: {first})",
            hint=f"choose LoRAs of {KINDS}, in kohya's, diffusers' or ComfyUI's spelling",
            file=header.path,
            key=first,
        )
    return FamilyError(
        f"{header.name} has {count} of {len(modules)} modules that {known.title} does not"
        f" have (first: {first})",
        hint="use a LoRA whose every module is known, or leave the file out",
        file=header.path,
        key=first,
    )


def _require_same_words(headers: Sequence[Header]) -> None:
    """Refuses files whose own words contradict each other, though their shapes do not."""
    versions = [header.metadata.get(_BASE, "") for header in headers]
    _require_equal(headers, [_SAME_BASE.get(x, x) for x in versions], f"says {_BASE}")
    predictions = [header.metadata.get(_PREDICTION, "") for header in headers]
    _require_equal(headers, predictions, f"says {_PREDICTION}")


def _require_equal(headers: Sequence[Header], words: Sequence[str], verb: str) -> None:
    """Refuses different words; an empty one says nothing."""
    first: dict[str, Header] = {}
    for header, word in zip(headers, words, strict=True):
        if word:
            first.setdefault(word, header)
    if len(first) > 1:
        parts = [f"{header.name} {verb} {word}" for word, header in first.items()]
        raise MismatchError(f"these LoRAs do not go together: {', '.join(parts)}", hint=_ADVICE)


def _find_different_bases(headers: Sequence[Header]) -> list[str]:
    """Returns a warning where files say that they were trained on different checkpoints."""
    names: dict[str, str] = {}
    for header in headers:
        name = header.metadata.get(_TRAINED_ON, "")
        if name:
            names.setdefault(name, header.name)
    if len(names) < 2:
        return []
    listed = ", ".join(f"{lora} on {base}" for base, lora in names.items())
    return [f"these LoRAs were trained on different checkpoints: {listed}"]


def _layers_of(known: KnownFamily, files: Sequence[LoraModules]) -> tuple[Layer, ...]:
    present: Mapping[str, Layer] = {
        name: layer for file in files for name, layer in file.layers.items()
    }
    return tuple(present.get(layer.module, layer) for layer in known.with_bundles(present))
