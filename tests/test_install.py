"""install.py against a faked WebUI."""

import importlib.util
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

INSTALL = Path(__file__).parent.parent / "install.py"


@pytest.fixture
def commands(monkeypatch):
    """The installations that the faked WebUI was asked for."""
    installs = []
    launch = types.ModuleType("launch")
    launch.run_pip = lambda command, desc=None: installs.append((command, desc))
    monkeypatch.setitem(sys.modules, "launch", launch)
    return installs


def run_without(monkeypatch, *missing):
    find_spec = importlib.util.find_spec

    def pretend(name, package=None):
        return None if name in missing else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", pretend)
    runpy.run_path(str(INSTALL), run_name="__main__")


def test_nothing_is_installed_or_printed_when_all_is_there(monkeypatch, commands, capsys):
    run_without(monkeypatch)
    assert commands == []
    assert capsys.readouterr() == ("", "")


def test_only_the_missing_ones_are_installed(monkeypatch, commands):
    run_without(monkeypatch, "tqdm")
    assert commands == [('install "tqdm>=4.65"', "requirements of Hyper-Merge")]


def test_several_are_installed_with_one_command(monkeypatch, commands):
    run_without(monkeypatch, "yaml", "tqdm")
    assert [command for command, _ in commands] == ['install "pyyaml>=6" "tqdm>=4.65"']


@pytest.mark.parametrize("pinned", ["torch", "numpy", "PIL"])
def test_a_package_pinned_by_the_host_is_never_installed(pinned, monkeypatch, commands, capsys):
    run_without(monkeypatch, pinned)
    assert commands == []
    assert f"expected {pinned} in the WebUI's environment" in capsys.readouterr().out


def test_outside_of_the_webui_the_command_is_shown(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "launch", None)
    run_without(monkeypatch, "yaml")
    assert 'python -m pip install "pyyaml>=6"' in capsys.readouterr().out


def test_the_installer_runs_from_another_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(INSTALL)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
