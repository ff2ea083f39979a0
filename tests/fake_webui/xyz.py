"""`scripts/xyz_grid.py`: the axes, and the plot as far as an axis takes part in it."""

from collections import namedtuple
from copy import copy
from pathlib import Path
from types import ModuleType

ScriptClassData = namedtuple("ScriptClassData", ["script_class", "path", "basedir", "module"])


def script_data(webui):
    """Returns the entry of `scripts.scripts_data`, with the module loaded again."""
    folder = "extensions-builtin/xyz/scripts" if webui.flavour == "classic" else "scripts"
    path = Path(webui.data) / folder / "xyz_grid.py"
    return ScriptClassData(object, str(path), str(webui.data), Grid(webui))


def block_weights():
    """Returns the entry of the extension LoRA Block Weight."""
    name = "lora_block_weight.py"
    return ScriptClassData(object, f"/extensions/lbw/scripts/{name}", "/", ModuleType(name))


class AxisOption:
    def __init__(
        self,
        label,
        type,  # noqa: A002
        apply,
        format_value=None,
        confirm=None,
        cost=0.0,
        choices=None,
        prepare=None,
    ):
        self.label, self.type, self.apply, self.cost = label, type, apply, cost
        self.format_value, self.confirm, self.choices = format_value, confirm, choices
        self.prepare = prepare


class Grid(ModuleType):
    """The script's module."""

    def __init__(self, webui):
        super().__init__("xyz_grid.py")
        self._webui = webui
        self.AxisOption = AxisOption
        options = [
            AxisOption("Nothing", str, lambda p, x, xs: None),
            AxisOption("Checkpoint name", str, self._apply_checkpoint, cost=1.0),
        ]
        if webui.flavour == "classic":  # in a module that stays when the script is loaded again
            options = vars(webui).setdefault("builtin_options", options)
        else:
            self.apply_checkpoint = self._apply_checkpoint
        self.axis_options = options

    def _apply_checkpoint(self, p, x, xs):
        webui = self._webui
        info = webui.sd_models.get_closet_checkpoint_match(x)
        if info is None:
            raise RuntimeError(f"Unknown checkpoint: {x}")
        if not webui.lazy:
            p.override_settings["sd_model_checkpoint"] = info.name
            return
        if info.name == p.override_settings.get("sd_model_checkpoint"):
            return
        before = webui.opts.data.get("sd_model_checkpoint")
        if webui.flavour == "forge":
            p.override_settings["sd_model_checkpoint"] = info.name
        webui.opts.data["sd_model_checkpoint"] = info.name
        webui.sd_models.main_entry.refresh_model_loading_parameters()
        webui.opts.data["sd_model_checkpoint"] = before

    def plot(self, p, label, values):
        """Draws the pictures of one axis; an error of a cell leaves None there, as the host logs it."""
        (option,) = [option for option in self.axis_options if option.label == label]
        values = [option.type(value) for value in values]
        if option.confirm:
            option.confirm(p, values)
        labels = [option.format_value(p, option, value) for value in values]
        images = []
        for value in values:
            cell = copy(p)
            cell.styles = cell.styles[:]
            option.apply(cell, value, values)
            images.append(self._webui.processing.process_images(cell).images[0])
        if self._webui.flavour != "neo":
            self._webui.sd_models.reload_model_weights()
        return labels, images
