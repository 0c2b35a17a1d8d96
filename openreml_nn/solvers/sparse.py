"""Sparse matrices by rows, whose products with dense ones take a fraction of the time of gathering and adding."""

import warnings
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from torch import Tensor


def sparse_matrix(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sparse matrix with these elements; those of one place are added.

    Args:
        row: Row of each element; the matrix is made quicker where rows are in order.
        column: Column of each element.
        value: The elements.
        shape: Shape of the matrix.
    """
    if bool((row[1:] >= row[:-1]).all()):
        return by_rows(torch.bincount(row, minlength=shape[0]), column, value, shape)
    elements = value.cpu().numpy(), (row.cpu().numpy(), column.cpu().numpy())
    return _of_scipy(coo_array(elements, shape=shape).tocsr(), shape, value.device)


def by_rows(sizes: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sparse matrix with rows of these sizes, shape (rows,), and its elements in the order of the rows."""
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=sizes.device)
    torch.cumsum(sizes, 0, out=starts[1:])
    return _matrix(starts, column, value, shape)


def transposed(A: Tensor) -> Tensor:
    """A' of a sparse matrix by rows, by rows too."""
    return _of_scipy(_scipy(A).tocsc(), (A.shape[1], A.shape[0]), A.device)


def transposed_rows(A: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of A' that are not empty, as a sparse matrix, and which rows they are."""
    columns = _scipy(A).tocsc()
    filled = np.flatnonzero(np.diff(columns.indptr))
    columns.indptr = np.append(columns.indptr[filled], columns.indptr[-1])
    return _of_scipy(columns, (len(filled), A.shape[0]), A.device), torch.from_numpy(filled).to(A.device)


def _scipy(A: Tensor) -> csr_array:
    parts = (part.cpu().numpy() for part in (A.values(), A.col_indices(), A.crow_indices()))
    return csr_array(tuple(parts), shape=tuple(A.shape))


def _of_scipy(A: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    starts, column, value = (torch.from_numpy(part).to(device) for part in (A.indptr, A.indices, A.data))
    return _matrix(starts, column, value, shape)


def _matrix(starts: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    index = torch.int32 if max(len(value), *shape) < 2**31 else torch.int64  # what products take without a copy
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(starts.to(index), column.to(index), value, shape, check_invariants=False)
