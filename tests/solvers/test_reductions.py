"""Reductions of any source and size against the matrices that they are of; log-determinants and their slopes."""

import math

import pytest
import torch
from torch import Tensor

from openreml_nn.covariance import KnownMatrix
from openreml_nn.solvers.reductions import (
    BandReduction,
    DiagonalFactor,
    Reduction,
    SpectralDecomposition,
    reduce,
    reduce_factor,
    reduce_kernel,
)
from openreml_nn.solvers.sources import Source

generator = torch.Generator().manual_seed(9)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def kernel(n: int, rank: int) -> Tensor:
    W = normal(n, rank)
    return W @ W.mT / rank


K, D = kernel(20, 24), torch.tensor([3.0, 0.0, 1.0, 1.0] * 5, dtype=torch.float64)
WIDE, TALL, Z = normal(12, 20), normal(20, 12), normal(15, 20)
SEEN = D > 0
ROOT = D[SEEN].sqrt()
SOURCES: dict[str, tuple[Source, Tensor]] = {
    "kernel": (Source("kernel", (K, torch.ones_like(D))), K),
    "kernel of single precision": (Source("kernel", (K.float(), torch.ones_like(D))), K.float().double()),
    "counts": (Source("kernel", (K, D)), ROOT[:, None] * K[SEEN][:, SEEN] * ROOT),
    "independent levels": (Source("kernel", (None, D)), torch.diag(D[SEEN])),
    "one level": (Source("kernel", (K, D * (torch.arange(20) == 4))), D[4] * K[4:5, 4:5]),
    "no level": (Source("kernel", (K, 0.0 * D)), K[:0, :0]),
    "inner": (Source("inner", (TALL,)), TALL.mT @ TALL),
    "outer": (Source("outer", (WIDE,)), WIDE @ WIDE.mT),
    "sandwich": (Source("sandwich", (Z, K)), Z @ K @ Z.mT),
}
SCALES = [(1.0, 1.0), (1e-3, 2.0), (40.0, 0.1), (0.0, 3.0), (1e-10, 1.0), (-1e-4, 1.0)]


def check(reduction: Reduction, A: Tensor) -> None:
    """All that a reduction gives, against A."""
    n = len(A)
    x, one = normal(n, 3), torch.eye(n, dtype=torch.float64)
    assert reduction.size == n
    assert reduction.trace == pytest.approx(float(A.trace()), rel=1e-12)
    torch.testing.assert_close(reduction.rotate_back(reduction.times(reduction.rotate(x))), A @ x)
    torch.testing.assert_close(reduction.rotate(reduction.rotate_back(x)), x)
    values = torch.linalg.eigvalsh(A)
    for a, b in SCALES:
        factor = reduction.factor(a, b)
        assert factor.logdet == pytest.approx(float((a * values + b).log().sum()), rel=1e-10, abs=1e-10)
        expected = float((values / (a * values + b)).sum()), float((a * values + b).reciprocal().sum())
        assert reduction.slopes(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-10 * n / b)
        solved = reduction.rotate_back(factor.solve(reduction.rotate(x)))
        torch.testing.assert_close((a * A + b * one) @ solved, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eigenvectors", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_every_source(name: str, eigenvectors: bool) -> None:
    source, A = SOURCES[name]
    given = [None if x is None else x.clone() for x in source.tensors]
    check(reduce(source, eigenvectors), A)
    for x, before in zip(source.tensors, given, strict=True):
        assert x is before or torch.equal(x, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 2, 3, 31, 33, 34, 66, 100, 530])
