"""Merges that use earlier work again, in the folders and on the device that they are given."""

import shutil
import types
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_family import (
    losses,
    merge,
    recipe,
    snapshot,
    tags_of,
)

from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.operations.merge.average import run_average
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runs import hash_cache
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress
from hyper_merge.solver import solve


def test_equal_seeds_write_equal_bytes(files, tmp_path, monkeypatch):
    class Clock:
        @staticmethod
        def now(zone):
            return types.SimpleNamespace(isoformat=lambda timespec: "2025-01-02T03:04:05+00:00")

    monkeypatch.setattr(hash_cache, "datetime", Clock)
    merge(files, tmp_path / "one")
    merge(files, tmp_path / "two")
    one, two = (snapshot(tmp_path / name) for name in ("one", "two"))
    manifests = [contents.pop("hyper-merge/mix/manifest.json") for contents in (one, two)]
    assert one == two
    assert manifests[0].replace(b"/one", b"/two") == manifests[1]


def test_other_ranks_reuse_analysis_and_hyper_model(files, started, monkeypatch):
    before = snapshot(started)

    def refuse(self, *rest):
        assert self.path not in files, f"{self.path} was opened"
        return enter(self)

    enter = CheckpointReader.__enter__
    monkeypatch.setattr(CheckpointReader, "__enter__", refuse)
    monkeypatch.setattr(hash_cache, "file_sha256", lambda *rest: pytest.fail("a file was hashed"))
    second = merge(files, started, ranks=(5,))
    assert second.reused_analysis
    assert second.place.exists
    assert second.place.hyper_model == started / "Stable-diffusion" / "mix.safetensors"
    assert [path.name for path in second.loras] == ["mix-2_0-5.safetensors"]
    assert second.place.folder == started / "hyper-merge" / "mix-2"
    after = snapshot(started)
    assert {name: after[name] for name in before} == before
    loss, _ = losses(files, second, tags_of(second))
    assert second.report.loss == pytest.approx(loss, abs=1e-6)
    assert merge(files, started, ranks=(6,)).place.run == "mix-3"


def test_lost_hyper_model_is_remade_from_cache(files, started):
    hyper_model = started / "Stable-diffusion" / "mix.safetensors"
    before = load_file(hyper_model)
    content = hyper_model.read_bytes()
    hyper_model.unlink()
    second = merge(files, started, ranks=(3,))
    assert second.reused_analysis
    after = load_file(second.place.hyper_model)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    offset = content.index(b"hyper_merge.average_id")
    assert content[offset : offset + 90] in second.place.hyper_model.read_bytes()


def test_second_run_without_cache_reads_again(files, started):
    shutil.rmtree(started / "hyper-merge" / "cache")
    second = merge(files, started, ranks=(3,))
    assert not second.reused_analysis
    assert second.place.exists
    loss, _ = losses(files, second, tags_of(second))
    assert second.report.loss == pytest.approx(loss, abs=1e-6)


def test_later_loras_name_their_hyper_model(files, tmp_path):
    merge(files, tmp_path, name="first")
    second = merge(files, tmp_path, name="second")
    with safe_open(str(second.loras[0]), "pt") as file:
        assert file.metadata()["ss_sd_model_name"] == "first.safetensors"
    based = merge(files[1:], tmp_path, name="based", base=str(files[0]))
    with safe_open(str(based.loras[0]), "pt") as file:
        assert file.metadata()["ss_sd_model_name"] == "a.safetensors"


def test_cpu_takes_cores_beyond_the_devices_memory(files, tmp_path, merged, monkeypatch):
    real, calls, warnings = solve.best_start, [], []

    def best_start(*rest):
        calls.append(rest)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (pretended)")
        return real(*rest)

    monkeypatch.setattr(solve, "best_start", best_start)
    reports = []
    progress = Progress(lambda _phase, x: reports.append(x), warn=warnings.append)
    report = merge(files, tmp_path, progress).report
    assert reports == sorted(reports)
    assert warnings == ["cpu has too little memory for the cores; the CPU is used instead"]
    assert report == merged.report


def test_the_whole_run_is_one_rising_progress(files, tmp_path):
    reports = []
    merge(files, tmp_path, Progress(lambda phase, x: reports.append((phase, x))))
    fractions = [x for _, x in reports]
    assert fractions == sorted(fractions)
    assert fractions[0] >= 0
    assert fractions[-1] == 1
    assert list(dict.fromkeys(phase for phase, _ in reports)) == [
        "hashing the checkpoints",
        "reading and analysing",
        "searching for a start",
        "solving for the LoRAs",
        "preparing the LoRAs",
        "writing the LoRAs",
        "putting the files in place",
    ]


def test_files_go_to_the_hosts_folders(files, tmp_path):
    names = ("checkpoints", "lora", "mine/runs", "elsewhere/cache")
    folders = Folders(*(tmp_path / name for name in names))
    preflight = run_preflight(recipe(files, tmp_path / "output"), folders)
    merged = run_merge(preflight, Progress(), effort=SearchEffort.QUICK)
    assert merged.place.hyper_model == tmp_path / "checkpoints/mix.safetensors"
    assert merged.loras[0] == tmp_path / "lora/mix_0-4.safetensors"
    assert (tmp_path / "mine/runs/mix/manifest.json").is_file()
    assert list(folders.cache.glob("*.analysis.safetensors"))
    assert not (tmp_path / "output").exists()
    small = replace(folders, cache_limit=0)
    again = run_preflight(recipe(files, tmp_path / "output", ranks=(3,)), small)
    assert run_merge(again, Progress(), effort=SearchEffort.QUICK).reused_analysis
    assert not list(folders.cache.glob("*.analysis.*"))
    alone = run_preflight(recipe(files, tmp_path / "output", name="alone"), folders)
    assert run_average(alone, Progress()) == tmp_path / "checkpoints/alone.safetensors"
