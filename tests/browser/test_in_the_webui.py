"""What the tab does with the WebUI around it: prompt, styles, menus, progress, Interrupt, settings."""

import re

import pytest
from browser.conftest import IN_WEBUI, shot
from browser.the_tab import Tab

pytestmark = [pytest.mark.slow, IN_WEBUI]

TWO = ("anime.safetensors", "sub/portrait.safetensors")


@pytest.fixture
def merged(tab, server):
    """The tab with a merge of its own in it; made by the first test that asks."""
    if not (server.models / "Lora" / "duo_0-3.safetensors").exists():
        fill_in(tab, "duo", "3, 2")
        tab.merge()
    tab.to("Merge")
    if not shows_duo(tab):
        tab.to("Runs")
        tab.pick_run("duo")
        tab.click("run_open")
    tab.until(lambda: shows_duo(tab))
    return tab


def shows_duo(tab):
    return tab.find("sentence").is_visible() and tab.text("sentence").startswith("duo")


def fill_in(tab, name, ranks):
    if tab.picked():
        tab.click("clear")
        tab.until(lambda: not tab.picked())
    tab.pick(*TWO)
    tab.type("name", name)
    tab.type("ranks", ranks)


def picked_styles(tab):
    tokens = tab.page.locator("#txt2img_styles .token").all_inner_texts()
    return [token.strip() for token in tokens]


def pick_style(tab, name):
    """Clicks on a style in the list; tells whether it is picked, which takes a moment."""
    if name in picked_styles(tab):
        return True
    box = tab.page.locator("#txt2img_styles input")
    box.click()
    if tab.option("styles", name).is_visible():
        tab.option("styles", name).click()
    box.blur()
    tab.page.wait_for_timeout(500)
    return False


def is_offered(tab, name):
    """Tells whether the menu of styles has a style; opens it, for the host may redraw it at any time."""
    box = tab.page.locator("#txt2img_styles input")
    box.click()
    offered = tab.option("styles", name).is_visible()
    box.blur()
    return offered


def test_a_prompt_is_sent_and_the_hyper_model_selected(merged):
    page = merged.page
    tags = merged.value("prompt")
    prompt, negative = (page.locator(f"#txt2img_{x}prompt textarea") for x in ("", "neg_"))
    page.locator("#tabs button").first.click()
    prompt.fill("a cat in a garden")
    negative.fill("blurry")
    page.locator("#refresh_txt2img_styles").click()
    for style in ("mine", "duo: anime", "duo: portrait"):
        merged.until(lambda style=style: pick_style(merged, style))
    merged.show()
    merged.click("send")
    merged.until(lambda: prompt.input_value() == f"a cat in a garden {tags}")
    merged.until(lambda: picked_styles(merged) == ["mine"])
    assert negative.input_value() == "blurry"
    menu = page.locator("#setting_sd_model_checkpoint input")
    merged.until(lambda: menu.input_value().startswith("duo.safetensors"))
    merged.show()
    merged.click("send")
    merged.until(lambda: prompt.input_value() == f"a cat in a garden {tags}")
    merged.show()
    merged.until(lambda: "Took out 4 earlier tags." in merged.text("result_note"))
    page.locator("#tabs button").first.click()
    page.locator("#txt2img_styles .token-remove").first.click()


def test_every_checkpoint_becomes_a_removable_style(merged, server):
    page = merged.page
    styles = server.models.parent / "styles.csv"
    merged.until(lambda: "duo: anime" in styles.read_text(encoding="utf-8"))
    merged.click("styles_remove")
    merged.until(lambda: "Removed" in merged.text("result_note"))
    assert "duo: anime" not in styles.read_text(encoding="utf-8")
    merged.click("styles_save")
    merged.until(lambda: "Saved" in merged.text("result_note"))
    page.locator("#tabs button").first.click()
    merged.until(lambda: is_offered(merged, "duo: portrait"))


@pytest.mark.usefixtures("slow_runs")
@pytest.mark.parametrize("button", ["#txt2img_interrupt", "#txt2img_skip"])
def test_the_webuis_own_buttons_stop_a_merge(tab, server, button):
    tab.to("Merge")
    fill_in(tab, "never", "2")
    tab.click("merge")
    tab.until(tab.fraction)
    tab.until(lambda: tab.page.locator("#hyper_merge_tab.hm-host-bar").count())
    shot(tab.page, f"{server.host}-bar")
    tab.page.evaluate("(button) => gradioApp().querySelector(button).click()", button)
    tab.until(lambda: "Stopped" in tab.text("status"))
    tab.until(lambda: not tab.page.locator("#hyper_merge_tab.hm-host-bar").count())
    assert not list(server.models.rglob("never*"))


@pytest.mark.usefixtures("slow_runs")
def test_a_page_that_comes_back_shows_form_and_progress(context, server, tab):
    """The WebUI draws no bar that can be seen until its page has read the settings."""
    tab.to("Merge")
    fill_in(tab, "back", "2")
    tab.click("merge")
    tab.until(tab.fraction)
    later = Tab(context.new_page())
    later.page.goto(server.url)
    later.find("merge").wait_for(state="attached")
    later.show()
    later.until(lambda: later.find("status").locator(".hm-bar").is_visible())
    assert later.find("status").locator(".hm-share").is_visible()
    later.until(lambda: [name.strip() for name in later.picked()] == list(TWO))
    assert (later.value("name"), later.value("ranks")) == ("back", "2")
    later.click("stop")
    later.until(lambda: "Stopped" in later.text("status"))
    later.close()


def test_our_section_of_the_settings_clears_the_cache(merged):
    page = merged.page
    page.locator("#tabs button", has_text=re.compile(r"^\s*Settings\s*$")).click()
    ranks = page.locator("#setting_hyper_merge_ranks textarea, #setting_hyper_merge_ranks input")
    assert ranks.first.input_value() == "medium"
    page.locator("#setting_hyper_merge_clear_cache").first.click()
    size = page.locator("#setting_hyper_merge_clear_cache_size").first
    merged.until(lambda: "free again" in size.inner_text())
