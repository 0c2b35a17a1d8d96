"""The delta method against closed forms, R and simulation; ratios of variance components of fits."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import openreml_nn
from openreml_nn import FitResult
from openreml_nn.data import MixedModel, Term
from openreml_nn.metrics.functional import delta_covariance, delta_method, variance_ratio

THETA = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
A = torch.tensor([[1.0, 0.2, 0.0], [0.2, 0.5, -0.1], [0.0, -0.1, 0.3]], dtype=torch.float64)


def fitted(table: str, fixed: str, **options: object) -> FitResult:
    model = MixedModel(table, fixed, **options)  # type: ignore[arg-type]
    return openreml_nn.fit(model.V, model.y, model.X)


def weights(a: list[float], b: list[float]) -> Callable[[Tensor], Tensor]:
    return lambda s: variance_ratio(s, a, b)


def ratio_of(result: FitResult, a: list[float], b: list[float]) -> list[float]:
    natural = delta_covariance(result.V.natural, result.theta, result.theta_cov)
    return [float(value) for value in delta_method(weights(a, b), *natural)]


def test_balanced_one_way_layout() -> None:
    """ICC of `dyestuff`, 6 batches of 5, against the closed form of its standard error.

    2 (N − 1) (1 − ρ)² (1 + (n − 1) ρ)² / (n² (N − k) (k − 1)) for k batches of n, N = kn: Donner (1986), International
    Statistical Review 54, 67-82.
    """
    rho, k, n = 1764.05 / (1764.05 + 2451.25), 6, 5
    N = k * n
    variance = 2 * (N - 1) * (1 - rho) ** 2 * (1 + (n - 1) * rho) ** 2 / (n**2 * (N - k) * (k - 1))
    got = ratio_of(fitted("dyestuff", "Yield ~ 1", random=["Batch"]), [1, 0], [1, 1])
    assert got == pytest.approx([rho, math.sqrt(variance)], rel=1e-7)


def test_heritability_against_r() -> None:
    """Heritability of a plot and of an entry mean, by tests/metrics/references.R."""
    result = fitted("john_alpha", "yield ~ rep", random=["gen", "rep:block"])
    assert ratio_of(result, [1, 0, 0], [1, 0, 1]) == pytest.approx([0.636480108686464, 0.107706851481883], rel=1e-6)
    assert ratio_of(result, [1, 0, 0], [1, 0, 1 / 3]) == pytest.approx([0.840067640192273, 0.062543317848345], rel=1e-6)


def test_random_slopes_against_r() -> None:
    """ICC of a fit with random slopes, a ratio that covariances are part of, by tests/metrics/references.R."""
    result = fitted("sleepstudy", "Reaction ~ Days", random={"Subject": Term(groups="Subject", design="1 + Days")})
    got = ratio_of(result, [1, 9.0, 28.5, 0], [1, 9.0, 28.5, 1])  # 2 × mean and mean square of 0, …, 9 days
    assert got == pytest.approx([0.721658457679865, 0.0720878856475296], rel=1e-6)


def test_a_boundary_is_known() -> None:
    result = fitted("dyestuff2", "Yield ~ 1", random=["Batch"])
    assert np.isnan(result.theta_cov[0]).all()
    _, C = delta_covariance(result.V.natural, result.theta, result.theta_cov)
    assert C[0].isnan().all()
    assert C[:, 0].isnan().all()
    assert float(C[1, 1].sqrt()) == pytest.approx(float(result.variance["std_error"][1]))
    value, se = delta_method(weights([1, 0], [1, 1]), torch.tensor([0.0, 2.0]), C)
    assert value == 0.0
    assert se.isnan()


def test_standard_errors_of_a_fit_are_its_own() -> None:
    result = fitted("sleepstudy", "Reaction ~ Days", random={"Subject": Term(groups="Subject", design="1 + Days")})
    value, se = delta_method(result.V.natural, result.theta, result.theta_cov)
    np.testing.assert_allclose(value.numpy(), result.variance["estimate"], rtol=1e-12)
    np.testing.assert_allclose(se.numpy(), result.variance["std_error"], rtol=1e-12)


def test_any_shape_and_chains() -> None:
    def outer(t: Tensor) -> Tensor:
        return t[:, None].sin() * t

    value, C = delta_covariance(outer, THETA, A)
    J = torch.autograd.functional.jacobian(outer, THETA).reshape(9, 3)
    torch.testing.assert_close(C, J @ A @ J.mT)
    torch.testing.assert_close(value, outer(THETA))
    assert delta_method(outer, THETA, A)[1].shape == (3, 3)
    whole = delta_method(lambda t: outer(t).exp().sum(), THETA, A)
    steps = delta_method(lambda u: u.exp().sum(), value.flatten(), C)
    torch.testing.assert_close(steps, whole)


def test_against_simulation() -> None:
    draws = torch.distributions.MultivariateNormal(THETA, 1e-6 * A).sample((200_000,))
    _, se = delta_method(lambda t: t[0] * t[1] / t[2], THETA, 1e-6 * A)
    assert float(se) == pytest.approx(float((draws[:, 0] * draws[:, 1] / draws[:, 2]).std()), rel=1e-2)


def test_known_parameters() -> None:
    for unknown in (0.0, torch.nan):
        C = A.clone()
        C[1], C[:, 1] = unknown, unknown
        got, se = delta_method(lambda t: torch.stack([t.sum(), t[1] ** 2]), THETA, C)
        assert got.tolist() == [THETA.sum().item(), THETA[1].item() ** 2]
        assert float(se[0]) == pytest.approx(float((A[0, 0] + A[2, 2] + 2 * A[0, 2]).sqrt()))
        assert se[1].isnan()
    C = A.clone()
    C[1, 1] = 0.0  # covariances of a parameter without variance say nothing
    torch.testing.assert_close(delta_method(lambda t: t[0] + t[1], THETA, C)[1], A[0, 0].sqrt())


def test_surroundings_change_nothing() -> None:
    expected = delta_method(torch.exp, THETA, A)
    with torch.inference_mode():
        inside = delta_method(torch.exp, THETA * 1.0, A * 1.0)
    with torch.no_grad():
        quiet = delta_method(torch.exp, THETA.float().double().requires_grad_(), A.numpy())
    for got in (inside, quiet):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0.0)
        assert not got[0].requires_grad


def test_ratio() -> None:
    draws = torch.rand(5, 4, 3)
    torch.testing.assert_close(
        variance_ratio(draws, [1, 0, 0], torch.tensor([1, 1, 0.5])),
        (draws[..., 0] / (draws[..., 0] + draws[..., 1] + 0.5 * draws[..., 2])).double(),
    )


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"a weight for each estimate, got 2 in the numerator and 3 .* shape \(3,\)"):
        variance_ratio(THETA, [1, 0], [1, 1, 1])
    with pytest.raises(ValueError, match=r"a denominator greater than 0, got 0.0 with the weights"):
        variance_ratio(torch.zeros(2), [1, 0], [1, 1])
    with pytest.raises(ValueError, match="a denominator greater than 0"):
        variance_ratio(torch.tensor([torch.nan, 1.0]), [1, 0], [1, 1])
    for strange in (None, ["a", "b"], pd.DataFrame({"name": ["a"], "estimate": [1.0]}), np.ones(2, dtype=complex)):
        with pytest.raises(TypeError, match=r"a tensor or an array of real numbers as `estimates`, got (None|l|D|nda)"):
            variance_ratio(strange, [1, 0], [1, 1])
    with pytest.raises(TypeError, match="as `covariance`, got str of"):
        delta_method(torch.exp, THETA, "none")
    for theta, C in ((THETA, A[:2]), (THETA[None], A), (THETA[:0], A[:0, :0]), (THETA.sum(), A)):
        with pytest.raises(ValueError, match=r"`delta_method` needs estimates of shape \(k,\)"):
            delta_method(torch.exp, theta, C)
    with pytest.raises(ValueError, match="needs finite estimates"):
        delta_method(torch.exp, THETA / 0.0, A)
    for wrong in (-A, A.tril(), A / 0.0):
        with pytest.raises(ValueError, match="a symmetric covariance with variances of at least 0"):
            delta_method(torch.exp, THETA, wrong)
    with pytest.raises(ValueError, match="gives the value a negative variance"):
        delta_method(lambda t: t[0] - t[1], THETA[:2], torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
