"""Who may use the API: names and passwords as for the host's own."""

import pytest
from fastapi import FastAPI

from hyper_merge.api.auth import parse_credentials, protected
from hyper_merge.api.examples import EXAMPLES
from hyper_merge.api.routes import build_router

ROUTES = [(method, path.format(name="x", job_id="x", comparison="x")) for method, path in EXAMPLES]


@pytest.fixture(scope="module")
def password():
    """The dependencies of routes that two may use."""
    return protected(parse_credentials("ann:secret,bob:b:2"))


@pytest.fixture
def guarded(host, jobs, app_of, password, open_client):
    return open_client(app_of(host, jobs, *password))


@pytest.mark.parametrize(
    "auth",
    [None, ("ann", "Secret"), ("ann", ""), ("bob", "secret"), ("", ""), ("eve", "secret")],
)
def test_nothing_is_answered_without_name_and_password(guarded, jobs, auth):
    for method, path in ROUTES:
        body = None if method == "GET" else {"checkpoints": ["a.safetensors"]}
        options = {"auth": auth} if auth else {}
        answer = guarded.http.request(method, f"/hyper-merge{path}", json=body, **options)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Basic"
        assert "detail" in answer.json()
        assert "safetensors" not in answer.text
    assert jobs.known == ()


@pytest.mark.parametrize("auth", [("ann", "secret"), ("bob", "b:2")])
def test_with_them_everything_is(guarded, auth):
    code, answer = guarded.get("/checkpoints", auth=auth)
    assert code == 200
    assert len(answer["checkpoints"]) == 3
    assert guarded.post("/plan", {"checkpoints": []}, auth=auth)[0] == 400


@pytest.mark.parametrize(
    "header", ["Bearer abc", "Basic", "Basic !!", "Basic YW5u", "Basic w6Q6YQ=="]
)
def test_other_headers_are_refused(guarded, header):
    code, _ = guarded.get("/runs", headers={"authorization": header})
    assert code == 401


def test_letters_beyond_ascii_in_a_known_password_break_nothing(host, jobs, open_client):
    app = FastAPI()
    app.include_router(build_router(host, jobs, protected({"ann": "gehäuse"})))
    assert open_client(app).get("/runs", auth=("ann", "gehause"))[0] == 401


def test_without_passwords_everyone_may(client):
    assert protected(None) == protected({}) == []
    assert client.get("/checkpoints")[0] == 200


def test_the_schema_tells_clients_of_the_passwords(guarded):
    schema = guarded.http.app.openapi()
    assert schema["components"]["securitySchemes"] == {
        "HTTPBasic": {"type": "http", "scheme": "basic"}
    }
    for methods in schema["paths"].values():
        for route in methods.values():
            assert route["security"] == [{"HTTPBasic": []}]
            assert "401" in route["responses"]
