"""Two real workers, each a process of its own."""

import pytest
from remote_work import GB

from hyper_merge.cluster.opening import ClusterRequest, open_workers
from hyper_merge.runtime.progress import Progress


@pytest.fixture(scope="module")
def workers():
    """Two workers of one thread and 700 MB."""
    with open_workers(
        ClusterRequest(2, memory=7 * GB // 10), Progress(), lambda _line: None
    ) as two:
        yield two
