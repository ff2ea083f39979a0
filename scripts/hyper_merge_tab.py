"""The WebUI's way in: registers tab, settings, API and an axis of X/Y/Z plot, and nothing else.

Only the device that `auto` means is set as well.
"""

from modules import script_callbacks

from hyper_merge.hosts.webui.capabilities import explain_missing, missing_names


def register() -> None:
    """Registers everything; these modules can be imported only where the WebUI has all names."""
    from hyper_merge.api.webui import add_api  # noqa: PLC0415
    from hyper_merge.hosts.webui.device_memory import chosen_device  # noqa: PLC0415
    from hyper_merge.hosts.webui.host import WebUI  # noqa: PLC0415
    from hyper_merge.hosts.webui.settings import add_settings  # noqa: PLC0415
    from hyper_merge.hosts.webui.xyz_plot import add_axis  # noqa: PLC0415
    from hyper_merge.runtime.devices import AUTO  # noqa: PLC0415
    from hyper_merge.ui.tab import build_tab  # noqa: PLC0415

    def tabs() -> list[tuple]:
        """What `on_ui_tabs` asks for: blocks, title and id."""
        return [(build_tab(WebUI()), "Hyper-Merge", "hyper_merge")]

    AUTO.choose = chosen_device
    script_callbacks.on_ui_tabs(tabs)
    script_callbacks.on_ui_settings(add_settings)
    script_callbacks.on_app_started(add_api)
    script_callbacks.on_before_ui(lambda: add_axis(WebUI()))


missing = missing_names()
if missing:
    print(explain_missing(missing))  # noqa: T201 - where the WebUI says everything at its start
else:
    register()
