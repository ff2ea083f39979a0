"""The tab "LoRAs": what can be picked, what each choice needs and makes, refusals, and earlier runs."""

import json
import threading

import pytest
import torch
from at_the_tab import EVIL, ended, kinds, tags, unchanged, words
from lora_files import dense, distance, energy, share, write, write_lora, write_related
from tiny_family import layers_of, snapshot

from hyper_merge.operations.loras.inspect import LoraCatalogue
from hyper_merge.ui.handlers import history
from hyper_merge.ui.handlers.lora_jobs import start_lora_job
from hyper_merge.ui.handlers.loras import (
    CHOICES,
    change_choice,
    copy_lora_settings,
    inspect_some_loras,
    list_loras,
    parse_lora_picks,
    show_choice,
    show_lora_run,
    watch_lora_job,
)
from hyper_merge.ui.handlers.merge import show_merge_result
from hyper_merge.ui.handlers.result import show_run

BY_ACTION = {choice.action: text for text, choice in CHOICES.items()}
ALL = ["lora0.safetensors", "lora1.safetensors", "sub/lora2.safetensors"]


@pytest.fixture
def loras(root):
    """The folder of LoRAs: three that go together, one of them in a folder, and a file that is none."""
    folder = root / "Lora"
    (folder / "sub").mkdir(parents=True)
    write_related(folder, count=3)
    (folder / "lora2.safetensors").rename(folder / "sub" / "lora2.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no LoRA at all")
    return folder


def form(action, names, size="", checkpoint=None, run=None, **others):
    """Returns the form's values, in the order of its widgets."""
    rest = {"name": "", "replace": False, "by": "1", "blocks": "", **others}
    picked = json.dumps([[x, rest["by"]] for x in names])
    choice = BY_ACTION[action]
    return [picked, choice, size, checkpoint, run, rest["name"], rest["replace"], rest["blocks"]]


def made(host, jobs, *values, **settings):
    """Returns the card of a job that was started; its widgets are those of the page."""
    assert start_lora_job(host, jobs, *form(*values, **settings)) == ""
    status, stop, _, card, wrote = list(watch_lora_job(jobs, begun=True))[-1]
    assert ended(jobs).message == ""
    assert words(status).startswith("Done")
    assert stop["interactive"] is False
    assert wrote == jobs.last.status.task
    return card


def inspected(host, known):
    """Returns what a page knows of the files by name, once it has asked often enough."""
    rows = [{}]
    while not all(row.get("known") for row in rows):
        rows = json.loads(inspect_some_loras(host, known, "[]"))
    return {row["name"]: row for row in rows}


def test_the_list_has_every_file_and_its_facts_once_they_are_known(host, loras):
    known = LoraCatalogue()
    text, checkpoint, run = list_loras(host, known, None, None)
    rows = {row["name"]: row for row in json.loads(text)}
    assert rows.keys() == {"broken.safetensors", *ALL}
    assert not any("family" in row for row in rows.values())
    assert (checkpoint["choices"], run["choices"]) == (list(host.checkpoints()), [])
    rows = inspected(host, known)
    assert rows[ALL[2]]["family"] == "Stable Diffusion 1.x"
    assert rows[ALL[2]]["rank"] > 0
    assert rows[ALL[0]]["problem"] == ""
    assert rows[ALL[0]]["ours"] is False
    assert "broken.safetensors" in rows["broken.safetensors"]["problem"]
    before = rows[ALL[0]]["rank"]
    write_lora(loras / ALL[0], 0, rank=before + 1)
    assert inspected(host, known)[ALL[0]]["rank"] == before + 1


@pytest.mark.parametrize("text", ["", "{", "7", '["a"]', "null", '[["a"]]'])
def test_a_damaged_list_of_picks_is_an_empty_one(text):
    assert parse_lora_picks(text) == []


@pytest.mark.parametrize("text", CHOICES)
def test_a_choice_shows_what_it_needs(text):
    choice = CHOICES[text]
    about, size, checkpoint, run, name, advanced, blocks, button = show_choice(text)
    assert words(about) == choice.about
    assert (size["visible"], size["value"], name["value"]) == (bool(choice.size), "", "")
    assert checkpoint["visible"] is (choice.action in ("add", "subtract"))
    assert run["visible"] is (choice.action == "fit")
    assert (advanced["visible"], blocks) == (choice.weighs, "")
    assert button["value"] == choice.button


@pytest.mark.parametrize("text", CHOICES)
def test_fields_are_emptied_when_the_choice_changes_alone(text):
    assert all(map(unchanged, change_choice(text, text)))
    shown, *fields = change_choice(text, "another")
    assert (shown, fields) == (text, [*show_choice(text)])


