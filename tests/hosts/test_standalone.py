"""Without a WebUI: a models folder, its checkpoints, and nothing to send prompts to."""

import logging

import pytest
from fake_webui import put

from hyper_merge.hosts.host import Defaults
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.runs.folders import Folders


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "Stable-diffusion"


@pytest.fixture
def host(tmp_path):
    return Standalone(tmp_path)


def test_checkpoint_names_are_paths_with_forward_slashes(host, folder):
    names = ["Anime.safetensors", "old.ckpt", "sub/deep/portrait.SAFETENSORS"]
    for name in names:
        put(folder / name)
    assert host.checkpoints() == {name: folder / name for name in names}
    assert list(host.checkpoints()) == names


@pytest.mark.parametrize(
    "name",
    [
        ".hidden.safetensors",
        ".hyper-merge-x1.tmp",
        "mix.safetensors.part",
        ".git/photo.safetensors",
        "sub/.trash/photo.ckpt",
        "photo.vae.safetensors",
        "photo.vae.ckpt",
        "readme.txt",
    ],
)
def test_hidden_temporary_and_other_files_are_left_out(host, folder, name):
    put(folder / name)
    assert host.checkpoints() == {}


def test_loras_are_listed_likewise(host, folder, tmp_path):
    put(folder / "photo.safetensors")
    for name in ("ink.safetensors", "style/oil.pt", "readme.txt"):
        put(tmp_path / "Lora" / name)
    assert list(host.loras()) == ["ink.safetensors", "style/oil.pt"]


def test_links_are_followed_and_each_folder_is_read_once(host, folder, tmp_path):
    put(tmp_path / "disk" / "photo.safetensors")
    folder.mkdir()
    (folder / "disk").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(folder)
    (folder / "gone.safetensors").symlink_to(tmp_path / "gone")
    (folder / "folder.ckpt").mkdir()
    assert list(host.checkpoints()) == ["disk/photo.safetensors"]


def test_a_missing_folder_has_no_checkpoints_and_stays_missing(host, folder):
    assert host.checkpoints() == {}
    assert not folder.exists()


def test_new_files_are_seen_without_a_refresh(host, folder):
    put(folder / "a.ckpt")
    assert set(host.checkpoints()) == {"a.ckpt"}
    put(folder / "b.ckpt")
    host.refresh()
    assert set(host.checkpoints()) == {"a.ckpt", "b.ckpt"}


def test_folders_are_those_below_the_root(host, tmp_path):
    assert host.folders() == Folders.under(tmp_path)


def test_a_run_begins_at_once_and_is_never_interrupted(host):
    with host.running("task(a)") as outer, host.running("task(b)"):
        outer.report("reading", 0.5)
        assert not outer.should_stop()


def test_there_is_no_txt2img_and_there_are_no_styles(host, folder):
    path = put(folder / "a.ckpt")
    assert host.title == "Hyper-Merge"
    assert not host.has_txt2img
    assert not host.takes_block_weights
    assert host.defaults() == Defaults(save_styles=False)
    host.save_styles({"mix: a": "{prompt} <lora:mix_0-8:1.0>"})
    host.remove_styles(["mix: a"])
    assert host.styles() == {}
    assert host.checkpoint_title(path) is None
    assert host.known_hash("a.ckpt") is None


def test_an_unexpected_error_is_logged_with_its_trace(host, caplog):
    def deep():
        raise ValueError("what went wrong")

    try:
        deep()
    except ValueError as error:
        caught = error
    with caplog.at_level(logging.ERROR):
        host.log(caught)
    assert "what went wrong" in caplog.text
    assert "in deep" in caplog.text
