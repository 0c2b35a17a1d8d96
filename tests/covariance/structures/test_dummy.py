"""Level codes: every kind of factor, several factors, unknown and missing values."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix

SAME = ["b", "a", "b", "c"]
Z = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("factor", "levels"),
    [
        (SAME, ["a", "b", "c"]),
        (np.array(SAME), ["a", "b", "c"]),
        (np.array(SAME, dtype=object), ["a", "b", "c"]),
        (pd.Series(SAME, index=[7, 3, 3, 1], name="herd"), ["a", "b", "c"]),
        (pd.Categorical(SAME), ["a", "b", "c"]),
        (pd.Series(SAME, dtype="category"), ["a", "b", "c"]),
        (pd.Categorical(["m", "l", "m", "s"], categories=["l", "m", "s", "unused"]), ["l", "m", "s"]),
        ([10, 9, 10, 11], ["9", "10", "11"]),
        (np.array([10, 9, 10, 11], dtype=np.int8), ["9", "10", "11"]),
        (np.array([0, -128, 0, 127], dtype=np.int8), ["-128", "0", "127"]),
        (np.array([10, 9, 10, 255], dtype=np.uint8), ["9", "10", "255"]),
        ([0, -(2**62), 0, 2**62], [str(-(2**62)), "0", str(2**62)]),
        ([0.5, -1.0, 0.5, 2.0], ["-1.0", "0.5", "2.0"]),
        (torch.tensor([10, 9, 10, 11]), ["9", "10", "11"]),
        (pd.to_datetime(["2021-01-01", "2020-01-01", "2021-01-01", "2022-01-01"]), None),
    ],
)
def test_kinds_of_factors(factor: Any, levels: list[str] | None) -> None:
    mat = DummyMatrix(factor)
    assert mat().tolist() == Z
    assert levels is None or mat.levels == levels
    assert mat.num_levels == 3


def test_booleans() -> None:
    assert DummyMatrix([True, False, True]).levels == ["False", "True"]


def test_order_of_categories_is_kept() -> None:
    assert DummyMatrix(pd.Categorical(["lo", "hi"], categories=["lo", "hi"])).levels == ["lo", "hi"]


def test_several_factors_take_the_observed_combinations() -> None:
    mat = DummyMatrix(["a", "a", "b", "a"], [1, 2, 1, 1])
    assert mat.levels == ["a:1", "a:2", "b:1"]
    assert mat.codes.tolist() == [0, 1, 2, 0]


def test_several_factors_full() -> None:
    mat = DummyMatrix(["a", "a", "b"], [1, 2, 1], ["x", "x", "x"], full=True)
    assert mat.levels == ["a:1:x", "a:2:x", "b:1:x", "b:2:x"]
    assert mat().sum(0).tolist() == [1.0, 1.0, 1.0, 0.0]


def test_full_keeps_unused_categories() -> None:
    factor = pd.Categorical(["a", "b"], categories=["a", "b", "z"])
    assert DummyMatrix(factor, full=True).shape == (2, 3)
    assert DummyMatrix(factor, levels=["b", "a"], full=True).levels == ["b", "a"]


def test_given_levels_are_the_columns() -> None:
    mat = DummyMatrix([2, 1], levels=[3, 2, 1])
    assert mat().tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert DummyMatrix(["a"], [1], levels=["b:1", "a:1"]).codes.tolist() == [1]


def test_unknown_level_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"1 unknown level \(d\).*unknown='zero'"):
        DummyMatrix(["a", "d"], levels=["a", "b"])


def test_unknown_level_as_a_row_of_zeros() -> None:
    mat = DummyMatrix(["a", "d", "b"], levels=["a", "b"], unknown="zero")
    assert mat().tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    assert mat.codes.tolist() == [0, -1, 1]


@pytest.mark.parametrize("factor", [["a", None], [1.0, np.nan], pd.Categorical(["a", None]), pd.Series(["a", pd.NA])])
@pytest.mark.parametrize("unknown", ["error", "zero"])
def test_missing_values_are_an_error(factor: Any, unknown: str) -> None:
    with pytest.raises(ValueError, match="1 missing value"):
        DummyMatrix(factor, unknown=unknown)


@pytest.mark.parametrize(
    ("factors", "more", "text"),
    [
        ((), {}, "at least one factor"),
        ((["a"],), {"unknown": "skip"}, "'skip'"),
        ((["a", "b"], [1]), {}, "equal length, got 2 and 1"),
        ((["a"],), {"levels": ["a", "a"]}, "without repetition"),
    ],
)
def test_refused(factors: Any, more: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DummyMatrix(*factors, **more)


def test_a_million_rows_stay_codes() -> None:
    """The dense matrix would take 800 GB."""
    rng = np.random.default_rng(0)
    mat = DummyMatrix(rng.integers(100_000, size=1_000_000))
    b = torch.randn(mat.shape[1], 1, dtype=torch.float64)
    rows = mat.matmul(mat.theta, b)
    counts = mat.rmatmul(mat.theta, torch.ones(mat.shape[0], 1, dtype=torch.float64))
    assert torch.equal(rows[:5], b[mat.codes[:5]])
    assert counts.sum().item() == 1_000_000


def test_no_parameters_and_a_short_text() -> None:
    mat = DummyMatrix(range(10))
    assert mat.param_names == []
    assert repr(mat) == "DummyMatrix(shape=(10, 10), levels=Levels(10: 0, 1, 2, 3, …), effects=['Intercept'])"


def test_integer_factor_with_a_variance() -> None:
    V = CovariancePropagation(DummyMatrix([3, 3, 1]), ScalarMatrix(2, start=2.0))
    assert V().round(decimals=12).tolist() == [[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 2.0]]


def test_from_codes() -> None:
    Z = DummyMatrix.from_codes(np.array([1, -1, 0, 1], dtype=np.int32), ["a", "b", "never"])
    assert Z.levels == ["a", "b", "never"]
    assert Z.build(torch.zeros(0)).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ([0.7, 1.0], r"needs integers of shape \(n,\), got float64"),
        ([[0, 1]], r"got int64 \(1, 2\)"),
        ([0, 2], "needs codes from -1 to 1, got 0 to 2"),
        ([-2, 0], "needs codes from -1 to 1, got -2 to 0"),
    ],
)
def test_codes_that_are_none(codes: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DummyMatrix.from_codes(np.array(codes), ["a", "b"])
