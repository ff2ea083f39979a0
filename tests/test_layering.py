"""The house keeps its arrows (`design.md` section 3), and importing it changes nothing."""

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
SCREEN = {"api", "hosts", "ui", "app"}
SCREEN_LIBRARIES = {
    "gradio",
    "fastapi",
    "pydantic",
    "modules",
    "modules_forge",
    "launch",
    "matplotlib",
}

# Floors of the house: each may use what is below it and its own; no module may go in a circle.
GROUND = frozenset(
    {"errors", "control", "checkpoints", "decomposition", "recipe", "prompts", "sizes"}
)
TASKS = frozenset(
    {
        "sources",
        "workers",
        "analysis",
        "analysis_cache",
        "analysis_file",
        "effort",
        "lineage",
        "costs",
        "labels",
        "lora",
        "machine",
        "preview",
        "solution",
        "course",
        "pruning",
        "report",
        "assessment",
        "rounding",
        "prospects",
        "private",
        "exact",
        "difference",
        "lora_reader",
        "weighted_sum",
        "weighting",
        "widths",
        "float8",
        "host_rounding",
    }
)
JOBS = frozenset({"preflight", "folders", "settle", "plan", "merge"})
VIEWS = frozenset({"cache_text", "inspection", "demo", "progress", "runs", "synthetic"})
PICTURES = frozenset({"picture_order", "picture_difference", "picture_grid"})
AFTER = frozenset({"comparison", "added", "fit_pass", "fits", "originals", "restoring", "terms"})

# What each part may import of the package besides itself. A part that is not named here is an
# orchestration: it may import anything but what stands above it.
BELOW = {
    **dict.fromkeys(TASKS, GROUND | TASKS),
    **dict.fromkeys(JOBS, GROUND | TASKS | JOBS),
    **dict.fromkeys(VIEWS, GROUND | TASKS | JOBS | VIEWS),
    **dict.fromkeys(AFTER, GROUND | TASKS | JOBS | VIEWS | AFTER | PICTURES),
    "errors": set(),
    **dict.fromkeys(
        ("checkpoints", "decomposition", "recipe", "prompts", "control"), frozenset({"errors"})
    ),
    "workers": set(),
    "sizes": set(),
    "preview": set(),
    "picture_order": {"errors", "control"},
    "picture_difference": set(),
    "picture_grid": {"preview"},
    "labels": {"checkpoints", "prompts", "preview"},
    "lora": {"errors", "checkpoints", "labels", "preview"},
    "lora_reader": {"errors", "checkpoints", "labels", "lora"},
    "weighted_sum": {"checkpoints", "decomposition", "lora", "lora_reader"},
    "cli_parts": {"merge", "report"},
    "progress": {"control"},
    "synthetic": {"errors", "checkpoints", "workers"},
}
ABOVE = {"cli", "cli_after", "__main__"} | SCREEN


def modules():
    """Dotted name and path of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path, name):
    """Dotted names that a module imports, anywhere in its text, in absolute form."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part(module):
    """The part of the house that a dotted name lies in, or None; `recipe_yaml` lies in `recipe`."""
    name = f"{module}.".split(".")[1]
    exists = (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
    if not module.startswith("hyper_merge.") or not exists:
        return None
    if name in BELOW:
        return name
    return next((known for known in BELOW if name.startswith(f"{known}_")), name)


MODULES = modules()
CORE = {name: path for name, path in MODULES.items() if part(name) not in SCREEN}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_stands_below_it(name):
    own = part(name)
    used = {part(imported) for imported in imports(MODULES[name], name)} - {None, own}
    if own in BELOW:
        assert used <= BELOW[own], f"{name} may import only {sorted(BELOW[own])} of the package"
    elif own not in ABOVE:
        assert not used & ABOVE, f"{name} imports what stands above it"


@pytest.mark.parametrize("name", CORE)
def test_the_core_names_no_screen_library(name):
    roots = {imported.split(".")[0] for imported in imports(CORE[name], name)}
    assert not roots & SCREEN_LIBRARIES


@pytest.mark.parametrize("name", [name for name in CORE if part(name) == "decomposition"])
def test_the_mathematics_knows_no_file_format(name):
    roots = {imported.split(".")[0] for imported in imports(CORE[name], name)}
    assert roots - sys.stdlib_module_names <= {"torch", "numpy", "hyper_merge"}


def test_no_module_imports_itself_through_others():
    graph = {name: {imported for imported in reach(name) if imported != name} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def reach(name):
    """The package's modules that `name` imports, as a whole or a name out of them."""
    for imported in imports(MODULES[name], name):
        owner = imported if imported in MODULES else imported.rpartition(".")[0]
        if owner in MODULES and owner != "hyper_merge":
            yield owner


def test_importing_the_core_is_silent_and_loads_no_screen_library(tmp_path):
    program = f"""
import importlib, sys
for name in {sorted(CORE)!r}:
    importlib.import_module(name)
found = sorted({SCREEN_LIBRARIES!r} & set(sys.modules))
assert not found, found
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
