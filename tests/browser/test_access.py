"""The tab for everyone: screen readers, the keyboard alone, every width, both themes."""

import shutil
import time
from pathlib import Path

import pytest
from browser.conftest import shot
from lora_files import share, write_related
from tiny_family import merge

from hyper_merge.operations.cache import clear_cache
from hyper_merge.runs.deletion import delete_run
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.lora_runs import load_any_run

pytestmark = pytest.mark.slow

TABS = ("Merge", "Use", "Compare", "LoRAs", "Runs")
NAMES = ("anime.safetensors", "photo.safetensors", "sub/portrait.safetensors")
LONG = "a_name_without_any_blank_" * 5 + "end"
LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
KINDS = ("violations", "incomplete")
WIDTHS = (390, 768, 1280, 1920)
# What axe cannot measure: signs that are no text, and text before the arrow that browsers draw.
UNMEASURED = ("only non-text characters", "due to a background image")

OPEN_ALL = """() => document.querySelectorAll("#hyper_merge_tab .label-wrap:not(.open)").forEach((x) => x.click())"""
# Of what can be seen; tables and plots that are wider than their place scroll in it, with a hint.
STICKS_OUT = """() => {
    const seen = [...document.querySelectorAll("#hyper_merge_tab *")].filter((x) => x.checkVisibility());
    const name = (x) => `${x.tagName} ${x.id || x.closest("[id^=hyper_merge]").id} ${x.className}`;
    const isOut = (x) => {
        const {left, right, width} = x.getBoundingClientRect();
        return width && (left < -1 || right > innerWidth + 1);
    };
    const isWithin = (x) => x.closest(".hm-scroll > *, .hm-unseen, svg");
    const isCut = (x) => x.type !== "range" && x.scrollWidth > x.clientWidth + 1;
    const places = seen.filter((x) => x.matches(".hm-scroll") && isCut(x));
    const TEXTS = "input, select, button:not(.label-wrap), p, dt, dd, h3, .hm-message, .token";
    const hasHint = (x) => getComputedStyle(x, "::before").content.includes("Scroll") && x.tabIndex === 0;
    return [
        ...(document.documentElement.scrollWidth > innerWidth ? ["the page"] : []),
        ...seen.filter((x) => isOut(x) && !isWithin(x)).map(name),
        ...seen.filter((x) => x.matches(TEXTS) && isCut(x) && !x.title).map((x) => `text of ${name(x)}`),
        ...places.filter((x) => !hasHint(x)).map((x) => `no hint: ${name(x)}`),
    ];
}"""
STILL = """() => Promise.allSettled(
    document.getAnimations().filter((x) => x instanceof CSSTransition).map((x) => x.finished)
)"""
NEXT_FRAME = "() => new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))"
FOCUS = """() => {
    const x = document.activeElement, style = getComputedStyle(x);
    return {
        id: x.closest("[id^=hyper_merge]")?.id ?? "",
        name: x.dataset.name ?? x.closest("[data-name], [data-run]")?.dataset.name ?? "",
        text: x.textContent.trim(),
        label: x.getAttribute("aria-label"),
        shown: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
    };
}"""


@pytest.fixture(scope="module", autouse=True)
def _nothing_left(server):
    """Takes away what these tests make: tests of other files look at the same server's runs and cache."""
    yield
    folders = Folders.under(server.models)
    for name in ("wide", "keyed", "few"):
        if (folders.runs / name).exists():
            delete_run(load_any_run(folders, name), folders)
    for path in folders.loras.glob("lora*.safetensors"):
        path.unlink()
    clear_cache(folders)


@pytest.fixture
def full(tab, server):
    """The tab with checkpoints picked, a run shown, and every panel open; made by the first test that asks."""
    if not (server.models / "hyper-merge/wide").exists():
        files = [server.models / "Stable-diffusion" / name for name in NAMES]
        long = server.models.parent / f"{LONG}.safetensors"  # in no list, but in the run
        files[0] = Path(shutil.copy(files[0], long))
        merge(files, server.models, name="wide", ranks=(5, 3), weights=(1, 2, 2))
        share(write_related(server.models / "Lora"), server.models, name="few", ranks=(3, 2))
    if not tab.picked():
        tab.to("Runs")
        tab.pick_run("few")
        tab.click("run_open")
        tab.until(lambda: "few" in tab.text("lora_result"))
        tab.until(lambda: "still to be" not in tab.text("lora_available_note"))
        tab.page.get_by_label("Combine into one").check()
        tab.settle()
        tab.click("lora_add")
        tab.until(lambda: tab.text("lora_picked_note").startswith("4 picked"))
        tab.to("Merge")
        tab.pick(*NAMES)
        tab.page.evaluate(OPEN_ALL)
        tab.to("Runs")
        tab.pick_run("wide")
        tab.click("run_open")
        tab.until(lambda: tab.text("sentence").startswith("wide"))
        tab.to("Runs")
        tab.click("run_delete")
        tab.until(lambda: tab.find("run_confirm").is_visible())
    return tab


