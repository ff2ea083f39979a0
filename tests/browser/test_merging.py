"""The whole way through the tab, by mouse and keyboard, in every kind of host."""

import os
import re

import pytest
from browser.conftest import shot
from tiny_family import merge

from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run

pytestmark = pytest.mark.slow


THREE = ("anime.safetensors", "photo.safetensors", "sub/portrait.safetensors")
NOTIFICATIONS = """(permission) => {
    window.notices = [];
    window.Notification = class {
        static permission = permission;
        static async requestPermission() { this.permission = "granted"; }
        constructor(title, {body}) { notices.push(body); }
    };
    document.hasFocus = () => false;
}"""
TOOLS = ("search", "order", "folder")
FIRST_RANKS = "medium"


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
    tab.click("refresh")  # a test of another file may have deleted some
    tab.settle()
    broken = tab.row("available", "broken.safetensors")
    assert "header of" in broken.inner_text()
    broken.locator("label").click(force=True)  # it is not enabled
    assert tab.picked() == []
    tab.find("search").fill("TRAIT sub diffusion")
    tab.until(lambda: listed(tab) == ["sub/portrait.safetensors"])
    tab.find("search").fill("")
    tab.find("order").select_option("size")
    tab.until(lambda: listed(tab)[-1] == "broken.safetensors")
    tab.find("order").select_option("name")
    assert len({round(tab.find(name).bounding_box()["y"]) for name in TOOLS}) == 1
    assert len({round(tab.find(name).bounding_box()["height"]) for name in TOOLS}) == 1
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


def test_folders_of_folders_can_be_chosen(form):
    tab = form
    names = ("a/b/one.safetensors", "a/c/two.ckpt", "three.pt")
    rows = [{"name": name, "known": True, "problem": "", "family": "x"} for name in names]
    tab.page.evaluate("(rows) => hyperMergePicker.list(JSON.stringify(rows))", rows)
    options = tab.find("folder").locator("option").all_inner_texts()
    assert options == ["All folders", "Top folder only", "a", "a/b", "a/c"]
    tab.find("folder").select_option("a")
    assert listed(tab) == list(names[:2])
    tab.find("folder").select_option("*")
    tab.page.evaluate("hyperMergePicker.list('[]')")
    assert re.search(r"no checkpoints in .*Stable-diffusion yet", tab.text("available_note"))
    tab.click("refresh")
    tab.until(lambda: THREE[0] in listed(tab))


def test_a_list_that_was_half_filled_is_asked_for_again(new_tab):
    tab = new_tab
    tab.until(lambda: set(THREE) < set(listed(tab)))
    names = listed(tab)
    known = {"known": True, "family": "Stable Diffusion 1.x", "dtype": "fp16", "problem": ""}
    half = [
        {"name": name, "kind": 0, "size": 1, "time": 1, "vae": "1", **known} for name in names[:2]
    ]
    # In one call, as the next answer of the server may come at any time.
    shown = tab.page.evaluate(
        """(rows) => {
            hyperMergePicker.list(JSON.stringify(rows));
            const list = document.querySelectorAll("#hyper_merge_available [data-name]");
            return [...list].map((row) => row.dataset.name);
        }""",
        half,
    )
    assert shown == names[:2]
    tab.until(lambda: listed(tab) == names)


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


def test_a_word_for_ranks_follows_the_number_of_checkpoints(form):
    tab = form
    tab.until(lambda: tab.value("ranks") == "medium")
    tab.pick(*THREE[:2])
    tab.until(lambda: tab.value("ranks") == "120, 120")
    tab.click("preset_small")
    tab.until(lambda: tab.value("ranks") == "60, 60")
    tab.pick(THREE[2])
    tab.until(lambda: tab.value("ranks") == "40, 40, 40" and tab.value("size"))
    tab.type("ranks", "40, 8")  # from here on as they are entered
    tab.click("clear")
    tab.until(lambda: not tab.picked())
    tab.pick(*THREE)
    tab.until(lambda: "2 LoRAs" in tab.text("plan"))
    assert tab.value("ranks") == "40, 8"


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
    tab.until(lambda: "photo.safetensors is one of the files" in tab.text("plan"))
    tab.type("name", "a/b")
    tab.until(lambda: "path separator" in tab.text("plan"))
    tab.type("name", "")
    tab.find("advanced").locator("button, .label-wrap").first.click()
    tab.type("block_weights", "1\nHALF:" + ",".join(["0.5"] * 25) + "\n1")
    tab.until(lambda: "Weights by block: item 2: expected 26 numbers" in tab.text("plan"))
    tab.type("block_weights", "1\nHALF:" + ",".join(["0.5"] * 26) + "\n1")
    tab.until(lambda: "hyper-anime-3.safetensors" in tab.text("plan"))
    tab.type("block_weights", "")
    tab.find("advanced").locator("button, .label-wrap").first.click()


