"""A queue of jobs."""

import pytest

from hyper_merge.hosts.job_queue import Jobs


@pytest.fixture
def jobs():
    return Jobs()
