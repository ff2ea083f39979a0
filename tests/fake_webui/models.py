"""`modules.sd_models`: what is loaded, and where it is. A model is its file's content."""

import threading
from pathlib import Path
from types import SimpleNamespace


class Model:
    """A model that was read from a checkpoint, on a device."""

    def __init__(self, info, device="cpu"):
        self.born_on = device
        self.lowvram = False
        self.read(info)

    def read(self, info):
        self.sd_checkpoint_info = info
        self.sd_model_checkpoint = self.filename = info.filename
        self.content = Path(info.filename).read_bytes()
        self.device = self.born_on


class Listed:
    """The list's names of `modules.sd_models`, equal in all hosts."""

    def __init__(self, checkpoints, opts):
        self._checkpoints = checkpoints
        self._opts = opts
        self.model_path = checkpoints.model_path
        self.checkpoints_list = checkpoints.checkpoints_list
        self.checkpoint_aliases = checkpoints.checkpoint_aliases
        self.checkpoint_tiles = checkpoints.checkpoint_tiles
        self.list_models = checkpoints.list_models
        self.get_closet_checkpoint_match = checkpoints.get_closet_checkpoint_match
        self.select_checkpoint = checkpoints.select_checkpoint


class A1111Models(Listed):
    """The models of A1111: the model stays in memory and moves between devices."""

    def __init__(self, checkpoints, opts, devices):
        super().__init__(checkpoints, opts)
        self._devices = devices
        self.model_data = A1111Data(self)

    def load_model(self, checkpoint_info=None):
        model = Model(checkpoint_info or self.select_checkpoint(), "cuda")
        self._written(model)
        self.model_data.set_sd_model(model)
        self.model_data.was_loaded_at_least_once = True
        return model

    def _written(self, model):
        model.sd_checkpoint_info.calculate_shorthash()
        self._opts.data["sd_model_checkpoint"] = model.sd_checkpoint_info.title

    def send_model_to_cpu(self, model):
        if model is not None:
            model.device = "cpu"
        self._devices.torch_gc()

    def send_model_to_device(self, model):
        model.device = "cuda"

    def send_model_to_trash(self, model):
        model.device = "meta"

    def unload_model_weights(self, sd_model=None, info=None):
        self.send_model_to_cpu(sd_model or self.model_data.get_sd_model())
        return sd_model

    def reload_model_weights(self, sd_model=None, info=None, forced_reload=False):
        info = info or self.select_checkpoint()
        model = sd_model or self.model_data.sd_model
        if model is None:
            return self.load_model(info)
        if model.sd_model_checkpoint == info.filename and not forced_reload:
            return model
        model.read(info)
        self._written(model)
        self.model_data.set_sd_model(model)
        return model


class A1111Data:
    """The `model_data` of A1111: the first access to the model loads it."""

    def __init__(self, sd_models):
        self._sd_models = sd_models
        self.sd_model = None
        self.loaded_sd_models = []
        self.was_loaded_at_least_once = False
        self.lock = threading.Lock()

    def get_sd_model(self):
        if self.sd_model is None and not self.was_loaded_at_least_once:
            with self.lock:
                self._sd_models.load_model()
        return self.sd_model

    def set_sd_model(self, model):
        self.sd_model = model
        if model in self.loaded_sd_models:
            self.loaded_sd_models.remove(model)
        if model is not None:
            self.loaded_sd_models.insert(0, model)


class Manager(SimpleNamespace):
    """`ldm_patched.modules.model_management` or `backend.memory_management`.

    It brings models to the device when a picture is made, except those that it takes to be there.
    """

    def __init__(self):
        super().__init__()
        self.loaded = []

    def load_models_gpu(self, models):
        for model in models:
            if model not in self.loaded:
                self.loaded.append(model)
                model.device = "cuda"

    def unload_all_models(self):
        for model in self.loaded:
            model.device = "cpu"
        self.loaded.clear()


class ReForgeModels(Listed):
    """The models of reForge: several are kept, by its setting two here, and moved by a manager."""

    kept = 2

    def __init__(self, checkpoints, opts, devices):
        super().__init__(checkpoints, opts)
        del devices
        self.manager = Manager()
        self.model_data = ReForgeData(self)

    def load_model(self, checkpoint_info=None, forced_reload=False):
        info, data = checkpoint_info or self.select_checkpoint(), self.model_data
        for model in list(data.loaded_sd_models):
            if model.filename == info.filename:
                data.loaded_sd_models.remove(model)
                if not forced_reload:
                    data.loaded_sd_models.insert(0, model)
                    data.set_sd_model(model)
                    return model
        del data.loaded_sd_models[self.kept - 1 :]
        model = Model(info)
        data.loaded_sd_models.insert(0, model)
        return self._loaded(model)

    def _loaded(self, model):
        self.manager.load_models_gpu([model])
        model.sd_checkpoint_info.calculate_shorthash()
        self.model_data.set_sd_model(model)
        self.model_data.was_loaded_at_least_once = True
        return model

    def reload_model_weights(self, sd_model=None, info=None, forced_reload=False):
        return self.load_model(info, forced_reload=forced_reload)

    def unload_model_weights(self, model=None):
        """Moves the weights; the manager still takes them to be on the device."""
        model = model or self.model_data.sd_model
        if model is not None:
            model.device = "cpu"

    def load_model_to_device(self, model=None):
        model = model or self.model_data.sd_model
        model.device = "cuda"

    def send_model_to_cpu(self, model):
        """Does nothing, as the stub."""

    def send_model_to_device(self, model):
        """Does nothing, as the stub."""

    def send_model_to_trash(self, model):
        """Does nothing, as the stub."""


