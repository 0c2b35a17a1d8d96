"""Side by side, one above the other, transposed, inverted."""

import pytest
import torch

from openreml_nn.covariance import AR1Matrix, Augment, DiagonalMatrix, Inverse, Stack, Transpose

A = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_formulas() -> None:
    torch.testing.assert_close(Augment(A, A + 1)(), torch.cat([A, A + 1], dim=1))
    torch.testing.assert_close(Stack(A, A + 1)(), torch.cat([A, A + 1]))
    torch.testing.assert_close(Transpose(A)(), A.mT)
    precision = AR1Matrix(4, start=[2.0, 0.5])
    torch.testing.assert_close(Inverse(precision)() @ precision(), torch.eye(4, dtype=torch.float64))


def test_inverse_of_ar1_is_tridiagonal() -> None:
    W = Inverse(AR1Matrix(4, start=[2.0, 0.5]))()
    assert W.tril(-2).abs().max().item() < 1e-14


def test_diagonal_is_kept() -> None:
    assert Inverse(DiagonalMatrix(2)).is_diagonal
    assert Transpose(DiagonalMatrix(2)).is_diagonal


def test_shapes() -> None:
    with pytest.raises(ValueError, match="same rows"):
        Augment(A, A.mT)
    with pytest.raises(ValueError, match="same columns"):
        Stack(A, A.mT)
    with pytest.raises(ValueError, match=r"square operands, got one of shape \(2, 3\)"):
        Inverse(A)
    with pytest.raises(ValueError, match="got 2"):
        Transpose(A, A)
