"""The dense solver: its evaluation against explicit matrices, and what it says where it cannot go on."""

import re
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor

from openreml_nn import REML, fit
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    KnownMatrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.solvers import DenseSolver, NotPositiveDefinite

N = 24
generator = torch.Generator().manual_seed(6)
Y = torch.randn(N, generator=generator, dtype=torch.float64) + 2.0
X = torch.cat([torch.ones(N, 1), torch.randn(N, 2, generator=generator)], dim=1).double()
GROUP = DummyMatrix(torch.randint(0, 5, (N,), generator=generator), levels=range(5))
V = Sum(g=CovariancePropagation(GROUP, UnstructuredMatrix(5)), serial=AR1Matrix(N), residual=ScalarMatrix(N))
THETA = 0.4 * torch.randn(V.num_params, generator=generator, dtype=torch.float64)


def explicit_P(V: Tensor, X: Tensor) -> Tensor:
    Vi = torch.linalg.inv(V)
    return Vi - Vi @ X @ torch.linalg.inv(X.mT @ Vi @ X) @ X.mT @ Vi


def test_evaluation_against_explicit_matrices() -> None:
    evaluation = DenseSolver().prepare(V, Y, X).evaluate(THETA)
    dense = V(THETA)
    Vi, P = torch.linalg.inv(dense), explicit_P(dense, X)
    rhs = torch.randn(N, 3, dtype=torch.float64)
    torch.testing.assert_close(evaluation.logdet_V, torch.logdet(dense))
    torch.testing.assert_close(evaluation.logdet_XtViX, torch.logdet(X.mT @ Vi @ X))
    torch.testing.assert_close(evaluation.yPy, Y @ P @ Y)
    torch.testing.assert_close(evaluation.Py, P @ Y)
    torch.testing.assert_close(evaluation.solve(rhs), Vi @ rhs)
    torch.testing.assert_close(evaluation.project(rhs), P @ rhs)
    torch.testing.assert_close(evaluation.inner(rhs), rhs.mT @ P @ rhs)
    torch.testing.assert_close(evaluation.inner_diagonal(rhs), (rhs.mT @ P @ rhs).diagonal())


def test_working_variates_of_the_free_parameters() -> None:
    problem = DenseSolver().prepare(V, Y, X)
    J = torch.func.jacfwd(V.build)(THETA).movedim(-1, 0)
    Py = explicit_P(V(THETA), X) @ Y
    torch.testing.assert_close(problem.evaluate(THETA).working_variates(), torch.stack([D @ Py for D in J], dim=1))
    V.set_no_grad([0, 3])
    free = [k for k in range(V.num_params) if k not in (0, 3)]
    torch.testing.assert_close(
        problem.evaluate(THETA).working_variates(), torch.stack([J[k] @ Py for k in free], dim=1)
    )
    V.set_no_grad(list(range(V.num_params)))
    assert problem.evaluate(THETA).working_variates().shape == (N, 0)
    V.set_no_grad([])


def test_the_modules_own_thetas() -> None:
    problem = DenseSolver().prepare(V, Y, X)
    assert float(problem.evaluate().yPy.detach()) == float(problem.evaluate(V.theta.detach()).yPy)
    assert problem.n == N
    assert problem.p == 3


def test_an_evaluation_depends_on_no_earlier_one() -> None:
    problem = DenseSolver().prepare(V, Y, X)
    first = float(problem.evaluate(THETA).yPy.detach())
    problem.evaluate(THETA + 1.0)
    with torch.no_grad():
        assert float(problem.evaluate(THETA).yPy) == first
    theta = THETA.clone().requires_grad_()
    problem.evaluate(theta).yPy.backward()
    assert theta.grad is not None
    problem.evaluate(theta).yPy.backward()


def test_size_of_v_must_be_that_of_y() -> None:
    with pytest.raises(ValueError, match=re.escape("V must be of shape (24, 24) for 24 observations, got (5, 5)")):
        DenseSolver().prepare(ScalarMatrix(5), Y)


def test_memory_is_asked_for_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * 8 * 30_000**2 - 1))
    big = ScalarMatrix(30_000)
    y = torch.arange(30_000, dtype=torch.float64)
    needs = r"V of 30000 observations \(5 matrices of 30000 x 30000\) needs about 33.5 GiB, and 33.5 GiB are free"
    with pytest.raises(MemoryError, match=needs):
        DenseSolver().prepare(big, y)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * 8 * 30_000**2))
    DenseSolver().prepare(big, y)


def test_not_positive_definite_says_where() -> None:
    no_residual = CovariancePropagation(DummyMatrix([0, 1, 1, 2]), ScalarMatrix(3, start=4.0))
    objective = REML(Sum(gen=no_residual), "dense")
    with pytest.raises(NotPositiveDefinite) as info:
        objective(torch.tensor([1.0, 2.0, 4.0, 3.0]), torch.ones(4, 1))
    message = str(info.value)
    assert "sigma^2 = 4" in message
    assert "leading block of 3 rows has no Cholesky factor" in message
    assert "Is there a residual variance" in message


def test_fit_without_residual_says_so() -> None:
    with pytest.raises(NotPositiveDefinite, match="Is there a residual variance"):
        fit(CovariancePropagation(DummyMatrix([0, 1, 1, 2]), ScalarMatrix(3)), torch.tensor([1.0, 2.0, 4.0, 3.0]))


def test_a_singular_kernel_is_fine_beside_a_residual() -> None:
    w = torch.randn(N, 2, dtype=torch.float64)
    singular = Sum(k=KnownMatrix(w @ w.mT), residual=ScalarMatrix(N))
    assert fit(singular, Y, solver="dense").converged
