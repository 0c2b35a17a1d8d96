"""Any positive definite matrix, by its Cholesky factor with the logarithm of the diagonal as parameter."""

from typing import Any, SupportsIndex

import torch
from torch import Tensor

from openreml_nn.covariance.levels import labels_of, size_of
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.transform import TransformExp, TransformIdentity


class UnstructuredMatrix(Matrix):
    r"""V = L L', L lower triangular with diagonal exp(θ_ii): positive definite at every θ (log-Cholesky).

    Raw parameters are the lower triangle of L row by row; a report shows that of V (``sigma^2_i``, ``sigma_j_i``).

    Args:
        n: Size, or `Levels`, whose labels then name the entries.
        start: Start value of V, a positive definite matrix of shape (n, n).

    Raises:
        ValueError: ``start`` has another shape, or is not symmetric and positive definite.

    Source: Pinheiro & Bates (1996), Statistics and Computing 6, 289-296.

    Example:
        >>> from openreml_nn.covariance import Levels, UnstructuredMatrix
        >>> V = UnstructuredMatrix(Levels(["intercept", "slope"]), start=[[4.0, 1.0], [1.0, 9.0]])
        >>> V.natural_names
        ['sigma^2_intercept', 'sigma_intercept_slope', 'sigma^2_slope']
        >>> V.standard_deviations().tolist()
        [2.0, 3.0]
    """

    place: Tensor

    def __init__(self, n: SupportsIndex, *, start: Any = None) -> None:
        size = size_of(n, "UnstructuredMatrix")
        labels = labels_of(n, size)
        lower = [(i, j) for i in range(size) for j in range(i + 1)]
        names = [f"L_{labels[i]}_{labels[j]}" for i, j in lower]
        trans = [TransformExp() if i == j else TransformIdentity() for i, j in lower]
        super().__init__((size, size), names, trans, start=None if start is None else _cholesky_rows(start, size))
        self._natural_names = [f"sigma^2_{labels[i]}" if i == j else f"sigma_{labels[j]}_{labels[i]}" for i, j in lower]
        self.register_buffer("place", torch.tensor([i * size + j for i, j in lower]), persistent=False)

    def factor(self, params: Tensor) -> Tensor:
        """L, shape (n, n)."""
        values = self.trans_params(params)
        return values.new_zeros(self.shape[0] ** 2).scatter(0, self.place, values).reshape(self.shape)

    def build(self, params: Tensor) -> Tensor:
        L = self.factor(params)
        return L @ L.mT

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        L = self.factor(params)
        return L @ (L.mT @ rhs)

    def standard_deviations(self, params: Tensor | None = None) -> Tensor:
        """Square roots of the variances, shape (n,)."""
        return self(params).diagonal().sqrt()

    def correlation(self, params: Tensor | None = None) -> Tensor:
        """Correlation matrix, shape (n, n)."""
        V = self(params)
        sd = V.diagonal().sqrt()
        return V / (sd[:, None] * sd)

    @property
    def natural_names(self) -> list[str]:
        return list(self._natural_names)

    def natural(self, params: Tensor) -> Tensor:
        return self.build(params).reshape(-1)[self.place]

    def from_natural(self, values: Tensor) -> Tensor:
        n = self.shape[0]
        lower = values.new_zeros(n * n).scatter(0, self.place, values).reshape(n, n)
        return super().from_natural(_cholesky_rows(lower + lower.tril(-1).mT, n).to(values))

    @property
    def scale_powers(self) -> list[float]:
        return [0.5] * self.num_params

    @property
    def mirrors(self) -> dict[int, list[int]]:
        place = {(i, j): i * (i + 1) // 2 + j for i in range(self.shape[0]) for j in range(i + 1)}
        return {k: [place[i, j] for i in range(j + 1, self.shape[0])] for (r, j), k in place.items() if r == j}


def _cholesky_rows(start: Any, size: int) -> Tensor:
    V = torch.as_tensor(start, dtype=torch.float64)
    if V.shape != (size, size) or not torch.allclose(V, V.mT):
        what = "a matrix that is not symmetric" if V.shape == (size, size) else f"shape {tuple(V.shape)}"
        raise ValueError(f"`UnstructuredMatrix` needs a symmetric start of shape ({size}, {size}), got {what}.")
    L, failed = torch.linalg.cholesky_ex(V)
    if failed:
        raise ValueError("`UnstructuredMatrix` needs a positive definite start.")
    rows, columns = torch.tril_indices(size, size)
    return L[rows, columns]
