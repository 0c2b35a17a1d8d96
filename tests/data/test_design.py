"""Designs of new rows: the coding of the fit, zeros for new levels."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn.covariance import AR1Matrix
from openreml_nn.data import Kernel, MixedModel, Term, read_table


def test_rows_of_the_fit_give_its_designs() -> None:
    model = MixedModel("sleepstudy", "Reaction ~ poly(Days, 2)", {"Subject": Term("Subject", "1 + Days")})
    new = model.design(read_table("sleepstudy").drop(columns="Reaction").tail(7))
    torch.testing.assert_close(new.X, model.X[-7:])
    torch.testing.assert_close(new.Z["Subject"](), model.V.operand("Subject").Z()[-7:])
    assert bool(new.known["Subject"].all())


def test_new_levels_give_rows_of_zeros() -> None:
    model = MixedModel("john_alpha", "yield ~ rep", ["gen", "rep:block"])
    rows = pd.DataFrame({"rep": ["R1", "R3"], "block": ["B1", "B9"], "gen": ["new", None], "other": [1, 2]})
    new = model.design(rows)
    assert new.X.tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]
    assert new.known["gen"].tolist() == [False, False]
    assert new.known["rep:block"].tolist() == [True, False]
    assert new.Z["gen"]().abs().sum() == 0
    assert new.Z["rep:block"]().sum(1).tolist() == [1.0, 0.0]


def test_within_and_kernels() -> None:
    t = read_table("ovary")
    model = MixedModel(t, "follicles ~ 1", {"Mare": Term("Mare", within="idx", covariance=AR1Matrix)})
    new = model.design(pd.DataFrame({"Mare": ["M02", "M02", "M99"], "idx": [3, 99, 3]}))
    assert new.known["Mare"].tolist() == [True, False, False]
    Z = new.Z["Mare"]()
    assert (Z.sum(1).tolist(), int(Z[0].argmax())) == ([1.0, 0.0, 0.0], 2 * 11 + 1)

    term = Term("line", relationship=Kernel("gblup150_K"))
    genomic = MixedModel(read_table("gblup150").head(20), "y ~ 1", {"line": term})
    unseen = genomic.design(pd.DataFrame({"line": ["L150", "L999", None]}))
    assert unseen.known["line"].tolist() == [True, False, False]
    assert int(unseen.Z["line"]()[0].argmax()) == 149


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"rep": ["R7"], "gen": ["G01"]}, "'rep' has the new level R7"),
        ({"rep": [None], "gen": ["G01"]}, "Missing values in 'rep'"),
        ({"gen": ["G01"]}, "no column 'rep'"),
        ({"rep": ["R1"], "gem": ["G01"]}, "no column 'gen', which term 'gen' uses; did you mean 'gem'"),
    ],
)
def test_what_is_wrong_with_new_rows(rows: dict[str, list[str]], message: str) -> None:
    model = MixedModel("john_alpha", "yield ~ rep", "gen")
    with pytest.raises(ValueError, match=message):
        model.design(pd.DataFrame(rows))


def test_a_numeric_column_stays_numeric() -> None:
    model = MixedModel("sleepstudy", "Reaction ~ Days + C(Days)", "Subject")
    with pytest.raises(ValueError, match="'Days' was numeric in the fit and holds 'x'"):
        model.design(pd.DataFrame({"Days": ["x"], "Subject": ["S308"]}))
    with pytest.raises(ValueError, match="did not see in the fit"):
        model.design(pd.DataFrame({"Days": [77], "Subject": ["S308"]}))


def test_a_million_rows() -> None:
    codes = np.random.default_rng(0).integers(0, 5000, 1_000_000)
    t = pd.DataFrame({"y": np.arange(1e6), "g": codes})
    assert len(MixedModel(t, "y ~ 1", "g").V.operand("g").Z.levels) == 5000
