"""A WebUI of two kinds, or in some modules of each, with three checkpoints; nothing of it stays after a test."""

import pytest
from fake_webui import installed, put


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "webui" / "models"
    for number, name in enumerate(("anime", "photo", "sub/portrait")):
        put(folder / "Stable-diffusion" / f"{name}.safetensors", bytes([number]) * 16)
    return folder


@pytest.fixture(params=["a1111", "forge"])
def flavour(request):
    return request.param


@pytest.fixture
def webui(models, flavour):
    with installed(models, flavour) as webui:
        yield webui


@pytest.fixture
def host(webui):
    return webui.host()
