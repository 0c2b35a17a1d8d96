"""Start values of one kernel: at the maximum of the dense likelihood, and inside where that is on a boundary."""

import math

import pytest
import torch
from torch import Tensor

from openreml_nn import REML, fit
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KnownMatrix,
    KroneckerProduct,
    ScalarMatrix,
    Sum,
)
from openreml_nn.optim import data_start
from openreml_nn.solvers import Problem
from openreml_nn.solvers.kernel_profile import profiled_variances
from openreml_nn.solvers.reductions import Reduction, reduce_kernel
from openreml_nn.solvers.spectral import SpectralProblem, SpectralSolver

N, LEVELS = 120, 40
generator = torch.Generator().manual_seed(4)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


W = normal(LEVELS, 60)
K = W @ W.mT / 60
CODES = torch.randint(0, LEVELS, (N,), generator=generator)
Z = DummyMatrix(CODES, levels=range(LEVELS))
X = torch.cat([torch.ones(N, 1, dtype=torch.float64), normal(N, 1)], dim=1)
EFFECTS = (torch.linalg.cholesky(K) @ normal(LEVELS))[CODES]
NOISE = normal(N)


def covariance() -> Sum:
    return Sum(g=CovariancePropagation(Z, KnownMatrix(K)), residual=ScalarMatrix(N))


def prepared(V: Sum, y: Tensor, reduction: Reduction | None = None) -> SpectralProblem:
    problem = REML(V, SpectralSolver(reduction)).prepare(y, X)
    assert isinstance(problem, SpectralProblem)
    return problem


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("eigenvectors", [False, True])
def test_start_is_at_the_maximum(share: float, eigenvectors: bool) -> None:
    V, y = covariance(), math.sqrt(share) * EFFECTS + math.sqrt(1.0 - share) * NOISE
    reduction = reduce_kernel(K, torch.bincount(CODES, minlength=LEVELS), eigenvectors=eigenvectors)
    start = data_start(prepared(V, y, reduction))
    best = fit(V, y, X, solver="dense", start=torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(V.trans_params(start), V.trans_params(best.theta), rtol=1e-4, atol=0.0)


def test_a_fit_from_there_is_short() -> None:
    V = covariance()
    assert fit(V, EFFECTS + NOISE, X).n_iter <= 1
    V.set_theta(torch.zeros(2, dtype=torch.float64))
    assert fit(V, EFFECTS + NOISE, X, start="current").n_iter > 2


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_start_is_inside_where_the_maximum_is_on_a_boundary(share: float) -> None:
    """Of residuals with means of levels near zero, and of effects alone."""
    means = torch.linalg.lstsq(Z(), NOISE[:, None]).solution[:, 0]
    y = share * EFFECTS + (1.0 - share) * (NOISE - 0.9 * means[CODES])
    V = covariance()
    a, b = V.trans_params(data_start(prepared(V, y))).tolist()
    assert 0.005 < a / b < 0.1 if share == 0.0 else 10.0 < a / b < 200.0


def test_scale_of_the_response() -> None:
    y = EFFECTS + NOISE
    problem, larger = prepared(covariance(), y), prepared(covariance(), 1e6 * y)
    ours, others = problem.moment_variances(), larger.moment_variances()
    assert [others[i] for i in ours] == pytest.approx([1e12 * value for value in ours.values()], rel=1e-9)


def test_far_from_the_maximum_it_keeps_the_best_point() -> None:
    problem = prepared(covariance(), EFFECTS + NOISE)
    a, b = profiled_variances(problem.data, problem.n - problem.p, 9.0)
    far = problem.evaluate(0.5 * torch.tensor([9.0, 0.0], dtype=torch.float64))
    ours = problem.evaluate(0.5 * torch.tensor([a, b], dtype=torch.float64).log())
    loglik = REML(problem.V).loglik
    assert float(loglik(ours)) > float(loglik(far))


@pytest.mark.parametrize("which", ["a product of two variances", "a fixed residual", "a kernel of zeros"])
def test_equal_shares_where_there_are_not_two_variances(which: str) -> None:
    kernel, residual = {
        "a product of two variances": (KroneckerProduct(ScalarMatrix(1), KnownMatrix(K)), ScalarMatrix(N)),
        "a fixed residual": (KnownMatrix(K), IdentityMatrix(N)),
        "a kernel of zeros": (KnownMatrix(torch.zeros_like(K)), ScalarMatrix(N)),
    }[which]
    V = Sum(g=CovariancePropagation(Z, kernel), residual=residual)
    problem: Problem = prepared(V, NOISE)
    assert problem.moment_variances() == {}


def one_record_each(n: int, G: KnownMatrix | ScalarMatrix) -> Sum:
    return Sum(g=CovariancePropagation(DummyMatrix(range(n)), G), residual=ScalarMatrix(n))


def test_independent_levels_of_one_record_each() -> None:
    """A = I: only the sum of both variances has a likelihood, and they keep equal shares of it."""
    V, y = one_record_each(4, ScalarMatrix(4)), torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    problem = REML(V, SpectralSolver()).prepare(y)
    assert list(problem.moment_variances().values()) == pytest.approx([float(y.var()) / 2.0] * 2)


@pytest.mark.parametrize("seed", [614, 1251])
def test_where_two_slopes_show_no_maximum(seed: int) -> None:
    """Between two maxima, or before one far away, the slope grows on the way up: the search goes on."""
    generator = torch.Generator().manual_seed(seed)
    W, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((12, 15), (12,)))
    V = one_record_each(12, KnownMatrix(W @ W.mT / 15))
    problem = REML(V, SpectralSolver()).prepare(y)
    assert isinstance(problem, SpectralProblem)
    a, b = problem.moment_variances().values()
    assert abs(math.log(a / b * problem.reduction.trace / 12)) > 1.0
