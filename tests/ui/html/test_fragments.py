"""What people read: figures as text, and every name escaped wherever it is shown."""

from dataclasses import replace
from pathlib import Path

import pytest
from at_the_tab import EVIL, kinds, tags, values, words

from hyper_merge.hosts.job_queue import JobStatus
from hyper_merge.operations.deletable import DeletionReport, DeletionVerdict
from hyper_merge.operations.deletable_text import format_deletion_report
from hyper_merge.runs.report import A1111, FORGE_AND_COMFYUI, PrecisionLoss, TrainingReport
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.formatting import format_size
from hyper_merge.ui.form import Form
from hyper_merge.ui.handlers.merge_request import prepare_merge
from hyper_merge.ui.html.common import (
    format_job_status,
    format_merge_introduction,
    format_merge_plan,
    format_message,
    format_notes,
    format_percent,
    format_table,
)
from hyper_merge.ui.html.result import format_missing_files, format_run_card, format_run_table
from hyper_merge.ui.html.runs import format_file_list, format_run_comparison, format_run_list
from hyper_merge.ui.html.size import place_of, size_ticks
from hyper_merge.ui.html.use import format_deletion_verdicts

OURS = {
    "div",
    "p",
    "b",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "code",
    "span",
    "ul",
    "li",
    "wbr",
}
OURS |= {"h3", "dl", "dd", "dt", "button"}


@pytest.fixture
def evil_run(host, run):
    """A run all of whose texts are HTML."""
    loaded = load_run(host.folders(), run)
    rows = [replace(row, name=f"{row.name}{EVIL}") for row in loaded.report.checkpoints]
    report = replace(loaded.report, loras=(f"x_{EVIL}", EVIL), checkpoints=tuple(rows))
    return replace(
        loaded,
        name=EVIL,
        report=report,
        hyper_model=Path(EVIL),
        missing=(Path(EVIL),),
        family=EVIL,
        recipe=replace(loaded.recipe, ranks=(4, 2)),
    )


def evil_standing(**changes):
    return replace(JobStatus(f'"{EVIL}', EVIL, EVIL, notes=(EVIL,), message=EVIL), **changes)


@pytest.mark.parametrize(
    "view",
    [
        lambda run: format_message("bad", EVIL),
        lambda run: format_table([EVIL], []),
        lambda run: format_job_status(evil_standing()),
        lambda run: format_job_status(evil_standing(outcome="done", message="")),
        lambda run: format_job_status(evil_standing(outcome="refused")),
        lambda run: format_job_status(evil_standing(outcome="failed")),
        format_run_card,
        lambda run: format_run_table(run.report),
        lambda run: format_run_list([run], [EVIL]),
        lambda run: format_run_comparison(run, run),
        format_missing_files,
        lambda run: format_file_list([Path(EVIL)], EVIL),
    ],
)
def test_every_text_is_escaped(evil_run, view):
    html = view(evil_run)
    assert EVIL in words(html)
    assert tags(html) <= OURS
    assert EVIL not in html


def test_the_plan_escapes_its_warnings_and_names(host):
    preflight, place = prepare_merge(host, Form.from_widgets(*values()))
    html = format_merge_plan(
        replace(preflight, warnings=(EVIL,)),
        replace(place, run=EVIL, hyper_model=place.hyper_model.with_name(EVIL)),
    )
    assert words(html).count(EVIL) == 3
    assert tags(html) <= OURS


def test_a_task_cannot_leave_its_attribute():
    html = format_job_status(evil_standing())
    assert 'data-task="&quot;&lt;img src=x&gt;"' in html


def test_an_empty_message_is_no_box():
    assert format_message("bad", "") == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 kB"),
        (12_345, "12 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.00 GB"),
        (2_132_000_000, "2.13 GB"),
    ],
)
def test_bytes_in_words(count, text):
    assert format_size(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0.0 %"),
        (-1e-9, "0.0 %"),
        (0.7536, "75.4 %"),
        (0.99996, "99.9 %"),
        (1, "100 %"),
        (1.0000001, "100 %"),
        (-0.034, "-3.4 %"),
    ],
)
def test_a_share_is_never_rounded_up_to_a_whole(share, text):
    assert format_percent(share) == text


