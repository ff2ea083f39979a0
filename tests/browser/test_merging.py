"""The whole way through the tab, by mouse and keyboard, in every kind of host."""

import os

import pytest
from browser.conftest import shot
from tiny_family import merge

from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run

pytestmark = pytest.mark.slow


THREE = ("anime.safetensors", "photo.safetensors", "sub/portrait.safetensors")
FIRST_RANKS = "128, 64, 32, 16"


@pytest.fixture
def earlier_runs(server):
    """The runs old and old-2 of all three checkpoints, made by the first test that asks."""
    for name, ranks in (("old", (4, 2)), ("old-2", (3,))):
        if not (server.models / "hyper-merge" / name).exists():
            files = [server.models / "Stable-diffusion" / file for file in THREE]
            # other tests' merges of the same checkpoints have other weights: no hyper-model is shared
            merge(files, server.models, name=name, ranks=ranks, weights=(1, 1, 2))
    return load_run(Folders.under(server.models), "old")


@pytest.fixture
def form(tab):
    """The form of a merge with its first ranks, no checkpoint and no name."""
    tab.to("Merge")
    if tab.picked():
        tab.click("clear")
        tab.until(lambda: not tab.picked())
    tab.type("name", "")
    tab.type("ranks", FIRST_RANKS)
    return tab


def test_checkpoints_are_searched_picked_and_put_in_order(form, server):
    tab = form
    tab.until(lambda: "Pick two or more" in tab.text("checkpoints_table"))
    broken = tab.row("available", "broken.safetensors")
    assert "header of" in broken.inner_text()
    broken.locator("label").click(force=True)  # it is not enabled
    assert tab.picked() == []
    tab.find("search").fill("TRAIT sub diffusion")
    tab.until(lambda: listed(tab) == ["sub/portrait.safetensors"])
    tab.find("search").fill("")
    tab.find("order").select_option("size")
    assert listed(tab)[-1] == "broken.safetensors"
    tab.find("order").select_option("name")
    tab.find("folder").select_option("sub")
    tab.click("add_folder")
    tab.until(lambda: tab.picked() == ["sub/portrait.safetensors"])
    tab.until(lambda: "Pick one more" in tab.text("plan"))
    tab.find("folder").select_option("*")
    tab.click("add_folder")
    tab.until(lambda: tab.picked() == [THREE[2], *THREE[:2]])
    tab.until(lambda: "hyper-portrait-3.safetensors" in tab.text("plan"))
    shot(tab.page, f"{server.host}-picker")

    put_in_order(tab)
    if "HYPER_MERGE_SCREENSHOTS" in os.environ:
        tab.page.set_viewport_size({"width": 390, "height": 844})
        shot(tab.page, f"{server.host}-picker-phone")
        tab.page.set_viewport_size({"width": 1500, "height": 1000})


def put_in_order(tab):
    """Moves the rows of all three by key and by pointer, and takes two out."""
    row = tab.row("checkpoints_table", THREE[1])
    assert row.locator(".hm-name").inner_text() == "photo"
    assert row.locator(".hm-name").get_attribute("title") == THREE[1]
    row.locator("[data-part=grip]").press("ArrowUp")
    tab.until(lambda: tab.picked() == [THREE[2], THREE[1], THREE[0]])
    tab.page.keyboard.press("Home")  # it has kept the focus
    tab.until(lambda: tab.picked() == [THREE[1], THREE[2], THREE[0]])
    assert tab.text("picked_note") == "photo is now 1 of 3, and gives the VAE."
    tab.until(lambda: "hyper-photo-3.safetensors" in tab.text("plan"))
    drag(tab, THREE[0], THREE[1])
    tab.until(lambda: tab.picked() == [THREE[0], THREE[1], THREE[2]])
    tab.row("checkpoints_table", THREE[2]).locator("[data-part=cross]").press("Enter")
    tab.until(lambda: tab.picked() == list(THREE[:2]))
    box = tab.row("available", THREE[0]).locator("input")
    names = listed(tab)
    box.press("ArrowDown")
    for _ in names[names.index(THREE[0]) + 2 : names.index(THREE[1]) + 1]:
        tab.page.keyboard.press("ArrowDown")
    tab.page.keyboard.press("Space")
    tab.until(lambda: tab.picked() == [THREE[0]])


