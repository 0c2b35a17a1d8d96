"""DiagonalPropagation is the diagonal of X D X'."""

import pytest
import torch

from openreml_nn.covariance import DiagonalMatrix, DiagonalPropagation, Matrix, UnstructuredMatrix
from openreml_nn.testing import check_matrix

X = torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


COVARIANCES = [DiagonalMatrix(2, start=[4.0, 9.0]), UnstructuredMatrix(2, start=[[2.0, 0.5], [0.5, 1.0]])]


@pytest.mark.parametrize("D", COVARIANCES)
def test_is_the_diagonal(D: Matrix) -> None:
    V = DiagonalPropagation(X, D)
    torch.testing.assert_close(V(), torch.diag((X @ D() @ X.mT).diagonal()))
    assert V.is_diagonal
    check_matrix(DiagonalPropagation(X, D))


def test_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one column of X for each row of D"):
        DiagonalPropagation(X, DiagonalMatrix(3))
    with pytest.raises(ValueError, match="shape"):
        DiagonalPropagation(X[:, 0], DiagonalMatrix(1))
