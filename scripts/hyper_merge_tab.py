"""The WebUI's way in: registers the tab, the page of settings, an axis of X/Y/Z plot; nothing else."""

from modules import script_callbacks

from hyper_merge.hosts.webui import WebUI
from hyper_merge.hosts.webui_settings import add_settings
from hyper_merge.hosts.webui_xyz import add_axis
from hyper_merge.ui.tab import build_tab


def tabs() -> list[tuple]:
    """What `on_ui_tabs` asks for: blocks, title and id."""
    return [(build_tab(WebUI()), "Hyper-Merge", "hyper_merge")]


script_callbacks.on_ui_tabs(tabs)
script_callbacks.on_ui_settings(add_settings)
script_callbacks.on_before_ui(lambda: add_axis(WebUI()))
