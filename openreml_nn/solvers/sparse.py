"""Sparse matrices by rows, whose products with dense ones take a fraction of the time of gathering and adding.

They are sorted and transposed once, by SciPy on the host, and come back to the device of their elements.
"""

import warnings
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor


def sparse_matrix(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sparse matrix with these elements; those of one place are added.

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
