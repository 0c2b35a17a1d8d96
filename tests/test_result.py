"""What a fit gives: tables, standard errors, boundaries, predictions and the summary."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import FitResult, fit
from openreml_nn.covariance import (
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    ScalarMatrix,
    Sum,
)
from openreml_nn.data import MixedModel, Term


def fitted(table: str | pd.DataFrame, fixed: str, **terms: object) -> FitResult:
    model = MixedModel(table, fixed, **terms)  # type: ignore[arg-type]
    return fit(model.V, model.y, model.X, x_names=model.x_names)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_variance_table(alpha: FitResult) -> None:
    table = alpha.variance
    assert list(table.columns) == ["name", "estimate", "std_error", "share", "boundary", "fixed"]
    assert list(table["name"]) == ["gen/sigma^2", "rep:block/sigma^2", "residual/sigma^2"]
    assert table["share"].sum() == pytest.approx(1.0)
    np.testing.assert_allclose(table["share"], table["estimate"] / table["estimate"].sum())
    assert not table[["boundary", "fixed"]].to_numpy().any()


def test_boundary(dyestuff2: FitResult) -> None:
    table = dyestuff2.variance
    assert table["boundary"].tolist() == [True, False]
    assert table["estimate"][0] == 0.0
    assert math.isnan(table["std_error"][0])
    assert table["std_error"][1] == pytest.approx(table["estimate"][1] * math.sqrt(2 / 29), rel=1e-6)
    assert table["share"].tolist() == [pytest.approx(0.0, abs=1e-9), pytest.approx(1.0)]
    assert dyestuff2.held == (-1, 0)
    assert (dyestuff2.blup()["blup"].abs() < 1e-9).all()


def test_fixed_parameters() -> None:
    model = MixedModel("john_alpha", "yield ~ rep", random=["gen", "rep:block"])
    model.V.operand("rep:block").set_theta(torch.tensor([math.log(0.07) / 2]))  # type: ignore[union-attr]
    model.V.set_no_grad(param_name=[n for n in model.V.param_names if n.startswith("rep:block")])
    result = fit(model.V, model.y, model.X, start="data")
    table = result.variance
    assert table["fixed"].tolist() == [False, True, False]
    assert table["estimate"][1] == pytest.approx(0.07)
    assert np.isnan(table["std_error"]).tolist() == [False, True, False]
    assert result.num_variance_parameters == 2
    assert np.isnan(np.diag(result.theta_cov)).tolist() == [False, True, False]
    assert "fixed" in result.summary()


def test_fixed_parameter_does_not_move_the_names_of_others() -> None:
    y = torch.randn(30, dtype=torch.float64)
    V = DiagonalMatrix(3, start=[1.0, 2.0, 3.0])
    Z = DummyMatrix([0, 1, 2] * 10)
    model = Sum(a=CovariancePropagation(Z, V), residual=ScalarMatrix(30))
    V.set_no_grad([1])
    with pytest.warns(UserWarning, match="did not converge"):
        table = fit(model, y, start="current", max_steps=1).variance
    assert table["estimate"][1] == pytest.approx(2.0)
    assert table["fixed"].tolist() == [False, True, False, False]


# ---- criteria --------------------------------------------------------------------------------------------------------


def test_information_criteria(alpha: FitResult, dyestuff2: FitResult) -> None:
    minus2 = 2 * 46.59691012098524
    np.testing.assert_allclose([alpha.AIC, alpha.BIC], [minus2 + 2 * 6, minus2 + 6 * math.log(72)], atol=1e-8)
    np.testing.assert_allclose(dyestuff2.AIC, 161.8282778122885 + 2 * 3, atol=1e-8)  # counts the one on the boundary
    assert (alpha.n, alpha.p, alpha.num_variance_parameters) == (72, 3, 3)


# ---- fixed and random effects ----------------------------------------------------------------------------------------


def test_fixed_effects_table(slopes: FitResult) -> None:
    """lme4: 251.405 (6.825), 10.467 (1.546)."""
    table = slopes.fixed_effects
    assert table["name"].tolist() == ["Intercept", "Days"]
    assert [f"{se:.3f}" for se in table["std_error"]] == ["6.825", "1.546"]
    np.testing.assert_allclose(table["z"], table["estimate"] / table["std_error"])
    np.testing.assert_allclose(np.sqrt(np.diag(slopes.beta_cov)), table["std_error"])


def test_predictions(alpha: FitResult) -> None:
    X = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    gen = DummyMatrix(["G01", "G24", "none"], levels=alpha.blup("gen")["level"], unknown="zero")
    with pytest.warns(UserWarning, match=r"the term 'gen' \(1 of 3\) and no `unseen`"):
        table = alpha.predict(X, {"gen": gen})
    blup = alpha.blup("gen").set_index("level")["blup"]
    expected = X.double() @ alpha.beta + torch.tensor([blup["G01"], blup["G24"], 0.0])
    np.testing.assert_allclose(table["prediction"], expected)
    assert (table["std_error"] > 0).all()
    plain = alpha.predict(X)
    np.testing.assert_allclose(plain["prediction"], X.double() @ alpha.beta)
    np.testing.assert_allclose(plain["std_error"], ((X.double() @ alpha.beta_cov) * X).sum(1).sqrt())
    assert plain["std_error"][2] == pytest.approx(table["std_error"][2])


def test_new_rows_as_a_whole(alpha: FitResult) -> None:
    """An unknown level has the variance of its term; a level of the fit, what `likelihood.predict` gives."""
    model = MixedModel("john_alpha", "yield ~ rep", random=["gen", "rep:block"])
    table = pd.DataFrame({"rep": ["R1", "R1"], "block": ["B1", "B9"], "gen": ["G01", "G99"]})
    new = model.design(table)
    predicted = alpha.predict(new)
    pd.testing.assert_frame_equal(predicted, alpha.predict(new.X, new.Z, new.unseen))
    plain = alpha.predict(new.X)
    assert predicted["prediction"][1] == pytest.approx(plain["prediction"][1])
    new_levels = alpha.variance["estimate"][:2].sum()
    assert predicted["std_error"][1] ** 2 == pytest.approx(plain["std_error"][1] ** 2 + new_levels)
    with pytest.raises(TypeError, match="predict\\(new\\)"):
        alpha.predict(new, new.Z)


def test_predictions_with_aliased_columns() -> None:
    y, x = torch.randn(12, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)
    X = torch.cat([torch.ones(12, 1), torch.ones(12, 1), x], dim=1)
    with pytest.warns(UserWarning, match="x1"):
        result = fit(ScalarMatrix(12), y, X)
    assert len(result.predict(X)) == 12
    assert result.fixed_effects["name"].tolist() == ["x0", "x2"]


# ---- the summary -----------------------------------------------------------------------------------------------------


def test_summary_without_a_step() -> None:
    """Balanced data, whose variances are in closed form those that a fit starts from."""
    model = MixedModel("penicillin", "diameter ~ 1", random=["plate", "sample"])
    result = fit(model.V, model.y, model.X)
    assert result.n_iter == 0
    assert "Converged at the start values: the score is zero." in str(result).splitlines()


def test_summary(alpha: FitResult) -> None:
    lines = str(alpha).splitlines()
    assert lines[0].startswith("Linear mixed model by REML")
    assert "n = 72, rank of X = 3, variance parameters = 3" in lines
    assert "log-likelihood = -46.5969, AIC = 105.19, BIC = 118.85" in lines
    assert f"Converged after {alpha.n_iter} steps: the score is zero." in lines
    text = "\n".join(lines)
    assert alpha.objective.solver.name in text
    assert "\nVariance parameters\n  name               estimate std. error  share\n" in text
    for part in ("gen/sigma^2        0.142902  0.0520781 48.5 %", "rep:block/sigma^2 0.0702183", "4.51825", "23.8 %"):
        assert part in text
    assert "note" not in text
    assert max(len(line) for line in lines) < 100


def test_summary_of_a_boundary_and_of_a_fit_that_did_not_end(dyestuff2: FitResult) -> None:
    text = dyestuff2.summary()
    assert "on the boundary of Batch/sigma^2." in text
    row = next(line for line in text.splitlines() if line.strip().startswith("Batch/sigma^2"))
    assert row.split()[1:] == ["0", "-", "0.0", "%", "boundary"]
    model = MixedModel("sleepstudy", "Reaction ~ Days", random={"Subject": Term("Subject", "1 + Days")})
    with pytest.warns(UserWarning, match="did not converge: the limit of 1 step was reached"):
        short = fit(model.V, model.y, model.X, max_steps=1)
    assert "NOT CONVERGED after 1 step: the limit of 1 step was reached." in short.summary()


def test_summary_where_a_part_of_the_mean_was_given(alpha: FitResult) -> None:
    given = replace(alpha, given="the output of a network")
    assert math.isnan(given.AIC)
    assert math.isnan(given.BIC)
    lines = given.summary().splitlines()
    assert lines[0] == "Linear mixed model by REML, given the output of a network"
    assert "log-likelihood = -46.5969" in lines
    assert "Fitted is what stands below; held is the output of a network." in lines
    assert not any("AIC =" in line for line in lines)
    assert max(len(line) for line in lines) < 100


def test_result_is_a_value(alpha: FitResult) -> None:
    with pytest.raises(AttributeError):
        alpha.converged = False  # type: ignore[misc]
    assert isinstance(alpha.variance, pd.DataFrame)
    assert alpha.theta.dtype == torch.float64
    assert not alpha.theta.requires_grad


def test_a_result_does_not_change_with_what_is_fixed_later() -> None:
    model = MixedModel("john_alpha", "yield ~ rep", random=["gen", "rep:block"])
    result = fit(model.V, model.y, model.X)
    AIC, table = result.AIC, result.variance
    model.V.set_no_grad([0])
    assert result.AIC == AIC
    pd.testing.assert_frame_equal(result.variance, table)


def test_a_singular_covariance_of_random_effects() -> None:
    """A correlation of −1: no single parameter is on a boundary, and the summary has it beside the covariance."""
    b, t = np.repeat(np.linspace(-1.5, 1.5, 12), 8), np.tile(np.arange(8.0), 12)
    error = np.tile([0.5, -0.5, -0.5, 0.5], 24)  # it has no level and no slope in any group
    table = pd.DataFrame({"g": np.repeat(np.arange(12), 8), "t": t, "y": b - 0.2 * b * t + error})
    result = fitted(table, "y ~ t", random={"g": Term("g", "1 + t")})
    assert result.held == (0, 0, -1, 0)
    assert not result.variance["boundary"].any()
    assert np.isfinite(result.variance["std_error"]).all()
    lines = result.summary().splitlines()
    assert any(line.endswith("on the boundary where the covariance of g is singular.") for line in lines)
    (row,) = [line for line in lines if line.strip().startswith("g/sigma_Intercept_t")]
    assert row.endswith(" -1.000")
    assert "note" not in result.summary()


def test_designs_that_do_not_fit() -> None:
    model = MixedModel("john_alpha", "yield ~ rep", random=["gen", "rep:block"])
    result = fit(model.V, model.y, model.X)
    Z = model.V.operand("gen").operand_list()[0]
    with pytest.raises(TypeError, match=r"predict\(model.design\(table\)\)`, or their design X as a tensor, got list"):
        result.predict([1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"needs X of shape \(m, 3\), got \(72, 2\)"):
        result.predict(model.X[:, :2])
    with pytest.raises(ValueError, match="design of 'gn'; the random terms are gen, rep:block"):
        result.predict(model.X, {"gn": Z})
    with pytest.raises(ValueError, match="got 5 rows of X and 72 of the design of 'gen'"):
        result.predict(model.X[:5], {"gen": Z})