def complaints(tab, rules):
    """Returns what axe finds wrong in our panels, and what it cannot judge."""
    from axe_playwright_python.sync_playwright import Axe

    options = {"runOnly": rules, "resultTypes": list(KINDS), "selectors": False}
    found = Axe().run(tab.page, context="#hyper_merge_tab", options=options).response
    rows = [(kind, rule) for kind in KINDS for rule in found[kind]]
    return [
        f"{kind}: {rule['id']}: {node['html']}: {node['failureSummary']}"
        for kind, rule in rows
        for node in rule["nodes"]
        if kind == "violations" or not any(why in node["failureSummary"] for why in UNMEASURED)
    ]


def set_theme(tab, theme):
    tab.page.evaluate("(on) => document.body.classList.toggle('dark', on)", theme == "dark")
    tab.page.evaluate(STILL)  # colours change gradually


def test_axe_finds_nothing_wrong(full, server):
    everything = {"type": "tag", "values": LEVELS}
    wrong = []
    for name in TABS:
        full.to(name)
        for theme, rules in (
            ("dark", {"type": "rule", "values": ["color-contrast"]}),
            ("light", everything),
        ):
            set_theme(full, theme)
            shot(full.page, f"{server.host}-access-{name}-{theme}")
            wrong += complaints(full, rules)
    assert wrong == []


def test_nothing_is_cut_off_at_any_width(full, server):
    desktop, wrong = full.page.viewport_size, {}
    for width in WIDTHS:
        full.page.set_viewport_size({"width": width, "height": 900})
        for name in TABS:
            full.to(name)
            shot(full.page, f"{server.host}-access-{name}-{width}")
            wrong[width, name] = sticks_out(full)
    full.page.set_viewport_size(desktop)
    assert {key: names for key, names in wrong.items() if names} == {}


def sticks_out(tab, seconds=10):
    """Returns what sticks out once the page has taken its width, or still after some seconds."""
    tab.page.evaluate(NEXT_FRAME)
    end = time.monotonic() + seconds
    while (wrong := tab.page.evaluate(STICKS_OUT)) and time.monotonic() < end:
        tab.page.wait_for_timeout(50)
    return wrong


def go_to(tab, reached, key="Tab"):
    """Presses a key until the focus is where it should be; every stop on the way can be seen."""
    for _ in range(150):
        tab.page.keyboard.press(key)
        focus = tab.page.evaluate(FOCUS)
        assert focus["shown"] or not focus["id"], focus
        if reached(focus):
            return
    raise AssertionError(f"no key leads there; the last stop is {focus}")


def at(name):
    return lambda focus: focus["id"] == f"hyper_merge_{name}"


def test_keys_alone_merge_and_open_a_run(new_tab, server):
    tab = new_tab
    pick_by_keys(tab)
    merge_by_keys(tab)
    open_by_keys(tab)
    go_to(tab, at("result_compare"))
    tab.page.keyboard.press("Enter")
    tokens = tab.find("compare_checkpoints").locator(".token")
    tab.until(lambda: tokens.count() == 3)
    tab.settle()
    tab.field("compare_run").focus()
    go_to(tab, lambda focus: focus["label"] == "Remove photo")
    tab.page.keyboard.press("Enter")
    tab.until(lambda: [x.strip() for x in tokens.all_inner_texts()] == ["anime", "portrait"])


def pick_by_keys(tab):
    keyboard = tab.page.keyboard
    tab.find("search").focus()
    go_to(tab, at("clear"))  # what this browser remembers of other tests
    keyboard.press("Enter")
    tab.until(lambda: not tab.picked())
    go_to(tab, lambda focus: focus["name"] == NAMES[0], "Shift+Tab")
    keyboard.press("Space")
    for name in NAMES[1:]:
        go_to(tab, lambda focus, name=name: focus["name"] == name, "ArrowDown")
        keyboard.press("Space")
    tab.until(lambda: tab.picked() == list(NAMES))


def merge_by_keys(tab):
    keyboard = tab.page.keyboard
    go_to(tab, at("size"))
    keyboard.press("Control+a")
    keyboard.type("6, 2")
    go_to(tab, at("name"))
    keyboard.type("keyed")
    go_to(tab, at("advanced"))
    keyboard.press("Enter")
    tab.until(lambda: tab.find("weights").is_visible())
    go_to(tab, at("weights"))
    tab.until(lambda: "keyed.safetensors" in tab.text("plan"))
    go_to(tab, at("merge"))
    keyboard.press("Enter")
    tab.until(lambda: tab.text("sentence").startswith("keyed"))
    tab.settle()


def open_by_keys(tab):
    keyboard, first = tab.page.keyboard, tab.value("prompt")
    go_to(tab, at("result_checkpoint"))
    keyboard.press("ArrowDown")
    keyboard.press("ArrowDown")
    keyboard.press("Enter")
    tab.until(lambda: tab.value("prompt") != first)
    go_to(tab, lambda focus: focus["text"] == "Runs", "Shift+Tab")
    keyboard.press("Enter")
    tab.until(lambda: tab.find("runs_table").is_visible())
    tab.settle()
    go_to(tab, lambda focus: focus["id"] == "hyper_merge_runs_table" and focus["text"] == "keyed")
    keyboard.press("Enter")
    go_to(tab, at("run_open"))
    keyboard.press("Enter")
    tab.until(lambda: tab.find("sentence").is_visible())
    tab.until(lambda: tab.text("sentence").startswith("keyed\n"))
    tab.settle()  # gradio 3.41 drops what is pressed while it answers
