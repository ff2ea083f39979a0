"""The built tab: widgets are ours and in order, and each handler fits what it is wired to."""

import inspect
import logging
import re
from dataclasses import fields, is_dataclass
from types import GeneratorType

import gradio as gr
import pytest
from at_the_tab import ended, values, words
from fake_webui import EXTENSION, installed

from hyper_merge.hosts.job_queue import BusyError, process_jobs
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.ui.element_ids import PREFIX
from hyper_merge.ui.form import Form
from hyper_merge.ui.handlers import history
from hyper_merge.ui.panels.history import build_history
from hyper_merge.ui.panels.loras import build_loras
from hyper_merge.ui.panels.picker import build_picker
from hyper_merge.ui.panels.result import build_result
from hyper_merge.ui.panels.run import build_run
from hyper_merge.ui.panels.settings import FormWidgets, build_form
from hyper_merge.ui.panels.use import build_use
from hyper_merge.ui.panels.widgets import in_order
from hyper_merge.ui.saved_form import default_form
from hyper_merge.ui.tab import build_tab, list_devices

UNEXPECTED = "Unexpected error; see the log for details: MemoryError: no room for a table"
FAILING = {
    "show_plan",
    "start_merge",
    "start_forecast",
    "list_earlier_runs",
    "show_run",
    "copy_settings",
    "show_side_by_side",
    "ask_to_delete_run",
    "save_run_styles",
}
ARGUMENTS = {
    "show_plan": ["", *values()],
    "start_forecast": values(),
    "show_side_by_side": ["mix", "other"],
}


class Busy:
    """Jobs that begin none."""

    last, known = None, ()

    def require_idle(self):
        """Requires that nothing runs."""

    def start(self, title, work, log, place="merge"):
        raise BusyError(f"{title} is not begun here")


@pytest.fixture(params=["app", "empty", "a1111", "forge"])
def some_host(request, root, tmp_path):
    """Each kind of host, one of them without any checkpoint."""
    if request.param in {"app", "empty"}:
        yield Standalone(root if request.param == "app" else tmp_path / "empty")
    else:
        with installed(root, request.param) as webui:
            yield webui.host()


@pytest.fixture
def built(some_host):
    """All panels."""
    with gr.Blocks():
        picker = build_picker(some_host.folders().models, demo=True)
        preset, form, presets, size = build_form(some_host, picker.checkpoints, list_devices())
        result = build_result(some_host)
        with gr.Tab("Use", elem_id=f"{PREFIX}_use_tab") as opened:
            use = build_use(some_host, opened)
        parts = (use.listed, use.outcomes, use.mix, use.fit, use.more)
        with gr.Tab("LoRAs", elem_id=f"{PREFIX}_loras_tab") as opened:
            loras = build_loras(opened)
        others = preset, size, build_run(), result, result.view, build_history(opened), use
        others = (*others, loras, loras.form, *parts)
    return picker, form, presets, *others


def functions(page):
    """Returns every event's function, inputs and outputs, in both gradio versions."""
    events = page.fns.values() if isinstance(page.fns, dict) else page.fns
    return [(event.fn, event.inputs, event.outputs) for event in events if event.fn is not None]


def settings(page):
    """Returns every event's settings, as a browser has them."""
    return page.get_config_file()["dependencies"]


def name_of(fn):
    fn = inspect.unwrap(fn)
    return getattr(fn, "func", fn).__name__


def fill(fn, inputs, outputs):
    """Calls an event's function with what its widgets hold, and looks at what it gives."""
    arguments = [getattr(widget, "value", None) for widget in inputs]
    inspect.signature(fn).bind(*arguments)
    answer = fn(*arguments)
    if isinstance(answer, GeneratorType):
        answer = next(answer)
    many = answer if isinstance(answer, tuple) else (answer,)
    assert len(many if outputs or answer is not None else ()) == len(outputs), name_of(fn)