def test_band_of_any_size(n: int) -> None:
    """Of half the rank; of two widths of the band and one more."""
    A = kernel(n, max(n // 2, 1))
    reduction, exact = reduce_kernel(A), reduce_kernel(A, eigenvectors=True)
    assert isinstance(reduction, BandReduction)
    assert isinstance(exact, SpectralDecomposition)
    check(exact, A)
    x = normal(n, 2)
    torch.testing.assert_close(
        reduction.rotate_back(reduction.times(reduction.rotate(x))), A @ x, rtol=1e-11, atol=1e-11
    )
    for a, b in SCALES:
        assert reduction.factor(a, b).logdet == pytest.approx(exact.factor(a, b).logdet, rel=1e-10, abs=1e-10)
        assert reduction.slopes(a, b) == pytest.approx(exact.slopes(a, b), rel=1e-9)


def test_many_columns_are_rotated_as_few_are() -> None:
    reduction, x = reduce_kernel(kernel(70, 80)), normal(70, 100)
    for rotate in (reduction.rotate, reduction.rotate_back):
        torch.testing.assert_close(rotate(x), torch.cat([rotate(part) for part in x.split(5, dim=1)], dim=1))


def test_slopes_over_sixteen_decades() -> None:
    """From interpolations on intervals, their ends among them, without a jump: a ∂/∂a and b ∂/∂b."""
    A = kernel(40, 60)
    reduction, values = reduce_kernel(A), torch.linalg.eigvalsh(A)
    for t in torch.linspace(-19.0, 19.0, 77).tolist():
        a = math.exp(t)
        of_a, of_b = reduction.slopes(a, 1.0)
        share = a * values / (a * values + 1.0)
        assert a * of_a == pytest.approx(float(share.sum()), rel=0.0, abs=1e-9)
        assert of_b == pytest.approx(float((1.0 - share).sum()), rel=0.0, abs=1e-9)


def test_slopes_of_a_kernel_that_is_indefinite_by_rounding() -> None:
    """An interval on which aB + bI has no factor somewhere, and one without residual variance."""
    A = kernel(12, 5) - 1e-9 * torch.eye(12, dtype=torch.float64)
    reduction, values = reduce_kernel(A), torch.linalg.eigvalsh(A)
    a = math.exp(20.0)
    expected = float((values / (a * values + 1.0)).sum()), float((a * values + 1.0).reciprocal().sum())
    assert reduction.slopes(a, 1.0) == pytest.approx(expected, rel=1e-4)
    B = kernel(12, 20)
    assert reduce_kernel(B).slopes(2.0, 0.0) == pytest.approx((6.0, 0.5 * float(torch.linalg.inv(B).trace())), rel=1e-9)


@pytest.mark.parametrize("eigenvectors", [False, True])
def test_not_positive_definite(eigenvectors: bool) -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        reduce_kernel(K, eigenvectors=eigenvectors).factor(-1.0, 0.5)


def test_a_diagonal() -> None:
    factor, x = DiagonalFactor(torch.tensor([2.0, 4.0]).double()), normal(2, 3)
    assert factor.logdet == pytest.approx(math.log(8.0))
    torch.testing.assert_close(factor.solve(x), x / torch.tensor([[2.0], [4.0]]).double())
    for values in ([1.0, 0.0], [1.0, -1.0], [1.0, torch.nan]):
        with pytest.raises(torch.linalg.LinAlgError, match="smallest eigenvalue"):
            DiagonalFactor(torch.tensor(values))


def test_kernels_of_a_caller() -> None:
    """Counts left out, a `KnownMatrix`, arrays, and the mean of K and K'."""
    plain = reduce_kernel(K)
    for given in (
        KnownMatrix(K),
        K.numpy(),
        K.tolist(),
        K + torch.triu(torch.ones(20, 20), 1) - torch.ones(20, 20).tril(-1),
    ):
        assert reduce_kernel(given).trace == pytest.approx(plain.trace)
    assert reduce_kernel(KnownMatrix(K)).source.same(plain.source)
    assert reduce_kernel(K, counts=D.tolist()).source.same(SOURCES["counts"][0])


def test_factors_are_reduced_through_their_smaller_side() -> None:
    assert reduce_factor(TALL).source.same(Source("inner", (TALL.clone(),)))
    assert reduce_factor(WIDE.numpy()).source.same(Source("outer", (WIDE,)))
    assert reduce_factor(TALL).size == reduce_factor(WIDE).size == 12


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"square K, got shape \(12, 20\)"):
        reduce_kernel(WIDE)
    with pytest.raises(ValueError, match="count for each of 20 levels"):
        reduce_kernel(K, [1.0])
    with pytest.raises(ValueError, match="count for each of 20 levels"):
        reduce_kernel(K, -D)


def test_memory_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1e3})())
    with pytest.raises(MemoryError, match="20 x 20"):
        reduce_kernel(K)


@pytest.mark.parametrize("b", [1e-6, 1e-12, 1e-24])
def test_slopes_where_b_is_next_to_nothing(b: float) -> None:
    """1/b times a difference of numbers that are alike would be noise, and a residual variance could not go to zero."""
    A = kernel(20, 60)
    _, of_b = reduce_kernel(A).slopes(1.0, b)
    assert of_b == pytest.approx(float((torch.linalg.eigvalsh(A) + b).reciprocal().sum()), rel=1e-9)