@pytest.mark.parametrize(
    ("now", "text"),
    [
        ({}, "mix: waiting for the queue, 0%"),
        ({"phase": "solving", "fraction": 0.4, "elapsed": 80}, "mix: solving, 40%, about 2 minutes left"),
        ({"phase": "solving", "fraction": 0.01, "elapsed": 80}, "mix: solving, 1%"),
        ({"phase": "solving", "fraction": 0.5, "stopping": True}, "mix: stopping, 50%"),
        ({"outcome": "done", "elapsed": 59.4}, "Done: mix, in 59 s"),
        ({"outcome": "done", "elapsed": 59.6}, "Done: mix, in 1 min 0 s"),
        ({"outcome": "stopped", "message": "stopped; no file was changed"}, "Stopped: no file was changed"),
        ({"outcome": "refused", "message": "the disk is full"}, "Failed: the disk is full"),
        ({"outcome": "failed", "message": "KeyError: 1"}, "Unexpected error; see the log for details: KeyError: 1"),
    ],
)  # fmt: skip
def test_progress_in_words(now, text):
    html = format_job_status(replace(JobStatus("task(x)", "mix"), **now))
    assert words(html) == text
    assert ("hm-progress" in html) == (now.get("outcome") is None)


def test_the_bar_is_as_long_as_the_work_done():
    html = format_job_status(JobStatus("task(x)", "mix", "solving", 0.425, 10))
    assert '<div style="width:42.5%"></div>' in html


def test_notes_stand_below_progress_and_outcome():
    for outcome in ("running", "done"):
        html = format_job_status(
            JobStatus("t", "mix", outcome=outcome, notes=("rank 9 is capped",))
        )
        assert kinds(html)[-1] == "info"
        assert words(html).endswith("rank 9 is capped")


def test_a_merge_that_saves_nothing_says_so(host, run):
    loaded = load_run(host.folders(), run)
    larger = replace(loaded, report=replace(loaded.report, bytes_loras=10_000_000))
    assert "more on disk9 MB" in words(format_run_card(larger))


@pytest.mark.parametrize(("dtype", "size"), [("float8", "1 MB, in 8 bits"), ("same", "1 MB")])
def test_a_card_says_which_loras_some_machines_cannot_load(host, run, dtype, size):
    loaded = load_run(host.folders(), run)
    recipe = replace(loaded.recipe, lora_dtype=dtype)
    report = replace(loaded.report, bytes_loras=1_000_000)
    text = words(format_run_card(replace(loaded, recipe=recipe, report=report)))
    assert f"+ 2 LoRAs ({size})" in text


def test_a_card_says_what_a_training_left(host, run):
    loaded = load_run(host.folders(), run)

    def text(training, *fidelities):
        rows = loaded.report.checkpoints
        if fidelities:
            pairs = zip(rows, fidelities, strict=True)
            rows = tuple(replace(row, explained_weighted=share) for row, share in pairs)
        report = replace(loaded.report, training=training, checkpoints=rows)
        return words(format_run_card(replace(loaded, report=report)))

    assert "training" not in text(None)
    training = TrainingReport(20, (0.5, 0.3, 0.4), (0.25, 0.125, 0.0625))
    measured = text(training, 0.75, 0.875, 0.9375)
    assert "explained in the mean85.4 %" in measured
    assert "as runs of the networks measure it for random prompts" in measured
    assert "Before a training of 20 rounds the mean was 60.0 %." in measured
    with_private_loras = text(training, 0.8, 0.875, 0.9375)
    assert "the LoRAs without the private ones explain 85.4 % in the mean, and 60.0 %" in (
        with_private_loras
    )
    assert "gained nothing" in text(TrainingReport(20, (0.5, 0.3, 0.4), (0.5, 0.3, 0.4)))


