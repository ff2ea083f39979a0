"""The rooms of the package, and which of them each may import."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hyper_merge"

# Room -> the rooms that it builds on. It may import these and all that they build on, nothing else.
ROOMS = {
    "errors": (),
    "runtime": ("errors",),
    "recipe": ("runtime",),
    "cluster": ("runtime",),
    "decomposition": ("errors",),
    "checkpoints": ("runtime",),
    "synthetic": ("checkpoints", "runtime"),
    "loras": ("checkpoints", "decomposition", "runtime"),
    "analysis": ("checkpoints", "decomposition", "recipe", "runtime"),
    "calibration": ("checkpoints", "decomposition", "runtime"),
    "runs": ("loras", "recipe"),
    "solver": ("analysis", "loras"),
    "operations": ("calibration", "runs", "solver", "synthetic"),
    "hosts": ("operations",),
    "api": ("hosts",),
    "ui": ("hosts",),
    "cli": ("api", "cluster", "ui"),
}
SCREENS = {"hosts", "api", "ui", "cli"}
SCREEN_LIBRARIES = {
    "gradio",
    "fastapi",
    "pydantic",
    "modules",
    "modules_forge",
    "launch",
    "matplotlib",
}
CLUSTER_LIBRARIES = {"dask", "distributed"}


def find_modules():
    """Returns the path of every module of the package by its dotted name."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = find_modules()


def imported_names(module):
    """Yields the dotted names that a module imports, anywhere in its text."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(module):
    """Yields the package's modules that a module imports, as a whole or a name out of them."""
    for name in imported_names(module):
        owner = name if name in MODULES else name.rpartition(".")[0]
        if owner in MODULES and owner not in ("hyper_merge", module):
            yield owner


def room_of(module):
    """Returns the room that a dotted name lies in; None for the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def rooms_below(room):
    """Returns all rooms that a room may import."""
    return {room}.union(*(rooms_below(below) for below in ROOMS[room]))


IN_ROOMS = [name for name in MODULES if room_of(name) in ROOMS]
CORE = [name for name in IN_ROOMS if room_of(name) not in SCREENS]


def test_the_root_holds_nothing_but_rooms():
    names = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    rooms = {room if (PACKAGE / room).is_dir() else f"{room}.py" for room in ROOMS}
    assert names == {"__init__.py", "__main__.py", "py.typed", *rooms}


@pytest.mark.parametrize("module", IN_ROOMS)
def test_a_module_imports_only_rooms_below_its_own(module):
    room = room_of(module)
    imported = {room_of(name) for name in imported_modules(module)} - {None}
    assert imported <= rooms_below(room), f"{room} may import only {sorted(rooms_below(room))}"


@pytest.mark.parametrize("module", CORE)
def test_only_screens_and_hosts_import_screen_libraries(module):
    roots = {name.split(".")[0] for name in imported_names(module)}
    assert not roots & SCREEN_LIBRARIES


@pytest.mark.parametrize("module", [name for name in IN_ROOMS if room_of(name) != "cluster"])
def test_only_the_cluster_knows_dask(module):
    roots = {name.split(".")[0] for name in imported_names(module)}
    assert not roots & CLUSTER_LIBRARIES


@pytest.mark.parametrize("module", [name for name in CORE if room_of(name) == "decomposition"])
def test_the_decomposition_imports_only_torch_and_numpy(module):
    roots = {name.split(".")[0] for name in imported_names(module)}
    assert roots - sys.stdlib_module_names <= {"torch", "numpy", "hyper_merge"}


def test_no_module_imports_itself_through_others():
    graph = {module: set(imported_modules(module)) for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def test_importing_the_core_loads_no_screen_library_silently(tmp_path):
    program = f"""
import importlib, sys
for name in {sorted(CORE)!r}:
    importlib.import_module(name)
loaded = sorted({SCREEN_LIBRARIES | CLUSTER_LIBRARIES!r} & set(sys.modules))
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_known_without_loading_anything_heavy():
    program = "import hyper_merge, sys; print('torch' in sys.modules, hyper_merge.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"False \d+\.\d+\.\d+\n", done.stdout)
