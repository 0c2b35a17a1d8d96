"""Predictions of new rows and their errors, against the formulas."""

import numpy as np
import pytest
import torch

from openreml_nn import fit
from openreml_nn.data import MixedModel, Term, read_table
from openreml_nn.lightning import Batch
from openreml_nn.lightning.batches import NewRowsBatch
from openreml_nn.lightning.new_rows import errors, predictions


def new_rows(residual):
    table = read_table("sleepstudy").assign(half=lambda t: np.where(t["Days"] < 5, "early", "late"))
    model = MixedModel(table, "Reaction ~ Days", ["Subject"], residual)
    new = table.iloc[[3, 40, 77]]
    rows = model.design(new)
    result = fit(model.V, model.y, model.X)
    return result, NewRowsBatch(Batch(model.y, model.X), rows.X, dict(rows.Z), dict(rows.unseen), None, new)


def test_errors_and_table():
    result, batch = new_rows(None)
    y = torch.tensor([250.0, 300.0, 350.0], dtype=torch.float64)
    table = predictions(result, batch)
    assert table.index.tolist() == [3, 40, 77]
    assert list(table.columns[-2:]) == ["prediction", "std_error"]
    off = y.numpy() - table["prediction"].to_numpy()
    variance = table["std_error"].to_numpy() ** 2 + result.variance["estimate"].iloc[-1]
    found = errors(result, batch, y)
    assert found["val/rmse"].item() == pytest.approx(np.sqrt(np.mean(off**2)))
    assert found["val/nlpd"].item() == pytest.approx(
        np.mean(0.5 * np.log(2 * np.pi * variance) + off**2 / variance / 2)
    )


def test_no_density_where_residual_variances_differ():
    result, batch = new_rows(Term(design="0 + half"))
    assert list(errors(result, batch, torch.zeros(3, dtype=torch.float64))) == ["val/rmse"]
