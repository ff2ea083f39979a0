"""The tab Compare: what is asked for, drawn, refused, and shown again."""

import functools
import threading
from dataclasses import fields, replace

import pytest
from at_the_tab import EVIL, ended, kinds, tags, unchanged, until, words
from PIL import Image

from hyper_merge.hosts.host import GeneratorInfo
from hyper_merge.operations.compare.records import comparison_paths
from hyper_merge.runs.run import load_run
from hyper_merge.ui.handlers.compare import (
    CompareForm,
    choose_compared_run,
    compare_request,
    compare_run,
    list_comparisons,
    show_comparison,
    start_comparison,
    watch_comparison,
)
from hyper_merge.ui.handlers.merge import show_merge_result, stop_job
from hyper_merge.ui.panels.compare import CompareWidgets

FORM = CompareForm(
    run="mix",
    checkpoints=["a", "b"],
    prompts="a cat\n\n a dog ",
    negative="bad",
    sampler="Euler a",
    steps=3,
    cfg_scale=7,
    width=64,
    height=64,
    seeds="1, 2",
    average=True,
    difference=False,
)
LISTS = (None, None, None)


def values(**changes):
    form = replace(FORM, **changes)
    return [getattr(form, field.name) for field in fields(form)]


@pytest.fixture
def drawn(webui, run, jobs):
    """The WebUI after a comparison."""
    host = webui.host()
    assert start_comparison(host, jobs, *values()) == ""
    now = ended(jobs)
    assert (now.outcome, now.message) == ("done", "")
    return host


def grid_of(host, name="comparison-1"):
    return comparison_paths(load_run(host.folders(), "mix"), name)


def test_the_widgets_are_the_forms_fields_in_order():
    widgets = [field.name for field in fields(CompareWidgets)]
    assert widgets == [field.name for field in fields(CompareForm)]


def test_a_comparison_is_drawn_saved_and_shown(webui, drawn, jobs):
    picture, figures = grid_of(drawn)
    assert picture.exists()
    assert figures.exists()
    *_, earlier = list(watch_comparison(jobs, drawn, "mix", begun=True))[-1]
    html = show_comparison(drawn, "mix", "comparison-1")
    assert (earlier["choices"], earlier["value"]) == (["comparison-1"], "comparison-1")
    text = words(html)
    assert f"comparison-1 of mix: 8 pairs, drawn by {drawn.title}" in text
    assert "Hyper-model alone" in text
    assert str(picture) in text
    assert 'src="data:image/jpeg;base64,' in html
    loads = [path.rpartition("/")[2] for path in webui.processing.loads]
    assert loads == ["mix.safetensors", "a.safetensors", "b.safetensors"]


def test_a_comparison_makes_no_new_run(drawn, jobs):
    now = jobs.last.status
    assert now.title == "pictures of mix"
    assert now.result == ""
    assert all(unchanged(value) for value in show_merge_result(drawn, jobs))


def test_only_jobs_that_draw_are_followed_here(webui, run, jobs):
    host = webui.host()
    watch = functools.partial(watch_comparison, jobs, host, "mix")
    assert [values[0] for values in watch(begun=False)] == [""]
    jobs.start("mix", lambda task, progress: "mix", host.log)
    ended(jobs)
    assert [values[0] for values in watch(begun=True)] == [""]
    start_comparison(host, jobs, *values(prompts="x"))
    *_, (status, stop, _, earlier) = watch(begun=True)
    assert words(status).startswith("Done: pictures of mix")
    assert stop["interactive"] is False
    assert earlier["value"] == "comparison-1"


def test_the_refusal_by_another_job_goes_with_it(host, run, jobs):
    over = threading.Event()
    jobs.start("other", lambda task, progress: over.wait(60) and "", host.log)
    steps = watch_comparison(jobs, host, run, "other is still being made", begun=True)
    assert all(map(unchanged, next(steps)[2:]))
    over.set()
    ((*_, message, earlier),) = steps
    assert (message, unchanged(earlier)) == ("", True)
    assert len(list(watch_comparison(jobs, host, run, "no sampler", begun=True))) == 1


def test_a_later_page_gets_only_new_comparisons(webui, run, jobs):
    webui.processing.pace = 0.02
    host = webui.host()
    start_comparison(host, jobs, *values(prompts="x"))
    until(lambda: webui.processing.drawn)
    *running, (_, _, _, earlier) = watch_comparison(jobs, host, "mix", begun=False)
    assert earlier["value"] == "comparison-1"
    assert all(unchanged(values[3]) for values in running)
    for name, begun in (("mix", False), ("another", True)):
        *_, (status, *_, earlier) = watch_comparison(jobs, host, name, begun=begun)
        assert words(status).startswith("Done: pictures of mix")
        assert unchanged(earlier)


def test_prompts_are_lines_and_seeds_are_numbers():
    request = compare_request(FORM, ["Euler a"])
    assert request.settings.prompts == ("a cat", "a dog")
    assert request.settings.seeds == (1, 2)
    again = compare_request(replace(FORM, seeds=" 3 4,3"), ["Euler a"])
    assert again.settings.seeds == (3, 4)
    assert request.settings.cfg_scale == 7.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": None}, "expected the name of a run"),
        ({"run": "../mix"}, "expected the name of a run"),
        ({"run": "gone"}, "there is no run gone"),
        ({"checkpoints": []}, "expected a checkpoint"),
        ({"checkpoints": None}, "expected a checkpoint"),
        ({"checkpoints": ["a", "/etc/passwd"]}, "has no checkpoint /etc/passwd"),
        ({"prompts": " \n"}, "expected a prompt"),
        ({"prompts": "x" * 3000}, "at most 2000 characters"),
        ({"sampler": "Magic"}, "expected a sampler of the list, got 'Magic'"),
        ({"sampler": None}, "expected a sampler of the list"),
        ({"steps": None}, "steps: expected a number, got nothing"),
        ({"width": 65}, "width: expected a multiple of 8"),
        ({"seeds": "one"}, 'seeds: expected whole numbers, such as "1, 2", got "one"'),
        ({"seeds": ""}, "seeds: expected whole numbers"),
        ({"seeds": "99999999999"}, "seed: expected 0 to"),
    ],
)
def test_an_invalid_request_starts_nothing(webui, run, jobs, changes, message):
    answer = start_comparison(webui.host(), jobs, *values(**changes))
    assert kinds(answer) == ["bad"]
    assert message in words(answer)
    assert jobs.last is None


