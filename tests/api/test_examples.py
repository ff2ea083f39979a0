"""The examples in the schema are requests that are taken, and answers as the models describe them."""

import pytest
from fastapi.encoders import jsonable_encoder

from hyper_merge.api import lora_models, request_models, response_models
from hyper_merge.api.examples import EXAMPLES


def models_of(app):
    """Returns the model of body and answer by method and path, where there is one."""
    schema = app.openapi()

    def model(content):
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        rooms = (request_models, response_models, lora_models)
        return next(getattr(room, name) for room in rooms if hasattr(room, name))

    found = {}
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            good = next(
                route["responses"][code] for code in ("200", "202") if code in route["responses"]
            )
            body = model(route["requestBody"]["content"]) if "requestBody" in route else None
            answer = model(good["content"]) if "application/json" in good["content"] else None
            found[method.upper(), path.removeprefix("/hyper-merge")] = body, answer
    return found


def test_every_body_and_answer_has_an_example_that_fits_its_model(app):
    models = models_of(app)
    assert models.keys() == EXAMPLES.keys()
    for route, (body, answer) in models.items():
        example = EXAMPLES[route]
        assert (body is None) is (example.body is None), route
        assert (answer is None) is (not example.answers), route
        if body:
            body(**example.body)
        for value in example.answers.values():
            assert jsonable_encoder(answer(**value)) == value, route


def test_the_schema_shows_the_examples(app):
    schema = app.openapi()
    for (method, path), example in EXAMPLES.items():
        route = schema["paths"][f"/hyper-merge{path}"][method.lower()]
        if example.body:
            content = route["requestBody"]["content"]["application/json"]
            assert content["example"] == example.body
            assert "$ref" in content["schema"]
        if example.answers:
            good = next(code for code in ("200", "202") if code in route["responses"])
            shown = route["responses"][good]["content"]["application/json"]["examples"]
            answers = {name: {"value": value} for name, value in example.answers.items()}
            assert shown == without_nulls(answers)


def without_nulls(value):
    """Returns a value as FastAPI shows it."""
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {name: without_nulls(part) for name, part in value.items() if part is not None}


@pytest.mark.parametrize("path", ["/plan", "/look", "/merge", "/inspect", "/average"])
def test_an_example_fails_for_its_names_alone(client, path):
    code, answer = client.post(path, EXAMPLES["POST", path].body)
    assert code == 400
    assert "expected a name of the host's list, got 'anime.safetensors'" in answer["detail"]
