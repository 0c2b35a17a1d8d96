"""Diagonal structures: the identity, one variance for all levels, one variance for each level."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from openreml_nn.covariance.levels import labels_of, size_of
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.transform import Transform, TransformExpPow2


class DiagonalStructure(Matrix):
    """Base class of diagonal structures: a subclass gives ``diagonal``, and all else follows from it."""

    @abstractmethod
    def diagonal(self, params: Tensor) -> Tensor:
        """The diagonal, shape (n,)."""

    @property
    def is_diagonal(self) -> bool:
        return True

    def build(self, params: Tensor) -> Tensor:
        return torch.diag_embed(self.diagonal(params))

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return self.diagonal(params)[:, None] * rhs

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return self.matmul(params, rhs)

    def add_to(self, out: Tensor, params: Tensor) -> Tensor:
        place = torch.arange(len(out), device=out.device)
        return out.index_put_((place, place), self.diagonal(params), accumulate=True)

    def submatrix(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return (rows[:, None] == columns) * self.diagonal(params)[rows][:, None]

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return (rows == columns) * self.diagonal(params)[rows]


class IdentityMatrix(DiagonalStructure):
    r"""V = I, with no parameters.

    Args:
        n: Size, or `Levels`.
    """

    def __init__(self, n: SupportsIndex) -> None:
        size = size_of(n, "IdentityMatrix")
        super().__init__((size, size), [])

    def diagonal(self, params: Tensor) -> Tensor:
        return params.new_ones(self.shape[0])

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return (rows == columns).to(params.dtype)

    def common_block(self, params: Tensor, count: int) -> Tensor | None:
        s, left = divmod(self.shape[0], count)
        return None if left else torch.eye(s, dtype=params.dtype, device=params.device)


class ScalarMatrix(DiagonalStructure):
    r"""V = σ² I: independent levels with one variance.

    Args:
        n: Size, or `Levels`.
        trans: Transform of the variance.
        start: Start value of σ².

    Example:
        >>> from openreml_nn.covariance import ScalarMatrix
        >>> ScalarMatrix(2, start=4.0)().tolist()
        [[4.0, 0.0], [0.0, 4.0]]
    """

    def __init__(self, n: SupportsIndex, trans: Transform | None = None, *, start: Any = None) -> None:
        size = size_of(n, "ScalarMatrix")
        super().__init__((size, size), ["sigma^2"], [trans or TransformExpPow2()], start=start)

    def diagonal(self, params: Tensor) -> Tensor:
        return self.trans_params(params).expand(self.shape[0])

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return self.trans_params(params) * rhs

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return (rows == columns) * self.trans_params(params)

    def common_block(self, params: Tensor, count: int) -> Tensor | None:
        s, left = divmod(self.shape[0], count)
        return None if left else self.trans_params(params) * torch.eye(s, dtype=params.dtype, device=params.device)

    def mean_diagonal(self, params: Tensor) -> Tensor:
        return self.trans_params(params)[0]


class DiagonalMatrix(DiagonalStructure):
    r"""V = diag(σ²_0, …, σ²_{n−1}): independent levels, each with its own variance.

    Args:
        n: Size, or `Levels`, whose labels then name the variances.
        trans: One transform for each variance, or a list with a single one for all.
        start: Start values of the variances.

    Example:
        >>> from openreml_nn.covariance import DiagonalMatrix, Levels
        >>> DiagonalMatrix(Levels(["dry", "wet"])).param_names
        ['sigma^2_dry', 'sigma^2_wet']
    """

    def __init__(self, n: SupportsIndex, trans: Sequence[Transform] | None = None, *, start: Any = None) -> None:
        size = size_of(n, "DiagonalMatrix")
        names = [f"sigma^2_{label}" for label in labels_of(n, size)]
        super().__init__((size, size), names, trans or [TransformExpPow2()], start=start)

    def diagonal(self, params: Tensor) -> Tensor:
        return self.trans_params(params)
