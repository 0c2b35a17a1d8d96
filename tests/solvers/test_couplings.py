"""The two ways to keep a coupling are the same matrix."""

import torch
from torch import Tensor

from openreml_nn.solvers import orders
from openreml_nn.solvers.couplings import DenseCoupling, SparseCoupling
from openreml_nn.solvers.layouts import DenseLayout

generator = torch.Generator().manual_seed(5)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_couplings_agree() -> None:
    """Sparse and dense coupling are the same matrix."""
    level = torch.tensor([0, 0, 1, 2, 2, 2])
    column = torch.tensor([0, 2, 1, 0, 1, 3])
    value = normal(2, 6)
    C = torch.zeros(2, 3, 4, dtype=torch.float64)
    C[:, level, column] = value
    sparse, dense = SparseCoupling(level, column, value, (2, 3, 4)), DenseCoupling(C)
    A = normal(2, 2, 3)
    K, Phi = A + A.transpose(0, 1), (lambda B: B + B.mT)(normal(4, 4))
    flat = Phi.reshape(-1)
    torch.testing.assert_close(sparse.layout.whole(sparse.schur(flat, K)), dense.schur(flat, K))
    torch.testing.assert_close(sparse.within(flat), dense.within(flat))
    torch.testing.assert_close(sparse.to_rest(normal(2, 5, 3) * 0 + A[:, :1]), dense.to_rest(A[:, :1].expand(2, 5, 3)))
    torch.testing.assert_close(sparse.to_first(Phi), dense.to_first(Phi))
    torch.testing.assert_close(sparse.squares(), dense.squares())
    assert sparse.numel() > 0 < dense.numel()


def test_pairs_that_repeat_are_counted_once() -> None:
    """Levels that all couple neighbours of 300 columns: many more pairs than a dense matrix has elements."""
    level = torch.arange(200_000).repeat_interleave(2)
    column = (torch.arange(200_000)[:, None] % 299 + torch.arange(2)).flatten()
    value = torch.ones(1, len(level), dtype=torch.float64)
    layout = SparseCoupling(level, column, value, (1, 200_000, 300), beside=level[:0]).layout
    assert not isinstance(layout, DenseLayout)
    assert layout.length < 300 * (orders.NARROWEST + 1)
