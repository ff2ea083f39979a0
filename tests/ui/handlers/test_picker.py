"""Picking checkpoints: lists, folders, names, and all that is refused before anything runs."""

import shutil
from types import SimpleNamespace

import pytest
from at_the_tab import EVIL, NAMES, kinds, tags, values, words
from hypothesis import example, given
from hypothesis import strategies as st

from hyper_merge.hosts.standalone import Standalone
from hyper_merge.operations.merge.naming import suggest_name
from hyper_merge.recipe.parsing import parse_name
from hyper_merge.ui.form_fields import BASE_AVERAGE
from hyper_merge.ui.handlers import picker
from hyper_merge.ui.handlers.picker import (
    ALL_FOLDERS,
    TOP_FOLDER,
    _inspect_file,
    add_folder,
    checkpoint_folders,
    clear_selection,
    inspect_files,
    list_checkpoints,
    offers_demo,
    preset_ranks,
    show_plan,
)


def plan_message(host, **changes):
    """Returns kind and words of the message under the form."""
    _, answer, *_ = show_plan(host, "", *values(**changes))
    return kinds(answer), words(answer)


def test_the_plan_says_files_sizes_time_and_memory(host):
    table, answer, *_ = show_plan(host, "", *values())
    assert kinds(answer) == []
    text = words(answer)
    assert "mix.safetensors" in text
    assert "2 LoRAs mix_0-4" in text
    assert "instead of 808 kB" in text
    assert "of memory" in text
    assert [name in words(table) for name in NAMES] == [True] * 3
    assert "Stable Diffusion 1.x" in words(table)


def test_an_empty_name_shows_what_it_stands_for(host):
    assert show_plan(host, "", *values(name=""))[2]["placeholder"] == "hyper-a-3"
    assert show_plan(host, "", *values(checkpoints=[]))[2]["placeholder"] == ""


def test_nothing_is_written_by_a_plan(host, root):
    before = sorted(root.rglob("*"))
    show_plan(host, "", *values())
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("picked", [[], None])
def test_an_empty_table_says_what_to_do(host, picked):
    table, answer, *_ = show_plan(host, "", *values(checkpoints=picked))
    assert words(table).startswith("Pick two or more checkpoints")
    assert answer == ""


def test_a_single_checkpoint_asks_for_one_more(host):
    assert plan_message(host, checkpoints=NAMES[:1]) == (["info"], "Pick one more checkpoint.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": "many"}, 'Ranks: item 1: expected a whole number from 1 to 4096, got "many"'),
        ({"ranks": ""}, "Ranks: expected a list of whole numbers"),
        ({"weights": "1, 2"}, "Weights: expected 3 numbers, one per checkpoint, got 2"),
        ({"name": "a/b"}, 'Name: the path separator "/" is not allowed'),
        ({"iterations": None}, "Iterations: expected a whole number"),
        ({"tolerance": -1}, "Tolerance: expected a number"),
        ({"seed": 0.5}, "Seed: expected a whole number"),
        ({"dtype": "half"}, "Precision: expected one of"),
        ({"device": "cuda:99"}, "device cuda:99 was asked for, but"),
        ({"vae": "mine"}, "VAE: expected one of"),
        ({"base": "/etc/passwd"}, "/etc/passwd is no longer in the list; press Refresh"),
        ({"base": EVIL, "checkpoints": NAMES}, f"{EVIL} is no longer in the list"),
        ({"checkpoints": [NAMES[0], NAMES[0]]}, ""),
    ],
)
def test_an_impossible_setting_is_reported_calmly(host, changes, message):
    kind, text = plan_message(host, **changes)
    assert kind == ["bad"]
    assert text.startswith(message)


@pytest.mark.parametrize("changes", [{"name": None}, {"ranks": None}, {"weights": None}])
def test_a_missing_field_counts_as_empty(host, changes):
    (field,) = changes
    assert plan_message(host, **changes) == plan_message(host, **{field: ""})


@pytest.mark.parametrize("typed", ["/etc/passwd", "../../x.safetensors", "C:\\x.ckpt", "x\0.ckpt"])
def test_a_typed_path_is_never_looked_up(host, typed, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hyper_merge.ui.handlers.picker.inspect_files", lambda *args: seen.append(args)
    )
    monkeypatch.setattr(
        "hyper_merge.ui.handlers.merge_request.run_preflight", lambda *args: seen.append(args)
    )
    _inspect_file.cache_clear()
    table, answer, *_ = show_plan(host, "", *values(checkpoints=[typed, typed]))
    _inspect_file.cache_clear()
    assert seen == []
    assert "no longer in the list; press Refresh" in words(table)
    assert kinds(answer) == ["bad"]


