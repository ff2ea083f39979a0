"""The script in the WebUI: it registers, it survives Reload UI, and the page of it works."""

import configparser
import inspect
import sys
import urllib.request
from types import ModuleType

import gradio as gr
import pytest
import torch
from fake_webui import EXTENSION, FLAVOURS, ROOTS, installed

from hyper_merge.hosts.host import Host
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.runtime.devices import resolve_device


@pytest.fixture
def built(monkeypatch):
    """Stands in for the tab; the hosts that it was built for."""
    hosts = []

    def build_tab(host):
        hosts.append(host)
        with gr.Blocks() as blocks:
            gr.Button("Send to txt2img", elem_id="hyper_merge_send")
        return blocks

    monkeypatch.setitem(sys.modules, "hyper_merge.ui.tab", ModuleType("hyper_merge.ui.tab"))
    sys.modules["hyper_merge.ui.tab"].build_tab = build_tab
    return hosts


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_script_registers_only_tab_settings_api_and_axis(webui, built):
    webui.load_scripts()
    assert webui.errors.reports == []
    callbacks = webui.script_callbacks.callback_map
    assert {name: len(functions) for name, functions in callbacks.items()} == {
        "ui_tabs": 1,
        "ui_settings": 1,
        "app_started": 1,
        "before_ui": 1,
    }
    assert built == []
    assert webui.opts.data_labels == {}


@pytest.mark.parametrize(
    ("of", "options", "device"),
    [
        ("a1111", {"device_id": "1"}, "cuda:1"),
        ("a1111", {"use_cpu": ["all"]}, "cpu"),
        ("a1111", {"use_cpu": ["interrogate"]}, "cuda"),
        ("forge", {"always_cpu": True}, "cpu"),
        ("forge", {}, "cuda:0"),
        ("reforge", {"always_cpu": True}, "cpu"),
    ],
)
def test_auto_is_the_device_that_the_webui_computes_on(
    models, built, monkeypatch, of, options, device
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with installed(models, of, **options) as webui:
        webui.load_scripts()
        assert webui.errors.reports == []
        assert resolve_device("auto") == torch.device(device)
    assert resolve_device("auto") == torch.device("cuda")


def test_the_tab_has_title_id_and_this_host(webui, built):
    webui.load_scripts()
    ((blocks, title, name),) = webui.script_callbacks.ui_tabs_callback()
    assert isinstance(blocks, gr.Blocks)
    assert (title, name) == ("Hyper-Merge", "hyper_merge")
    assert set(built[0].checkpoints()) >= {"anime.safetensors", "photo.safetensors"}


def test_reload_ui_registers_once_and_the_new_tab_works(webui, built):
    webui.load_scripts()
    webui.create_ui()
    webui.load_scripts()
    webui.create_ui()
    callbacks = webui.script_callbacks.callback_map
    assert {name: len(functions) for name, functions in callbacks.items()} == {
        "ui_tabs": 1,
        "ui_settings": 1,
        "app_started": 1,
        "before_ui": 1,
    }
    with built[-1].running("task(again)") as progress:
        progress.on_progress("solving", 0.5)
        assert webui.progress.answer("task(again)")["progress"] == pytest.approx(0.5, abs=1e-3)
    assert webui.errors.reports == []


def test_a_tab_that_fails_to_build_is_logged(webui, built, monkeypatch):
    def fail(host):
        raise RuntimeError("no tab today")

    sys.modules["hyper_merge.ui.tab"].build_tab = fail
    webui.load_scripts()
    assert webui.script_callbacks.ui_tabs_callback() == []
    assert "no tab today" in webui.errors.reports[0]


@pytest.mark.parametrize("name", ["SD.Next", "this WebUI"])
def test_a_webui_that_lacks_something_gets_a_sentence_and_no_tab(
    models, built, monkeypatch, capsys, name
):
    with installed(models, "a1111") as webui:
        monkeypatch.delattr(sys.modules["modules.styles"], "PromptStyle")
        if name == "SD.Next":
            monkeypatch.setattr(sys.modules["modules.styles"], "Style", object, raising=False)
        monkeypatch.delitem(sys.modules, "modules.progress")
        monkeypatch.delattr(sys.modules["modules"], "progress")
        webui.load_scripts()
        assert (webui.errors.reports, webui.script_callbacks.callback_map) == ([], {})
    said = capsys.readouterr().out
    lacks = "lacks modules.styles.PromptStyle, modules.progress.add_task_to_queue"
    assert said.startswith(f"Hyper-Merge is not loaded: {name} {lacks}")
    needs = "one of AUTOMATIC1111, Forge Classic, reForge, Forge, Forge Neo. "
    assert needs in said


@pytest.mark.parametrize("flavour", ["a1111"])
def test_the_tab_is_built_without_checkpoints_in_debug_mode(tmp_path, built, flavour):
    with installed(tmp_path / "models", flavour, debug_mode=True) as webui:
        webui.load_scripts()
        webui.create_ui()
        assert built[0].checkpoints() == {}
        assert webui.errors.reports == []


def components(demo, elem_id):
    return [block for block in demo.blocks.values() if getattr(block, "elem_id", None) == elem_id]


def test_our_settings_are_components_of_the_hosts_page(webui, built):
    webui.load_scripts()
    demo = webui.create_ui()
    kinds = {
        "hyper_merge_ranks": gr.Textbox,
        "hyper_merge_save_styles": gr.Checkbox,
        "hyper_merge_folder": gr.Textbox,
        "hyper_merge_cache_gb": gr.Number,
        "hyper_merge_clear_cache": gr.Button,
    }
    for key, kind in kinds.items():
        (component,) = components(demo, f"setting_{key}")
        assert isinstance(component, kind)
    (size,) = components(demo, "setting_hyper_merge_clear_cache_size")
    assert "The cache holds 0 kB of at most 20.00 GB" in size.value


@pytest.mark.usefixtures("gradio_leaves_sockets")
@pytest.mark.filterwarnings("ignore:The `name` is not the first:DeprecationWarning")  # gradio's own
def test_the_page_of_the_webui_is_served(webui, built):
    webui.load_scripts()
    address = webui.launch()
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            page = answer.read().decode()
    finally:
        webui.close()
    assert "hyper_merge_send" in page
    assert "function requestProgress" in page


@pytest.mark.parametrize("kind", ["webui", "standalone"])
def test_each_host_has_all_that_the_protocol_asks_for(webui, kind):
    host_class = {"webui": type(webui.host()), "standalone": Standalone}[kind]
    for name, member in vars(Host).items():
        if name.startswith("_"):
            continue
        assert hasattr(host_class, name)
        if callable(member):
            expected = list(inspect.signature(member).parameters)
            assert list(inspect.signature(getattr(host_class, name)).parameters) == expected


def test_the_webui_is_gone_from_memory_after_its_test(models, flavour):
    with installed(models, flavour) as webui:
        first = sys.modules[type(webui.host()).__module__]
    assert not [name for name in sys.modules if name.split(".")[0] in ROOTS]
    with installed(models, flavour) as webui:
        second = sys.modules[type(webui.host()).__module__]
        assert second is not first
        assert second.shared is webui.shared


def test_the_extension_says_its_name():
    config = configparser.ConfigParser()
    config.read(EXTENSION / "metadata.ini")
    assert config["Extension"]["Name"] == "hyper-merge"
