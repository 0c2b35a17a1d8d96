"""The coding that processes learn together from rows of their own is that of the whole table."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn.covariance import UnstructuredMatrix
from openreml_nn.data import MixedModel, Term, read_table
from openreml_nn.solvers.ranks import Alone


def share(table: pd.DataFrame, fixed: str, random: Any, own: list[str], **options: Any) -> MixedModel:
    return MixedModel(table, fixed, random, **options, own=own, ranks=Alone())


def test_a_share_of_all_rows_is_the_model() -> None:
    table = read_table("sleepstudy").sample(frac=1.0, random_state=0)
    random = {"Subject": Term("Subject", "1 + Days", UnstructuredMatrix)}
    for own in ([], ["Subject"]):
        ours, whole = share(table, "Reaction ~ Days", random, own), MixedModel(table, "Reaction ~ Days", random)
        theta = torch.linspace(-0.5, 0.5, whole.V.num_params, dtype=torch.float64)
        assert torch.equal(ours.V(theta), whole.V(theta))
        assert torch.equal(ours.X, whole.X)
        assert ours.x_names == whole.x_names
        new = table.iloc[:3].assign(Subject=["new", "S308", "S309"])
        for name in ("Z", "unseen"):
            theirs = getattr(whole.design(new), name)["Subject"]
            assert torch.equal(getattr(ours.design(new), name)["Subject"](), theirs())


def test_formulas_of_all_rows_are_refused() -> None:
    table = read_table("sleepstudy")
    for fixed in (
        "Reaction ~ scale(Days)",
        "Reaction ~ bs(Days, df=4)",
        "Reaction ~ lag(Days)",
        "Reaction ~ I(Days - Days.mean())",
    ):
        with pytest.raises(ValueError, match="may depend on all rows"):
            share(table, fixed, ["Subject"], ["Subject"])
    with pytest.raises(ValueError, match="Term 'Subject' has 'poly"):
        share(table, "Reaction ~ Days", {"Subject": Term("Subject", "1 + poly(Days, 2)")}, ["Subject"])
    share(table, "log(Reaction) ~ C(Days) + I(Days ** 2)", ["Subject"], ["Subject"])


def test_what_is_wrong_with_a_share() -> None:
    table = read_table("sleepstudy")
    with pytest.raises(ValueError, match=r"The response 'Reaction' is constant \(1 in all 180 rows\)"):
        share(table.assign(Reaction=1.0), "Reaction ~ Days", ["Subject"], ["Subject"])
    with pytest.raises(ValueError, match="no rows"):
        share(table.iloc[:0], "Reaction ~ Days", ["Subject"], ["Subject"])
    with pytest.raises(ValueError, match="Missing values in 'Days'"):
        share(table.assign(Days=np.nan), "Reaction ~ Days", ["Subject"], ["Subject"])
    with pytest.raises(ValueError, match="confounded with the residual"):
        share(table.assign(row=np.arange(180)), "Reaction ~ Days", ["row"], ["row"])
