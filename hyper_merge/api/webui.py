"""Adds the API to the WebUI's own app, under the conditions of the WebUI's API."""

from __future__ import annotations

from typing import Any

from modules import shared

from hyper_merge.api.auth import parse_credentials, protected
from hyper_merge.api.routes import PREFIX, build_router
from hyper_merge.hosts.job_queue import process_jobs
from hyper_merge.hosts.webui.host import WebUI


def add_api(_demo: Any, app: Any) -> None:
    """Adds the routes if the WebUI's API is on; to be called by `on_app_started`.

    "Reload UI" makes a new app and calls this again; the jobs belong to the process and continue.
    """
    options = shared.cmd_opts
    if not (getattr(options, "api", False) or getattr(options, "nowebui", False)):
        return
    if any(getattr(route, "path", "").startswith(f"{PREFIX}/") for route in app.routes):
        return
    auth = getattr(options, "api_auth", None)
    dependencies = protected(parse_credentials(auth) if auth else None)
    app.include_router(build_router(WebUI(), process_jobs(), dependencies))
