"""Picking checkpoints: lists, folders, names, and all that is refused before anything runs."""

import json
import shutil
from types import SimpleNamespace

import pytest
from at_the_tab import EVIL, NAMES, kinds, values, words
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_family import QUERY, load, write

from hyper_merge.hosts.standalone import Standalone
from hyper_merge.operations.catalogue import Catalogue
from hyper_merge.operations.inspect import inspect_header
from hyper_merge.operations.merge.naming import suggest_name
from hyper_merge.recipe.parsing import parse_name
from hyper_merge.runs.folders import LORA_MANIFEST
from hyper_merge.ui.form_fields import BASE_AVERAGE
from hyper_merge.ui.handlers import picker
from hyper_merge.ui.handlers.picker import (
    inspect_some,
    list_checkpoints,
    offers_demo,
    show_plan,
)

CANNOT = "Some of these checkpoints cannot be merged; the table says why."


def plan_message(host, **changes):
    """Returns kind and words of the message under the form."""
    answer, *_ = show_plan(host, Catalogue(), "", *values(**changes))
    return kinds(answer), words(answer)


def facts(host, *picked, catalogue=None):
    """Returns what the page gets to know of the files, by name."""
    rows = json.loads(inspect_some(host, catalogue or Catalogue(), json.dumps(picked)))
    return {row["name"]: row for row in rows}


def test_the_plan_says_files_sizes_time_and_memory(host):
    kind, text = plan_message(host)
    assert kind == []
    assert "mix.safetensors" in text
    assert "2 LoRAs mix_0-4" in text
    assert "instead of 808 kB" in text
    assert "of memory" in text


def test_the_list_says_family_size_precision_and_vae(host, checkpoints, run):
    rows = facts(host, "b.safetensors")
    assert list(rows) == [*NAMES, "mix.safetensors"]
    row = rows["b.safetensors"]
    status = (checkpoints / "b.safetensors").stat()
    assert (row["size"], row["time"]) == (status.st_size, status.st_mtime)
    assert (row["family"], row["dtype"], row["problem"]) == ("Stable Diffusion 1.x", "fp16", "")
    assert len({row["kind"] for row in rows.values()}) == 1
    assert [row["made"] for row in rows.values()] == [False, False, False, True]
    assert ["vae" in row for row in rows.values()] == [False, True, False, False]
    assert len({row["vae"] for row in facts(host, *NAMES).values() if "vae" in row}) == 3


def test_files_of_another_shape_are_of_another_kind(host, checkpoints, files):
    state = load(files[0])
    del state[QUERY]
    write(checkpoints / "short.safetensors", state)
    rows = facts(host)
    assert (
        rows["short.safetensors"]["kind"]
        != rows["a.safetensors"]["kind"]
        == rows["b.safetensors"]["kind"]
    )


def test_a_page_is_told_what_is_known_after_a_moment(host, monkeypatch):
    monkeypatch.setattr(picker, "_MOMENT", 0.0)
    catalogue = Catalogue()
    unread = json.loads(list_checkpoints(host, catalogue)[0])
    assert ["known" in row for row in unread] == [False] * 3
    for count in (1, 1, 1):  # the time is over after the first, known or not
        assert sum("known" in row for row in facts(host, catalogue=catalogue).values()) == count
    assert facts(host, "c.safetensors", catalogue=catalogue)["c.safetensors"]["known"]
    monkeypatch.undo()
    assert sum("known" in row for row in facts(host, catalogue=catalogue).values()) == 3
    assert ["known" in row for row in json.loads(list_checkpoints(host, catalogue)[0])] == [
        True
    ] * 3


def test_an_empty_name_shows_what_it_stands_for(host):
    assert show_plan(host, Catalogue(), "", *values(name=""))[1]["placeholder"] == "hyper-a-3"
    assert show_plan(host, Catalogue(), "", *values(checkpoints=[]))[1]["placeholder"] == ""


def test_the_suggested_name_is_the_one_that_a_merge_would_get(host, root):
    of_loras = root / "hyper-merge" / "hyper-a-3" / LORA_MANIFEST
    of_loras.parent.mkdir(parents=True)
    of_loras.write_text("{}")
    plan, field, *_ = show_plan(host, Catalogue(), "", *values(name="", ranks="3"))
    assert field["placeholder"] not in ("", "hyper-a-3")
    assert f"LoRA {field['placeholder']}_0-3" in words(plan)


def test_nothing_is_written_by_a_plan(host, root):
    before = sorted(root.rglob("*"))
    facts(host, *NAMES)
    show_plan(host, Catalogue(), "", *values())
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    "picked", ["", "[]", "null", "[1]", "{", '{"a": 1}', "[[", 7 * "[" + "NaN"]
)
def test_without_picks_there_is_no_plan(host, picked):
    answer, *_ = show_plan(host, Catalogue(), "", picked, *values()[1:])
    assert answer == ""
    inspect_some(host, Catalogue(), picked)


