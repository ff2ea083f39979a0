"""The client in `docs/api.md` runs as it stands there, against a server."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvicorn
from at_the_tab import until
from fastapi import FastAPI
from local_server import ADDRESS, find_free_port

from hyper_merge.api.auth import protected
from hyper_merge.api.routes import build_router

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


@pytest.fixture
def server(host, jobs):
    """The address of a server with the API behind a password."""
    app, port = FastAPI(), find_free_port()
    app.include_router(build_router(host, jobs, protected({"ann": "secret"})))
    server = uvicorn.Server(uvicorn.Config(app, ADDRESS, port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield f"http://{ADDRESS}:{port}"
    server.should_exit = True
    thread.join(60)


def client(*words):
    """Runs the script with the words after its name; returns its code, output and errors."""
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_client_merges_and_prints_what_came_of_it(server, root):
    code, out, err = client(server, "ann:secret", "a.safetensors", "sub/c.safetensors")
    assert code == 0, err
    plan, *rows, mixture, restored = out.splitlines()
    assert re.fullmatch(r"hyper-a-2: \d+\.\d MB of LoRAs in about \d+ s", plan)
    assert [row.partition(":")[0] for row in rows] == ["a", "c"]
    assert all(re.search(r": \d+\.\d% explained by <lora:hyper-a-2_0-16:", row) for row in rows)
    assert mixture.startswith("all in equal parts: <lora:hyper-a-2_0-16:")
    assert restored.startswith("a-restored.safetensors: ")
    assert (root / "Stable-diffusion" / "a-restored.safetensors").exists()
    assert "starting" in err


def test_the_client_ends_with_the_reason_of_a_refusal(server):
    code, out, err = client(server, "ann:wrong")
    assert (code, out) == (1, "")
    assert err == "GET /checkpoints: Incorrect username or password\n"
    code, out, err = client(server, "ann:secret", "a.safetensors", "gone.safetensors")
    assert (code, out) == (1, "")
    assert err.startswith("POST /plan: checkpoints: expected a name of the host's list, got 'gone.")
