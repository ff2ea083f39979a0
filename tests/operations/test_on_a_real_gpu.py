"""Jobs on a GPU that is there: the CPU's results within rounding, with all memory and with little.

`HYPER_MERGE_TEST_DEVICE` names another device, such as `cpu`, with which these tests themselves are
tested; `benchmarks/gpu.py` runs them.
"""

import os
from functools import partial

import pytest
import torch
from fitting import fit
from random_checkpoints import networks
from tiny_family import load, merge

from hyper_merge.calibration.student import Course
from hyper_merge.operations.extract.extract import ExtractRequest, run_extract
from hyper_merge.operations.merge import training
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress

DEVICE = os.environ.get("HYPER_MERGE_TEST_DEVICE", "cuda:0")
ON_GPU = DEVICE != "cpu"
LITTLE = 24 * 2**20  # bytes: less than the first products take

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and "HYPER_MERGE_TEST_DEVICE" not in os.environ,
        reason="there is no GPU",
    ),
]


@pytest.fixture
def little_memory():
    if ON_GPU:
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(LITTLE / total, DEVICE)
    yield
    if ON_GPU:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


@pytest.mark.parametrize(
    "settings",
    [
        {"allocation": "adaptive"},
        {"allocation": "even"},
        {"method": "greedy", "allocation": "even"},
        {"lora_dtype": "float8"},
        {"topup": "4"},
        {"multipliers": "separate"},
        {"exact": "all"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_merge_is_that_of_the_cpu(files, tmp_path, log, settings):
    expected = merge(files, tmp_path / "cpu", **settings)
    merged = merge(files, tmp_path / "gpu", log.progress, device=DEVICE, **settings)
    assert log.warnings == []
    assert merged.report.loss == pytest.approx(expected.report.loss, rel=5e-3)
    average, other = (load(run.place.hyper_model) for run in (merged, expected))
    for key, tensor in average.items():
        torch.testing.assert_close(tensor, other[key], rtol=2e-3, atol=1e-6)


def test_a_training_is_that_of_the_cpu(tmp_path, log, monkeypatch):
    monkeypatch.setattr(training, "Course", partial(Course, batch=2, side=8))
    settings = {"ranks": (2,), "lora_dtype": "float8", "layer_weights": "layout", "training": 1}
    models = networks(tmp_path / "networks", 2)
    expected = merge(models, tmp_path / "cpu", **settings).report.training
    found = merge(models, tmp_path / "gpu", log.progress, device=DEVICE, **settings).report.training
    assert log.warnings == []
    assert found.before == pytest.approx(expected.before, rel=0.05)
    assert found.after == pytest.approx(expected.after, rel=0.05)


def test_merge_with_little_memory_is_that_of_the_cpu(files, tmp_path, log, little_memory):
    expected = merge(files, tmp_path / "cpu")
    merged = merge(files, tmp_path / "gpu", log.progress, device=DEVICE)
    assert bool(log.warnings) == ON_GPU
    assert merged.report.loss == pytest.approx(expected.report.loss, rel=5e-3)


@pytest.mark.parametrize("memory", ["all", "little"])
def test_fit_and_extraction_are_those_of_the_cpu(files, started, merged, tmp_path, memory, request):
    if memory == "little":
        request.getfixturevalue("little_memory")
    manifest, root = started / "hyper-merge/mix/manifest.json", merged.place.loras.parent
    manifest.write_text(manifest.read_text().replace(str(root), str(started)))
    fits, shares = [], []
    for device in ("cpu", DEVICE):
        name = f"on-{device.replace(':', '-')}-{len(fits)}"
        fits.append(fit(Folders.under(started), files[1], name=name, topup="99%", device=device))
        output = tmp_path / f"{name}.safetensors"
        extraction = ExtractRequest(files[0], files[1], rank=2, output=output, device=device)
        shares.append(run_extract(extraction, None, Progress()).explained)
    assert fits[1].row.explained == pytest.approx(fits[0].row.explained, rel=1e-4)
    assert fits[1].topups[0].explained == pytest.approx(fits[0].topups[0].explained, rel=1e-3)
    assert shares[1] == pytest.approx(shares[0], rel=1e-3)


@pytest.mark.skipif(not ON_GPU, reason="a CPU has no TF32")
def test_tf32_of_a_host_changes_nothing(files, tmp_path):
    plain = merge(files, tmp_path / "plain", device=DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        merged = merge(files, tmp_path / "tf32", device=DEVICE)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert merged.report.loss == pytest.approx(plain.report.loss, rel=1e-6)
