"""Serves the real tab for the browser tests: as the app, or inside of a faked WebUI.

Run as a program: `serve.py HOST MODELS PORT PACE`, HOST being standalone, a1111 or forge. PACE is the
time in seconds that every step of a run is made to take at least, so that there is something to watch.
"""

import logging
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hyper_merge.app import Listening, build_app, serve  # noqa: E402
from hyper_merge.control import Control  # noqa: E402


def slow_down(pace: float) -> None:
    """Makes every step of a run take at least this many seconds."""
    step = Control.step

    def slow(control: Control, phase: str, fraction: float) -> None:
        time.sleep(pace)
        step(control, phase, fraction)

    Control.step = slow


def main() -> None:
    host, models, port, pace = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    logging.basicConfig(level=logging.WARNING)
    slow_down(pace)
    if host == "standalone":
        page = build_app(models)
    else:
        from browser.webui_page import build_page

        page = build_page(models, host)
    serve(page, Listening(port=port), block=True)


if __name__ == "__main__":
    main()
