"""The tab "Use": sliders, fits, restored checkpoints, exports, what is safe to delete, extraction."""

import shutil

import pytest
from browser.conftest import IN_WEBUI, shot
from tiny_family import merge

from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runs.weighted_loras import mixture_tags

pytestmark = pytest.mark.slow

TWO = ("anime.safetensors", "photo.safetensors")
SET = """(shares) => {
    for (const slider of document.querySelectorAll("#hyper_merge_mix input")) {
        slider.value = shares[slider.dataset.name] || 0;
        slider.dispatchEvent(new Event("input", {bubbles: true}));
    }
}"""
CALCULATED = """([terms, value]) => {
    const panel = document.querySelector("#hyper_merge_mix [data-terms]");
    const slider = document.querySelector("#hyper_merge_mix input");
    const before = panel.dataset.terms;
    panel.dataset.terms = JSON.stringify({[slider.dataset.name]: terms});
    slider.value = value;
    slider.dispatchEvent(new Event("input", {bubbles: true}));
    panel.dataset.terms = before;
    return document.querySelector("#hyper_merge_mix_prompt textarea").value;
}"""


@pytest.fixture
def pair(server):
    """A run of two of the checkpoints, made by the first test that asks."""
    if not (server.models / "hyper-merge/pair").exists():
        files = [server.models / "Stable-diffusion" / file for file in TWO]
        merge(files, server.models, name="pair", ranks=(3, 2))
    return load_run(folders(server), "pair")


@pytest.fixture
def use(pair, tab):
    """The tab "Use" with that run in it, as the test before left it."""
    return show_pair(tab)


@pytest.fixture
def unused(pair, new_tab):
    """The tab "Use" with that run in it, with nothing chosen or typed."""
    return show_pair(new_tab)


def show_pair(tab):
    tab.to("Use")
    tab.until(lambda: tab.find("use_run").is_visible())
    if tab.value("use_run") != "pair":
        tab.choose("use_run", "pair")
    tab.until(lambda: "pair" in tab.text("use_about"))
    tab.until(lambda: tab.page.locator("#hyper_merge_mix [data-run=pair]").count())
    tab.settle()
    return tab


@pytest.fixture
def third(server):
    """A checkpoint that is not in the run."""
    return shutil.copy(
        server.models / "Stable-diffusion/sub/portrait.safetensors",
        server.models / "Stable-diffusion/third.safetensors",
    )


def folders(server):
    return Folders.under(server.models)


def done(tab, title):
    tab.until(lambda: f"Done: {title}" in tab.text("use_status"), 60)


def offers(tab, name, option):
    """Tells whether a dropdown has an entry."""
    box = tab.find(name).locator("input")
    box.click()
    count = tab.option(name, option).count()
    box.blur()
    return count


def open_panel(tab, name):
    panel = tab.find(f"{name}_panel")
    button = tab.find(name if name != "safe" else "safe")
    if not button.is_visible():
        panel.locator("button, .label-wrap").first.click()
    tab.until(button.is_visible)


@pytest.mark.parametrize(
    "shares",
    [
        {"anime": 1.0},
        {"anime": 0.37, "photo": 0.63},
        {"anime": -0.5, "photo": 1.5},
        {"photo": 0.07},
    ],
)
def test_a_moved_slider_changes_the_tags_as_python_does(use, server, shares):
    use.page.evaluate(SET, shares)
    expected = mixture_tags(load_run(folders(server), "pair"), shares)
    use.until(lambda: use.value("mix_prompt") == expected)
    rest = f"{1 - sum(shares.values()):.2f}".replace("-0.00", "0.00")
    assert f"has the rest: {rest}." in use.text("mix")


def test_numbers_are_rounded_as_python_rounds_them(use):
    use.page.evaluate(SET, {})
    for value in (
        1 / 64,
        3 / 64,
        -1 / 64,
        5 / 64,
        -7 / 64,
        0.5,
        -1e-7,
        0.000005,
        1.000015,
        12.345675,
    ):
        (tag,) = use.page.evaluate(CALCULATED, [[["x", value, None]], 1]).split()
        assert tag == f"<lora:x:{round(value, 5) + 0.0:.5f}>"


def test_sliders_name_no_lora_that_adds_nothing(use):
    use.page.evaluate(SET, {})
    terms = [["x", 0, None], ["y", 0, 1], ["z", 0, 0]]
    assert use.page.evaluate(CALCULATED, [terms, 0.5]) == "<lora:y:0.50000:0.00000>"


