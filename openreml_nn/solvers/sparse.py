"""Sparse matrices for products with dense ones."""

import warnings

import torch
from torch import Tensor


def sparse_matrix(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int], ordered: bool = False) -> Tensor:
    """A sparse matrix by rows; its product with a dense one takes a fraction of the time of gathering and adding.

    Args:
        row: Row of each element.
        column: Column of each element.
        value: The elements; those of one place are added.
        shape: Shape of the matrix.
        ordered: Whether the rows are in order.
    """
    if not ordered:
        order = torch.argsort(row, stable=True)
        row, column, value = row[order], column[order], value[order]
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=row.device)
    torch.cumsum(torch.bincount(row, minlength=shape[0]), 0, out=starts[1:])
    index = torch.int32 if max(len(value), *shape) < 2**31 else torch.int64  # what products take without a copy
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(starts.to(index), column.to(index), value, shape, check_invariants=False)
