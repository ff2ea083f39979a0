"""Turns the tensors of one module into factors whose product is exactly what hosts add.

A LoRA is `up @ down`, with a `mid` between them for convolutions (Tucker); a LoHa is the product,
entry by entry, of two such matrices, a LoKr a Kronecker product. All are matrices, of a rank that the
shapes tell. Source: the loaders of LyCORIS, A1111 and ComfyUI, which agree in this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_merge.checkpoints.io.header import Shape

Shapes = Mapping[str, Shape]  # by what the tensors are, see `SpelledModule`
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class MatrixShape:
    """The size of a module's matrix, the most rank that it has, and the rank by which alpha is divided."""

    m: int
    n: int
    rank: int
    divisor: int | None  # None: there is no scale


def matrix_shape(shapes: Shapes) -> MatrixShape | None:
    """Returns the size of the matrix that tensors of these shapes make; None where they make none."""
    roles = set(shapes) - {"alpha"}
    try:
        if roles == {"whole"}:
            return _whole_shape(shapes)
        if roles in ({"up", "down"}, {"up", "down", "mid"}):
            return _lora_shape(shapes)
        if {"w1_a", "w1_b", "w2_a", "w2_b"} <= roles <= {*_LOHA}:
            return _loha_shape(shapes)
        if roles and roles <= {*_LOKR}:
            return _lokr_shape(shapes)
    except (IndexError, KeyError, ValueError):  # too few dimensions, or a half is missing
        return None
    return None


def matrix_factors(tensors: Tensors) -> tuple[Tensor, Tensor]:  # (m, r), (r, n)
    """Returns factors of the matrix that a module's tensors make, without its scale."""
    if "whole" in tensors:
        return _thin(tensors["whole"].flatten(1))
    if "up" in tensors:
        return _lora_factors(tensors)
    return _loha_factors(tensors) if "w1_a" in tensors else _lokr_factors(tensors)


_LOHA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_LOKR = ("k_w1", "k_w1_a", "k_w1_b", "k_w2", "k_w2_a", "k_w2_b", "k_t2")


