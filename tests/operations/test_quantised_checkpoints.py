"""Quantised checkpoints (GGUF) as input: of an average, a merge and a fit, as a network alone."""

import pytest
import torch
from fitting import fit
from gguf_files import write_gguf
from narrow_layouts import UNET
from random_checkpoints import files, state
from tiny_family import load, merge, recipe

from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.operations.merge.average import run_average
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.transformer_layouts import lumina2


def network(seed):
    shapes = {UNET + key: shape for key, shape in lumina2(96, 1, 32)}
    return state(shapes, seed, dtype=torch.float16)


def quantised(path, tensors, kind="Q8_0"):
    """Writes matrices whose rows suit it in blocks, all else as it is, without the usual prefix."""
    parts = {}
    for key, values in tensors.items():
        suits = values.dim() == 2 and values.shape[1] % 32 == 0
        numbers = values.float().numpy()
        parts[key.removeprefix(UNET)] = (kind if suits else "F32", numbers)
    return write_gguf(path, parts)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    plain, whole = files(folder, network(0), network(1))
    return plain, quantised(folder / "b-Q8_0.gguf", load(whole)), whole


def test_an_average_takes_it_for_the_numbers_that_it_stands_for(models, tmp_path):
    plain, rounded, whole = models
    preflight = run_preflight(recipe((plain, rounded), tmp_path / "models", name="mean"))
    (warning,) = (text for text in preflight.warnings if "quantised" in text)
    assert warning.startswith(
        "b-Q8_0.gguf is quantised (Q8_0): that has moved its weights by about 0."
    )
    mean, first = load(run_average(preflight, Progress())), load(plain)
    with CheckpointReader(rounded) as file:
        for key in mean:
            expected = (first[key].double() + file.tensor(key).double()) / 2
            assert torch.equal(mean[key], expected.to(mean[key].dtype))
    exact = (first[f"{UNET}layers.0.attention.out.weight"].double()
             + load(whole)[f"{UNET}layers.0.attention.out.weight"].double()) / 2  # fmt: skip
    off = mean[f"{UNET}layers.0.attention.out.weight"].double() - exact
    assert 0.0005 < float(off.norm() / exact.norm()) < 0.005


def test_a_merge_and_a_fit_take_it(models, tmp_path):
    plain, rounded, whole = models
    merged = merge((plain, rounded), tmp_path / "models", ranks=(64,))
    unrounded = merge((plain, whole), tmp_path / "others", ranks=(64,))
    assert merged.report.loss == pytest.approx(unrounded.report.loss, rel=0.02)
    said = []
    record = fit(Folders.under(tmp_path / "models"), rounded, Progress(warn=said.append))
    assert record.explained == pytest.approx(merged.report.checkpoints[1].explained, abs=0.01)
    assert any("quantised (Q8_0)" in text for text in said)
    assert read_header(rounded).rounded_as == ("Q8_0",)
