"""Sparse matrices by rows, whose products with dense ones take a fraction of the time of gathering and adding.

They are sorted and transposed once, by SciPy on the host, and come back to the device of their elements.
"""

import warnings
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor


class SparseMatrix:
    """A sparse matrix by rows, of which PyTorch's own tensor, which cannot be copied or pickled, is made when needed.

    Args:
        starts: Where the elements of each row begin, and where the last ones end, shape (rows + 1,).
        columns: Columns of the elements.
        values: The elements; those of one place are added.
        shape: Shape of the matrix.
    """

    def __init__(self, starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        index = torch.int32 if max(len(values), *shape) < 2**31 else torch.int64  # what products take without a copy
        self.starts, self.columns, self.values, self.shape = starts.to(index), columns.to(index), values, shape

    @cached_property
    def _tensor(self) -> Tensor:
        parts = self.starts, self.columns, self.values
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            return torch.sparse_csr_tensor(*parts, self.shape, check_invariants=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tensor"}

    def __matmul__(self, dense: Tensor) -> Tensor:
        return self._tensor @ dense

    def squared(self) -> "SparseMatrix":
        """The matrix of the squares of the elements, each of which is given once."""
        return SparseMatrix(self.starts, self.columns, self.values.square(), self.shape)

    def to_dense(self) -> Tensor:
        """The same matrix with its zeros."""
        return self._tensor.to_dense()

    @property
    def T(self) -> "SparseMatrix":
        """The transposed matrix, by rows too."""
        return self._of(self._by_columns(), (self.shape[1], self.shape[0]))

    def filled_columns(self) -> tuple["SparseMatrix", Tensor]:
        """The columns that are not empty, as the rows of another matrix, and which they are."""
        columns = self._by_columns()
        filled = np.flatnonzero(np.diff(columns.indptr))
        columns.indptr = np.append(columns.indptr[filled], columns.indptr[-1])
        return self._of(columns, (len(filled), self.shape[0])), torch.from_numpy(filled).to(self.values.device)

    def _by_columns(self) -> Any:
        parts = (part.cpu().numpy() for part in (self.values, self.columns, self.starts))
        return csr_array(tuple(parts), shape=self.shape).tocsc()

    def _of(self, by_columns: Any, shape: tuple[int, int]) -> "SparseMatrix":
        parts = (by_columns.indptr, by_columns.indices, by_columns.data)
        starts, columns, values = (torch.from_numpy(part).to(self.values.device) for part in parts)
        return SparseMatrix(starts, columns, values, shape)


def sparse_matrix(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> SparseMatrix:
    """A sparse matrix of elements in any order.

    Args:
        row: Row of each element.
        column: Column of each element.
        value: The elements.
        shape: Shape of the matrix.
    """
    sizes, order = order_of(row, shape[0])
    if order is not None:
        column, value = column[order], value[order]
    return by_rows(sizes, column, value, shape)


def by_rows(sizes: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> SparseMatrix:
    """A sparse matrix with rows of these sizes, shape (rows,), and its elements in the order of the rows."""
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=sizes.device)
    torch.cumsum(sizes, 0, out=starts[1:])
    return SparseMatrix(starts, column, value, shape)


def order_of(codes: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """How many of each of ``count`` codes there are, and the places of the codes in order; None where they are."""
    if bool((codes[1:] >= codes[:-1]).all()):
        return torch.bincount(codes, minlength=count), None
    n, index = len(codes), np.int32 if len(codes) < 2**31 else np.int64
    places = np.arange(n + 1, dtype=index)
    one_a_row = csr_array((places[:-1], codes.cpu().numpy().astype(index), places), shape=(n, count))
    by_code = one_a_row.tocsc()
    sizes, order = (torch.from_numpy(part).to(codes.device) for part in (np.diff(by_code.indptr), by_code.data))
    return sizes.to(torch.int64), order
