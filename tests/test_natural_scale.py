"""Standard errors of variance parameters: published ones, the delta method, and any unit."""

import numpy as np
import pytest
import torch

from openreml_nn import FitResult, fit
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.data import MixedModel, Term
from openreml_nn.natural_scale import correlations


def fitted(table: str, fixed: str, **terms: object) -> FitResult:
    model = MixedModel(table, fixed, **terms)  # type: ignore[arg-type]
    return fit(model.V, model.y, model.X, x_names=model.x_names)


# Standard errors on the natural scale from the average information, by an independent dense program.
STANDARD_ERRORS = {
    "dyestuff": [1432.751252384143, 707.6149236755348],
    "penicillin": [0.226365216819454, 2.3676095794543306, 0.039881369695242586],
    "pastes": [2.3493927859397963, 2.7755412885497437, 0.17505884724857526],
    "john_alpha": [0.05207808, 0.03734386, 0.02029195],
    "sleepstudy": [288.783, 46.6785, 14.7821, 77.1855],
}
TERMS: dict[str, tuple[str, dict]] = {
    "dyestuff": ("Yield ~ 1", {"random": ["Batch"]}),
    "penicillin": ("diameter ~ 1", {"random": ["plate", "sample"]}),
    "pastes": ("strength ~ 1", {"random": ["batch", "batch:cask"]}),
    "john_alpha": ("yield ~ rep", {"random": ["gen", "rep:block"]}),
    "sleepstudy": ("Reaction ~ Days", {"random": {"Subject": Term("Subject", "1 + Days")}}),
}


@pytest.mark.parametrize("name", STANDARD_ERRORS)
def test_standard_errors_of_variance_parameters(name: str) -> None:
    fixed, terms = TERMS[name]
    result = fitted(name, fixed, **terms)
    np.testing.assert_allclose(result.variance["std_error"], STANDARD_ERRORS[name], rtol=1e-4)


def test_standard_errors_are_the_delta_method(slopes: FitResult) -> None:
    V, theta = slopes.V, slopes.theta
    J = torch.func.jacrev(V.natural)(theta).numpy()
    expected = np.sqrt(np.diag(J @ slopes.theta_cov @ J.T))
    np.testing.assert_allclose(slopes.variance["std_error"], expected)


def test_standard_error_of_a_correlation() -> None:
    """nlme's Ovary example: AR(1) within mares and a random intercept."""
    table = MixedModel("ovary", "follicles ~ 1", random=["Mare"])
    assert len(table.y) == 308
    result = fitted(
        "ovary", "follicles ~ 1", random=["Mare"], residual=Term("Mare", within="idx", covariance=AR1Matrix)
    )
    assert result.converged
    row = result.variance.set_index("name").filter(like="rho", axis=0).iloc[0]
    assert -1.0 < row["estimate"] < 1.0
    assert 0.0 < row["std_error"] < 0.2


@pytest.mark.parametrize("unit", [1e-8, 1e6, 1e8])
def test_standard_errors_in_any_unit(slopes: FitResult, unit: float) -> None:
    model = MixedModel("sleepstudy", "Reaction ~ Days", random={"Subject": Term("Subject", "1 + Days")})
    again = fit(model.V, model.y * unit, model.X)
    theirs = slopes.variance["std_error"].to_numpy()
    assert again.variance["std_error"].to_numpy() / unit**2 == pytest.approx(theirs, rel=1e-6)


def test_covariance_on_the_natural_scale(slopes: FitResult) -> None:
    C = slopes.variance_cov
    np.testing.assert_allclose(np.sqrt(C.diagonal()), slopes.variance["std_error"], rtol=1e-12)
    J = torch.func.jacfwd(slopes.V.natural)(slopes.theta).numpy()
    np.testing.assert_allclose(C, J @ slopes.theta_cov @ J.T, rtol=1e-9)


def test_correlations_of_an_unstructured_matrix() -> None:
    """Beside covariances only; where a parameter is held, at the boundary itself."""
    G = UnstructuredMatrix(2, start=[[4.0, -3.0], [-3.0, 9.0]])
    V = Sum(g=CovariancePropagation(DummyMatrix([0, 1, 1]), G), residual=ScalarMatrix(3))
    theta = V.theta.detach()
    np.testing.assert_allclose(correlations(V, theta, [0] * 4), [np.nan, -0.5, np.nan, np.nan])
    np.testing.assert_allclose(correlations(V, theta, [0, 0, -1, 0]), [np.nan, -1.0, np.nan, np.nan])
    assert np.isnan(correlations(V, theta, [-1, 0, 0, 0])).all()  # beside a variance of zero there is none
