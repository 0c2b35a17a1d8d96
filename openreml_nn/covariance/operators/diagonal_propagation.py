"""I ∘ (X D X'): independent rows whose variances are made of a few."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.levels import tensor_of
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.operators.base import Operator, require_count, require_square
from openreml_nn.covariance.structures.diagonals import DiagonalStructure


class DiagonalPropagation(Operator, DiagonalStructure):
    r"""V = diag(x_i' D x_i), x_i the rows of X: each row has its own effects with covariance D.

    With X the indicators of a factor and D diagonal it is a residual with a variance for each level.

    Args:
        X: Values of the s effects in each row, shape (n, s).
        D: Covariance of the effects, shape (s, s).

    Raises:
        ValueError: D is not square or does not have a row for each column of X.

    Example:
        >>> from openreml_nn.covariance import DiagonalMatrix, DiagonalPropagation
        >>> V = DiagonalPropagation([[1, 0], [1, 0], [0, 1]], DiagonalMatrix(2, start=[4.0, 9.0]))
        >>> V.diagonal(V.theta).detach().round().tolist()
        [4.0, 4.0, 9.0]
    """

    X: Tensor

    def __init__(self, X: Any, D: Matrix) -> None:
        X = tensor_of(X).detach().to(torch.float64)
        if X.ndim != 2:
            raise ValueError(f"`DiagonalPropagation(X, D)` needs X of shape (n, s), got {tuple(X.shape)}.")
        self._size = X.shape
        super().__init__(D)
        self.register_buffer("X", X, persistent=False)

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        require_count("DiagonalPropagation", operands, 1, "D")
        require_square("DiagonalPropagation", operands)
        n, s = self._size
        if operands[0].shape[0] != s:
            raise ValueError(
                f"`DiagonalPropagation(X, D)` needs one column of X for each row of D, "
                f"got X of shape ({n}, {s}) and D of size {operands[0].shape[0]}."
            )
        return n, n

    def diagonal(self, params: Tensor) -> Tensor:
        ((D, own),) = self.parts(params)
        X = self.X.to(params.dtype)
        return X.square() @ D.diagonal(own) if D.is_diagonal else (X @ D.build(own) * X).sum(1)