class ClassicModels(ReForgeModels):
    """The models of Forge Classic: one is kept, as long as a file of its name is selected."""

    load_model_to_device = property()  # it has none

    def load_model(self, checkpoint_info=None, already_loaded_state_dict=None):
        info, data = checkpoint_info or self.select_checkpoint(), self.model_data
        if data.sd_model:
            if data.sd_model.filename == info.filename:
                return data.sd_model
            data.sd_model = None
            data.loaded_sd_models = []
            self.manager.unload_all_models()
        return self._loaded(Model(info))

    def reload_model_weights(self, sd_model=None, info=None, forced_reload=False):
        return self.load_model(info)

    def unload_model_weights(self, sd_model=None, info=None):
        self.manager.unload_all_models()
        return sd_model


class ReForgeData:
    """The `model_data` of reForge and Classic: as in A1111, but `load_model` alone fills the list."""

    def __init__(self, sd_models):
        self._sd_models = sd_models
        self.sd_model = None
        self.loaded_sd_models = []
        self.was_loaded_at_least_once = False
        self.lock = threading.Lock()

    def get_sd_model(self):
        if self.sd_model is None and not self.was_loaded_at_least_once:
            with self.lock:
                self._sd_models.load_model()
        return self.sd_model

    def set_sd_model(self, model):
        self.sd_model = model


class ForgeModels(Listed):
    """The models of Forge: the selected one is loaded when a picture is made."""

    def __init__(self, checkpoints, opts, devices):
        super().__init__(checkpoints, opts)
        del devices
        self.model_data = ForgeData()
        self.manager = Manager()
        self.main_entry = SimpleNamespace(
            refresh_model_loading_parameters=self._refresh_parameters,
            checkpoint_change=self._checkpoint_change,
        )

    def match_checkpoint_to_name(self, name):
        """Selects as Forge does: the first whose title holds the name, or that it holds."""
        name = name.split(" [")[0]
        for info in self.checkpoints_list.values():
            title = info.title.split(" [")[0]
            if name in title or title in name:
                return info.name
        return name

    def unload_model_weights(self, sd_model=None, info=None):
        self.manager.unload_all_models()

    def load_model(self, checkpoint_info=None, already_loaded_state_dict=None):
        """Does nothing, as the stub of Forge."""

    def reload_model_weights(self, sd_model=None, info=None, forced_reload=False):
        """Does nothing, as the stub of Forge."""

    def send_model_to_cpu(self, model):
        """Does nothing, as the stub of Forge."""

    def send_model_to_device(self, model):
        """Does nothing, as the stub of Forge."""

    def _refresh_parameters(self):
        self.model_data.forge_loading_parameters = {"checkpoint_info": self.select_checkpoint()}

    def _checkpoint_change(self, name, save=True, refresh=True):
        current = self.get_closet_checkpoint_match(self._opts.data.get("sd_model_checkpoint", ""))
        if self.get_closet_checkpoint_match(name) == current:
            return False
        self._opts.data["sd_model_checkpoint"] = name
        if refresh:
            self._refresh_parameters()
        return True

    def forge_model_reload(self):
        data = self.model_data
        info = data.forge_loading_parameters["checkpoint_info"]
        parameters = str({"filename": info.filename, "hash": info.hash})
        if data.forge_hash == parameters:
            return data.sd_model, False
        self.manager.unload_all_models()
        data.sd_model = Model(info)
        info.calculate_shorthash()
        data.forge_hash = parameters
        return data.sd_model, True


class NeoModels(ForgeModels):
    """The models of Forge Neo: as those of Forge, without the stubs; unloading forgets the model."""

    load_model = reload_model_weights = send_model_to_cpu = send_model_to_device = property()

    def unload_model_weights(self, *args, **kwargs):
        self.manager.unload_all_models()
        self.model_data.__init__()


class ForgeData:
    """The `model_data` of Forge: a stand-in before the first picture."""

    def __init__(self):
        self.sd_model = SimpleNamespace(cond_stage_model=None)
        self.forge_loading_parameters = {}
        self.forge_hash = ""

    def get_sd_model(self):
        return self.sd_model