def _thin(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a matrix as its product with the identity, on the shorter side."""
    m, n = matrix.shape
    if n <= m:
        return matrix, torch.eye(n, dtype=matrix.dtype)
    return torch.eye(m, dtype=matrix.dtype), matrix


def _whole_shape(shapes: Shapes) -> MatrixShape:
    m, n = _sides(shapes["whole"])
    return MatrixShape(m, n, min(m, n), None)


def _sides(shape: Shape) -> tuple[int, int]:
    """Returns rows and columns of a tensor whose later dimensions are taken together."""
    m, n, *kernel = shape
    return m, math.prod((n, *kernel))


def _lora_shape(shapes: Shapes) -> MatrixShape | None:
    up, down = shapes["up"], shapes["down"]
    inner, area = math.prod(up[1:]), 1
    if "mid" in shapes:
        left, right, *kernel = shapes["mid"]
        if (inner, math.prod(down[2:])) != (left, 1) or right != down[0]:
            return None
        area = _area(kernel, right)
    elif inner != down[0]:
        return None
    if min(len(up), len(down)) < 2 or not inner:
        return None
    n = math.prod(down[1:]) * area
    return MatrixShape(up[0], n, min(inner, up[0], n), down[0])


def _area(kernel: Sequence[int], rank: int) -> int:
    """Returns the entries of a core's kernel.

    Raises:
        ValueError: it is not that of a convolution of images, or stands between no factors.
    """
    height, width = kernel
    if not rank:
        raise ValueError
    return height * width


def _lora_factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    up, down = tensors["up"].flatten(1), tensors["down"].flatten(1)
    if "mid" in tensors:
        return up, torch.einsum("abhw,bi->aihw", tensors["mid"], down).flatten(1)
    return up, down


def _loha_shape(shapes: Shapes) -> MatrixShape | None:
    sides = [_loha_side(shapes, number) for number in ("1", "2")]
    if sides[0][:2] != sides[1][:2] or ("t1" in shapes) != ("t2" in shapes):
        return None
    m, n, rank = sides[0][0], sides[0][1], sides[0][2] * sides[1][2]
    divisor = shapes["w1_b"][0]
    return MatrixShape(m, n, min(rank, m, n), divisor) if rank else None


def _loha_side(shapes: Shapes, number: str) -> tuple[int, int, int]:  # m, n, rank
    a, b = shapes[f"w{number}_a"], shapes[f"w{number}_b"]
    core = shapes.get(f"t{number}")
    if core is None:
        (m, inner), (rank, n) = a, b
        if inner != rank:
            raise ValueError
        return m, n, rank
    (left, m), (right, n) = a, b
    if tuple(core[:2]) != (left, right):
        raise ValueError
    return m, n * _area(core[2:], right), left


def _loha_factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    one, two = (_loha_pair(tensors, number) for number in ("1", "2"))
    (up, down), (other_up, other_down) = one, two
    if up.shape[1] * other_up.shape[1] >= min(len(up), down.shape[1]):
        return _thin((up @ down) * (other_up @ other_down))
    # Entry by entry the product of two sums is a sum over all pairs of their terms.
    left = (up[:, :, None] * other_up[:, None, :]).flatten(1)
    right = (down[:, None, :] * other_down[None, :, :]).flatten(0, 1)
    return left, right


def _loha_pair(tensors: Tensors, number: str) -> tuple[Tensor, Tensor]:
    a, b, core = (tensors.get(f"{name}{number}{end}") for name, end in _PARTS)
    if a is None or b is None:
        raise ValueError(f"half of a product is missing: w{number}_a or w{number}_b")
    return (a, b) if core is None else (a.mT, _core_times(core, b))


_PARTS = (("w", "_a"), ("w", "_b"), ("t", ""))


def _core_times(
    core: Tensor,  # (a, b, kh, kw)
    right: Tensor,  # (b, i)
) -> Tensor:  # (a, i * kh * kw)
    return torch.einsum("abhw,bi->aihw", core, right).flatten(1)


def _lokr_shape(shapes: Shapes) -> MatrixShape | None:
    (a, b, first), (c, d, second) = (_lokr_side(shapes, number) for number in ("1", "2"))
    rank = first * second
    divisor = next((shapes[key][0] for key in ("k_w2_b", "k_w1_b") if key in shapes), None)
    return MatrixShape(a * c, b * d, min(rank, a * c, b * d), divisor) if rank else None


def _lokr_side(shapes: Shapes, number: str) -> tuple[int, int, int]:  # rows, columns, rank
    whole = shapes.get(f"k_w{number}")
    if whole is not None:
        if f"k_w{number}_a" in shapes or f"k_w{number}_b" in shapes:
            raise ValueError
        m, n = _sides(whole)
        return m, n, min(m, n)
    a, b = shapes[f"k_w{number}_a"], shapes[f"k_w{number}_b"]
    core = shapes.get(f"k_t{number}")
    if core is None:
        (m, inner), (rank, n) = a, _sides(b)
        if inner != rank:
            raise ValueError
        return m, n, min(inner, m, n)
    (left, m), (right, n) = a, b
    if tuple(core[:2]) != (left, right):
        raise ValueError
    return m, n * _area(core[2:], right), left


def _lokr_factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    (up, down), (other_up, other_down) = (_lokr_pair(tensors, number) for number in ("1", "2"))
    m, n = len(up) * len(other_up), down.shape[1] * other_down.shape[1]
    if up.shape[1] * other_up.shape[1] >= min(m, n):
        return _thin(torch.kron(up @ down, other_up @ other_down))
    return torch.kron(up, other_up), torch.kron(down, other_down)


def _lokr_pair(tensors: Tensors, number: str) -> tuple[Tensor, Tensor]:
    if f"k_w{number}" in tensors:
        return _thin(tensors[f"k_w{number}"].flatten(1))
    a, b = tensors[f"k_w{number}_a"], tensors[f"k_w{number}_b"]
    core = tensors.get(f"k_t{number}")
    return (a, b.flatten(1)) if core is None else (a.mT.contiguous(), _core_times(core, b))