def test_ranks_size_and_share_agree_on_the_curve(form, server):
    tab = form
    tab.pick(*THREE)
    tab.type("ranks", "4, 2")
    tab.until(lambda: tab.value("size").endswith("kB"))
    assert tab.value("share") == "", "not known yet"
    if not chart(tab).is_visible():
        tab.until(lambda: "First see what each size would explain (" in tab.text("look"))
        tab.click("look")
    tab.until(chart(tab).is_visible)
    tab.until(lambda: tab.value("share").endswith(" %"))
    before = tab.sizes()
    plot = chart(tab).locator(".hm-area")
    area = plot.bounding_box()
    # where it stands then: the button above it may go only now
    plot.click(position={"x": 0.6 * area["width"], "y": area["height"] / 2})
    tab.until(lambda: all(x != y for x, y in zip(before, tab.sizes(), strict=True)))
    tab.until(lambda: planned(tab) == round(kilobytes(tab.value("size"))))
    clicked = tab.sizes()
    assert re.fullmatch(r"\d+(, \d+)*", clicked[0])
    area = plot.bounding_box()
    middle = area["y"] + area["height"] / 2
    tab.page.mouse.move(area["x"] + 0.6 * area["width"], middle)
    tab.page.mouse.down()
    tab.page.mouse.move(area["x"] + 0.8 * area["width"], middle, steps=3)
    tab.page.mouse.up()
    dragged = tab.sizes()
    assert share_of(dragged) > share_of(clicked)
    tab.page.keyboard.press("ArrowLeft")
    keyed = tab.sizes()
    assert share_of(clicked) < share_of(keyed) <= share_of(dragged)
    assert keyed[1] != dragged[1]
    assert f"{keyed[1]}: about" in chart(tab).inner_text()
    shot(tab.page, f"{server.host}-curve")
    tab.type("share", "90")
    tab.page.keyboard.press("Tab")
    tab.until(lambda: tab.value("share") == "90 %")
    tab.until(lambda: planned(tab) == round(kilobytes(tab.value("size"))))
    tab.type("ranks", before[0])
    tab.until(lambda: tab.sizes() == before)


def chart(tab):
    return tab.page.locator("#hyper_merge_size .hm-chart")


def kilobytes(text):
    return float(text.removesuffix(" kB"))


def planned(tab):
    """Returns the kilobytes of the LoRAs that the plan states, 0 where it states none."""
    match = re.search(r"LoRAs \((?:about|at most) (\d+) kB(?:, in 8 bits)?\)", tab.text("plan"))
    return int(match[1]) if match else 0


def share_of(sizes):
    return float(sizes[2].removesuffix(" %"))


@pytest.mark.usefixtures("slow_runs")
def test_a_merge_moves_stops_and_leaves_nothing(form, server):
    tab, before = form, _kept(server.models)
    tab.pick(*THREE)
    tab.page.evaluate(NOTIFICATIONS, "default")
    tab.type("name", "stopped")
    tab.type("ranks", "4, 2")
    tab.click("merge")
    seen = tab.until(tab.fraction)
    tab.until(tab.find("notify").is_visible)
    tab.click("notify")
    tab.until(lambda: not tab.find("notify").is_visible())
    assert tab.page.evaluate("Notification.permission") == "granted"
    tab.until(lambda: (tab.fraction() or 0) > seen)
    tab.click("merge")
    tab.until(lambda: "still being made" in tab.text("message"))
    shot(tab.page, f"{server.host}-running")
    if server.host == "standalone":  # a WebUI puts its own progress there
        tab.until(lambda: re.fullmatch(r"\d+% · Hyper-Merge", tab.page.title()))
    tab.click("stop")
    tab.until(lambda: "Stopped" in tab.text("status"))
    tab.until(lambda: "%" not in tab.page.title())
    assert tab.page.evaluate("notices") == [], "who stops a merge knows it"
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
    tab.page.evaluate(NOTIFICATIONS, "granted")
    tab.merge()
    tab.until(lambda: [text[:11] for text in tab.page.evaluate("notices")] == ["Done: mix, "])
    tab.until(lambda: tab.page.title().startswith("✓ Done · "))
    tab.page.mouse.move(1, 1)
    tab.until(lambda: tab.page.title() in ("Hyper-Merge", "Stable Diffusion"))
    assert tab.text("sentence").startswith("mix ✓ Done")
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
    tab.type("name", "another")
    tab.click("result_resize")
    tab.until(lambda: tab.value("name") == "mix" and in_view(tab, "size"))
    assert "settings of mix were copied" in tab.text("form_note")
    tab.type("ranks", "3")
    tab.until(lambda: "exists already" in tab.text("plan"))
    desktop = tab.page.viewport_size
    tab.page.set_viewport_size({"width": 390, "height": 844})
    tab.merge()
    tab.until(lambda: 0 <= round(tab.find("done").bounding_box()["y"]) < 100)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(tab.page, f"{server.host}-result-phone")
    tab.page.set_viewport_size(desktop)
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
    tab.pick_run("old")
    tab.click("run_open")
    tab.until(lambda: tab.find("prompt").is_visible() and tab.text("sentence").startswith("old\n"))
    assert "Done" not in tab.text("sentence"), "it was not made just now"
    tab.click("copy")
    tab.until(lambda: tab.text("copy") == "Copied")
    assert clipboard(tab) == tab.value("prompt")
    tab.until(lambda: tab.text("copy") == "Copy prompt")
    tab.find("sentence").locator("[data-copy]").first.click()
    tab.until(lambda: clipboard(tab) == str(earlier_runs.hyper_model))


