"""Presets over the API: those of the tab, listed, saved, replaced and deleted."""

import json

import pytest

from hyper_merge.runs.presets import load_presets
from hyper_merge.ui.form import Form
from hyper_merge.ui.handlers.saved_forms import load_named_preset, save_named_preset
from hyper_merge.ui.saved_form import default_form, form_to_plain

SETTINGS = {"checkpoints": ["a.safetensors", "b.safetensors"], "ranks": "6, 2", "separate": False}


def delete(client, name):
    answer = client.http.delete("/hyper-merge/presets", params={"name": name})
    return answer.status_code, answer.json()


def test_presets_are_saved_replaced_listed_and_deleted(client):
    assert client.get("/presets") == (200, {"presets": []})
    name = "ünï: 5/3 & 'q'"
    saved = {"name": name, "settings": SETTINGS}
    assert client.post("/presets", {"name": f" {name} ", "settings": {"ranks": "1"}})[0] == 200
    assert client.post("/presets", saved) == (200, saved)
    assert client.post("/presets", {"name": "other", "settings": {}})[0] == 200
    assert client.get("/presets")[1]["presets"] == [saved, {"name": "other", "settings": {}}]
    assert delete(client, name) == (200, {"presets": [{"name": "other", "settings": {}}]})
    code, answer = delete(client, name)
    assert (code, "expected the name of a preset" in answer["detail"]) == (404, True)


def test_tab_and_api_have_the_same_presets(client, host):
    form = default_form(host)
    save_named_preset(host, "from the tab", *form.widget_values())
    (row,) = client.get("/presets")[1]["presets"]
    assert row == {"name": "from the tab", "settings": form_to_plain(form)}
    client.post("/presets", {"name": "from a script", "settings": {**SETTINGS, "unknown": 1}})
    *values, name, _ = load_named_preset(host, "from a script")
    loaded = Form.from_widgets(*values)
    assert (name, loaded.checkpoints, loaded.ranks) == (
        "from a script",
        SETTINGS["checkpoints"],
        "6, 2",
    )
    assert loaded.separate is False
    assert loaded.dtype == form.dtype


@pytest.mark.parametrize(
    ("name", "settings", "code"),
    [
        ("", {}, 400),
        ("x" * 61, {}, 400),
        ("two\nlines", {}, 400),
        ("x", {"seed": float("inf")}, 400),
        ("x", {"seed": 10**400}, 400),
        ("x", {"name": "\ud800"}, 400),
        ("x", {"name": "y" * 1_000_001}, 400),
        ("x", {"ranks": [1, 2]}, 422),
        ("x", {"ranks": {"a": 1}}, 422),
    ],
)
def test_what_no_form_holds_is_refused(client, host, name, settings, code):
    body = json.dumps({"name": name, "settings": settings})
    answer = client.http.post(
        "/hyper-merge/presets", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == code
    assert load_presets(host.folders().runs) == {}


def test_damaged_presets_are_reported_and_left(client, host):
    path = host.folders().runs / "presets.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{")
    for code, answer in (
        client.get("/presets"),
        client.post("/presets", {"name": "x", "settings": {}}),
    ):
        assert (code, "is damaged" in answer["detail"]) == (400, True)
    assert path.read_text() == "{"
