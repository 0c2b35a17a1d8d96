"""Scores of predicted distributions against torch.distributions and scipy."""

import numpy as np
import pytest
import torch
from scipy import stats

from openreml_nn.metrics.functional import interval_coverage, interval_width, negative_log_predictive_density

N = 50


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(3, N, dtype=torch.float64).abs().unbind())  # type: ignore[return-value]


def test_density() -> None:
    m, y, v = rows()
    expected = -torch.distributions.Normal(m, v.sqrt()).log_prob(y).mean()
    torch.testing.assert_close(negative_log_predictive_density(m, y, v), expected, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(
        negative_log_predictive_density(m, y, 0.7), negative_log_predictive_density(m, y, torch.full((N,), 0.7).to(m))
    )


@pytest.mark.parametrize("level", [0.1, 0.5, 0.95, 0.999])
def test_intervals(level: float) -> None:
    m, y, v = rows()
    low, high = stats.norm.interval(level, m.numpy(), v.sqrt().numpy())
    inside = np.mean((low <= y.numpy()) & (y.numpy() <= high))
    assert float(interval_coverage(m, y, v, level)) == pytest.approx(inside, abs=1e-15)
    assert float(interval_width(v, level)) == pytest.approx(np.mean(high - low), rel=1e-12)


def test_coverage_is_nominal_where_the_prediction_is_right() -> None:
    y = torch.randn(100_000, dtype=torch.float64)
    assert float(interval_coverage(torch.zeros_like(y), y, 1.0, 0.9)) == pytest.approx(0.9, abs=3e-3)


def test_a_variance_of_zero() -> None:
    zero = torch.zeros(2)
    assert float(interval_coverage(zero, torch.tensor([0.0, 1e-9]), zero)) == 0.5
    with pytest.raises(ValueError, match=r"variances greater than 0 in `variance`, the smallest is 0.0"):
        negative_log_predictive_density(zero, zero, zero)


def test_bad_input() -> None:
    m = torch.ones(3)
    for wrong in (torch.ones(3, 1), torch.tensor(1.0), torch.ones(2)):
        with pytest.raises(
            ValueError, match=r"`interval_coverage` needs values of one shape.*`preds` \(3,\), `target`"
        ):
            interval_coverage(m, wrong, 1.0)
    for score in (interval_coverage, negative_log_predictive_density):
        with pytest.raises(ValueError, match=f"`{score.__name__}` needs variances"):
            score(m, m, -m)
        with pytest.raises(ValueError, match="finite numbers in `target`"):
            score(m, m / 0.0, m)
    with pytest.raises(ValueError, match="variances of at least 0"):
        interval_width(-m)
    with pytest.raises(TypeError, match="a tensor of real numbers as `variance`, got float"):
        interval_width(1.0)  # type: ignore[arg-type]
    for level in (0.0, 1.0, 95, float("nan")):
        with pytest.raises(ValueError, match=r"a `level` between 0 and 1, such as 0.95, got"):
            interval_width(m, level)
