"""The one pass: streamed equals in memory, and each kind of tensor is treated as it should be."""

import pytest
import torch
from tiny_family import NORM, POSITION_IDS, QUERY, VAE, inputs_of, load, run_pass, write

from hyper_merge.analysis import streaming_pass
from hyper_merge.analysis.file_layout import UNCARRIED_KINDS
from hyper_merge.checkpoints.architectures.layout import Treatment
from hyper_merge.decomposition.contrasts import energies
from hyper_merge.errors import (
    NonFiniteError,
    RecipeError,
)

DTYPES = ("float16", "bfloat16", "float32")


def stacks(models):
    """Every tensor of all files in float64, (k, *shape)."""
    states = [load(path) for path in models]
    return {key: torch.stack([s[key].double() for s in states]) for key in states[0]}


def assert_average(averages, expected, dtype):
    """Requires one rounding to float32 and one to the stored type at most."""
    for key, mean in expected.items():
        if mean.is_floating_point():
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(
                averages[key].double(), mean, rtol=0.51 * eps + 3e-7, atol=4e-8, msg=key
            )
            assert averages[key].dtype == dtype


@pytest.fixture
def mixed(tmp_path, state_of):
    """One file of each type, the second one a .ckpt."""
    types = (torch.float16, torch.bfloat16, torch.float32)
    names = ("half.safetensors", "brain.ckpt", "single.safetensors")
    return [
        write(tmp_path / n, state_of(c, d))
        for c, (n, d) in enumerate(zip(names, types, strict=True))
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_streamed_average_is_the_mean_in_memory(files, dtype):
    inputs = inputs_of(files, dtype=dtype, vae="average")
    averages, _, _ = run_pass(inputs, width=None)
    means = {key: stack.mean(0) for key, stack in stacks(files).items() if key != POSITION_IDS}
    assert_average(averages, means, inputs.dtype)
    assert averages.keys() == inputs.outputs().keys()


def test_files_of_mixed_types_are_averaged(mixed):
    inputs = inputs_of(mixed, dtype="float32", vae="average")
    averages, layers, _ = run_pass(inputs)
    means = {key: stack.mean(0) for key, stack in stacks(mixed).items() if key != POSITION_IDS}
    assert_average(averages, means, torch.float32)
    assert len(layers) == len(inputs.layout.layers)


def test_weights_make_a_weighted_mean(files):
    weights = (1, 0, 3)
    averages, _, _ = run_pass(
        inputs_of(files, weights=weights, dtype="float32", vae="average"), None
    )
    shares = torch.tensor(weights).double() / 4
    means = {
        key: torch.tensordot(shares, stack, 1)
        for key, stack in stacks(files).items()
        if key != POSITION_IDS
    }
    assert_average(averages, means, torch.float32)


@pytest.mark.parametrize("base", [False, True], ids=["average", "base"])
def test_grams_and_cores_hold_the_deviations(files, base):
    models = files[1:] if base else files
    settings = {"base": str(files[0])} if base else {}
    inputs = inputs_of(models, **settings)
    averages, layers, _ = run_pass(inputs)
    dense = stacks(models)
    for index, layer in enumerate(inputs.layout.layers):
        stored = averages[layer.key].double()
        origin = load(files[0])[layer.key].double() if base else dense[layer.key].mean(0)
        analysis = layers[index]
        torch.testing.assert_close(
            energies(analysis.gram, inputs.contrasts),
            (dense[layer.key] - stored).flatten(1).square().sum(1),
            rtol=3e-5,
            atol=0,
        )
        left, right = analysis.compressed.left.double(), analysis.compressed.right.double()
        slices = left @ analysis.compressed.core.double() @ right.mT  # (d, m, n)
        deviations = torch.tensordot(inputs.contrasts.to_deviations, slices, 1)
        expected = (dense[layer.key] - origin).flatten(2 if stored.ndim == 4 else 1)
        expected = expected.reshape(len(models), layer.m, layer.n)
        error = (deviations - expected).norm() / expected.norm()
        assert float(error) < 3e-4, layer.key  # wide bases are rounded to float16


def test_narrow_bases_keep_projection_and_energy(files):
    inputs = inputs_of(files)
    averages, layers, _ = run_pass(inputs, width=6)
    dense = stacks(files)
    for index, layer in enumerate(inputs.layout.layers):
        analysis = layers[index]
        left, right = analysis.compressed.left.double(), analysis.compressed.right.double()
        assert left.shape[1] <= 6
        assert right.shape[1] <= 6
        mean = dense[layer.key].mean(0)
        deviations = (dense[layer.key] - mean).reshape(3, layer.m, layer.n)
        slices = torch.tensordot(inputs.contrasts.to_deviations.mT, deviations, 1)
        expected = left.mT @ slices @ right
        error = (analysis.compressed.core.double() - expected).norm() / expected.norm()
        assert float(error) < 1e-4, layer.key
        assert float(expected.norm()) < (1 + 1e-3) * float(deviations.norm())
        torch.testing.assert_close(
            energies(analysis.gram, inputs.contrasts),
            (dense[layer.key] - averages[layer.key].double()).flatten(1).square().sum(1),
            rtol=3e-5,
            atol=0,
        )


def test_energy_outside_layers_is_counted_by_kind(files):
    inputs = inputs_of(files)
    averages, _, outside = run_pass(inputs)
    assert set(outside) <= set(UNCARRIED_KINDS)
    expected = dict.fromkeys(outside, 0)
    for key, stack in stacks(files).items():
        treatment = inputs.layout.treatments[key]
        if treatment in (Treatment.AVERAGE, Treatment.VAE):
            kind = streaming_pass.kind_of_tensor(key, inputs.layout)
            distance = stack - averages[key].double()
            expected[kind] = expected[kind] + distance.flatten(1).square().sum(1)
    for kind, energy in expected.items():
        torch.testing.assert_close(outside[kind], energy, rtol=1e-5, atol=1e-12)


def test_first_vae_is_kept_with_its_distances(files):
    averages, _, outside = run_pass(inputs_of(files), None)
    dense = stacks(files)
    assert torch.equal(averages[VAE], load(files[0])[VAE])
    distances = sum(
        (stack - stack[0]).flatten(1).square().sum(1)
        for key, stack in dense.items()
        if key.startswith("first_stage_model.")
    )
    assert float(distances[1]) > 0
    torch.testing.assert_close(outside["VAE"], distances, rtol=1e-5, atol=1e-12)


def test_with_a_base_everything_is_measured_from_it(files):
    inputs = inputs_of(files[1:], base=str(files[0]))
    averages, _, outside = run_pass(inputs)
    for key in (QUERY, NORM, VAE):
        assert torch.equal(averages[key], load(files[0])[key])
    dense = stacks(files)
    distance = sum(
        (stack[1:] - stack[0]).flatten(1).square().sum(1)
        for key, stack in dense.items()
        if key.startswith("first_stage_model.")
    )
    torch.testing.assert_close(outside["VAE"], distance, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_equal_checkpoints_average_to_themselves_bit_for_bit(tmp_path, state_of, dtype):
    state = state_of(0, dtype)
    models = [write(tmp_path / f"{name}.safetensors", state) for name in "xyz"]
    name = str(dtype).removeprefix("torch.")
    for weights in (None, (1, 2, 4)):
        averages, layers, outside = run_pass(inputs_of(models, dtype=name, weights=weights))
        assert all(torch.equal(averages[key], tensor) for key, tensor in state.items())
        assert all(float(layer.gram.abs().max()) == 0 for layer in layers.values())
        assert all(float(layer.compressed.core.abs().max()) == 0 for layer in layers.values())
        assert all(float(energy.abs().max()) == 0 for energy in outside.values())


def test_position_ids_are_remade_and_leftovers_dropped(tmp_path, state_of):
    models = []
    for c, name in enumerate("ab"):
        state = state_of(c) | {
            POSITION_IDS: torch.full((1, 77), 3.4),
            "model_ema.decay": torch.tensor(0.9),
            "model_ema.diffusion_modelinput_blocks00weight": torch.ones(3),
            "alphas_cumprod": torch.rand(1000).half(),
            "betas": torch.full((1000,), float(c)),
            "v_pred": torch.empty(0),
        }
        models.append(write(tmp_path / f"{name}.safetensors", state))
    averages, _, _ = run_pass(inputs_of(models), None)
    ids = averages[POSITION_IDS]
    assert ids.dtype == torch.int64
    assert torch.equal(ids, torch.arange(77).expand(1, 77))
    assert not [key for key in averages if key.startswith("model_ema")]
    assert "alphas_cumprod" not in averages
    assert torch.equal(averages["betas"], torch.zeros(1000))
    assert averages["v_pred"].numel() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [QUERY, NORM, VAE])
def test_tensor_with_nan_or_infinity_is_refused(tmp_path, files, state_of, bad, key):
    state = state_of(1)
    state[key] = state[key].clone()
    state[key].view(-1)[3] = bad
    spoilt = write(tmp_path / "spoilt.safetensors", state)
    with pytest.raises(NonFiniteError) as caught:
        run_pass(inputs_of([files[0], spoilt]))
    assert str(caught.value) == (
        f"spoilt.safetensors holds NaN or infinity in 1 of {state[key].numel()} values of {key};"
        " use an undamaged copy of the file, or leave it out"
    )


def test_average_beyond_float16_is_refused(tmp_path, state_of):
    models = []
    for c, name in enumerate("ab"):
        state = state_of(c, torch.float32)
        state[NORM] = state[NORM] + 1e5
        models.append(write(tmp_path / f"{name}.safetensors", state))
    with pytest.raises(RecipeError, match="too large for float16; choose dtype bfloat16 or"):
        run_pass(inputs_of(models), None)
    run_pass(inputs_of(models, dtype="bfloat16"), None)
