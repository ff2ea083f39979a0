"""What all tests of the command line have in common."""

import pytest


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch):
    """Keeps lines about the progress off standard error, which slow machines print."""
    monkeypatch.setattr("hyper_merge.cli.progress_bar.SECONDS_BETWEEN_LINES", 1e9)