@pytest.fixture
def strict(monkeypatch):
    """Makes handlers whose errors come out."""

    def raise_it(self, error):
        raise error

    monkeypatch.setattr(Standalone, "log", raise_it)


def test_the_forms_widgets_are_the_forms_fields_in_order():
    widgets = [field.name for field in fields(FormWidgets)]
    assert widgets == [field.name for field in fields(Form)]


def test_each_widget_of_the_form_is_in_its_place(built):
    _, form, *_ = built
    labels = [widget.elem_id.removeprefix(f"{PREFIX}_") for widget in in_order(form)]
    assert labels == [field.name for field in fields(Form)]


def test_every_widget_has_our_id_and_is_unsaved(built):
    picker, form, presets, *others = built
    widgets = [w for panel in (picker, form, *others) for w in in_order(panel)] + presets
    widgets = [widget for widget in widgets if not is_dataclass(widget)]
    for widget in widgets:
        assert re.fullmatch(f"{PREFIX}_[a-z0-9_]+", widget.elem_id)
        if not isinstance(widget, gr.Accordion | gr.Column | gr.Tab):
            assert widget.do_not_save_to_config is True


def test_all_ids_are_ours_and_unique(some_host):
    page = build_tab(some_host, Busy())
    ids = [block.elem_id for block in page.blocks.values() if getattr(block, "elem_id", None)]
    assert len(set(ids)) == len(ids)
    assert all(name.startswith(f"{PREFIX}_") for name in ids)


def test_the_default_form_is_that_of_a_page(some_host, built):
    _, form, *_ = built
    page = [widget.value for widget in in_order(form)]
    assert page == list(default_form(some_host).widget_values())


def test_every_field_of_the_form_is_labelled(built):
    _, form, *_ = built
    assert all(widget.label for widget in in_order(form))


def test_each_word_for_ranks_has_a_button(built):
    assert [button.value for button in built[2]] == ["Small", "Medium", "Large"]


def test_panels_of_pictures_are_shown_where_txt2img_exists(some_host, built):
    _, form, _, _, _, _, result, *_ = built
    *_, mix, fit, _ = built
    sends = (result.send, mix.send, fit.send, fit.save_style)
    for widget in (form.save_styles, *sends, result.save_styles, result.remove_styles):
        assert widget.visible is some_host.has_txt2img
    assert form.save_styles.value is some_host.has_txt2img


def test_every_handler_fits_its_wiring(root, run, strict):
    page = build_tab(Standalone(root), Busy())
    checked = set()
    for fn, inputs, outputs in functions(page):
        fill(fn, inputs, outputs)
        checked.add(name_of(fn))
    assert {
        "show_plan",
        "start_merge",
        "watch_job_in_both_tabs",
        "show_merge_result",
        "show_run",
        "copy_settings",
        "delete_confirmed_run",
    } <= checked
    assert len(checked) >= 20


def test_every_handler_fits_in_the_webui_too(webui, run):
    for fn, inputs, outputs in functions(build_tab(webui.host(), Busy())):
        fill(fn, inputs, outputs)
    assert webui.errors.reports == []


def test_unexpected_errors_show_a_line_and_are_logged(root, run, caplog):
    def fail(*arguments):
        raise MemoryError("no room for a table\nof many rows")

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr("hyper_merge.ui.handlers.picker.preflight_form", fail)
        patch.setattr("hyper_merge.ui.handlers.forecast.preflight_form", fail)
        for name in ("list_all_runs", "load_any_run", "load_run", "files_of"):
            patch.setattr(history, name, fail)
        patch.setattr("hyper_merge.ui.handlers.merge.prepare_merge", fail)
        patch.setattr("hyper_merge.ui.handlers.result.load_run", fail)
        page = build_tab(Standalone(root), Busy())
        for fn, inputs, outputs in functions(page):
            if name_of(fn) in FAILING:
                results = fn(*ARGUMENTS.get(name_of(fn), [widget.value for widget in inputs]))
                results = results if isinstance(results, tuple) else (results,)
                assert len(results) == len(outputs)
                texts = [text for text in results if isinstance(text, str)]
                assert [words(text) for text in texts] == [UNEXPECTED], name_of(fn)
    assert caplog.text.count("of many rows") >= len(FAILING)


