"""Block diagonal matrices: independent groups, each with its own covariance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.operators.base import Operator


class BlockDiagonal(Operator):
    r"""V = diag(A, B, …), blocks of any shape; one structure given several times is one set of parameters.

    Example:
        >>> from openreml_nn.covariance import AR1Matrix, BlockDiagonal
        >>> subject = AR1Matrix(3)
        >>> BlockDiagonal(subject, subject).param_names
        ['op_0/sigma^2', 'op_0/rho']
    """

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        return sum(a.shape[0] for a in operands), sum(a.shape[1] for a in operands)

    def build(self, params: Tensor) -> Tensor:
        return torch.block_diag(*(operand.build(own) for operand, own in self.parts(params)))

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        pieces = rhs.split([a.shape[1] for a in self.operand_list()])
        return torch.cat([a.matmul(own, piece) for (a, own), piece in zip(self.parts(params), pieces, strict=True)])

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        pieces = rhs.split([a.shape[0] for a in self.operand_list()])
        return torch.cat([a.rmatmul(own, piece) for (a, own), piece in zip(self.parts(params), pieces, strict=True)])

    def diagonal(self, params: Tensor) -> Tensor:
        if all(a.shape[0] == a.shape[1] for a in self.operand_list()):
            return torch.cat([a.diagonal(own) for a, own in self.parts(params)])
        return self.build(params).diagonal()

    @property
    def is_diagonal(self) -> bool:
        return all(a.is_diagonal and a.shape[0] == a.shape[1] for a in self.operand_list())
