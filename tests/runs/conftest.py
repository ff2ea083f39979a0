"""A merge in a models folder of its own, whose manifest can be edited."""

import json

import pytest

from hyper_merge.runs.folders import Folders


@pytest.fixture
def folders(started, merged):
    """The folders of a merge, with a manifest as if it had been made there."""
    manifest, root = started / "hyper-merge/mix/manifest.json", merged.place.loras.parent
    manifest.write_text(manifest.read_text().replace(str(root), str(started)))
    return Folders.under(started)


@pytest.fixture
def edit(started):
    """Changes the manifest of a run; None takes a key away."""

    def edit(run="mix", **changes):
        path = started / "hyper-merge" / run / "manifest.json"
        manifest = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))

    return edit