@pytest.mark.parametrize(("added", "expected"), [(0.015, True), (1e-4, False)])
def test_costly_rounding_is_reported_with_advice(host, run, added, expected):
    loaded = load_run(host.folders(), run)
    rounding = (PrecisionLoss(A1111, added, added), PrecisionLoss(FORGE_AND_COMFYUI, 0.5, 0.5))
    text = words(format_run_card(replace(loaded, report=replace(loaded.report, rounding=rounding))))
    sentence = (
        "AUTOMATIC1111 rounds the weights after every LoRA, which loses 1.5 % of the checkpoints'"
        " differences. A single LoRA per checkpoint is rounded only once: make them under Use, or with"
        " hyper-merge export mix"
    )
    assert (sentence in text) == expected
    assert ("rounds the weights" in text) == expected


def test_a_base_checkpoint_replaces_the_hyper_model(host, run):
    loaded = load_run(host.folders(), run)
    recipe = replace(loaded.recipe, base=str(loaded.sources[0].path))
    based = replace(loaded, recipe=recipe, hyper_model=loaded.sources[0].path)
    assert "→ a.safetensors as base + 2 LoRAs" in words(format_run_card(based))


def test_the_introduction_names_hyper_model_and_loras():
    text = words(format_merge_introduction())
    assert "hyper-model" in text
    assert "LoRAs" in text


@pytest.mark.parametrize(
    ("safe", "frees", "said"),
    [
        (True, 2_000_000, "Deleting those with yes would free 2 MB."),
        (
            True,
            0,
            "Deleting those with yes would free nothing: they are links, or have other names.",
        ),
        (False, 2_000_000, "There is none here."),
    ],
)
def test_bytes_are_freed_only_where_something_is_safe_to_delete(safe, frees, said):
    verdict = DeletionVerdict(
        name="a.safetensors",
        path=Path("a.safetensors"),
        restored_as="a",
        safe=safe,
        reason="" if safe else "too far off",
        frees=frees,
        explained=0.5,
        everything=0.5,
        not_carried=0.0,
        vae_differs=False,
    )
    report = DeletionReport("mix", 0.99, (verdict,), "")
    screen, console = words(format_deletion_verdicts(report)), format_deletion_report(report)
    assert said in screen
    assert ("free nothing: they are links" in console) is (safe and not frees)
    assert ("would free" in screen) is ("would free" in console) is safe
    assert ("none of these is safe to delete" in console) is not safe


def test_a_plan_survives_a_hyper_model_that_was_just_deleted(host, run):
    preflight, place = prepare_merge(host, Form.from_widgets(*values(ranks="3")))
    assert place.exists
    place.hyper_model.unlink()
    assert "mix.safetensors" in words(format_merge_plan(preflight, place))


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (3, 90, [5, 10, 20, 50]),
        (20, 30, [20]),
        (3_000, 4_000_000, [5_000, 10_000, 50_000, 100_000, 500_000, 1_000_000]),
        (3_000, 4_000_000_000, [10_000, 100_000, 10**6, 10**7, 10**8, 10**9]),
    ],
)
def test_a_curve_has_few_ticks_at_round_sizes(low, high, ticks):
    assert size_ticks(low, high) == ticks


@pytest.mark.parametrize(
    ("size", "place"), [(1, 0), (10, 0), (15, 0.5), (30, 1.5), (40, 2), (99, 2)]
)
def test_a_size_has_its_place_between_its_neighbours(size, place):
    assert place_of([10, 20, 40], size) == place


def test_of_many_remarks_all_but_the_first_are_folded_away():
    notes = [f"note {number}" for number in range(8)]
    html = format_notes(notes)
    assert all(note in words(html) for note in notes)
    assert "3 more remarks" in words(html)
    shown = html[: html.index("<details")]
    assert kinds(shown) == ["info"] * 5
    assert format_notes(notes[:5]) == shown


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ranks": "60 kB", "lora_dtype": "auto"}, "and LoRAs (at most 60 kB, in 8 bits):"),
        ({"ranks": "90 %"}, "and LoRAs (as large as the share takes, perhaps"),
        ({"ranks": "99 %", "lora_dtype": "auto"}, " kB):"),
        ({"ranks": "3, 2"}, "and 2 LoRAs mix_0-3 … (34 kB):"),
        ({"ranks": "3"}, "and 1 LoRA mix_0-3 ("),
    ],
)
def test_a_plan_says_of_which_size_loras_will_be(host, changes, text):
    assert text in words(
        format_merge_plan(*prepare_merge(host, Form.from_widgets(*values(**changes))))
    )
