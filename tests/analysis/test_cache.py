"""Analyses on disk: read as they were written, found again, and kept within bounds."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_family import inputs_of, run_pass

from hyper_merge.analysis.cache import (
    analysis_path,
    cache_bytes,
    clear_analyses,
    find_analysis,
    prune_analyses,
)
from hyper_merge.analysis.file_layout import analysis_bytes
from hyper_merge.analysis.store import create_analysis, open_analysis
from hyper_merge.analysis.streaming_pass import (
    PassOptions,
    stream_layers,
)
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import (
    CacheError,
)
from hyper_merge.runtime.progress import Progress

CPU = torch.device("cpu")


def write_analysis(folder, inputs, options):
    path = analysis_path(folder, inputs, options)
    with create_analysis(path, inputs, options) as writer:
        outside = stream_layers(inputs, options, None, writer.keep, Progress())
        writer.close_with(outside)
    return path


def test_analysis_is_read_as_written(tmp_path, files):
    inputs, options = inputs_of(files), PassOptions(CPU, 0, 6)
    path = write_analysis(tmp_path, inputs, options)
    _, layers, outside = run_pass(inputs, width=6)
    with open_analysis(path, inputs) as stored:
        for index, layer in layers.items():
            left, right = stored.bases(index)
            assert torch.equal(stored.core(index), layer.compressed.core)
            torch.testing.assert_close(left, layer.compressed.left, rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(right, layer.compressed.right, rtol=1e-3, atol=1e-7)
            assert torch.equal(stored.grams[index], layer.gram)
        for kind, energy in outside.items():
            assert torch.equal(stored.not_carried[kind], energy)
    kinds = {key.partition(".")[2] for key in read_header(path).tensors if "." in key}
    assert kinds == {"core", "left", "right", "rounding"}  # the solver finds spectra itself
    expected = analysis_bytes(inputs, PassOptions(CPU, 0, 6))
    assert expected < path.stat().st_size < expected + 100_000


def test_analysis_serves_only_equal_inputs_and_settings(tmp_path, files):
    inputs, options = inputs_of(files), PassOptions(CPU, 0, 9)
    path = write_analysis(tmp_path, inputs, options)

    def find(inputs, options=options, ranks=(4, 2)):
        return find_analysis(tmp_path, inputs, options, ranks)

    assert find(inputs) == path
    assert find(inputs, replace(options, width=512), (4, 2)) == path  # wide enough
    assert find(inputs, replace(options, width=512), (4, 3)) is None  # too narrow
    assert find(inputs, options, (40, 30)) == path  # a new one would be no wider
    assert find(inputs, replace(options, seed=1)) is None
    assert find(inputs_of(files[::-1])) is None
    assert find(inputs_of(files, weights=(1, 1, 2))) is None
    assert find(inputs_of(files, dtype="bfloat16")) is None
    assert find(inputs_of(files, vae="average")) is None
    path.write_bytes(path.read_bytes()[:-10])
    assert find(inputs) is None


def test_the_analyses_used_longest_ago_go_first(tmp_path):
    paths = [tmp_path / f"{name}-512.analysis.safetensors" for name in "abc"]
    for age, path in enumerate(paths):
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - age, 1000 - age))
    other = tmp_path / "hashes.json"
    other.write_bytes(bytes(1000))
    prune_analyses(tmp_path, 300)
    assert all(path.exists() for path in paths)
    prune_analyses(tmp_path, 250)
    assert [path.exists() for path in paths] == [True, True, False]
    assert other.exists()


@pytest.fixture
def cache(tmp_path):
    """A cache with two analyses of 100 bytes, solutions beside one of them, and hashes."""
    folder = tmp_path / "cache"
    folder.mkdir()
    sizes = {"a-512.analysis.safetensors": 100, "b-768.analysis.safetensors": 100}
    sizes |= {"a-512.solutions.json": 7, "hashes.json": 1000, ".hyper-merge-00.tmp": 50}
    for name, size in sizes.items():
        (folder / name).write_bytes(bytes(size))
    return folder


def test_clearing_the_cache_keeps_its_hashes(cache):
    assert cache_bytes(cache) == 207
    assert clear_analyses(cache) == 207
    assert {path.name for path in cache.iterdir()} == {"hashes.json", ".hyper-merge-00.tmp"}
    assert cache_bytes(cache) == clear_analyses(cache) == 0
    nowhere = cache / "nowhere"
    assert cache_bytes(nowhere) == clear_analyses(nowhere) == 0


def test_clearing_names_a_file_that_stays(cache, monkeypatch):
    unlink, stuck = Path.unlink, cache / "a-512.analysis.safetensors"

    def refuse(self, missing_ok=False):
        if self == stuck:
            raise PermissionError(13, "in use")
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CacheError) as caught:
        clear_analyses(cache)
    assert str(caught.value) == (
        f"part of the cache cannot be deleted (first: {stuck}: in use); try again when no merge is"
        " running"
    )
    assert cache_bytes(cache) == 100
    prune_analyses(cache, 0)  # an analysis in use is no reason to fail after a merge
    assert stuck.exists()


def test_a_limit_of_nothing_keeps_nothing(cache):
    prune_analyses(cache, 0)
    assert cache_bytes(cache) == 0
