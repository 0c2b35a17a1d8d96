"""CellMatrix is the KhatriRaoMatrix of the indicators of its cells."""

from typing import Any

import pytest
import torch

from openreml_nn.covariance import (
    AR1Matrix,
    CellMatrix,
    CovariancePropagation,
    DummyMatrix,
    ExponentialMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    Matrix,
)
from openreml_nn.testing import check_matrix

CELLS = torch.tensor([0, 1, 2, 0, 2, 1, 0, 1])


def both(subjects: list[str], **options: Any) -> tuple[CellMatrix, KhatriRaoMatrix]:
    dummy = DummyMatrix(subjects, **options)
    one_hot = torch.nn.functional.one_hot(CELLS, 3)
    return CellMatrix(CELLS, dummy, ["1", "2", "4"]), KhatriRaoMatrix(one_hot, dummy, ["1", "2", "4"])


@pytest.mark.parametrize("options", [{}, {"levels": ["b", "c"], "unknown": "zero"}])
@pytest.mark.parametrize("K", [IdentityMatrix(3), ExponentialMatrix([0.0, 1.0, 3.0])])
def test_equals_the_indicators(options: dict[str, Any], K: Matrix) -> None:
    cell, dense = both(list("aaabbccc"), **options)
    K = K if not options else IdentityMatrix(2)
    none = torch.zeros(0, dtype=torch.float64)
    torch.testing.assert_close(cell(), dense())
    rhs, lhs = torch.randn(cell.shape[1], 2, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    torch.testing.assert_close(cell.matmul(none, rhs), dense.matmul(none, rhs))
    torch.testing.assert_close(cell.rmatmul(none, lhs), dense.rmatmul(none, lhs))
    G = KroneckerProduct(AR1Matrix([1, 2, 4], start=[2.0, 0.6]), K)
    V, W = CovariancePropagation(cell, G), CovariancePropagation(dense, G)
    torch.testing.assert_close(V(), W())
    torch.testing.assert_close(V.add_to(torch.zeros(8, 8, dtype=torch.float64), V.theta), W())


def test_many_levels_touch_only_pairs_of_one_level() -> None:
    dummy = DummyMatrix([i // 2 for i in range(40)])
    cell = CellMatrix(torch.arange(40) % 2, dummy, ["0", "1"])
    V = CovariancePropagation(cell, KroneckerProduct(AR1Matrix(2, start=[2.0, 0.6]), IdentityMatrix(20)))
    expected = torch.kron(torch.eye(20, dtype=torch.float64), torch.tensor([[2.0, 1.2], [1.2, 2.0]]).double())
    torch.testing.assert_close(V(), expected)
    torch.testing.assert_close(V.add_to(torch.zeros(40, 40, dtype=torch.float64), V.theta), expected)


def test_keeps_the_contract() -> None:
    cell, _ = both(list("aaabbccc"))
    check_matrix(CovariancePropagation(cell, KroneckerProduct(AR1Matrix([1, 2, 4]), IdentityMatrix(3))), definite=False)


def test_says_what_is_wrong() -> None:
    dummy = DummyMatrix(list("aab"))
    with pytest.raises(ValueError, match="effect of each of 3 rows"):
        CellMatrix(torch.zeros(2), dummy, ["0"])
    with pytest.raises(ValueError, match="from 0 to 0"):
        CellMatrix(torch.tensor([0, 1, 0]), dummy, ["0"])
