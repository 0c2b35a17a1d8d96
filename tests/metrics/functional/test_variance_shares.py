"""R² and the intraclass correlation of fits, against lme4 and published values, and on large numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

import openreml_nn
from openreml_nn.data import MixedModel, Term
from openreml_nn.metrics.functional import conditional_r2, intraclass_correlation, marginal_r2

MODELS: dict[str, tuple[dict[str, Any], list[float]]] = {
    # marginal R², conditional R² and adjusted ICC by tests/metrics/references.R (lme4 1.1-31)
    "intercepts": (
        {"table": "sleepstudy", "fixed": "Reaction ~ Days", "random": ["Subject"]},
        [0.279885634594619, 0.704255455194947, 0.589308922286855],
    ),
    "slopes": (
        {
            "table": "sleepstudy",
            "fixed": "Reaction ~ Days",
            "random": {"Subject": Term(groups="Subject", design="1 + Days")},
        },
        [0.278652042562012, 0.799218896977232, 0.721658457679865],
    ),
    "crossed": (
        {"table": "john_alpha", "fixed": "yield ~ rep", "random": ["gen", "rep:block"]},
        [0.226720917892415, 0.785867554791719, 0.723085170460503],
    ),
}


def parts(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed part, variance of the random effects and residual variance of each row of a fit."""
    model = MixedModel(**MODELS[name][0])
    result = openreml_nn.fit(model.V, model.y, model.X)
    random = [term for term in model.V.operand_names if term != "residual"]
    return model.X @ result.beta, result.variance_beside(["residual"]), result.variance_beside(random)


@pytest.mark.parametrize("name", MODELS)
def test_against_lme4(name: str) -> None:
    fixed, random, residual = parts(name)
    got = [
        marginal_r2(fixed, random, residual),
        conditional_r2(fixed, random, residual),
        intraclass_correlation(random, residual),
    ]
    assert [float(value) for value in got] == pytest.approx(MODELS[name][1], rel=1e-6)


def test_against_printed_values() -> None:
    """The R package performance prints 0.279, 0.799 and an ICC of 0.722 for the random slopes of `sleepstudy`."""
    fixed, random, residual = parts("slopes")
    got = [marginal_r2(fixed, random, residual), conditional_r2(fixed, random, residual)]
    got.append(intraclass_correlation(random, residual))
    assert [f"{float(value):.3f}" for value in got] == ["0.279", "0.799", "0.722"]


@pytest.mark.parametrize("shift", [0.0, 1e8, -1e8])
def test_large_predictions(shift: float) -> None:
    fixed = torch.arange(10.0, dtype=torch.float64) / 16 + shift  # exact in binary
    torch.testing.assert_close(
        marginal_r2(fixed, 1.0, 2.0), (fixed - shift).var() / ((fixed - shift).var() + 3.0), rtol=1e-14, atol=0.0
    )


def test_numbers_rows_and_types() -> None:
    fixed = torch.tensor([[1, 2, 4], [0, 3, 1]])
    ones = torch.ones(2, 3)
    for r, e in ((0.5 * ones, 2.0), (0.5, 2 * ones), (torch.tensor(0.5), torch.tensor(2.0, dtype=torch.float16))):
        assert float(marginal_r2(fixed, r, e)) == pytest.approx(float(marginal_r2(fixed.flatten(), 0.5, 2)), rel=1e-15)
    f = float(fixed.double().var(correction=0))
    assert float(conditional_r2(fixed, 0.5, 2, correction=0)) == pytest.approx((f + 0.5) / (f + 2.5), rel=1e-15)
    assert float(intraclass_correlation(torch.tensor([0.0, 4.0]), 2.0)) == pytest.approx(0.5)


def test_where_there_is_no_share() -> None:
    assert marginal_r2(torch.ones(1), 1.0, 1.0).isnan()
    assert marginal_r2(torch.ones(0), 1.0, 1.0).isnan()
    assert marginal_r2(torch.ones(5), 0.0, 0.0).isnan()
    assert intraclass_correlation(0.0, 0.0).isnan()
    assert float(marginal_r2(torch.ones(5), 1.0, 1.0)) == 0.0


def test_bad_input() -> None:
    fixed = torch.ones(3)
    with pytest.raises(ValueError, match=r"`marginal_r2` needs values of one shape.*`fixed` \(3,\), `random_variance`"):
        marginal_r2(fixed, torch.ones(3, 1), 1.0)
    with pytest.raises(ValueError, match=r"needs values of one shape, .*`fixed` \(\), `random_variance` \(3,\)"):
        conditional_r2(fixed.sum(), fixed, 1.0)
    with pytest.raises(ValueError, match=r"variances of at least 0 in `residual_variance`, the smallest is -1.0"):
        conditional_r2(fixed, 1.0, -1.0)
    with pytest.raises(ValueError, match="finite numbers in `fixed`, got missing or infinite ones"):
        marginal_r2(torch.tensor([1.0, torch.nan]), 1.0, 1.0)
    with pytest.raises(ValueError, match="finite numbers in `random_variance`"):
        intraclass_correlation(torch.inf, 1.0)
    with pytest.raises(TypeError, match="a tensor of real numbers as `fixed`, got float"):
        marginal_r2(1.0, 1.0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a tensor of real numbers or a number as `random_variance`, got str"):
        intraclass_correlation("1", 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got a tensor of torch.complex64"):
        marginal_r2(torch.ones(3, dtype=torch.complex64), 1.0, 1.0)