def test_loras_are_distilled_and_one_more_is_fitted(host, jobs, loras):
    card = made(host, jobs, "share", ALL[:2], size="6, 3", name="few")
    assert words(card).startswith("few ✓ Done2 LoRAs")
    assert words(card).count("<lora:few_0-6:") == 2
    assert {"button", "table"} <= tags(card)
    assert (loras / "few_0-6.safetensors").exists()
    assert unchanged(show_merge_result(host, jobs)[0]), "the tab Merge shows no such run"
    _, _, run = list_loras(host, LoraCatalogue(), None, None)
    assert (run["choices"], run["value"]) == (["few"], "few")
    assert "img" in tags(card), "the curve"
    card = made(host, jobs, "fit", ALL[2:], run="few", name="later")
    assert words(card).startswith("later ✓ Done")
    assert "<lora:few_0-6:" in words(card)
    assert "private LoRA" not in words(card)
    card = made(host, jobs, "fit", ALL[2:], size="2", run="few", name="closer")
    assert "With its private LoRA few_fit-closer-2 (rank 2, " in words(card)
    assert "<lora:few_fit-closer-2:1.00000>" in words(card)
    (loras / "few_fit-closer-2.safetensors").unlink()
    card = show_lora_run(host, "few")
    assert kinds(card) == ["bad"]
    assert "% of that LoRA is restored" in words(card)
    assert "later" in words(show_lora_run(host, "few"))


@pytest.mark.parametrize("size", ["70 kB", "80 %"])
def test_a_size_or_a_share_is_distilled_to(host, jobs, loras, size):
    made(host, jobs, "share", ALL, size=size)
    assert len(list(loras.glob("hyper-lora0-3_*.safetensors"))) >= 1
    made(host, jobs, "share", ALL, size="2")
    assert (loras / "hyper-lora0-3-2_0-2.safetensors").exists()


@pytest.mark.parametrize(("size", "rank"), [("2", 2), ("60 kB", None), ("80 %", None)])
def test_each_picked_lora_is_resized(host, jobs, loras, size, rank):
    card = made(host, jobs, "resize", ALL[1:], size=size)
    ending = "rank2" if rank else "resized"
    for name in ALL[1:]:
        path = (loras / name).with_name(f"{(loras / name).stem}-{ending}.safetensors")
        assert path.stat().st_size < (loras / name).stat().st_size
        assert f"<lora:{path.stem}:1" in words(card)
    assert words(card).startswith("2 LoRAs ✓ Done")


def test_loras_are_combined_by_their_multipliers(host, jobs, loras):
    card = made(host, jobs, "combine", [ALL[0], ALL[2]], name="both", by="-0,5")
    assert "- 0.5 * lora0 - 0.5 * lora2" in words(card)
    one, other, both = (dense(loras / x) for x in (ALL[0], ALL[2], "both.safetensors"))
    wanted = {module: -0.5 * (one[module] + other[module]) for module in one}
    assert distance(both, wanted) / energy(wanted) < 1e-4


def test_loras_are_combined_by_their_weights_by_block(host, jobs, loras):
    blocks = "lbw=NONE\n\n 0.5 "
    made(host, jobs, "combine", [ALL[0], ALL[2]], name="both", blocks=blocks)
    other, both = (dense(loras / x) for x in (ALL[2], "both.safetensors"))
    wanted = {module: 0.5 * change for module, change in other.items()}
    assert distance(both, wanted) / energy(wanted) < 1e-4


