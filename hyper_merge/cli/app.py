"""The tab on a standalone server, for a WebUI-shaped models folder."""

from __future__ import annotations

import ipaddress
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gradio as gr
from fastapi import APIRouter

from hyper_merge.api.auth import protected
from hyper_merge.api.routes import build_router
from hyper_merge.errors import AppError
from hyper_merge.hosts.job_queue import Jobs, process_jobs
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.ui.compat import browser_code
from hyper_merge.ui.tab import build_tab

LOCAL: Final = "127.0.0.1"
PORT: Final = 7871

_ASSETS: Final = (  # in a clone; installed
    Path(__file__).parents[2],
    Path(sysconfig.get_path("data")) / "share" / "hyper-merge",
)
_SCRIPTS: Final = (
    *("", "_access", "_form", "_jobs", "_loras", "_names", "_order", "_picker", "_runs", "_size"),
)
SCRIPTS: Final = tuple(f"javascript/hyper_merge{name}.js" for name in _SCRIPTS)
"""The page's scripts, in the order in which the WebUIs load them."""

_SANS: Final = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Noto Sans", "sans-serif")
_MONO: Final = ("ui-monospace", "Consolas", "DejaVu Sans Mono", "monospace")


@dataclass(frozen=True)
class Listening:
    """The address at which the app listens, and the password that it takes.

    Attributes:
        address: Address of a network interface; all but the loopback are open to the network.
        port: Number of the port.
        auth: Name and password that a browser must give, or None.
        open_browser: Whether to open the page on this machine.
    """

    address: str = LOCAL
    port: int = PORT
    auth: tuple[str, str] | None = None
    open_browser: bool = False

    @property
    def is_open(self) -> bool:
        """Tells whether other machines can reach it without a password."""
        if self.auth is not None or self.address == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.address).is_loopback
        except ValueError:
            return True


def parse_auth(text: str) -> tuple[str, str]:
    """Returns name and password of the form `name:password`.

    Raises:
        AppError: one of them is missing.
    """
    name, _, password = text.partition(":")
    if not name or not password:
        raise AppError("--auth: expected NAME:PASSWORD, got something without one of the two")
    return name, password


def build_app(root: Path, jobs: Jobs | None = None) -> gr.Blocks:
    """Returns the page for a models folder.

    Args:
        root: folder with `Stable-diffusion` and `Lora`; made when something is written.
        jobs: queue that the page shows and fills; by default the process's.

    Raises:
        AppError: the folder is a file.
    """
    if root.exists() and not root.is_dir():
        raise AppError(f"expected a models folder, {root} is a file", hint="choose a folder")
    page = build_tab(
        Standalone(root),
        jobs,
        title="Hyper-Merge",
        css=_asset("style.css") + _PAGE,
        theme=gr.themes.Default(font=list(_SANS), font_mono=list(_MONO)),
    )
    script = "\n".join(map(_asset, SCRIPTS))
    with page:
        page.load(None, None, None, **browser_code(f"() => {{\n{script}\nreturn []; }}"))
    return page


def build_api(root: Path, auth: tuple[str, str] | None, jobs: Jobs | None = None) -> APIRouter:
    """Returns the routes for a models folder.

    Args:
        root: as for `build_app`.
        auth: name and password that a client must give, or None.
        jobs: queue that the page shows and fills; by default the process's.

    Raises:
        AppError: name or password have letters that no client could give.
    """
    if auth and not "".join(auth).isascii():
        raise AppError(
            "--auth: with --api, expected letters of ASCII alone in name and password, for HTTP"
            " Basic authentication takes no others"
        )
    return build_router(Standalone(root), jobs or process_jobs(), protected(auth and dict([auth])))


def serve(
    page: gr.Blocks, listening: Listening, api: APIRouter | None = None, *, block: bool = True
) -> None:
    """Serves the page until Ctrl-C.

    Args:
        page: result of `build_app`.
        listening: address and password.
        api: result of `build_api`, which is served too, with its description at /docs.
        block: false returns once the server is up.

    Raises:
        AppError: the port is taken, or the address is not this machine's.
    """
    page.queue()
    try:
        page.launch(
            server_name=listening.address,
            server_port=listening.port,
            auth=[listening.auth] if listening.auth else None,
            inbrowser=listening.open_browser,
            prevent_thread_lock=not block,
            quiet=True,
            blocked_paths=[str(Path.cwd())],
            show_api=False,
            app_kwargs={"docs_url": "/docs", "routes": list(api.routes)} if api else None,
        )
    except OSError as error:
        raise AppError(
            f"nothing can listen on {listening.address} port {listening.port}: it is taken, or"
            " the address is not this computer's",
            hint="choose another --port or --listen",
        ) from error


def _asset(name: str) -> str:
    path = next(path for folder in _ASSETS if (path := folder / name).exists())
    return path.read_text(encoding="utf-8")


_PAGE: Final = """
.gradio-container { max-width: 1500px !important; overflow: visible !important; } /* progress sticks to the window */
footer { display: none !important; }
"""
