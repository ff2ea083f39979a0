"""Checkpoints, layers and directions that count more are fitted better, by exactly the loss asked for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_family import added, layers_of, load, merge
from torch.testing import assert_close

from hyper_merge.analysis.contents import Analysis
from hyper_merge.decomposition.contrasts import around_base, around_mean
from hyper_merge.decomposition.sensitivity import Sensitivity
from hyper_merge.decomposition.stretch import Stretch
from hyper_merge.solver.metric import Metric

M, N = 12, 15  # of a layer
P, Q = 5, 8  # columns of its bases


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class MadeUp:
    """An analysis of made-up slices, of which a part lies outside of the bases."""

    has_many = False
    maps = Analysis.maps

    def __init__(self, contrasts, seed=0, layers=3, outside=0.0):
        d = contrasts.dimensions
        self.contrasts, self.sensitivities = contrasts, None
        self.weights = torch.arange(1.0, layers + 1, dtype=torch.float64) ** 2
        self.layers = [
            SimpleNamespace(m=M, n=N, positions=4**place, module=f"{place}", is_end=place == 2)
            for place in range(layers)
        ]
        self._bases = [
            tuple(
                torch.linalg.qr(normal(seed + 7 * place, n, c))[0].float()
                for n, c in ((M, P), (N, Q))
            )
            for place in range(layers)
        ]
        rows = normal(seed, layers, d + 1, P, Q)
        rows[:, -1] *= 1e-3  # the average's rounding error
        self.rows = rows
        grams = rows.flatten(2) @ rows.flatten(2).mT
        self.grams = grams + outside * torch.eye(d + 1).double()

    def without_ends(self):
        return self

    def core(self, index):
        return self.rows[index, :-1].float()

    def rounding(self, index):
        return self.rows[index, -1].float()

    def bases(self, index):
        return self._bases[index]

    def core_shape(self, _index):
        return P, Q


def sensitivities(seed=0, layers=3):
    """Returns measured ones that stretch three directions of both sides."""
    values = {}
    for place in range(layers):
        left, right = (
            Stretch(
                torch.linalg.qr(normal(seed + place + n, n, 3))[0].float(),
                torch.tensor([30.0, 5.0, 2.0]),
            )
            for n in (M, N)
        )
        values[f"{place}"] = Sensitivity(3.0 / (1 + place), 0.4, left, right)
    return values


def recipe_with(fit_weights=None, layer_weights="plain"):
    return SimpleNamespace(fit_weights=fit_weights, layer_weights=layer_weights, ranks=(2, 1))


def dense_root(stretch, size):
    """Returns the dense matrix whose square is the stretch."""
    values, vectors = torch.linalg.eigh(stretch.apply(torch.eye(size)).double())
    return (vectors * values.sqrt()) @ vectors.mT


def scales(metric):
    return torch.tensor([layer.scale for layer in metric.layers], dtype=torch.float64)


def test_plainly_nothing_is_changed():
    analysis = MadeUp(around_mean([1.0, 2.0, 3.0]))
    metric = Metric.of(analysis, recipe_with())
    assert_close(metric.core(0), analysis.core(0), rtol=0, atol=0)
    assert metric.to_deviations is analysis.contrasts.to_deviations
    assert scales(metric).tolist() == [1, 1, 1]
    assert_close(metric.grams, analysis.grams)
    squares = analysis.rows[[0, 2], :-1].square().sum()
    assert metric.energy([0, 2]) == pytest.approx(float(squares), rel=1e-4)


@given(
    st.lists(st.floats(0.01, 100), min_size=2, max_size=6), st.booleans(), st.integers(0, 99),
    st.sampled_from(["plain", "relative", "output"]),
)  # fmt: skip
def test_loss_of_weighted_slices_is_the_weighted_loss(weights, based, seed, layered):
    k = len(weights)
    contrasts = around_base(k) if based else around_mean(normal(seed, k).abs().tolist())
    analysis = MadeUp(contrasts, seed)
    analysis.rows[:, -1] = 0  # the average is exact
    analysis.grams = analysis.rows.flatten(2) @ analysis.rows.flatten(2).mT
    metric = Metric.of(analysis, recipe_with(tuple(weights), layered))
    multipliers = normal(seed + 1, contrasts.dimensions, 2)  # as the solver finds them
    share = torch.tensor(weights).double() * k / sum(weights)
    for index in range(3):
        layer = analysis.core(index).flatten(1).double()
        blocks = normal(seed + 2 + index, 2, P * Q)
        scale = metric.layers[index].scale
        core = metric.core(index).flatten(1).double()
        inside = (core - multipliers @ blocks).square().sum()
        rests = (
            contrasts.to_deviations @ layer
            - (metric.to_deviations @ multipliers) @ blocks / scale**0.5
        )
        assert_close(inside, scale * (share * rests.square().sum(1)).sum(), rtol=1e-4, atol=1e-5)
        energy = scale * (share * (contrasts.to_deviations @ layer).square().sum(1)).sum()
        assert metric.energy([index]) == pytest.approx(float(energy), rel=1e-5)


def test_equal_weights_are_none():
    analysis = MadeUp(around_mean([1.0, 2.0, 3.0]))
    metric = Metric.of(analysis, recipe_with((4.0, 4.0, 4.0)))
    core, plain = metric.core(0).flatten(1), analysis.core(0).flatten(1)
    assert_close(core.mT @ core, plain.mT @ plain, rtol=1e-4, atol=1e-4)
    assert_close(metric.energies, Metric.of(analysis, recipe_with()).energies)


@pytest.mark.parametrize(
    "weights", [(0.0, 1.0, 1.0, 2.0), (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.0, 1.0)]
)
def test_checkpoints_that_do_not_count_leave_finite_numbers(weights):
    analysis = MadeUp(around_mean([1.0] * 4))
    metric = Metric.of(analysis, recipe_with(weights))
    assert float(metric.to_deviations.abs().max()) < 10
    core = metric.core(0).flatten(1).double()
    assert float(core.square().sum()) == pytest.approx(metric.energy([0]), rel=2e-3)
    counting = [c for c, weight in enumerate(weights) if weight]
    slices = analysis.core(0).flatten(1).double()
    deviations = (analysis.contrasts.to_deviations @ slices)[counting]
    assert_close((metric.to_deviations @ core)[counting], deviations, rtol=1e-4, atol=1e-4)


def test_relative_layers_count_by_weight_size():
    analysis = MadeUp(around_mean([1.0, 1.0]))
    metric = Metric.of(analysis, recipe_with(layer_weights="relative"))
    factors = scales(metric)
    assert_close(factors * analysis.weights, factors[:1].expand(3) * analysis.weights[0])
    plain = Metric.of(analysis, recipe_with())
    assert metric.energy(range(3)) == pytest.approx(plain.energy(range(3)))
    assert_close(metric.core(1), analysis.core(1) * factors[1].float().sqrt())


def test_output_layers_count_by_positions_too():
    analysis = MadeUp(around_mean([1.0, 1.0]))
    relative, output = (
        scales(Metric.of(analysis, recipe_with(layer_weights=weighting)))
        for weighting in ("relative", "output")
    )
    ratio = output / relative
    assert_close(
        ratio / ratio[0], torch.tensor([1.0, 4.0, 4 * 16.0]).double()
    )  # the last is an end


def test_without_differences_relative_layers_count_alike():
    analysis = MadeUp(around_mean([1.0, 1.0]))
    analysis.grams.zero_()
    factors = scales(Metric.of(analysis, recipe_with(layer_weights="relative")))
    assert_close(factors / factors[0], analysis.weights[0] / analysis.weights)


def test_tiny_layer_does_not_outweigh_all_others():
    analysis = MadeUp(around_mean([1.0, 1.0]))
    analysis.weights[:] = torch.tensor([4.0, 0.0, 1.0])
    factors = scales(Metric.of(analysis, recipe_with(layer_weights="relative")))
    usual = 5 / 3  # entries are as many everywhere
    assert_close(factors / factors[0], torch.tensor([1.0, 4 / (0.05**2 * usual), 4.0]).double())
    analysis.weights[:] = 0
    factors = scales(Metric.of(analysis, recipe_with(layer_weights="relative")))
    assert_close(factors, torch.ones(3).double())


# measured sensitivities


@pytest.fixture
def measured():
    """An analysis with measured sensitivities, and deviations that reach out of the bases."""
    analysis = MadeUp(around_mean([1.0, 2.0, 3.0]), outside=0.5)
    analysis.sensitivities = sensitivities()
    return analysis


def dense_metric(analysis, index):
    """Returns the dense roots of a layer's metric by its definition, but for a common factor.

    The geometric mean of the measured metric and of one over the size of the layer's weight.
    """
    layer = analysis.sensitivities[f"{index}"]
    scale = (layer.mean * layer.rest / float(analysis.weights[index])) ** 0.5
    return scale**0.5 * dense_root(layer.left, M), dense_root(layer.right, N)


def test_measured_layers_count_by_the_dense_metric(measured):
    metric = Metric.of(measured, recipe_with(layer_weights="output"))
    squares, cores = [], []
    for index in range(3):
        left, right = (basis.double() for basis in measured.bases(index))
        root_left, root_right = dense_metric(measured, index)
        rows = left @ measured.rows[index] @ right.mT
        stretched = (root_left @ rows @ root_right).flatten(1)
        rest = measured.sensitivities[f"{index}"]
        level = (rest.mean * rest.rest / float(measured.weights[index])) ** 0.5
        squares.append(stretched @ stretched.mT + 0.5 * level * torch.eye(3).double())
        cores.append(metric.core(index).flatten(1).double())
    grams = torch.stack(squares)
    factor = metric.grams[0, 0, 0] / grams[0, 0, 0]
    assert_close(metric.grams, grams * factor, rtol=1e-4, atol=1e-5)
    for core, gram in zip(cores, grams, strict=True):
        level = gram[:-1, :-1] * factor
        inside = core @ core.mT
        assert float((level - inside).diagonal().min()) > 0  # what lies outside
    assert metric.energies.sum() == pytest.approx(
        float(Metric.of(measured, recipe_with()).energies.sum())
    )


def test_blocks_come_back_from_the_metrics_coordinates(measured):
    metric = Metric.of(measured, recipe_with((1.0, 2.0, 4.0), "output"))
    for shape in ((P, Q), (3, 6)):  # the solver may work in the first columns alone
        between = metric.between(1, shape)
        up, down = normal(1, shape[0], 2).float(), normal(2, 2, shape[1]).float()
        mixed = metric.mixed(measured.core(1)[:, : shape[0], : shape[1]])
        left, right = (
            basis[:, :count].double() for basis, count in zip(measured.bases(1), shape, strict=True)
        )
        layer = metric.layers[1]
        wide = left @ (mixed.double() - (up @ down).double()) @ right.mT
        expected = float(layer.apply(wide).square().sum())
        stretched = between.apply_to_factors(up, down)
        rest = (metric.core(1, shape) - stretched[0] @ stretched[1]).double()
        assert float(rest.square().sum()) == pytest.approx(expected, rel=1e-4)
        back = between.undo(*stretched)
        assert_close(back[0] @ back[1], up @ down, rtol=1e-4, atol=1e-4)


def test_spectra_are_those_of_the_stretched_deviations(measured):
    metric = Metric.of(measured, recipe_with((1.0, 2.0, 4.0), "output"))
    deviations = measured.contrasts.to_deviations @ measured.core(2).flatten(1).double()
    share = torch.tensor([1.0, 2.0, 4.0]).double() * 3 / 7
    between = metric.between(2, (P, Q))
    for c in range(3):
        own = between.apply(share[c].sqrt() * deviations[c].view(P, Q))
        assert_close(
            metric.spectra[2].private[c], torch.linalg.svdvals(own).square(), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("choice", ["plain", "relative"])
def test_spectra_of_layers_without_directions_are_whole(choice):
    analysis = MadeUp(around_mean([1.0, 2.0, 3.0]))
    metric = replace(Metric.of(analysis, recipe_with(layer_weights=choice)), columns=2)
    deviations = analysis.contrasts.to_deviations @ analysis.core(1).flatten(1).double()
    scaled = metric.layers[1].scale ** 0.5 * deviations.view(3, P, Q)
    spectra = metric.spectra[1]
    assert_close(spectra.private, torch.linalg.svdvals(scaled).square(), rtol=1e-3, atol=1e-4)
    slices = metric.core(1).double()
    for values, unfolding in (
        (spectra.rows, slices.transpose(0, 1).flatten(1)),
        (spectra.columns, slices.transpose(1, 2).transpose(0, 1).flatten(1)),
    ):
        expected = torch.linalg.svdvals(unfolding).square()
        assert_close(values[: len(expected)], expected, rtol=1e-3, atol=1e-4)
    assert (len(spectra.rows), len(spectra.columns)) == (P, Q)


@pytest.mark.parametrize(
    ("weights", "choice", "alike"),
    [(None, "plain", True), ((1.0, 2.0, 4.0), "plain", False), (None, "relative", False)],
)
def test_all_counts_alike_where_nothing_is_weighed(weights, choice, alike):
    metric = Metric.of(MadeUp(around_mean([1.0, 2.0, 3.0])), recipe_with(weights, choice))
    assert metric.counts_alike is alike


def test_measured_directions_do_not_count_alike(measured):
    assert not Metric.of(measured, recipe_with(None, "output")).counts_alike


def test_checkpoints_may_count_alike_again(measured):
    metric = Metric.of(measured, recipe_with((1.0, 2.0, 4.0), "output"))
    alike = Metric.of(measured, recipe_with(None, "output"))
    again = metric.unweighted
    assert_close(again.core(0), alike.core(0))
    assert_close(again.directions, alike.directions)
    assert alike.unweighted is alike


def test_ends_that_are_averaged_leave_the_other_layers(measured):
    metric = Metric.of(measured, recipe_with(None, "output"))
    rest = metric.without_ends()
    assert len(rest.layers) == len(rest.grams) == len(rest.within) == 2
    assert_close(rest.core(1), metric.core(1))


def test_sensitivities_that_lack_a_layer_are_not_used(measured):
    by_layout = MadeUp(around_mean([1.0, 2.0, 3.0]), outside=0.5)
    expected = Metric.of(by_layout, recipe_with(layer_weights="output"))
    del measured.sensitivities["2"]  # of another version
    metric = Metric.of(measured, recipe_with(layer_weights="output"))
    assert_close(scales(metric), scales(expected))
    assert all(layer.is_plain for layer in metric.layers)


def test_a_layer_that_nothing_depends_on_counts_next_to_nothing(measured):
    dead = replace(measured.sensitivities["0"], mean=0.0, rest=1.0)
    measured.sensitivities["0"] = dead
    metric = Metric.of(measured, recipe_with(layer_weights="output"))
    assert 0 < metric.layers[0].scale < 1e-5 * metric.layers[1].scale
    assert torch.isfinite(metric.core(0)).all()


# whole merges


def dense(models, merged):
    """Returns by layer deviations (k, entries), blocks (R, entries), layer, the squared average."""
    base, states = load(merged.place.hyper_model), [load(path) for path in models]
    loras = [load_file(path) for path in merged.loras]
    for layer in layers_of(models[0]):
        weight = base[layer.key].double().flatten(1)
        blocks = [added(lora, layer.module).expand_as(weight).flatten() for lora in loras]
        deviations = [state[layer.key].double().flatten(1) - weight for state in states]
        stack = torch.stack(deviations).flatten(1)
        yield stack, torch.stack(blocks), layer, float(weight.square().sum())


def scale_of(layer, size, weighting):
    return {"plain": 1.0, "relative": 1 / size, "output": layer.positions / size}[weighting]


def best_multipliers(models, merged, part, weighting):
    """Solves the normal equations in float64, from the files on disk."""
    cross, gram = 0, 0
    for deviations, blocks, layer, size in dense(models, merged):
        if layer.part == part:
            scale = scale_of(layer, size, weighting)
            cross, gram = cross + scale * deviations @ blocks.T, gram + scale * blocks @ blocks.T
    return cross @ torch.linalg.inv(gram)


@pytest.mark.parametrize(
    "settings",
    [{"layer_weights": "plain"}, {"layer_weights": "relative"}, {"fit_weights": (5, 1, 1)}, {}],
)
def test_multipliers_minimise_the_requested_loss(files, tmp_path, settings):
    merged = merge(files, tmp_path, dtype="float32", **settings)
    asked = settings.get("layer_weights", "output")
    for part in ("unet", "text_encoder"):
        rows = [row.multipliers_of(part) for row in merged.report.checkpoints]
        expected = best_multipliers(files, merged, part, asked)
        assert_close(torch.tensor(rows).double(), expected, rtol=0, atol=2e-5)
        for other in {"plain", "relative", "output"} - {asked}:
            # all layers of a text encoder are applied to the same positions
            if part == "unet" or "plain" in (asked, other):
                another = best_multipliers(files, merged, part, other)
                assert float((expected - another).abs().max()) > 1e-4


def losses(merged):
    return torch.tensor([1 - row.explained for row in merged.report.checkpoints]).double()


def test_a_checkpoint_that_counts_more_comes_back_better(files, tmp_path, merged):
    first = merge(files, tmp_path, fit_weights=(8, 1, 1))
    assert losses(first)[0] < losses(merged)[0] - 0.01
    plain = merge(files, tmp_path, name="plain", layer_weights="plain")
    first = merge(files, tmp_path, name="first", layer_weights="plain", fit_weights=(8, 1, 1))
    energies = 0
    for deviations, *_ in dense(files, plain):
        energies = energies + deviations.square().sum(1)
    weighted = torch.tensor([8.0, 1.0, 1.0]).double() * energies
    assert (weighted * losses(first)).sum() < (weighted * losses(plain)).sum()
    assert plain.report.loss < first.report.loss


def test_checkpoint_of_no_weight_gets_no_ranks(files, tmp_path, merged):
    without_first = merge(files, tmp_path, fit_weights=(0, 1, 1))
    assert losses(without_first)[0] > losses(merged)[0]
    assert losses(without_first)[1:].sum() < losses(merged)[1:].sum()


def test_relative_layers_lower_the_relative_loss(files, tmp_path):
    merged = merge(files, tmp_path, name="relative", layer_weights="relative")
    plain = merge(files, tmp_path, layer_weights="plain")

    def relative(result):
        left, all_of_it = 0.0, 0.0
        for deviations, blocks, layer, size in dense(files, result):
            rows = [row.multipliers_of(layer.part) for row in result.report.checkpoints]
            rest = deviations - torch.tensor(rows).double() @ blocks
            left += float(rest.square().sum()) / size
            all_of_it += float(deviations.square().sum()) / size
        return left / all_of_it

    assert relative(merged) < 0.95 * relative(plain)
    assert plain.report.loss < merged.report.loss
    assert merged.report.weighted_loss == pytest.approx(relative(merged), rel=1e-3)
    assert plain.report.weighted_loss == pytest.approx(plain.report.loss, rel=1e-9)