def test_the_path_of_a_checkpoint_elsewhere_is_refused_too(host, files):
    table, answer, *_ = show_plan(host, "", *values(checkpoints=[*NAMES[:2], str(files[2])]))
    assert "no longer in the list" in words(table)
    assert words(answer) == "Some of these checkpoints cannot be merged; the table says why."


def test_a_deleted_file_leaves_the_list(host, checkpoints):
    (checkpoints / "b.safetensors").unlink()
    table, answer, *_ = show_plan(host, "", *values())
    assert "b.safetensorsno longer in the list; press Refresh" in words(table)
    assert kinds(answer) == ["bad"]


def test_a_listed_file_that_vanished_is_reported(webui, checkpoints):
    host = webui.host()
    (checkpoints / "b.safetensors").unlink()
    table, answer, *_ = show_plan(host, "", *values())
    assert "b.safetensorsfile not found; press Refresh" in words(table)
    assert "hm-problem" in table
    assert (kinds(answer), "table says why" in words(answer)) == (["bad"], True)
    host.refresh()
    assert "no longer in the list" in words(show_plan(host, "", *values())[0])


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4096, b"PK\3\4 not a pickle", b"<html>404</html>"]
)
def test_a_damaged_file_has_its_problem_in_the_table(host, checkpoints, content):
    (checkpoints / "b.safetensors").write_bytes(content)
    table, answer, *_ = show_plan(host, "", *values())
    assert table.count("hm-problem") == 1
    assert words(answer) == "Some of these checkpoints cannot be merged; the table says why."


def test_a_truncated_file_has_its_problem_listed(host, checkpoints):
    path = checkpoints / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    table, answer, *_ = show_plan(host, "", *values())
    assert "hm-problem" in table
    assert kinds(answer) == ["bad"]


def test_a_file_is_looked_at_once_until_it_changes(host, checkpoints, monkeypatch):
    looked = []
    original = inspect_files

    def watched(path):
        looked.append(path.name)
        return original(path)

    monkeypatch.setattr("hyper_merge.ui.handlers.picker.inspect_files", watched)
    show_plan(host, "", *values())
    show_plan(host, "", *values(ranks="8"))
    assert looked == NAMES
    (checkpoints / "b.safetensors").write_bytes(b"nothing")
    show_plan(host, "", *values())
    assert looked == [*NAMES, "b.safetensors"]


def test_a_taken_name_is_refused_or_avoided(host, checkpoints):
    shutil.copy2(checkpoints / "c.safetensors", checkpoints / "mix.safetensors")
    shutil.copy2(checkpoints / "c.safetensors", checkpoints / "hyper-a-3.safetensors")
    kind, text = plan_message(host)
    assert kind == ["bad"]
    assert "exists and is not the average of these checkpoints; choose another name" in text
    kind, text = plan_message(host, name=" ")
    assert kind == []
    assert "hyper-a-3-b.safetensors" in text


def test_taken_suggestions_are_reported(host, checkpoints):
    for end in ("", *(f"-{letter}" for letter in "bcdefgh")):
        shutil.copy2(checkpoints / "c.safetensors", checkpoints / f"hyper-a-3{end}.safetensors")
    kind, text = plan_message(host, name="")
    assert kind == ["bad"]
    assert "hyper-a-3.safetensors exists" in text


def test_a_checkpoint_of_the_merge_is_not_replaced(host):
    kind, text = plan_message(host, name="a")
    assert kind == ["bad"]
    assert "choose another name" in text


def test_a_repeated_merge_is_reported_without_alarm(host, run):
    assert plan_message(host) == (
        ["good"],
        "Made already: this is the run mix. Change settings or name for another one.",
    )


def test_other_ranks_use_the_hyper_model_that_is_there(host, run):
    kind, text = plan_message(host, ranks="3")
    assert kind == []
    assert "mix.safetensors" in text
    assert "exists already" in text
    assert "1 LoRA mix-2_0-3" in text


def test_checkpoints_of_the_same_file_name_are_refused(host, checkpoints):
    (checkpoints / "sub").mkdir()
    shutil.copy2(checkpoints / "c.safetensors", checkpoints / "sub" / "a.safetensors")
    kind, text = plan_message(host, checkpoints=["a.safetensors", "sub/a.safetensors"])
    assert kind == ["bad"]
    assert "rename one of them" in text


