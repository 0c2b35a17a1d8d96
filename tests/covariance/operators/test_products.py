"""Kronecker, Hadamard, ordinary products and Gram, against torch."""

import pytest
import torch

from openreml_nn.covariance import (
    AR1Matrix,
    DiagonalMatrix,
    Gram,
    HadamardProduct,
    IdentityMatrix,
    KroneckerProduct,
    Product,
    ScalarMatrix,
    UnstructuredMatrix,
)

A = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
B = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_formulas() -> None:
    torch.testing.assert_close(KroneckerProduct(A, B)(), torch.kron(A, B))
    torch.testing.assert_close(HadamardProduct(A, B.mT.contiguous())(), A * B.mT)
    torch.testing.assert_close(Product(A, B)(), A @ B)
    torch.testing.assert_close(Gram(A)(), A @ A.mT)


def test_a_large_kronecker_product_multiplies_without_its_dense_form() -> None:
    """2,000 × 2,000 times 1,000 × 1,000 would take 32 TB."""
    V = KroneckerProduct(AR1Matrix(2000), ScalarMatrix(1000, start=2.0))
    theta = V.theta.detach()
    assert V.matmul(theta, torch.ones(2_000_000, 1, dtype=torch.float64)).mean().item() == pytest.approx(2.0)
    rows = torch.tensor([0, 1_999_999])
    assert V.submatrix(theta, rows, rows).diagonal().tolist() == pytest.approx([2.0, 2.0])


def test_level_blocks_of_random_slopes() -> None:
    G = UnstructuredMatrix(2, start=[[4.0, 1.0], [1.0, 9.0]])
    V = KroneckerProduct(G, IdentityMatrix(3))
    blocks = V.level_blocks(V.theta, 3)
    assert blocks is not None
    torch.testing.assert_close(blocks, G().expand(3, 2, 2))
    assert KroneckerProduct(G, AR1Matrix(3)).level_blocks(torch.zeros(5), 3) is None


def test_diagonal_products() -> None:
    assert KroneckerProduct(DiagonalMatrix(2), IdentityMatrix(2)).is_diagonal
    assert not KroneckerProduct(DiagonalMatrix(2), AR1Matrix(2)).is_diagonal
    assert HadamardProduct(DiagonalMatrix(2), AR1Matrix(2)).is_diagonal
    assert Product(DiagonalMatrix(2), IdentityMatrix(2)).is_diagonal
    assert Gram(DiagonalMatrix(2)).is_diagonal


def test_shapes() -> None:
    with pytest.raises(ValueError, match="one shape"):
        HadamardProduct(A, B)
    with pytest.raises(ValueError, match=r"fit, got \[\(2, 3\), \(2, 3\)\]"):
        Product(A, A)
    with pytest.raises(ValueError, match=r"1 operand \(A\), got 2"):
        Gram(A, B)
