"""A checkpoint with LoRAs is the checkpoint and what dense numpy adds; all else is the same bits."""

import json

import numpy as np
import pytest
import torch
from lora_files import factors as full_factors
from lora_files import kohya as full_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_family import layers_of

from hyper_merge.errors import CheckpointError, NonFiniteError, OutputError
from hyper_merge.operations.loras.apply import run_apply
from hyper_merge.operations.loras.request import ApplyRequest
from hyper_merge.runtime.progress import Progress

RANK = 2


@pytest.fixture
def checkpoint(tmp_path, state_of):
    def make(name="model", dtype=torch.float16, **changed):
        state = {**state_of(0, dtype), **changed}
        path = tmp_path / f"{name}.safetensors"
        save_file(state, path)
        return path

    return make


def write_tiny(path, layers, seed, size=0.05):
    """Writes a LoRA for a checkpoint's layers; returns the path, and what it adds by module."""
    generator = np.random.default_rng(seed)
    state, changes = {}, {}
    for layer in layers:
        up = (generator.standard_normal((layer.m, RANK)) * size).astype("f2")
        down = generator.standard_normal((RANK, layer.n)).astype("f2")
        state[f"{layer.module}.lora_up.weight"] = torch.tensor(up).reshape(layer.up_shape(RANK))
        state[f"{layer.module}.lora_down.weight"] = torch.tensor(down).reshape(
            layer.down_shape(RANK)
        )
        state[f"{layer.module}.alpha"] = torch.tensor(1.0)
        changes[layer.module] = up.astype("f8") @ down.astype("f8") / RANK
    save_file(state, path)
    return path, changes


def apply(checkpoint, *loras, **settings):
    return run_apply(
        ApplyRequest(loras=tuple(loras), checkpoint=checkpoint, **settings), Progress()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("subtract", [False, True])
def test_weights_are_those_of_the_sum(tmp_path, checkpoint, dtype, subtract):
    model = checkpoint(dtype=dtype)
    layers = layers_of(model, ends=True)
    one, first = write_tiny(tmp_path / "one.safetensors", layers, 0)
    two, second = write_tiny(tmp_path / "two.safetensors", layers[:3], 1)
    result = apply(model, one, two, multipliers=(0.5, -2.0), subtract=subtract)
    before, after = load_file(model), load_file(result.path)
    assert before.keys() == after.keys()
    sign = -1 if subtract else 1
    changed = {layer.key: layer for layer in layers}
    norms = [0.0, 0.0]
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        if key not in changed:
            assert torch.equal(after[key], tensor)
            continue
        module = changed[key].module
        change = sign * (0.5 * first[module] - 2 * second.get(module, 0.0))
        exact = tensor.double().numpy() + change.reshape(tensor.shape)
        spacing = torch.finfo(dtype).eps * np.abs(exact).max()
        assert np.abs(after[key].double().numpy() - exact).max() <= spacing
        norms[0] += float((tensor.double().numpy() ** 2).sum())
        norms[1] += float((change**2).sum())
    assert result.layers == len(layers)
    assert result.changed == pytest.approx((norms[1] / norms[0]) ** 0.5, rel=1e-3)


def test_subtracting_takes_back_what_was_added(tmp_path, checkpoint):
    model = checkpoint(dtype=torch.float32)
    lora, _ = write_tiny(tmp_path / "one.safetensors", layers_of(model), 0)
    added = apply(model, lora, to=tmp_path / "added.safetensors")
    back = apply(added.path, lora, subtract=True, to=tmp_path / "back.safetensors")
    before, after = load_file(model), load_file(back.path)
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, atol=1e-6, rtol=1e-5)


def test_eight_bit_floats_stay_such(tmp_path, checkpoint, state_of):
    key = layers_of(checkpoint())[0].key
    model = checkpoint(**{key: state_of(0)[key].to(torch.float8_e4m3fn)})
    (layer,) = [layer for layer in layers_of(model) if layer.key == key]
    lora, changes = write_tiny(tmp_path / "one.safetensors", [layer], 0)
    after = load_file(apply(model, lora).path)
    assert after[key].dtype == torch.float8_e4m3fn
    exact = load_file(model)[key].float().double().numpy() + changes[layer.module].reshape(
        layer.shape
    )
    error = np.abs(after[key].float().double().numpy() - exact)
    assert error.max() <= np.abs(exact).max() / 15 + 2**-9
    huge, _ = write_tiny(tmp_path / "two.safetensors", [layer], 0, size=900.0)
    with pytest.raises(NonFiniteError, match="float8_e4m3fn cannot hold"):
        apply(model, huge)


def test_the_file_says_where_it_comes_from(tmp_path, checkpoint):
    model = checkpoint()
    lora, _ = write_tiny(tmp_path / "one.safetensors", layers_of(model), 0)
    result = apply(model, lora, multipliers=(0.25,))
    assert result.path == tmp_path / "model-plus-one.safetensors"
    with safe_open(result.path, "pt") as file:
        metadata = file.metadata()
    (entry,) = json.loads(metadata["hyper_merge.loras"])
    assert (entry["name"], entry["multiplier"], len(entry["sha256"])) == (
        "one.safetensors",
        0.25,
        64,
    )
    (parent,) = json.loads(metadata["sd_merge_models"]).values()
    assert parent["name"] == "model.safetensors"
    assert "hyper_merge.average_id" not in metadata


def test_what_does_not_go_together_is_refused_before_any_work(tmp_path, checkpoint):
    model = checkpoint()
    wide = tmp_path / "wide.safetensors"
    save_file({k: x.contiguous() for k, x in full_kohya(full_factors(2)).items()}, wide)
    with pytest.raises(CheckpointError, match=r"wide\.safetensors has lora_"):
        apply(model, wide)
    lora, _ = write_tiny(tmp_path / "one.safetensors", layers_of(model), 0)
    with pytest.raises(CheckpointError):
        apply(lora, lora)
    with pytest.raises(CheckpointError, match="no tensor of a LoRA"):
        apply(model, model)
    with pytest.raises(OutputError):
        apply(model, lora, to=model, overwrite=True)
    apply(model, lora)
    with pytest.raises(OutputError, match="exists"):
        apply(model, lora)


def test_too_large_values_leave_nothing_behind(tmp_path, checkpoint):
    model = checkpoint()
    lora, _ = write_tiny(tmp_path / "one.safetensors", layers_of(model), 0, size=50.0)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NonFiniteError, match="float16 cannot hold"):
        apply(model, lora, multipliers=(1e6,))
    assert sorted(tmp_path.iterdir()) == before
