"""Who gets which rows: levels stay whole, no process without rows, and parts that are the model of their rows."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import fit
from openreml_nn.covariance import AR1Matrix
from openreml_nn.data import MixedModel, Term, read_table
from openreml_nn.data.shards import assign, require_same_table, runs, share_rows
from openreml_nn.solvers.ranks import Alone


class Pretended(Alone):
    """This process as the first of several, of which the others say what they are told to."""

    def __init__(self, *others: Any) -> None:
        self.others, self.size = others, 1 + len(others)

    def objects(self, x: Any) -> list[Any]:
        return [x, *self.others]


@pytest.fixture
def alpha() -> MixedModel:
    return MixedModel("john_alpha", "yield ~ rep", ["gen", "rep:block"])


@pytest.mark.parametrize("counts", [[1] * 7, [100, 1, 1, 1], [1, 1, 1, 100], [3, 50, 3, 50, 3], [1, 99]])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_runs_are_in_order_and_none_is_empty(counts: list[int], size: int) -> None:
    if len(counts) >= size:
        found = runs(np.array(counts), size)
        assert (np.diff(found) >= 0).all()
        assert set(found) == set(range(size))


def test_runs_are_of_about_equal_size() -> None:
    counts = np.random.default_rng(0).integers(1, 20, 1000)
    assert np.ptp(np.bincount(runs(counts, 7), weights=counts)) <= 20


def test_assigned_levels_are_whole_and_in_their_order() -> None:
    codes = np.array([2, 0, 1, 0, -1, 2, 3])
    owner = assign([codes], 3)
    assert owner is not None
    assert owner.tolist() == [1, 0, 1, 0, 2, 1, 2]
    weighed = assign([codes], 2, np.array([1, 9, 1, 9, 1, 1, 1]))
    assert weighed is not None
    assert weighed.tolist() == [1, 0, 1, 0, 1, 1, 1]
    assert assign([codes, np.array([0, 0, 0, 1, 1, 1, 1])], 2) is None  # together they link all rows
    assert assign([codes], 6) is None


def test_levels_stay_whole(alpha: MixedModel) -> None:
    shards = share_rows(alpha, ["gen"], 5, may_tear=True)
    assert shards is not None
    assert shards.own == ["gen"]
    assert shards.text(5) == "5 processes; 15 + 15 + 12 + 15 + 15 rows by gen"
    gen = alpha.frame["gen"]
    assert (pd.Series(shards.owner).groupby(gen.to_numpy()).nunique() == 1).all()


def test_too_few_levels(alpha: MixedModel) -> None:
    torn = share_rows(alpha, ["gen"], 25, may_tear=True)
    assert torn is not None
    assert (torn.own, torn.by) == ([], "rows")
    assert share_rows(alpha, ["gen"], 25, may_tear=False) is None
    assert share_rows(alpha, ["gen", "rep:block"], 2, may_tear=False) is None  # they link all rows
    assert torn.text(25) == "25 processes; 2 to 3 of 72 rows in their order"
    with pytest.raises(ValueError, match="73 processes cannot share 72 rows"):
        share_rows(alpha, [], 73, may_tear=True)


def test_blocks_of_nested_terms() -> None:
    table = read_table("john_alpha")
    model = MixedModel(table, "yield ~ 1", {"block": Term("rep:block"), "rep": Term("rep", covariance=None)})
    shards = share_rows(model, ["block", "rep"], 3, may_tear=False)
    assert shards is not None
    assert shards.own == ["block", "rep"]
    assert (pd.Series(shards.owner).groupby(table["rep"].to_numpy()).nunique() == 1).all()


@pytest.mark.parametrize(
    "model",
    [
        lambda t: MixedModel(t, "Reaction ~ scale(Days)", {"Subject": Term("Subject", "1 + poly(Days, 2)")}),
        lambda t: MixedModel(t, "Reaction ~ Days", residual=Term("Subject", within="Days", covariance=AR1Matrix)),
        lambda t: MixedModel(t, "Reaction ~ C(Days)", ["Subject"], Term(design="0 + half")),
    ],
)  # fmt: skip
def test_parts_are_blocks_of_the_whole(model: Any) -> None:
    table = read_table("sleepstudy")
    whole = model(table.assign(half=np.where(table["Days"] < 5, "early", "late")))
    own = [name for name in whole.correlated if whole.correlated[name].separate]
    rows = np.flatnonzero(table["Subject"].isin(["S309", "S372", "S330"]).to_numpy())[::-1].copy()
    part, places = whole.part(rows, own)
    theta = torch.linspace(-0.5, 0.5, whole.V.num_params, dtype=torch.float64)
    torch.testing.assert_close(part.V(theta), whole.V(theta)[rows][:, rows])
    assert part.V.param_names == whole.V.param_names
    assert torch.equal(part.y, whole.y[rows])
    assert torch.equal(part.X, whole.X[rows])
    for name, place in places.items():
        levels = [whole.correlated[name].groups.labels[i] for i in place]  # type: ignore[union-attr]
        assert levels == part.correlated[name].groups.labels == ["S309", "S330", "S372"]  # type: ignore[union-attr]
    assert len(part.V.operand("residual").param_names) == len(whole.V.operand("residual").param_names)  # type: ignore


def test_all_rows_are_a_part(alpha: MixedModel) -> None:
    part, _ = alpha.part(np.arange(72), ["gen"])
    assert fit(part.V, part.y, part.X).loglik == fit(alpha.V, alpha.y, alpha.X).loglik


def test_other_tables(alpha: MixedModel) -> None:
    require_same_table(alpha, Pretended(own_table(alpha)))
    columns = {name: str(dtype.name) for name, dtype in alpha.frame.dtypes.items()}
    with pytest.raises(
        ValueError, match=r"Process 2 of 2 has another table .* its column 'yield' is int64, not float64"
    ):
        require_same_table(alpha, Pretended((columns | {"yield": "int64"}, 72, "")))
    with pytest.raises(ValueError, match=r"Process 3 of 3 .* it has 70 rows, not 72"):
        require_same_table(alpha, Pretended(own_table(alpha), (columns, 70, "")))
    with pytest.raises(ValueError, match="some of its values differ"):
        require_same_table(alpha, Pretended((columns, 72, "")))


def own_table(model: MixedModel) -> Any:
    """What a process says of its table."""
    said: list[Any] = []

    class Asked(Alone):
        def objects(self, x: Any) -> list[Any]:
            said.append(x)
            return [x]

    require_same_table(model, Asked())
    return said[0]
