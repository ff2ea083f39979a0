"""Of many checkpoints a layer keeps directions among them, in half precision, and all inner products."""

from dataclasses import replace

import pytest
import torch
from sparse_checkpoints import full_size
from tiny_family import KEPT as EVERY_KIND
from tiny_family import TINY, inputs_of, load, recipe, write

from hyper_merge.analysis import basis_widths
from hyper_merge.analysis.basis_widths import sampled_options
from hyper_merge.analysis.cache import analysis_path
from hyper_merge.analysis.device_bytes import bytes_in_flight
from hyper_merge.analysis.file_layout import analysis_bytes
from hyper_merge.analysis.store import create_analysis, open_analysis
from hyper_merge.analysis.streaming_pass import PassOptions, stream_layers
from hyper_merge.decomposition import contrasts
from hyper_merge.decomposition.contrasts import leading_directions
from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.checkpoint_layouts import sdxl_layout
from hyper_merge.synthetic.writer import write_family

CPU = torch.device("cpu")
RANKS = (4, 3)
KEPT, COMMON = 4, 2
WIDTH = 16


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Returns eight checkpoints, mixtures of three fine-tunes with a part of their own each."""
    folder = tmp_path_factory.mktemp("many")
    names = [f"model-{place}" for place in range(8)]
    paths = write_family(folder, replace(TINY, count=8, latents=3, own=0.2, noise=0.0), names)
    for path in paths:  # every kind of layer, not every layer
        write(path, {key: x for key, x in load(path).items() if EVERY_KIND.fullmatch(key)})
    return list(paths)


@pytest.fixture
def few_kept(monkeypatch):
    """Lets eight be many."""
    monkeypatch.setattr(contrasts, "FEW", KEPT - 1)
    monkeypatch.setattr(contrasts, "KEPT", KEPT)
    monkeypatch.setattr(basis_widths, "_COMMON", COMMON)


def merged(models, folder, **settings):
    folder.mkdir()
    options = {"ranks": RANKS, "layer_weights": "plain", **settings}
    return run_merge(run_preflight(recipe(models, folder, **options)), Progress())


def true_slices(states, inputs, layer):
    first, *others = [state[layer.key].double() for state in states]
    differences = torch.stack([(other - first).flatten() for other in others])
    return (inputs.contrasts.to_slices @ differences).view(-1, layer.m, layer.n)


def test_a_core_holds_what_lies_along_the_kept_directions(many, tmp_path, few_kept):
    inputs = inputs_of(many)
    options = sampled_options(inputs, PassOptions(CPU, 0, WIDTH), Progress())
    path = analysis_path(tmp_path, inputs, options)
    with create_analysis(path, inputs, options) as written:
        written.close_with(stream_layers(inputs, options, None, written.keep, Progress()))
    with open_analysis(path, inputs) as analysis:
        states = [load(header.path) for header in inputs.headers]
        for index, layer in enumerate(analysis.layers):
            slices = true_slices(states, inputs, layer)
            gram = torch.einsum("cmn,dmn->cd", slices, slices)
            assert torch.allclose(analysis.grams[index][:-1, :-1], gram, rtol=1e-4, atol=1e-8)
            directions = analysis._tensor(f"{index}.directions")
            assert directions.shape == (7, KEPT)
            left, right = (basis.double() for basis in analysis.bases(index))
            kept = torch.einsum("cd,dmn->cmn", directions @ directions.mT, slices)
            expected = left.mT @ kept @ right
            error = analysis.core(index).double() - expected
            assert float(error.norm()) < 2e-3 * float(expected.norm())


def test_the_loss_is_about_that_of_whole_cores(many, tmp_path, monkeypatch):
    whole = merged(many, tmp_path / "whole").report
    for name, value in (("FEW", KEPT - 1), ("KEPT", KEPT)):
        monkeypatch.setattr(contrasts, name, value)
    monkeypatch.setattr(basis_widths, "_COMMON", COMMON)
    kept = merged(many, tmp_path / "kept").report
    assert kept.loss < 1.01 * whole.loss
    assert kept.loss == pytest.approx(whole.loss, rel=0.03)


def test_an_analysis_of_whole_cores_is_another(many, tmp_path, few_kept):
    inputs = inputs_of(many)
    small = analysis_bytes(inputs, PassOptions(CPU, 0, 16))
    contrasts.FEW = 16
    assert small < analysis_bytes(inputs, PassOptions(CPU, 0, 16))


def test_common_directions_come_first_and_then_those_that_hold_most():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    gram = root @ torch.diag(torch.tensor([9.0, 5, 2, 1, 0.1, 0]).double()) @ root.mT
    common = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64))[0]
    found = leading_directions(gram, common, 4)
    assert torch.allclose(found.mT @ found, torch.eye(4).double(), atol=1e-12)
    assert torch.allclose(found[:, :2], common)
    rest = torch.eye(6).double() - common @ common.mT
    most = torch.linalg.eigvalsh(rest @ gram @ rest)[-2:].sum()
    assert float((found[:, 2:].mT @ gram @ found[:, 2:]).trace()) == pytest.approx(float(most))


@pytest.mark.parametrize("common", [None, torch.eye(5, dtype=torch.float64)[:, :2]])
def test_slices_of_zero_have_directions_too(common):
    found = leading_directions(torch.zeros(5, 5, dtype=torch.float64), common, 3)
    assert torch.allclose(found.mT @ found, torch.eye(3).double())


def test_a_hundred_sdxl_checkpoints_take_little_more_than_thirty(tmp_path):
    two = inputs_of([full_size(tmp_path / f"{x}.safetensors", x, sdxl_layout) for x in "ab"])

    def of(count):
        headers = (two.headers * count)[:count]
        return replace(two, headers=headers, weights=(1.0,) * count)

    options = PassOptions(CPU, 0, 512)
    assert analysis_bytes(of(100), options) < 20e9
    assert analysis_bytes(of(100), options) < 1.01 * analysis_bytes(of(30), options)
    assert bytes_in_flight(of(100), 512, 2) < 4e9
