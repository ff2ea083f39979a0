"""A models folder with three tiny checkpoints, in the app and in a faked WebUI of either kind."""

import json
import shutil
import threading

import pytest
from fake_webui import installed

from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.hosts.standalone import Standalone


@pytest.fixture
def root(tmp_path, files):
    """The models folder; its files may be changed."""
    folder = tmp_path / "models"
    (folder / "Stable-diffusion").mkdir(parents=True)
    for path in files:
        shutil.copy2(path, folder / "Stable-diffusion")
    return folder


@pytest.fixture
def checkpoints(root):
    """The folder of checkpoints."""
    return root / "Stable-diffusion"


@pytest.fixture
def run(root, files, merged):
    """The name of a merge of the three, as if it had been made in the models folder some time ago."""
    old = merged.place.loras.parent
    shutil.copytree(old, root, dirs_exist_ok=True)
    manifest = root / "hyper-merge/mix/manifest.json"
    text = manifest.read_text().replace(str(old), str(root))
    text = text.replace(str(files[0].parent), str(root / "Stable-diffusion"))
    earlier = {"created": "2026-01-02T03:04:05+00:00"}
    manifest.write_text(json.dumps(json.loads(text) | earlier))
    return "mix"


@pytest.fixture
def host(root):
    """The host of the app."""
    return Standalone(root)


@pytest.fixture(params=["a1111", "forge"])
def flavour(request):
    return request.param


@pytest.fixture
def webui(root, flavour):
    """A WebUI with that models folder, in which no job is left running."""
    with installed(root, flavour) as fake:
        yield fake
        for thread in threading.enumerate():
            if thread.name == "hyper-merge":
                thread.join(60)


@pytest.fixture
def jobs():
    return Jobs()