def test_a_checkpoint_takes_a_lora_and_gives_it_back(host, jobs, loras, checkpoints):
    layer = layers_of(checkpoints / "a.safetensors")[0]
    state = {
        f"{layer.module}.lora_up.weight": torch.ones(layer.up_shape(1)),
        f"{layer.module}.lora_down.weight": torch.ones(layer.down_shape(1)),
    }
    write(loras / "one.safetensors", state)
    card = made(host, jobs, "add", ["one.safetensors"], checkpoint="a.safetensors", name="more")
    assert words(card).startswith("more ✓ Donea and one")
    assert (checkpoints / "more.safetensors").exists()
    made(host, jobs, "subtract", ["one.safetensors"], checkpoint="more.safetensors")
    assert (checkpoints / "more-minus-one.safetensors").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (form("share", []), "LoRAs: pick one or more"),
        (form("share", ALL[:1], size="2"), "LoRAs: Fewer than two LoRAs"),
        (form("share", ALL), "Size: expected ranks, a size or a share"),
        (form("share", ALL, size="many"), "Size: "),
        (form("share", ALL, size="2", name="a/b"), "Name: "),
        (form("share", [*ALL, "broken.safetensors"], size="2"), "broken.safetensors"),
        (form("share", [*ALL, "../x"], size="2"), "no longer in the list"),
        (form("resize", ALL), "Size: expected a rank"),
        (form("resize", ALL, size="4, 2"), "Size: "),
        (form("resize", ALL, size="2", name="one"), "Name: expected nothing"),
        (form("combine", ALL, by="x"), "Multiplier: "),
        (form("combine", ALL, by="0"), "Multiplier: "),
        (form("combine", ALL, blocks="1"), "Weights by block: expected 3 texts"),
        (form("combine", ALL, blocks="1\n1\n1,2"), "Weights by block: item 3"),
        (form("add", ALL, checkpoint="a.safetensors", blocks="1"), "Weights by block: expected 3"),
        (form("combine", ALL, name="broken"), "broken.safetensors"),
        (form("combine", ["broken.safetensors"]), "broken.safetensors"),
        (form("add", ALL), "Checkpoint: pick one"),
        (form("add", ALL, checkpoint="gone"), "gone is no longer in the list"),
        (form("fit", ALL[:1]), "Run: expected a run of LoRAs"),
        (form("fit", ALL[:1], run="gone"), "no run of LoRAs"),
        (form("fit", ALL, run="few"), "LoRAs: expected one"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_at_once(host, jobs, loras, root, values, message):
    before = snapshot(root)
    answer = start_lora_job(host, jobs, *values)
    assert kinds(answer) == ["bad"]
    assert message in words(answer)
    assert jobs.last is None
    assert snapshot(root) == before


def test_names_are_escaped(host, jobs, root):
    (root / "Lora").mkdir()
    name = f"{EVIL}.safetensors"
    for seed, path in enumerate((name, "b.safetensors")):
        write_lora(root / "Lora" / path, seed)
    card = made(host, jobs, "combine", [name, "b.safetensors"], name="both")
    assert EVIL in words(card)
    card = made(host, jobs, "share", [name, "b.safetensors"], size="2", name="few")
    assert EVIL in words(card)
    assert card.count("<img ") == 1, "the curve"
    assert EVIL not in card


def test_while_another_job_runs_none_is_started(host, jobs, loras):
    over = threading.Event()
    jobs.start("mix", lambda task, progress: over.wait(60) and "", host.log)
    try:
        answer = start_lora_job(host, jobs, *form("share", ALL, size="2"))
        assert (kinds(answer), words(answer)[:25]) == (["info"], "mix is still being made (")
        first = next(watch_lora_job(jobs, begun=False))
        assert (first[0], first[1]["interactive"]) == ("", False), "it is followed elsewhere"
    finally:
        over.set()
    assert ended(jobs).outcome == "done"


@pytest.fixture
def few(root, loras):
    """A run of LoRAs."""
    share([loras / name for name in ALL], root, name="few", ranks=(3, 2))
    return "few"


def test_a_run_of_loras_is_shown_here_and_not_under_merge(host, few, run):
    assert words(show_lora_run(host, few)).startswith("few3 LoRAs")
    assert all(unchanged(update) for update in show_run(host, few))
    for name in (run, "gone", None):
        assert unchanged(show_lora_run(host, name))


def test_a_missing_file_is_said(host, few, loras):
    (loras / "few_0-3.safetensors").unlink()
    card = show_lora_run(host, few)
    assert kinds(card) == ["bad"]
    assert "Missing: few_0-3.safetensors" in words(card)


def test_a_damaged_run_is_said(host, few, root):
    (root / "hyper-merge/few/loras.json").write_text("{")
    assert kinds(show_lora_run(host, few)) == ["bad"]
    *others, message = copy_lora_settings(host, few)
    assert kinds(message) == ["bad"]
    assert all(map(unchanged, others))


def test_settings_are_copied(host, jobs, few, loras, run):
    picked, choice, shown, _, size, _, _, name, _, _, button, message = copy_lora_settings(
        host, few
    )
    assert [x for x, _ in json.loads(picked)] == ALL
    assert (CHOICES[choice].action, size["value"], name["value"]) == ("share", "3, 2", "")
    assert (kinds(message), button["value"], shown) == (["good"], "Distil", choice)
    assert all(map(unchanged, change_choice(choice, shown)))
    *copied, message = history.copy_settings(host, few)
    assert all(map(unchanged, copied))
    assert message == ""
    assert all(map(unchanged, copy_lora_settings(host, run)))
    (loras / ALL[0]).unlink()
    *_, message = copy_lora_settings(host, few)
    assert (kinds(message), "1 of its LoRAs" in words(message)) == (["info"], True)


def test_runs_of_both_kinds_are_listed_compared_and_deleted(host, jobs, few, run, loras):
    table, *_ = history.list_earlier_runs(host, None, None)
    assert "3 LoRAs" in words(table)
    assert "3 checkpoints" in words(table)
    assert "data-kind=loras" in table
    beside = words(history.show_side_by_side(host, few, run))
    assert "none" in beside
    answer, *_, to_delete = history.ask_to_delete_run(host, jobs, few)
    assert "few_0-3.safetensors" in words(answer)
    assert not any(f"{name}" in words(answer) for name in ALL)
    answer, *_ = history.delete_confirmed_run(host, jobs, to_delete)
    assert kinds(answer) == ["good"]
    assert all((loras / name).exists() for name in ALL)
    assert not (loras / "few_0-3.safetensors").exists()
