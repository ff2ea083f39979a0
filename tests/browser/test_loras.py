"""The tab "LoRAs" in a browser: picked, distilled, combined by keys, stopped, and found again under Runs."""

import pytest
from browser.conftest import shot
from lora_files import dense, distance, energy, write_related

from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.lora_runs import list_lora_runs

pytestmark = pytest.mark.slow

NAMES = [f"lora{c}.safetensors" for c in range(3)]


@pytest.fixture(scope="module", autouse=True)
def loras(server):
    """The folder of LoRAs, with three that go together and a file that is none."""
    folder = server.models / "Lora"
    before = {path.name for path in folder.iterdir()}
    write_related(folder, count=3)
    (folder / "broken.safetensors").write_bytes(b"no LoRA at all")
    yield folder
    folders = Folders.under(server.models)
    for run in list_lora_runs(folders)[0]:
        delete_run(run, folders)
    for path in folder.iterdir():
        if path.name not in before:
            path.unlink()


@pytest.fixture
def opened(tab):
    """The tab with its list read, and nothing picked."""
    tab.to("LoRAs")
    tab.until(lambda: tab.row("lora_available", NAMES[0]).count())
    tab.until(lambda: "still to be" not in tab.text("lora_available_note"))
    tab.settle()
    tab.click("lora_clear")
    tab.until(lambda: not rows(tab))
    choose(tab, "Distil into a few")
    return tab


def rows(tab):
    """Returns the names of the picked LoRAs."""
    found = tab.find("lora_table").locator("tr[data-name]")
    return found.evaluate_all("rows => rows.map((row) => row.dataset.name)")


def pick(tab, *names):
    for name in names:
        tab.row("lora_available", name).locator("input").check()
    tab.until(lambda: rows(tab) == list(names))
    tab.settle()


def choose(tab, text):
    tab.page.get_by_label(text, exact=True).check()
    tab.settle()


def test_loras_are_distilled_found_again_and_deleted(opened, loras):
    tab = opened
    reason = tab.row("lora_available", "broken.safetensors").inner_text()
    assert "damaged or not a .safetensors file" in reason
    assert "cannot be added, grey" in tab.text("lora_available_note")
    pick(tab, *NAMES)
    tab.type("lora_size", "4, 2")
    tab.type("lora_name", "few")
    tab.settle()
    tab.click("lora_start")
    tab.until(lambda: "few ✓ Done" in tab.text("lora_result"))
    tab.until(lambda: "Done" in tab.text("lora_status"))
    tab.settle()
    shot(tab.page, "loras-distilled")
    assert (loras / "few_0-4.safetensors").exists()
    copy = tab.find("lora_result").get_by_label("Copy the tags of lora1")
    assert copy.get_attribute("data-copy").startswith("<lora:few_0-4:")
    copy.click()
    tab.until(lambda: copy.inner_text() == "Copied")
    curve = tab.find("lora_result").locator("img")
    assert curve.get_attribute("alt").startswith("Lines that rise with the number of LoRAs.")
    assert curve.bounding_box()["width"] > 300
    tab.until(lambda: tab.row("lora_available", "few_0-4.safetensors").count())
    fit_with_what_remains(tab, loras)
    reopen_and_delete(tab, loras)


def fit_with_what_remains(tab, loras):
    tab.click("lora_clear")
    tab.until(lambda: not rows(tab))
    choose(tab, "Fit onto shared LoRAs")
    pick(tab, NAMES[1])
    tab.type("lora_size", "2")
    tab.type("lora_name", "closer")
    tab.settle()
    tab.click("lora_start")
    tab.until(lambda: "closer ✓ Done" in tab.text("lora_result"))
    tab.settle()
    shot(tab.page, "loras-fitted")
    assert "With its private LoRA few_fit-closer-2 (rank 2" in tab.text("lora_result")
    assert (loras / "few_fit-closer-2.safetensors").exists()


def reopen_and_delete(tab, loras):
    tab.to("Runs")
    tab.pick_run("few")
    tab.click("run_copy")
    tab.until(lambda: "were copied to the form" in tab.text("lora_message"))
    tab.settle()  # a late answer to the choice that was copied too would empty the size
    tab.until(lambda: (tab.value("lora_size"), rows(tab)) == ("4, 2", NAMES))
    tab.to("Runs")
    tab.click("run_open")
    tab.until(lambda: "few" in tab.text("lora_result") and "Done" not in tab.text("lora_result"))
    tab.settle()
    tab.to("Runs")
    tab.click("run_delete")
    tab.until(lambda: tab.find("run_confirm").is_visible())
    tab.click("run_confirm")
    tab.until(lambda: "Deleted" in tab.text("run_outcome"))
    tab.settle()
    assert not list(loras.glob("few_*.safetensors"))
    assert all((loras / name).exists() for name in NAMES)


