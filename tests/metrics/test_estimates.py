"""Pooling of fits; what the metrics share is in test_laws.py."""

import pandas as pd
import pytest
import torch
from torch import Tensor

from openreml_nn import fit
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum
from openreml_nn.metrics import CullisHeritability, FunctionOfEstimates, VarianceRatio
from openreml_nn.metrics.functional import cullis_heritability, delta_method, variance_ratio

ESTIMATES = torch.tensor([1764.05, 2451.25], dtype=torch.float64)
COVARIANCE = torch.tensor([[2052776.15, -100143.78], [-100143.78, 500718.88]], dtype=torch.float64)


def share(estimates: Tensor) -> Tensor:
    return variance_ratio(estimates, [1, 0], [1, 1])


def ratio(standard_error: bool) -> VarianceRatio:
    return VarianceRatio([1, 0], [1, 1], standard_error=standard_error)


@pytest.mark.parametrize("fits", [1, 2, 7])
def test_equal_fits_are_one_fit(fits: int) -> None:
    value, error = ratio(False), ratio(True)
    for _ in range(fits):
        value.update(ESTIMATES, COVARIANCE)
        error.update(ESTIMATES, COVARIANCE)
    expected = delta_method(share, ESTIMATES, COVARIANCE)
    torch.testing.assert_close((value.compute(), error.compute()), expected, rtol=1e-13, atol=0.0)


def test_rubins_rules() -> None:
    """For an estimate itself: the mean, and the mean variance plus (1 + 1/m) times the variance between."""
    estimates, variances = torch.rand(5, dtype=torch.float64) + 1e6, torch.rand(5, dtype=torch.float64)
    value, error = (FunctionOfEstimates(torch.squeeze, 1, standard_error=error) for error in (False, True))
    for metric in (value, error):
        for theta, variance in zip(estimates, variances, strict=True):
            metric.update(theta[None], variance[None, None])
    torch.testing.assert_close(value.compute(), estimates.mean(), rtol=1e-15, atol=0.0)
    total = variances.mean() + 1.2 * estimates.var()
    torch.testing.assert_close(error.compute(), total.sqrt(), rtol=1e-10, atol=0.0)


def test_arrays_as_a_fit_has_them() -> None:
    expected = delta_method(share, ESTIMATES, COVARIANCE)
    table = pd.DataFrame({"estimate": ESTIMATES.numpy()}, index=[7, 3])
    for estimates in (table["estimate"], table["estimate"].to_numpy(), ESTIMATES.tolist(), ESTIMATES):
        for covariance in (COVARIANCE.numpy(), COVARIANCE.tolist(), COVARIANCE):
            value, error = ratio(False), ratio(True)
            value.update(estimates, covariance)
            error.update(estimates, covariance)
            torch.testing.assert_close((value.compute(), error.compute()), expected, rtol=1e-13, atol=0.0)


def test_the_intraclass_correlation_of_a_fit() -> None:
    """The lines of the README, against the delta method on the thetas of the fit."""
    codes = torch.arange(90) % 9
    y = torch.randn(9, dtype=torch.float64)[codes] + torch.randn(90, dtype=torch.float64)
    V = Sum({"site": CovariancePropagation(DummyMatrix(codes.tolist()), ScalarMatrix(9)), "residual": ScalarMatrix(90)})
    result = fit(V, y)
    icc = VarianceRatio([1, 0], [1, 1], standard_error=True)
    icc.update(result.variance["estimate"], result.variance_cov)
    expected = delta_method(lambda theta: share(V.natural(theta)), result.theta, result.theta_cov)[1]
    torch.testing.assert_close(icc.compute(), expected, rtol=1e-10, atol=0.0)


def test_without_covariances() -> None:
    error = ratio(True)
    error.update(ESTIMATES)
    assert error.compute().isnan()
    error.update(1.1 * ESTIMATES.flip(0))
    assert error.compute() > 0.0


def test_last_fit_after_a_reset() -> None:
    metric = ratio(False)
    metric.update(torch.ones(2))
    metric.reset()
    metric.update(ESTIMATES)
    torch.testing.assert_close(metric.compute(), share(ESTIMATES))


def test_cullis() -> None:
    metric = CullisHeritability()
    for v, sigma2 in ((0.05, 0.1), (torch.tensor(0.3), torch.tensor(0.2))):
        metric.update(difference_variance=v, genetic_variance=sigma2)
    expected = (cullis_heritability(0.05, 0.1) + cullis_heritability(0.3, 0.2)) / 2
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-7, atol=0.0)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="numerator and denominator of one length, got 2 and 3 weights"):
        VarianceRatio([1, 0], [1, 1, 1])
    with pytest.raises(ValueError, match="at least one estimate"):
        VarianceRatio([], [])
    with pytest.raises(ValueError, match="`VarianceRatio` needs 2 estimates, got 3"):
        ratio(False).update(torch.ones(3))
    with pytest.raises(ValueError, match=r"`VarianceRatio` needs estimates of shape \(k,\)"):
        ratio(False).update(ESTIMATES, COVARIANCE[:1])
    with pytest.raises(ValueError, match="variances of at least 0"):
        ratio(False).update(ESTIMATES, -COVARIANCE)
    metric = ratio(False)
    metric.update(torch.zeros(2))
    with pytest.raises(ValueError, match="a denominator greater than 0"):
        metric.compute()
    with pytest.raises(ValueError, match="a genetic variance greater than 0"):
        CullisHeritability().update(1.0, 0.0)
    with pytest.raises(ValueError, match="needs data"), pytest.warns(UserWarning, match="before the ``update``"):
        CullisHeritability().compute()
