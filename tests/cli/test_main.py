"""The command line: exit codes, one message on standard error, no traceback unless asked for."""

import gc
import io
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_family import NORM, QUERY, snapshot, temporaries, write

from hyper_merge import __version__
from hyper_merge.cli import main as cli
from hyper_merge.cli.commands import COMMANDS
from hyper_merge.cli.progress_bar import progress_bar
from hyper_merge.errors import InterruptedRun
from hyper_merge.operations.merge import merge

ROOT = Path(__file__).parents[2]
FAST = ["--ranks", "4,2", "--iterations", "2", "--device", "cpu"]


def without_estimate(out):
    """Standard output less the line that says beforehand what a merge will take."""
    return re.sub(r"^\d+ checkpoints; a.* seconds, [\d.]+ [GM]B of memory .* of disk\n", "", out)


@pytest.fixture
def run(capsys):
    """Runs a command; exit code, standard output, the message on standard error."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, [line.strip() for line in err.splitlines()]

    return run


def options(models, output, **settings):
    """Options of a merge."""
    words = ["--name", "mix", "--models", *models, "--output", output, *FAST]
    return words + [word for key, value in settings.items() for word in (f"--{key}", value)]


def test_a_recipe_file_is_merged_and_the_outcome_printed(files, tmp_path, run):
    config = tmp_path / "mix.yaml"
    lines = ["name: mix", "device: cpu", "dtype: float16", "iterations: 2", "ranks: [4, 2]"]
    lines += ["models:", *(f"  - {path}" for path in files), f"output: {tmp_path / 'models'}"]
    config.write_text("\n".join(lines))
    code, out, err = run("merge", config, "--create")
    assert (code, err) == (0, [])
    place = tmp_path / "models"
    # what it will take, before the bar
    assert re.match(r"3 checkpoints; (a few|about \d+) (seconds|minutes), \d+ MB of memory", out)
    assert "\nmix: 3 checkpoints, 2 shared LoRAs\n" in out
    assert f"\nhyper-model: {place / 'Stable-diffusion/mix.safetensors'}\n" in out
    assert f"\nLoRA:        {place / 'Lora/mix_1-2.safetensors'}\n" in out
    assert f"\nmultipliers, manifest and report: {place / 'hyper-merge/mix'}\n" in out
    tags = (place / "hyper-merge/mix/multipliers.txt").read_text().splitlines()[0]
    assert out.endswith(
        f"To get a, load the hyper-model and put this into the prompt:\n{tags[3:]}\n"
    )
    code, out, err = run("merge", "--config", config, "--ranks", "3")  # options win
    assert (code, err) == (0, [])
    assert "Stable-diffusion/mix.safetensors (it was there already)\n" in out
    assert (place / "Lora/mix-2_0-3.safetensors").exists()
    code, _, err = run("merge", config)
    assert code == 2
    assert err[0].startswith("hyper-merge: the run mix is this very merge already; choose another")
    code, _, err = run("merge", config, "--config", config)
    assert code == 2
    assert err == [f"hyper-merge: two recipe files were given: {config} and {config}"]


def test_the_average_alone_is_one_file(files, tmp_path, run):
    code, out, err = run("average", *options(files, tmp_path))
    assert (code, err) == (0, [])
    assert out == f"hyper-model: {tmp_path / 'Stable-diffusion/mix.safetensors'}\n"
    assert [*snapshot(tmp_path)] == ["Stable-diffusion/mix.safetensors"]


@pytest.mark.parametrize("command", ["merge", "average", "plan"])
def test_a_models_folder_that_is_missing_is_not_made(files, tmp_path, run, command):
    words = [command, *options(files, tmp_path / "nosuch")]
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    (message,) = err
    assert message.startswith(
        f"hyper-merge: the models folder {tmp_path / 'nosuch'} does not exist; give --output"
    )
    assert message.endswith("or --create")
    assert not (tmp_path / "nosuch").exists()
    code, _, err = run(*words, "--create")
    assert (code, err) == (0, [])
    assert (tmp_path / "nosuch").is_dir()


def test_extract_makes_a_models_folder_on_request_alone(files, tmp_path, run):
    words = ["extract", files[0], files[1], "--rank", "1", "--output", tmp_path / "nosuch"]
    code, out, err = run(*words)
    assert (code, out, len(err)) == (2, "", 1)
    assert not (tmp_path / "nosuch").exists()
    code, _, err = run(*words, "--create")
    assert (code, err) == (0, [])
    assert len(list((tmp_path / "nosuch/Lora").glob("*.safetensors"))) == 1
    code, _, err = run(*words[:-1], tmp_path / "deep/one.safetensors")
    assert (code, err) == (0, [])


def test_the_help_of_the_average_lists_no_setting_of_loras(capsys):
    with pytest.raises(SystemExit):
        cli.main(["average", "--help"])
    listed = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
    assert listed == {
        *("config", "create", "debug"),
        *("name", "models", "device", "dtype", "weights", "output", "overwrite", "vae"),
        "block_weights",
        "damaged",
    }


def test_inspect_prints_a_table(files, run):
    code, out, err = run("inspect", *files)
    assert (code, err) == (0, [])
    assert out.count("Stable Diffusion 1.x") == 3
    assert "together, with ranks 80, 80, 80 in float16:\n" in out
    code, out, err = run("inspect", files[0], "nowhere.safetensors")
    assert (code, out) == (2, "")
    assert err == ["hyper-merge: nowhere.safetensors does not exist; check the path"]


def test_runs_are_listed_and_deleted_after_a_question(started, run, monkeypatch):
    code, out, err = run("runs", "--output", started)
    assert (code, err) == (0, [])
    expected = (
        r"mix: 20\d\d-\d\d-\d\d, Stable Diffusion 1.x, 3 checkpoints, ranks 4, 2,"
        r" explained \d+% \(mean\), \d+% \(worst\)"
    )
    assert re.match(expected, out)
    before, questions = snapshot(started), []
    for answer in ("n", "", "never"):
        monkeypatch.setattr(
            "builtins.input", lambda text, say=answer: questions.append(text) or say
        )
        code, out, err = run("runs", "delete", "mix", "--output", started)
        assert (code, err) == (
            2,
            ["hyper-merge: the run mix was left as it is; answer y, or give --yes"],
        )
        assert str(started / "Lora/mix_0-4.safetensors") in out.splitlines()
        assert snapshot(started) == before
    assert questions == ["delete these files? [y/N] "] * 3
    monkeypatch.setattr("builtins.input", lambda text: "Y")
    listed = out.splitlines()
    code, out, err = run("runs", "--output", started, "delete", "mix")
    assert (code, err) == (0, [])
    assert out.splitlines() == [*listed, f"deleted {len(listed)} files of the run mix"]
    code, out, err = run("runs", "--output", started)
    assert (code, out, err) == (0, f"no runs in {started / 'hyper-merge'}\n", [])


def test_deleting_needs_yes_as_option_or_answer(started, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, _, err = run("runs", "delete", "mix", "--output", started)
    assert (code, len(err)) == (2, 1)
    code, _, _ = run("runs", "delete", "mix", "--output", started, "--yes")
    assert code == 0
    code, _, err = run("runs", "delete", "mix", "--output", started, "--yes")
    assert (code, err) == (
        2,
        [
            f"hyper-merge: there is no run mix in {started / 'hyper-merge'}; look at the list of runs"
        ],
    )
    code, _, err = run("runs", "delete", "../mix", "--output", started, "--yes")
    assert code == 2
    assert err[0].startswith("hyper-merge: expected the name of a run")


def test_an_unreadable_run_is_a_note(started, run):
    (started / "hyper-merge/bad").mkdir()
    (started / "hyper-merge/bad/manifest.json").write_text("{")
    (started / "Lora/mix_1-2.safetensors").unlink()
    code, out, err = run("runs", "--output", started)
    assert code == 0
    assert err[0].startswith("note: the run bad cannot be read: manifest.json in ")
    assert out.endswith("; missing: mix_1-2.safetensors\n")


BAD = {
    "empty.safetensors": (lambda whole: b"", "{path} is empty; download or copy it again"),
    "cut.safetensors": (lambda whole: whole[:-1000], "{name}"),
    "garbage.safetensors": (lambda whole: b"\xff" * 5000, "{name}"),
    "bad.gguf": (
        lambda whole: b"GGUF",
        "{name} is no GGUF file, or a damaged one: it ends too early;",
    ),
    "bad.ckpt": (
        lambda whole: b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00echoq\x01\x85q\x02Rq\x03.",
        "{name} is ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_refused_by_name(files, tmp_path, run, name):
    path, (content, message) = tmp_path / name, BAD[name]
    path.write_bytes(content(files[1].read_bytes()))
    code, out, err = run("merge", *options([files[0], path], tmp_path / "models"))
    assert (code, without_estimate(out), len(err)) == (2, "", 1)
    assert err[0].startswith("hyper-merge: " + message.format(path=path, name=name)), err
    assert not (tmp_path / "models").exists()


def test_a_file_that_is_none_is_refused_by_name(files, tmp_path, run):
    folder, missing = tmp_path, tmp_path / "no.safetensors"
    code, _, err = run("merge", *options([files[0], missing], tmp_path / "models"))
    assert (code, err) == (2, [f"hyper-merge: {missing} does not exist; check the path"])
    code, _, err = run("merge", *options([files[0], folder], tmp_path / "models"))
    assert code == 2
    assert err[0].startswith(f"hyper-merge: {folder} is a folder, not a checkpoint; choose a ")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_an_unreadable_file_is_refused_by_name(files, tmp_path, state_of, run):
    path = write(tmp_path / "b.safetensors", state_of(1))
    path.chmod(0)
    code, _, err = run("merge", *options([files[0], path], tmp_path / "models"))
    assert code == 2
    assert err == [f"hyper-merge: {path} may not be read: permission denied; check its rights"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": "0"}, "option --ranks: item 1: expected a whole number from 1 to 4096, got the"),
        ({"ranks": "4,-2"}, "option --ranks: item 2: expected a whole number from 1 to 4096, got"),
        ({"ranks": "1.5"}, "option --ranks: item 1: expected a whole number from 1 to 4096, got"),
        ({"ranks": ""}, "option --ranks: expected a list of whole numbers, such as 128, 64"),
        ({"name": "a/b"}, "option --name: the path separator \"/\" is not allowed"),
        ({"name": "a<b"}, "option --name: the character \"<\" is not allowed"),
        ({"dtype": "fp16"}, "option --dtype: expected one of float16, bfloat16, float32, got"),
        ({"weights": "1,2"}, "option --weights: expected 3 numbers, one per checkpoint, got 2"),
    ],
)  # fmt: skip
def test_an_impossible_setting_is_refused(files, tmp_path, run, settings, message):
    code, out, err = run("merge", *options(files, tmp_path / "models", **settings))
    assert (code, without_estimate(out), len(err)) == (2, "", 1)
    assert err[0].startswith("hyper-merge: " + message), err
    assert not (tmp_path / "models").exists()


def test_fewer_than_two_checkpoints_are_refused(files, tmp_path, run):
    code, _, err = run("merge", *options(files[:1], tmp_path))
    assert code == 2
    assert "Fewer than two checkpoints: expected 2 paths or more, got 1" in err[0]


def test_a_yaml_error_is_refused_with_its_line(tmp_path, run):
    config = tmp_path / "mix.yaml"
    config.write_text("name: mix\nmodels: [a.safetensors, b.safetensors\nranks: 4\n")
    code, _, err = run("merge", config)
    assert code == 2
    assert err[0].startswith(f"hyper-merge: {config}, line 3, column ")
    assert "not valid YAML" in err[0]
    config.write_text("name: mix\nmodels: [a.safetensors, b.safetensors]\nrank: 4\n")
    code, _, err = run("merge", config)
    assert code == 2
    assert f'{config}, line 3, key "rank": unknown key; did you mean "ranks"?' in err[0]


def test_nan_is_refused_by_file_and_key(files, tmp_path, state_of, run):
    state = state_of(1)
    state[QUERY] = torch.full_like(state[QUERY], float("nan"))
    spoilt = write(tmp_path / "spoilt.safetensors", state)
    (tmp_path / "models").mkdir()
    code, out, err = run("merge", *options([files[0], spoilt], tmp_path / "models"))
    assert (code, without_estimate(out), len(err)) == (2, "", 1)
    assert err[0].startswith("hyper-merge: spoilt.safetensors holds NaN or infinity in ")
    assert QUERY in err[0]
    assert snapshot(tmp_path / "models") == {}
    assert temporaries(tmp_path) == []


def test_other_refusals_come_by_their_messages(files, tmp_path, state_of, run, monkeypatch):
    lacking = {key: tensor for key, tensor in state_of(1).items() if key != NORM}
    b = write(tmp_path / "b.safetensors", lacking)
    place = tmp_path / "models"
    code, _, err = run("merge", *options([files[0], b], place))
    assert (code, len(err)) == (2, 1)
    assert "b.safetensors lacks 1 of a.safetensors'" in err[0]
    code, _, err = run("merge", *options([files[0], files[0]], place))
    assert (code, err) == (
        2,
        [f"hyper-merge: {files[0]} is given twice; choose every checkpoint once"],
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run("merge", *options(files, place, device="cuda"))
    assert (code, len(err)) == (2, 1)
    assert "device cuda was asked for, but torch finds no CUDA device" in err[0]
    place.write_text("not a folder")
    code, _, err = run("merge", *options(files, place))
    assert (code, len(err)) == (2, 1)
    assert str(place) in err[0]
    assert place.read_text() == "not a folder"


def test_warnings_are_notes_and_told_once(files, tmp_path, run):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files[0].read_bytes())
    models = [files[0], copy]
    code, _, err = run("merge", *options(models, tmp_path, ranks="40", allocation="even"))
    assert code == 0
    assert err[0] == "note: a.safetensors and copy.safetensors have the same content"
    assert err[1].startswith("note: rank 40 is capped in ")
    assert len(err) == 2


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (KeyboardInterrupt(), (130, "stopped; no file was changed")),
        (InterruptedRun("stopped"), (130, "stopped; no file was changed")),
        (ZeroDivisionError("nought"), (1, "unexpected ZeroDivisionError: nought; --debug")),
    ],
    ids=["ctrl-c", "interrupt", "unexpected"],
)
def test_exit_codes_and_one_message(files, tmp_path, run, monkeypatch, error, outcome):
    code, message = outcome

    def fail(*rest, workers):
        raise error

    monkeypatch.setattr(merge, "run_merge", fail)
    exit_code, out, err = run("merge", *options(files, tmp_path))
    assert (exit_code, without_estimate(out), len(err)) == (code, "", 1)
    assert err[0].startswith("hyper-merge: " + message)
    exit_code, _, err = run("merge", *options(files, tmp_path), "--debug")
    assert exit_code == code
    assert err[0] == "Traceback (most recent call last):"
    assert err[-1].startswith("hyper-merge: " + message)


def test_an_error_after_ctrl_c_counts_as_stopped(files, tmp_path, run, monkeypatch):
    def fail(*rest, workers):
        try:
            raise KeyboardInterrupt
        finally:
            raise ZeroDivisionError

    monkeypatch.setattr(merge, "run_merge", fail)
    code, _, err = run("merge", *options(files, tmp_path))
    assert (code, err) == (130, ["hyper-merge: stopped; no file was changed"])


def test_a_terminal_shows_one_bar_and_notes_above(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar() as progress:
        progress.report("reading", 0.0)
        progress.warn("rank 9 is capped")
        progress.warn("rank 9 is capped")
        time.sleep(0.15)  # it is drawn ten times a second at most
        progress.part(0.5, 1.0).report("solving", 0.5)
    drawn = [line.strip() for line in re.split(r"[\r\n]+", terminal.getvalue())]
    assert drawn.count("note: rank 9 is capped") == 1
    assert re.fullmatch(r"solving +75% \|.*\| 00:00, 00:00 left", [d for d in drawn if d][-1])
    assert drawn[-1] == ""  # the bar is wiped out


def test_without_a_terminal_a_line_comes_at_times(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("hyper_merge.cli.progress_bar.SECONDS_BETWEEN_LINES", 5.0)
    with progress_bar() as progress:
        for seconds, fraction in ((0, 0.0), (3, 0.1), (4, 0.2), (1, 0.25), (4, 0.3), (60, 0.5)):
            now[0] += seconds
            progress.report("reading", fraction)
        progress.warn("rank 9 is capped")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "reading: 20%, 00:07 so far, 00:28 left",
        "reading: 30%, 00:12 so far, 00:28 left",
        "reading: 50%, 01:12 so far, 01:12 left",
        "note: rank 9 is capped",
    ]


def test_debug_shows_where_a_refusal_came_from(run):
    code, _, err = run("inspect", "nowhere.safetensors", "--debug")
    assert code == 2
    assert err[0] == "Traceback (most recent call last):"
    assert any("nowhere.safetensors does not exist" in line for line in err)


def test_misuse_of_the_options_is_refused_by_the_usage(capsys):
    for arguments in ([], ["merge", "--unknown", "1"], ["mergee"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert "usage: hyper-merge" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"


# The command with a pass that takes seconds, so that a signal finds it at work.
SLOWLY = """
import sys, time
from hyper_merge.analysis import streaming_pass
from hyper_merge.cli import main as cli, progress_bar
from hyper_merge.cli.commands import COMMANDS
progress_bar.SECONDS_BETWEEN_LINES = 1e9
quick = streaming_pass.analyze_tensor
def slow(*arguments):
    time.sleep(0.1)
    return quick(*arguments)
