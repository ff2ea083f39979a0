"""Draws with diffusers for the app without a WebUI: one checkpoint at a time, with its LoRAs."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from PIL import Image

from hyper_merge.checkpoints.architectures.detection import Family, require_supported
from hyper_merge.checkpoints.prediction_type import with_prediction_type
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError, HyperMergeError, PictureError
from hyper_merge.hosts.diffusers_companions import CompanionChanges, is_companion
from hyper_merge.hosts.host import GeneratorInfo
from hyper_merge.loras.prompt_tags import Tag, parse_tags, remove_tags
from hyper_merge.operations.compare.compare import ImageGenerator
from hyper_merge.operations.compare.request import Picture
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress

PACKAGES: Final = ("diffusers", "transformers", "peft", "accelerate")
CONFIGURATIONS: Final = "diffusers"
"""The folder next to the runs with configurations in diffusers' layout, for use without a network."""

_EXTRA: Final = "python -m pip install -c constraints.txt -e '.[app,pictures]'"


class _Sampler(NamedTuple):
    """The scheduler of diffusers, with its settings, for a sampler that WebUIs know by name."""

    scheduler: str
    settings: Mapping[str, Any]


_SAMPLERS: Final[Mapping[str, _Sampler]] = {
    "DPM++ 2M Karras": _Sampler("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M": _Sampler("DPMSolverMultistepScheduler", {}),
    "Euler": _Sampler("EulerDiscreteScheduler", {}),
    "Euler a": _Sampler("EulerAncestralDiscreteScheduler", {}),
    "DDIM": _Sampler("DDIMScheduler", {"clip_sample": False}),
}


class _PipelineKind(NamedTuple):
    """The pipeline by which diffusers draws with a family, and its settings."""

    pipeline: str
    encoders: tuple[str, ...]  # components that take a LoRA's text half
    settings: Mapping[str, Any]


_UNCHECKED: Final = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
_SD: Final = _PipelineKind("StableDiffusionPipeline", ("text_encoder",), _UNCHECKED)
_SDXL: Final = _PipelineKind("StableDiffusionXLPipeline", ("text_encoder", "text_encoder_2"), {})
_PIPELINES: Final[Mapping[str, _PipelineKind]] = {
    "sd1": _SD,
    "sd2": _SD,
    "sd2_v": _SD,
    "sdxl": _SDXL,
    "sdxl_v": _SDXL,
}

_log = logging.getLogger(__name__)


def describe_diffusers() -> GeneratorInfo:
    """Returns the samplers, or which packages must be installed first."""
    absent = [name for name in PACKAGES if find_spec(name) is None]
    if absent:
        return GeneratorInfo(
            problem=f"Pictures need {', '.join(absent)}; install them with: {_EXTRA}"
        )
    return GeneratorInfo(tuple(_SAMPLERS))


@contextmanager
def open_diffusers(folders: Folders) -> Iterator[ImageGenerator]:
    """Yields a generator that draws with diffusers; frees all its memory afterwards.

    Args:
        folders: where the LoRAs are that prompts name.

    Raises:
        PictureError: diffusers is not installed.
    """
    problem = describe_diffusers().problem
    if problem:
        raise PictureError(problem)
    pipeline = _Pipeline(folders)
    try:
        yield ImageGenerator("diffusers", pipeline.draw, why_not_drawable)
    finally:
        pipeline.unload()


def why_not_drawable(path: Path) -> str:
    """Returns why diffusers cannot draw with a checkpoint; empty where it can."""
    try:
        family = _read_family(path)
    except CheckpointError as error:
        return str(error)
    if family.name not in _PIPELINES:
        return f"{path.name} is a {family.title} checkpoint, with which the app cannot draw"
    return ""


class _Pipeline:
    """The pipeline of one checkpoint, and the LoRAs that it holds."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._model: Path | None = None
        self._pipeline: Any = None
        self._kind = _SD
        self._adapters: dict[str, str] = {}  # by the LoRA's name
        self._companions: CompanionChanges | None = None

    def draw(self, picture: Picture, progress: Progress) -> Image.Image:
        """Draws a picture; it can be stopped between two steps."""
        with _errors_explained(picture.model, self._folders), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within the libraries
            self._load(picture.model)
            self._apply_loras(_tags_of(picture.prompt))
            return self._run(picture, progress)

    def unload(self) -> None:
        """Frees the memory."""
        self._model = self._pipeline = self._companions = None
        self._adapters = {}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, model: Path) -> None:
        if model == self._model:
            return
        self.unload()
        import diffusers  # noqa: PLC0415 - an extra, which takes seconds to load

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        family = _read_family(model)
        self._kind = _PIPELINES[family.name]
        # The configuration is fetched where it is not here; the weights never.
        config = configuration_folder(self._folders, family)
        has_gpu = torch.cuda.is_available()
        self._pipeline = getattr(diffusers, self._kind.pipeline).from_single_file(
            str(model),
            config=str(config) if config.is_dir() else None,
            torch_dtype=torch.float16 if has_gpu else torch.float32,
            **self._kind.settings,
        )
        self._pipeline.to("cuda" if has_gpu else "cpu")
        self._pipeline.set_progress_bar_config(disable=True)
        prediction = {"prediction_type": "v_prediction" if family.predicts_v else "epsilon"}
        self._schedule = {**self._pipeline.scheduler.config, **prediction}
        self._model = model

    def _apply_loras(self, tags: list[Tag]) -> None:
        """Adds the LoRAs of these tags to the model, and takes all others away."""
        paths = {tag.name: _find_lora(self._folders, tag.name) for tag in tags}
        companions = [tag for tag in tags if is_companion(paths[tag.name])]
        tags = [tag for tag in tags if tag not in companions]
        for tag in tags:
            if tag.name not in self._adapters:
                adapter = f"lora_{len(self._adapters)}"  # a name may hold dots, an adapter's not
                self._pipeline.load_lora_weights(str(paths[tag.name]), adapter_name=adapter)
                self._adapters[tag.name] = adapter
        if tags:
            self._pipeline.enable_lora()
            scales = [
                {"unet": tag.multiplier} | dict.fromkeys(self._kind.encoders, tag.text_multiplier)
                for tag in tags
            ]
            self._pipeline.set_adapters([self._adapters[tag.name] for tag in tags], scales)
        elif self._adapters:
            self._pipeline.disable_lora()
        if companions and self._companions is None and self._model is not None:
            self._companions = CompanionChanges(self._pipeline.unet, self._model)
        if self._companions is not None:
            self._companions.apply([(paths[tag.name], tag.multiplier) for tag in companions])

    def _run(self, picture: Picture, progress: Progress) -> Image.Image:
        import diffusers  # noqa: PLC0415 - an extra

        settings = picture.settings
        sampler = _SAMPLERS[settings.sampler]
        scheduler = getattr(diffusers, sampler.scheduler)
        # A new one for every picture: it keeps a state.
        self._pipeline.scheduler = scheduler.from_config({**self._schedule, **sampler.settings})

        def on_step(_pipeline: Any, step: int, _time: Any, values: dict[str, Any]) -> Any:
            progress.report("", min((step + 1) / settings.steps, 1.0))
            return values

        output = self._pipeline(
            prompt=remove_tags(picture.prompt),
            negative_prompt=settings.negative,
            num_inference_steps=settings.steps,
            guidance_scale=settings.cfg_scale,
            width=settings.width,
            height=settings.height,
            generator=torch.Generator("cpu").manual_seed(picture.seed),
            callback_on_step_end=on_step,
        )
        return output.images[0]


def configuration_folder(folders: Folders, family: Family) -> Path:
    """Returns where a family's configuration and tokenizer are looked for before they are fetched."""
    return folders.runs / CONFIGURATIONS / family.name


def _read_family(path: Path) -> Family:
    header = read_header(path)
    return with_prediction_type(header, require_supported(header))


def _tags_of(prompt: str) -> list[Tag]:
    try:
        return parse_tags(prompt)
    except ValueError as error:
        raise PictureError(f"{error}", hint="correct it in the prompt") from error


def _find_lora(folders: Folders, name: str) -> Path:
    path = folders.loras / f"{name}.safetensors"
    if path.name != f"{name}.safetensors" or not path.is_file():
        raise PictureError(f"there is no LoRA {name} in {folders.loras}", hint="correct the prompt")
    return path


@contextmanager
def _errors_explained(model: Path, folders: Folders) -> Iterator[None]:
    """Turns errors of diffusers into a message with advice; the log has them in full."""
    try:
        yield
    except HyperMergeError:
        raise
    except Exception as error:  # the libraries may raise anything
        _log.exception("diffusers failed with %s", model.name)
        line = str(error).strip().partition("\n")[0].removesuffix(".") or type(error).__name__
        raise PictureError(
            f"diffusers cannot draw with {model.name} ({line}). The first time"
            " it fetches configuration and tokenizer from huggingface.co: be online, or put them into"
            f" {configuration_folder(folders, _read_family(model))}"
        ) from error
