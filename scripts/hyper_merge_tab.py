"""The WebUI's way in: registers tab, settings, API and an axis of X/Y/Z plot, and nothing else."""

from modules import script_callbacks

from hyper_merge.api.webui import add_api
from hyper_merge.hosts.webui.host import WebUI
from hyper_merge.hosts.webui.settings import add_settings
from hyper_merge.hosts.webui.xyz_plot import add_axis
from hyper_merge.ui.tab import build_tab


def tabs() -> list[tuple]:
    """What `on_ui_tabs` asks for: blocks, title and id."""
    return [(build_tab(WebUI()), "Hyper-Merge", "hyper_merge")]


script_callbacks.on_ui_tabs(tabs)
script_callbacks.on_ui_settings(add_settings)
script_callbacks.on_app_started(add_api)
script_callbacks.on_before_ui(lambda: add_axis(WebUI()))
