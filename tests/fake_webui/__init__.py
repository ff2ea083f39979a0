"""AUTOMATIC1111's WebUI v1.10.1 and its relatives, as far as an extension sees them, without a model.

`install(models, flavour)` puts `modules` (for the others also `modules_forge`, and `backend` or
`ldm_patched`) into `sys.modules` and hands back what tests look at; `uninstall` takes everything out
again. What the hosts do to lists, titles, locks, progress, styles and loaded models is done as they do
it, read in their sources; a "model" is the content of its file and the name of a device.
"""

import importlib
import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

from local_server import find_free_port

from hyper_merge.runtime.devices import AUTO, AutoDevice

from . import api, page, xyz
from .callbacks import Callbacks, Errors
from .drawing import Processing, samplers
from .jobs import Devices, FifoLock, MainThread, Progress, State
from .lists import Checkpoints, Loras
from .models import A1111Models, ClassicModels, ForgeModels, NeoModels, ReForgeModels
from .options import OptionHTML, OptionInfo, Options
from .styles import PromptStyle, StyleDatabase

EXTENSION = Path(__file__).parents[2]
ROOTS = ("modules", "modules_forge", "backend", "ldm_patched", "networks")
TITLES = {
    "a1111": "AUTOMATIC1111",
    "forge": "Forge",
    "neo": "Forge Neo",
    "reforge": "reForge",
    "classic": "Forge Classic",
}
FLAVOURS = tuple(TITLES)
MODELS = {
    "a1111": A1111Models,
    "forge": ForgeModels,
    "neo": NeoModels,
    "reforge": ReForgeModels,
    "classic": ClassicModels,
}
# Our modules that are bound to the modules of the host that they were loaded with.
OURS = ("hyper_merge.api.webui", "hyper_merge.hosts.webui")


class FakeWebUI:
    """A WebUI that has started: scripts not yet loaded, checkpoints listed, no model loaded.

    Attributes:
        lazy: Whether the selected checkpoint is loaded when a picture is made, and only then.
        threaded: Whether models move in one thread, and on and off the device by a manager.
    """

    def __init__(self, models, flavour, *, debug_mode=False, **cmd_opts):
        self.flavour = flavour
        self.lazy = flavour in ("forge", "neo")
        self.threaded = flavour != "a1111"
        self.models = models = Path(models).absolute()
        self.data = models.parent
        self.errors = Errors()
        self.cmd_opts = SimpleNamespace(
            ckpt=str(self.data / "model.ckpt"),
            lora_dir=str(models / "Lora"),
            no_download_sd_model=True,
            ui_debug_mode=debug_mode,
            hide_ui_dir_config=False,
            api=False,
            nowebui=False,
            api_auth=None,
            use_cpu=[],
            device_id=None,
            always_cpu=False,
        )
        folders = {"ckpt_dirs": [], "lora_dirs": []} if flavour == "neo" else {"ckpt_dir": None}
        vars(self.cmd_opts).update(folders)
        vars(self.cmd_opts).update(cmd_opts)
        self.devices = Devices(flavour, self.cmd_opts)
        self.opts = Options(self.errors, self.cmd_opts)
        self.config_filename = str(self.data / "config.json")
        self.opts.load(self.config_filename)
        self.state = State(self.devices)
        self.progress = Progress(self.state)
        self.queue_lock = FifoLock()
        self.script_callbacks = Callbacks(self.errors)
        self.checkpoints = Checkpoints(models, self.cmd_opts, self.opts, flavour)
        self.sd_models = MODELS[flavour](self.checkpoints, self.opts, self.devices)
        self.networks = Loras(self.cmd_opts)
        files = [self.data / "styles.csv"]
        if flavour == "forge":
            files.append(self.data / "styles_integrated.csv")
        self.prompt_styles = StyleDatabase(files, self.errors, headings=flavour != "neo")
        self.shared = Shared(self)
        self.main_thread = MainThread(flavour)
        self.processing = Processing(self)
        self.scripts = module("scripts", scripts_data=[])
        if self.lazy or not debug_mode:
            self.checkpoints.list_models()
            self.networks.list_available_networks()

    def modules(self):
        """Returns the modules that are imported by name."""
        paths = {
            "models_path": str(self.models),
            "data_path": str(self.data),
            "script_path": str(self.data),
        }
        modules = {
            "modules": package("modules"),
            "modules.call_queue": module("call_queue", queue_lock=self.queue_lock),
            "modules.devices": self.devices,
            "modules.errors": self.errors,
            "modules.paths": module("paths", **paths),
            "modules.paths_internal": module("paths_internal", **paths),
            "modules.processing": self.processing,
            "modules.progress": self.progress,
            "modules.scripts": self.scripts,
            "modules.script_callbacks": self.script_callbacks,
            "modules.sd_models": self.sd_models,
            "modules.sd_samplers": samplers(),
            "modules.shared": self.shared,
            "modules.styles": module(
                "styles", PromptStyle=PromptStyle, StyleDatabase=StyleDatabase
            ),
            "networks": self.networks,
        }
        if self.threaded:
            modules |= {
                "modules_forge": package("modules_forge"),
                "modules_forge.main_thread": self.main_thread,
            }
        if self.lazy:
            modules |= {
                "modules_forge.main_entry": self.sd_models.main_entry,
                "backend": package("backend"),
                "backend.memory_management": self.sd_models.manager,
            }
        elif self.threaded:
            modules |= {
                "ldm_patched": package("ldm_patched"),
                "ldm_patched.modules": package("ldm_patched.modules"),
                "ldm_patched.modules.model_management": self.sd_models.manager,
            }
        return modules

    def host(self):
        """Returns our host for this WebUI; our modules can be imported only now."""
        return importlib.import_module("hyper_merge.hosts.webui.host").WebUI()

    def settings(self):
        """Returns our module for its settings."""
        return importlib.import_module("hyper_merge.hosts.webui.settings")

    def load_scripts(self):
        """Clears callbacks and executes the script again, as a start and Reload UI do.

        The extension's folder is on `sys.path` meanwhile; packages stay cached. An error in the
        script is in `errors.reports`, as the WebUI has it on its console.
        """
        self.script_callbacks.clear_callbacks()
        self.scripts.scripts_data[:] = [xyz.script_data(self), xyz.block_weights()]
        path = EXTENSION / "scripts" / "hyper_merge_tab.py"
        before = sys.path
        try:
            sys.path = [str(EXTENSION), *before]
            spec = importlib.util.spec_from_file_location(path.name, path)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except Exception:
            self.errors.report(f"Error loading script: {path.name}", exc_info=True)
        finally:
            sys.path = before

    def create_ui(self):
        """The page with txt2img, the tabs of extensions and Settings, as gradio Blocks."""
        return page.create_ui(self)

    def api_only(self):
        """The FastAPI app with --nowebui, in place of `launch`."""
        return api.api_only(self)

    def launch(self, port=None, **options):
        """Serves `create_ui()` on 127.0.0.1, until `close()`.

        Args:
            port: None for any that is free.
            options: for gradio's `launch`.

        Returns:
            The page's address.
        """
        return page.launch(self, port or find_free_port(), **options)

    def close(self):
        """Ends the server."""
        page.close(self)


