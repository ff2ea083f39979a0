"""Our API in the WebUI's app: on with the host's own, behind the host's passwords, once."""

import json
import urllib.error
import urllib.request
import warnings

import pytest
from at_the_tab import until
from fake_webui import installed

from hyper_merge.hosts.job_queue import process_jobs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # starlette's own, of a name that anyio has given up
    from fastapi.testclient import TestClient

OURS = "/hyper-merge/checkpoints"
THEIRS = "/sdapi/v1/sd-models"


@pytest.fixture
def start(models, flavour):
    """Starts a WebUI with its scripts and returns it and a client of its app without pages."""
    opened = []

    def start(**cmd_opts):
        context = installed(models, flavour, **cmd_opts)
        opened.append(context)
        webui = context.__enter__()
        webui.load_scripts()
        return webui, TestClient(webui.api_only())

    process_jobs()._known.clear()
    yield start
    for context in opened:
        context.__exit__(None, None, None)


def paths(app):
    """Returns paths and methods of our routes."""
    ours = [route for route in app.routes if route.path.startswith("/hyper-merge")]
    return [(route.path, *route.methods) for route in ours]


def test_the_api_is_off_unless_the_hosts_is_on(start):
    webui, client = start()
    assert client.get(OURS).status_code == 404
    assert paths(client.app) == []
    assert webui.errors.reports == []


@pytest.mark.parametrize("option", ["api", "nowebui"])
def test_the_api_is_on_with_the_hosts(start, option):
    webui, client = start(**{option: True})
    answer = client.get(OURS)
    assert answer.status_code == 200
    names = [row["name"] for row in answer.json()["checkpoints"]]
    assert names == ["anime.safetensors", "photo.safetensors", "sub/portrait.safetensors"]
    assert webui.errors.reports == []


@pytest.mark.parametrize(
    ("auth", "status"),
    [
        (None, 401),
        (("ann", "wrong"), 401),
        (("bob", "secret"), 401),
        (("ann", "secret"), 200),
        (("bob", "other"), 200),
    ],
)
def test_the_api_takes_only_the_hosts_passwords(start, auth, status):
    _, client = start(api=True, api_auth="ann:secret,bob:other")
    for path in (OURS, THEIRS):
        answer = client.get(path, **({"auth": auth} if auth else {}))
        assert answer.status_code == status
        assert "detail" in answer.json() or status == 200


def test_a_refusal_keeps_its_message_in_the_hosts_form(start):
    _, client = start(api=True)
    answer = client.post("/hyper-merge/plan", json={"checkpoints": ["../x", "photo.safetensors"]})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("checkpoints: expected a name of the host's list")


def test_reload_ui_serves_the_api_with_the_earlier_jobs(start):
    webui, client = start(api=True)
    job = process_jobs().start("mix", lambda task, progress: "", webui.host().log)
    job.wait(60)
    webui.load_scripts()
    again = TestClient(webui.api_only())
    assert len(paths(again.app)) == len(set(paths(again.app))) == len(paths(client.app))
    assert again.get("/hyper-merge/jobs").json()["jobs"][0]["id"] == job.id
    assert webui.errors.reports == []


def test_a_second_call_for_one_app_adds_nothing(start):
    webui, client = start(api=True)
    before = paths(client.app)
    webui.script_callbacks.app_started_callback(None, client.app)
    assert paths(client.app) == before


def test_a_merge_through_the_api_is_a_host_task(start):
    webui, client = start(api=True)
    host = webui.host()

    def work(task, progress):
        with host.running(task) as hosts:
            joined = progress.joined(hosts)
            joined.report("solving", 0.5)
            while True:
                joined.check()
        return ""

    job = process_jobs().start("mix", work, host.log)
    until(lambda: job.status.phase == "solving")  # from then on it ends when its thread does
    assert webui.state.jobs == [f"task(hyper-merge-{job.id})"]
    answer = client.post(f"/hyper-merge/jobs/{job.id}/cancel")
    assert answer.json()["stopping"]
    job.wait(60)
    assert client.get(f"/hyper-merge/jobs/{job.id}").json()["outcome"] == "stopped"
    assert not webui.queue_lock.held


@pytest.mark.usefixtures("gradio_leaves_sockets")
@pytest.mark.filterwarnings("ignore:The `name` is not the first:DeprecationWarning")  # gradio's own
def test_the_api_is_in_the_hosts_app_and_schema(models, flavour):
    with installed(models, flavour, api=True, api_auth="ann:secret") as webui:
        webui.load_scripts()
        address = webui.launch().rstrip("/")
        try:
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(address + OURS, timeout=60)
            assert caught.value.code == 401
            with urllib.request.urlopen(f"{address}/openapi.json", timeout=60) as answer:
                known = json.load(answer)["paths"]
        finally:
            webui.close()
    assert {OURS, "/hyper-merge/merge", THEIRS} <= known.keys()
