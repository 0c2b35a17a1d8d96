"""AR(1): its formula, gaps, and derivatives where ρ = 0."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from openreml_nn.covariance import AR1Matrix


def test_formula() -> None:
    V = AR1Matrix(4, start=[2.0, -0.6])()
    lag = torch.arange(4)[:, None] - torch.arange(4)
    torch.testing.assert_close(V, 2.0 * torch.tensor(-0.6, dtype=torch.float64) ** lag.abs())


def test_gaps_count_and_order_is_kept() -> None:
    V = AR1Matrix([5, 1, 2], start=[1.0, 0.5])()
    expected = torch.tensor([[1.0, 0.5**4, 0.5**3], [0.5**4, 1.0, 0.5], [0.5**3, 0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(V, expected)


def test_a_subset_of_times_is_a_submatrix() -> None:
    start = {"sigma^2": 1.3, "rho": 0.7}
    whole = AR1Matrix(6, start=start)()
    torch.testing.assert_close(AR1Matrix([0, 2, 5], start=start)(), whole[[0, 2, 5]][:, [0, 2, 5]])


@pytest.mark.parametrize(("times", "rho"), [([8, 10, 12, 14], 0.5), ([0, 3, 7], pytest.approx(0.4621, abs=1e-4))])
def test_the_default_start_is_not_stationary(times: list[int], rho: float) -> None:
    """Without a lag of 1 the derivative at ρ = 0 is 0; with even lags only the sign of ρ does not count."""
    mat = AR1Matrix(times)
    assert mat.natural(mat.theta).tolist()[1] == rho
    J, _ = mat.grad(mat.theta.detach())
    assert J is not None
    assert J[1].abs().max().item() > 0.01


@pytest.mark.parametrize("sigma2", [1.0, 3.0])
def test_derivatives_at_rho_zero_are_exact(sigma2: float) -> None:
    """∂V/∂ρ is σ² at lag 1 and 0 elsewhere; ∂²V/∂ρ² is 2σ² at lag 2. Raw: dρ/dθ = ½, d²ρ/dθ² = 0 at θ = 0."""
    mat = AR1Matrix(4, start={"sigma^2": sigma2})
    theta = mat.theta.detach()
    lag = (torch.arange(4)[:, None] - torch.arange(4)).abs()

    def second(x: Tensor) -> Tensor:
        return torch.func.jacrev(torch.func.jacrev(mat.build))(x)

    J, _ = mat.grad(theta)
    assert J is not None
    torch.testing.assert_close(J[1], 0.5 * sigma2 * (lag == 1).double(), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(torch.func.jacrev(mat.build)(theta)[..., 1], J[1], rtol=1e-14, atol=0.0)
    torch.testing.assert_close(second(theta)[..., 1, 1], 0.5 * sigma2 * (lag == 2).double(), rtol=1e-14, atol=0.0)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        assert bool(outer(torch.func.jacfwd(mat.build))(theta).isfinite().all())


@pytest.mark.parametrize("rho", [1e-12, -1e-12, 1e-7, 1e-5])
def test_derivative_near_rho_zero(rho: float) -> None:
    mat = AR1Matrix(3, start={"rho": rho})
    J, _ = mat.grad(mat.theta.detach())
    assert J is not None
    assert J[1, 0, 1].item() == pytest.approx(0.5 * (1 - rho**2), rel=1e-12)
    assert J[1, 0, 2].item() == pytest.approx(rho * (1 - rho**2), rel=1e-9)


def test_gradient_from_the_default_start() -> None:
    mat = AR1Matrix(5)
    torch.logdet(mat() + 0.1 * mat()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in mat.parameters())


@pytest.mark.parametrize("times", [3, np.int64(3), [0, 1, 2], np.arange(3), pd.Series([7, 8, 9]), torch.arange(3)])
def test_forms_of_times(times: Any) -> None:
    torch.testing.assert_close(AR1Matrix(times, start=[1.0, 0.5])(), AR1Matrix(3, start=[1.0, 0.5])())


@pytest.mark.parametrize(
    ("times", "text"),
    [
        ([1, 1, 2], "times that differ"),
        ([0.0, 0.5], "integer times"),
        ([[1, 2], [3, 4]], "one column"),
        (0, "finite values"),
    ],
)
def test_refused_times(times: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AR1Matrix(times)


def test_times_that_are_no_numbers() -> None:
    with pytest.raises(TypeError, match=r"numeric values, got .*Monday"):
        AR1Matrix(["Monday", "Tuesday"])


@pytest.mark.parametrize("rho", [1.0, -1.0, 1.5])
def test_refused_start(rho: float) -> None:
    with pytest.raises(ValueError, match="-1 < y < 1"):
        AR1Matrix(3, start={"rho": rho})
