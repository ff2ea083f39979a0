"""A server with the real tab, and a real browser that shows it."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from urllib.request import urlopen

import gradio
import pytest
from browser.the_tab import Tab
from local_server import find_free_port
from pinned_host import PINNED_HOSTS

HERE = Path(__file__).parent
SCREENSHOTS = Path(os.environ.get("HYPER_MERGE_SCREENSHOTS", HERE.parents[1] / "screenshots"))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing() -> str | None:
    """Returns why no browser can be here."""
    if chromium() is None:
        return "no chromium found (Debian: apt-get install chromium)"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install playwright)"
    return None


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome")


def pytest_collection_modifyitems(items):
    reason = missing()
    if reason and not os.environ.get("CI"):
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    assert missing() is None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


class Server:
    """The tab on a port of its own; its log is read at the end."""

    def __init__(self, host: str, models: Path) -> None:
        self.host, self.models = host, models
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.log = models.parent / f"{host}-{self.port}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "serve.py"), host, str(models), str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1"},
            )

    def wait(self) -> None:
        """Returns once the server answers."""
        end = time.monotonic() + 240  # a busy machine takes long to load torch
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self.log.read_text()}")
            try:
                urlopen(self.url, timeout=10).close()
            except OSError:
                time.sleep(0.1)
            else:
                return
        raise RuntimeError(f"the server does not answer:\n{self.log.read_text()}")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(240)

    @property
    def complaints(self) -> list[str]:
        """Returns what no server should write, from its first such line on."""
        lines = _LEFT.sub("", self.log.read_text()).splitlines()
        bad = re.compile(r"Traceback|Error|Exception|CRITICAL")
        first = next((place for place, line in enumerate(lines) if bad.search(line)), len(lines))
        return lines[first:]


# gradio 3.41 says this of a page that is closed while it asks for something
_LEFT = re.compile(
    r"ERROR: +Exception in ASGI application\nTraceback.*\n(?:[ \t].*\n)+"
    r"starlette\.websockets\.WebSocketDisconnect: 1001\n"
)

# The host that has this gradio; marks what the app has not.
WEBUI = "forge" if int(gradio.__version__.split(".")[0]) >= 4 else "a1111"
# The gate runs them by the pins of both WebUIs; by ours, with which there is no WebUI, only if asked.
BY_PINS_OF_A_WEBUI = bool(PINNED_HOSTS)
WITH_WEBUI = BY_PINS_OF_A_WEBUI or "HYPER_MERGE_WEBUI" in os.environ
IN_WEBUI = pytest.mark.parametrize(
    "host_name",
    [
        pytest.param(
            WEBUI,
            marks=pytest.mark.skipif(
                not WITH_WEBUI,
                reason="for the pins of a WebUI; HYPER_MERGE_WEBUI=1 tries it by these",
            ),
        )
    ],
    indirect=True,
    scope="session",
)

# Where all else is tried: in a WebUI by its own pins, in the app by ours.
ANY_HOST = WEBUI if BY_PINS_OF_A_WEBUI else "standalone"


@pytest.fixture(scope="session", params=[ANY_HOST])
def host_name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def context(browser):
    """A browser context for all pages, so that gradio's scripts are read once."""
    context = browser.new_context(viewport={"width": 1500, "height": 1000})
    context.set_default_timeout(240_000)  # for a busy machine
    # gradio asks for fonts and a script from elsewhere; nothing here depends on them
    context.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.fulfill(body=""))
    yield context
    context.close()


def shot(page, name: str) -> None:
    """Keeps a picture of the page where HYPER_MERGE_SCREENSHOTS names a folder for them."""
    if "HYPER_MERGE_SCREENSHOTS" in os.environ:
        keep(page, name)


def keep(page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(
        path=str(SCREENSHOTS / f"gradio-{gradio.__version__}-{name}.png"), full_page=True
    )


@pytest.fixture(scope="session")
def servers(files, tmp_path_factory):
    """Hosts with three checkpoints each, one of them in a folder, and a file that is none.

    They start side by side, and once: what takes the time is loading torch and gradio.
    """
    servers = {}
    for host in dict.fromkeys((ANY_HOST, WEBUI) if WITH_WEBUI else (ANY_HOST,)):
        models = tmp_path_factory.mktemp(host) / "models"
        folder = models / "Stable-diffusion"
        (folder / "sub").mkdir(parents=True)
        for path, place in zip(files, ("anime", "photo", "sub/portrait"), strict=True):
            shutil.copy(path, folder / f"{place}.safetensors")
        (folder / "broken.safetensors").write_bytes(b"this is no checkpoint" * 9)
        (models / "Lora").mkdir()
        servers[host] = Server(host, models)
    yield servers
    for server in servers.values():
        server.close()
    assert [line for server in servers.values() for line in server.complaints] == []


@pytest.fixture(scope="session")
def server(host_name, servers):
    """The host of a test."""
    servers[host_name].wait()
    return servers[host_name]


@pytest.fixture
def slow_runs(server) -> Iterator[Path]:
    """Runs take their time, so that they can be watched and stopped, as long as there is this file."""
    flag = server.models.parent / "slowly"
    flag.touch()
    yield flag
    flag.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def shared_tabs(context) -> Iterator[dict[str, Tab]]:
    """The pages that the tests of a file share, by host: to load one takes seconds."""
    tabs: dict[str, Tab] = {}
    yield tabs
    for tab in tabs.values():
        tab.close()
    assert [error for tab in tabs.values() for error in tab.take_errors()] == []


@pytest.fixture
def shared_tab(shared_tabs, context, server, request) -> Iterator[Tab]:
    """The file's page, perhaps still empty; a test that failed leaves it to nobody."""
    if server.host not in shared_tabs:
        shared_tabs[server.host] = Tab(context.new_page())
    tab = shared_tabs[server.host]
    failed = yield from watched(tab, request)
    if failed:
        shared_tabs.pop(server.host).close()
    assert tab.take_errors() == []


@pytest.fixture
def tab(shared_tab, server) -> Tab:
    """The tab on the file's page, as the test before left it.

    A test begins by setting what it depends on, and waits for nothing that may be there already. What
    needs a tab that nobody has used takes `new_tab`.
    """
    return shared_tab.show() if shared_tab.is_open else shared_tab.open(server)


@pytest.fixture
def own_tab(context, request) -> Iterator[Tab]:
    """An empty page of the test's own."""
    tab = Tab(context.new_page())
    yield from watched(tab, request)
    tab.close()
    assert tab.take_errors() == []


@pytest.fixture
def new_tab(own_tab, server) -> Tab:
    """The tab on a page of the test's own."""
    return own_tab.open(server)


def watched(tab, request) -> Generator[Tab, None, bool]:
    """Yields the tab; returns whether the test failed, of which it leaves a screenshot then."""
    before = request.session.testsfailed
    yield tab
    failed = request.session.testsfailed > before
    if failed:
        name = re.sub(r"\W+", "-", request.node.name).strip("-")
        keep(tab.page, f"end-of-{name}")
    return failed
