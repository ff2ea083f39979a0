"""What the WebUI lists, and where it wants its files."""

import shutil
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from fake_webui import FLAVOURS, TITLES, folder_options, installed, put


@pytest.fixture(params=FLAVOURS)
def flavour(request):
    return request.param


def only(webui, name):
    return webui.sd_models.get_closet_checkpoint_match(name)


def test_the_host_is_called_by_its_name(host, flavour):
    assert host.title == TITLES[flavour]
    assert host.has_txt2img


def test_weights_by_block_are_for_webuis_whose_extension_takes_them(host, webui, flavour):
    webui.load_scripts()
    assert host.takes_block_weights is (flavour in ("a1111", "forge"))
    plot, _ = webui.scripts.scripts_data
    webui.scripts.scripts_data[:] = [plot]
    assert not host.takes_block_weights


def test_checkpoints_are_the_hosts_names_without_hash(host, models):
    folder = models / "Stable-diffusion"
    names = ["anime.safetensors", "photo.safetensors", "sub/portrait.safetensors"]
    assert host.checkpoints() == {name: folder / name for name in names}


def test_a_name_stays_when_hashing_changes_the_title(host, webui):
    before = host.checkpoints()
    only(webui, "photo.safetensors").calculate_shorthash()
    assert any(title.endswith("]") for title in webui.sd_models.checkpoints_list)
    assert host.checkpoints() == before


def test_a_hash_is_given_only_if_already_known(host, webui):
    assert host.known_hash("photo.safetensors") is None
    known = only(webui, "photo.safetensors").calculate_shorthash()
    assert len(known) == 10
    assert host.known_hash("photo.safetensors") == known
    assert host.known_hash("unknown.safetensors") is None


def test_a_list_refilled_meanwhile_is_read_whole(host, webui, monkeypatch):
    names, path = list(host.checkpoints()), host.checkpoints()["photo.safetensors"]
    fill, begun = webui.sd_models.list_models, threading.Event()

    def slow():
        webui.sd_models.checkpoints_list.clear()
        begun.set()
        time.sleep(0.2)
        fill()

    monkeypatch.setattr(webui.sd_models, "list_models", slow)
    for read in (lambda: list(host.checkpoints()) == names, lambda: host.checkpoint_title(path)):
        begun.clear()
        other = threading.Thread(target=host.refresh)
        other.start()
        assert begun.wait(60)
        assert read()
        other.join()


def test_titles_are_read_again_after_the_webuis_own_refresh(host, webui, monkeypatch):
    path, titles = host.checkpoints()["photo.safetensors"], webui.sd_models.checkpoint_tiles
    answers = [RuntimeError("dictionary changed size during iteration"), titles()[:-1]]

    def changing():
        answer = answers.pop(0) if answers else titles()
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(webui.sd_models, "checkpoint_tiles", changing)
    assert host.checkpoint_title(path) == "photo.safetensors"
    assert not answers


def test_files_of_one_name_in_two_folders_are_listed(models, flavour, tmp_path):
    other = put(tmp_path / "other" / "photo.safetensors", b"other")
    options = folder_options(flavour, tmp_path / "other", models / "Lora")
    with installed(models, flavour, **options) as webui:
        for info in list(webui.sd_models.checkpoints_list.values()):
            info.calculate_shorthash()
        webui.sd_models.list_models()
        listed = webui.host().checkpoints()
    assert listed["photo.safetensors"] == other
    assert sorted(listed.values()) == sorted([other, *models.glob("**/*.safetensors")])


def test_a1111_in_debug_mode_lists_nothing_before_a_refresh(models):
    with installed(models, "a1111", debug_mode=True) as webui:
        host = webui.host()
        assert host.checkpoints() == {}
        host.refresh()
        assert "anime.safetensors" in host.checkpoints()


def test_a_host_without_any_checkpoint_has_an_empty_list(tmp_path, flavour):
    with installed(tmp_path / "models", flavour) as webui:
        host = webui.host()
        host.refresh()
        assert host.checkpoints() == {}


def test_refresh_finds_new_checkpoints_and_new_loras(host, webui, models):
    put(models / "Stable-diffusion" / "mix.safetensors")
    put(models / "Lora" / "mix_0-128.safetensors")
    assert "mix.safetensors" not in host.checkpoints()
    host.refresh()
    assert "mix.safetensors" in host.checkpoints()
    assert "mix_0-128" in webui.networks.available_networks


@pytest.mark.parametrize("networks", [None, SimpleNamespace(lora="of another extension")])
def test_refresh_does_without_the_lora_extension(host, models, monkeypatch, networks):
    if networks is None:
        monkeypatch.delitem(sys.modules, "networks")
    else:
        monkeypatch.setitem(sys.modules, "networks", networks)
    put(models / "Stable-diffusion" / "mix.safetensors")
    host.refresh()
    assert "mix.safetensors" in host.checkpoints()


def test_a_new_checkpoint_has_a_title_after_a_refresh(host, webui, models):
    path = put(models / "Stable-diffusion" / "sub" / "mix.safetensors")
    assert host.checkpoint_title(path) is None
    host.refresh()
    title = host.checkpoint_title(path)
    assert title in webui.sd_models.checkpoint_tiles()
    assert only(webui, title).filename == str(path)


def test_a_title_has_its_hash_unless_the_next_picture_loads_the_file(host, webui, models):
    path = models / "Stable-diffusion" / "photo.safetensors"
    known = only(webui, "photo.safetensors").calculate_shorthash()
    ending = "" if webui.lazy else f" [{known}]"
    assert host.checkpoint_title(path) == f"photo.safetensors{ending}"


def test_the_title_is_not_that_of_a_similar_name(host, webui, models):
    put(models / "Stable-diffusion" / "my photo.safetensors")
    host.refresh()
    path = models / "Stable-diffusion" / "photo.safetensors"
    # Forge and Neo would take the other one for this name: then none is better
    expected = None if webui.lazy else "photo.safetensors"
    assert host.checkpoint_title(path) == expected


def test_outputs_go_to_the_models_folder(host, models):
    folders = host.folders()
    assert folders.models == models / "Stable-diffusion"
    assert folders.loras == models / "Lora"
    assert folders.runs == models / "hyper-merge"
    assert folders.cache == models / "hyper-merge" / "cache"


def test_folders_of_the_command_line_are_honoured(models, flavour, tmp_path):
    with installed(
        models, flavour, **folder_options(flavour, tmp_path / "a", tmp_path / "b")
    ) as webui:
        folders = webui.host().folders()
    assert (folders.models, folders.loras) == (tmp_path / "a", tmp_path / "b")
    assert folders.runs == models / "hyper-merge"


def test_loras_go_below_the_models_folder_without_an_option(host, webui, models):
    del webui.cmd_opts.lora_dir
    assert host.folders().loras == models / "Lora"


def test_a_vanished_file_stays_listed_until_the_refresh(host, models):
    shutil.rmtree(models / "Stable-diffusion" / "sub")
    assert "sub/portrait.safetensors" in host.checkpoints()
    host.refresh()
    assert "sub/portrait.safetensors" not in host.checkpoints()


def test_reading_the_lists_loads_no_model(host, webui, models):
    host.checkpoints()
    host.refresh()
    host.checkpoint_title(models / "Stable-diffusion" / "photo.safetensors")
    assert not hasattr(webui.sd_models.model_data.sd_model, "content")
