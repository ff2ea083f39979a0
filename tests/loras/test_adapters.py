"""Factors of every kind of adapter multiply to what its definition says, entry by entry."""

import numpy as np
import pytest
import torch

from hyper_merge.loras.adapters import matrix_factors, matrix_shape

RNG = np.random.default_rng(0)


def random(*shape):
    return RNG.standard_normal(shape)


def lora():
    up, down = random(6, 3), random(3, 5)
    return {"up": up, "down": down}, up @ down, 3, 3


def convolution():
    up, down = random(6, 3, 1, 1), random(3, 4, 2, 2)
    dense = np.einsum("ma,aihw->mihw", up[:, :, 0, 0], down).reshape(6, -1)
    return {"up": up, "down": down}, dense, 3, 3


def tucker():
    up, down, mid = random(6, 3, 1, 1), random(2, 4, 1, 1), random(3, 2, 2, 3)
    dense = np.zeros((6, 4, 2, 3))
    for a in range(3):
        for b in range(2):
            sides = np.outer(up[:, a, 0, 0], down[b, :, 0, 0])
            dense += sides[:, :, None, None] * mid[a, b]
    return {"up": up, "down": down, "mid": mid}, dense.reshape(6, -1), 3, 2


def whole():
    change = random(4, 3, 2, 2)
    return {"whole": change}, change.reshape(4, -1), 4, None


def loha(a=2, b=3, m=20, n=15):
    parts = {"w1_a": random(m, a), "w1_b": random(a, n), "w2_a": random(m, b), "w2_b": random(b, n)}
    dense = (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"])
    return parts, dense, min(a * b, m, n), a


def loha_of_high_rank():
    return loha(4, 5, 12, 9)


def loha_with_core():
    parts = {f"w{i}_{side}": random(2, 5 if side == "a" else 4) for i in (1, 2) for side in "ab"}
    parts |= {"t1": random(2, 2, 3, 3), "t2": random(2, 2, 3, 3)}
    one, two = (
        np.einsum("ijkl,jr,ip->prkl", parts[f"t{i}"], parts[f"w{i}_b"], parts[f"w{i}_a"])
        for i in (1, 2)
    )
    return parts, (one * two).reshape(5, -1), 4, 2


def lokr():
    parts = {"k_w1": random(2, 3), "k_w2_a": random(10, 2), "k_w2_b": random(2, 8)}
    return parts, np.kron(parts["k_w1"], parts["k_w2_a"] @ parts["k_w2_b"]), 4, 2


def lokr_of_two_products():
    parts = {
        "k_w1_a": random(4, 1),
        "k_w1_b": random(1, 4),
        "k_w2_a": random(6, 2),
        "k_w2_b": random(2, 5),
    }
    one, two = parts["k_w1_a"] @ parts["k_w1_b"], parts["k_w2_a"] @ parts["k_w2_b"]
    return parts, np.kron(one, two), 2, 2


def lokr_whole():
    parts = {"k_w1": random(2, 2), "k_w2": random(3, 4, 2, 2)}
    dense = np.kron(parts["k_w1"][:, :, None, None], parts["k_w2"])
    return parts, dense.reshape(6, -1), 6, None


def lokr_with_core():
    parts = {
        "k_w1": random(2, 3),
        "k_t2": random(2, 2, 3, 3),
        "k_w2_a": random(2, 5),
        "k_w2_b": random(2, 4),
    }
    core = np.einsum("ijkl,jr,ip->prkl", parts["k_t2"], parts["k_w2_b"], parts["k_w2_a"])
    dense = np.kron(parts["k_w1"][:, :, None, None], core)
    return parts, dense.reshape(10, -1), 4, 2


KINDS = (
    *(lora, convolution, tucker, whole, loha, loha_of_high_rank, loha_with_core),
    *(lokr, lokr_of_two_products, lokr_whole, lokr_with_core),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_factors_are_exactly_the_matrix(kind):
    parts, dense, rank, divisor = kind()
    shape = matrix_shape({role: part.shape for role, part in parts.items()})
    up, down = matrix_factors({role: torch.tensor(part) for role, part in parts.items()})
    np.testing.assert_allclose((up @ down).numpy(), dense, atol=1e-12)
    assert (shape.m, shape.n, shape.rank, shape.divisor) == (*dense.shape, rank, divisor)
    assert np.linalg.matrix_rank(dense) <= shape.rank
    assert up.shape[1] >= shape.rank


@pytest.mark.parametrize(
    "shapes",
    [
        {"up": (6, 3)},
        {"up": (6, 3), "down": (2, 5)},
        {"up": (6,), "down": (6,)},
        {"up": (6, 0), "down": (0, 5)},
        {"up": (6, 3, 1, 1), "down": (2, 4, 1, 1), "mid": (3, 3, 2, 2)},
        {"up": (6, 3, 1, 1), "down": (2, 4, 3, 3), "mid": (3, 2, 3, 3)},
        {"up": (6, 3), "down": (3, 5), "w1_a": (6, 3)},
        {"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (6, 2)},
        {"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (6, 2), "w2_b": (2, 4)},
        {"w1_a": (6, 2), "w1_b": (3, 5), "w2_a": (6, 2), "w2_b": (2, 5)},
        {"k_w1": (2, 2)},
        {"k_w1": (2, 2), "k_w1_a": (2, 1), "k_w1_b": (1, 2), "k_w2": (3, 3)},
        {"k_w1": (2, 2), "k_w2_a": (3, 2), "k_w2_b": (3, 3)},
        {"alpha": ()},
        {"whole": (3,)},
        {"up": (6, 3, 1, 1), "down": (2, 4, 1, 1), "mid": (3, 2, 3)},
        {"up": (6, 3, 1, 1), "down": (2, 4, 1, 1), "mid": (3, 2, 3, 3, 1)},
        {"up": (6, 3, 1, 1), "down": (0, 4, 1, 1), "mid": (3, 0, 3, 3)},
        {**{f"w{i}_{side}": (2, 5) for i in "12" for side in "ab"}, "t1": (2, 2), "t2": (2, 2)},
        {
            **{f"w{i}_{side}": (2, 5) for i in "12" for side in "ab"},
            **{f"t{i}": (2, 2, 3, 3, 1) for i in "12"},
        },
        {"k_w1": (4,), "k_w2": (2, 2)},
        {"k_w1": (2, 2), "k_w2_a": (3, 2), "k_w2_b": (2,)},
        {"k_w1": (2, 2), "k_w2_a": (2, 3), "k_w2_b": (2, 3), "k_t2": (2, 2, 3, 3, 1)},
        {"k_w1": (2, 2), "k_w2_a": (2, 3), "k_w2_b": (0, 3), "k_t2": (2, 0, 3, 3)},
        {"whole": (3, 3), "up": (3, 1)},
    ],
    ids=str,
)
def test_what_makes_no_matrix_has_no_shape(shapes):
    assert matrix_shape(shapes) is None
