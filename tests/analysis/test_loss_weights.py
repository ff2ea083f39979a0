"""Checkpoints and layers that count more are fitted better, by exactly the loss that is asked for."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_family import added, layers_of, load, merge
from torch.testing import assert_close

from hyper_merge.analysis.loss_weights import make_loss_weights
from hyper_merge.decomposition.contrasts import around_base, around_mean


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def made_up(contrasts, seed=0, layers=3, size=40):
    """Returns slices of some layers, and an analysis that knows their inner products."""
    slices = normal(seed, layers, contrasts.dimensions, size)
    grams = torch.zeros(layers, contrasts.dimensions + 1, contrasts.dimensions + 1).double()
    grams[:, :-1, :-1] = slices @ slices.mT
    weights = torch.arange(1.0, layers + 1, dtype=torch.float64) ** 2
    shapes = [
        SimpleNamespace(m=5, n=size // 5, positions=4**place, module=f"{place}", is_end=False)
        for place in range(layers)
    ]
    return slices, SimpleNamespace(
        grams=grams, contrasts=contrasts, weights=weights, layers=shapes, sensitivities=None
    )


def recipe_with(fit_weights=None, layer_weights="plain"):
    return SimpleNamespace(fit_weights=fit_weights, layer_weights=layer_weights)


def test_plainly_nothing_is_changed():
    slices, analysis = made_up(around_mean([1.0, 2.0, 3.0]))
    loss_weights = make_loss_weights(analysis, recipe_with())
    core = slices[0].view(2, 5, 8)
    assert loss_weights.core(0, core) is core
    assert loss_weights.to_deviations is analysis.contrasts.to_deviations
    assert loss_weights.layers.tolist() == [1, 1, 1]
    assert loss_weights.energy([0, 2]) == pytest.approx(float(slices[[0, 2]].square().sum()))


@given(
    st.lists(st.floats(0.01, 100), min_size=2, max_size=6), st.booleans(), st.integers(0, 99),
    st.sampled_from(["plain", "relative", "output"]),
)  # fmt: skip
def test_loss_of_weighted_slices_is_the_weighted_loss(weights, based, seed, layered):
    k = len(weights)
    contrasts = around_base(k) if based else around_mean(normal(seed, k).abs().tolist())
    slices, analysis = made_up(contrasts, seed)
    loss_weights = make_loss_weights(analysis, recipe_with(tuple(weights), layered))
    multipliers = normal(seed + 1, contrasts.dimensions, 2)  # as the solver finds them
    share = torch.tensor(weights).double() * k / sum(weights)
    for index, layer in enumerate(slices):
        blocks = normal(seed + 2 + index, 2, layer.shape[1])
        scale = loss_weights.layers[index]
        core = loss_weights.core(index, layer.view(-1, 5, 8)).flatten(1)
        inside = (core - multipliers @ blocks).square().sum()
        unweighted = blocks / scale.sqrt()
        rests = (
            contrasts.to_deviations @ layer
            - (loss_weights.to_deviations @ multipliers) @ unweighted
        )
        dense = scale * (share * rests.square().sum(1)).sum()
        assert_close(inside, dense, rtol=1e-6, atol=1e-9)
        energy = scale * (share * (contrasts.to_deviations @ layer).square().sum(1)).sum()
        assert loss_weights.energy([index]) == pytest.approx(float(energy), rel=1e-6)


def test_equal_weights_are_none():
    slices, analysis = made_up(around_mean([1.0, 2.0, 3.0]))
    loss_weights = make_loss_weights(analysis, recipe_with((4.0, 4.0, 4.0)))
    core = loss_weights.core(0, slices[0].view(2, 5, 8)).flatten(1)
    assert_close(core.mT @ core, slices[0].mT @ slices[0])
    assert_close(loss_weights.energies, slices.square().sum((1, 2)))


@pytest.mark.parametrize(
    "weights", [(0.0, 1.0, 1.0, 2.0), (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.0, 1.0)]
)
def test_checkpoints_that_do_not_count_leave_finite_numbers(weights):
    slices, analysis = made_up(around_mean([1.0] * 4))
    loss_weights = make_loss_weights(analysis, recipe_with(weights))
    assert float(loss_weights.to_deviations.abs().max()) < 10
    core = loss_weights.core(0, slices[0].view(3, 5, 8)).flatten(1)
    assert float(core.square().sum()) == pytest.approx(loss_weights.energy([0]))
    counting = [c for c, weight in enumerate(weights) if weight]
    deviations = (analysis.contrasts.to_deviations @ slices[0])[counting]
    assert_close((loss_weights.to_deviations @ core)[counting], deviations)


def test_relative_layers_count_by_weight_size():
    slices, analysis = made_up(around_mean([1.0, 1.0]))
    loss_weights = make_loss_weights(analysis, recipe_with(layer_weights="relative"))
    assert_close(
        loss_weights.layers * analysis.weights,
        loss_weights.layers[:1].expand(3) * analysis.weights[0],
    )
    assert float(loss_weights.energies.sum()) == pytest.approx(float(slices.square().sum()))
    core = loss_weights.core(1, slices[1].view(1, 5, 8))
    assert_close(core, slices[1].view(1, 5, 8) * loss_weights.layers[1].sqrt())


def test_output_layers_count_by_positions_too():
    _, analysis = made_up(around_mean([1.0, 1.0]))
    relative, output = (
        make_loss_weights(analysis, recipe_with(layer_weights=weighting)).layers
        for weighting in ("relative", "output")
    )
    ratio = output / relative
    assert_close(ratio / ratio[0], torch.tensor([1.0, 4.0, 16.0]).double())


def test_output_layers_count_by_measured_sensitivities():
    _, analysis = made_up(around_mean([1.0, 1.0]))
    by_layout = make_loss_weights(analysis, recipe_with(layer_weights="output")).layers
    analysis.sensitivities = {"0": 3.0, "1": 1.0, "2": 0.5, "of_another_layer": 9.0}
    measured = make_loss_weights(analysis, recipe_with(layer_weights="output")).layers
    relative = make_loss_weights(analysis, recipe_with(layer_weights="relative")).layers
    expected = (torch.tensor([3.0, 1.0, 0.5]).double() * relative).sqrt()
    assert_close(measured / measured[1], expected / expected[1])
    del analysis.sensitivities["2"]  # of another version: it cannot be used
    again = make_loss_weights(analysis, recipe_with(layer_weights="output")).layers
    assert_close(again, by_layout)


def test_without_differences_relative_layers_count_alike():
    _, analysis = made_up(around_mean([1.0, 1.0]))
    analysis.grams.zero_()
    assert make_loss_weights(analysis, recipe_with(layer_weights="relative")).layers.tolist() == [
        1,
        1,
        1,
    ]


def test_tiny_layer_does_not_outweigh_all_others():
    _, analysis = made_up(around_mean([1.0, 1.0]))
    analysis.weights[:] = torch.tensor([4.0, 0.0, 1.0])
    factors = make_loss_weights(analysis, recipe_with(layer_weights="relative")).layers
    usual = 5 / 3  # entries are as many everywhere
    assert_close(factors / factors[0], torch.tensor([1.0, 4 / (0.05**2 * usual), 4.0]).double())
    analysis.weights[:] = 0
    factors = make_loss_weights(analysis, recipe_with(layer_weights="relative")).layers
    assert_close(factors, torch.ones(3).double())


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