def test_a_single_checkpoint_asks_for_one_more(host):
    assert plan_message(host, checkpoints=NAMES[:1]) == (["info"], "Pick one more checkpoint.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ranks": "many"},
            "Ranks: expected a list of whole numbers, such as 128, 64, 32, 16, or small, medium",
        ),
        ({"ranks": "x %"}, 'Share, at worst: expected a share, such as "95%" or 0.95, got "x %"'),
        ({"ranks": "150 %"}, 'Share, at worst: expected a share, such as "95%" or 0.95, got "150'),
        (
            {"ranks": "-3 MB"},
            'Total size: expected a size, such as "300MB" or "1.5GB", got "-3 MB"',
        ),
        ({"ranks": "1,5 GB"}, 'Total size: expected a size, such as "300MB" or "1.5GB", got "1,5'),
        ({"weights": "1, 2"}, "Weights: expected 3 numbers, one per checkpoint, got 2"),
        ({"name": "a/b"}, 'Name: the path separator "/" is not allowed'),
        ({"iterations": None}, "Rounds at most: expected a whole number"),
        ({"tolerance": -1}, "Stop early: expected a number"),
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


def test_no_size_is_asked_for_calmly(host):
    assert plan_message(host, ranks=" ") == (["info"], "Enter ranks, a total size or a share.")


@pytest.mark.parametrize("changes", [{"name": None}, {"ranks": None}, {"weights": None}])
def test_a_missing_field_counts_as_empty(host, changes):
    (field,) = changes
    assert plan_message(host, **changes) == plan_message(host, **{field: ""})


@pytest.mark.parametrize("typed", ["/etc/passwd", "../../x.safetensors", "C:\\x.ckpt", "x\0.ckpt"])
def test_a_typed_path_is_never_looked_up(host, typed, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hyper_merge.operations.catalogue.inspect_header", lambda *args: seen.append(args)
    )
    monkeypatch.setattr(
        "hyper_merge.ui.handlers.merge_request.run_preflight", lambda *args: seen.append(args)
    )
    assert plan_message(host, checkpoints=[typed, typed])[0] == ["bad"]
    assert seen == []


def test_the_path_of_a_checkpoint_elsewhere_is_refused_too(host, files):
    kind, text = plan_message(host, checkpoints=[*NAMES[:2], str(files[2])])
    assert (kind, text) == (["bad"], CANNOT)
    assert str(files[2]) not in facts(host, str(files[2]))


def test_a_deleted_file_leaves_the_list(host, checkpoints):
    (checkpoints / "b.safetensors").unlink()
    assert list(facts(host)) == ["a.safetensors", "c.safetensors"]
    assert plan_message(host) == (["bad"], CANNOT)


def test_a_listed_file_that_vanished_is_reported(webui, checkpoints):
    host = webui.host()
    (checkpoints / "b.safetensors").unlink()
    assert facts(host)["b.safetensors"]["problem"] == "file not found; press Refresh"
    assert plan_message(host) == (["bad"], CANNOT)
    host.refresh()
    assert "b.safetensors" not in facts(host)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4096, b"PK\3\4 not a pickle", b"<html>404</html>", None]
)
def test_a_damaged_file_has_its_problem_in_the_list(host, checkpoints, content):
    path = checkpoints / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    rows = facts(host, *NAMES)
    assert [bool(row["problem"]) for row in rows.values()] == [False, True, False]
    assert "b.safetensors" in rows["b.safetensors"]["problem"]
    assert plan_message(host) == (["bad"], CANNOT)


def test_a_file_is_looked_at_once_until_it_changes(host, checkpoints, monkeypatch):
    looked, catalogue = [], Catalogue()
    original = inspect_header

    def watched(path):
        looked.append(path.name)
        return original(path)

    monkeypatch.setattr("hyper_merge.operations.catalogue.inspect_header", watched)
    facts(host, *NAMES, catalogue=catalogue)
    show_plan(host, catalogue, "", *values())
    facts(host, catalogue=catalogue)
    assert looked == NAMES
    (checkpoints / "b.safetensors").write_bytes(b"nothing")
    assert facts(host, catalogue=catalogue)["b.safetensors"]["problem"]
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
    kind, text = plan_message(host, checkpoints=listed, name="")
    assert kind == []
    assert "hyper-img-src-x-3.safetensors" in text
    assert f"{EVIL}.safetensors" in facts(host)


def test_the_hash_that_the_webui_knows_is_shown(webui):
    host = webui.host()
    info = webui.sd_models.get_closet_checkpoint_match("b.safetensors")
    assert [row["hash"] for row in facts(host).values()] == ["", "", ""]
    known = info.calculate_shorthash()
    assert [row["hash"] for row in facts(host).values()] == ["", known, ""]


def test_lists_are_those_of_the_host(host):
    rows, base, demo = list_checkpoints(host, Catalogue())
    assert [row["name"] for row in json.loads(rows)] == NAMES
    assert base["choices"] == [BASE_AVERAGE, *NAMES]
    assert demo["visible"] is False


def test_the_demo_is_offered_in_an_empty_app(tmp_path, host):
    assert offers_demo(Standalone(tmp_path / "empty"))
    assert list_checkpoints(Standalone(tmp_path / "empty"), Catalogue())[2]["visible"] is True
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
