"""A model over a Parquet table before it is read: V has the parameters of the model of the whole table."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openreml_nn import fit
from openreml_nn.covariance import AR1Matrix
from openreml_nn.data import Kernel, MixedModel, Term, read_table
from openreml_nn.data.shared import SharedTable
from openreml_nn.solvers.ranks import ALONE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    table = read_table("sleepstudy").assign(odd=lambda t: np.where(t["Days"] % 2, "odd", "even"))
    path = tmp_path / "sleep.parquet"
    table.sample(frac=1.0, random_state=0).reset_index(drop=True).to_parquet(path, row_group_size=17)
    return path


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
