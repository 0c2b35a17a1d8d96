"""What a fit stops at, prints and writes."""

import json

import pandas as pd
import pytest

from openreml_nn.lightning import ConvergenceCallback, PredictionFiles, REMLModule, ResultFiles
from openreml_nn.report import FILES


def test_stops_with_the_reason(data, trainer, capsys):
    module, datamodule = REMLModule(data().covariance), data()
    run = trainer(callbacks=[ConvergenceCallback(verbose=True)])
    run.fit(module, datamodule)
    assert run.global_step == module.result().n_iter <= 10
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == run.global_step + 1
    assert lines[-1] == "Stopped: the score is zero."
    assert lines[-2].startswith("step   6  log-likelihood -46.596910  decrement ")


def test_says_when_it_was_cut_off(data, trainer, tmp_path):
    module, datamodule = REMLModule(data().covariance), data()
    run = trainer(max_epochs=2, callbacks=[ConvergenceCallback(), ResultFiles(verbose=False)])
    with pytest.warns(UserWarning, match=r"cut off after 2 steps.*Raise the Trainer's `max_epochs`"):
        run.fit(module, datamodule)
    result = module.result()
    assert not result.converged
    assert "NOT CONVERGED after 2 steps: the limit of 2 steps was reached." in result.summary()
    record = json.loads((tmp_path / "fit.json").read_text())
    assert record["converged"] is False
    assert record["reason"] == "the limit of 2 steps was reached"


def test_writes_results(data, trainer, tmp_path, capsys):
    module, datamodule = REMLModule(data().covariance), data()
    trainer(callbacks=[ConvergenceCallback(), ResultFiles(tmp_path / "out")]).fit(module, datamodule)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    record = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert record["converged"] is True
    assert record["loglik"] == module.result().loglik
    assert record["iterations"] == 6
    assert record["seconds"] > 0
    assert record["versions"]["lightning"]
    blup = pd.read_csv(tmp_path / "out" / "random_effects.csv")
    assert list(blup.columns) == ["term", "effect", "level", "blup", "pev"]
    assert len(blup) == 24 + 18
    printed = capsys.readouterr().out
    assert module.result().summary() in printed
    assert f"Results: {tmp_path / 'out'}" in printed


def test_predicts_new_levels(data, trainer, tmp_path):
    new = pd.DataFrame({"rep": ["R1", "R1"], "block": ["B1", "B9"], "gen": ["G01", "G99"], "note": ["known", "new"]})
    module, datamodule = REMLModule(data().covariance), data(predict_table=new)
    run = trainer(callbacks=[ConvergenceCallback(), PredictionFiles(verbose=False)])
    run.fit(module, datamodule)
    (table,) = run.predict(module, datamodule)
    written = pd.read_csv(tmp_path / "predictions.csv", keep_default_na=False)
    assert list(written.columns) == ["rep", "block", "gen", "note", "new_levels", "prediction", "std_error"]
    assert written["new_levels"].tolist() == ["", "gen; rep:block"]
    assert written["prediction"].tolist() == pytest.approx(table["prediction"].tolist(), rel=1e-15)
    result = module.result()
    known, unknown = table["prediction"]
    effects = [result.blup(term).set_index("level")["blup"] for term in ("gen", "rep:block")]
    assert known == pytest.approx(float(result.beta[0]) + effects[0]["G01"] + effects[1]["R1:B1"])
    assert unknown == pytest.approx(float(result.beta[0]))
    variance = sum(result.variance["estimate"][:2]) + float(result.beta_cov[0, 0])
    assert table["std_error"].iloc[1] ** 2 == pytest.approx(variance)


def test_other_modules_are_refused(trainer):
    import lightning

    with pytest.raises(TypeError, match="needs a `REMLModule`"):
        ConvergenceCallback().on_train_batch_end(trainer(), lightning.LightningModule(), None, None, 0)