def test_a_run_fills_all_its_widgets(root, run):
    ((fn, outputs),) = [
        (fn, outputs)
        for fn, _, outputs in functions(build_tab(Standalone(root), Busy()))
        if name_of(fn) == "show_run"
    ]
    values = fn("mix")
    assert len(values) == len(outputs)
    by_id = {widget.elem_id: value for widget, value in zip(outputs, values, strict=True)}
    assert by_id[f"{PREFIX}_shown_run"] == "mix"
    assert by_id[f"{PREFIX}_prompt"].startswith("<lora:mix_0-4:")
    assert "<table>" in by_id[f"{PREFIX}_result_table"]
    assert by_id[f"{PREFIX}_result"]["visible"] is True


def test_copied_settings_reach_the_widgets_of_their_names(root, run):
    (fn, outputs), _ = [  # another size; copy its settings
        (fn, outputs)
        for fn, _, outputs in functions(build_tab(Standalone(root), Busy()))
        if name_of(fn) == "copy_settings"
    ]
    by_id = {widget.elem_id: value for widget, value in zip(outputs, fn("mix"), strict=True)}
    assert by_id[f"{PREFIX}_name"] == "mix"
    assert by_id[f"{PREFIX}_ranks"] == "4, 2"
    assert by_id[f"{PREFIX}_iterations"] == 3
    assert "were copied to the form" in by_id[f"{PREFIX}_form_note"]


def test_no_event_has_a_spinner_or_public_name(some_host):
    for event in settings(build_tab(some_host, Busy())):
        assert event["api_name"] is False
        assert event["show_progress"] == "hidden"


def test_only_what_follows_a_job_waits_in_gradios_queue(root):
    page = build_tab(Standalone(root), Busy())
    queued = [
        name_of(fn)
        for (fn, *_), event in zip(
            functions(page), [event for event in settings(page) if event["backend_fn"]], strict=True
        )
        if event["queue"] is not False
    ]
    assert set(queued) == {"watch_job_in_both_tabs", "watch_comparison", "watch_lora_job"}


def test_the_scripts_export_every_called_function(some_host):
    called, exported = set(), set()
    for event in settings(build_tab(some_host, Busy())):
        called |= set(re.findall(r"(hyperMerge\w*)\.(\w+)", str(event["js"])))
    for path in (EXTENSION / "javascript").glob("*.js"):
        script = path.read_text(encoding="utf-8")
        if owner := re.search(r"window\.(\w+) = ", script):
            names = re.search(r"return \{([^}]*)\};\s*\}\)\(\)", script)[1]
            exported |= {(owner[1], name) for name in re.findall(r"\w+", names)}
        for taken, other in re.findall(r"const \{([^}]*)\} = window\.(\w+);", script):
            called |= {(other, name) for name in re.findall(r"(\w+)(?:: \w+)?", taken)}
    assert called == exported


def test_a_job_survives_reload_ui(webui, monkeypatch):
    webui.load_scripts()
    webui.create_ui()
    process_jobs()._known.clear()
    job = process_jobs().start("mix", lambda task, progress: "", webui.host().log)
    ended(process_jobs())
    webui.load_scripts()
    page = webui.create_ui()
    watched = [
        inspect.unwrap(fn).args[0]
        for fn, _, _ in functions(page)
        if name_of(fn) == "watch_job_in_both_tabs"
    ]
    assert watched
    assert all(jobs.last is job for jobs in watched)
    assert webui.errors.reports == []


def test_devices_are_auto_cpu_and_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert list_devices() == ["auto", "cpu", "cuda:0", "cuda:1"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert list_devices() == ["auto", "cpu"]