streaming_pass.analyze_tensor = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def listen_to_sigint():
    """A shell's background job ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def program(*arguments, code=None, **settings):
    source = ["-c", code] if code else ["-m", "hyper_merge"]
    words = [sys.executable, *source, *map(str, arguments)]
    return subprocess.Popen(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **settings,
    )  # fmt: skip


def test_the_program_refuses_with_code_2_in_any_encoding(files, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")  # that of a pipe on Windows
    process = program("merge", *options([files[0], tmp_path / "模.safetensors"], tmp_path))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert out == ""
    path = tmp_path / r"\u6a21.safetensors"
    assert err == f"hyper-merge: {path} does not exist; check the path\n"


@pytest.fixture
def heard_ctrl_c():
    """Has this process hear Ctrl-C, also where the suite is a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Pressing:
    """Presses Ctrl-C where Python loses errors: it prints them, which pytest takes for failures."""

    def while_collected(self, _phase, _info):
        self._press()

    def __del__(self):
        self._press()

    def _press(self):
        signal.raise_signal(signal.SIGINT)


def collect_garbage():
    gc.callbacks.append(press := Pressing().while_collected)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(press)


@pytest.mark.usefixtures("heard_ctrl_c")
@pytest.mark.parametrize("lose_error", [collect_garbage, Pressing])
def test_ctrl_c_ends_work_at_the_next_check_where_its_exception_is_lost(lose_error):
    usual = signal.getsignal(signal.SIGINT)
    with progress_bar() as progress:
        progress.check()
        lose_error()
        with pytest.raises(InterruptedRun):
            progress.check()
    assert signal.getsignal(signal.SIGINT) is usual


