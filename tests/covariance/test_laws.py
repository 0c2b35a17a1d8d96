"""Every structure and operator keeps every law of the contract: one table of cases."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn.covariance import (
    AR1Matrix,
    Augment,
    BlockDiagonal,
    CellMatrix,
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DiagonalPropagation,
    DummyMatrix,
    EqualEntryMatrix,
    EquicorrelationMatrix,
    ExponentialMatrix,
    FactorAnalyticMatrix,
    GaussianMatrix,
    Gram,
    HadamardProduct,
    IdentityMatrix,
    Inverse,
    KhatriRaoMatrix,
    KnownMatrix,
    KroneckerProduct,
    Levels,
    LowerTriangularMatrix,
    Matrix,
    Product,
    ScalarMatrix,
    SimpleMatrix,
    Stack,
    Sum,
    Transpose,
    UnconstrainedMatrix,
    UnstructuredMatrix,
)
from openreml_nn.covariance.transform import (
    TransformChain,
    TransformExp,
    TransformExp2,
    TransformExp10,
    TransformIdentity,
    TransformPow,
    TransformScaleShift,
    TransformSigmoid,
)
from openreml_nn.testing import check_matrix

SEMIDEFINITE = {"definite": False}
FREE = {"covariance": False}
ODD_NAMES = Levels(["a.b", "c:d", "e^2", "training", "type_", "%", "x y", "1/2"])


def kernel(n: int, rank: int) -> Tensor:
    M = torch.randn(n, rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return M @ M.mT / rank


def groups(n: int, size: int) -> DummyMatrix:
    """``n`` rows in groups of ``size``."""
    return DummyMatrix(np.arange(n) // size)


def slopes(n: int, size: int) -> KhatriRaoMatrix:
    return KhatriRaoMatrix(np.column_stack([np.ones(n), np.linspace(-1.0, 2.0, n)]), groups(n, size))


def tied() -> Matrix:
    A = AR1Matrix(3)
    return BlockDiagonal(first=A, other=ScalarMatrix(2), again=A)


def tied_at_depth() -> Matrix:
    G, B = UnstructuredMatrix(2), ScalarMatrix(4)
    K = SimpleMatrix(kernel(4, 4))
    return Sum(KroneckerProduct(IdentityMatrix(2), G), BlockDiagonal(G, G), HadamardProduct(B, K))


def mixed_model() -> Matrix:
    """Crossed and nested terms, random slopes, a kernel, a spatial residual."""
    rows = np.arange(24)
    return Sum(
        site=CovariancePropagation(DummyMatrix(rows % 5), ScalarMatrix(5)),
        subject=CovariancePropagation(slopes(24, 2), KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(12))),
        animal=CovariancePropagation(DummyMatrix(rows % 7), KnownMatrix(kernel(7, 9))),
        residual=BlockDiagonal(AR1Matrix(10), AR1Matrix([1, 3, 4, 9]), DiagonalMatrix(10)),
    )


CASES: dict[str, tuple[Callable[[], Matrix], dict[str, Any]]] = {
    # structures
    "scalar": (lambda: ScalarMatrix(4), {}),
    "scalar of size 1": (lambda: ScalarMatrix(1), {}),
    "scalar with start": (lambda: ScalarMatrix(3, start=2.5), {}),
    "identity": (lambda: IdentityMatrix(3), {}),
    "diagonal": (lambda: DiagonalMatrix(3), {}),
    "diagonal with odd names": (lambda: DiagonalMatrix(ODD_NAMES), {}),
    "diagonal, mixed transforms": (
        lambda: DiagonalMatrix(4, [TransformExp(), TransformExp2(), TransformExp(), TransformExp10()]),
        {},
    ),
    "equal entries": (lambda: EqualEntryMatrix(3), SEMIDEFINITE),
    "equicorrelation": (lambda: EquicorrelationMatrix(4), {}),
    "compound symmetric": (lambda: CompoundSymmetricMatrix(5), {}),
    "compound symmetric of size 1": (lambda: CompoundSymmetricMatrix(1), {}),
    "AR(1)": (lambda: AR1Matrix(6), {}),
    "AR(1) with gaps": (lambda: AR1Matrix([3, 1, 10, 4]), {}),
    "AR(1) over levels": (lambda: AR1Matrix(Levels(["2001", "2003", "2002"], [2001, 2003, 2002])), {}),
    "AR(1), one time": (lambda: AR1Matrix(1), {}),
    "exponential": (lambda: ExponentialMatrix([0.0, 1.0, 2.5, 7.0]), {}),
    "exponential in the plane": (lambda: ExponentialMatrix(np.array([[0, 0], [0, 1], [2, 3], [5, 1]])), {}),
    "Gaussian": (lambda: GaussianMatrix([0.0, 1.0, 2.5, 7.0]), SEMIDEFINITE),
    "known": (lambda: KnownMatrix(kernel(5, 8)), {}),
    "known, singular": (lambda: KnownMatrix(kernel(5, 2)), SEMIDEFINITE),
    "unstructured": (lambda: UnstructuredMatrix(3), {}),
    "unstructured with start": (lambda: UnstructuredMatrix(3, start=kernel(3, 9)), {}),
    "unstructured with odd names": (lambda: UnstructuredMatrix(Levels(["a.b", "c:d"])), {}),
    "factor analytic, 1": (lambda: FactorAnalyticMatrix(4), {}),
    "factor analytic, 2": (lambda: FactorAnalyticMatrix(Levels(list("abcde")), 2), {}),
    "unconstrained": (lambda: UnconstrainedMatrix(2, 3), FREE),
    "lower triangular": (lambda: LowerTriangularMatrix(3), FREE),
    "simple": (lambda: SimpleMatrix(kernel(3, 5)), {}),
    "simple, float32": (lambda: SimpleMatrix(torch.eye(3)), {}),
    "simple, rectangular": (lambda: SimpleMatrix(np.arange(6).reshape(2, 3)), FREE),
    "dummy": (lambda: DummyMatrix(list("abcabb")), FREE),
    "dummy, many levels": (lambda: groups(30, 2), FREE),
    "dummy, unknown levels": (lambda: DummyMatrix(np.arange(30) // 2, levels=range(14), unknown="zero"), FREE),
    "slopes": (lambda: slopes(8, 2), FREE),
    "slopes, many levels": (lambda: slopes(32, 2), FREE),
    "slopes, unknown levels": (
        lambda: KhatriRaoMatrix(
            np.arange(60.0).reshape(30, 2) / 20, DummyMatrix(np.arange(30) // 2, levels=range(14), unknown="zero")
        ),
        FREE,
    ),
    "cells": (lambda: CellMatrix(torch.arange(9) % 3, DummyMatrix(np.arange(9) // 3), list("abc")), FREE),
    # transforms of a variance
    "variance by its root": (lambda: ScalarMatrix(2, TransformPow(2)), {}),
    "variance by its inverse": (lambda: ScalarMatrix(2, TransformPow(-1), start=3.0), {}),
    "variance between bounds": (lambda: ScalarMatrix(2, TransformSigmoid(0.5, 3.0)), {}),
    "variance above a bound": (
        lambda: ScalarMatrix(2, TransformChain([TransformExp(), TransformScaleShift(2.0, 0.1)])), {}
    ),
    "entry on its own scale": (lambda: EqualEntryMatrix(2, TransformIdentity()), FREE),
    "cubes": (lambda: DiagonalMatrix(2, [TransformPow(3)]), FREE),
    # operators
    "sum": (lambda: Sum(ScalarMatrix(3), EqualEntryMatrix(3)), {}),
    "sum of one": (lambda: Sum(ScalarMatrix(3)), {}),
    "sum with a fixed operand": (lambda: Sum(K=kernel(3, 5), residual=ScalarMatrix(3)), {}),
    "sum of fixed operands": (lambda: Sum(kernel(3, 5), IdentityMatrix(3)), {}),
    "sum of diagonals": (lambda: Sum({"a.b": DiagonalMatrix(3), "training": ScalarMatrix(3)}), {}),
    "block diagonal": (lambda: BlockDiagonal(AR1Matrix(3), ScalarMatrix(2)), {}),
    "block diagonal, rectangular": (lambda: BlockDiagonal(UnconstrainedMatrix(2, 3), UnconstrainedMatrix(1)), FREE),
    "block diagonal of diagonals": (lambda: BlockDiagonal(DiagonalMatrix(2), IdentityMatrix(1)), {}),
    "block diagonal, tied": (tied, {}),
    "propagation": (lambda: CovariancePropagation(groups(6, 2), AR1Matrix(3)), SEMIDEFINITE),
    "propagation, many levels": (lambda: CovariancePropagation(groups(36, 2), DiagonalMatrix(18)), SEMIDEFINITE),
    "propagation of slopes": (
        lambda: CovariancePropagation(slopes(32, 2), KroneckerProduct(UnstructuredMatrix(2), ScalarMatrix(16))),
        SEMIDEFINITE,
    ),
    "propagation of slopes, correlated levels": (
        lambda: CovariancePropagation(slopes(8, 2), KroneckerProduct(UnstructuredMatrix(2), AR1Matrix(4))),
        SEMIDEFINITE,
    ),
    "propagation by free loadings": (
        lambda: CovariancePropagation(UnconstrainedMatrix(4, 2), IdentityMatrix(2)), SEMIDEFINITE
    ),
    "diagonal propagation": (
        lambda: DiagonalPropagation(np.array([[1, 0], [1, 0], [0, 1]]), DiagonalMatrix(2)), {}
    ),
    "diagonal propagation, correlated": (
        lambda: DiagonalPropagation([[1.0, 0.5], [1.0, 2.0]], UnstructuredMatrix(2)), {}
    ),
    "Kronecker": (lambda: KroneckerProduct(UnstructuredMatrix(2), AR1Matrix(3)), {}),
    "Kronecker of three": (lambda: KroneckerProduct(AR1Matrix(2), kernel(3, 5), CompoundSymmetricMatrix(2)), {}),
    "Kronecker, level blocks": (lambda: KroneckerProduct(UnstructuredMatrix(2), ScalarMatrix(3)), {}),
    "Kronecker, rectangular": (lambda: KroneckerProduct(UnconstrainedMatrix(2, 3), UnconstrainedMatrix(1, 2)), FREE),
    "Kronecker of one with itself": (lambda: (lambda A: KroneckerProduct(A, A))(AR1Matrix(2)), {}),
    "Hadamard": (lambda: HadamardProduct(AR1Matrix(3), KnownMatrix(kernel(3, 5))), {}),
    "Hadamard with a diagonal": (lambda: HadamardProduct(DiagonalMatrix(3), KnownMatrix(kernel(3, 5))), {}),
    "product": (lambda: Product(UnconstrainedMatrix(2, 3), DiagonalMatrix(3), UnconstrainedMatrix(3, 2)), FREE),
    "product of diagonals": (lambda: Product(DiagonalMatrix(3), ScalarMatrix(3)), {}),
    "Gram": (lambda: Gram(LowerTriangularMatrix(3)), SEMIDEFINITE),
    "Gram of a rectangle": (lambda: Gram(UnconstrainedMatrix(3, 2)), SEMIDEFINITE),
    "transpose": (lambda: Transpose(UnconstrainedMatrix(2, 3)), FREE),
    "augment": (lambda: Augment(UnconstrainedMatrix(2, 3), IdentityMatrix(2)), FREE),
    "stack": (lambda: Stack(UnconstrainedMatrix(2, 3), UnconstrainedMatrix(1, 3)), FREE),
    "inverse": (lambda: Inverse(AR1Matrix(4)), {}),
    "nested": (lambda: Inverse(Sum(a=KroneckerProduct(b=AR1Matrix(2), c=ScalarMatrix(2)), d=IdentityMatrix(4))), {}),
    "tied at depth": (tied_at_depth, {}),
    "mixed model": (mixed_model, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_laws(name: str) -> None:
    make, expected = CASES[name]
    check_matrix(make(), **expected)


@pytest.mark.parametrize("make", [lambda: AR1Matrix(4), tied, mixed_model])
def test_laws_with_a_fixed_parameter(make: Callable[[], Matrix]) -> None:
    V = make()
    V.set_no_grad(index=1)
    check_matrix(V, thetas=3)


@pytest.mark.parametrize("make", [lambda: AR1Matrix(4), lambda: KnownMatrix(kernel(3, 5)), tied])
def test_laws_after_a_cast_to_float32(make: Callable[[], Matrix]) -> None:
    check_matrix(make().float(), thetas=3)
