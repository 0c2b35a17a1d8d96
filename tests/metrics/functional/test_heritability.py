"""Heritability on the basis of differences, against published values, R and the dense prediction error covariance."""

import pytest
import torch
from torch import Tensor

import openreml_nn
from openreml_nn import FitResult
from openreml_nn.data import Kernel, MixedModel, Term
from openreml_nn.metrics.functional import (
    blup_difference_variance,
    cullis_heritability,
    mean_difference_variance,
    variance_ratio,
)
from openreml_nn.solvers import RandomTerm, random_terms


def fitted(name: str, solver: str = "auto") -> tuple[FitResult, RandomTerm]:
    options = {"gblup150": {"random": {"line": Term(groups="line", relationship=Kernel("gblup150_K"))}}}
    fixed = {"john_alpha": "yield ~ rep", "gblup150": "y ~ trial"}[name]
    model = MixedModel(name, fixed, **options.get(name, {"random": ["gen", "rep:block"]}))  # type: ignore[arg-type]
    result = openreml_nn.fit(model.V, model.y, model.X, solver=solver)
    return result, random_terms(result.V, result.theta)[0]


def prediction_error_covariance(result: FitResult, term: RandomTerm) -> Tensor:
    """G − G Z'PZ G from dense matrices."""
    Z, G, V = term.Z.build(term.Z_params), term.G.build(term.G_params), result.V.build(result.theta)
    fixed = result.evaluation.problem.fixed
    Vi = torch.linalg.inv(V)
    P = Vi - Vi @ fixed.U @ torch.linalg.solve(fixed.U.mT @ Vi @ fixed.U, fixed.U.mT @ Vi)
    return G - G @ Z.mT @ P @ Z @ G


def test_published_trial() -> None:
    """The alpha design of John & Williams (1995): 0.809 by ASReml in the documentation of the R package agridat.

    More digits by tests/metrics/references.R. The heritability from adjusted means, σ_g² / (σ_g² + v̄ / 2) of Piepho &
    Möhring (2007), Genetics 177, 1881-1888, is 0.803 there; it is a ratio of variances too.
    """
    result, gen = fitted("john_alpha")
    sigma2 = result.V.natural(result.theta)[0]
    got = cullis_heritability(blup_difference_variance(result.evaluation, gen), sigma2)
    assert f"{got:.3f}" == "0.809"
    assert float(got) == pytest.approx(0.809133565345010, rel=1e-6)

    means = MixedModel("john_alpha", "yield ~ 0 + gen + rep", random=["rep:block"])
    other = openreml_nn.fit(means.V, means.y, means.X)
    v = mean_difference_variance(other.beta_cov[:24, :24])
    assert float(v) == pytest.approx(0.0701087510375362, rel=1e-6)
    assert f"{variance_ratio(torch.stack([sigma2, v]), [1, 0], [1, 0.5]):.3f}" == "0.803"


@pytest.mark.parametrize("name", ["john_alpha", "gblup150"])
@pytest.mark.parametrize("solver", ["auto", "dense"])
def test_without_the_matrix(name: str, solver: str) -> None:
    result, term = fitted(name, solver)
    dense = prediction_error_covariance(result, term)
    got = blup_difference_variance(result.evaluation, term)
    torch.testing.assert_close(got, mean_difference_variance(dense), rtol=1e-8, atol=0.0)


def test_over_pairs() -> None:
    A = torch.randn(7, 7, dtype=torch.float64)
    C = A @ A.mT + 1e3
    d = C.diagonal()[:, None] + C.diagonal() - 2 * C
    torch.testing.assert_close(mean_difference_variance(C), d.sum() / (7 * 6))


def test_balanced_trial_is_the_entry_mean() -> None:
    """Genotypes in r complete replicates: 1 − v̄ / (2 σ_g²) is σ_g² / (σ_g² + σ_e² / r)."""
    g, e, r, q = 2.0, 3.0, 4, 5
    I = torch.eye(q, dtype=torch.float64)
    shrinkage = g / (g + e / r)
    centred = I - 1 / q
    pev = g * I - shrinkage * g * centred  # the mean is a fixed effect
    torch.testing.assert_close(cullis_heritability(mean_difference_variance(pev), g), torch.tensor(shrinkage).to(pev))


def test_bad_input() -> None:
    for wrong in (torch.ones(3), torch.ones(2, 3), torch.ones(1, 1), torch.full((2, 2), torch.nan)):
        with pytest.raises(ValueError, match="needs a square matrix of at least 2 rows"):
            mean_difference_variance(wrong)
    for v, sigma2 in ((-0.1, 1.0), (0.1, 0.0), (torch.nan, 1.0), (torch.ones(2), 1.0)):
        with pytest.raises(ValueError, match="a genetic variance greater than 0, got"):
            cullis_heritability(v, sigma2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="or a number as `genetic_variance`, got NoneType"):
        cullis_heritability(0.1, None)  # type: ignore[arg-type]
