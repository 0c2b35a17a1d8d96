"""MixedModelDataModule: reads at once, validates where there is something to validate on, predicts."""

import math

import pandas as pd
import pytest
import torch

from openreml_nn.covariance import AR1Matrix
from openreml_nn.data import Term, read_table
from openreml_nn.lightning import MixedModelDataModule, REMLModule


def test_reads_at_once(data):
    datamodule = data()
    assert datamodule.covariance is datamodule.model.V
    assert datamodule.covariance.shape == (72, 72)
    assert datamodule.describe() == {
        "table": "john_alpha", "fixed": "yield ~ rep", "random": "gen, rep:block", "residual": "residual",
    }  # fmt: skip
    with pytest.raises(ValueError, match="'repp'"):
        MixedModelDataModule("john_alpha", "yield ~ repp")


def test_rows_that_are_shared_are_read_when_the_trainer_begins(tmp_path, trainer):
    read_table("sleepstudy").to_parquet(tmp_path / "s.parquet")
    datamodule = MixedModelDataModule(tmp_path / "s.parquet", "Reaction ~ Days", ["Subject"], read="share")
    assert datamodule.describe()["random"] == "Subject"
    loaders = (datamodule.train_dataloader, datamodule.val_dataloader, datamodule.predict_dataloader)
    for ask in (*loaders, lambda: datamodule.model):
        with pytest.raises(ValueError, match="rows are read when the Trainer begins"):
            ask()
    trainer().fit(REMLModule(datamodule.covariance), datamodule)
    assert len(datamodule.train_dataloader()) == 1
    assert "n=180" in repr(datamodule.model)


def test_validate_tells_loglik_and_score(data, trainer):
    module, datamodule, run = REMLModule(data().covariance), data(), trainer()
    run.fit(module, datamodule)
    assert run.limit_val_batches == 1.0  # as before the fit
    (told,) = run.validate(module, datamodule, verbose=False)
    assert told["fit/loglik"] == pytest.approx(module.result().loglik, rel=1e-14)
    assert told["fit/score_norm"] == pytest.approx(module.progress.score_norm, rel=0.1)
    assert set(told) == {"fit/loglik", "fit/score_norm"}


def test_validation_table(data, trainer):
    table = read_table("sleepstudy")
    held_out = table["Days"] == 9
    options = {"fixed": "Reaction ~ Days", "random": ["Subject"]}
    datamodule = MixedModelDataModule(table[~held_out], validation_table=table[held_out], **options)
    module = REMLModule(datamodule.covariance)
    run = trainer()
    run.fit(module, datamodule)
    (told,) = run.validate(module, datamodule, verbose=False)

    result, rows = module.result(), datamodule.validation_rows
    predicted = result.predict(rows.X, rows.Z, rows.unseen)
    error = rows.y.numpy() - predicted["prediction"].to_numpy()
    variance = predicted["std_error"].to_numpy() ** 2 + result.variance["estimate"].iloc[-1]
    density = 0.5 * (error**2 / variance + [math.log(2.0 * math.pi * v) for v in variance])
    assert told["val/rmse"] == pytest.approx(math.sqrt((error**2).mean()), rel=1e-12)
    assert told["val/nlpd"] == pytest.approx(density.mean(), rel=1e-12)
    assert float(run.callback_metrics["val/rmse"]) == told["val/rmse"]


def test_density_with_a_correlated_residual(data, trainer):
    table = read_table("orthodont")
    held_out = table["age"] == 14
    residual = {"serial": Term(groups="Subject", within="occ", covariance=AR1Matrix), "nugget": Term()}
    datamodule = MixedModelDataModule(
        table[~held_out], "distance ~ age", residual=residual, validation_table=table[held_out]
    )
    module, run = REMLModule(datamodule.covariance), trainer()
    run.fit(module, datamodule)
    (told,) = run.validate(module, datamodule, verbose=False)
    result, rows = module.result(), datamodule.validation_rows
    predicted = result.predict(rows.X)
    error = rows.y.numpy() - predicted["prediction"].to_numpy()
    whole = float(module.covariance().detach()[0, 0])  # both residual terms
    variance = predicted["std_error"].to_numpy() ** 2 + whole
    density = 0.5 * (error**2 / variance + [math.log(2.0 * math.pi * v) for v in variance])
    assert told["val/nlpd"] == pytest.approx(density.mean(), rel=1e-12)


def test_validation_table_without_response(data):
    rows = read_table("sleepstudy").head(3)
    with pytest.raises(ValueError, match="'Reaction'"):
        data("slopes", validation_table=rows.drop(columns="Reaction"))
    with pytest.raises(ValueError, match="Missing values in 'Reaction'"):
        data("slopes", validation_table=rows.assign(Reaction=[1.0, math.nan, 2.0]))


def test_nothing_to_predict(data, trainer):
    with pytest.raises(ValueError, match="Nothing to predict"):
        trainer().predict(REMLModule(data().covariance), data())


def test_predict_needs_the_columns(data):
    with pytest.raises(ValueError, match="'gen'"):
        data(predict_table=pd.DataFrame({"rep": ["R1"], "block": ["B1"]}))


def test_new_group_with_slopes(data, trainer):
    new = pd.DataFrame({"Subject": ["S999", "S308"], "Days": [3, 3]})
    module, datamodule = REMLModule(data("slopes").covariance), data("slopes", predict_table=new)
    run = trainer()
    run.fit(module, datamodule)
    (table,) = run.predict(module, datamodule)
    result, x = module.result(), torch.tensor([1.0, 3.0], dtype=torch.float64)
    a, b, c = result.variance["estimate"][:3]
    C = torch.tensor([[a, b], [b, c]], dtype=torch.float64) + result.beta_cov
    assert table["new_levels"].tolist() == ["Subject", ""]
    assert table["prediction"].iloc[0] == pytest.approx(float(x @ result.beta), rel=1e-12)
    assert table["std_error"].iloc[0] ** 2 == pytest.approx(float(x @ C @ x), rel=1e-10)
    assert table["std_error"].iloc[1] < table["std_error"].iloc[0]


def test_batch_moves(data):
    datamodule = data(predict_table=read_table("john_alpha").head(2))
    moved = datamodule.predict_rows.to(torch.device("cpu"))
    assert torch.equal(moved.X, datamodule.predict_rows.X)
    assert moved.table is datamodule.predict_rows.table
