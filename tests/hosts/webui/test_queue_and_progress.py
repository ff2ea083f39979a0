"""A turn in the WebUI's queue: its lock, its progress, its stop buttons, its loaded model."""

import os
import threading

import pytest
from at_the_tab import until
from fake_webui import FLAVOURS

from hyper_merge.errors import InterruptedRun

TASK = "task(abc)"


@pytest.fixture(params=FLAVOURS)
def flavour(request):
    return request.param


def load(webui, name="photo.safetensors"):
    """Loads a checkpoint by making a picture with it, and returns the model."""
    info = webui.sd_models.get_closet_checkpoint_match(name)
    webui.opts.data["sd_model_checkpoint"] = info.title
    if not webui.lazy:
        return webui.sd_models.load_model(info)
    webui.sd_models.main_entry.refresh_model_loading_parameters()
    return picture(webui)


def picture(webui):
    """Makes a picture and returns the model that made it."""
    model = webui.sd_models.forge_model_reload()[0] if webui.lazy else webui.shared.sd_model
    if webui.threaded:
        webui.sd_models.manager.load_models_gpu([model])
    return model


def listeners():
    """Returns the threads that look at the WebUI's buttons for a run."""
    return [thread for thread in threading.enumerate() if "buttons" in thread.name]


def overwrite(path, content):
    new = path.with_suffix(".tmp")
    new.write_bytes(content)
    os.replace(new, path)  # noqa: PTH105 - as the writer does


def test_a_run_is_one_host_task_throughout(host, webui):
    with host.running(TASK):
        assert webui.queue_lock.held
        assert webui.state.jobs == [TASK]
        answer = webui.progress.answer(TASK)
        assert answer["active"]
        assert answer["progress"] == 0
    assert not webui.queue_lock.held
    assert webui.state.job == ""
    answer = webui.progress.answer(TASK)
    assert not answer["active"]
    assert answer["completed"]
    assert not webui.progress.pending_tasks


def test_phase_and_fraction_reach_the_hosts_progress_bar(host, webui):
    with host.running(TASK) as progress:
        progress.on_progress("reading the checkpoints", 0.25)
        answer = webui.progress.answer(TASK)
    assert answer["textinfo"] == "reading the checkpoints"
    assert answer["progress"] == pytest.approx(0.25, abs=1e-3)
    assert answer["eta"] >= 0


@pytest.mark.parametrize(("fraction", "expected"), [(-0.1, 0), (0, 0), (1, 1), (1.001, 1)])
def test_the_bar_stays_between_nothing_and_all(host, webui, fraction, expected):
    with host.running(TASK) as progress:
        progress.on_progress("solving", fraction)
        assert webui.progress.answer(TASK)["progress"] == expected


@pytest.mark.parametrize("button", ["interrupt", "skip", "stop_generating", "request_restart"])
def test_each_of_the_hosts_ways_to_stop_works(host, webui, button):
    with host.running(TASK) as progress:
        assert not progress.should_stop()
        getattr(webui.state, button)()
        assert progress.should_stop()
    flags = webui.state.dict()
    assert not any(flags[name] for name in ("interrupted", "skipped", "stopping_generation"))


def test_an_earlier_interrupt_does_not_stop_the_next_job(host, webui):
    webui.state.interrupt()
    with host.running(TASK) as progress:
        assert not progress.should_stop()


def test_a_run_reports_that_it_waits_for_the_host(host, webui):
    entered, left = threading.Event(), threading.Event()

    def run():
        with host.running(TASK):
            entered.set()
            left.wait(60)

    thread = threading.Thread(target=run)
    with webui.queue_lock:
        thread.start()
        until(lambda: TASK in webui.progress.pending_tasks)
        assert not entered.wait(0.1)
        assert webui.progress.answer(TASK)["textinfo"] == "In queue: 1/1"
    assert entered.wait(60)
    assert not webui.queue_lock.acquire(blocking=False)
    left.set()
    thread.join(60)
    assert not webui.queue_lock.held


@pytest.mark.parametrize("error", [InterruptedRun("stopped"), RuntimeError("out of memory")])
def test_an_error_propagates_after_everything_is_put_back(host, webui, error):
    model = load(webui)

    def run():
        with host.running(TASK) as progress:
            progress.on_progress("solving", 0.5)
            webui.state.interrupt()
            raise error

    with pytest.raises(type(error), match=str(error)):
        run()
    assert not webui.queue_lock.held
    assert webui.progress.answer(TASK)["completed"]
    assert not webui.state.interrupted
    assert webui.state.dict()["sampling_steps"] == 0
    assert picture(webui) is model
    assert model.device == "cuda"


def test_the_loaded_model_makes_room_and_comes_back(host, webui):
    model = load(webui)
    with host.running(TASK):
        assert model.device == "cpu"
    assert picture(webui) is model
    assert model.device == "cuda"


def test_models_move_in_their_own_thread_alone(host, webui, monkeypatch):
    load(webui)
    threads = []
    if webui.threaded:
        unload = webui.sd_models.manager.unload_all_models
        monkeypatch.setattr(
            webui.sd_models.manager,
            "unload_all_models",
            lambda: (threads.append(threading.current_thread()), unload()),
        )
    with host.running(TASK):
        pass
    assert len(threads) == len(webui.main_thread.calls) == int(webui.threaded)
    assert threading.current_thread() not in threads


def test_a_run_loads_no_model_where_none_was_loaded(host, webui):
    with host.running(TASK):
        pass
    assert not hasattr(webui.sd_models.model_data.sd_model, "content")


