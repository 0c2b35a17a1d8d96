"""Sum of matrices: the V of a mixed model, one operand for each random term and the residual."""

from collections.abc import Sequence

from torch import Tensor

from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.operators.base import Operator


class Sum(Operator):
    r"""V = A + B + …, for operands of one shape.

    Raises:
        ValueError: The operands have different shapes.

    Example:
        >>> from openreml_nn.covariance import IdentityMatrix, ScalarMatrix, Sum
        >>> V = Sum(gen=ScalarMatrix(2), residual=IdentityMatrix(2))
        >>> V.param_names
        ['gen/sigma^2']
    """

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        shapes = {operand.shape for operand in operands}
        if len(shapes) != 1:
            raise ValueError(f"`Sum` needs operands of one shape, got {[operand.shape for operand in operands]}.")
        return operands[0].shape

    def build(self, params: Tensor) -> Tensor:
        first, *rest = self.parts(params)
        total = first[0].build(first[1])
        for operand, own in rest:
            total = total + operand.build(own)
        return total

    def add_to(self, out: Tensor, params: Tensor) -> Tensor:
        for operand, own in self.parts(params):
            out = operand.add_to(out, own)
        return out

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return sum(operand.matmul(own, rhs) for operand, own in self.parts(params))  # type: ignore[return-value]

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return sum(operand.rmatmul(own, rhs) for operand, own in self.parts(params))  # type: ignore[return-value]

    def submatrix(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return sum(a.submatrix(own, rows, columns) for a, own in self.parts(params))  # type: ignore[return-value]

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return sum(a.entries(own, rows, columns) for a, own in self.parts(params))  # type: ignore[return-value]

    def diagonal(self, params: Tensor) -> Tensor:
        return sum(operand.diagonal(own) for operand, own in self.parts(params))  # type: ignore[return-value]

    def mean_diagonal(self, params: Tensor) -> Tensor:
        return sum(operand.mean_diagonal(own) for operand, own in self.parts(params))  # type: ignore[return-value]

    @property
    def is_diagonal(self) -> bool:
        return all(operand.is_diagonal for operand in self.operand_list())
