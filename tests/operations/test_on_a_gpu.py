"""Jobs on a pretended GPU: no tensor of the wrong place, few waits, and the CPU where it fails."""

import pytest
import torch
from fitting import fit
from pretended_gpu import pretended_gpu
from tiny_family import merge

from hyper_merge.operations.extract.extract import ExtractRequest, run_extract
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress

GPU = "cuda:0"


def fail_at(number, error):
    """Returns what raises an error at one operation, counted from 1."""
    operations = iter(range(1, 10**9))

    def inject(_name):
        if next(operations) == number:
            raise error

    return inject


def test_a_merge_on_a_gpu_is_that_of_the_cpu_and_waits_once_a_sweep(files, tmp_path, log):
    settings = {"ranks": (3,), "iterations": 2}
    expected = merge(files[:2], tmp_path / "cpu", **settings)
    with pretended_gpu() as gpu:
        merged = merge(files[:2], tmp_path / "gpu", log.progress, device=GPU, **settings)
    assert log.warnings == []
    assert merged.report.loss == pytest.approx(expected.report.loss, rel=1e-4)
    assert gpu.emptied[-1] == gpu.live == 0
    # Each sweep waits for the sums over all layers, and factorises twice in each of them.
    sweeps = [n for (_, place), n in gpu.places.items() if place.startswith("decomposition/ll1")]
    assert 0 < sum(sweeps) < gpu.launches["linalg_cholesky_ex"] / 8
    assert "check" not in gpu.waits
    assert not gpu.largest  # no eigenproblem and no SVD there


def test_a_merge_beyond_the_memory_of_a_gpu_is_that_of_the_cpu(files, tmp_path, log):
    settings = {"ranks": (3,), "iterations": 1, "allocation": "even"}
    expected = merge(files[:2], tmp_path / "cpu", **settings)
    with pretended_gpu(limit=40_000) as gpu:
        merged = merge(files[:2], tmp_path / "gpu", log.progress, device=GPU, **settings)
    assert gpu.launches
    assert set(log.warnings) == {
        "cuda:0 has too little memory for some layers; the CPU took them",
        "cuda:0 has too little memory for the cores; the CPU is used instead",
    }
    assert merged.report.loss == pytest.approx(expected.report.loss, rel=1e-5)


def test_fits_go_on_where_a_gpu_fails(files, started, merged):
    manifest, root = started / "hyper-merge/mix/manifest.json", merged.place.loras.parent
    manifest.write_text(manifest.read_text().replace(str(root), str(started)))
    folders, fits = Folders.under(started), []
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate")
    for number in (1, 40):
        with pretended_gpu() as gpu:
            gpu.inject = fail_at(number, error)
            fits.append(fit(folders, files[1], name=f"at-{number}", topup="99%", device=GPU))
            assert gpu.launches
    fits.append(fit(folders, files[1], name="cpu", topup="99%", device="cpu"))
    shares = [fitted.row.explained for fitted in fits]
    assert shares == pytest.approx([shares[-1]] * 3, rel=1e-5)
    reached = [fitted.topups[0].explained for fitted in fits]
    assert reached == pytest.approx([reached[-1]] * 3, rel=1e-4)


def test_an_extraction_goes_on_where_a_gpu_fails(files, tmp_path):
    explained = []
    for name, device in (("cpu", "cpu"), ("gpu", GPU)):
        with pretended_gpu() as gpu:
            gpu.inject = fail_at(30, torch.cuda.OutOfMemoryError("CUDA out of memory."))
            output = tmp_path / f"{name}.safetensors"
            request = ExtractRequest(files[0], files[1], rank=2, output=output, device=device)
            explained.append(run_extract(request, None, Progress()).explained)
    assert gpu.emptied
    assert explained[1] == pytest.approx(explained[0], rel=1e-4)
