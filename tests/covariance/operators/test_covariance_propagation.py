"""Z G Z': shapes, and level codes that stay codes."""

import pytest
import torch

from openreml_nn.covariance import AR1Matrix, CovariancePropagation, DummyMatrix, ScalarMatrix, SimpleMatrix


def test_formula() -> None:
    Z = torch.randn(4, 3, dtype=torch.float64)
    V = CovariancePropagation(Z, AR1Matrix(3, start=[2.0, 0.5]))
    torch.testing.assert_close(V(), Z @ V.G() @ Z.mT)
    assert isinstance(V.Z, SimpleMatrix)


def test_names_of_the_operands() -> None:
    assert CovariancePropagation(Z=torch.eye(2), G=ScalarMatrix(2)).param_names == ["G/sigma^2"]


@pytest.mark.parametrize(
    ("Z", "G", "text"),
    [
        (torch.eye(2), torch.ones(2, 3), r"square G, got shape \(2, 3\)"),
        (torch.ones(4, 3), torch.eye(2), r"one column of Z for each row of G, got Z of shape \(4, 3\) and G of size 2"),
    ],
)
def test_shapes(Z: torch.Tensor, G: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CovariancePropagation(Z, G)


def test_number_of_operands() -> None:
    with pytest.raises(ValueError, match=r"2 operands \(Z and G\), got 1"):
        CovariancePropagation(torch.eye(2))


def test_many_rows_multiply_without_the_dense_matrix() -> None:
    n, q = 200_000, 20_000
    V = CovariancePropagation(DummyMatrix(torch.arange(n) % q), ScalarMatrix(q, start=2.0))
    product = V.matmul(V.theta.detach(), torch.ones(n, 1, dtype=torch.float64))
    torch.testing.assert_close(product, torch.full((n, 1), 2.0 * n / q, dtype=torch.float64))