@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_ends_work_at_once_and_is_forgotten_afterwards():
    with pytest.raises(KeyboardInterrupt), progress_bar():
        signal.raise_signal(signal.SIGINT)
    with progress_bar() as progress:
        progress.check()


def test_a_thread_can_draw_a_bar_too():
    with ThreadPoolExecutor() as pool:
        pool.submit(_draw).result()


def _draw():
    with progress_bar() as progress:
        progress.report("working", 0.5)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one child")
def test_the_program_undoes_everything_after_ctrl_c(files, started):
    before = snapshot(started)
    words = options(files[:2], started, iterations="10000", tolerance="0")
    process = program("merge", *words, "--overwrite", code=SLOWLY, preexec_fn=listen_to_sigint)
    deadline = time.monotonic() + 240
    while not list((started / "Stable-diffusion").glob(".*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert without_estimate(out) == ""
    assert err == "hyper-merge: stopped; no file was changed\n"
    assert snapshot(started) == before
    assert temporaries(started) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"hyper-merge {command}" in capsys.readouterr().out


HELP_OF_ALL = """
import contextlib, io, sys
from hyper_merge.cli.commands import COMMANDS
from hyper_merge.cli.main import main
for words in ["--version"], ["--help"], *([name, "--help"] for name in COMMANDS):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(words)
    heavy = sorted({"torch", "numpy", "gradio", "fastapi"} & set(sys.modules))
    print(words[0], "wrote" if out.getvalue() else "is silent", *heavy)
"""


def test_help_and_version_import_nothing_heavy():
    process = program(code=HELP_OF_ALL)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    assert out.split("\n") == [f"{word} wrote" for word in ("--version", "--help", *COMMANDS)] + [
        ""
    ]


def test_a_plan_writes_only_the_cache(files, tmp_path, run):
    code, out, err = run(
        "plan", "--name", "mix", "--models", *files, "--output", tmp_path, "--ranks", "4", "2"
    )
    assert (code, err) == (0, [])
    assert "<- asked for" in out
    assert "the average alone" in out
    written = {path.parent.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"cache"}


def test_a_plan_needs_no_name_where_a_merge_does(files, tmp_path, run):
    words = ["--models", *files, "--output", tmp_path, "--ranks", "4", "2"]
    code, out, err = run("plan", *words)
    assert (code, err) == (0, [])
    assert run("plan", "--name", "mix", *words)[1] == out
    recipe = tmp_path / "mix.yaml"
    recipe.write_text("\n".join(["models:", *(f"  - '{path}'" for path in files), "ranks: [4, 2]"]))
    assert run("plan", recipe, "--output", tmp_path) == (0, out, [])
    code, _, err = run("merge", *words)
    assert code == 2
    assert "name" in err[0]
