"""The table of WebUIs: each is found by its marks, and documented."""

import importlib

import pytest
from fake_webui import EXTENSION, FLAVOURS, TITLES, installed


def found(models, flavour):
    with installed(models, flavour):
        return importlib.import_module("hyper_merge.hosts.webui.capabilities").capabilities()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_each_webui_is_found_by_its_marks(models, flavour):
    row = found(models, flavour)
    assert row.title == TITLES[flavour]
    assert bool(row.model_manager) is (flavour != "a1111")
    assert row.loads_when_drawing is row.matches_loosely is (flavour in ("forge", "neo"))


def test_every_webui_of_the_table_is_in_the_documentation(models):
    with installed(models, "a1111"):
        module = importlib.import_module("hyper_merge.hosts.webui.capabilities")
        titles = {row.title for row in module.TABLE}
    assert titles == set(TITLES.values())
    text = (EXTENSION / "docs" / "hosts.md").read_text(encoding="utf-8")
    for title in titles:
        assert f"\n| {title} |" in text, title
