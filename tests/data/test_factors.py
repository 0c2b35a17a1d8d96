"""Levels of columns, in the table of a fit and in new rows."""

from datetime import date
from typing import Any

import numpy as np
import pandas as pd
import pytest

from openreml_nn.data.columns import tidy
from openreml_nn.data.factors import SPREAD, Factor


def factor_of(frame: pd.DataFrame, **options: Any) -> Factor:
    return Factor(list(frame.columns), tidy(frame), **options)


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 9, 10], ["9", "10"]),
        ([2**62, -5, 2**62], ["-5", str(2**62)]),
        ([0.5, 2.0, 0.5], ["0.5", "2"]),
        ([True, False, True], ["False", "True"]),
        ([date(2024, 5, 1), date(2023, 5, 1), date(2024, 5, 1)], ["2023-05-01", "2024-05-01"]),
        (pd.Categorical(["b", "a", "b"], categories=["b", "never", "a"]), ["b", "a"]),
    ],
)
def test_one_column(column: Any, labels: list[str]) -> None:
    frame = pd.DataFrame({"x": column})
    factor = factor_of(frame)
    assert factor.labels == factor.observed == labels
    assert [factor.labels[code] for code in factor.codes(tidy(frame))] == [str(v) if v != 2.0 else "2" for v in column]


def test_a_new_combination_of_known_levels_is_unknown() -> None:
    """Not the level of another combination."""
    factor = factor_of(pd.DataFrame({"rep": ["1", "1", "2"], "block": ["a", "b", "b"]}))
    assert factor.labels == ["1:a", "1:b", "2:b"]
    new = tidy(pd.DataFrame({"rep": ["2", "2", "1", "3"], "block": ["a", "b", "b", "a"]}))
    assert factor.codes(new).tolist() == [-1, 2, 1, -1]


@pytest.mark.parametrize("levels", [4, 40])
def test_few_and_many_combinations(levels: int) -> None:
    """Those that are marked and those that are sorted are numbered alike."""
    rng = np.random.default_rng(levels)
    rows = 30
    frame = pd.DataFrame({name: rng.integers(0, levels, rows) for name in ("a", "b")})
    assert (levels**2 > SPREAD * rows) == (levels == 40)
    factor = factor_of(frame)
    pairs = sorted(set(zip(frame.a, frame.b, strict=True)))
    assert factor.labels == [f"{a}:{b}" for a, b in pairs]
    assert factor.codes(tidy(frame)).tolist() == [pairs.index(pair) for pair in zip(frame.a, frame.b, strict=True)]


def test_more_labels_than_those_observed() -> None:
    frame = pd.DataFrame({"line": ["c", "a"]})
    factor = factor_of(frame, labels=["a", "b", "c"])
    assert (factor.labels, factor.observed) == (["a", "b", "c"], ["a", "c"])
    assert factor.codes(tidy(pd.DataFrame({"line": ["a", "b", "c", "d"]}))).tolist() == [0, 1, 2, -1]


def test_only_the_levels_of_some_rows() -> None:
    table = tidy(pd.DataFrame({"rep": [1, 1, 2, 2], "block": ["a", "b", "a", "b"]}))
    whole = Factor(["rep", "block"], table)
    part, kept = whole.only(table[1:3])
    assert (part.labels, kept.tolist()) == (["1:b", "2:a"], [1, 2])
    assert part.codes(table).tolist() == [-1, 0, 1, -1]
    assert (len(whole), whole.codes(table).tolist()) == (4, [0, 1, 2, 3])


def test_two_combinations_with_one_label() -> None:
    with pytest.raises(ValueError, match="two combinations with the label 'a:b:c'"):
        factor_of(pd.DataFrame({"x": ["a:b", "a"], "y": ["c", "b:c"]}))