def listed(tab):
    """Returns the names in the list, in its order."""
    rows = tab.find("available").locator("[data-name]")
    return rows.evaluate_all("rows => rows.map((row) => row.dataset.name)")


def drag(tab, name, place):
    """Drags a row of the table to where another one is."""
    grip = tab.row("checkpoints_table", name).locator("[data-part=grip]").bounding_box()
    over = tab.row("checkpoints_table", place).bounding_box()
    mouse = tab.page.mouse
    mouse.move(grip["x"] + 4, grip["y"] + 4)
    mouse.down()
    mouse.move(grip["x"] + 4, over["y"] + over["height"] / 2, steps=4)
    mouse.up()


def test_the_form_is_remembered_and_kept_under_names(form, server):
    tab = form
    tab.pick(*THREE[1:])
    tab.type("ranks", "5, 3")
    tab.until(lambda: "hyper-photo-2" in tab.text("plan") and "_0-5" in tab.text("plan"))
    tab.settle()
    tab.open(server)
    tab.until(lambda: tab.picked() == list(THREE[1:]))
    assert tab.value("ranks") == "5, 3"
    tab.find("presets_panel").locator("button, .label-wrap").first.click()
    tab.type("preset_name", "two: 5/3")
    tab.click("preset_save")
    tab.until(lambda: "Saved two: 5/3." in tab.text("preset_note"))
    shot(tab.page, f"{server.host}-presets")
    tab.click("clear")
    tab.type("ranks", "7")
    tab.until(lambda: not tab.picked() and not tab.text("plan"))
    tab.click("preset_load")
    tab.until(lambda: tab.picked() == list(THREE[1:]) and tab.value("ranks") == "5, 3")
    asked = []
    for answer in ("dismiss", "accept"):
        tab.page.once(
            "dialog",
            lambda dialog, do=answer: [asked.append(dialog.message), getattr(dialog, do)()],
        )
        tab.click("preset_delete")
        tab.until(lambda answer=answer: len(asked) == (1 if answer == "dismiss" else 2))
        tab.settle()
    tab.until(lambda: "Deleted two: 5/3." in tab.text("preset_note"))
    assert asked == ["Delete the preset two: 5/3?"] * 2


def test_a_wrong_number_or_taken_name_shows_at_once(form):
    tab = form
    tab.pick(*THREE)
    tab.type("ranks", "4, many")
    tab.until(lambda: 'got "many"' in tab.text("plan"))
    tab.click("merge")
    tab.until(lambda: 'got "many"' in tab.text("message"))
    tab.type("ranks", "4, 2")
    tab.until(lambda: not tab.text("message"))
    tab.type("name", "photo")
    tab.until(lambda: "photo.safetensors is one of the checkpoints" in tab.text("plan"))
    tab.type("name", "a/b")
    tab.until(lambda: "path separator" in tab.text("plan"))


@pytest.mark.usefixtures("slow_runs")
def test_a_merge_moves_stops_and_leaves_nothing(form, server):
    tab, before = form, _kept(server.models)
    tab.pick(*THREE)
    tab.type("name", "stopped")
    tab.type("ranks", "4, 2")
    tab.click("merge")
    seen = tab.until(tab.fraction)
    tab.until(lambda: (tab.fraction() or 0) > seen)
    tab.click("merge")
    tab.until(lambda: "still being made" in tab.text("message"))
    shot(tab.page, f"{server.host}-running")
    tab.click("stop")
    tab.until(lambda: "Stopped" in tab.text("status"))
    assert _kept(server.models) == before


def _kept(models):
    """Returns the names of checkpoints and LoRAs; the cache may change."""
    return sorted(path for path in models.rglob("*.safetensors") if "cache" not in path.parts)


def test_from_picking_to_the_result_and_again(form, server):
    tab = form
    tab.pick(*THREE)
    tab.type("name", "mix")
    tab.type("ranks", "4, 2")
    tab.until(lambda: "mix.safetensors" in tab.text("plan"))
    tab.merge()
    assert "3 checkpoints" in tab.text("sentence")
    tab.until(lambda: in_view(tab, "sentence"))
    assert (server.models / "Lora" / "mix_0-4.safetensors").exists()
    tab.until(lambda: tab.value("prompt").startswith("<lora:mix_0-4:"))
    first = tab.value("prompt")
    assert "<lora:mix_1-2:" in first
    tab.choose("result_checkpoint", "photo")
    tab.until(lambda: tab.value("prompt") != first)
    tab.until(lambda: tab.find("parts_plot").locator("img").count())
    shot(tab.page, f"{server.host}-result")

    tab.until(lambda: "Made already: this is the run mix" in tab.text("plan"))
    tab.type("ranks", "3")
    tab.until(lambda: "exists already" in tab.text("plan"))
    tab.merge()
    tab.until(lambda: tab.value("prompt").startswith("<lora:mix-2_0-3:"))
    assert not (server.models / "Stable-diffusion" / "mix-2.safetensors").exists()
    forget(server, "mix-2", "mix")


