"""Damaged hashes of checkpoints are set aside and computed again."""

import pytest
from mutations import TEXTS

from hyper_merge.checkpoints.reader import read_header
from hyper_merge.runs.hash_cache import find_by_hash, hash_sources
from hyper_merge.runtime.checked_json import read_sealed, sealed
from hyper_merge.runtime.progress import Progress


@pytest.fixture
def cache(started):
    return started / "hyper-merge/cache"


@pytest.mark.parametrize(
    "text", [*TEXTS, '{"a|1|2": 3}', '{"a|1|2": "xyz"}', '{"a": ["b"]}'], ids=range(len(TEXTS) + 3)
)
def test_damaged_hashes_are_set_aside_and_made_again(started, files, cache, log, text):
    headers = [read_header(path) for path in files]
    expected = hash_sources(headers, cache, Progress())
    path = cache / "hashes.json"
    path.write_text(text)
    assert hash_sources(headers, cache, log.progress) == expected
    (warning,) = log.warnings
    assert warning.startswith(f"{path} is damaged (")
    assert hash_sources(headers, cache, log.progress) == expected
    assert len(log.warnings) == 1


def test_a_changed_digit_of_a_hash_is_noticed(started, files, cache, log):
    headers = [read_header(path) for path in files]
    expected = hash_sources(headers, cache, Progress())
    path = cache / "hashes.json"
    path.write_text(sealed(read_sealed(path)))
    digest = expected[0].sha256
    path.write_text(path.read_text().replace(digest, digest[::-1]))
    assert hash_sources(headers, cache, log.progress) == expected
    assert len(log.warnings) == 1


def test_files_are_found_by_their_hash_as_long_as_they_do_not_change(started, cache):
    model = started / "Stable-diffusion/mix.safetensors"
    (record,) = hash_sources([read_header(model)], cache, Progress())
    assert find_by_hash(record.sha256, cache) == [model.resolve()]
    model.write_bytes(model.read_bytes() + b"x")
    assert find_by_hash(record.sha256, cache) == []


@pytest.mark.parametrize("key", ["a", "a|1", "a\0|1|2", "nowhere|1|2"])
def test_entries_that_lead_nowhere_find_no_file(tmp_path, key):
    (tmp_path / "hashes.json").write_text(sealed({key: "0" * 64}))
    assert find_by_hash("0" * 64, tmp_path) == []
