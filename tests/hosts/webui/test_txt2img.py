"""Pictures by the WebUI: its queue, its bar, its buttons, and the checkpoint that it had before."""

import sys
import threading

import pytest
from at_the_tab import until
from fake_webui import FLAVOURS, put
from fake_webui.drawing import picture

from hyper_merge.errors import InterruptedRun, PictureError
from hyper_merge.operations.compare.request import Picture, PictureSettings
from hyper_merge.runtime.progress import Progress

SETTINGS = PictureSettings(("x",), "bad", "Euler a", 4, 6.5, 64, 72, (7,))
KEY = "sd_model_checkpoint"


@pytest.fixture(params=FLAVOURS)
def flavour(request):
    return request.param


@pytest.fixture
def picture_of(models):
    def one(name, prompt="a cat", seed=7):
        return Picture(models / f"Stable-diffusion/{name}.safetensors", prompt, seed, SETTINGS)

    return one


@pytest.fixture
def loaded(webui):
    """The WebUI with `anime` selected and loaded, as after a picture of its own."""
    webui.opts.data[KEY] = "anime.safetensors"
    earlier = webui.processing.StableDiffusionProcessingTxt2Img(prompt="own", steps=1)
    if webui.lazy:
        webui.sd_models.main_entry.refresh_model_loading_parameters()
    webui.processing.process_images(earlier)
    webui.processing.drawn.clear()
    webui.processing.loads.clear()
    return webui


def selected(webui):
    return webui.sd_models.get_closet_checkpoint_match(webui.opts.data[KEY]).name


def loaded_name(webui):
    model = webui.sd_models.model_data.sd_model
    return getattr(model, "filename", "/none").rpartition("/")[2]


def test_a_picture_is_the_webuis_with_that_checkpoint(loaded, host, picture_of):
    put(loaded.models / "Lora/mix.safetensors")
    expected = picture_of("photo", "a cat <lora:mix:1>")
    with host.drawing("task(x)") as (progress, generator):
        image = generator.draw(expected, progress)
    content = expected.model.read_bytes()
    assert image.tobytes() == picture(content, "a cat <lora:mix:1>", 7, (64, 72)).tobytes()
    assert generator.host == host.title


def test_the_console_shows_no_bar_over_all_steps_of_our_job(loaded, host, picture_of):
    bar = loaded.shared.total_tqdm
    bar.shown.clear()
    with host.drawing("task(x)") as (progress, generator):
        progress.report("drawing", 0.5)
        generator.draw(picture_of("photo"), progress)
    assert bar.shown == []
    own = loaded.processing.StableDiffusionProcessingTxt2Img(prompt="own", steps=2)
    loaded.processing.process_images(own)
    assert len(bar.shown) == 2


def test_each_setting_reaches_the_webui_and_nothing_is_saved(loaded, host, picture_of, monkeypatch):
    seen = []
    process = loaded.processing.process_images
    monkeypatch.setattr(
        loaded.processing, "process_images", lambda p: seen.append(vars(p).copy()) or process(p)
    )
    with host.drawing("task(x)") as (progress, generator):
        generator.draw(picture_of("photo"), progress)
    (request,) = seen
    expected = {
        "prompt": "a cat",
        "negative_prompt": "bad",
        "seed": 7,
        "sampler_name": "Euler a",
        "steps": 4,
        "cfg_scale": 6.5,
        "width": 64,
        "height": 72,
        "do_not_save_samples": True,
        "do_not_save_grid": True,
        "batch_size": 1,
        "n_iter": 1,
    }
    assert {name: request[name] for name in expected} == expected
    assert loaded.processing.closed == 1


def test_each_model_loads_once_and_the_previous_returns(loaded, host, picture_of):
    with host.drawing("task(x)") as (progress, generator):
        for name in ("photo", "photo", "sub/portrait", "sub/portrait"):
            generator.draw(picture_of(name), progress)
    loads = [path.rpartition("/")[2] for path in loaded.processing.loads]
    assert loads == ["photo.safetensors", "portrait.safetensors"]
    assert selected(loaded) == loaded_name(loaded) == "anime.safetensors"
    assert loaded.queue_lock.held is False
    assert loaded.errors.reports == []


@pytest.mark.parametrize("kind", ["interrupt", "error", "unknown"])
def test_the_checkpoint_comes_back_however_it_ends(loaded, host, picture_of, kind):
    def draw():
        with host.drawing("task(x)") as (progress, generator):
            generator.draw(picture_of("photo"), progress)
            if kind == "interrupt":
                loaded.processing.on_step = loaded.state.interrupt
            elif kind == "error":
                loaded.processing.fails_with = "portrait.safetensors"
            generator.draw(picture_of("unknown" if kind == "unknown" else "sub/portrait"), progress)

    with pytest.raises(InterruptedRun if kind == "interrupt" else PictureError):
        draw()
    assert selected(loaded) == loaded_name(loaded) == "anime.safetensors"
    assert loaded.queue_lock.held is False
    assert loaded.state.interrupted is False
    assert loaded.progress.current_task is None


def test_a_model_thread_error_is_not_an_empty_picture(loaded, host, picture_of):
    loaded.processing.fails_with = "photo.safetensors"
    expected = r"cannot draw with photo\.safetensors \(cannot load photo"
    with (
        host.drawing("task(x)") as (progress, generator),
        pytest.raises(PictureError, match=expected),
    ):
        generator.draw(picture_of("photo"), progress)
    assert "RuntimeError" in loaded.errors.reports[0]


