"""Start values from the data: equal shares of the least-squares residual variance."""

import pytest
import torch

from openreml_nn import REML
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    EquicorrelationMatrix,
    ExponentialMatrix,
    FactorAnalyticMatrix,
    HadamardProduct,
    IdentityMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.optim import data_start

N = 20
Y = 7.0 * torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 100.0
Z = DummyMatrix([i % 5 for i in range(N)])
SLOPES = KhatriRaoMatrix(torch.stack([torch.ones(N), 30.0 * torch.randn(N)], dim=1), Z)
TERMS: dict[str, Matrix] = {
    "scalar": CovariancePropagation(Z, ScalarMatrix(5)),
    "slopes": CovariancePropagation(SLOPES, KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(5))),
    "factors": CovariancePropagation(Z, FactorAnalyticMatrix(5)),
    "serial": AR1Matrix(N),
    "field": ExponentialMatrix([float(i) for i in range(N)]),
    "product": HadamardProduct(AR1Matrix(N), EquicorrelationMatrix(N)),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6])
def test_every_term_has_an_equal_share(name: str, scale: float) -> None:
    V = Sum({name: TERMS[name], "residual": ScalarMatrix(N)})
    V.set_theta(torch.zeros(V.num_params, dtype=torch.float64))
    problem = REML(V).prepare(scale * Y)
    theta = data_start(problem)
    s2 = float(problem.fixed.residual_variance)
    for part, own in V.parts(theta):
        assert float(part.diagonal(own).mean()) == pytest.approx(0.5 * s2)
    assert float(V.theta.detach().abs().max()) == 0.0  # nothing is written


def test_one_structure_alone() -> None:
    V = AR1Matrix(N)
    theta = data_start(REML(V).prepare(Y))
    assert float(V.diagonal(theta)[0]) == pytest.approx(float(Y.var()))
    assert float(theta[1]) == 0.0


def test_fixed_parameters_stay() -> None:
    V = Sum(a=ScalarMatrix(N, start=3.0), b=AR1Matrix(N, start=[1.0, 0.5]), residual=ScalarMatrix(N))
    V.set_no_grad([0, 2])
    theta = data_start(REML(V).prepare(Y))
    assert torch.equal(theta[[0, 2]], V.theta.detach()[[0, 2]])
    natural = V.trans_params(theta)
    assert float(natural[1]) == pytest.approx(0.5 * float(Y.var()))
    assert float(natural[3]) == pytest.approx(0.5 * float(Y.var()))


def test_nothing_that_scales() -> None:
    V = EquicorrelationMatrix(N)
    assert torch.equal(data_start(REML(V).prepare(Y)), V.theta.detach())
