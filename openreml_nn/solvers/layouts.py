"""How a symmetric matrix of the effects of the rest is kept and factored: what a layout is, and the dense one.

The matrices of one problem have elements in the same places at every θ. A layout keeps them as one flat vector, so that
sums over levels go where they belong in one operation, and knows how to factor what it keeps.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from openreml_nn.solvers.sparse import SparseMatrix


class Layout(ABC):
    """Base class: a symmetric matrix A of size q as a flat vector of its blocks that are not all zero.

    A is *given by its lower triangle* where nothing is said of the upper triangles of the blocks on the diagonal, and
    *whole* where these are filled in.

    Attributes:
        size: q.
        length: Length of the flat vector.
    """

    size: int
    length: int

    @abstractmethod
    def place(self, row: Tensor, column: Tensor) -> Tensor:
        """Where A_ij of the lower triangle is kept, j ≤ i."""

    @abstractmethod
    def whole(self, A: Tensor) -> Tensor:
        """A with the upper triangles of its diagonal blocks filled in from the lower ones."""

    @abstractmethod
    def matrix(self, A: Tensor) -> Tensor | SparseMatrix:
        """A for products, shape (q, q), dense or sparse, for A whole."""

    @abstractmethod
    def diagonal(self, A: Tensor) -> Tensor:
        """The diagonal of A, shape (q,)."""

    @abstractmethod
    def set_diagonal(self, A: Tensor, values: Tensor) -> None:
        """Write the diagonal of A, shape (q,)."""

    @abstractmethod
    def row_sums(self, A: Tensor) -> Tensor:
        """The sums of the rows of A, shape (q,), for A given by its lower triangle."""

    @abstractmethod
    def dense(self, A: Tensor) -> Tensor:
        """A as a matrix, shape (q, q), for A given by its lower triangle."""

    @abstractmethod
    def factor(self, A: Tensor) -> "Factor":
        """Cholesky factor of A given by its lower triangle."""

    @property
    @abstractmethod
    def work(self) -> float:
        """Multiplications of a factor and an inverse."""

    @property
    def calls(self) -> int:
        """Short operations that wait for one another."""
        return 0

    @property
    @abstractmethod
    def cost(self) -> str:
        """``work`` in words."""


class Factor(ABC):
    """Base class: the Cholesky factor of a positive definite M.

    Attributes:
        pivots: Squares of the diagonal of L, of which the product is |M|, shape (q,).
    """

    pivots: Tensor

    @abstractmethod
    def solve(self, rhs: Tensor) -> Tensor:
        """M⁻¹ ``rhs``, shape (q, m)."""

    @abstractmethod
    def inverse(self) -> Tensor:
        """The elements of M⁻¹ that the layout has a place for, whole."""

    def dense_inverse(self) -> Tensor:
        """M⁻¹, shape (q, q)."""
        return self.solve(torch.eye(len(self.pivots), dtype=self.pivots.dtype, device=self.pivots.device))


def checked(L: Tensor, info: Tensor) -> Tensor:
    """L where it exists.

    Raises:
        torch.linalg.LinAlgError: The matrix is not positive definite.
    """
    if bool(info.any() | L.diagonal(dim1=-2, dim2=-1).isnan().any()):
        raise torch.linalg.LinAlgError("The matrix of the rest is not positive definite.")
    return L


# ---- dense -----------------------------------------------------------------------------------------------------------


class DenseLayout(Layout):
    """All of A, row by row."""

    def __init__(self, size: int) -> None:
        self.size, self.length = size, size * size

    def _matrix(self, A: Tensor) -> Tensor:
        return A.view(self.size, self.size)

    def place(self, row: Tensor, column: Tensor) -> Tensor:
        return row * self.size + column

    def whole(self, A: Tensor) -> Tensor:
        return self.dense(A).reshape(-1)

    def matrix(self, A: Tensor) -> Tensor:
        return self._matrix(A)

    def diagonal(self, A: Tensor) -> Tensor:
        return self._matrix(A).diagonal().clone()

    def set_diagonal(self, A: Tensor, values: Tensor) -> None:
        self._matrix(A).diagonal().copy_(values)

    def row_sums(self, A: Tensor) -> Tensor:
        M = self._matrix(A)
        return M.tril().sum(1) + M.tril(-1).sum(0)

    def dense(self, A: Tensor) -> Tensor:
        M = self._matrix(A)
        return M.tril() + M.tril(-1).mT

    def factor(self, A: Tensor) -> "DenseFactor":
        return DenseFactor(checked(*torch.linalg.cholesky_ex(self._matrix(A))))

    @property
    def work(self) -> float:
        return float(self.size**3)

    @property
    def cost(self) -> str:
        return f"q³ = {self.work:.1e} multiplications for q = {self.size} effects"


class DenseFactor(Factor):
    """L, shape (q, q)."""

    def __init__(self, L: Tensor) -> None:
        self.L, self.pivots = L, L.diagonal().square()

    def solve(self, rhs: Tensor) -> Tensor:
        return torch.cholesky_solve(rhs, self.L)

    def inverse(self) -> Tensor:
        return self.dense_inverse().mT.reshape(-1)  # LAPACK gives columns; no copy

    def dense_inverse(self) -> Tensor:
        return torch.cholesky_inverse(self.L)
