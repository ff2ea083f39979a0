"""Forms that are kept: presets on disk, and what a browser remembers; both are foreign when they come back."""

import json
import time

import pytest
from at_the_tab import FORM, NAMES, ended, kinds, unchanged, values, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyper_merge.runs.presets import PRESETS_FILE, load_presets
from hyper_merge.ui.form_fields import BASE_AVERAGE
from hyper_merge.ui.handlers.merge import start_merge
from hyper_merge.ui.handlers.saved_forms import (
    delete_named_preset,
    list_presets,
    load_named_preset,
    restore_form,
    save_named_preset,
)
from hyper_merge.ui.saved_form import form_from_plain, form_to_plain

FRESH = values(checkpoints=[], name="", ranks="medium")


def kept(seconds=0.0, **form):
    return json.dumps({"time": time.time() + seconds, "form": form})


def loaded(host, name):
    """Returns the form of a preset and the message."""
    *form, shown, message = load_named_preset(host, name)
    return form, shown, message


def test_a_preset_restores_everything(host):
    form = values(base="b.safetensors", weights="1, 2, 3", seed=7, separate=False, ranks="95 %")
    listed, message = save_named_preset(host, "  My mix: 2/3 ", *form)
    assert (listed["choices"], listed["value"]) == (["My mix: 2/3"], "My mix: 2/3")
    assert (kinds(message), words(message)) == (["good"], "Saved My mix: 2/3.")
    for name in (
        "CON",
        "con",
        "My mix: 2-3",
        "a" * 60,
        "…",
    ):  # each beside the others on every system
        assert kinds(save_named_preset(host, name, *values(name=name))[1]) == ["good"]
    assert len(list_presets(host, None)[0]["choices"]) == 6
    assert loaded(host, "My mix: 2/3")[:2] == (form, "My mix: 2/3")
    assert loaded(host, "CON")[0] == values(name="CON")
    assert sorted(path.name for path in host.folders().runs.iterdir()) == [PRESETS_FILE]
    listed, message = delete_named_preset(host, "CON")
    assert "CON" not in listed["choices"]
    assert "con" in listed["choices"]
    assert words(message) == "Deleted CON."


def test_a_preset_is_replaced_by_one_of_its_name(host):
    for ranks in ("4", "8"):
        save_named_preset(host, "one", *values(ranks=ranks))
    listed, message = list_presets(host, "one")
    assert (listed["choices"], "value" in listed, message) == (["one"], False, "")
    assert loaded(host, "one")[0] == values(ranks="8")


EMPTY, WRONG = "no name yet; enter one", "expected a name of 1 to 60 letters on one line"


@pytest.mark.parametrize(
    ("name", "reason"),
    [*((x, EMPTY) for x in ("", "  ", None)), *((x, WRONG) for x in ("a\nb", "x" * 61, "a\0"))],
)
def test_what_is_no_name_is_refused(host, name, reason):
    listed, message = save_named_preset(host, name, *values())
    assert unchanged(listed)
    assert reason in words(message)
    assert not host.folders().runs.exists()


@pytest.mark.parametrize("answer", [load_named_preset, delete_named_preset])
def test_without_a_choice_nothing_happens(host, answer):
    assert all(map(unchanged, answer(host, None)[:-1]))
    assert words(answer(host, "")[-1]) == "Choose a preset first."
    assert "no preset" in words(answer(host, "gone")[-1])


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"a": 1}', '{"checksum": "x", "content": {}}', "\udcff", '{"a": "\\ud800"}'],
)
def test_a_damaged_file_is_reported_and_kept(host, content):
    path = host.folders().runs / PRESETS_FILE
    path.parent.mkdir()
    path.write_bytes(content.encode(errors="surrogateescape"))
    before = path.read_bytes()
    for message in (
        list_presets(host, None)[1],
        load_named_preset(host, "a")[-1],
        save_named_preset(host, "a", *values())[1],
        delete_named_preset(host, "a")[1],
    ):
        assert "is damaged" in words(message)
        assert "move it away" in words(message)
    assert path.read_bytes() == before


def test_checkpoints_that_are_gone_stay_picked_and_a_base_does_not(host, checkpoints):
    save_named_preset(host, "old", *values(base="b.safetensors"))
    (checkpoints / "b.safetensors").unlink()
    form, _, message = loaded(host, "old")
    assert form == values(base=BASE_AVERAGE)
    assert (kinds(message), "1 of its checkpoints" in words(message)) == (["info"], True)


def test_a_page_begins_with_what_the_browser_remembers(host, jobs):
    assert all(map(unchanged, restore_form(host, jobs, "", *FRESH)))
    form = restore_form(host, jobs, kept(checkpoints=NAMES[:2], ranks="8"), *FRESH)
    assert list(form) == values(checkpoints=NAMES[:2], name="", ranks="8")


@pytest.mark.parametrize(
    "text", ["{", "[]", "7", '{"time": "x"}', '{"time": true, "form": 1}', '{"form": {}}']
)
def test_what_a_browser_remembers_may_be_anything(host, jobs, text):
    form = restore_form(host, jobs, text, *FRESH)
    assert all(map(unchanged, form)) or list(form) == FRESH


def test_a_page_that_comes_later_gets_the_form_of_the_job(host, jobs):
    form = values(name="", ranks="3", topup="1")
    assert start_merge(host, jobs, *form) == ""
    assert list(restore_form(host, jobs, kept(60, ranks="9"), *FRESH)) == form, "it runs"
    assert ended(jobs).outcome == "done"
    jobs.start("another job, without a form", lambda task, progress: "", host.log)
    assert list(restore_form(host, jobs, "", *FRESH)) == form
    assert list(restore_form(host, jobs, kept(-60, ranks="9"), *FRESH)) == form, "it is newer"
    assert restore_form(host, jobs, kept(60, ranks="9"), *FRESH)[2] == "9"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from(list(form_to_plain(FORM))),
        st.none()
        | st.booleans()
        | st.floats()
        | st.text()
        | st.lists(st.none() | st.text())
        | st.integers(),
    )
)
def test_foreign_values_never_reach_a_widget_that_cannot_hold_them(saved):
    form = form_from_plain(saved, FORM, NAMES, ["auto", "cpu"])
    for name, value in form_to_plain(form).items():
        before = form_to_plain(FORM)[name]
        assert type(value) is type(before) or {type(value), type(before)} == {int, float}
    assert form.base in (BASE_AVERAGE, *NAMES)
    assert form.device in ("auto", "cpu")
    assert all(isinstance(name, str) for name in form.checkpoints)


def test_two_pages_that_save_at_once_lose_nothing(host):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: save_named_preset(host, name, *values()), "abcdefgh"))
    assert sorted(load_presets(host.folders().runs)) == list("abcdefgh")