def clipboard(tab):
    return tab.page.evaluate("navigator.clipboard.readText()")


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


def test_runs_are_found_opened_copied_shown_side_by_side_and_deleted(earlier_runs, new_tab, server):
    tab = new_tab  # its form is compared with what the run is copied to
    tab.to("Runs")
    tab.until(lambda: "old-2" in tab.text("runs_table"))
    search_and_pick_by_keys(tab)
    tab.pick_run("old")
    tab.until(lambda: tab.value("other_run") == "old-2")
    tab.find("other_run").locator("input").click()
    assert not tab.option("other_run", "old").count(), "a run stands beside itself"
    tab.find("other_run").locator("input").blur()
    tab.until(lambda: not tab.option("other_run", "old-2").count())  # the list covers the button
    tab.click("run_beside")
    tab.until(lambda: "Explained, anime" in tab.text("run_outcome"))
    shot(tab.page, f"{server.host}-runs")
    tab.click("run_open")
    tab.until(
        lambda: tab.find("sentence").is_visible() and tab.text("sentence").startswith("old\n")
    )
    go_on_from_the_card(tab)
    tab.to("Runs")
    tab.click("run_copy")
    tab.until(lambda: "were copied to the form" in tab.text("form_note"))
    assert tab.find("merge").is_visible(), "the page goes to the form"
    tab.to("Runs")
    delete_after_second_thoughts(tab)
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


def delete_after_second_thoughts(tab):
    """Deletes the run old-2, after the question was cancelled, and asked of another run."""
    tab.pick_run("old-2")
    tab.click("run_delete")
    tab.until(lambda: "old-2_0-3.safetensors" in tab.text("run_outcome"))
    tab.click("run_cancel")
    tab.until(lambda: not tab.text("run_outcome"))
    tab.click("run_delete")
    tab.until(lambda: tab.find("run_confirm").is_visible())
    tab.pick_run("old")
    tab.until(lambda: not tab.find("run_confirm").is_visible())
    tab.until(lambda: not tab.text("run_outcome"))  # what was asked of another run
    tab.pick_run("old-2")
    tab.click("run_delete")
    tab.until(lambda: tab.find("run_confirm").is_visible())
    tab.click("run_confirm")


def search_and_pick_by_keys(tab):
    rows = tab.page.locator("#hyper_merge_runs_table [data-run]")
    tab.type("runs_search", "PORTRAIT 4,")
    tab.until(lambda: [row.is_visible() for row in rows.all()].count(True) == 1)
    tab.type("runs_search", "")
    tab.pick_run("old")
    tab.until(lambda: tab.value("other_run") == "old-2")
    rows.first.locator("button").focus()
    tab.page.keyboard.press("ArrowDown")
    tab.page.keyboard.press("ArrowUp")
    tab.page.keyboard.press("Enter")
    tab.until(lambda: "hm-picked" in rows.first.get_attribute("class"))
    other = {"old": "old-2", "old-2": "old"}[rows.first.get_attribute("data-run")]
    tab.until(lambda: tab.value("other_run") == other)


