"""Bases are wide where the differences are, at the cost of one width for all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_family import load, recipe, snapshot

from hyper_merge.analysis import basis_widths
from hyper_merge.analysis.basis_widths import allocate_widths, sample_layers, sampled_options
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.errors import InterruptedRun
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.runtime.progress import Progress

CPU, NOMINAL = torch.device("cpu"), 512


def layers_of_shapes(shapes):
    return [Layer(f"{i}", f"{i}", "unet", shape) for i, shape in enumerate(shapes)]


def cost(shapes, allocated):
    return sum(m * n * width for (m, n), width in zip(shapes, allocated, strict=True))


def nominal_cost(shapes, nominal):
    return cost(shapes, [min(nominal, max(shape)) for shape in shapes])


SIDES = st.sampled_from([4, 77, 320, 640, 768, 1280, 2880, 5120])
ENERGIES = st.floats(0, 1e9) | st.just(0.0)


@given(st.lists(st.tuples(SIDES, SIDES, ENERGIES), min_size=1, max_size=8), st.integers(3, 40))
def test_widths_keep_cost_limits_and_steps(layers, steps):
    shapes, energies, nominal = [row[:2] for row in layers], [row[2] for row in layers], 32 * steps
    allocated = allocate_widths(layers_of_shapes(shapes), energies, nominal)
    assert cost(shapes, allocated) <= nominal_cost(shapes, nominal)
    for width, shape in zip(allocated, shapes, strict=True):
        assert min(96, max(shape)) <= width <= max(shape)
        assert width % 32 == 0 or width == max(shape)


def test_layers_with_more_energy_get_wider_bases():
    shapes = [(1280, 1280)] * 5
    allocated = allocate_widths(layers_of_shapes(shapes), [1e-9, 0.1, 1.0, 10.0, 1e9], NOMINAL)
    assert allocated == tuple(sorted(allocated))
    assert (allocated[0], allocated[-1]) == (96, 1280)
    assert allocated[2] < allocated[3]
    ratio = allocated[3] / allocated[2]
    assert ratio == pytest.approx(10**0.7, rel=0.25)  # steps of 32 columns
    assert cost(shapes, allocated) > 0.9 * nominal_cost(shapes, NOMINAL)


def test_small_layers_are_whole():
    shapes = [(64, 64), (2000, 2000), (2000, 2000)]
    allocated = allocate_widths(layers_of_shapes(shapes), [1.0, 1.0, 1.0], NOMINAL)
    assert allocated == (64, 512, 512)


def test_equal_layers_have_the_nominal_width():
    allocated = allocate_widths(layers_of_shapes([(1280, 640)] * 7), [3.0] * 7, NOMINAL)
    assert allocated == (NOMINAL,) * 7


def test_smaller_layers_get_more_columns():
    small, large = allocate_widths(layers_of_shapes([(640, 640), (2560, 2560)]), [1.0] * 2, NOMINAL)
    assert large < small <= 640


@pytest.mark.parametrize("energies", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_unknown_energies_give_the_nominal_width(energies):
    allocated = allocate_widths(layers_of_shapes([(1280, 1280), (320, 300)]), energies, NOMINAL)
    assert allocated == (NOMINAL, 320)


@pytest.mark.parametrize("smallest", [0.0, 1e-300, 1e-30, 1e-16])
def test_layer_of_no_energy_changes_no_other(smallest):
    layers = layers_of_shapes([(1280, 1280)] * 3)
    first, second, third = allocate_widths(layers, [1.0, 2.0, smallest], NOMINAL)
    assert third == 96
    assert 96 < first < second
    assert cost([(1280, 1280)] * 3, (first, second, third)) > 0.9 * 3 * 1280**2 * NOMINAL


def true_energies(inputs):
    states = [load(header.path) for header in inputs.headers]
    energies = []
    for layer in inputs.layout.layers:
        stack = torch.stack([state[layer.key].double() for state in states])
        energies.append(float((stack - stack.mean(0)).square().sum()))
    return energies


def test_tensors_that_fit_the_sample_are_measured_exactly(files, tmp_path, monkeypatch):
    monkeypatch.setattr(basis_widths, "_SAMPLE", 2**20)
    inputs = run_preflight(recipe(files, tmp_path)).inputs
    sampled = sample_layers(inputs, Progress()).energies.tolist()
    assert sampled == pytest.approx(true_energies(inputs), rel=1e-4)


def test_samples_of_a_tensor_estimate_its_energy(files, tmp_path, monkeypatch):
    monkeypatch.setattr(basis_widths, "_SAMPLE", 64)
    inputs = run_preflight(recipe(files, tmp_path)).inputs
    sampled_energies = sample_layers(inputs, Progress()).energies.tolist()
    true = true_energies(inputs)
    sampled = [m for m, layer in enumerate(inputs.layout.layers) if layer.m * layer.n > 256]
    assert len(sampled) > 20
    ratios = torch.tensor([sampled_energies[m] / true[m] for m in sampled])
    assert not torch.allclose(ratios, torch.ones(()), rtol=1e-3)
    assert float(ratios.log().abs().median()) < 0.3
    assert float(ratios.min()) > 0.3
    assert float(ratios.max()) < 3


def test_samples_span_the_whole_tensor(monkeypatch):
    monkeypatch.setattr(basis_widths, "_SAMPLE", 5)
    sample = basis_widths.sample(torch.arange(100))
    assert sample.tolist() == [*range(5), *range(31, 36), *range(63, 68), *range(95, 100)]


def test_equal_files_have_equal_widths(files, tmp_path):
    inputs = run_preflight(recipe(files, tmp_path)).inputs
    before = snapshot(files[0].parent)
    options = PassOptions(CPU, 0, NOMINAL)
    first, again = (sampled_options(inputs, options, Progress()).widths for _ in range(2))
    assert first == again
    assert snapshot(files[0].parent) == before


def test_the_glance_at_the_files_can_be_interrupted(files, tmp_path):
    inputs = run_preflight(recipe(files, tmp_path)).inputs
    with pytest.raises(InterruptedRun):
        sampled_options(inputs, PassOptions(CPU, 0, NOMINAL), Progress(should_stop=lambda: True))