def test_a_checkpoint_may_have_any_name(host, checkpoints):
    (checkpoints / "a.safetensors").rename(checkpoints / f"{EVIL}.safetensors")
    listed = [f"{EVIL}.safetensors", *NAMES[1:]]
    table, answer, *_ = show_plan(host, "", *values(checkpoints=listed, name=""))
    assert kinds(answer) == []
    assert "hyper-img-src-x-3.safetensors" in words(answer)
    assert EVIL in words(table)
    assert "img" not in tags(table) | tags(answer)


def test_the_hash_that_the_webui_knows_is_shown(webui):
    host = webui.host()
    info = webui.sd_models.get_closet_checkpoint_match("b.safetensors")
    before, *_ = show_plan(host, "", *values())
    known = info.calculate_shorthash()
    after, *_ = show_plan(host, "", *values())
    assert "Short hash" not in before
    assert "<code>" not in before, "another kind of hash would only seem to change"
    assert f"<code>{known}</code>" in after
    assert after.count("<code></code>") == 2


def test_lists_keep_picked_checkpoints_that_are_gone(host):
    picked, folder, base, demo = list_checkpoints(host, ["b.safetensors", "gone.safetensors"])
    assert picked["choices"] == [*NAMES, "gone.safetensors"]
    assert "value" not in picked
    assert (folder["choices"], folder["value"]) == ([ALL_FOLDERS], ALL_FOLDERS)
    assert base["choices"] == [BASE_AVERAGE, *NAMES]
    assert demo["visible"] is False
    assert list_checkpoints(host, None)[0]["choices"] == NAMES


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        ([], [ALL_FOLDERS]),
        (["a.ckpt"], [ALL_FOLDERS]),
        (["a.ckpt", "sd/a.ckpt"], [ALL_FOLDERS, TOP_FOLDER, "sd"]),
        (["x/y/a.ckpt", "b\\a.ckpt"], [ALL_FOLDERS, "b", "x/y"]),
    ],
)
def test_folders_are_those_of_the_names(names, folders):
    assert checkpoint_folders(names) == folders


def test_adding_a_folder_leaves_out_hyper_models(host, checkpoints, run):
    (checkpoints / "sub").mkdir()
    shutil.copy2(checkpoints / "c.safetensors", checkpoints / "sub" / "d.safetensors")
    assert "mix.safetensors" in host.checkpoints()
    assert add_folder(host, [], ALL_FOLDERS) == [*NAMES, "sub/d.safetensors"]
    assert add_folder(host, None, TOP_FOLDER) == NAMES
    assert add_folder(host, ["c.safetensors"], "sub") == ["c.safetensors", "sub/d.safetensors"]
    assert add_folder(host, ["c.safetensors"], TOP_FOLDER) == [
        "c.safetensors",
        "a.safetensors",
        "b.safetensors",
    ]
    assert add_folder(host, ["c.safetensors"], "nowhere") == ["c.safetensors"]
    assert clear_selection() == []


def test_a_preset_is_its_ranks():
    assert preset_ranks("medium") == "128, 64, 32, 16"


def test_the_demo_is_offered_in_an_empty_app(tmp_path, host):
    assert offers_demo(Standalone(tmp_path / "empty"))
    assert list_checkpoints(Standalone(tmp_path / "empty"), [])[3]["visible"] is True
    assert not offers_demo(host)
    assert not offers_demo(SimpleNamespace(has_txt2img=True, checkpoints=dict))


@given(st.lists(st.text(), max_size=4))
@example([])
@example(["con.safetensors", "none"])
@example(["__" * 30 + ".ckpt"])
@example(["x" * 300])
def test_the_suggested_name_is_always_a_name(picked):
    name = suggest_name(picked)
    assert parse_name(name) == name
    assert name.endswith(f"-{len(picked)}")


def test_a_checkpoint_removed_during_the_plan_is_named(host, checkpoints, monkeypatch):
    preflight_form = picker.preflight_form

    def remove_after(*arguments):
        preflight = preflight_form(*arguments)
        (checkpoints / "b.safetensors").unlink(missing_ok=True)
        return preflight

    monkeypatch.setattr(picker, "preflight_form", remove_after)
    kind, text = plan_message(host)
    assert kind == ["bad"]
    assert "b.safetensors does not exist" in text
