"""Fixed effects before any covariance: rank from left to right, centring without loss of digits, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn import fit
from openreml_nn.covariance import ScalarMatrix
from openreml_nn.data import MixedModel
from openreml_nn.solvers import FixedEffects, prepare_fixed_effects

REFERENCES = Path(__file__).parents[1] / "references" / "data"
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
ONE = torch.ones(20, 1, dtype=torch.float64)


def recomposed(fixed: FixedEffects) -> Tensor:
    """The kept columns of X."""
    return fixed.U @ fixed.R


@pytest.mark.parametrize(
    ("columns", "kept", "aliased"),
    [
        ([X], [0, 1, 2], []),
        ([ONE, X, ONE], [0, 1, 2, 3], [4]),
        ([ONE, 2.0 * ONE, X], [0, 2, 3, 4], [1]),
        ([X, X[:, :1] + X[:, 1:2]], [0, 1, 2], [3]),
        ([0.0 * ONE, X], [1, 2, 3], [0]),
        ([X, X], [0, 1, 2], [3, 4, 5]),
        ([ONE, 1e-12 * X[:, :1], 1e9 * X[:, 1:2]], [0, 1, 2], []),
        ([ONE, 1e6 + 0.1 * X[:, :1]], [0, 1], []),
        ([ONE, 1e8 + 0.1 * X[:, :1]], [0], [1]),
        ([torch.eye(20, dtype=torch.float64)[:, :5], X, X], [0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10]),
    ],
    ids=["full", "two ones", "multiple", "sum", "zeros", "twice", "scales", "offset", "hopeless offset", "several"],
)
def test_columns_are_dropped_from_left_to_right(columns: list[Tensor], kept: list[int], aliased: list[int]) -> None:
    whole = torch.cat(columns, dim=1)
    fixed = prepare_fixed_effects(Y, whole)
    assert (fixed.kept, fixed.aliased) == (kept, aliased)
    assert (fixed.n, fixed.p) == (20, len(kept))
    torch.testing.assert_close(recomposed(fixed), whole[:, kept])
    torch.testing.assert_close(fixed.U.mT @ fixed.U, torch.eye(len(kept), dtype=torch.float64))


def test_empty_cell_of_an_interaction_is_the_column_that_r_drops() -> None:
    """R's lm drops ``a3:b3`` for treatment contrasts where level 3 of both never meet."""
    cells = [(a, b) for a in range(3) for b in range(3) if (a, b) != (2, 2)] * 3
    a, b = np.array(cells).T
    names = ["1", "a2", "a3", "b2", "b3", "a2:b2", "a3:b2", "a2:b3", "a3:b3"]
    columns = [np.ones(24), a == 1, a == 2, b == 1, b == 2]
    columns += [(a == i) & (b == j) for j in (1, 2) for i in (1, 2)]
    fixed = prepare_fixed_effects(
        torch.randn(24, dtype=torch.float64), torch.tensor(np.stack(columns, axis=1).astype(float))
    )
    assert [names[i] for i in fixed.aliased] == ["a3:b3"]


def test_more_columns_than_a_basis_holds() -> None:
    fixed = prepare_fixed_effects(torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, 7))
    assert fixed.aliased == [1, 2, 3, 4, 5, 6]


def test_rank_deficiency_can_be_an_error() -> None:
    with pytest.raises(ValueError, match=r"columns \[1\] depend on columns to their left"):
        prepare_fixed_effects(Y, torch.cat([ONE, ONE], dim=1), rank="error")
    assert prepare_fixed_effects(Y, ONE, rank="error").p == 1
    with pytest.raises(ValueError, match="`rank` must be 'drop' or 'error', got 'keep'"):
        prepare_fixed_effects(Y, ONE, rank="keep")


