"""Requests that schemathesis derives from the API's schema: its examples, and the edges of every field.

`benchmarks/fuzz_api.py` sends many more, drawn at random and in sequences.
"""

import pytest

pytest.importorskip("schemathesis", reason="a WebUI's pydantic is too old for it")

from fuzzing.api_schema import ApiTrial

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of schemathesis and what it brings
]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    trial = ApiTrial(tmp_path_factory.mktemp("api") / "models", job_seconds=0.05)
    trial.run({"examples", "coverage"}, examples=1)
    return trial


def test_every_answer_is_as_the_schema_says(trial):
    assert not trial.failures, "\n".join(trial.failures)
    assert trial.requests > 1000
    assert trial.answers.keys() >= {200, 202, 400, 404, 405, 422}


def test_the_requests_reach_the_work_behind_the_routes(trial):
    assert trial.jobs["done"] + trial.jobs["stopped"] > 50