def test_names_are_text_to_the_page(webui, run, jobs):
    answer = start_comparison(webui.host(), jobs, *values(checkpoints=[EVIL]))
    assert "img" not in tags(answer)


def test_two_at_a_time_are_refused(webui, run, jobs):
    webui.processing.pace = 0.05
    host = webui.host()
    start_comparison(host, jobs, *values())
    answer = start_comparison(host, jobs, *values())
    assert "pictures of mix is still being made" in words(answer)
    assert kinds(answer) == ["info"]
    jobs.last.stop()
    ended(jobs)


def test_stop_ends_a_comparison_and_saves_nothing(webui, run, jobs):
    steps = []

    def on_step():
        steps.append(webui.state.sampling_step)
        until(lambda: webui.state.interrupted)

    webui.processing.on_step = on_step
    host = webui.host()
    start_comparison(host, jobs, *values(steps=150))
    until(lambda: steps)
    stop_job(jobs)
    assert ended(jobs).outcome == "stopped"
    assert steps == [0]
    assert not grid_of(host)[0].parent.exists()
    *_, (status, _, _, earlier) = watch_comparison(jobs, host, "mix", begun=True)
    assert words(status) == "Stopped: no file was changed"
    assert unchanged(earlier)
    assert webui.queue_lock.held is False


def test_an_error_of_the_webui_names_the_checkpoint(webui, run, jobs):
    webui.processing.fails_with = "b.safetensors"
    start_comparison(webui.host(), jobs, *values())
    now = ended(jobs)
    assert now.outcome == "refused"
    assert "the WebUI cannot draw with b.safetensors" in now.message


def test_a_missing_checkpoint_is_left_out_and_named(webui, run, jobs, root):
    (root / "Stable-diffusion/b.safetensors").unlink()
    (root / "hyper-merge/cache").rename(root / "hyper-merge/no-cache")
    host = webui.host()
    start_comparison(host, jobs, *values(prompts="x", seeds="1"))
    assert ended(jobs).outcome == "done"
    html = show_comparison(host, "mix", "comparison-1")
    assert "b.safetensors is left out: it is missing" in words(html)
    assert "1 pairs" in words(html)


def test_the_lists_hold_runs_checkpoints_and_comparisons(drawn):
    run, checkpoints, earlier, html = list_comparisons(drawn, *LISTS)
    assert (run["choices"], run["value"]) == (["mix"], "mix")
    assert checkpoints["choices"] == checkpoints["value"] == ["a", "b", "c"]
    assert earlier["value"] == "comparison-1"
    assert "comparison-1 of mix" in words(html)
    kept = list_comparisons(drawn, "mix", ["b"], "comparison-1")
    assert kept[1]["value"] == ["b"]
    assert unchanged(kept[3])
    other = list_comparisons(drawn, "gone", ["x"], "comparison-9")
    assert other[1]["value"] == ["a", "b", "c"]
    assert other[2]["value"] == "comparison-1"


def test_a_run_that_is_to_be_compared_comes_with_all_its_checkpoints(host, run):
    chosen, checkpoints, *_, message = compare_run(host, run)
    assert chosen["value"] == run
    assert message == ""
    assert "there is no run gone" in words(compare_run(host, "gone")[-1])
    assert checkpoints["value"] == ["a", "b", "c"]


def test_an_introduction_stands_where_nothing_was_drawn(host, run, monkeypatch):
    monkeypatch.setattr(
        type(host), "generator_info", lambda self: GeneratorInfo(problem="get a brush")
    )
    *_, html = list_comparisons(host, *LISTS)
    assert "Compare pictures" in words(html)
    assert "get a brush" in words(html)
    assert "get a brush" in words(start_comparison(host, None, *values()))


def test_no_runs_is_no_error(host):
    run, checkpoints, earlier, html = list_comparisons(host, *LISTS)
    assert run["choices"] == checkpoints["choices"] == earlier["choices"] == []
    assert earlier["visible"] is False
    assert "Compare pictures" in words(html)
    assert choose_compared_run(host, None)[2] == ""
    assert show_comparison(host, None, None) == ""


def test_a_missing_or_damaged_grid_is_reported(drawn):
    picture, _ = grid_of(drawn)
    for content in (None, b"nothing"):
        picture.unlink(missing_ok=True)
        if content:
            picture.write_bytes(content)
        html = show_comparison(drawn, "mix", "comparison-1")
        assert kinds(html) == ["bad"]
        assert "comparison-1.png cannot be shown" in words(html)
    for name in ("../../x", "comparison-9"):
        assert kinds(show_comparison(drawn, "mix", name)) == ["bad"]


def test_a_large_grid_is_scaled_for_the_page(drawn):
    picture, _ = grid_of(drawn)
    for size in ((4000, 100), (100, 70_000)):
        Image.new("RGB", size).save(picture)
        before = picture.read_bytes()
        html = show_comparison(drawn, "mix", "comparison-1")
        assert 'src="data:image/jpeg;base64,' in html
        assert len(html) < 50_000
        assert picture.read_bytes() == before
