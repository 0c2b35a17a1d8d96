"""Sparse matrices against dense ones."""

import copy
import pickle

import pytest
import torch

from openreml_nn.solvers.sparse import by_rows, order_of, sparse_matrix

generator = torch.Generator().manual_seed(12)
ROW, COLUMN = (torch.randint(0, k, (40,), generator=generator) for k in (9, 14))
VALUE = torch.randn(40, generator=generator, dtype=torch.float64)
DENSE = torch.zeros(9, 14, dtype=torch.float64).index_put_((ROW, COLUMN), VALUE, accumulate=True)


@pytest.mark.parametrize("ordered", [False, True])
def test_products(ordered: bool) -> None:
    order = ROW.argsort(stable=True) if ordered else torch.arange(40)
    A = sparse_matrix(ROW[order], COLUMN[order], VALUE[order], (9, 14))
    x, y = (torch.randn(k, 3, generator=generator, dtype=torch.float64) for k in (14, 9))
    torch.testing.assert_close(A.to_dense(), DENSE)
    torch.testing.assert_close(A @ x, DENSE @ x)
    torch.testing.assert_close(A @ x[:, 0], DENSE @ x[:, 0])
    torch.testing.assert_close(A.T @ y, DENSE.mT @ y)
    assert A.T.shape == (14, 9)


def test_filled_columns() -> None:
    A = sparse_matrix(ROW, 2 * COLUMN, VALUE, (9, 40))
    part, filled = A.filled_columns()
    assert torch.equal(filled, 2 * COLUMN.unique())
    torch.testing.assert_close(part.to_dense(), A.to_dense()[:, filled].mT)


def test_empty_rows_and_nothing() -> None:
    A = by_rows(torch.tensor([0, 2, 0]), torch.tensor([1, 3]), VALUE[:2], (3, 5))
    assert A.to_dense().count_nonzero(1).tolist() == [0, 2, 0]
    nothing = by_rows(torch.zeros(3, dtype=torch.int64), COLUMN[:0], VALUE[:0], (3, 5))
    assert not (nothing @ torch.ones(5, 2, dtype=torch.float64)).any()


def test_order() -> None:
    sizes, order = order_of(ROW, 12)
    assert order is not None
    assert torch.equal(sizes, torch.bincount(ROW, minlength=12))
    assert torch.equal(order.long(), ROW.argsort(stable=True))
    assert order_of(ROW.sort()[0], 12)[1] is None


def test_copies() -> None:
    A = sparse_matrix(ROW, COLUMN, VALUE, (9, 14))
    x = torch.ones(14, dtype=torch.float64)
    product = A @ x
    for other in (copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert torch.equal(other @ x, product)
