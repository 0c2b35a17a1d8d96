"""What an optimiser may know of the parameters it moves: their units, their boundaries, their names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.operators.base import short_names


@dataclass(frozen=True)
class Geometry:
    """Units, boundaries and names of k raw parameters.

    Attributes:
        units: A natural size of a change in each parameter, shape (k,): 1 for a logarithm or logit, a standard
            deviation of its level for a loading or a Cholesky entry.
        finite_below: Whether the natural parameter has a finite limit where the raw one falls without bound.
        finite_above: Likewise where it rises without bound.
        mirrors: Whether the column of parameter i, a diagonal entry of a triangular factor, holds parameter j too,
            shape (k, k): where i crosses zero j changes sign.
        cells: Triangular factor, row and column of each parameter, shape (3, k); −1 where it is no entry of a factor
            whose entries are all free.
        names: Names for messages.
    """

    units: np.ndarray
    finite_below: np.ndarray
    finite_above: np.ndarray
    mirrors: np.ndarray
    cells: np.ndarray
    names: list[str]

    @classmethod
    def plain(cls, k: int) -> "Geometry":
        """k parameters about which nothing is known."""
        no = np.zeros((k, k), dtype=bool)
        never = np.zeros(k, dtype=bool)
        return cls(np.ones(k), never, never, no, np.full((3, k), -1), [f"theta_{i}" for i in range(k)])

    @classmethod
    def of(cls, V: Matrix) -> "Geometry":
        """The free parameters of V at its present thetas."""
        theta = V.theta.detach()
        k = V.num_params
        units = np.ones(k)
        ends: np.ndarray = np.zeros((2, k), dtype=bool)
        mirrors, cells = np.zeros((k, k), dtype=bool), np.full((3, k), -1)
        fixed = set(V.no_grad_index)
        for _, leaf, index in (found for found in V.leaves() if found[2]):
            for a, (i, column) in enumerate(leaf.mirrors.items()):
                mirrors[index[i], [index[j] for j in column]] = True
                if fixed.isdisjoint(index):
                    cells[:, [index[i], *(index[j] for j in column)]] = _column(index[0], a, len(column) + 1)
            with torch.no_grad():
                size = float(leaf.mean_diagonal(theta[index]).abs()) if leaf.shape[0] == leaf.shape[1] else 1.0
            for i, t, power in zip(index, leaf._transforms(), leaf.scale_powers, strict=True):
                low, high = (-math.inf, math.inf) if t is None else t.image
                ends[:, i] = math.isfinite(low), math.isfinite(high)
                if math.isinf(low) and math.isinf(high) and power and size > 0:
                    units[i] = size**power
        free = np.array([i for i in range(k) if i not in fixed], dtype=int)
        names = short_names(V.param_names)
        return cls(units[free], ends[0, free], ends[1, free], mirrors[np.ix_(free, free)], cells[:, free],
                   [names[i] for i in free])  # fmt: skip

    def named(self, which: Sequence[int]) -> str:
        """Names of some parameters, for a message."""
        return ", ".join(self.names[i] for i in which)


def _column(factor: int, a: int, length: int) -> np.ndarray:
    """Factor, rows and column of the entries of column a from the diagonal on, shape (3, length)."""
    return np.stack([np.full(length, factor), a + np.arange(length), np.full(length, a)])
