"""Solutions on disk: damaged ones are set aside, and never become starts."""

import json

import pytest
import torch
from mutations import NESTED, changed, mutations, places
from tiny_family import WarningLog

from hyper_merge.analysis.solutions import read_solutions
from hyper_merge.runtime.checked_json import sealed

NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "1e300", "1" + "0" * 400, "null", '"1"', "true"]


@pytest.fixture(scope="session")
def starts():
    """Multipliers for two settings, as a file of an earlier version has them: no checksum."""
    return {
        "4, 2; equal": {"unet": [[1.0, 0.5], [-0.5, 1]], "text_encoder": [[1.0, 0.0], [0.0, 1.0]]},
        "8; equal": {"unet": [[1.0], [0.25]]},
    }


def remembered(path, log):
    """Returns the solutions that are read back."""
    return read_solutions(path, 2, log.warnings.append)


def test_solutions_of_an_earlier_version_are_read(tmp_path, starts, log):
    path = tmp_path / "x.solutions.json"
    path.write_text(json.dumps(starts))
    assert remembered(path, log) == starts
    path.write_text(sealed(starts))
    assert remembered(path, log) == starts
    assert log.warnings == []


TEXTS = [
    "[[",
    "null",
    NESTED,
    '{"4; a": []}',
    '{"4; a": {"unet": 3}}',
    '{"4; a": {"unet": [["x"], ["y"]]}}',
    '{"4; a": {"unet": [[1, 2], [1]]}}',
]


def damaged_texts(starts):
    yield from TEXTS
    yield from mutations(starts)
    for at in places(starts):
        for number in NUMBERS:
            yield json.dumps(changed(starts, at, "HERE")).replace('"HERE"', number)
    whole = sealed(starts)
    for place in range(0, len(whole), 3):
        yield whole[:place]
        yield whole[:place] + chr(ord(whole[place]) ^ 1) + whole[place + 1 :]


def test_damaged_solutions_are_never_given_as_starts(tmp_path, starts):
    count = 0
    for text in damaged_texts(starts):
        path, log = tmp_path / "x.solutions.json", WarningLog()
        path.write_bytes(text.encode())
        solutions = remembered(path, log)
        for groups in solutions.values():
            for rows in groups.values():
                tensor = torch.tensor(rows, dtype=torch.float64)
                assert tensor.shape[0] == 2
                assert bool(tensor.square().sum().isfinite())
        if not solutions and text not in ("{}", sealed({})):
            assert log.warnings
            assert not path.exists()
            assert [file.name for file in tmp_path.iterdir()] == ["x.solutions.json.damaged"]
        count += 1
    assert count > 400


def test_one_changed_byte_of_sealed_solutions_is_noticed(tmp_path, starts):
    whole = sealed(starts).encode()
    path = tmp_path / "x.solutions.json"
    for place in range(len(whole)):
        log = WarningLog()
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        solutions = remembered(path, log)
        assert solutions in ({}, starts)  # a blank may be another one
        assert bool(log.warnings) == (solutions == {})
