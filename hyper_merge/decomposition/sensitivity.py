"""How much the output of a network depends on one layer's weight, by direction.

For a weight W and G = d(v . output) / dW, with v of unit normal entries, a small change D of the
weight changes the output by E <G, D>^2 on average over v and inputs. That quadratic form is
approximated by a Kronecker product of E[G G^T] and E[G^T G], and each of these by its leading
directions and a multiple of the identity.

Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
2015; Gupta, Koren and Singer, "Shampoo: preconditioned stochastic tensor optimization", 2018, for
these factors; Tropp et al., "Fixed-rank approximation of a positive-semidefinite matrix from streaming
data", 2017, for the sketches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyper_merge.decomposition.stretch import Stretch

DIRECTIONS: Final = 16  # that are kept of each side
STORED: Final = torch.float16  # type of the directions
_OVERSAMPLED: Final = 8  # directions more in the sketches
_LEAST_REST: Final = 1e-3  # of the mean: a direction that no input has shown is not quite free
_NEGLIGIBLE: Final = 1e-6  # of the largest eigenvalue of a sketch


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How much the output changes with a layer's weight (m, n).

    Attributes:
        mean: Mean squared change of the output for a change in a random direction, per squared size.
        rest: Part of `mean` that holds for directions which neither side stretches.
        left: The root of what the change depends on along the rows' index.
        right: The same along the columns' index.
    """

    mean: float
    rest: float
    left: Stretch
    right: Stretch


class SensitivitySketch:
    """Adds up what a layer's sensitivity needs of its gradients, in a few columns for each side."""

    def __init__(self, tests: tuple[Tensor, Tensor]) -> None:
        """Begins with nothing.

        Args:
            tests: (m, c) and (n, c): from `sketching_matrix`, on the device of the gradients.
        """
        self._tests = tests
        self._sides = [torch.zeros_like(test) for test in tests]
        self._square: Tensor | float = 0.0

    def add(
        self,
        inputs: Tensor,  # (b, positions, n): of the layer
        gradients: Tensor,  # (b, positions, m): of its outputs
    ) -> None:
        """Adds the gradients G = gradients^T inputs of b inputs of the network, without forming them."""
        left, right = self._tests
        backward, forward = gradients.mT, inputs.mT
        self._sides[0] += (backward @ (inputs @ (forward @ (gradients @ left)))).sum(0)
        self._sides[1] += (forward @ (gradients @ (backward @ (inputs @ right)))).sum(0)
        self._square = self._square + ((gradients @ backward) * (inputs @ forward)).sum()

    def sensitivity(self, outputs: int) -> Sensitivity:
        """Returns the sensitivity, from gradients of so many outputs in all."""
        (m, _), (n, _) = (test.shape for test in self._tests)
        total = float(self._square)
        if not 0 < total < float("inf"):  # no output depends on the layer, or none is finite
            return Sensitivity(total, 1.0, Stretch.none(m), Stretch.none(n))
        (left, rest), (right, rest_of_right) = (
            _leading(side.cpu().double(), test.cpu().double(), total)
            for side, test in zip(self._sides, self._tests, strict=True)
        )
        return Sensitivity(total / (outputs * m * n), rest * rest_of_right, left, right)


def sketching_matrix(size: int) -> Tensor:  # (size, c)
    """Returns the random matrix of sketches for sides of a size."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, min(DIRECTIONS + _OVERSAMPLED, size), generator=generator)


def _leading(
    side: Tensor,  # (m, c): a positive semidefinite matrix times the test matrix
    test: Tensor,  # (m, c)
    trace: float,  # of the matrix
) -> tuple[Stretch, float]:
    """Returns the root of the matrix over its mean eigenvalue: a stretch, and the rest's level.

    By the Nystrom approximation side (test^T side)^-1 side^T.
    """
    size = len(side)
    inner = test.mT @ side
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    known = values > _NEGLIGIBLE * float(values[-1])
    root = side @ (vectors[:, known] * values[known].rsqrt())
    directions, singular, _ = torch.linalg.svd(root, full_matrices=False)
    kept = min(DIRECTIONS, len(singular))
    leading = singular[:kept].square()
    left_over = max(trace - float(leading.sum()), _LEAST_REST * trace)
    rest = left_over / max(size - kept, 1)
    factors = (leading / rest).clamp(min=1).sqrt()
    return Stretch(directions[:, :kept].to(STORED), factors.float()), rest * size / trace
