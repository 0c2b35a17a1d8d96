"""Shares of the variance and predictions of random effects, by term."""

import math

import numpy as np
import pytest
import torch

from openreml_nn import FitResult, fit
from openreml_nn.covariance import AR1Matrix, CovariancePropagation, DummyMatrix, KroneckerProduct, ScalarMatrix, Sum


def test_shares_of_terms_with_several_parameters(slopes: FitResult) -> None:
    table = slopes.variance
    assert np.isnan(table["share"]).tolist() == [False, True, True, False]
    assert table["share"].sum() == pytest.approx(1.0)
    diagonal = slopes.V.diagonal(slopes.theta).mean()
    assert table["share"].iloc[-1] == pytest.approx(float(table["estimate"].iloc[-1] / diagonal))


def test_share_of_a_term_that_is_tied_to_another() -> None:
    """Two factors with one variance: one row, with the shares of both; a variance of its own has a row of its own."""
    rng = np.random.default_rng(7)
    left, right = DummyMatrix(rng.integers(0, 6, 60)), DummyMatrix(rng.integers(0, 6, 60))
    G = ScalarMatrix(6)
    both = CovariancePropagation(right, KroneckerProduct(ScalarMatrix(1), G))
    y = torch.tensor(rng.normal(size=6)[left.codes] + rng.normal(size=6)[right.codes] + rng.normal(size=60))
    result = fit(Sum(a=CovariancePropagation(left, G), b=CovariancePropagation(right, G), residual=ScalarMatrix(60)), y)
    sigma2, noise = result.variance["estimate"]
    np.testing.assert_allclose(result.variance["share"], np.array([2.0 * sigma2, noise]) / (2.0 * sigma2 + noise))
    V = Sum(a=CovariancePropagation(left, G), b=both, residual=ScalarMatrix(60))
    V.set_theta(torch.log(torch.tensor([1.0, 2.0, 3.0])))
    V.set_no_grad([0, 1, 2])
    np.testing.assert_allclose(fit(V, y).variance["share"], np.array([1.0, 4.0, 9.0]) / 14.0)


def test_share_of_a_single_structure() -> None:
    y = torch.randn(20, dtype=torch.float64)
    assert fit(AR1Matrix(20), y).variance["share"].tolist() == [1.0, pytest.approx(math.nan, nan_ok=True)]


def test_random_effects_by_term_effect_and_level(slopes: FitResult) -> None:
    """lme4's conditional modes of subject 308: 2.26 and 9.20."""
    table = slopes.blup("Subject")
    assert list(table.columns) == ["term", "effect", "level", "blup", "pev"]
    assert len(table) == 36
    subject = table[table["level"] == "S308"].set_index("effect")
    assert f"{subject['blup'].iloc[0]:.2f}" == "2.26"
    assert f"{subject['blup'].iloc[1]:.2f}" == "9.20"
    assert subject.index[1] == "Days"
    assert (table["pev"] > 0).all()


def test_random_effects_of_all_terms(alpha: FitResult) -> None:
    table = alpha.blup()
    assert table["term"].unique().tolist() == ["gen", "rep:block"]
    assert len(table) == 24 + 18
    assert table.query("term == 'gen' and level == 'G01'")["blup"].item() == pytest.approx(0.501184, abs=1e-6)
    assert "R1:B1" in set(table["level"])
    with pytest.raises(KeyError, match="no random term 'genotype'; there are \\['gen', 'rep:block'\\]"):
        alpha.blup("genotype")


def test_no_random_term() -> None:
    result = fit(ScalarMatrix(10), torch.randn(10, dtype=torch.float64))
    assert result.blup().empty
    assert list(result.blup().columns) == ["term", "effect", "level", "blup", "pev"]


def test_levels_without_names() -> None:
    Z = torch.eye(5, dtype=torch.float64).repeat(4, 1)
    result = fit(
        Sum(a=CovariancePropagation(Z, ScalarMatrix(5)), residual=ScalarMatrix(20)),
        torch.randn(20, dtype=torch.float64),
    )
    assert result.blup()["level"].tolist() == ["0", "1", "2", "3", "4"]
