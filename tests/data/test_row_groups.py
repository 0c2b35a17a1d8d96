"""Reading a Parquet table by row groups: which rows, in which order, and the model over them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import fit
from openreml_nn.covariance import AR1Matrix
from openreml_nn.data import Kernel, MixedModel, Term, read_table
from openreml_nn.data.row_groups import LevelScan, RowGroups, read_in_order, require_same_columns
from openreml_nn.data.shared import SharedTable
from openreml_nn.solvers.ranks import ALONE, Alone


class Several(Alone):
    """One of several processes that do the same one after the other: each hears what the others have said before."""

    def __init__(self, rank: int, said: list[list[Any]]) -> None:
        self.rank, self.size, self.said, self.asked = rank, len(said), said, 0

    def objects(self, x: Any) -> list[Any]:
        self.said[self.rank][self.asked :] = [x]
        self.asked += 1
        return [own[self.asked - 1] if len(own) >= self.asked else x for own in self.said]


def on_three(work: Any) -> list[Any]:
    """What work gives on each of three processes; repeated until all have heard all."""
    said: list[list[Any]] = [[], [], []]
    for _ in range(4):
        found = [work(Several(rank, said)) for rank in range(3)]
    return found


@pytest.fixture
def table() -> pd.DataFrame:
    return read_table("sleepstudy").assign(odd=lambda t: np.where(t["Days"] % 2, "odd", "even"))


@pytest.fixture
def file(table: pd.DataFrame, tmp_path: Path) -> Path:
    path = tmp_path / "sleep.parquet"
    table.sample(frac=1.0, random_state=0).reset_index(drop=True).to_parquet(path, row_group_size=17)
    return path


def test_in_order(file: Path) -> None:
    groups, whole = RowGroups(file), pd.read_parquet(file)
    assert groups.n == 180
    assert len(groups.sizes) == 11
    parts = on_three(lambda ranks: read_in_order(groups, ["Days", "odd"], ranks))
    assert [len(part) for part in parts] == [60, 60, 60]
    pd.testing.assert_frame_equal(pd.concat(parts), whole[["Days", "odd"]])


def test_by_level(file: Path) -> None:
    groups, whole = RowGroups(file), pd.read_parquet(file)

    def work(ranks: Several) -> pd.DataFrame:
        scan = LevelScan(groups, {"Subject": ["Subject"]}, ranks)
        assert scan.count("Subject") in (18, 17, 16)
        owners = scan.owners(["Subject"])
        assert owners is not None
        return scan.read(owners, ["Reaction", "Days"])

    parts = on_three(work)
    assert [len(part) for part in parts] == [60, 60, 60]
    subjects = [set(whole.loc[part.index, "Subject"]) for part in parts]
    assert subjects == [set(level) for level in np.array_split(np.unique(whole["Subject"]), 3)]
    pd.testing.assert_frame_equal(pd.concat(parts).sort_index(), whole[["Reaction", "Days"]])


def test_reads_only_the_row_groups_that_have_its_rows(table: pd.DataFrame, tmp_path: Path) -> None:
    table.sort_values("Subject").to_parquet(tmp_path / "sorted.parquet", row_group_size=20, index=False)
    read: list[list[int]] = [[], [], []]

    def work(ranks: Several) -> None:
        groups = RowGroups(tmp_path / "sorted.parquet")
        scan = LevelScan(groups, {"Subject": ["Subject"]}, ranks)
        owners = scan.owners(["Subject"])
        assert owners is not None
        inner = groups.read
        read[ranks.rank] = []
        groups.read = lambda own, columns: read[ranks.rank].extend(own) or inner(own, columns)  # type: ignore
        scan.read(owners, ["Reaction"])

    on_three(work)
    assert read == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_too_few_levels_and_blocks(file: Path) -> None:
    scan = LevelScan(RowGroups(file), {"odd": ["odd"], "Subject": ["Subject"]}, ALONE)
    scan.ranks = Several(0, [[], [], []])
    assert scan.owners(["odd"]) is None
    assert scan.owners(["odd", "Subject"]) is None  # linked
    assert scan.largest_block(["odd"]) == 90
    assert scan.largest_block(["Subject"]) == 10


def test_other_columns(file: Path, tmp_path: Path) -> None:
    groups = RowGroups(file)
    mine = (groups.columns, 180, groups.sizes.tolist())
    for other, said in [
        ((mine[0] | {"Days": "int32"}, *mine[1:]), "its column 'Days' is int32, not"),
        (({"Days": "int64"}, *mine[1:]), "'Reaction' is None"),
        ((mine[0], 100, [100]), "it has 100 rows, not 180"),
        ((mine[0], 180, [180]), "it has other row groups"),
    ]:
        with pytest.raises(ValueError, match=f"Process 2 of 2 has another table than process 1: .*{said}"):
            require_same_columns(groups, Several(0, [[], [other]]))
    pd.DataFrame({"y": [1.0]}).to_csv(tmp_path / "y.csv")
    with pytest.raises(ValueError, match="Only a Parquet table"):
        RowGroups(tmp_path / "y.csv")


MODELS: dict[str, dict[str, Any]] = {
    "slopes": {"fixed": "Reaction ~ Days + odd", "random": {"Subject": Term("Subject", "1 + Days")}},
    "serial": {"fixed": "Reaction ~ Days", "residual": Term("Subject", within="Days", covariance=AR1Matrix)},
    "levels": {"fixed": "Reaction ~ Days", "random": {"s": Term("Subject", "0 + odd")},
               "residual": Term(design="0 + odd")},
    "no terms": {"fixed": "Reaction ~ Days"},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_V_has_the_parameters_and_one_process_the_fit(name: str, file: Path) -> None:
    shared, whole = SharedTable(file, **MODELS[name]), MixedModel(file, **MODELS[name])
    assert shared.V.param_names == whole.V.param_names
    assert shared.V.natural_names == whole.V.natural_names
    assert torch.equal(shared.V.theta, whole.V.theta)
    assert shared.V.no_grad_index == whole.V.no_grad_index
    own = shared.share("auto", ALONE)
    assert own.text == ""
    ours, theirs = fit(own.model.V, own.model.y, own.model.X), fit(whole.V, whole.y, whole.X)
    assert ours.loglik == pytest.approx(theirs.loglik, rel=1e-12)


def test_kernels(tmp_path: Path) -> None:
    read_table("gblup150").to_parquet(tmp_path / "g.parquet")
    random = {"id": Term(read_table("gblup150").columns[0], relationship=Kernel("gblup150_K"))}
    shared = SharedTable(tmp_path / "g.parquet", "y ~ 1", random)
    assert shared.V.operand("id").Z.num_levels == 150  # type: ignore[operator, union-attr]
