"""Fixes what the loss leaves open: order and sharing of singular values, scale and sign."""

from __future__ import annotations

import torch
from torch import Tensor

from hyper_merge.decomposition.linalg import thin_svd


def balance(
    up: Tensor,  # (..., p, r)
    down: Tensor,  # (..., r, q)
) -> tuple[Tensor, Tensor]:  # (..., p, r), (..., r, q)
    """Returns factors of the same product: singular vectors in falling order, root of S each.

    Neither factor then overflows in half precision, and a host that keeps only the first ranks
    keeps the best ones. Through QR of both factors: no matrix of size p x q is formed.
    """
    left, left_triangle = torch.linalg.qr(up)
    right, right_triangle = torch.linalg.qr(down.mT)
    u, s, vh = thin_svd(left_triangle @ right_triangle.mT)
    root = s.sqrt()[..., None, :]
    return left @ (u * root), (right @ (vh.mT * root)).mT


def even_out(
    up: Tensor,  # (..., p, r)
    down: Tensor,  # (..., r, q)
) -> tuple[Tensor, Tensor]:  # (..., p, r), (..., r, q)
    """Returns factors of the same product, a column of `up` as long as its row of `down`."""
    sizes = up.norm(dim=-2), down.norm(dim=-1)
    ratio = torch.where(sizes[0] * sizes[1] > 0, (sizes[1] / sizes[0]).sqrt(), 1.0)
    return up * ratio[..., None, :], down / ratio[..., :, None]


def unit_scales(
    multipliers: Tensor,  # (k, R)
) -> Tensor:  # (R,)
    """Returns the divisor by which each column's largest entry in magnitude is 1; 1 for zeros."""
    largest = multipliers.abs().argmax(dim=0)
    scales = multipliers.gather(0, largest[None])[0]
    return torch.where(scales == 0, torch.ones_like(scales), scales)
