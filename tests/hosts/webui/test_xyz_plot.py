"""The axis "Hyper-Merge: checkpoint" of the WebUI's X/Y/Z plot."""

import shutil
from types import SimpleNamespace

import pytest
from fake_webui import FLAVOURS, installed
from fake_webui.drawing import picture

from hyper_merge.errors import PictureError
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run

LABEL = "Hyper-Merge: checkpoint"


@pytest.fixture(params=FLAVOURS)
def flavour(request):
    return request.param


@pytest.fixture
def models(tmp_path, started, files):
    """A merge of a, b and c, with these beside it."""
    folder = tmp_path / "webui/models"
    shutil.copytree(started, folder)
    for path in files:
        shutil.copy(path, folder / "Stable-diffusion")
    return folder


@pytest.fixture
def grid(webui):
    """The script's module after the WebUI has started."""
    webui.load_scripts()
    webui.script_callbacks.before_ui_callback()
    assert webui.errors.reports == []
    return webui.scripts.scripts_data[0].module


def options(grid):
    return [option for option in grid.axis_options if option.label == LABEL]


def job(webui, prompt="a cat"):
    return webui.processing.StableDiffusionProcessingTxt2Img(
        prompt=prompt, seed=3, steps=1, width=64, height=64
    )


def test_the_axis_lists_the_checkpoints_of_all_runs(grid):
    (axis,) = options(grid)
    assert axis.choices() == ["mix/a", "mix/b", "mix/c"]
    assert axis.cost == 1.0
    assert axis.type("mix/a") == "mix/a"


def test_a_plot_draws_with_each_checkpoints_tags(webui, grid, models):
    if webui.lazy:  # it has something selected when it draws
        webui.opts.data["sd_model_checkpoint"] = "a.safetensors"
        webui.sd_models.main_entry.refresh_model_loading_parameters()
    labels, images = grid.plot(job(webui), LABEL, ["mix/a", "mix/b"])
    run = load_run(Folders.under(models), "mix")
    content = run.hyper_model.read_bytes()
    for image, row in zip(images, run.report.checkpoints, strict=False):
        expected = picture(content, f"a cat {run.report.tags(row)}", 3, (64, 64))
        assert image.tobytes() == expected.tobytes()
    assert labels == ["mix/a", "mix/b"]
    assert [path.rpartition("/")[2] for path in webui.processing.loads] == ["mix.safetensors"]


def test_an_unknown_value_is_refused_before_anything_is_drawn(webui, grid):
    for value in ("mix/d", "gone/a", "mix", "../mix/a"):
        with pytest.raises(PictureError, match="expected run/checkpoint"):
            grid.plot(job(webui), LABEL, ["mix/a", value])
    with pytest.raises(PictureError, match='did you mean "mix/a"'):
        grid.plot(job(webui), LABEL, ["mix/aa"])
    assert webui.processing.drawn == []


def test_reload_ui_and_a_second_call_keep_one_axis(webui, grid):
    webui.script_callbacks.before_ui_callback()
    assert len(options(grid)) == 1
    webui.load_scripts()
    webui.script_callbacks.before_ui_callback()
    assert len(options(webui.scripts.scripts_data[0].module)) == 1


@pytest.mark.parametrize("case", ["none", "other", "broken"])
def test_a_webui_without_the_plot_script_still_starts(models, flavour, case, caplog):
    with installed(models, flavour) as webui:
        webui.load_scripts()
        data = webui.scripts.scripts_data
        if case == "none":
            data.clear()
        elif case == "other":
            data[0] = data[0]._replace(module=SimpleNamespace(axis_options=[]))
        else:
            data[0].module.AxisOption = None
        webui.script_callbacks.before_ui_callback()
        reports = "".join(webui.errors.reports)
        assert ("adding an axis to X/Y/Z plot" in reports) is (case == "broken")
        assert "Error executing callback" not in reports
    expected = {
        "none": "has no X/Y/Z plot",
        "other": 'it has no axis "Checkpoint name"',
        "broken": "",
    }
    assert expected[case] in caplog.text
