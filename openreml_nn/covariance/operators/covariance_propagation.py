"""Z G Z': the covariance that random effects with covariance G give to the rows."""

from collections.abc import Sequence

from torch import Tensor

from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.operators.base import Operator, require_count


class CovariancePropagation(Operator):
    r"""V = Z G Z', with Z of shape (n, q) and G of shape (q, q).

    Level codes (`DummyMatrix`, `KhatriRaoMatrix`) stay codes: nothing of shape (n, q) is formed.

    Raises:
        ValueError: G is not square, or Z does not have one column for each of its rows.

    Example:
        >>> from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix
        >>> CovariancePropagation(DummyMatrix(["a", "b", "a"]), ScalarMatrix(2, start=4.0))().tolist()
        [[4.0, 0.0, 4.0], [0.0, 4.0, 0.0], [4.0, 0.0, 4.0]]
    """

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        require_count("CovariancePropagation", operands, 2, "Z and G")
        Z, G = operands
        if G.shape[0] != G.shape[1]:
            raise ValueError(f"`CovariancePropagation(Z, G)` needs a square G, got shape {G.shape}.")
        if Z.shape[1] != G.shape[0]:
            raise ValueError(
                f"`CovariancePropagation(Z, G)` needs one column of Z for each row of G, "
                f"got Z of shape {Z.shape} and G of size {G.shape[0]}."
            )
        return Z.shape[0], Z.shape[0]

    @property
    def Z(self) -> Matrix:
        """The design of the effects."""
        return self.operand_list()[0]

    @property
    def G(self) -> Matrix:
        """The covariance of the effects."""
        return self.operand_list()[1]

    def build(self, params: Tensor) -> Tensor:
        (Z, z), (G, g) = self.parts(params)
        return Z.sandwich(z, G, g)

    def add_to(self, out: Tensor, params: Tensor) -> Tensor:
        (Z, z), (G, g) = self.parts(params)
        return Z.add_sandwich_to(out, z, G, g)

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        (Z, z), (G, g) = self.parts(params)
        return Z.matmul(z, G.matmul(g, Z.rmatmul(z, rhs)))

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        (Z, z), (G, g) = self.parts(params)
        return Z.matmul(z, G.rmatmul(g, Z.rmatmul(z, rhs)))

    def diagonal(self, params: Tensor) -> Tensor:
        (Z, z), (G, g) = self.parts(params)
        return Z.sandwich_diagonal(z, G, g)

    def mean_diagonal(self, params: Tensor) -> Tensor:
        (Z, z), (G, g) = self.parts(params)
        return Z.sandwich_mean_diagonal(z, G, g)

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        (Z, z), (G, g) = self.parts(params)
        return Z.sandwich_entries(z, G, g, rows, columns)

    @property
    def scale_powers(self) -> list[float]:
        return self._powers_of([1])
