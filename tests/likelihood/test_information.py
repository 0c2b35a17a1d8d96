"""Information matrices against explicit ones: ½ W'PW, ½ tr(P Vₖ P Vⱼ) and −∂²ℓ."""

import pytest
import torch
from torch import Tensor

from openreml_nn import ML, REML
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.likelihood import (
    average_information,
    fisher_information,
    full_loglik,
    observed_information,
    restricted_loglik,
)

N = 18
generator = torch.Generator().manual_seed(8)
Y = torch.randn(N, generator=generator, dtype=torch.float64)
X = torch.cat([torch.ones(N, 1), torch.randn(N, 1, generator=generator)], dim=1).double()
GROUP = DummyMatrix(torch.randint(0, 3, (N,), generator=generator))


def covariance() -> Matrix:
    return Sum(g=CovariancePropagation(GROUP, UnstructuredMatrix(3)), serial=AR1Matrix(N), residual=ScalarMatrix(N))


def linear() -> Matrix:
    return Sum(g=CovariancePropagation(GROUP, ScalarMatrix(3)), residual=ScalarMatrix(N))


def theta_of(V: Matrix) -> Tensor:
    return 0.4 * torch.randn(V.num_params, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def parts(V: Matrix, theta: Tensor) -> tuple[Tensor, Tensor]:
    """P and the derivatives of V, one for each parameter."""
    Vi = torch.linalg.inv(V(theta))
    P = Vi - Vi @ X @ torch.linalg.inv(X.mT @ Vi @ X) @ X.mT @ Vi
    return P, torch.func.jacfwd(V.build)(theta).movedim(-1, 0)


@pytest.mark.parametrize("make", [covariance, linear])
@pytest.mark.parametrize("solver", ["dense", "auto"])
@pytest.mark.parametrize("method", [REML, ML])
def test_average_information(make: type, solver: str, method: type) -> None:
    V = make()
    theta = theta_of(V)
    P, J = parts(V, theta)
    W = torch.stack([D @ P @ Y for D in J], dim=1)
    AI = average_information(method(V, solver).prepare(Y, X).evaluate(theta))
    torch.testing.assert_close(AI, 0.5 * W.mT @ P @ W, rtol=1e-10, atol=1e-12)
    assert torch.equal(AI, AI.mT)


@pytest.mark.parametrize("make", [covariance, linear])
def test_fisher_information(make: type) -> None:
    V = make()
    theta = theta_of(V)
    P, J = parts(V, theta)
    expected = 0.5 * torch.einsum("ab,kbc,cd,lda->kl", P, J, P, J)
    torch.testing.assert_close(fisher_information(REML(V, "dense").prepare(Y, X).evaluate(theta)), expected)


@pytest.mark.parametrize(("method", "loglik"), [(REML, restricted_loglik), (ML, full_loglik)])
def test_observed_information(method: type, loglik: object) -> None:
    V = covariance()
    theta = theta_of(V)
    objective = method(V, "dense")
    expected = torch.func.hessian(lambda t: objective(Y, X, t))(theta)
    got = observed_information(objective.prepare(Y, X).evaluate(theta), loglik)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected)


def test_average_is_the_mean_of_the_others_where_v_is_linear() -> None:
    """With the variances themselves as parameters, observed + expected = 2 × average information."""

    class Linear(Matrix):
        def __init__(self) -> None:
            super().__init__((N, N), ["a", "b"])
            self.ZZt = GROUP(torch.zeros(0)).double() @ GROUP(torch.zeros(0)).double().mT

        def build(self, params: Tensor) -> Tensor:
            return params[0] * self.ZZt + params[1] * torch.eye(N, dtype=params.dtype)

    evaluation = REML(Linear(), "dense").prepare(Y, X).evaluate(torch.tensor([0.7, 1.3], dtype=torch.float64))
    both = fisher_information(evaluation) + observed_information(evaluation, restricted_loglik)
    torch.testing.assert_close(2.0 * average_information(evaluation), both)


def test_fixed_parameters_are_left_out() -> None:
    V = covariance()
    theta = theta_of(V)
    whole = REML(V, "dense").prepare(Y, X).evaluate(theta)
    full = (average_information(whole), fisher_information(whole), observed_information(whole, restricted_loglik))
    V.set_no_grad([1, 4])
    free = [k for k in range(V.num_params) if k not in (1, 4)]
    part = REML(V, "dense").prepare(Y, X).evaluate(theta)
    some = (average_information(part), fisher_information(part), observed_information(part, restricted_loglik))
    for got, all_of_it in zip(some, full, strict=True):
        torch.testing.assert_close(got, all_of_it[free][:, free])
