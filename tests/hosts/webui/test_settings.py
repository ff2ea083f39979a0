"""Our page of the settings: what it offers, and what comes of what people put there."""

import json
import re
from dataclasses import replace

import pytest
from fake_webui import installed, put

from hyper_merge.errors import CacheError
from hyper_merge.hosts.host import Defaults
from hyper_merge.runs.folders import SIZE_LIMIT


@pytest.fixture
def page(webui):
    """The keys of our page, registered as at the start of the WebUI."""
    webui.settings().add_settings()
    return list(webui.opts.data_labels)


def analysis(folder, size):
    """A file of the cache of analyses."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "0123-8.analysis.safetensors"
    path.write_bytes(bytes(size))
    return path


def test_untouched_settings_are_the_defaults_of_the_program(host, page, models):
    assert host.defaults() == Defaults()
    assert host.folders().cache_limit == SIZE_LIMIT
    assert host.folders().runs == models / "hyper-merge"


def test_before_the_page_is_registered_the_defaults_hold(host, models, caplog):
    assert host.defaults() == Defaults()
    assert host.folders().runs == models / "hyper-merge"
    assert not caplog.records


def test_all_settings_are_on_one_page_with_our_prefix(webui, page):
    assert {webui.opts.data_labels[key].section for key in page} == {("hyper_merge", "Hyper-Merge")}
    assert all(key.startswith("hyper_merge_") for key in page)


def test_saved_settings_are_used_after_a_restart(models, flavour, tmp_path, caplog):
    saved = {
        "hyper_merge_ranks": "96, 48",
        "hyper_merge_save_styles": False,
        "hyper_merge_folder": str(tmp_path / "elsewhere"),
        "hyper_merge_cache_gb": 1.5,
    }
    (models.parent / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    with installed(models, flavour) as webui:
        webui.settings().add_settings()
        host = webui.host()
        assert host.defaults() == Defaults("96, 48", save_styles=False)
        folders = host.folders()
    assert folders.runs == tmp_path / "elsewhere"
    assert folders.cache == tmp_path / "elsewhere" / "cache"
    assert folders.cache_limit == 1.5e9
    assert not caplog.records


def test_a_relative_folder_is_below_the_webuis_data(host, page, webui, models):
    webui.opts.data["hyper_merge_folder"] = "merges"
    assert host.folders().runs == models.parent / "merges"


BAD = {
    "hyper_merge_ranks": [None, "", "many", "0", "8.5", 7, ["8"]],
    "hyper_merge_save_styles": [None, "yes", 1],
    "hyper_merge_folder": [None, 3, "a\0b", "config.json", " "],
    "hyper_merge_cache_gb": [None, "20", -1, float("nan"), float("inf"), True],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in BAD for value in BAD[key]])
def test_a_senseless_value_gives_the_default_and_a_warning(host, page, webui, caplog, key, value):
    (webui.data / "config.json").touch()
    expected = host.defaults(), host.folders()
    webui.opts.data[key] = value
    assert (host.defaults(), host.folders()) == expected
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    label = webui.opts.data_labels[key].label
    message = record.getMessage()
    assert message.startswith(f"Settings, Hyper-Merge, {label}: ")
    assert re.search("expected .*; using ", message)


def test_a_bad_value_leaves_the_other_settings_alone(host, page, webui):
    webui.opts.data["hyper_merge_ranks"] = "none"
    webui.opts.data["hyper_merge_save_styles"] = False
    webui.opts.data["hyper_merge_cache_gb"] = 0
    assert host.defaults() == replace(Defaults(), save_styles=False)
    assert host.folders().cache_limit == 0


def test_the_folder_is_hidden_where_the_host_hides_folders(models, flavour):
    with installed(models, flavour, hide_ui_dir_config=True) as webui:
        webui.settings().add_settings()
        assert not webui.opts.set("hyper_merge_folder", "/somewhere")
        assert webui.opts.set("hyper_merge_ranks", "8")


def test_the_button_is_not_kept_among_the_saved_settings(page, webui):
    assert "hyper_merge_clear_cache" in page
    assert "hyper_merge_clear_cache" not in webui.opts.data


def test_the_cache_has_its_size_and_a_clear_button(host, page, webui):
    settings = webui.settings()
    path = analysis(host.folders().cache, 3_000_000)
    held = settings.cache_html()
    assert held.startswith("The cache holds 3 MB of at most 20.00 GB.")
    assert held.endswith(f" {path.parent}.")
    cleared = settings.clear_cache_html()
    assert cleared.startswith("The cache holds 0 kB of at most 20.00 GB.")
    assert cleared.endswith(f" {path.parent}.<br>The cache is empty; 3 MB are free again.")
    assert not path.exists()


def test_a_missing_cache_has_no_size_and_no_button(host, page, webui):
    settings = webui.settings()
    assert settings.cache_html().startswith("The cache holds 0 kB of ")
    assert settings.clear_cache_html().endswith("<br>The cache is empty; 0 kB are free again.")
    assert not host.folders().cache.exists()


def test_the_cache_is_not_cleared_while_the_webui_works(host, page, webui):
    path = analysis(host.folders().cache, 100)
    with webui.queue_lock:
        assert "at work" in webui.settings().clear_cache_html()
        assert path.exists()
    webui.settings().clear_cache_html()
    assert not path.exists()
    assert not webui.queue_lock.held


def test_a_cache_that_cannot_be_cleared_says_so(host, page, webui, monkeypatch):
    def fail(folder):
        raise CacheError("<1 file> cannot be deleted")

    monkeypatch.setattr("hyper_merge.operations.cache.clear_analyses", fail)
    assert webui.settings().clear_cache_html().endswith("&lt;1 file&gt; cannot be deleted")
    assert not webui.queue_lock.held


def test_the_page_stands_in_a_category_of_the_webui(webui, page):
    ours = {key: info for key, info in webui.opts.data_labels.items() if "hyper_merge" in key}
    assert {info.category_id for info in ours.values()} == {"system"}


def test_the_first_of_several_folders_is_taken(models, tmp_path):
    dirs = [str(tmp_path / "first"), str(tmp_path / "second")]
    with installed(models, "neo", ckpt_dirs=dirs, lora_dirs=dirs[::-1]) as webui:
        folders = webui.host().folders()
        assert [str(folders.models), str(folders.loras)] == dirs
        webui.cmd_opts.ckpt_dirs, webui.cmd_opts.lora_dirs = [], []
        folders = webui.host().folders()
    assert (folders.models, folders.loras) == (models / "Stable-diffusion", models / "Lora")


def test_loras_of_all_folders_are_listed(models, tmp_path):
    first, second, old = (tmp_path / name for name in ("first", "second", "lyco"))
    for path in ("a.safetensors", "sub/b.pt", "a.preview.png"):
        put(first / path)
    put(second / "a.safetensors")
    put(models / "Lora" / "c.safetensors")
    dirs = [str(first), str(second), str(first)]
    with installed(models, "neo", lora_dirs=dirs) as webui:
        assert webui.host().loras() == {
            "a.safetensors": first / "a.safetensors",
            "sub/b.pt": first / "sub" / "b.pt",
            "second/a.safetensors": second / "a.safetensors",
            "c.safetensors": models / "Lora" / "c.safetensors",
        }
    put(old / "d.safetensors")
    with installed(models, "a1111", lyco_dir_backcompat=str(old)) as webui:
        assert list(webui.host().loras()) == ["c.safetensors", "d.safetensors"]
