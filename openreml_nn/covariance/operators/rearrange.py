"""Operators that put matrices side by side, one above the other, on their side, or invert them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.operators.base import Operator, require_count, require_square


class Augment(Operator):
    r"""V = [A B …], side by side.

    Raises:
        ValueError: The operands have different numbers of rows.
    """

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        if len({a.shape[0] for a in operands}) != 1:
            raise ValueError(f"`Augment` needs operands with the same rows, got {[a.shape for a in operands]}.")
        return operands[0].shape[0], sum(a.shape[1] for a in operands)

    def build(self, params: Tensor) -> Tensor:
        return torch.cat([a.build(own) for a, own in self.parts(params)], dim=1)

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        pieces = rhs.split([a.shape[1] for a in self.operand_list()])
        parts = zip(self.parts(params), pieces, strict=True)
        return sum(a.matmul(own, piece) for (a, own), piece in parts)  # type: ignore[return-value]

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return torch.cat([a.rmatmul(own, rhs) for a, own in self.parts(params)])


class Stack(Operator):
    r"""V = [A; B; …], one above the other.

    Raises:
        ValueError: The operands have different numbers of columns.
    """

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        if len({a.shape[1] for a in operands}) != 1:
            raise ValueError(f"`Stack` needs operands with the same columns, got {[a.shape for a in operands]}.")
        return sum(a.shape[0] for a in operands), operands[0].shape[1]

    def build(self, params: Tensor) -> Tensor:
        return torch.cat([a.build(own) for a, own in self.parts(params)])

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return torch.cat([a.matmul(own, rhs) for a, own in self.parts(params)])

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        pieces = rhs.split([a.shape[0] for a in self.operand_list()])
        parts = zip(self.parts(params), pieces, strict=True)
        return sum(a.rmatmul(own, piece) for (a, own), piece in parts)  # type: ignore[return-value]


class Transpose(Operator):
    r"""V = A'.

    Raises:
        ValueError: There is more than one operand.
    """

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        require_count("Transpose", operands, 1, "A")
        return operands[0].shape[1], operands[0].shape[0]

    def build(self, params: Tensor) -> Tensor:
        ((a, own),) = self.parts(params)
        return a.build(own).mT

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        ((a, own),) = self.parts(params)
        return a.rmatmul(own, rhs)

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        ((a, own),) = self.parts(params)
        return a.matmul(own, rhs)

    def diagonal(self, params: Tensor) -> Tensor:
        ((a, own),) = self.parts(params)
        return a.diagonal(own)

    @property
    def is_diagonal(self) -> bool:
        return self.operand_list()[0].is_diagonal


class Inverse(Operator):
    r"""V = A⁻¹, for a covariance that is given by its precision.

    Raises:
        ValueError: There is more than one operand, or it is not square.
    """

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        require_count("Inverse", operands, 1, "A")
        require_square("Inverse", operands)
        return operands[0].shape

    def build(self, params: Tensor) -> Tensor:
        ((a, own),) = self.parts(params)
        return torch.linalg.inv(a.build(own))

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        ((a, own),) = self.parts(params)
        return torch.linalg.solve(a.build(own), rhs)

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        ((a, own),) = self.parts(params)
        return torch.linalg.solve(a.build(own).mT, rhs)

    @property
    def is_diagonal(self) -> bool:
        return self.operand_list()[0].is_diagonal

    @property
    def scale_powers(self) -> list[float]:
        return self._powers_of([0], factor=-1.0)
