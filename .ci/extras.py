"""Resolves every combination of the extras, without and with constraints, and starts the program by them.

    python .ci/extras.py ENVIRONMENT    # a virtual environment with torch and uv, which is changed

What an install would take is found from the packages' metadata: nothing is downloaded, and so not the CUDA
libraries of a plain torch. A resolution waits for the registry most of its time, so several go on side by
side. The versions of each combination are put into the environment meanwhile, whose torch stays, and the
command line, the app, the pipelines of the tab Compare and dask are started, as far as they belong to it. A
combination that only adds packages to one that has started is not started again.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple

import tomllib

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TESTED = "3.11"  # that of the environment
UNPINNED = "3.10"  # too old for constraints.txt
RUNTIME = ("app", "pictures", "cluster")
# What the environment has of its own, and the libraries that torch's build for GPUs brings.
KEPT = re.compile(r"(torch|triton|nvidia[-\w]*|cuda[-\w]*|uv|pip)==")
LINE = re.compile(r"pip install (-c constraints\.txt )?-e ['\"]?\.(?:\[([\w,]+)\])?")
SECONDS = 600  # in which the app is up, or never: tests may go on beside it
AT_ONCE = 4  # resolutions

Extras = tuple[str, ...]
Versions = frozenset[str]  # lines such as "numpy==2.4.6"


class Resolution(NamedTuple):
    """What is asked of the resolver."""

    extras: Extras
    constraints: Path
    python: str
    options: tuple[str, ...] = ()


def main() -> None:
    """Prints what was resolved and started; ends with an error at the first that fails."""
    environment = Path(sys.argv[1])
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = tuple(table["optional-dependencies"])
    check_documented_lines(names)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        pins = Path(folder) / "torch.txt"
        pins.write_text(next(line for line in lines_of(CONSTRAINTS) if line.startswith("torch==")))
        versions = {one: pool.submit(resolve, environment, one) for one in resolutions(names, pins)}
        try:
            started = start_each(environment, versions, Path(folder))
            for future in versions.values():
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    print(
        f"{len(versions)} resolutions of the combinations of {', '.join(names)}; {started} were"
        f" started; {time.monotonic() - began:.0f} s"
    )


def resolutions(names: Extras, pins: Path) -> list[Resolution]:
    """Returns each resolution once: first those that are started, every combination on the tested Python."""
    sizes = range(len(names) + 1)
    extras = list(chain.from_iterable(combinations(names, size) for size in sizes))
    found = [Resolution(some, file, TESTED) for file in (pins, CONSTRAINTS) for some in extras]
    for python in PYTHONS:
        for some in ((), *((name,) for name in names), RUNTIME, names):
            found += [
                Resolution(some, pins, python),
                Resolution(some, pins, python, ("--python-platform", "windows")),
            ]
            if python != UNPINNED:
                found.append(Resolution(some, CONSTRAINTS, python))
    return list(dict.fromkeys(found))


def start_each(
    environment: Path, versions: dict[Resolution, Future[Versions]], folder: Path
) -> int:
    """Starts the program by every combination that may differ; returns how many that were."""
    started: list[tuple[Extras, Versions]] = []
    for one, future in versions.items():
        if one.python != TESTED or one.options:
            continue
        runtime = tuple(name for name in one.extras if name in RUNTIME)
        packages = future.result()
        if not any(runtime == other and packages >= less for other, less in started):
            start(environment, runtime, packages, folder)
            started.append((runtime, packages))
    return len(started)


def check_documented_lines(names: Extras) -> None:
    """Returns if every line of the documentation that installs names extras that are there."""
    texts = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "hyper_merge").rglob("*.py"),
    ]
    found = [line for path in texts for line in LINE.findall(path.read_text(encoding="utf-8"))]
    unknown = {name for _, some in found for name in some.split(",") if name} - set(names)
    if unknown or not found:
        sys.exit(f"expected lines that install some of {names}, found {found}")
    print(f"{len(found)} documented installs: {sorted({some or '-' for _, some in found})}")


def lines_of(path: Path) -> list[str]:
    """Returns the lines of a file."""
    return path.read_text(encoding="utf-8").splitlines()


def resolve(environment: Path, one: Resolution) -> Versions:
    """Returns the versions that an install into an empty environment takes."""
    words = [f"--extra={name}" for name in one.extras]
    words += ["-c", str(one.constraints), "--python-version", one.python, *one.options]
    text = run(
        environment, "compile", "-q", "--no-header", "--no-annotate", *words, "pyproject.toml"
    )
    found = (line.split(";")[0].strip() for line in text.splitlines())
    versions = frozenset(line for line in found if line and not KEPT.match(line))
    if one.constraints == CONSTRAINTS:
        loose = {canonical(line) for line in versions} - {
            canonical(line) for line in lines_of(CONSTRAINTS)
        }
        if loose:
            sys.exit(
                f"constraints.txt lacks what {one.extras} takes on Python {one.python}: {sorted(loose)}"
            )
    return versions


def canonical(requirement: str) -> str:
    """Returns a requirement with its package's name in its one spelling."""
    name, _, version = requirement.partition("==")
    return re.sub(r"[-_.]+", "-", name).lower() + "==" + version


def start(environment: Path, extras: Extras, versions: Versions, folder: Path) -> None:
    """Puts versions into the environment, and starts what they are for."""
    began = time.monotonic()
    installed = run(environment, "freeze").splitlines()
    kept = [line for line in installed if KEPT.match(line)]
    (folder / "all.txt").write_text("\n".join([*versions, *kept]))
    run(environment, "sync", "-q", str(folder / "all.txt"))
    python = environment / "bin/python"
    program = [python, "-m", "hyper_merge"]
    subprocess.run([*program, "inspect", "--help"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    modules = ["hyper_merge.operations.merge.merge", "hyper_merge.operations.fit.fit"]
    if "pictures" in extras:
        modules += ["transformers", "peft", "accelerate", "diffusers.pipelines.stable_diffusion_xl"]
    if "cluster" in extras:
        modules += ["bokeh", "distributed"]
    imports = f"import {', '.join(modules)}"
    if "cluster" in extras:
        imports += "; distributed.Security.temporary()"
    if "pictures" in extras:
        imports += "; from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline"
    subprocess.run([python, "-c", imports], check=True, cwd=ROOT)
    if "app" in extras:
        load_page([*program, "app", folder / "models", "--api"])
    print(
        f"started {list(extras) or 'alone'}: {len(versions)} packages, {time.monotonic() - began:.0f} s"
    )


def load_page(program: list[str | Path]) -> None:
    """Starts the app, and loads its page and the description of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = subprocess.Popen([*program, "--port", str(port)], cwd=ROOT)
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                texts = [read(f"http://127.0.0.1:{port}{page}") for page in ("/", "/openapi.json")]
                break
            except OSError:
                if app.poll() is not None or time.monotonic() > deadline:
                    sys.exit("the app did not start")
                time.sleep(0.3)
    finally:
        app.terminate()
        app.wait()
    if "hyper_merge_merge" not in texts[0] or "/hyper-merge/plan" not in texts[1]:
        sys.exit("the app's page or API is not what it should be")


def read(address: str) -> str:
    """Returns the text at an address."""
    with urllib.request.urlopen(address, timeout=30) as answer:
        return str(answer.read().decode())


def run(environment: Path, *words: str) -> str:
    """Returns what `uv pip` prints."""
    command = [environment / "bin/uv", "pip", words[0], "--python", environment / "bin/python"]
    done = subprocess.run(
        [*command, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"uv pip {' '.join(words)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
