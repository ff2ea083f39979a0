"""`modules.processing` and `modules.sd_samplers`: a picture is noise that its model and prompt decide."""

import hashlib
import re
import threading
import time
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import numpy as np
from PIL import Image

SAMPLERS = ("DPM++ 2M", "Euler a", "DDIM")


def samplers():
    module = ModuleType("sd_samplers")
    module.visible_sampler_names = lambda: list(SAMPLERS)
    return module


class Processing(ModuleType):
    """The request for pictures in any host; tests look at `drawn` and `loads`."""

    def __init__(self, webui):
        super().__init__("processing")
        self._webui = webui
        self.drawn = []  # file of the model, prompt, seed, thread
        self.loads = []  # files, each time that another one was loaded for a picture
        self.pace = 0.0  # seconds of a step
        self.fails_with = None  # file's name: an error that loading it raises
        self.complaints = {}  # of every picture
        self.closed = 0
        self.on_step = None  # called within every step of a picture

        @dataclass(repr=False)
        class StableDiffusionProcessingTxt2Img:
            """The fields that all hosts have, in their order as far as positions go."""

            sd_model: object = None
            outpath_samples: str = None
            outpath_grids: str = None
            prompt: str = ""
            prompt_for_display: str = None
            negative_prompt: str = ""
            styles: list = None
            seed: int = -1
            subseed: int = -1
            sampler_name: str = None
            scheduler: str = None
            batch_size: int = 1
            n_iter: int = 1
            steps: int = 50
            cfg_scale: float = 7.0
            width: int = 512
            height: int = 512
            do_not_save_samples: bool = False
            do_not_save_grid: bool = False
            override_settings: dict = None
            override_settings_restore_afterwards: bool = True
            enable_hr: bool = False
            scripts: object = field(default=None, init=False)

            def __post_init__(self):
                self.styles = self.styles or []
                self.override_settings = self.override_settings or {}
                self.comments = {}

            def close(this):  # noqa: N805 - the module is `self` here
                self.closed += 1

        self.StableDiffusionProcessingTxt2Img = StableDiffusionProcessingTxt2Img

    def process_images(self, p):
        opts = self._webui.opts
        stored = {key: opts.data[key] for key in p.override_settings if key in opts.data}
        lazy = self._webui.lazy
        try:
            model = self._forge_model(p) if lazy else self._a1111_model(p)
            if self._webui.threaded:
                self._webui.sd_models.manager.load_models_gpu([model])
            return self._images(p, model)
        finally:
            if p.override_settings_restore_afterwards:
                if lazy:
                    self._set_config(stored)
                else:
                    opts.data.update(stored)

    def _a1111_model(self, p):
        sd_models, opts = self._webui.sd_models, self._webui.opts
        if sd_models.checkpoint_aliases.get(p.override_settings.get("sd_model_checkpoint")) is None:
            p.override_settings.pop("sd_model_checkpoint", None)
            sd_models.reload_model_weights()
        for key, value in p.override_settings.items():
            opts.set(key, value, is_api=True, run_callbacks=False)
            self._load(sd_models.reload_model_weights)
        return sd_models.model_data.sd_model

    def _forge_model(self, p):
        sd_models = self._webui.sd_models
        if sd_models.checkpoint_aliases.get(p.override_settings.get("sd_model_checkpoint")) is None:
            p.override_settings.pop("sd_model_checkpoint", None)
        self._set_config(p.override_settings)
        self._load(sd_models.forge_model_reload)
        return sd_models.model_data.sd_model

    def _set_config(self, settings):
        sd_models, refresh = self._webui.sd_models, False
        for key, value in settings.items():
            if value == self._webui.opts.data.get(key):
                continue
            if value is not None and value not in sd_models.checkpoint_aliases:
                raise RuntimeError(f"model {value!r} not found")
            refresh |= sd_models.main_entry.checkpoint_change(value, save=False, refresh=False)
        if refresh:
            sd_models.main_entry.refresh_model_loading_parameters()

    def _load(self, load):
        data = self._webui.sd_models.model_data
        before = getattr(data.sd_model, "filename", None)
        selected = self._webui.sd_models.select_checkpoint().filename
        if self.fails_with and selected.endswith(self.fails_with):
            raise RuntimeError(f"cannot load {self.fails_with}")
        load()
        if data.sd_model.filename != before:
            self.loads.append(data.sd_model.filename)

    def _images(self, p, model):
        state, images = self._webui.state, []
        assert model.device == "cuda"
        if state.job_count == -1:
            state.job_count = p.n_iter
        if not (state.interrupted or state.stopping_generation):
            self.drawn.append((model.filename, p.prompt, p.seed, threading.current_thread().name))
            self._webui.networks.load_networks(re.findall(r"<lora:([^:>]+)", p.prompt))
            p.comments |= self.complaints
            state.sampling_steps = p.steps
            for step in range(p.steps):
                state.sampling_step = step
                time.sleep(self.pace)
                self._webui.shared.total_tqdm.update()
                if self.on_step:
                    self.on_step()
                if state.interrupted or state.skipped:
                    break  # what there is of the picture is decoded all the same
            state.nextjob()
            images.append(picture(model.content, p.prompt, p.seed, (p.width, p.height)))
        return SimpleNamespace(images=images, index_of_first_image=0, infotexts=[""])


def picture(content, prompt, seed, size):
    """Returns an image that is equal for equal model, prompt and seed."""
    digest = hashlib.sha256(content + f"{prompt}\n{seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)
