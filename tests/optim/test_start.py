"""Start values from the data, equal shares of the residual variance; terms that the fixed effects take up."""

import warnings

import pytest
import torch

from openreml_nn import REML, fit
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
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.covariance.transform import TransformSigmoid
from openreml_nn.optim import ConfoundedParameters, data_start, require_estimable

N = 20
Y = 7.0 * torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 100.0
Z = DummyMatrix([i % 5 for i in range(N)])
SLOPES = KhatriRaoMatrix(torch.stack([torch.ones(N), 30.0 * torch.randn(N)], dim=1), Z)
TERMS: dict[str, Matrix] = {
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
    s2 = float(problem.fixed.residual_variance())
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


# ---- terms that the fixed effects take up ----------------------------------------------------------------------------

LEVEL = Z.build(torch.zeros(0, dtype=torch.float64))
PAIRS = DummyMatrix([i // 2 for i in range(N)])


@pytest.mark.parametrize(
    ("Z", "X"),
    [
        (Z, LEVEL),
        (Z, torch.cat([torch.ones(N, 1), LEVEL], dim=1)),
        (DummyMatrix(["all"] * N), torch.ones(N, 1)),
        (Z, PAIRS.build(torch.zeros(0, dtype=torch.float64)) @ torch.eye(10, dtype=torch.float64)),
    ],
    ids=["fixed and random", "with an intercept", "one level", "not nested"],
)
def test_a_term_within_the_fixed_effects_is_refused(
    Z: DummyMatrix, X: torch.Tensor, request: pytest.FixtureRequest
) -> None:
    V = Sum(a=CovariancePropagation(Z, ScalarMatrix(Z.num_levels)), residual=ScalarMatrix(N))
    problem = REML(V).prepare(Y, X.double())
    if "not nested" in request.node.name:
        require_estimable(problem)
        return
    with pytest.raises(ConfoundedParameters, match="take up the random term 'a' whole"):
        require_estimable(problem)
    warnings.simplefilter("ignore")  # of aliased columns
    with pytest.raises(ConfoundedParameters, match="Remove it from the fixed or from the random part"):
        fit(V, Y, X.double())


@pytest.mark.parametrize("more", [0.0, 1e-3])
def test_a_kernel_within_the_fixed_effects_is_refused(more: float) -> None:
    X = torch.randn(N, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    K = X @ X.mT
    K[-1, -1] += more  # in a direction of its own
    V = Sum(g=KnownMatrix(K), residual=ScalarMatrix(N))
    if more:
        assert fit(V, Y, X).converged
        return
    with pytest.raises(ConfoundedParameters, match="take up the random term 'g' whole"):
        fit(V, Y, X)


def test_variances_that_a_transform_cannot_give() -> None:
    """Moments above the largest value of a bounded variance are no start."""
    bounded = ScalarMatrix(N, trans=TransformSigmoid())
    V = Sum(a=CovariancePropagation(Z, ScalarMatrix(5)), residual=bounded)
    problem = REML(V).prepare(Y)
    assert max(problem.moment_variances().values()) > 1.0
    assert data_start(problem).isfinite().all()
    assert fit(V, Y).converged


def test_full_likelihood_and_fixed_variances_may_have_such_terms() -> None:
    V = Sum(a=CovariancePropagation(Z, ScalarMatrix(5)), residual=ScalarMatrix(N))
    result = fit(V, Y, LEVEL, method="ML")
    assert result.held == (-1, 0)
    V.set_theta(torch.zeros(2, dtype=torch.float64))
    V.set_no_grad([0])
    assert fit(V, Y, LEVEL).converged
