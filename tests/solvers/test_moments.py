"""Variances by moments against the same formulas with dense matrices, and as start values."""

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn import fit
from openreml_nn.covariance import (
    CovariancePropagation,
    DiagonalPropagation,
    DummyMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.optim import data_start
from openreml_nn.solvers import DenseSolver, orders
from openreml_nn.solvers.mixed_model_equations import MixedModelEquationsSolver
from openreml_nn.solvers.mixed_model_problem import MixedModelProblem

generator = torch.Generator().manual_seed(3)
N = 240
GENOTYPE, BLOCK, TRIAL = (torch.randint(k, (N,), generator=generator) for k in (60, 48, 5))
X = torch.stack([torch.ones(N, dtype=torch.float64), torch.randn(N, generator=generator, dtype=torch.float64)], dim=1)
WEIGHT = 0.5 + torch.rand(N, generator=generator, dtype=torch.float64)
TERMS = {"none": [], "one": [GENOTYPE], "two": [GENOTYPE, BLOCK], "three": [BLOCK, GENOTYPE, TRIAL]}
TRUE = [0.8, 0.5, 0.6]


def response(codes: list[Tensor]) -> Tensor:
    effects = [v**0.5 * torch.randn(60, generator=generator, dtype=torch.float64)[c]
               for v, c in zip(TRUE, codes, strict=False)]  # fmt: skip
    return 3.0 + X[:, 1] + torch.randn(N, generator=generator, dtype=torch.float64) + sum(effects)


def covariance(codes: list[Tensor], weighted: bool) -> Sum:
    terms: dict[str, Matrix] = {}
    for i, code in enumerate(codes):
        Z = DummyMatrix(code)
        terms[f"term{i}"] = CovariancePropagation(Z, ScalarMatrix(Z.num_levels))
    residual = DiagonalPropagation(WEIGHT.rsqrt()[:, None], ScalarMatrix(1)) if weighted else ScalarMatrix(N)
    return Sum(terms | {"residual": residual})


def by_hand(V: Sum, y: Tensor, X: Tensor = X) -> np.ndarray:
    """Solve E y'MV_iMy = Σ_j σ_j² tr MV_iMV_j with M the projection in the metric of R₀⁻¹."""
    one = torch.zeros(V.num_params, dtype=torch.float64)
    parts = [V.operand(name).build(one[:1]) for name in V.operand_names]
    parts = [part / V.operand(name).trans_params(one[:1]) for name, part in zip(V.operand_names, parts, strict=True)]
    root = parts[-1].diagonal().rsqrt()
    W = root[:, None] * X
    M = root[:, None] * (torch.eye(N, dtype=torch.float64) - W @ torch.linalg.inv(W.mT @ W) @ W.mT) * root
    left = torch.tensor([[(M @ a @ M * b.mT).sum() for b in parts] for a in parts])
    right = torch.stack([y @ M @ a @ M @ y for a in parts])
    return torch.linalg.solve(left.to(torch.float64), right).numpy()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("names", TERMS)
@pytest.mark.parametrize("chained", [False, True])
def test_equals_dense_formulas(names: str, weighted: bool, chained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if chained:
        monkeypatch.setattr(orders, "CALL", 0)
    codes = TERMS[names]
    V, y = covariance(codes, weighted), response(codes)
    problem = MixedModelEquationsSolver().prepare(V, y, X)
    found = problem.moment_variances()
    expected = by_hand(V, y)
    assert (expected > 0.02).all()
    np.testing.assert_allclose([found[i] for i in range(len(expected))], expected, rtol=1e-9)
    np.testing.assert_allclose(V.trans_params(data_start(problem)).numpy(), expected, rtol=1e-9)


def test_a_negative_estimate_starts_above_zero() -> None:
    y = torch.randn(N, generator=generator, dtype=torch.float64) - 0.2 * torch.arange(N).remainder(2)
    V = covariance([torch.arange(N) // 2, BLOCK], False)
    found = MixedModelEquationsSolver().prepare(V, y, X).moment_variances()
    assert min(found.values()) == pytest.approx(0.01 * float(y.var()), rel=0.1)


def test_equal_shares_where_moments_tell_nothing() -> None:
    """Two terms with the same levels, a fixed variance, a structure with more parameters, another solver."""
    y = response([GENOTYPE])
    same = covariance([GENOTYPE, GENOTYPE], False)
    assert MixedModelEquationsSolver().prepare(same, y, X).moment_variances() == {}
    Z = DummyMatrix(GENOTYPE)
    slopes = Sum({
        "slope": CovariancePropagation(Z, KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(Z.num_levels // 2))),
        "residual": ScalarMatrix(N),
    })  # fmt: skip
    assert MixedModelEquationsSolver().prepare(slopes, y, X).moment_variances() == {}
    assert DenseSolver().prepare(covariance([GENOTYPE], False), y, X).moment_variances() == {}
    fixed = covariance([GENOTYPE, BLOCK], False)
    fixed.operand("term1").requires_grad_(False)
    problem = MixedModelEquationsSolver().prepare(fixed, y, X)
    start = fixed.trans_params(data_start(problem))
    torch.testing.assert_close(start[0], start[2])


def test_fits_are_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two crossed factors with two rows in each of 480 cells."""
    row, column = torch.arange(960) // 2 % 24, torch.arange(960) // 48
    effects = torch.randn(24, generator=generator).double()[row] + torch.randn(20, generator=generator).double()[column]
    y = effects + torch.randn(960, generator=generator).double()

    def steps() -> int:
        terms = {str(i): CovariancePropagation(DummyMatrix(c), ScalarMatrix(k)) for i, (c, k) in
                 enumerate([(row, 24), (column, 20)])}  # fmt: skip
        return fit(Sum(terms | {"residual": ScalarMatrix(960)}), y).n_iter

    shorter = steps()
    monkeypatch.setattr(MixedModelProblem, "moment_variances", lambda self: {})
    assert shorter < steps()


@pytest.mark.parametrize("first", ["levels", "a dense design"])
@pytest.mark.parametrize("p", [0, 2])
@pytest.mark.parametrize("chained", [False, True])
def test_slopes_and_rows_of_no_level(first: str, p: int, chained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of no level in the largest term, slopes in another; or no term that is eliminated; X without columns."""
    if chained:
        monkeypatch.setattr(orders, "CALL", 0)
    known = np.where(np.arange(N) % 3 == 0, "none", GENOTYPE.numpy().astype(str))
    Z = DummyMatrix(known, levels=[str(i) for i in range(60)], unknown="zero")
    slopes = KhatriRaoMatrix(X[:, 1:], DummyMatrix(BLOCK))
    W = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    b = torch.randn(60, generator=generator, dtype=torch.float64)
    y = b[GENOTYPE] + X[:, 1] * b[BLOCK] + torch.randn(N, generator=generator, dtype=torch.float64) + 0.5 * W.sum(1)
    terms: dict[str, Matrix] = {"dense": CovariancePropagation(W, ScalarMatrix(4))}
    if first == "levels":
        terms = {"some": CovariancePropagation(Z, ScalarMatrix(60)),
                 "slopes": CovariancePropagation(slopes, ScalarMatrix(slopes.num_levels))}  # fmt: skip
    V = Sum(terms | {"residual": DiagonalPropagation(WEIGHT.rsqrt()[:, None], ScalarMatrix(1))})
    found = MixedModelEquationsSolver().prepare(V, y, X[:, :p]).moment_variances()
    expected = by_hand(V, y, X[:, :p])
    assert (expected > 0.02).all()
    np.testing.assert_allclose([found[i] for i in range(len(expected))], expected, rtol=1e-9)


def test_no_variance_explains_more_than_all() -> None:
    """Weights over ten decades, where moments say little."""
    weight = 10.0 ** (10.0 * torch.rand(N, generator=generator, dtype=torch.float64) - 5.0)
    y = response([GENOTYPE]) + weight.rsqrt() * torch.randn(N, generator=generator, dtype=torch.float64)
    Z = DummyMatrix(GENOTYPE)
    V = Sum(
        term0=CovariancePropagation(Z, ScalarMatrix(Z.num_levels)),
        residual=DiagonalPropagation(weight.rsqrt()[:, None], ScalarMatrix(1)),
    )
    problem = MixedModelEquationsSolver().prepare(V, y, X)
    U, e = problem.fixed.U, problem.fixed.e
    U, e = weight.sqrt()[:, None] * U, weight.sqrt() * e
    left = e - U @ torch.linalg.lstsq(U, e[:, None]).solution[:, 0]
    most = float(left.square().sum()) / (N - 2)
    assert 0.0 < problem.moment_variances()[1] <= most * (1.0 + 1e-9)
