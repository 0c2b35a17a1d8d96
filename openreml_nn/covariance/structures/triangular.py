"""Matrices with free entries: any, or those on and below the diagonal. Factors, not covariances."""

from typing import Any, SupportsIndex

import torch
from torch import Tensor

from openreml_nn.covariance.levels import size_of
from openreml_nn.covariance.matrix import Matrix


class UnconstrainedMatrix(Matrix):
    r"""V = A, every entry free: a factor or a loading matrix. It is no covariance; that is `UnstructuredMatrix`.

    Args:
        rows: Number of rows.
        columns: Number of columns; as many as rows when left out.
        start: Start values, row by row.
    """

    def __init__(self, rows: SupportsIndex, columns: SupportsIndex | None = None, *, start: Any = None) -> None:
        r = size_of(rows, "UnconstrainedMatrix")
        c = r if columns is None else size_of(columns, "UnconstrainedMatrix")
        super().__init__((r, c), [f"a_{i}_{j}" for i in range(r) for j in range(c)], start=start)

    def build(self, params: Tensor) -> Tensor:
        return self.trans_params(params).reshape(self.shape)

    @property
    def scale_powers(self) -> list[float]:
        return [1.0] * self.num_params


class LowerTriangularMatrix(Matrix):
    r"""V = L, the entries on and below the diagonal free: a factor, as in ``Gram(L)`` = L L'.

    Args:
        n: Size.
        start: Start values of the lower triangle, row by row.

    Example:
        >>> from openreml_nn.covariance import Gram, LowerTriangularMatrix
        >>> Gram(LowerTriangularMatrix(2, start=[2.0, 1.0, 3.0]))().tolist()
        [[4.0, 2.0], [2.0, 10.0]]
    """

    place: Tensor

    def __init__(self, n: SupportsIndex, *, start: Any = None) -> None:
        size = size_of(n, "LowerTriangularMatrix")
        super().__init__((size, size), [f"l_{i}_{j}" for i in range(size) for j in range(i + 1)], start=start)
        rows, columns = torch.tril_indices(size, size)
        self.register_buffer("place", rows * size + columns, persistent=False)

    def build(self, params: Tensor) -> Tensor:
        values = self.trans_params(params)
        return values.new_zeros(self.shape[0] ** 2).scatter(0, self.place, values).reshape(self.shape)

    @property
    def scale_powers(self) -> list[float]:
        return [1.0] * self.num_params