def test_search_and_order_find_a_lora(opened):
    tab = opened
    box = tab.find("lora_search")
    box.fill("lora 2")
    tab.until(lambda: tab.text("lora_available_note").startswith("1 of "))
    box.fill("")
    tab.find("lora_order").select_option("size")
    tab.until(lambda: " of " not in tab.text("lora_available_note"))
    last = tab.find("lora_available").locator("li").last
    assert last.get_attribute("data-name") == "broken.safetensors"
    tab.find("lora_order").select_option("name")


def test_keys_alone_combine_by_multipliers(opened, loras):
    tab, keyboard = opened, opened.page.keyboard
    choose(tab, "Combine into one")
    tab.row("lora_available", NAMES[0]).locator("input").focus()
    keyboard.press("Space")
    keyboard.press("ArrowDown")
    keyboard.press("Space")
    tab.until(lambda: rows(tab) == NAMES[:2])
    tab.settle()
    box = tab.page.get_by_label("Multiplier of ").nth(1)
    box.focus()
    keyboard.press("Control+a")
    keyboard.type("-0.5")
    tab.field("lora_name").focus()
    keyboard.type("both")
    tab.settle()
    tab.find("lora_start").focus()
    keyboard.press("Enter")
    tab.until(lambda: "both ✓ Done" in tab.text("lora_result"))
    tab.settle()
    one, other, both = (dense(loras / x) for x in (*NAMES[:2], "both.safetensors"))
    wanted = {module: one[module] - 0.5 * other[module] for module in one}
    assert distance(both, wanted) / energy(wanted) < 1e-4


def test_weights_by_block_are_asked_for_where_they_count(opened, loras):
    tab = opened
    assert not tab.find("lora_advanced").is_visible()
    choose(tab, "Combine into one")
    pick(tab, *NAMES[:2])
    tab.page.locator("#hyper_merge_lora_advanced .label-wrap").click()
    tab.type("lora_block_weights", "OUTD")
    tab.type("lora_name", "blocks")
    tab.click("lora_start")
    tab.until(lambda: "Weights by block: expected 2 texts" in tab.text("lora_message"))
    tab.type("lora_block_weights", "NONE\n2")
    shot(tab.page, "loras-blocks")
    tab.settle()
    tab.click("lora_start")
    tab.until(lambda: "blocks ✓ Done" in tab.text("lora_result"))
    tab.settle()
    other, made = dense(loras / NAMES[1]), dense(loras / "blocks.safetensors")
    assert distance(made, {module: 2 * change for module, change in other.items()}) < 1e-4
    choose(tab, "Resize")
    assert not tab.find("lora_advanced").is_visible()


def test_a_redraw_swallows_no_press_that_follows_another_key(opened):
    tab, keyboard = opened, opened.page.keyboard
    tab.row("lora_available", NAMES[0]).locator("input").focus()
    keyboard.down("ArrowDown")
    keyboard.down("Space")
    keyboard.up("ArrowDown")
    tab.page.wait_for_timeout(100)
    tab.page.evaluate(
        "document.querySelector('#hyper_merge_lora_search').dispatchEvent(new Event('input', {bubbles: true}))"
    )
    keyboard.up("Space")
    tab.until(lambda: rows(tab) == NAMES[1:2], seconds=10)


def test_a_refusal_says_what_to_do(opened):
    tab = opened
    tab.click("lora_start")
    tab.until(lambda: "LoRAs: pick one or more" in tab.text("lora_message"))
    pick(tab, NAMES[0])
    tab.click("lora_start")
    tab.until(lambda: "Fewer than two LoRAs" in tab.text("lora_message"))
    choose(tab, "Add to a checkpoint")
    assert tab.find("lora_checkpoint").is_visible()
    assert not tab.find("lora_size").is_visible()


def test_a_job_is_stopped(opened, loras, slow_runs):
    tab = opened
    before = {path.name for path in loras.iterdir()}
    pick(tab, *NAMES)
    tab.type("lora_size", "4, 2")
    tab.type("lora_name", "never")
    tab.settle()
    tab.click("lora_start")
    tab.until(lambda: "%" in tab.text("lora_status"))
    tab.until(lambda: tab.find("lora_stop").is_enabled())
    tab.click("lora_stop")
    tab.until(lambda: "Stopped" in tab.text("lora_status"))
    tab.settle()
    assert {path.name for path in loras.iterdir()} == before
