"""Private LoRAs of the same bytes, by dense truncated SVDs, against what the merge reports and makes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_family import layers_of, load, merge, write

from hyper_merge.solver import solve

LEAST = 0.05  # of a weight's usual entries, in the relative metric


def factor_bytes(merged):
    tensors = (load_file(path) for path in merged.loras)
    return sum(t.nbytes for part in tensors for key, t in part.items() if ".lora_" in key)


def header_bytes(merged):
    """Returns the mean bytes of a file's metadata, and of a module's tensors in its header."""
    texts, entries = [], []
    for path in merged.loras:
        content = path.read_bytes()
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        tensors = json.loads(header)
        texts.append(len(json.dumps(tensors.pop("__metadata__"), separators=(",", ":"))))
        entries.append(3 * (len(header) - texts[-1]) / len(tensors))
    return np.mean(texts), np.mean(entries)


def private_loss(models, merged, checkpoints, budget, entry=0.0):
    """Returns the weighted loss of the best private LoRAs of these bytes, rank by rank.

    Each layer of each LoRA takes an entry's bytes in addition.
    """
    layers, base = layers_of(models[0]), load(merged.place.hyper_model)
    states = [load(path) for path in models]
    weights = [base[layer.key].double().flatten(1).numpy() for layer in layers]
    usual = sum((w**2).sum() for w in weights) / sum(w.size for w in weights)
    items, total = [], 0.0
    for layer, weight in zip(layers, weights, strict=True):
        factor = 1 / max((weight**2).sum(), LEAST**2 * usual * weight.size)
        for state, count in zip(states, checkpoints, strict=True):
            deviation = state[layer.key].double().flatten(1).numpy() - weight
            gains = factor * count * np.linalg.svd(deviation, compute_uv=False) ** 2
            total += gains.sum()
            costs = [2 * (layer.m + layer.n)] * len(gains)
            costs[0] += entry
            items += zip(gains, costs, strict=True)
    left = total
    for gain, cost in sorted(items, key=lambda item: -item[0] / item[1]):
        if cost > budget:
            break
        budget, left = budget - cost, left - gain
    return left / total


@pytest.mark.parametrize("checkpoints", [(1, 1, 1), (4, 2, 1)], ids=str)
def test_private_loras_are_counted_as_the_loss_counts(files, tmp_path, checkpoints):
    report = (
        merged := merge(files, tmp_path, fit_weights=checkpoints, layer_weights="relative")
    ).report
    expected = private_loss(files, merged, checkpoints, factor_bytes(merged))
    assert report.weighted_private_loss == pytest.approx(expected, rel=0.02)
    assert report.weighted_bound < min(report.weighted_loss, report.weighted_private_loss)


@pytest.fixture(scope="module")
def unlike(tmp_path_factory, state_of):
    """Three checkpoints that share nothing, with steep spectra and unlike energies."""
    folder, rng = tmp_path_factory.mktemp("unlike"), torch.Generator().manual_seed(1)

    def state(size):
        changed = state_of(0)
        for key, tensor in changed.items():
            if tensor.ndim < 2 or not tensor.is_floating_point():
                continue
            matrix = tensor.flatten(1).float()
            left, _, right = torch.linalg.svd(
                torch.randn(matrix.shape, generator=rng), full_matrices=False
            )
            values = torch.arange(1, len(right) + 1) ** -1.2 * size * matrix.norm()
            changed[key] = (matrix + (left * values) @ right).view(tensor.shape).half()
        return changed

    sizes = {"a": 0.05, "b": 0.06, "c": 0.08}
    return [write(folder / f"{n}.safetensors", state(size)) for n, size in sizes.items()]


@pytest.mark.parametrize("budget", [60_000, 120_000, 250_000])
def test_a_budget_is_used_no_worse_than_by_private_loras(unlike, tmp_path, budget):
    merged = merge(unlike, tmp_path, ranks=(1,), budget=budget, iterations=10)
    metadata, entry = header_bytes(merged)
    left = budget - 3 * metadata
    assert merged.report.weighted_loss < private_loss(unlike, merged, (1, 1, 1), left, entry)


def test_lists_of_a_lora_per_checkpoint_are_no_worse_than_private_ones(unlike, tmp_path):
    merged = merge(unlike, tmp_path, ranks=(5, 4, 3), iterations=10)
    bytes_of_factors = factor_bytes(merged)
    assert merged.report.weighted_loss < private_loss(unlike, merged, (1, 1, 1), bytes_of_factors)


def test_private_loras_save_a_solve_that_began_badly(unlike, tmp_path, monkeypatch):
    def one_direction(problem, *_args):
        return torch.ones(problem.shape, dtype=torch.float64)

    monkeypatch.setattr(solve, "best_start", one_direction)
    merged = merge(unlike, tmp_path, ranks=(2, 2, 2), iterations=1)
    bytes_of_factors = factor_bytes(merged)
    assert merged.report.weighted_loss < private_loss(unlike, merged, (1, 1, 1), bytes_of_factors)
