"""The tab Compare by mouse and keyboard: pictures drawn by the WebUI, and what the app says without any."""

import pytest
from browser.conftest import IN_WEBUI, shot
from PIL import Image
from tiny_family import merge

pytestmark = pytest.mark.slow

# Not those of another file: runs of the same checkpoints share the hyper-model of the first.
TWO = ("photo.safetensors", "sub/portrait.safetensors")


@pytest.fixture
def twins(server):
    """A merge of two of the checkpoints, made by the first test that asks."""
    if not (server.models / "Lora" / "twins_0-3.safetensors").exists():
        files = [server.models / "Stable-diffusion" / file for file in TWO]
        merge(files, server.models, name="twins", ranks=(3, 2))


@pytest.fixture
def compare(twins, tab):
    """The tab Compare with that merge in it, as the test before left it."""
    return show_twins(tab)


def show_twins(tab):
    tab.to("Compare")
    tab.until(lambda: tab.find("compare_run").is_visible())
    if tab.value("compare_run") != "twins":
        tab.choose("compare_run", "twins")
    tokens = tab.find("compare_checkpoints").locator(".token")
    tab.until(lambda: sorted(map(str.strip, tokens.all_inner_texts())) == ["photo", "portrait"])
    tab.settle()
    return tab


def fill(tab, **texts):
    for name, text in texts.items():
        tab.type(f"compare_{name}", text)


@pytest.fixture
def drawn(compare, server):
    """The tab with comparison-1 of the merge; drawn by the first test that asks."""
    if (server.models / "hyper-merge/twins/pictures/comparison-1.png").exists():
        if compare.value("compare_earlier") != "comparison-1":
            compare.choose("compare_earlier", "comparison-1")
        return compare
    fill(compare, prompts="a cat\na house by the sea", steps="3", width="128", height="128")
    fill(compare, seeds="1", negative="blurry")
    for name in ("average", "difference"):
        compare.find(f"compare_{name}").locator("input").check()
    compare.choose("compare_sampler", "DDIM")
    compare.click("compare")
    compare.until(lambda: "Done: pictures of twins" in compare.text("compare_status"), 60)
    return compare


@IN_WEBUI  # the app draws by diffusers, on whole checkpoints
def test_pictures_are_drawn_shown_and_saved(drawn, server):
    compare = drawn
    compare.until(lambda: compare.find("compare_shown").locator("img").count())
    image = compare.find("compare_shown").locator("img")
    compare.until(lambda: image.evaluate("image => image.naturalWidth") > 300)
    text = compare.text("compare_shown")
    assert "comparison-1 of twins: 4 pairs" in text
    assert "Hyper-model alone" in text
    shot(compare.page, f"{server.host}-compare")
    compare.page.evaluate("document.body.classList.add('dark')")
    shot(compare.page, f"{server.host}-compare-dark")
    compare.page.evaluate("document.body.classList.remove('dark')")
    picture = server.models / "hyper-merge/twins/pictures/comparison-1.png"
    with Image.open(picture) as grid:
        assert "Negative prompt: blurry" in grid.text["parameters"]
        assert "Sampler: DDIM" in grid.text["parameters"]


@IN_WEBUI
def test_they_stop_and_what_was_drawn_before_is_there(drawn, server):
    compare, pictures = drawn, server.models / "hyper-merge/twins/pictures"
    before = sorted(pictures.glob("*.png"))
    fill(compare, prompts="a cat", steps="150", seeds="1, 2, 3, 4")
    compare.click("compare")
    compare.until(lambda: "picture" in compare.text("compare_status"))
    shot(compare.page, f"{server.host}-compare-running")
    compare.click("compare")
    compare.until(lambda: "still being made" in compare.text("compare_message"))
    compare.click("compare_stop")
    compare.until(lambda: "Stopped" in compare.text("compare_status"))
    assert sorted(pictures.glob("*.png")) == before
    assert compare.value("compare_earlier") == "comparison-1"
    fill(compare, steps="3", seeds="9")
    compare.click("compare")
    newest = f"comparison-{len(before) + 1}"
    compare.until(lambda: compare.value("compare_earlier") == newest)
    compare.until(lambda: f"{newest} of twins" in compare.text("compare_shown"))
    compare.choose("compare_earlier", "comparison-1")
    compare.until(lambda: "comparison-1 of twins" in compare.text("compare_shown"))


def test_a_problem_is_shown_beside_the_button(compare, server):
    if server.host == "standalone" and not compare.find("compare").is_enabled():
        assert "pip install" in compare.text("compare_shown")
        return
    fill(compare, prompts="", seeds="1")
    compare.click("compare")
    compare.until(lambda: "expected a prompt" in compare.text("compare_message"))
    fill(compare, prompts="a cat", seeds="one")
    compare.click("compare")
    compare.until(lambda: 'got "one"' in compare.text("compare_message"))
    shot(compare.page, f"{server.host}-compare-refused")


def test_the_picked_values_stay_while_other_tabs_are_open(twins, new_tab):
    compare = show_twins(new_tab)
    tokens = compare.find("compare_checkpoints").locator(".token")
    tokens.filter(has_text="portrait").locator(".token-remove").click()
    compare.until(lambda: tokens.count() == 1)
    fill(compare, prompts="a cat")
    compare.to("Runs")
    compare.until(lambda: compare.find("runs_table").is_visible())
    compare.to("Compare")
    compare.settle()
    assert [text.strip() for text in tokens.all_inner_texts()] == ["photo"]
    assert compare.value("compare_prompts") == "a cat"
