"""The extras of `pyproject.toml`: they fit together, and leave out versions that break the app."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info < (3, 11):
    pytest.skip("tomllib came with Python 3.11", allow_module_level=True)

import tomllib

ROOT = Path(__file__).parent.parent
BREAKING = [
    ("app", "huggingface_hub", "1.0.0"),  # without HfFolder, which gradio 4 imports
    ("app", "pydantic", "2.11.0"),
    ("app", "fastapi", "0.116.0"),
    ("app", "gradio", "5.0.0"),
    ("pictures", "diffusers", "0.40.0"),  # these two need huggingface_hub 1.0
    ("pictures", "transformers", "5.0.0"),
    ("test", "diffusers", "0.40.0"),
    ("test", "transformers", "5.0.0"),
]


def extras():
    """Requirements by extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parsed = {
        name: [Requirement(line) for line in lines]
        for name, lines in project["optional-dependencies"].items()
    }
    return {"": [Requirement(line) for line in project["dependencies"]], **parsed}


@pytest.mark.parametrize(("extra", "package", "version"), BREAKING)
def test_versions_that_break_the_app_are_left_out(extra, package, version):
    (requirement,) = (one for one in extras()[extra] if one.name == package)
    assert not requirement.specifier.contains(version)


def test_the_app_has_audioop_where_python_dropped_it():
    (requirement,) = (one for one in extras()["app"] if one.name == "audioop-lts")
    assert requirement.marker.evaluate({"python_version": "3.13"})
    assert not requirement.marker.evaluate({"python_version": "3.12"})


def test_the_tested_versions_satisfy_every_extra():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    for requirements in extras().values():
        for requirement in requirements:
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), str(requirement)
