"""The mixed-model equations against the dense solver: every quantity of an evaluation, on a table of structures."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openreml_nn import ML, REML, fit
from openreml_nn.covariance import (
    AR1Matrix,
    CellMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DiagonalPropagation,
    DummyMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KnownMatrix,
    KroneckerProduct,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.solvers import DenseSolver, choose_solver
from openreml_nn.solvers.couplings import DenseCoupling, SparseCoupling
from openreml_nn.solvers.mixed_model_equations import MixedModelEquationsSolver

N = 60
generator = torch.Generator().manual_seed(4)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


MANY, FEW = (DummyMatrix(torch.randint(0, k, (N,), generator=generator)) for k in (15, 6))
L, M = MANY.num_levels, FEW.num_levels
ONE, x = torch.ones(N, 1, dtype=torch.float64), normal(N, 1)
W, ROOT = normal(N, 9), normal(M, M - 2)
X, y = torch.cat([ONE, normal(N, 2)], dim=1), normal(N) + 3.0
SOME = DummyMatrix(["a", "b", "c"] * (N // 3), levels=["a", "b", "d"], unknown="zero")


def slopes(dummy: DummyMatrix, *columns: Tensor) -> CovariancePropagation:
    s = len(columns)
    Z = KhatriRaoMatrix(torch.cat(columns, dim=1), dummy)
    return CovariancePropagation(Z, KroneckerProduct(UnstructuredMatrix(s), IdentityMatrix(dummy.num_levels)))


def simple(dummy: DummyMatrix) -> CovariancePropagation:
    return CovariancePropagation(dummy, ScalarMatrix(dummy.num_levels))


def cells(dummy: DummyMatrix) -> CovariancePropagation:
    Z = CellMatrix(torch.arange(N) % 3, dummy, ["r", "s", "t"])
    return CovariancePropagation(Z, KroneckerProduct(UnstructuredMatrix(3), IdentityMatrix(dummy.num_levels)))


RESIDUAL = {"residual": ScalarMatrix(N)}
CASES = {
    "one term": {"g": simple(MANY)},
    "crossed": {"g": simple(MANY), "h": simple(FEW)},
    "slopes in both": {"h": slopes(FEW, ONE, x), "g": slopes(MANY, ONE, x)},
    "three effects": {"g": slopes(MANY, ONE, x, x**2), "h": simple(FEW)},
    "cells": {"g": cells(MANY), "h": simple(FEW)},
    "singular kernel": {"g": simple(MANY), "h": CovariancePropagation(FEW, KnownMatrix(ROOT @ ROOT.mT))},
    "kernel alone": {"h": CovariancePropagation(FEW, KnownMatrix(ROOT @ ROOT.mT))},
    "a variance for each level": {
        "g": CovariancePropagation(MANY, DiagonalMatrix(L)), "h": CovariancePropagation(FEW, DiagonalMatrix(M)),
    },
    "dense design": {"w": CovariancePropagation(W, ScalarMatrix(9))},
    "dense design and levels": {"w": CovariancePropagation(W, ScalarMatrix(9)), "g": simple(MANY)},
    "serial effects": {"g": simple(MANY), "h": CovariancePropagation(FEW, AR1Matrix(M))},
    "rows of no level": {"s": simple(SOME), "g": simple(MANY)},
    "no random term": {},
}  # fmt: skip
TIED = UnstructuredMatrix(2)
CASES["one covariance in two terms"] = {
    name: CovariancePropagation(KhatriRaoMatrix(torch.cat([ONE, x], dim=1), dummy),
                                KroneckerProduct(TIED, IdentityMatrix(dummy.num_levels)))
    for name, dummy in (("g", MANY), ("h", FEW))
}  # fmt: skip
MODELS = {name: Sum(terms | RESIDUAL) for name, terms in CASES.items()} | {
    "weights": Sum(g=simple(MANY), h=simple(FEW), residual=DiagonalPropagation(1.0 + x.abs(), ScalarMatrix(1))),
}


@pytest.mark.parametrize("objective", [REML, ML])
@pytest.mark.parametrize("name", MODELS)
def test_equals_dense(name: str, objective: type[REML] | type[ML], same_as_dense: Callable[..., None]) -> None:
    V = MODELS[name]
    loose = {"its variance": 1e-7}  # a difference of numbers up to a thousand
    for theta in (V.theta.detach(), torch.randn(V.num_params, dtype=torch.float64)):
        same_as_dense(V, theta, y, X, "mixed_model_equations", objective=objective, loose=loose)


@pytest.mark.parametrize("objective", [REML, ML])
@pytest.mark.parametrize("name", ["crossed", "slopes in both", "weights"])
def test_gradient_reaches_response_and_design(name: str, objective: type[REML] | type[ML]) -> None:
    found = []
    for solver in ("mixed_model_equations", "dense"):
        given = [y.clone().requires_grad_(), X.clone().requires_grad_()]
        loss = objective(MODELS[name], solver)(*given)
        found.append(torch.autograd.grad(loss, given, create_graph=solver == "dense"))
    for ours, dense in zip(*found, strict=True):
        torch.testing.assert_close(ours, dense.detach(), rtol=1e-9, atol=1e-10)
    given = [y.clone().requires_grad_(), X]
    with pytest.raises(NotImplementedError, match="solver='dense'"):
        torch.autograd.grad(objective(MODELS[name], "mixed_model_equations")(*given), given[:1], create_graph=True)


def test_weight_of_zero_is_refused() -> None:
    V = Sum(g=simple(MANY), residual=DiagonalPropagation(torch.cat([0.0 * ONE[:1], ONE[1:]]), ScalarMatrix(1)))
    assert "weights other than zero" in str(MixedModelEquationsSolver().refusal(V))


@pytest.mark.parametrize("which", [0, 1])
def test_variance_next_to_zero(which: int, quantities: Callable[..., dict[str, Tensor]]) -> None:
    V = MODELS["crossed"]
    theta = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    theta[which] = -25.0
    ours, dense = (quantities(V, theta, y, X, s) for s in ("mixed_model_equations", "dense"))
    for key, value in dense.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-8, atol=1e-13, msg=f"{key} differs")
    torch.testing.assert_close(ours["score"][which], dense["score"][which], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", ["crossed", "slopes in both", "serial effects"])
def test_gradcheck(name: str) -> None:
    V = MODELS[name]
    problem = MixedModelEquationsSolver().prepare(V, y, X)

    def terms(theta: Tensor) -> tuple[Tensor, ...]:
        evaluation = problem.evaluate(theta)
        return evaluation.logdet_V, evaluation.logdet_XtViX, evaluation.yPy

    theta = V.theta.detach() + 0.1
    assert torch.autograd.gradcheck(terms, theta.requires_grad_())


def test_second_derivative_is_refused() -> None:
    V = MODELS["crossed"]
    theta = V.theta.detach().requires_grad_()
    loglik = REML(V, "mixed_model_equations")(y, X, theta)
    with pytest.raises(NotImplementedError, match="dense"):
        torch.autograd.grad(loglik, theta, create_graph=True)


def test_both_couplings_are_used() -> None:
    crossed = MixedModelEquationsSolver().prepare(MODELS["crossed"], y, X)
    assert isinstance(crossed.products.coupling, DenseCoupling)
    n = 400
    first, second = DummyMatrix(torch.arange(n) // 4), DummyMatrix(torch.arange(n) % 40)
    V = Sum(a=CovariancePropagation(first, ScalarMatrix(100)), b=CovariancePropagation(second, ScalarMatrix(40)),
            residual=ScalarMatrix(n))  # fmt: skip
    response = torch.randn(n, dtype=torch.float64, generator=generator)
    problem = MixedModelEquationsSolver().prepare(V, response)
    assert isinstance(problem.products.coupling, SparseCoupling)
    zero = torch.zeros(3, dtype=torch.float64)
    sparse, dense = (fit(V, response, solver=s, start=zero) for s in ("mixed_model_equations", "dense"))
    assert sparse.loglik == pytest.approx(dense.loglik, rel=1e-12)
    torch.testing.assert_close(sparse.theta_cov, dense.theta_cov, rtol=1e-5, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize(
    ("V", "reason"),
    [
        (Sum(g=simple(MANY), residual=DiagonalMatrix(N)), "one residual"),
        (Sum(g=simple(MANY), a=ScalarMatrix(N), b=ScalarMatrix(N)), "one residual"),
        (Sum(a=AR1Matrix(N), residual=ScalarMatrix(N)), "'a' is a AR1Matrix"),
        (AR1Matrix(N), "one residual"),
    ],
)
def test_refusal(V: Sum, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        MixedModelEquationsSolver().prepare(V, y, X)
    assert not isinstance(choose_solver(V).solver, MixedModelEquationsSolver)


def test_fit_is_the_same() -> None:
    V = MODELS["crossed"]
    zero = torch.zeros(V.num_params, dtype=torch.float64)
    ours, dense = (fit(V, y, X, solver=s, start=zero) for s in ("mixed_model_equations", "dense"))
    assert ours.loglik == pytest.approx(dense.loglik, rel=1e-12)
    assert ours.n_iter == dense.n_iter


def test_oracle_is_never_chosen_where_structure_helps() -> None:
    assert isinstance(choose_solver(MODELS["crossed"]).solver, MixedModelEquationsSolver)
    assert isinstance(choose_solver(AR1Matrix(3)).solver, DenseSolver)
