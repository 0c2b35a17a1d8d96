"""Products of matrices: Kronecker, Hadamard and ordinary, and the Gram matrix."""

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.operators.base import Operator, require_count


class KroneckerProduct(Operator):
    r"""V = A ⊗ B ⊗ …: row (i, k) and column (j, l) hold A_ij B_kl; the last operand's index runs fastest.

    ``matmul`` never forms the product: (A ⊗ B) vec(M) = vec(A M B').

    Example:
        >>> from openreml_nn.covariance import IdentityMatrix, KroneckerProduct, UnstructuredMatrix
        >>> KroneckerProduct(traits=UnstructuredMatrix(2), animals=IdentityMatrix(3)).shape
        (6, 6)
    """

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        return math.prod(a.shape[0] for a in operands), math.prod(a.shape[1] for a in operands)

    def build(self, params: Tensor) -> Tensor:
        # torch.kron takes contiguous operands only; a transposed or expanded one raises
        return reduce(torch.kron, [a.build(own).contiguous() for a, own in self.parts(params)])

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return self._along_axes(params, rhs, transpose=False)

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return self._along_axes(params, rhs, transpose=True)

    def _along_axes(self, params: Tensor, rhs: Tensor, transpose: bool) -> Tensor:
        """Multiply the first axis of ``rhs``, taken as a grid, by each operand along the operand's own axis."""
        m, into, out = rhs.shape[1], int(not transpose), int(transpose)
        before, after = 1, math.prod(a.shape[into] for a in self.operand_list())
        for a, own in self.parts(params):
            after //= a.shape[into]
            grid = rhs.reshape(before, a.shape[into], after * m).transpose(0, 1).reshape(a.shape[into], -1)
            done = a.rmatmul(own, grid) if transpose else a.matmul(own, grid)
            rhs = done.reshape(a.shape[out], before, after * m).transpose(0, 1)
            before *= a.shape[out]
        return rhs.reshape(before, m)

    def _places(self, params: Tensor, rows: Tensor, columns: Tensor) -> Iterator[tuple[Matrix, Tensor, Tensor, Tensor]]:
        """Each operand, the last one first, with its parameters and the rows and columns that are meant in it."""
        for a, own in reversed(self.parts(params)):
            yield a, own, rows % a.shape[0], columns % a.shape[1]
            rows, columns = rows // a.shape[0], columns // a.shape[1]

    def submatrix(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return reduce(torch.mul, [a.submatrix(own, i, j) for a, own, i, j in self._places(params, rows, columns)])

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return reduce(torch.mul, [a.entries(own, i, j) for a, own, i, j in self._places(params, rows, columns)])

    def diagonal(self, params: Tensor) -> Tensor:
        if all(a.shape[0] == a.shape[1] for a in self.operand_list()):
            return reduce(torch.kron, [a.diagonal(own) for a, own in self.parts(params)])
        return self.build(params).diagonal()

    @property
    def is_diagonal(self) -> bool:
        return all(a.is_diagonal for a in self.operand_list())

    def level_blocks(self, params: Tensor, count: int) -> Tensor | None:
        *front, (last, own) = self.parts(params)
        if not last.is_diagonal or last.shape[0] != count or not front:
            return super().level_blocks(params, count)
        return last.diagonal(own)[:, None, None] * reduce(torch.kron, [a.build(p) for a, p in front])

    def common_block(self, params: Tensor, count: int) -> Tensor | None:
        *front, (last, own) = self.parts(params)
        shared = last.common_block(own, count) if front and last.shape[0] == count else None
        return None if shared is None else shared * reduce(torch.kron, [a.build(p) for a, p in front])

    @property
    def scale_powers(self) -> list[float]:
        return self._powers_of_first()


class HadamardProduct(Operator):
    r"""V = A ∘ B ∘ …: the product of the elements.

    Raises:
        ValueError: The operands have different shapes.
    """

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        if len({a.shape for a in operands}) != 1:
            raise ValueError(f"`HadamardProduct` needs operands of one shape, got {[a.shape for a in operands]}.")
        return operands[0].shape

    def build(self, params: Tensor) -> Tensor:
        return reduce(torch.mul, [a.build(own) for a, own in self.parts(params)])

    def submatrix(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return reduce(torch.mul, [a.submatrix(own, rows, columns) for a, own in self.parts(params)])

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return reduce(torch.mul, [a.entries(own, rows, columns) for a, own in self.parts(params)])

    def diagonal(self, params: Tensor) -> Tensor:
        return reduce(torch.mul, [a.diagonal(own) for a, own in self.parts(params)])

    @property
    def is_diagonal(self) -> bool:
        return any(a.is_diagonal for a in self.operand_list())

    @property
    def scale_powers(self) -> list[float]:
        return self._powers_of_first()


class Product(Operator):
    r"""V = A B …, the matrix product.

    Raises:
        ValueError: An operand does not have as many rows as the one before it has columns.
    """

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        for left, right in pairwise(operands):
            if left.shape[1] != right.shape[0]:
                raise ValueError(f"`Product` needs shapes that fit, got {[a.shape for a in operands]}.")
        return operands[0].shape[0], operands[-1].shape[1]

    def build(self, params: Tensor) -> Tensor:
        *front, (last, own) = self.parts(params)
        result = last.build(own)
        for a, p in reversed(front):
            result = a.matmul(p, result)
        return result

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        for a, own in reversed(self.parts(params)):
            rhs = a.matmul(own, rhs)
        return rhs

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        for a, own in self.parts(params):
            rhs = a.rmatmul(own, rhs)
        return rhs

    @property
    def is_diagonal(self) -> bool:
        return all(a.is_diagonal for a in self.operand_list())

    @property
    def scale_powers(self) -> list[float]:
        return self._powers_of_first()


class Gram(Operator):
    r"""V = A A', the Gram matrix of the rows of A.

    Raises:
        ValueError: There is more than one operand.
    """

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        require_count("Gram", operands, 1, "A")
        return operands[0].shape[0], operands[0].shape[0]

    def build(self, params: Tensor) -> Tensor:
        ((a, own),) = self.parts(params)
        A = a.build(own)
        return A @ A.mT

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        ((a, own),) = self.parts(params)
        return a.matmul(own, a.rmatmul(own, rhs))

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return self.matmul(params, rhs)

    @property
    def is_diagonal(self) -> bool:
        return self.operand_list()[0].is_diagonal

    @property
    def scale_powers(self) -> list[float]:
        return self._powers_of([0], factor=0.5)
