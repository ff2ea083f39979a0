"""Prompt styles: ours come and go, the user's stay as they are."""

from pathlib import Path

import pytest
from fake_webui import FLAVOURS
from fake_webui.styles import PromptStyle, StyleDatabase

from hyper_merge.errors import OutputError

OURS = {
    "mix: photo": "{prompt} <lora:mix_0-8:0.5> <lora:mix_1-4:-0.25>",
    "mix: anime": "{prompt} <lora:mix_0-8:-1.0> <lora:mix_1-4:1.0>",
}


@pytest.fixture(params=FLAVOURS)
def flavour(request):
    return request.param


def on_disk(webui):
    """Returns the styles that the WebUI reads at its next start."""
    read = StyleDatabase(webui.prompt_styles.paths, webui.errors).styles
    return {name: style for name, style in read.items() if style.path != "do_not_save"}


@pytest.fixture
def mine(webui):
    """Three styles of the user: one plain, one with a LoRA, one with a negative prompt."""
    mine = {
        "ink": PromptStyle("ink", "ink drawing, {prompt}", "colour", None),
        "mix: words": PromptStyle("mix: words", "{prompt} <lora:x:1>, sharp", "", None),
        "mix: negative": PromptStyle("mix: negative", "{prompt} <lora:x:1>", "blurry", None),
    }
    webui.prompt_styles.styles.update(mine)
    webui.prompt_styles.save_styles()
    return mine


def test_saved_styles_outlast_a_restart_and_add_the_tags(host, webui):
    host.save_styles(OURS)
    assert set(host.styles()) >= set(OURS)
    assert set(on_disk(webui)) == set(OURS)
    text = webui.prompt_styles.apply_styles_to_prompt("a cat", ["mix: photo"])
    assert text == "a cat <lora:mix_0-8:0.5> <lora:mix_1-4:-0.25>"


def test_headings_between_the_files_are_no_styles(host, webui):
    host.save_styles(OURS)
    webui.prompt_styles.reload()
    assert set(host.styles()) == set(OURS)


def test_saving_keeps_the_users_styles_and_a_backup(host, webui, mine):
    host.save_styles(OURS)
    saved = on_disk(webui)
    assert {name: saved[name][:3] for name in mine} == {n: style[:3] for n, style in mine.items()}
    assert Path(f"{webui.prompt_styles.default_path}.bak").exists()


def test_our_style_is_renewed_in_its_own_file(host, webui):
    host.save_styles(OURS)
    second = str(webui.prompt_styles.paths[-1])
    styles = webui.prompt_styles.styles
    styles["mix: photo"] = styles["mix: photo"]._replace(path=second)
    host.save_styles({"mix: photo": "{prompt} <lora:mix_0-8:0.75>"})
    assert on_disk(webui)["mix: photo"][1:] == ("{prompt} <lora:mix_0-8:0.75>", "", second)


@pytest.mark.parametrize("flavour", ["forge"])  # where the fake has two files
def test_files_of_other_styles_are_not_touched(host, webui):
    other = Path(webui.prompt_styles.paths[-1])
    other.write_text("name,prompt,negative_prompt,author\n# mine,,,\nsea,the sea,,me\n")
    webui.prompt_styles.reload()
    before = other.read_bytes()
    host.save_styles(OURS)
    host.remove_styles(["mix: photo"])
    assert other.read_bytes() == before
    assert not other.with_name(other.name + ".bak").exists()
    assert set(on_disk(webui)) == {"sea", "mix: anime"}


@pytest.mark.parametrize("flavour", ["forge"])
def test_a_style_in_another_file_is_removed_there_alone(host, webui, mine):
    first, second = map(Path, webui.prompt_styles.paths)
    host.save_styles(OURS)
    styles = webui.prompt_styles.styles
    styles["mix: photo"] = styles["mix: photo"]._replace(path=str(second))
    webui.prompt_styles.save_styles()
    before = first.read_bytes()
    host.remove_styles(["mix: photo"])
    assert first.read_bytes() == before
    assert set(on_disk(webui)) == {*mine, "mix: anime"}


@pytest.mark.parametrize("name", ["ink", "mix: words", "mix: negative"])
def test_a_users_style_of_the_name_prevents_saving(host, webui, mine, name):
    before = dict(webui.prompt_styles.styles)
    with pytest.raises(OutputError, match=rf"not Hyper-Merge's have these names: {name}; rename"):
        host.save_styles({**OURS, name: "{prompt} <lora:mix_0-8:1.0>"})
    assert webui.prompt_styles.styles == before
    assert set(on_disk(webui)) == set(mine)


def test_removing_leaves_the_users_styles_and_unknown_names(host, webui, mine):
    host.save_styles(OURS)
    host.remove_styles([*OURS, *mine, "never saved"])
    assert set(host.styles()) == set(mine)
    assert set(on_disk(webui)) == set(mine)


def test_removing_nothing_writes_nothing(host, webui, mine):
    path = Path(webui.prompt_styles.default_path)
    path.unlink()
    host.remove_styles([*mine, "never saved"])
    assert not path.exists()


@pytest.mark.parametrize("action", ["save_styles", "remove_styles"])
def test_unwritable_styles_are_refused_and_stay_unchanged(host, webui, monkeypatch, action):
    host.save_styles(OURS)
    before = dict(webui.prompt_styles.styles)

    def locked(path=None):
        raise PermissionError(13, "Permission denied", "styles.csv")

    monkeypatch.setattr(webui.prompt_styles, "save_styles", locked)
    with pytest.raises(OutputError, match=r"cannot be written .*styles\.csv.*close other programs"):
        getattr(host, action)({"mix: photo": "{prompt} <lora:mix_0-8:0.1>"})
    assert webui.prompt_styles.styles == before