@pytest.mark.parametrize("flavour", ["a1111", "reforge"])  # the others keep one model
def test_all_kept_models_make_room_and_the_current_returns(host, webui):
    first, second = load(webui, "anime.safetensors"), load(webui, "photo.safetensors")
    with host.running(TASK):
        assert (first.device, second.device) == ("cpu", "cpu")
    assert picture(webui) is second
    assert (first.device, second.device) == ("cpu", "cuda")


@pytest.mark.parametrize("restat", [True, False], ids=["other size", "same size"])
def test_a_loaded_checkpoint_that_was_overwritten_is_read_again(host, webui, models, restat):
    load(webui)
    path = models / "Stable-diffusion" / "photo.safetensors"
    new = b"\7" * (32 if restat else 16)
    with host.running(TASK):
        overwrite(path, new)
    model = picture(webui)
    assert model.content == new
    assert model.device == "cuda"
    assert model.filename == str(path)


def test_the_overwritten_checkpoint_stays_selected_though_its_title_changes(host, webui, models):
    load(webui)
    before = webui.opts.data["sd_model_checkpoint"]
    path = models / "Stable-diffusion" / "photo.safetensors"
    with host.running(TASK):
        overwrite(path, b"new")
    assert webui.sd_models.select_checkpoint().filename == str(path)
    if not webui.lazy:
        assert webui.opts.data["sd_model_checkpoint"] != before


def test_another_selection_than_the_loaded_one_stays(host, webui, models):
    load(webui)
    other = str(models / "Stable-diffusion" / "sub" / "portrait.safetensors")
    webui.opts.data["sd_model_checkpoint"] = "sub/portrait.safetensors"
    with host.running(TASK):
        overwrite(models / "Stable-diffusion" / "photo.safetensors", b"new")
    assert webui.sd_models.select_checkpoint().filename == other


@pytest.mark.parametrize("flavour", ["a1111", "reforge"])  # the others keep one model
def test_a_kept_model_of_an_overwritten_file_is_dropped(host, webui, models):
    first, second = load(webui, "anime.safetensors"), load(webui, "photo.safetensors")
    with host.running(TASK):
        overwrite(models / "Stable-diffusion" / "anime.safetensors", b"new")
    assert webui.sd_models.model_data.loaded_sd_models == [second]
    assert first.device == ("cpu" if webui.threaded else "meta")
    assert picture(webui) is second
    assert second.device == "cuda"


def test_a_loaded_checkpoint_whose_file_is_gone_stays_loaded(host, webui, models):
    model = load(webui)
    with host.running(TASK):
        (models / "Stable-diffusion" / "photo.safetensors").unlink()
    assert webui.sd_models.model_data.sd_model is model


def test_a_model_that_cannot_move_is_only_logged(host, webui, monkeypatch):
    model = load(webui)

    def fail(*args):
        raise RuntimeError("the device is gone")

    if webui.threaded:
        monkeypatch.setattr(webui.sd_models.manager, "unload_all_models", fail)
    else:
        monkeypatch.setattr(webui.sd_models, "unload_model_weights", fail)
        monkeypatch.setattr(webui.sd_models, "send_model_to_device", fail)
    done = False
    with host.running(TASK):
        done = True
    assert done
    assert not webui.queue_lock.held
    assert webui.progress.answer(TASK)["completed"]
    assert webui.sd_models.model_data.sd_model is model
    assert "the device is gone" in webui.errors.reports[0]


def test_an_unexpected_error_is_logged_in_full(host, webui):
    def deep():
        raise ValueError("what went wrong")

    try:
        deep()
    except ValueError as error:
        caught = error
    host.log(caught)
    (report,) = webui.errors.reports
    assert "what went wrong" in report
    assert "in deep" in report


def test_a_stop_outlasts_a_reset_of_the_state(host, webui):
    with host.running("task(hyper)") as progress:
        webui.state.interrupt()
        assert progress.should_stop()
        webui.state.interrupted = webui.state.stopping_generation = False
        webui.state.job_count = 0
        assert progress.should_stop()
        progress.on_progress("solving", 0.5)
        assert webui.state.job_count == 1


def test_an_interrupt_between_two_steps_is_noticed(host, webui):
    with host.running("task(hyper)") as progress:
        webui.state.interrupt()
        until(lambda: not listeners())
        webui.state.interrupted = False
        assert progress.should_stop()
    assert not listeners()


@pytest.mark.parametrize("button", ["interrupt", "skip", "stop_generating"])
def test_a_button_pressed_for_a_waiting_generation_spares_the_run(host, webui, button):
    with host.running(TASK) as progress:
        webui.progress.add_task_to_queue("task(picture)")
        getattr(webui.state, button)()
        progress.report("solving", 0.5)
        assert "only Stop in the tab Hyper-Merge ends this" in webui.state.textinfo
        assert not any((webui.state.interrupted, webui.state.skipped))
        webui.progress.pending_tasks.pop("task(picture)")
        getattr(webui.state, button)()
        with pytest.raises(InterruptedRun):
            progress.report("solving", 0.6)


def test_a_button_stops_pictures_though_another_generation_waits(host, webui):
    with host.drawing(TASK) as (progress, _):
        webui.progress.add_task_to_queue("task(picture)")
        webui.state.interrupt()
        with pytest.raises(InterruptedRun):
            progress.report("drawing", 0.5)
    webui.progress.pending_tasks.clear()