def test_keys_move_a_slider_and_buttons_set_all(use):
    use.click("mix_reset")
    use.until(lambda: not use.value("mix_prompt") and "hyper-model alone" in use.text("mix"))
    slider = use.page.locator("#hyper_merge_mix input").first
    slider.focus()
    slider.press("ArrowRight")
    use.until(lambda: use.value("mix_prompt").startswith("<lora:pair_0-3:"))
    use.click("mix_equal")
    share = 1 / use.page.locator("#hyper_merge_mix input").count()  # one more after a fit
    use.until(lambda: f"{share:.2f}" in use.text("mix") and "rest: 0.00" in use.text("mix"))
    shot(use.page, "use-mix")


def test_a_mixture_is_written_as_a_checkpoint(use, server):
    use.click("mix_reset")
    use.click("mix_write")
    use.until(lambda: "All sliders are at 0" in use.text("mix_outcome"))
    use.page.evaluate(SET, {"anime": 0.25, "photo": 0.5})
    use.type("mix_name", "quarter")
    use.click("mix_write")
    done(use, "the mixture")
    use.until(lambda: "Written: quarter.safetensors" in use.text("mix_outcome"))
    assert "the hyper-model has the rest, 0.25" in use.text("mix_outcome")
    assert (server.models / "Stable-diffusion/quarter.safetensors").exists()
    assert "0.25" in use.text("mix"), "the sliders stay as they were set"


def test_a_fit_shows_its_tags_and_gets_a_slider(third, unused, server):
    use = unused
    use.click("fit")
    use.until(lambda: "pick a checkpoint" in use.text("fit_outcome"))
    use.click("use_refresh")
    use.settle()
    use.until(lambda: offers(use, "fit_checkpoint", "third.safetensors"))
    use.choose("fit_checkpoint", "third.safetensors")
    use.type("fit_topup", "2")
    use.click("fit")
    done(use, "the fit of third.safetensors")
    use.until(lambda: "explain" in use.text("fit_outcome"))
    expected = mixture_tags(load_run(folders(server), "pair"), {"third": 1.0})
    use.until(lambda: use.value("fit_prompt") == expected)
    use.until(lambda: use.page.locator("#hyper_merge_mix input").count() == 3)
    shares = {"anime": 0.3, "third": 0.6}
    use.page.evaluate(SET, shares)
    expected = mixture_tags(load_run(folders(server), "pair"), shares)
    use.until(lambda: use.value("mix_prompt") == expected)
    assert "third" in expected.split()[-1]
    shot(use.page, "use-fit")


def test_a_checkpoint_is_restored_and_compared(use, server):
    open_panel(use, "restore")
    use.choose("restore_checkpoint", "photo")
    use.click("restore")
    done(use, "the checkpoint photo")
    use.until(lambda: "photo-restored.safetensors" in use.text("restore_outcome"))
    assert "Compared with the original" in use.text("restore_outcome")
    use.click("restore")
    use.until(lambda: "photo-restored.safetensors exists; choose" in use.text("use_status"))
    assert (server.models / "Stable-diffusion/photo-restored.safetensors").exists()


def test_one_lora_for_each_checkpoint(use, server):
    open_panel(use, "export")
    use.type("export_rank", "many")
    use.click("export")
    use.until(lambda: "Rank: expected" in use.text("export_outcome"))
    use.settle()  # the refusal's last answers would come after those of the next job
    use.type("export_rank", "")
    use.click("export")
    done(use, "the LoRAs")
    use.until(lambda: "<lora:pair_photo:1.00000>" in use.text("export_outcome"))
    assert (server.models / "Lora/pair_anime.safetensors").exists()
    shot(use.page, "use-export")


def test_deletable_originals_are_listed_and_then_a_refusal(use, server):
    before = sorted((server.models / "Stable-diffusion").rglob("*"))
    open_panel(use, "safe")
    use.type("safe_threshold", "much")
    use.click("safe")
    use.until(lambda: "Threshold: expected a share" in use.text("safe_outcome"))
    use.settle()
    use.type("safe_threshold", "1%")
    use.click("safe")
    done(use, "the check of the originals")
    use.until(lambda: "Nothing was deleted" in use.text("safe_outcome"))
    assert "yes" in use.text("safe_outcome")
    shot(use.page, "use-safe")
    assert sorted((server.models / "Stable-diffusion").rglob("*")) == before
    use.type("safe_threshold", "200%")
    use.click("safe")
    use.until(lambda: "Threshold: expected" in use.text("safe_outcome"))
    use.settle()
    assert "Threshold: expected" in use.text("safe_outcome"), "the first outcome came back"


