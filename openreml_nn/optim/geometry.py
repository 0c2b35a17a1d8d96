"""What an optimiser may know of the parameters it moves: their units, their boundaries, their names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.operators.base import short_names


@dataclass(frozen=True)
class Geometry:
    """Units, boundaries and names of k raw parameters.

    Attributes:
        units: A natural size of a change in each parameter, shape (k,): 1 for a logarithm or logit, a standard
            deviation of its level for a loading or a Cholesky entry; a tensor where they depend on the parameters.
        finite_below: Whether the natural parameter has a finite limit where the raw one falls without bound.
        finite_above: Likewise where it rises without bound.
        mirrors: Whether the column of parameter i, a diagonal entry of a triangular factor, holds parameter j too,
            shape (k, k): where i crosses zero j changes sign.
        cells: Triangular factor, row and column of each parameter, shape (3, k); −1 where it is no entry of a factor
            whose entries are all free.
        names: Names for messages.
    """

    units: np.ndarray | Tensor
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
        k, free = V.num_params, V.free_index
        units: dict[int, Tensor] = {}
        ends = [(-math.inf, math.inf)] * k
        mirrors, cells = np.zeros((k, k), dtype=bool), np.full((3, k), -1)
        for _, leaf, index in (found for found in V.leaves() if found[2]):
            for a, (i, column) in enumerate(leaf.mirrors.items()):
                mirrors[index[i], [index[j] for j in column]] = True
                if set(index) <= set(free):
                    cells[:, [index[i], *(index[j] for j in column)]] = _column(index[0], a, len(column) + 1)
            for i, t in zip(index, leaf.param_transforms, strict=True):
                ends[i] = ends[i] if t is None else t.image
            powers = {i: power for i, power in zip(index, leaf.scale_powers, strict=True)
                      if power and ends[i] == (-math.inf, math.inf)}  # fmt: skip
            sizes = {power: _size(leaf, power) for power in set(powers.values())}
            units |= {i: sizes[power] for i, power in powers.items()}
        names = short_names(V.param_names)
        below, above = np.isfinite(np.array(ends).reshape(k, 2)[free].T)
        return cls(_together(units, free), below, above, mirrors[np.ix_(free, free)], cells[:, free],
                   [names[i] for i in free])  # fmt: skip

    def named(self, which: Sequence[int]) -> str:
        """Names of some parameters, for a message."""
        return ", ".join(self.names[i] for i in which)


def _size(leaf: Matrix, power: float) -> Tensor:
    """A power of the mean of the diagonal of a structure at its present thetas; 1 where it has none."""
    if leaf.shape[0] != leaf.shape[1]:
        return torch.ones_like(leaf.theta[0])
    with torch.no_grad():
        size = leaf.mean_diagonal(leaf.theta).abs()
        return torch.where(size > 0, size, 1.0) ** power


def _together(units: dict[int, Tensor], free: list[int]) -> np.ndarray | Tensor:
    """Units of the free parameters, 1 where none is given; left on their device, to be read with other numbers."""
    if units.keys().isdisjoint(free):
        return np.ones(len(free))
    one = torch.ones_like(next(iter(units.values())))
    return torch.stack([units.get(i, one) for i in free])


def _column(factor: int, a: int, length: int) -> np.ndarray:
    """Factor, rows and column of the entries of column a from the diagonal on, shape (3, length)."""
    return np.stack([np.full(length, factor), a + np.arange(length), np.full(length, a)])