def go_on_from_the_card(tab):
    """Goes from the run old to its mixture and its pictures, and back."""
    tab.click("result_mix")
    tab.until(lambda: tab.find("mix").locator("[data-run=old]").is_visible())
    tab.to("Merge")
    tab.click("result_compare")
    tab.until(lambda: tab.find("compare_run").is_visible() and tab.value("compare_run") == "old")


def come_back(tab):
    """Looks at our tab again, after another window or, in a WebUI, another tab."""
    others = tab.page.locator("#tabs > .tab-nav button")
    if others.count():
        others.first.click()
        tab.show()
    else:
        tab.page.evaluate("window.dispatchEvent(new Event('focus'))")


def test_runs_made_or_deleted_elsewhere_show_to_whoever_comes_back(tab, server):
    tab.to("Runs")
    tab.until(lambda: tab.text("runs_table"))
    files = [server.models / "Stable-diffusion" / file for file in THREE[:2]]
    merge(files, server.models, name="elsewhere", ranks=(2,), weights=(1, 3))
    come_back(tab)
    tab.until(lambda: "elsewhere" in tab.text("runs_table"))
    folders = Folders.under(server.models)
    tab.pick_run("elsewhere")
    tab.click("run_delete")
    tab.until(lambda: tab.find("run_confirm").is_visible())
    come_back(tab)
    tab.settle()
    assert tab.find("run_confirm").is_visible(), "a question stays"
    tab.click("run_cancel")
    delete_run(load_run(folders, "elsewhere"), folders)
    come_back(tab)
    tab.until(lambda: "elsewhere" not in tab.text("runs_table"))


def test_a_search_that_finds_no_run_says_so(earlier_runs, tab):
    tab.to("Runs")
    come_back(tab)  # the page may stand there, and the runs be new
    tab.until(lambda: earlier_runs.name in tab.text("runs_table"))
    note = tab.find("runs_table").get_by_text("No run has all of these words.")
    assert not note.is_visible()
    tab.type("runs_search", f"{earlier_runs.name} nowhere")
    tab.until(note.is_visible)
    tab.type("runs_search", earlier_runs.name)
    tab.until(lambda: not note.is_visible())
    tab.type("runs_search", "")


def test_what_is_refused_leaves_the_run_that_is_shown(earlier_runs, form, server):
    tab = form
    tab.pick(*THREE)
    tab.type("ranks", "6")
    tab.type("name", "brief")
    tab.until(lambda: "brief.safetensors" in tab.text("plan"))
    tab.merge()
    open_run(tab, "old")
    tab.type("ranks", "4, many")
    tab.click("merge")
    tab.until(lambda: 'got "many"' in tab.text("message"))
    tab.settle()  # what would come late
    assert tab.text("sentence").startswith("old\n")
    tab.to("Use")
    tab.click("fit")
    tab.until(lambda: "pick a checkpoint" in tab.text("fit_outcome"))
    tab.settle()
    tab.to("Merge")
    assert tab.text("sentence").startswith("old\n")
    tab.type("name", "again")
    tab.type("ranks", "7")
    tab.until(lambda: "again" in tab.text("plan"))
    tab.merge()
    forget(server, "again", "brief")


def open_run(tab, name):
    tab.to("Runs")
    tab.pick_run(name)
    tab.click("run_open")
    tab.until(
        lambda: tab.find("sentence").is_visible() and tab.text("sentence").startswith(f"{name}\n")
    )


def test_a_run_that_is_gone_is_missed(form, server):
    tab = form
    for name in ("gone", "deleted"):
        files = [server.models / "Stable-diffusion" / file for file in THREE]
        merge(files, server.models, name=name, ranks=(2,), weights=(3, 1, 1))
    tab.to("Runs")
    tab.click("runs_refresh")
    open_run(tab, "gone")
    forget(server, "gone")
    tab.click("result_mix")
    tab.until(lambda: "there is no run gone" in tab.text("use_message"))
    tab.to("Merge")
    tab.click("result_compare")
    tab.until(lambda: "there is no run gone" in tab.text("compare_message"))
    tab.to("Merge")
    if server.host != "standalone":
        tab.click("send")
        tab.until(lambda: "there is no run gone" in tab.text("result_note"))
    open_run(tab, "deleted")
    tab.to("Runs")
    tab.click("run_delete")
    tab.until(lambda: tab.find("run_confirm").is_visible())
    tab.click("run_confirm")
    tab.until(lambda: "Deleted" in tab.text("run_outcome"))
    tab.to("Merge")
    tab.until(lambda: "What you get" in tab.text("result_empty"))
    assert not tab.find("sentence").is_visible()


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
