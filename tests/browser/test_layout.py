"""Where things stand on the page: in line, below what they belong to, and in sight when they matter."""

import pytest

pytestmark = pytest.mark.slow

THREE = ("anime.safetensors", "photo.safetensors", "sub/portrait.safetensors")
TRACKERS = """() => [...document.querySelectorAll("#hyper_merge_tab [data-testid=status-tracker]")]
    .map((x) => getComputedStyle(x).display)"""
ADD_CHIP = """() => document.querySelector("#hyper_merge_compare_tab").insertAdjacentHTML(
    "beforeend", '<div class=token id=hyper_merge_chip><span>long_name-of.one</span></div>')"""
FEWER_RUNS = """(count) => {
    const rows = (n) => Array.from({length: n}, (_, i) => `<p data-run=r${i}><button>r${i}</button></p>`).join("");
    document.querySelector("#hyper_merge_runs_table .prose").innerHTML = rows(count);
}"""


@pytest.fixture
def form(tab):
    """The form with three checkpoints, and nothing that another test has typed."""
    tab.to("Merge")
    tab.type("name", "")
    if tuple(tab.picked()) != THREE:
        tab.click("clear")
        tab.until(lambda: not tab.picked())
        tab.pick(*THREE)
    yield tab
    tab.page.set_viewport_size({"width": 1500, "height": 1000})


def edges(tab, name):
    """Returns left and right of an element, in whole pixels."""
    box = tab.find(name).bounding_box()
    return round(box["x"]), round(box["x"] + box["width"])


def top(tab, name):
    return tab.find(name).bounding_box()["y"]


@pytest.mark.parametrize("width", [1280, 1920])
def test_form_and_list_stand_in_line(form, width):
    form.page.set_viewport_size({"width": width, "height": 900})
    assert edges(form, "size") == edges(form, "available") == edges(form, "name")
    assert edges(form, "merge")[0] == edges(form, "available")[0]
    assert edges(form, "result_empty")[0] == edges(form, "checkpoints_table")[0] or (
        edges(form, "done")[0] == edges(form, "checkpoints_table")[0]
    )


def test_the_buttons_of_the_list_stand_right_below_it(form):
    form.page.set_viewport_size({"width": 390, "height": 844})
    buttons = [top(form, name) for name in ("add_folder", "clear", "refresh")]
    assert max(buttons) - min(buttons) < 2
    assert top(form, "available_note") < buttons[0] < top(form, "checkpoints_table")
    tabs = form.page.locator("#hyper_merge_tabs").get_by_role("tab")
    assert len({round(tabs.nth(place).bounding_box()["y"]) for place in range(5)}) == 1


@pytest.mark.usefixtures("slow_runs")
def test_what_runs_is_in_sight_wherever_the_page_stands(form, slow_runs):
    form.page.set_viewport_size({"width": 1280, "height": 700})
    form.until(lambda: "instead of" in form.text("plan"))
    form.page.locator("#hyper_merge_merge").first.evaluate("(button) => button.click()")
    form.until(lambda: form.fraction() is not None)
    form.page.evaluate(
        "scrollTo(0, document.querySelector('#hyper_merge_columns').offsetTop - 200)"
    )
    phase = form.find("status").locator(".hm-phase")
    box = phase.bounding_box()
    assert top(form, "merge") > 700, "it is below the page, and the progress below it"
    assert 0 < box["y"] < box["y"] + box["height"] <= 700
    assert "%" in phase.inner_text()
    form.page.locator("#hyper_merge_stop").first.evaluate("(button) => button.click()")
    slow_runs.unlink()
    form.until(lambda: "Stopped" in form.text("status"))
    form.settle()


@pytest.mark.parametrize(
    ("field", "typed", "error"),
    [
        ("share", "abc", "Share, at worst: expected a share"),
        ("share", "150", "Share, at worst: expected a share"),
        ("size", "x", "Total size: expected a size"),
        ("size", "-3", "Total size: expected a size"),
        ("ranks", "x", "Ranks: expected a list of whole numbers"),
    ],
)
def test_an_error_names_the_field_in_which_it_stands(form, field, typed, error):
    form.type(field, typed)
    form.until(lambda: form.text("plan").startswith(error))
    others = {"ranks", "size", "share"} - {field}
    assert form.value(field) == typed
    assert typed not in {form.value(other) for other in others}
    form.type("ranks", "4, 2")
    form.until(lambda: "2 LoRAs" in form.text("plan"))


def test_a_prompt_is_seen_as_a_whole(form):
    form.to("Use")
    prompt = form.find("mix_prompt").locator("textarea")
    prompt.fill(" ".join(f"<lora:name_{place}:0.12345:0.54321>" for place in range(12)))
    assert prompt.evaluate("(box) => box.scrollHeight - box.clientHeight") <= 1
    prompt.fill("")


def test_a_part_of_one_is_a_share(form):
    form.type("share", "0.85")
    form.find("name").locator("input, textarea").first.focus()
    form.until(lambda: "as large as the share" in form.text("plan") or "about" in form.text("plan"))
    assert form.value("share") == "85 %"
    form.type("ranks", "4, 2")
    form.settle()


def test_gradios_own_signs_of_waiting_are_never_seen(form):
    assert set(form.page.evaluate(TRACKERS)) <= {"none"}


def test_a_picked_name_is_broken_behind_its_own_marks(form):
    form.page.evaluate(ADD_CHIP)
    chip = form.page.locator("#hyper_merge_chip")
    form.until(lambda: chip.text_content() == "long_\u200bname-\u200bof.\u200bone")
    chip.evaluate("(chip) => chip.remove()")


@pytest.mark.parametrize(
    ("count", "seen"), [(0, []), (1, ["run_open"]), (2, ["run_open", "run_beside"])]
)
def test_only_what_can_be_done_with_the_runs_is_offered(form, count, seen):
    form.to("Runs")
    form.page.evaluate(FEWER_RUNS, count)
    assert [name for name in ("run_open", "run_beside") if form.find(name).is_visible()] == seen
    form.click("runs_refresh")
    form.settle()
