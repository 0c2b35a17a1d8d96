"""A model without its table: names, columns and records."""

import numpy as np
import pandas as pd
import pytest

from openreml_nn.covariance import AR1Matrix
from openreml_nn.data import Term, read_table
from openreml_nn.data.specification import Specification, named_terms


def test_names_of_terms() -> None:
    assert named_terms(None) == {}
    assert named_terms(["rep", ["rep", "block"]]) == {"rep": Term("rep"), "rep:block": Term(["rep", "block"])}
    assert list(Specification("y ~ 1").residual) == ["residual"]
    assert list(Specification("y ~ 1", "g", {"s": Term("f"), "nugget": Term()}).terms) == ["g", "s", "nugget"]
    with pytest.raises(ValueError, match="no response"):
        Specification("~ x")


def test_columns() -> None:
    serial = Term("Subject", within="age", covariance=AR1Matrix)
    given = Specification("log(distance) ~ C(age)", {"g": Term("Sex", "1 + Subject")}, serial)
    table = read_table("orthodont")
    assert given.columns(table) == ["distance", "age", "Sex", "Subject"]
    assert given.fixed_columns(table) == ["age"]
    assert given.level_columns(table, ["g"]) == [["Sex"], ["Subject"], ["age"]]
    assert given.level_columns(table, []) == [["Subject"], ["age"]]


def test_records() -> None:
    table = pd.DataFrame({"y": [1.0, np.nan, 3.0], "x": [1, 2, 3], "other": np.nan}, index=["a", "b", "c"])
    records = Specification("y ~ x").records(table, "drop")
    assert list(records.frame.columns) == ["y", "x"]
    assert records.frame.index.tolist() == [0, 1]
    assert (records.labels.tolist(), records.positions.tolist(), records.dropped) == (["a", "c"], [0, 2], 1)
    with pytest.raises(ValueError, match=r"Missing values in 'y' \(1 row\)"):
        Specification("y ~ x").records(table, "error")
