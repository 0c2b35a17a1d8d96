"""BLUE and BLUP against Henderson's mixed-model equations, predictions against the joint normal distribution."""

import pytest
import torch
from torch import Tensor

from openreml_nn import REML
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.likelihood import beta, beta_cov, blup, predict, prediction_error_variance
from openreml_nn.solvers import Evaluation, random_terms

N = 30
generator = torch.Generator().manual_seed(9)
X = torch.cat([torch.ones(N, 1), torch.randn(N, 2, generator=generator)], dim=1).double()
Y = torch.randn(N, generator=generator, dtype=torch.float64) + 10.0
SUBJECT = DummyMatrix(torch.arange(N) % 6)
YEAR = DummyMatrix((torch.arange(N) // 6).tolist(), levels=range(7))  # two years without a record
SLOPES = KhatriRaoMatrix(X[:, :2], SUBJECT)
V = Sum(
    subject=CovariancePropagation(SLOPES, KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(6))),
    year=CovariancePropagation(YEAR, AR1Matrix(7, start=[0.8, 0.5])),
    residual=ScalarMatrix(N),
)
THETA = V.theta.detach() + 0.3 * torch.randn(V.num_params, generator=generator, dtype=torch.float64)
EMPTY = torch.zeros(0, dtype=torch.float64)


def evaluated(solver: str = "dense") -> Evaluation:
    return REML(V, solver).prepare(Y, X).evaluate(THETA)


def henderson() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solutions and inverse of the coefficient matrix of the mixed-model equations; Z and G of all effects."""
    terms = random_terms(V, THETA)
    Z = torch.cat([t.Z.build(t.Z_params) for t in terms], dim=1)
    G = torch.block_diag(*(t.G.build(t.G_params) for t in terms))
    Ri = torch.linalg.inv(V.operand("residual")(V.split(THETA)[-1]))
    W = torch.cat([X, Z], dim=1)
    C = W.mT @ Ri @ W
    C[3:, 3:] += torch.linalg.inv(G)
    inverse = torch.linalg.inv(C)
    return inverse @ W.mT @ Ri @ Y, inverse, Z, G


@pytest.mark.parametrize("solver", ["dense", "auto"])
def test_against_hendersons_equations(solver: str) -> None:
    evaluation = evaluated(solver)
    solution, inverse, *_ = henderson()
    torch.testing.assert_close(beta(evaluation), solution[:3])
    torch.testing.assert_close(beta_cov(evaluation), inverse[:3, :3])
    u = torch.cat([blup(evaluation, t) for t in random_terms(V, THETA)])
    pev = torch.cat([prediction_error_variance(evaluation, t) for t in random_terms(V, THETA)])
    torch.testing.assert_close(u, solution[3:])
    torch.testing.assert_close(pev, inverse.diagonal()[3:])
    assert not any(x.requires_grad for x in (u, pev, beta(evaluation), beta_cov(evaluation)))


def test_predictions_and_their_errors() -> None:
    """Var of x'(β̂ − β) + z'(û − u) from the inverse of the mixed-model equations; old, new and mixed rows."""
    solution, inverse, *_ = henderson()
    new_X = torch.randn(5, 3, dtype=torch.float64)
    subject = KhatriRaoMatrix(new_X[:, :2], DummyMatrix([0, 5, 9, 2, 9], levels=range(6), unknown="zero"))
    year = DummyMatrix([0, 6, 3, 99, 99], levels=range(7), unknown="zero")
    rows = torch.cat([new_X, subject.build(EMPTY), year.build(EMPTY)], dim=1)
    mean, variance = predict(evaluated(), new_X, {"subject": subject, "year": year})
    torch.testing.assert_close(mean, rows @ solution)
    torch.testing.assert_close(variance, ((rows @ inverse) * rows).sum(1))


def test_prediction_of_a_level_without_records_has_its_full_variance() -> None:
    independent = Sum(year=CovariancePropagation(YEAR, ScalarMatrix(7, start=4.0)), residual=ScalarMatrix(N, start=1.0))
    evaluation = REML(independent).prepare(Y, X).evaluate()
    row, unseen = torch.zeros(1, 3, dtype=torch.float64), DummyMatrix([6], levels=range(7))
    mean, variance = predict(evaluation, row, {"year": unseen})
    assert float(mean) == pytest.approx(0.0, abs=1e-12)
    assert float(variance) == pytest.approx(4.0)


def test_prediction_without_random_terms() -> None:
    evaluation = REML(ScalarMatrix(N)).prepare(Y, X).evaluate()
    mean, variance = predict(evaluation, X, {})
    torch.testing.assert_close(mean, X @ torch.linalg.lstsq(X, Y[:, None]).solution[:, 0])
    torch.testing.assert_close(variance, ((X @ torch.linalg.inv(X.mT @ X)) * X).sum(1))


def test_terms() -> None:
    assert [t.name for t in random_terms(V, THETA)] == ["subject", "year"]
    alone = CovariancePropagation(YEAR, ScalarMatrix(7))
    assert [t.name for t in random_terms(alone, alone.theta)] == [""]
    named = Sum(a=alone, residual=CovariancePropagation(SUBJECT, ScalarMatrix(6)))
    assert [t.name for t in random_terms(named, named.theta)] == ["a"]
    assert random_terms(ScalarMatrix(3), torch.zeros(1)) == []


def test_many_levels_at_once() -> None:
    """More levels than the columns that are formed at once."""
    n = 1100
    Z = DummyMatrix([i // 2 for i in range(n)])
    model = Sum(a=CovariancePropagation(Z, ScalarMatrix(n // 2)), residual=ScalarMatrix(n))
    evaluation = REML(model, "dense").prepare(torch.randn(n, dtype=torch.float64)).evaluate()
    (term,) = random_terms(model, model.theta.detach())
    pev = prediction_error_variance(evaluation, term)
    Pz = evaluation.inner_diagonal(Z.build(EMPTY)[:, [0, 511, 512, 549]])
    torch.testing.assert_close(pev[[0, 511, 512, 549]], 1.0 - Pz)