def test_the_lora_from_two_checkpoints(use, server):
    open_panel(use, "extract")
    use.choose("extract_base", "anime.safetensors")
    use.choose("extract_checkpoint", "photo.safetensors")
    use.type("extract_rank", "4")
    use.click("extract")
    done(use, "the LoRA from anime.safetensors to photo.safetensors")
    use.until(lambda: "<lora:photo-from-anime:1.00000>" in use.text("extract_outcome"))
    assert (server.models / "Lora/photo-from-anime.safetensors").exists()


def test_an_extended_run_is_made_and_picked(third, use, server):
    use.click("use_refresh")
    use.settle()
    use.choose("fit_checkpoint", "third.safetensors")
    use.type("fit_name", "three")
    use.click("absorb")
    done(use, "pair with third.safetensors")
    use.until(lambda: use.value("use_run") == "three")
    use.until(lambda: "third" in use.text("use_about"))
    use.to("Merge")
    use.until(lambda: use.text("sentence").startswith("three"))
    assert "Done" not in use.text("status"), "how it ended is said where it was begun"


def test_the_tags_are_copied(use):
    use.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    use.page.evaluate(SET, {"anime": 1.0})
    use.click("mix_copy")
    use.until(lambda: use.text("mix_copy") == "Copied")
    assert use.page.evaluate("navigator.clipboard.readText()") == use.value("mix_prompt")


@pytest.mark.usefixtures("slow_runs")
def test_a_job_stops_and_is_seen_in_both_tabs(use, server):
    use.to("Use")
    before = sorted(server.models.rglob("*.safetensors"))
    use.choose("fit_checkpoint", "photo.safetensors")
    use.type("fit_name", "never")
    use.click("fit")
    use.until(lambda: use.find("use_status").locator("[data-task]").count())
    assert use.find("status").locator("[data-task]").count()
    use.click("use_stop")
    use.until(lambda: "Stopped" in use.text("use_status"))
    assert not use.text("status", visible=False)
    assert sorted(server.models.rglob("*.safetensors")) == before


@IN_WEBUI
def test_tags_have_weights_by_block_for_the_extension(use, server):
    use.page.evaluate(SET, {"anime": 0.5})
    tags = use.until(lambda: use.value("mix_prompt"))
    use.page.locator("#hyper_merge_mix_advanced .label-wrap").click()
    use.type("mix_block_weights", "OUTD:1,0, 0.5")
    use.until(lambda: use.value("mix_prompt") == tags.replace(">", ":lbw=1,0,0.5>"))
    shot(use.page, "use-mix-blocks")
    use.type("mix_block_weights", "1:0>")
    use.until(lambda: "a preset's name" in use.text("mix"))
    assert use.value("mix_prompt") == tags
    panel = use.page.locator("#hyper_merge_mix [data-terms]")
    panel.evaluate("panel => panel.setAttribute('data-whole', '')")
    use.type("mix_block_weights", "OUTD")
    use.until(lambda: "norms and biases" in use.text("mix"))
    assert use.value("mix_prompt") == tags
    panel.evaluate("panel => panel.removeAttribute('data-whole')")
    use.type("mix_block_weights", "")
    use.until(lambda: "left out" not in use.text("mix"))


@IN_WEBUI
def test_a_mixture_and_a_fit_are_sent_to_txt2img(unused, server):
    use, page = unused, unused.page
    use.click("use_refresh")  # the WebUI has not seen the merge
    use.settle()
    use.page.evaluate(SET, {"anime": 0.5})
    tags = use.until(lambda: use.value("mix_prompt"))
    use.click("mix_send")
    use.until(lambda: page.locator("#txt2img_prompt textarea").input_value() == tags)
    menu = page.locator("#setting_sd_model_checkpoint input")
    use.until(lambda: menu.input_value().startswith("pair.safetensors"))
    page.locator("#tabs button", has_text="Hyper-Merge").first.click()
    use.choose("fit_checkpoint", "sub/portrait.safetensors")
    use.find("fit_replace").locator("input").check()
    use.click("fit")
    done(use, "the fit of sub/portrait.safetensors")
    tags = use.until(lambda: use.value("fit_prompt"))
    use.click("fit_style")
    use.until(lambda: "Saved the style pair: portrait" in use.text("fit_note"))
    styles = (server.models.parent / "styles.csv").read_text(encoding="utf-8")
    assert f"pair: portrait,{tags}" in styles
    use.click("fit_send")
    use.until(lambda: page.locator("#txt2img_prompt textarea").input_value() == tags)
