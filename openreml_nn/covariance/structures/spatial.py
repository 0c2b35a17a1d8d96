"""Covariances that fall with the distance between coordinates."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.levels import values_of
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.transform import (
    TransformChain,
    TransformExp,
    TransformExpPow2,
    TransformScaleShift,
)


class DistanceMatrix(Matrix):
    """Base class of isotropic covariances σ² c(d / range), d the Euclidean distance; a subclass gives ``correlation``.

    The raw start 0 of the range is half the median distance, so that it does not depend on the unit of the coordinates.

    Args:
        coordinates: Shape (n,) or (n, d), array-like or `Levels`.
        start: Start values of σ² and the range.

    Raises:
        TypeError: Coordinates are not numeric.
        ValueError: Coordinates are not finite, or all points are the same.
    """

    distances: Tensor

    def __init__(self, coordinates: Any, *, start: Any = None) -> None:
        x = values_of(coordinates, self._name)
        d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        if not bool((d > 0).any()):
            raise ValueError(f"`{self._name}` needs at least two different points.")
        unit = 0.5 * d[d > 0].median().item()
        trans = [TransformExpPow2(), TransformChain([TransformExp(), TransformScaleShift(unit)])]
        super().__init__((len(x), len(x)), ["sigma^2", "range"], trans, start=start)
        self.register_buffer("distances", d, persistent=False)

    @abstractmethod
    def correlation(self, relative: Tensor) -> Tensor:
        """c(d / range), elementwise."""

    def _at(self, params: Tensor, distances: Tensor) -> Tensor:
        sigma2, reach = self.trans_params(params)
        return sigma2 * self.correlation(distances.to(params.dtype) / reach)

    def build(self, params: Tensor) -> Tensor:
        return self._at(params, self.distances)

    def submatrix(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self._at(params, self.distances[rows][:, columns])

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self._at(params, self.distances[rows, columns])

    def diagonal(self, params: Tensor) -> Tensor:
        return self.trans_params(params)[:1].expand(self.shape[0])

    @property
    def scale_powers(self) -> list[float]:
        return [1.0, 0.0]


class ExponentialMatrix(DistanceMatrix):
    r"""V_ij = σ² exp(−d_ij / range), d_ij the Euclidean distance; arguments as `DistanceMatrix`.

    Example:
        >>> from openreml_nn.covariance import ExponentialMatrix
        >>> V = ExponentialMatrix([[0, 0], [3, 4]], start={"sigma^2": 2.0, "range": 5.0})
        >>> round(V()[0, 1].item(), 4)
        0.7358
    """

    def correlation(self, relative: Tensor) -> Tensor:
        return torch.exp(-relative)


class GaussianMatrix(DistanceMatrix):
    r"""V_ij = σ² exp(−(d_ij / range)²), d_ij the Euclidean distance; arguments as `DistanceMatrix`."""

    def correlation(self, relative: Tensor) -> Tensor:
        return torch.exp(-relative.square())