def test_models_are_touched_in_their_thread_alone(loaded, host, picture_of):
    with host.drawing("task(x)") as (progress, generator):
        generator.draw(picture_of("photo"), progress)
    ((*_, thread),) = loaded.processing.drawn
    assert (thread == threading.current_thread().name) is not loaded.threaded


def test_a_checkpoint_selected_meanwhile_stays_selected(loaded, host, picture_of):
    with host.drawing("task(x)") as (progress, generator):
        generator.draw(picture_of("photo"), progress)
        loaded.opts.data[KEY] = "sub/portrait.safetensors"
        generator.draw(picture_of("photo"), progress)
    assert selected(loaded) == "sub/portrait.safetensors"
    assert loaded_name(loaded) == "portrait.safetensors"


def test_a_webui_without_a_model_gets_its_selection_back(webui, host, picture_of):
    webui.opts.data[KEY] = "anime.safetensors"
    with host.drawing("task(x)") as (progress, generator):
        generator.draw(picture_of("photo"), progress)
    assert selected(webui) == "anime.safetensors"
    assert webui.processing.loads[-1].endswith("photo.safetensors")


def test_the_bar_moves_and_the_page_sees_the_task(loaded, host, picture_of):
    with host.drawing("task(x)") as (progress, generator):
        assert loaded.progress.answer("task(x)")["active"] is True
        progress.on_progress("picture 1 of 2", 0.25)
        before = loaded.progress.answer("task(x)")["progress"]
        generator.draw(picture_of("photo"), progress)
        answer = loaded.progress.answer("task(x)")
    assert before == pytest.approx(0.25, abs=0.002)
    assert answer["progress"] == pytest.approx(0.25, abs=0.005)
    assert answer["textinfo"] == "picture 1 of 2"
    assert loaded.progress.answer("task(x)")["completed"] is True


def test_a_pictures_progress_is_reported_while_drawing(loaded, host, picture_of):
    fractions, state = [], loaded.state
    loaded.processing.on_step = lambda: until(lambda: fractions or state.sampling_step == 0)
    with host.drawing("task(x)") as (progress, generator):
        job = Progress(lambda phase, fraction: fractions.append(fraction), progress.should_stop)
        generator.draw(picture_of("photo"), job)
    assert fractions == sorted(fractions)
    assert 0 < max(fractions) < 1


def test_our_own_stop_presses_the_webuis_interrupt(loaded, host, picture_of):
    stop, steps = threading.Event(), []

    def on_step():
        steps.append(loaded.state.sampling_step)
        stop.set()
        until(lambda: loaded.state.interrupted)

    loaded.processing.on_step = on_step
    job = Progress(should_stop=stop.is_set)
    slow = Picture(picture_of("photo").model, "x", 1, PictureSettings(("x",), "", "DDIM", 150))
    with pytest.raises(InterruptedRun), host.drawing("task(x)") as (progress, generator):
        generator.draw(slow, progress.joined(job))
    assert steps == [0]
    assert loaded_name(loaded) == "anime.safetensors"


def test_pictures_wait_for_their_turn_in_the_queue(loaded, host, picture_of):
    done = threading.Event()

    def draw():
        with host.drawing("task(x)") as (progress, generator):
            generator.draw(picture_of("photo"), progress)
        done.set()

    with loaded.queue_lock:
        thread = threading.Thread(target=draw)
        thread.start()
        assert not done.wait(0.1)
        assert loaded.progress.answer("task(x)")["queued"] is True
        assert loaded.processing.drawn == []
    thread.join(60)
    assert done.is_set()


def test_an_unlisted_checkpoint_is_refused_by_name(loaded, host, picture_of, models):
    with host.drawing("task(x)") as (_, generator):
        assert generator.refusal(picture_of("photo").model) == ""
        other = models / "Stable-diffusion/other.safetensors"
        assert "has no other.safetensors" in generator.refusal(other)
        put(other)  # as the command line writes one
        assert generator.refusal(other) == ""


def test_a_picture_without_its_loras_is_an_error(loaded, host, picture_of):
    expected = r"without all LoRAs \(it did not load gone\)"
    with host.drawing("task(x)") as (progress, generator):
        with pytest.raises(PictureError, match=expected):
            generator.draw(picture_of("photo", "x <lora:gone:1>"), progress)
        loaded.processing.complaints = {"Networks with errors: mix (3)": 1, "Clip skip": 1}
        with pytest.raises(PictureError, match=r"without all LoRAs \(Networks with errors: mix"):
            generator.draw(picture_of("photo", "x"), progress)


def test_a_webui_without_the_extension_lora_draws_no_pair(loaded, host, picture_of, monkeypatch):
    monkeypatch.delitem(sys.modules, "networks")
    put(loaded.models / "Lora/mix.safetensors")
    with host.drawing("task(x)") as (progress, generator):
        assert generator.draw(picture_of("photo", "x"), progress)
        with pytest.raises(PictureError, match="did not load mix"):
            generator.draw(picture_of("photo", "x <lora:mix:1>"), progress)


def test_the_selected_checkpoint_draws_before_any_model_is_loaded(webui, host, picture_of):
    webui.opts.data[KEY] = "photo.safetensors"
    with host.drawing("task(x)") as (progress, generator):
        assert generator.draw(picture_of("photo"), progress)
    assert selected(webui) == "photo.safetensors"


def test_the_samplers_are_those_of_the_webuis_menu(host):
    assert host.generator_info().samplers == ("DPM++ 2M", "Euler a", "DDIM")
    assert host.generator_info().problem == ""
