"""The app: where it listens, for whom, on which folder, and what it says when it cannot."""

import base64
import json
import re
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from local_server import find_free_port, skip_self_check

import hyper_merge
from hyper_merge.cli import app
from hyper_merge.cli.app import Listening, build_api, build_app, parse_auth, serve
from hyper_merge.cli.main import main
from hyper_merge.errors import AppError
from hyper_merge.hosts.job_queue import Jobs


@pytest.fixture
def served(monkeypatch):
    """Stands in for the server; what it was asked to serve."""
    calls = []
    monkeypatch.setattr(app, "serve", lambda *given: calls.append(given))
    return calls


@pytest.mark.parametrize(
    ("address", "is_open"),
    [
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("localhost", False),
        ("::1", False),
        ("0.0.0.0", True),
        ("::", True),
        ("192.168.1.7", True),
        ("my-computer.lan", True),
        ("", True),
    ],
)
def test_who_can_reach_it_without_a_password(address, is_open):
    assert Listening(address).is_open is is_open
    assert not Listening(address, auth=("ann", "secret")).is_open


def test_by_default_only_this_computer_can_reach_it():
    assert Listening().address == "127.0.0.1"
    assert not Listening().is_open


@pytest.mark.parametrize(
    ("text", "auth"),
    [("ann:secret", ("ann", "secret")), ("ann:a:b", ("ann", "a:b")), ("ann: ", ("ann", " "))],
)
def test_name_and_password_stand_around_the_first_colon(text, auth):
    assert parse_auth(text) == auth


@pytest.mark.parametrize("text", ["ann", "ann:", ":secret", ":", "", "secret"])
def test_an_incomplete_password_is_not_repeated(text):
    with pytest.raises(AppError, match="expected NAME:PASSWORD") as caught:
        parse_auth(text)
    assert "secret" not in str(caught.value)


def test_a_file_is_no_models_folder(tmp_path, capsys):
    path = tmp_path / "models"
    path.write_text("")
    with pytest.raises(AppError, match=r"expected a models folder, .*models is a file; choose a"):
        build_app(path)
    assert main(["app", str(path)]) == 2
    assert "choose a folder" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    build_app(tmp_path / "nowhere", Jobs())
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def can_serve(monkeypatch, gradio_leaves_sockets):
    """Servers may be started."""
    skip_self_check(monkeypatch)


@pytest.mark.parametrize("taken", ["port", "address"])
def test_where_nothing_can_listen_another_port_is_asked_for(tmp_path, taken, can_serve):
    page = build_app(tmp_path, Jobs())
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = "127.0.0.1" if taken == "port" else "192.0.2.1"  # no machine has that one
        listening = Listening(address, other.getsockname()[1])
        with pytest.raises(AppError, match=f"nothing can listen on {address} port .*choose anoth"):
            serve(page, listening, block=False)


@pytest.mark.filterwarnings("ignore:The `name` is not the first:DeprecationWarning")  # gradio's own
@pytest.mark.parametrize("auth", [None, ("ann", "secret")])
def test_the_page_is_served_and_no_other_file(tmp_path, auth, can_serve, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    port = find_free_port()
    page = build_app(tmp_path, Jobs())
    serve(page, Listening(port=port, auth=auth), block=False)
    try:
        url = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            text = answer.read().decode()
        assert ("hyper_merge_checkpoints" in text) is (auth is None)
        for path in (Path("pyproject.toml").absolute(), secret):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{url}/file={path}", timeout=60)
            assert caught.value.code in {401, 403, 404}
    finally:
        page.close(verbose=False)


def test_the_command_serves_a_folder_on_this_computer(tmp_path, served, capsys):
    assert main(["app", str(tmp_path), "--port", "7999"]) == 0
    ((_page, listening, api),) = served
    assert api is None
    assert listening == Listening("127.0.0.1", 7999)
    out, err = capsys.readouterr()
    assert out == f"Hyper-Merge: http://127.0.0.1:7999 for {tmp_path}; Ctrl-C ends it\n"
    assert err == ""


def test_without_a_password_an_open_address_is_warned_of(tmp_path, served, capsys):
    assert main(["app", str(tmp_path), "--listen", "0.0.0.0"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: everyone on the network can use this page; --auth NAME:PASS")
    assert main(["app", str(tmp_path), "--listen", "0.0.0.0", "--auth", "ann:secret"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "secret" not in out
    assert served[1][1].auth == ("ann", "secret")


def test_a_password_without_a_name_serves_nothing(tmp_path, served, capsys):
    assert main(["app", str(tmp_path), "--auth", "secret"]) == 2
    assert "secret" not in capsys.readouterr().err
    assert served == []


@pytest.mark.parametrize("package", ["gradio", "matplotlib"])
def test_without_gradio_the_command_says_how_to_get_it(tmp_path, package, monkeypatch, capsys):
    for name in list(sys.modules):
        if re.match(rf"hyper_merge\.(cli\.app|ui)\b|{package}\b", name):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(hyper_merge.cli, "app")
    monkeypatch.delattr(hyper_merge, "ui")
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["app", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert re.match(rf"hyper-merge: the app needs {package}\S*, which is not installed; run: ", err)
    assert "'.[app]'" in err


def test_the_page_brings_style_and_script_with_it():
    scripts = Path(app.__file__).parents[2] / "javascript"
    assert list(app.SCRIPTS) == sorted(f"javascript/{path.name}" for path in scripts.glob("*.js"))
    assert all("hyperMerge" in app._asset(script) for script in app.SCRIPTS)
    assert "hm-message" in app._asset("style.css")


@pytest.mark.filterwarnings("ignore:The `name` is not the first:DeprecationWarning")  # gradio's own
@pytest.mark.parametrize("auth", [None, ("ann", "secret")])
def test_the_api_has_the_password_of_the_page(tmp_path, auth, can_serve):
    port = find_free_port()
    page = build_app(tmp_path, Jobs())
    api = build_api(tmp_path, auth, Jobs())
    serve(page, Listening(port=port, auth=auth), api, block=False)
    try:
        url = f"http://127.0.0.1:{port}"
        request = urllib.request.Request(f"{url}/hyper-merge/checkpoints")
        if auth:
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=60)
            assert caught.value.code == 401
            word = base64.b64encode(":".join(auth).encode()).decode()
            request.add_header("Authorization", f"Basic {word}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer) == {"checkpoints": []}
        with urllib.request.urlopen(f"{url}/openapi.json", timeout=60) as answer:
            assert "/hyper-merge/merge" in json.load(answer)["paths"]
        with urllib.request.urlopen(f"{url}/docs", timeout=60) as answer:
            assert answer.status == 200
    finally:
        page.close(verbose=False)


def test_the_option_api_serves_the_api(tmp_path, served, capsys):
    assert main(["app", str(tmp_path), "--api", "--auth", "ann:secret"]) == 0
    ((_page, _listening, api),) = served
    assert {"/hyper-merge/merge", "/hyper-merge/runs"} <= {route.path for route in api.routes}
    out, err = capsys.readouterr()
    assert "secret" not in out + err


def test_a_password_not_in_ascii_is_refused(tmp_path, served, capsys):
    assert main(["app", str(tmp_path), "--api", "--auth", "ann:gehäuse"]) == 2
    err = capsys.readouterr().err
    assert "expected letters of ASCII" in err
    assert "gehäuse" not in err
    assert served == []
    assert main(["app", str(tmp_path), "--auth", "ann:gehäuse"]) == 0
