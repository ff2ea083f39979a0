"""The demonstration: a family of made-up checkpoints, and its merge."""

import functools
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from tiny_family import (
    TINY,
)

from hyper_merge.decomposition.initialization import SearchEffort
from hyper_merge.operations import demo
from hyper_merge.runtime.progress import Progress


@pytest.mark.slow
def test_demo_makes_and_merges_a_family(tmp_path, monkeypatch):
    small = replace(TINY, count=4, width=8, context=16, terms=6)
    monkeypatch.setattr(demo, "_SPEC", small)
    monkeypatch.setattr(demo, "DEMO_RANKS", (3, 2, 1))
    monkeypatch.setattr(demo, "Recipe", functools.partial(demo.Recipe, iterations=3))
    folder, reports = tmp_path / "demo", []
    progress = Progress(lambda phase, x: reports.append((phase, x)))
    first = demo.run_demo(folder, progress, effort=SearchEffort.QUICK)
    assert reports[0][0] == "making"
    assert [x for _, x in reports] == sorted(x for _, x in reports)
    assert {path.name for path in (folder / "Stable-diffusion").iterdir()} == {
        "portrait.safetensors",
        "landscape.safetensors",
        "anime.safetensors",
        "watercolour.safetensors",
        "demo.safetensors",
        "demo.json",
        "demo.png",
    }
    modules = {key.partition(".")[0] for key in load_file(first.loras[0])}
    assert 200 < len(modules) <= 278 + 72  # a layer where other bytes bring back more has none
    assert first.report.loss < 0.15
    assert first.report.weighted_loss < 0.13
    reports.clear()
    second = demo.run_demo(folder, progress, effort=SearchEffort.QUICK)
    assert second.report.loss == pytest.approx(first.report.loss, rel=0.02)  # starts from the first
    assert second.reused_analysis
    assert "making" not in dict(reports)
