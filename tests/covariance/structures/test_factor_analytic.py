"""Factor analytic: Λ Λ' + Ψ, its zeros, signs and start values."""

import pytest
import torch

from openreml_nn.covariance import FactorAnalyticMatrix, Levels


def test_formula_and_accessors() -> None:
    mat = FactorAnalyticMatrix(4, 2)
    mat.set_theta(torch.randn(mat.num_params, dtype=torch.float64))
    L, psi = mat.loadings(), mat.specific_variances()
    torch.testing.assert_close(mat(), L @ L.mT + torch.diag(psi))
    assert L.shape == (4, 2)
    assert L[0, 1].item() == 0.0
    assert bool((psi > 0).all())


def test_names() -> None:
    assert FactorAnalyticMatrix(Levels(["a", "b"])).param_names == ["lambda_a", "lambda_b", "psi_a", "psi_b"]
    names = FactorAnalyticMatrix(3, 2).param_names
    assert names[:5] == ["lambda_0_0", "lambda_1_0", "lambda_2_0", "lambda_1_1", "lambda_2_1"]


def test_report_does_not_depend_on_the_sign_of_a_factor() -> None:
    mat = FactorAnalyticMatrix(4, 2)
    start = mat.trans_params(torch.randn(mat.num_params, dtype=torch.float64))
    mirrored = start.clone()
    mirrored[:4] *= -1.0
    one, other = (FactorAnalyticMatrix(4, 2, start=values) for values in (start, mirrored))
    torch.testing.assert_close(one(), other())
    torch.testing.assert_close(one.natural(one.theta), other.natural(other.theta))
    assert bool((one.loadings().diagonal() > 0).all())


def test_default_start_is_not_flat() -> None:
    mat = FactorAnalyticMatrix(5, 2)
    (torch.randn(5, 5, dtype=torch.float64) * mat()).sum().backward()
    assert all(p.grad is not None and p.grad.item() != 0.0 for p in mat.parameters())


def test_start_by_name() -> None:
    mat = FactorAnalyticMatrix(3, start={"lambda_1": -0.7, "psi_2": 0.2})
    natural = dict(zip(mat.param_names, mat.trans_params(mat.theta).tolist(), strict=True))
    assert natural["lambda_1"] == pytest.approx(-0.7)
    assert natural["psi_2"] == pytest.approx(0.2)


@pytest.mark.parametrize("k", [0, 3])
def test_number_of_factors(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} and n = 3"):
        FactorAnalyticMatrix(3, k)
