"""What a fit stops at, prints and writes."""

import dataclasses
import functools
import json
import warnings

import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from openreml_nn.lightning import ConvergenceCallback, PredictionFiles, REMLModule, ResultFiles, callbacks
from openreml_nn.optim import Progress
from openreml_nn.report import FILES

PROGRESS = Progress(1, 0.0, 1.0, 1.0, 1.0, 1.0, 1, 1.0, (0,), False, False, "")


def test_stops_with_the_reason(data, trainer, capsys):
    module, datamodule = REMLModule(data().covariance), data()
    run = trainer(callbacks=[ConvergenceCallback(verbose=True)])
    run.fit(module, datamodule)
    assert run.global_step == module.result().n_iter <= 10
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == run.global_step + 1
    assert lines[-1] == "Stopped: the score is zero."
    assert lines[-2].startswith("step   4  log-likelihood -46.596910  decrement ")


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


@pytest.mark.filterwarnings("ignore:The fit was cut off:UserWarning", "ignore:Checkpoint directory:UserWarning")
@pytest.mark.parametrize(("steps", "converged"), [(2, False), (4, True)])
def test_a_checkpoint_without_steps_left(steps, converged, data, trainer, tmp_path, capsys):
    def run(folder):
        keep = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
        callbacks = [ConvergenceCallback(), ResultFiles(tmp_path / folder), keep]
        return trainer(max_epochs=steps, enable_checkpointing=True, callbacks=callbacks)

    run("first").fit(REMLModule(data().covariance), data())
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run("again").fit(REMLModule(data().covariance), data(), ckpt_path=tmp_path / "last.ckpt")
    said = capsys.readouterr().out + "\n".join(str(warning.message) for warning in told)
    assert f"No step was made: the checkpoint already has {steps} steps" in said
    assert f"Results: {tmp_path / 'again'}" in said
    first, again = (json.loads((tmp_path / folder / "fit.json").read_text()) for folder in ("first", "again"))
    assert again["converged"] is converged
    assert (again["loglik"], again["iterations"]) == (first["loglik"], steps)


@pytest.mark.filterwarnings("ignore:The fit was cut off:UserWarning")
def test_steps_of_another_optimizer(data, trainer, capsys):
    module = REMLModule(data().covariance, optimizer=functools.partial(torch.optim.Adam, lr=0.1))
    trainer(max_epochs=2, callbacks=[ConvergenceCallback(verbose=True)]).fit(module, data())
    assert all(line.endswith("  (before the step)") for line in capsys.readouterr().out.splitlines())
    module = REMLModule(data().covariance, optimizer=functools.partial(torch.optim.Adam, lr=0.1), tolerance=1e-4)
    trainer(callbacks=[ConvergenceCallback(verbose=True)]).fit(module, data())
    *_, last, _ = capsys.readouterr().out.splitlines()
    assert f"log-likelihood {module.result().loglik:.6f}  decrement" in last
    assert not last.endswith("(before the step)")


@pytest.mark.parametrize("solver", ["dense", "auto"])
def test_says_what_a_long_step_costs(solver, data, trainer, capsys, monkeypatch):
    monkeypatch.setattr(callbacks, "MANY", 60)
    for verbose in (False, True):
        module = REMLModule(data().covariance, solver=solver)
        trainer(callbacks=[ConvergenceCallback(verbose)]).fit(module, data())
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("72 rows by the solver 'dense' (it was asked for): n³ = 3.7e+05") is (solver == "dense")


def test_adam_is_told_its_learning_rate(data, trainer):
    module = REMLModule(data().covariance, optimizer=torch.optim.Adam)
    with pytest.warns(UserWarning, match=r"`max_epochs`, or try another learning rate: `lr` of Adam is 0\.001 \("):
        trainer(max_epochs=2).fit(module, data())


def test_says_why_it_did_not_converge(data, trainer):
    module = REMLModule(data().covariance)
    module.history.append(dataclasses.replace(PROGRESS, done=True, converged=False, reason="no step raises it"))
    with pytest.warns(UserWarning, match="The fit did not converge: no step raises it."):
        ConvergenceCallback().on_train_end(trainer(), module)


def test_writes_results(data, trainer, tmp_path, capsys):
    module, datamodule = REMLModule(data().covariance), data()
    trainer(callbacks=[ConvergenceCallback(), ResultFiles(tmp_path / "out")]).fit(module, datamodule)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    record = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert record["converged"] is True
    assert record["loglik"] == module.result().loglik
    assert record["iterations"] == 4
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