class TotalBar:
    """The console's bar over all pictures."""

    def __init__(self, state):
        self._state = state
        self.shown = []  # steps in all, whenever it moves

    def update(self):
        self.shown.append(self._state.job_count * self._state.sampling_steps)


class Shared:
    """`modules.shared`: reading its `sd_model` loads one where none was, in A1111."""

    OptionInfo = OptionInfo
    OptionHTML = OptionHTML

    def __init__(self, webui):
        self._sd_models = webui.sd_models
        self.cmd_opts = webui.cmd_opts
        self.opts = webui.opts
        self.state = webui.state
        self.prompt_styles = webui.prompt_styles
        self.config_filename = webui.config_filename
        self.hide_dirs = {"visible": not webui.cmd_opts.hide_ui_dir_config}
        self.demo = None
        self.total_tqdm = TotalBar(webui.state)

    @property
    def sd_model(self):
        return self._sd_models.model_data.get_sd_model()


def folder_options(flavour, checkpoints, loras):
    """Returns the options of a host's command line that name folders: Neo takes several of each."""
    if flavour == "neo":
        return {"ckpt_dirs": [str(checkpoints)], "lora_dirs": [str(loras)]}
    return {"ckpt_dir": str(checkpoints), "lora_dir": str(loras)}


def put(path, content=b"a"):
    """A file with its folders; a listed file may hold anything."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def package(name):
    new = ModuleType(name)
    new.__path__ = []
    return new


def module(name, **attributes):
    new = ModuleType(name)
    vars(new).update(attributes)
    return new


def install(models, flavour, **options):
    """Puts a WebUI whose models folder is `models` into `sys.modules`.

    Args:
        models: with `Stable-diffusion` and `Lora`; styles and settings lie beside it.
        flavour: one of `FLAVOURS`.
        options: debug_mode (--ui-debug-mode) and attributes of `cmd_opts`, such as ckpt_dir.
    """
    uninstall()
    webui = FakeWebUI(models, flavour, **options)
    for name, new in webui.modules().items():
        sys.modules[name] = new
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, new)
    return webui


def uninstall():
    """Takes the WebUI out of `sys.modules`, with those of our modules that are bound to it."""
    AUTO.choose = AutoDevice().choose
    for name in list(sys.modules):
        if name.split(".")[0] in ROOTS or name.startswith(OURS):
            del sys.modules[name]
    for name in ("hyper_merge.api", "hyper_merge.hosts"):
        if hasattr(sys.modules.get(name), "webui"):
            del sys.modules[name].webui


@contextmanager
def installed(models, flavour, **options):
    """Installs a WebUI for the time of a `with` block."""
    try:
        yield install(models, flavour, **options)
    finally:
        uninstall()