def in_view(tab, name):
    """Tells whether a widget is within the window."""
    box = tab.find(name).bounding_box()
    return -1 < box["y"] < tab.page.viewport_size["height"]  # pages scroll by whole pixels


def forget(server, *names):
    """Deletes runs, so that no other test's merge of these checkpoints shares their hyper-model."""
    folders = Folders.under(server.models)
    for name in names:
        delete_run(load_run(folders, name), folders)


def test_the_prompt_is_copied(earlier_runs, tab):
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.to("Runs")
    tab.click("runs_refresh")
    tab.choose("run", "old")
    tab.click("run_open")
    tab.until(lambda: tab.find("prompt").is_visible() and tab.text("sentence").startswith("old:"))
    tab.click("copy")
    tab.until(lambda: tab.text("copy") == "Copied")
    assert tab.page.evaluate("navigator.clipboard.readText()") == tab.value("prompt")
    tab.until(lambda: tab.text("copy") == "Copy")


def test_a_run_goes_on_while_the_page_is_closed(form, server, slow_runs):
    tab = form
    tab.pick(*THREE)
    tab.type("name", "long")
    tab.type("ranks", "5, 4, 2")
    tab.click("merge")
    tab.until(tab.fraction)
    tab.page.goto("about:blank")
    tab.open(server)
    tab.until(tab.fraction)
    slow_runs.unlink()
    tab.until(lambda: "Done: long" in tab.text("status"), 60)
    tab.until(lambda: tab.text("sentence").startswith("long"))
    forget(server, "long")


def test_runs_are_listed_opened_copied_compared_and_deleted(earlier_runs, new_tab, server):
    tab = new_tab  # its form is compared with what the run is copied to
    tab.to("Runs")
    tab.until(lambda: "old-2" in tab.text("runs_table"))
    tab.choose("run", "old")
    tab.choose("other_run", "old-2")
    tab.click("run_compare")
    tab.until(lambda: "Explained, anime" in tab.text("run_outcome"))
    shot(tab.page, f"{server.host}-runs")
    tab.click("run_open")
    tab.until(lambda: tab.find("sentence").is_visible() and tab.text("sentence").startswith("old:"))
    tab.to("Runs")
    tab.click("run_copy")
    tab.until(lambda: "were copied to the form" in tab.text("run_outcome"))
    tab.choose("run", "old-2")
    tab.click("run_delete")
    tab.until(lambda: "old-2_0-3.safetensors" in tab.text("run_outcome"))
    tab.click("run_cancel")
    tab.until(lambda: not tab.text("run_outcome"))
    tab.click("run_delete")
    tab.until(lambda: tab.find("run_confirm").is_visible())
    tab.click("run_confirm")
    tab.until(lambda: "Deleted" in tab.text("run_outcome"))
    tab.until(lambda: "old-2" not in tab.text("runs_table"))
    assert not (server.models / "Lora" / "old-2_0-3.safetensors").exists()
    assert earlier_runs.hyper_model.exists()
    tab.click("cache_clear")
    tab.until(lambda: "free again" in tab.text("run_outcome"))
    tab.to("Merge")
    assert tab.value("name") == "old"
    assert tab.value("ranks") == "4, 2"
    assert sorted(tab.picked()) == sorted(THREE)


def test_a_vanished_file_is_reported_and_not_merged(form, server):
    tab = form
    path = server.models / "Stable-diffusion" / "photo.safetensors"
    tab.pick(*THREE)
    away = path.rename(path.with_suffix(".away"))
    try:
        tab.type("name", "gone")
        tab.click("merge")
        tab.until(lambda: "photo.safetensors is no longer" in tab.text("message"))
    finally:
        away.rename(path)
    tab.click("refresh")