def test_centring() -> None:
    fixed = prepare_fixed_effects(Y, X)
    torch.testing.assert_close(X.mT @ fixed.e, torch.zeros(3, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(fixed.ols, torch.linalg.lstsq(X, Y[:, None]).solution[:, 0])
    torch.testing.assert_close(X @ fixed.ols + fixed.e, Y)
    torch.testing.assert_close(fixed.logdet_RtR, torch.logdet(X.mT @ X))
    assert float(fixed.residual_variance()) == pytest.approx(float(fixed.e.square().sum()) / 17)


@pytest.mark.parametrize("offset", [1e8, -1e12])
def test_an_offset_costs_no_digits(offset: float) -> None:
    """A shift that is exact in floating point leaves exactly the same residual."""
    exact = (Y * 1024).round() / 1024
    plain = prepare_fixed_effects(exact, torch.cat([ONE, X], dim=1))
    shifted = prepare_fixed_effects((exact * 1024 + offset * 1024) / 1024, torch.cat([ONE, X], dim=1))
    moved = (exact + offset) - offset  # what is left of y after float64 took the offset
    wanted = prepare_fixed_effects(moved, torch.cat([ONE, X], dim=1))
    torch.testing.assert_close(shifted.e, wanted.e, atol=1e-14, rtol=0)
    if offset == 1e8:
        torch.testing.assert_close(shifted.e, plain.e, atol=1e-7, rtol=0)
    assert float(shifted.ols[0] - offset) == pytest.approx(float(wanted.ols[0]), abs=1e-15 * abs(offset) + 1e-9)


def test_an_offset_of_many_rows_beside_outliers_and_constants_in_another_column() -> None:
    """The same residual whether the constants are found as a column of ones or as a combination of columns."""
    x = torch.linspace(-1.0, 1.0, 5000, dtype=torch.float64)
    y = 1e12 + (torch.sin(1e3 * x) * 1024).round() / 1024
    y[::7] += 2.0**20
    ones = torch.ones_like(x)
    column, combined = (prepare_fixed_effects(y, torch.stack(X, dim=1)) for X in ([x, ones], [x, ones + x]))
    torch.testing.assert_close(column.e, combined.e, atol=1e-8, rtol=0)
    assert float(column.ols[1]) == pytest.approx(float(combined.ols[1]), rel=1e-15)


@pytest.mark.parametrize(("offset", "atol"), [(1e6, 1e-9), (1e8, 1e-7)])
def test_offset_where_x_does_not_hold_the_constants(offset: float, atol: float) -> None:
    fixed = prepare_fixed_effects(Y + offset, X)
    expected = (Y + offset) - X @ torch.linalg.lstsq(X, (Y + offset)[:, None]).solution[:, 0]
    torch.testing.assert_close(fixed.e, expected, atol=atol, rtol=0)


def test_nist_smls07() -> None:
    """NIST StRD SmLs07 (Simon & Lesage 1989), values around 10¹².

    The expected numbers are the exact ones of its float64 input, by 40-digit arithmetic on the rounded data.
    """
    model = MixedModel(REFERENCES / "nist_smls07.csv", "y ~ 1", random=["group"])
    result = fit(model.V, model.y, model.X)
    estimate = dict(zip(result.variance["name"], result.variance["estimate"], strict=True))
    assert estimate["group/sigma^2"] == pytest.approx(0.0095247138159255231769, rel=1e-7)
    assert estimate["residual/sigma^2"] == pytest.approx(0.010000543540747708114, rel=1e-9)
    assert result.loglik == pytest.approx(151.32132619549079365, rel=1e-10)
    assert float(result.beta[0] - 1e12) == pytest.approx(0.399998579076, abs=2e-4)


def test_without_x_a_column_of_ones() -> None:
    fixed = prepare_fixed_effects(Y)
    assert fixed.p == 1
    torch.testing.assert_close(fixed.e, Y - Y.mean())


def test_no_fixed_effects() -> None:
    fixed = prepare_fixed_effects(Y, torch.zeros(20, 0))
    assert fixed.p == 0
    assert torch.equal(fixed.e, Y)
    assert float(fixed.logdet_RtR) == 0.0
    result = fit(ScalarMatrix(20), Y, torch.zeros(20, 0))
    assert result.converged
    assert result.variance["estimate"][0] == pytest.approx(float(Y.square().mean()))
    assert result.beta.shape == (0,)
    assert "none" in result.summary()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8, torch.float16])
def test_other_types_become_float64(dtype: torch.dtype) -> None:
    y = torch.arange(20).to(dtype)
    fixed = prepare_fixed_effects(y, torch.ones(20, 1, dtype=torch.int32))
    assert fixed.e.dtype == fixed.U.dtype == torch.float64
    torch.testing.assert_close(fixed.e, torch.arange(20, dtype=torch.float64) - 9.5)


@pytest.mark.parametrize(
    ("y", "design", "message"),
    [
        (Y[:, None], ONE, r"y must have 1 dimension, got \(20, 1\)"),
        (Y, ONE[:, 0], r"X must have 2 dimensions, got \(20,\)"),
        (Y, ONE[:19], "one row for each of the 20 observations, got 19 rows"),
        (torch.where(Y > 0, Y, torch.nan), ONE, r"y holds \d+ missing or infinite values. Drop or replace them"),
        (Y.clone().index_fill(0, torch.tensor([3]), torch.inf), ONE, "y holds 1 missing or infinite value"),
        (Y, X / 0.0, "X holds 60 missing or infinite values"),
        (torch.full((20,), 7.0), ONE, "response is constant"),
        (torch.full((20,), 1e12 + 0.1), ONE, "response is constant"),
        (torch.zeros(20), torch.zeros(20, 0), "response is constant"),
        (X @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), X, "fixed effects fit it exactly"),
        (Y[:3], X[:3], "3 observations leave no degrees of freedom beside 3 fixed effects"),
        (Y[:1], None, "1 observations leave no degrees of freedom beside 1 fixed effect"),
    ],
)
def test_bad_values(y: Tensor, design: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_fixed_effects(y, design)


@pytest.mark.parametrize(
    ("y", "design"), [(Y.numpy(), ONE), (Y, ONE.numpy()), (Y.to(torch.complex128), ONE), ("y", ONE)]
)
def test_bad_types(y: object, design: object) -> None:
    with pytest.raises(TypeError, match="must be a tensor of real numbers, got"):
        prepare_fixed_effects(y, design)  # type: ignore[arg-type]
