"""Requests drawn from the API's own description, and hostile ones: answers as described, no error 500."""

import json
import warnings
from random import Random

import pytest
from fastapi import FastAPI
from fuzzing.hostile_json import as_text, damaged, hostile_value
from fuzzing.workshop import Workshop

from hyper_merge.api.routes import build_router
from hyper_merge.hosts.job_queue import Jobs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # starlette's own, of a name that anyio has given up
    from fastapi.testclient import TestClient

INPUTS = 20  # of each route and method
WORDS = (
    "a.safetensors",
    "e.ckpt",
    "mix",
    "95%",
    "300MB",
    "auto",
    "cpu",
    "",
    "x" * 5000,
    "%00",
    "..",
)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    app, jobs = FastAPI(), Jobs()
    workshop = Workshop(tmp_path_factory.mktemp("api") / "models")
    app.include_router(build_router(workshop.host, jobs))
    yield app
    for job in jobs.known:
        job.stop()


def drawn(schema, definitions, random):
    """Returns a value as a schema describes it, or now and then a hostile one."""
    if random.random() < 0.05:
        return hostile_value(random)
    if "$ref" in schema:
        return drawn(definitions[schema["$ref"].rpartition("/")[2]], definitions, random)
    if "anyOf" in schema:
        return drawn(random.choice(schema["anyOf"]), definitions, random)
    if schema.get("type") == "object":
        required, fields = schema.get("required", ()), schema.get("properties", {})
        kept = [name for name in fields if name in required or random.random() < 0.15]
        return {name: drawn(fields[name], definitions, random) for name in kept}
    if schema.get("type") == "array":
        return [drawn(schema["items"], definitions, random) for _ in range(random.randrange(4))]
    kinds = {"string": WORDS, "integer": (0, 1, 4, -1, 2**70), "number": (0.5, 1, 1e300)}
    return random.choice(kinds.get(schema.get("type"), (True, False, None)))


def body_of(operation, definitions, random):
    """Returns the text of a body, or None where the operation takes none."""
    if "requestBody" not in operation:
        return None
    content = operation["requestBody"]["content"]["application/json"]["schema"]
    value = drawn(content, definitions, random)
    return as_text(damaged(value, random) if random.random() < 0.3 else value, random)


def test_every_route_answers_as_it_describes(app):
    client = TestClient(app, raise_server_exceptions=False)
    description = app.openapi()
    definitions = description["components"]["schemas"]
    tried = 0
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            for number in range(INPUTS):
                random = Random(f"{method} {path} {number}")
                place = path.replace("{name}", random.choice(WORDS)).replace("{job_id}", "x")
                place = place.replace("{comparison}", random.choice(WORDS))
                text = body_of(operation, definitions, random)
                answer = client.request(
                    method,
                    place,
                    content=None if text is None else text.encode("utf-8", "surrogatepass"),
                    headers={"content-type": "application/json"},
                )
                case = f"{method} {place[:80]} {text and text[:300]}: {answer.text[:300]}"
                known = operation["responses"].keys() | ({"404", "405"} if place != path else set())
                assert str(answer.status_code) in known | {"400"}, case
                if answer.status_code >= 400:
                    detail = answer.json()["detail"]
                    assert isinstance(detail, list if answer.status_code == 422 else str), case
                tried += 1
    assert tried == INPUTS * sum(map(len, description["paths"].values())) >= INPUTS * 29
    assert json.dumps(client.get("/hyper-merge/jobs").json())
