"""What a run made: figures, prompts by checkpoint, styles that are saved and removed again."""

import json

import pytest
from at_the_tab import kinds, unchanged, words
from fake_webui.styles import PromptStyle

from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.runs.run import load_run
from hyper_merge.ui.handlers.result import (
    hide_deleted_run,
    prompts_of,
    remove_run_styles,
    save_run_styles,
    show_run,
    styles_of,
)
from hyper_merge.ui.html.common import format_percent


@pytest.fixture
def webui_host(webui):
    return webui.host()


def test_a_run_is_shown_with_figures_prompt_and_plots(host, run, merged):
    panel = show_run(host, run)
    message, group, sentence, table, picker, prompt, note, *plots, name, title, prompts = panel
    assert (message, note, name, title) == ("", "", "mix", "")
    assert group["visible"] is True
    text = words(sentence)
    assert text.startswith("mix3 checkpoints (808 kB) → hyper-model mix.safetensors ("), "not new"
    report = load_run(host.folders(), run).report
    mean, worst = format_percent(report.fidelity_mean), format_percent(report.worst.fidelity)
    assert f"explained in the mean{mean}at worst: {report.worst.name}{worst}" in text
    assert f"count alike: {format_percent(report.explained_mean)} in the mean" in text
    folders = host.folders()
    for path in (folders.models / "mix.safetensors", folders.loras, folders.runs / "mix"):
        assert f'data-copy="{path}"' in sentence
    for row in merged.report.checkpoints:
        for x in row.multipliers:
            assert f"{x:.2f}" in words(table)
    assert (picker["choices"], picker["value"]) == (["a", "b", "c"], "a")
    assert prompt == json.loads(prompts)["a"]
    assert all('src="data:image/png;base64,' in plot and 'alt="' in plot for plot in plots)


def test_every_checkpoint_has_the_prompt_of_its_multipliers(host, run, merged):
    prompts = prompts_of(load_run(host.folders(), run))
    for row in merged.report.checkpoints:
        tags = parse_tags(prompts[row.name])
        assert [tag.name for tag in tags] == ["mix_0-4", "mix_1-2"]
        assert [tag.multiplier for tag in tags] == pytest.approx(row.multipliers, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "there is no run gone in "),
        ("", "expected the name of a run"),
        (None, "expected the name of a run"),
        ("../../etc", "expected the name of a run, which is one of a folder, got '../../etc'"),
    ],
)
def test_a_missing_run_is_refused_and_plots_stay(host, run, name, message):
    answer, group, *rest = show_run(host, name)
    assert kinds(answer) == ["bad"]
    assert words(answer).startswith(message)
    assert group["visible"] is False
    assert len(rest) == 11
    assert all(map(unchanged, rest))


def test_only_a_run_that_is_gone_leaves_the_panel(host, run):
    for name in (run, ""):
        assert all(map(unchanged, hide_deleted_run(host, name)))
    introduction, group, *rest = hide_deleted_run(host, "gone")
    assert "What you get" in words(introduction)
    assert group["visible"] is False
    assert len(rest) == len(show_run(host, run)) - 2


def test_a_damaged_run_is_reported(host, run, root):
    (root / "hyper-merge/mix/manifest.json").write_text('{"version": 1}')
    answer = show_run(host, run)[0]
    assert kinds(answer) == ["bad"]
    assert "cannot be read" in words(answer)
    assert kinds(save_run_styles(host, run)) == ["bad"]


def test_files_that_are_gone_are_named(host, run, root):
    (root / "Lora/mix_1-2.safetensors").unlink()
    sentence = show_run(host, run)[2]
    assert kinds(sentence) == ["bad"]
    assert "Missing: mix_1-2.safetensors. Merge again" in words(sentence)


def test_a_run_without_data_for_plots_is_shown(host, run, root):
    path = root / "hyper-merge/mix/manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("curve", "similarity", "parts"):
        del manifest["report"][key]
    path.write_text(json.dumps(manifest))
    plots = show_run(host, run)[7:10]
    assert all("The report has no figures for this plot." in plot for plot in plots)


def test_in_the_webui_the_hyper_model_has_its_title(webui_host, run, checkpoints):
    webui_host.refresh()
    title = show_run(webui_host, run)[11]
    assert title == webui_host.checkpoint_title(checkpoints / "mix.safetensors")
    assert title.startswith("mix")


def test_styles_are_saved_and_removed_again(webui, webui_host, run):
    style = PromptStyle("cinematic", "film still", "blurry")
    webui.prompt_styles.styles["cinematic"] = style
    answer = save_run_styles(webui_host, run)
    assert (kinds(answer), words(answer)) == (
        ["good"],
        "Saved 3 styles, named mix: … Pick one in txt2img.",
    )
    assert set(webui_host.styles()) == {"cinematic", "mix: a", "mix: b", "mix: c"}
    made = webui.prompt_styles.apply_styles_to_prompt("a cat", ["mix: b"])
    assert made == f"a cat, {prompts_of(load_run(webui_host.folders(), run))['b']}"
    assert words(remove_run_styles(webui_host, run)) == "Removed 3 styles."
    assert set(webui_host.styles()) == {"cinematic"}
    assert words(remove_run_styles(webui_host, run)) == "No styles to remove."


def test_styles_of_the_user_are_left(webui, webui_host, run):
    webui.prompt_styles.styles["mix: b"] = PromptStyle("mix: b", "my words", "")
    answer = save_run_styles(webui_host, run)
    assert kinds(answer) == ["bad"]
    assert "styles that are not Hyper-Merge's have these names: mix: b" in words(answer)
    assert set(webui_host.styles()) == {"mix: b"}


@pytest.mark.parametrize("handler", [save_run_styles, remove_run_styles])
def test_unwritable_styles_are_reported(webui, webui_host, run, handler, monkeypatch):
    save_run_styles(webui_host, run)

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(webui.prompt_styles, "save_styles", refuse)
    answer = handler(webui_host, run)
    assert kinds(answer) == ["bad"]
    assert "the WebUI's styles cannot be written" in words(answer)


@pytest.mark.parametrize("handler", [save_run_styles, remove_run_styles])
@pytest.mark.parametrize("name", ["", "gone", "../mix"])
def test_styles_of_no_run_are_refused(host, handler, name):
    assert kinds(handler(host, name)) == ["bad"]


def test_a_style_is_named_after_run_and_checkpoint(host, run):
    loaded = load_run(host.folders(), run)
    styles = styles_of(loaded)
    assert list(styles) == ["mix: a", "mix: b", "mix: c"]
    assert styles["mix: a"] == prompts_of(loaded)["a"]
