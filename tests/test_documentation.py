"""README and the pages of `docs/` lead somewhere, and show commands and settings that exist."""

import contextlib
import functools
import io
import re
import runpy
from pathlib import Path

import pytest
from test_layering import ROOMS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

PAGES_ABOUT_THE_SOURCE = [ROOT / "docs" / "architecture.md", ROOT / "docs" / "adding-a-family.md"]
ENVIRONMENT = {
    "HYPER_MERGE_LAYOUTS",
    "HYPER_MERGE_SCREENSHOTS",
    "HYPER_MERGE_WEBUI",
    "HYPER_MERGE_FAULTS",
}  # variables, which no module defines

_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(rf"{_FENCED.pattern}|`[^`\n]+`", _FENCED.flags)
_TARGET = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_COMMAND = re.compile(r"(?<![\w-])hyper-merge +([a-z][\w-]*)([^\n`#&|]*)")
_OPTION = re.compile(r"(?<!\S)--[a-z][\w-]*")
_BENCHMARK = re.compile(r"benchmarks/\w+\.py")
_SOURCE_PATH = re.compile(r"`([\w./-]+(?:\.py|/))`")
_SOURCE_NAME = re.compile(r"`((?:[A-Z]\w+|[a-z]\w*_\w+))`")
_ROOM_ROW = re.compile(r"^\| (\d) \| `(\w+)(?:/|\.py)` \|.*\| ([^|]*) \|$", re.MULTILINE)


def page_text(page):
    return page.read_text(encoding="utf-8")


def page_names(page):
    return page.relative_to(ROOT).as_posix()


def anchors(page):
    """The fragments by which the headings of a page can be linked, as GitHub makes them."""
    headings = _HEADING.findall(_FENCED.sub("", page_text(page)))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def relative_targets(page):
    """Paths and fragments of all links and pictures that stay within the repository."""
    links = _TARGET.findall(_CODE.sub("", page_text(page)))
    targets = [inline or attribute for inline, attribute in links]
    return [target.partition("#")[::2] for target in targets if "://" not in target]


def shown_commands(page):
    """Command and remaining words of every `hyper-merge ...` in code."""
    return [match for code in _CODE.findall(page_text(page)) for match in _COMMAND.findall(code)]


@functools.cache
def help_text(*arguments):
    """What the command line says of itself or of a command; fails for one that does not exist."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr("sys.argv", ["hyper-merge", *arguments, "--help"])
        patch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_module("hyper_merge", run_name="__main__")
    assert exit_info.value.code == 0, f"hyper-merge {' '.join(arguments)} is no command"
    return out.getvalue()


def options_of(command):
    return set(_OPTION.findall(help_text(command).replace("[", " ").replace("]", " ")))


def recipe_keys():
    """Every setting of a recipe: the options of a merge that are its own."""
    others = {"config", "create", "debug", "help", "scheduler", "worker-memory", "workers"}
    return {option[2:] for option in options_of("merge")} - others


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_relative_links_and_pictures_exist(page):
    targets = relative_targets(page)
    assert targets
    for path, fragment in targets:
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{path} leads out of the repository"
        assert target.exists(), f"{path} does not exist"
        assert not fragment or fragment in anchors(target), f"{path} has no heading #{fragment}"


def test_the_readme_links_to_every_page():
    linked = {path for path, _ in relative_targets(ROOT / "README.md")}
    assert {page_names(page) for page in PAGES[1:]} <= linked


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_shown_commands_and_their_options_exist(page):
    for command, words in shown_commands(page):
        options = set(_OPTION.findall(words))
        missing = options - options_of(command)
        if command == "runs" and missing:
            missing -= set(_OPTION.findall(help_text("runs", "delete").replace("[", " ")))
        assert not missing, f"hyper-merge {command} has no {', '.join(sorted(missing))}"


def test_every_command_is_shown_on_some_page():
    commands = {command for page in PAGES for command, _ in shown_commands(page)}
    known = set(re.findall(r"^    (\w+) ", help_text(), re.MULTILINE))
    assert "merge" in known
    assert commands == known


def test_every_recipe_key_is_documented_as_a_row():
    settings = page_text(ROOT / "docs" / "recipe.md").split("\n## ")[1]
    assert settings.startswith("Settings")
    rows = re.findall(r"^\| `(\w+)` \|", settings, re.MULTILINE)
    assert sorted(rows) == sorted(recipe_keys())


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_shown_benchmarks_exist(page):
    for path in _BENCHMARK.findall(page_text(page)):
        assert (ROOT / path).exists(), f"{path} does not exist"


def source_files():
    """The path of every file and folder of code in the repository, with a / before it."""
    tops = [ROOT / name for name in ("hyper_merge", "tests", "benchmarks", "scripts", "javascript")]
    below = [path for top in tops for path in (top, *top.rglob("*"))]
    return ["/" + path.relative_to(ROOT).as_posix() for path in (*below, *ROOT.glob("*.py"))]


@pytest.mark.parametrize("page", PAGES_ABOUT_THE_SOURCE, ids=page_names)
def test_named_source_files_exist(page):
    names = _SOURCE_PATH.findall(_FENCED.sub("", page_text(page)))
    assert names
    paths = source_files()
    for name in names:
        ending = "/" + name.rstrip("/")
        assert any(path.endswith(ending) for path in paths), f"{name} does not exist"


@pytest.mark.parametrize("page", PAGES_ABOUT_THE_SOURCE, ids=page_names)
def test_named_classes_and_functions_exist(page):
    names = set(_SOURCE_NAME.findall(_FENCED.sub("", page_text(page)))) - ENVIRONMENT
    assert names
    sources = [ROOT / path[1:] for path in source_files() if path.endswith(".py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    for name in names:
        defined = rf"^ *(?:class |def )?{name}\b[(:]|^ *{name} ="
        assert re.search(defined, code, re.MULTILINE), f"{name} is not defined anywhere"


def test_the_table_of_rooms_is_that_of_the_layering():
    rows = _ROOM_ROW.findall(page_text(ROOT / "docs" / "architecture.md"))
    levels = {room: int(level) for level, room, _ in rows}
    assert {room: tuple(re.findall(r"`(\w+)`", below)) for _, room, below in rows} == ROOMS
    assert levels == {room: level_of(room) for room in ROOMS}


def level_of(room):
    """One more than the highest level of the rooms that a room builds on."""
    return 1 + max(map(level_of, ROOMS[room]), default=0)


def test_the_shown_declaration_is_that_of_sd1():
    (shown,) = _PYTHON.findall(page_text(ROOT / "docs" / "adding-a-family.md"))
    families = ROOT / "hyper_merge" / "checkpoints" / "architectures" / "families"
    assert shown in page_text(families / "sd1.py")
