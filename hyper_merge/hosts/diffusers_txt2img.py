"""Pictures by diffusers, for the app without a WebUI: one checkpoint at a time, its LoRAs beside it."""

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
from hyper_merge.hosts.host import GeneratorInfo
from hyper_merge.loras.prompt_tags import Tag, parse_tags, remove_tags
from hyper_merge.operations.compare.compare import ImageGenerator
from hyper_merge.operations.compare.request import Picture
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress

NEEDED: Final = ("diffusers", "transformers", "peft", "accelerate")
CONFIGURATIONS: Final = "diffusers"
"""Folder beside the runs: a family's configuration in diffusers' layout, where it cannot be fetched."""

_EXTRA: Final = "pip install 'hyper-merge[pictures]'"


class _Sampler(NamedTuple):
    """Of diffusers, under the name that WebUIs have for it."""

    kind: str
    settings: Mapping[str, Any]


_SAMPLERS: Final[Mapping[str, _Sampler]] = {
    "DPM++ 2M Karras": _Sampler("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M": _Sampler("DPMSolverMultistepScheduler", {}),
    "Euler": _Sampler("EulerDiscreteScheduler", {}),
    "Euler a": _Sampler("EulerAncestralDiscreteScheduler", {}),
    "DDIM": _Sampler("DDIMScheduler", {"clip_sample": False}),
}


class _Kind(NamedTuple):
    """How diffusers draws with a family."""

    pipeline: str
    encoders: tuple[str, ...]  # components that take a LoRA's text half
    settings: Mapping[str, Any]


_UNCHECKED: Final = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
_SD: Final = _Kind("StableDiffusionPipeline", ("text_encoder",), _UNCHECKED)
_SDXL: Final = _Kind("StableDiffusionXLPipeline", ("text_encoder", "text_encoder_2"), {})
_KINDS: Final[Mapping[str, _Kind]] = {
    "sd1": _SD,
    "sd2": _SD,
    "sd2_v": _SD,
    "sdxl": _SDXL,
    "sdxl_v": _SDXL,
}

_log = logging.getLogger(__name__)


def atelier() -> GeneratorInfo:
    """The samplers, or what is to be installed first."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        return GeneratorInfo(
            problem=f"Pictures need {', '.join(absent)}; install them with: {_EXTRA}"
        )
    return GeneratorInfo(tuple(_SAMPLERS))


@contextmanager
def studio(folders: Folders) -> Iterator[ImageGenerator]:
    """What makes pictures; afterwards nothing is left in memory.

    Raises:
        PictureError: diffusers is not installed.
    """
    problem = atelier().problem
    if problem:
        raise PictureError(problem)
    painter = _Painter(folders)
    try:
        yield ImageGenerator("diffusers", painter.draw, refusal)
    finally:
        painter.forget()


def refusal(path: Path) -> str:
    """Why a checkpoint cannot be loaded; empty where it can."""
    try:
        family = _family(path)
    except CheckpointError as error:
        return str(error)
    if family.name not in _KINDS:
        return f"{path.name} is a {family.title} checkpoint, with which the app cannot draw"
    return ""


class _Painter:
    """The pipeline of one checkpoint, and the LoRAs that it holds."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._model: Path | None = None
        self._pipeline: Any = None
        self._kind = _SD
        self._adapters: dict[str, str] = {}  # by the LoRA's name

    def draw(self, picture: Picture, progress: Progress) -> Image.Image:
        """The picture; between its steps it hears that it is to stop."""
        with _explained(picture.model, self._folders), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries, on their own future
            self._load(picture.model)
            self._take(_tags(picture.prompt))
            return self._run(picture, progress)

    def forget(self) -> None:
        """Gives the memory back."""
        self._model = self._pipeline = None
        self._adapters = {}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, model: Path) -> None:
        if model == self._model:
            return
        self.forget()
        import diffusers  # noqa: PLC0415 - an extra, which takes seconds to load

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        family = _family(model)
        self._kind = _KINDS[family.name]
        # The configuration is fetched where it is not here; the weights never.
        config = configuration(self._folders, family)
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

    def _take(self, tags: list[Tag]) -> None:
        """Adds the LoRAs of these tags to the model, and takes all others away."""
        for each in tags:
            if each.name not in self._adapters:
                adapter = f"lora_{len(self._adapters)}"  # a name may hold dots, an adapter's not
                self._pipeline.load_lora_weights(
                    str(_lora(self._folders, each.name)), adapter_name=adapter
                )
                self._adapters[each.name] = adapter
        if tags:
            self._pipeline.enable_lora()
            scales = [
                {"unet": each.multiplier} | dict.fromkeys(self._kind.encoders, each.text_multiplier)
                for each in tags
            ]
            self._pipeline.set_adapters([self._adapters[each.name] for each in tags], scales)
        elif self._adapters:
            self._pipeline.disable_lora()

    def _run(self, picture: Picture, progress: Progress) -> Image.Image:
        import diffusers  # noqa: PLC0415 - an extra

        settings = picture.settings
        sampler = _SAMPLERS[settings.sampler]
        kind = getattr(diffusers, sampler.kind)
        # Anew for every picture: it keeps what it has seen.
        self._pipeline.scheduler = kind.from_config({**self._schedule, **sampler.settings})

        def on_step(_pipeline: Any, step: int, _time: Any, values: dict[str, Any]) -> Any:
            progress.report("", min((step + 1) / settings.steps, 1.0))
            return values

        made = self._pipeline(
            prompt=remove_tags(picture.prompt),
            negative_prompt=settings.negative,
            num_inference_steps=settings.steps,
            guidance_scale=settings.cfg_scale,
            width=settings.width,
            height=settings.height,
            generator=torch.Generator("cpu").manual_seed(picture.seed),
            callback_on_step_end=on_step,
        )
        return made.images[0]


def configuration(folders: Folders, family: Family) -> Path:
    """Where a family's configuration and tokenizer are looked for before they are fetched."""
    return folders.runs / CONFIGURATIONS / family.name


def _family(path: Path) -> Family:
    header = read_header(path)
    return with_prediction_type(header, require_supported(header))


def _tags(prompt: str) -> list[Tag]:
    try:
        return parse_tags(prompt)
    except ValueError as error:
        raise PictureError(f"{error}", hint="correct it in the prompt") from error


def _lora(folders: Folders, name: str) -> Path:
    path = folders.loras / f"{name}.safetensors"
    if path.name != f"{name}.safetensors" or not path.is_file():
        raise PictureError(f"there is no LoRA {name} in {folders.loras}", hint="correct the prompt")
    return path


@contextmanager
def _explained(model: Path, folders: Folders) -> Iterator[None]:
    """What diffusers raises, as a message with what to do; in full in the log."""
    try:
        yield
    except HyperMergeError:
        raise
    except Exception as error:  # whatever the libraries may raise
        _log.exception("diffusers failed with %s", model.name)
        first = str(error).strip().partition("\n")[0]
        raise PictureError(
            f"diffusers cannot draw with {model.name} ({type(error).__name__}: {first}). The first time"
            " it fetches configuration and tokenizer from huggingface.co: be online, or put them into"
            f" {configuration(folders, _family(model))}"
        ) from error
