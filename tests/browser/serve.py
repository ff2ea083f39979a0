"""Serves the real tab for the browser tests: as the app, or inside of a faked WebUI.

Run as a program: `serve.py HOST MODELS PORT`, HOST being standalone, a1111 or forge. As long as there
is a file "slowly" beside the models folder runs take their time and do not end, so that there is something
to watch.
"""

import logging
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACE = 0.1  # seconds that a step takes at least, if it is to be watched: a merge has two hundred
FAR = 0.5  # fraction of a run at which it waits until it is stopped or watched no more
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fake_webui  # noqa: E402
import pytest  # noqa: E402
from fake_webui.styles import PromptStyle  # noqa: E402
from local_server import skip_self_check  # noqa: E402

from hyper_merge.cli.app import Listening, build_app, serve  # noqa: E402
from hyper_merge.decomposition.initialization import SearchEffort  # noqa: E402
from hyper_merge.hosts.job_queue import Job  # noqa: E402
from hyper_merge.runtime.progress import Progress  # noqa: E402
from hyper_merge.solver import solve  # noqa: E402


def slow_down(flag: Path) -> None:
    """Makes every step of a run take a while as long as there is this file, and none come to its end.

    So a busy machine has all the time that it needs to show the run and to stop it.
    """
    step, move, reached = Progress.report, Job._on_progress, threading.local()

    def on_progress(job: Job, phase: str, fraction: float) -> None:
        reached.fraction = fraction  # of the whole run; a report has that of its part
        move(job, phase, fraction)

    def slow(progress: Progress, phase: str, fraction: float) -> None:
        if flag.exists():
            time.sleep(PACE)
        step(progress, phase, fraction)
        while getattr(reached, "fraction", 0.0) > FAR and flag.exists():
            time.sleep(PACE)
            progress.check()

    Progress.report, Job._on_progress = slow, on_progress


def serve_webui(models: Path, flavour: str, port: int) -> None:
    """Serves a faked WebUI with our script in it, until the process is ended."""
    with fake_webui.installed(models, flavour) as webui:
        webui.processing.pace = 0.01  # of a picture's step, for the same reason
        webui.prompt_styles.styles["mine"] = PromptStyle("mine", "{prompt}, ink drawing", "")
        webui.load_scripts()
        webui.launch(port)
        threading.Event().wait()


def main() -> None:
    host, models, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    logging.basicConfig(level=logging.WARNING)
    skip_self_check(pytest.MonkeyPatch())
    slow_down(models.parent / "slowly")
    solve.DEFAULT_EFFORT = SearchEffort.QUICK  # a screen has no setting for it
    if host == "standalone":
        serve(build_app(models), Listening(port=port))
    else:
        serve_webui(models, host, port)


if __name__ == "__main__":
    main()
