"""Files of a network's fit and predictions; what is written in a run is in test_commands.py."""

import json

import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from openreml_nn.lightning import MixedModelRegressor, NetworkDataModule, RefitFiles, RowPredictionFiles
from openreml_nn.lightning.network_files import predictions
from openreml_nn.nn import MLP, MixedModelHead

pytestmark = pytest.mark.filterwarnings("ignore:.*workers:UserWarning", "ignore:Checkpoint directory:UserWarning")


def test_table_of_predictions():
    table = pd.DataFrame({"a": ["x", "y", "z"]})
    batches = [(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 9.0])), (torch.tensor([3.0]), torch.tensor([16.0]))]
    made = predictions(table, batches)
    assert made["prediction"].tolist() == [1.0, 2.0, 3.0]
    assert made["sd"].tolist() == [2.0, 3.0, 4.0]
    assert list(predictions(table, [(mean, None) for mean, _ in batches]).columns) == ["a", "prediction"]


@pytest.mark.parametrize("refit", [False, True])
def test_files_of_a_fit(trainer, tmp_path, capsys, refit):
    data = NetworkDataModule("sleepstudy", "Reaction ~ scale(Days)", ["Subject"], 60, predict_table="sleepstudy")
    module = MixedModelRegressor(MLP(1, [4]), MixedModelHead(data.effects), refit=refit, variances=False)
    run = trainer(max_epochs=1, callbacks=[RefitFiles(tmp_path), RowPredictionFiles(tmp_path)])
    run.fit(module, data)
    shown = capsys.readouterr().out
    assert ("Results: " in shown) is refit is (tmp_path / "fit.json").exists()
    assert "Subject/sigma^2" in shown
    assert "AIC =" not in shown
    if refit:
        assert "given the output of the network" in shown
        record = json.loads((tmp_path / "fit.json").read_text())
        assert (record["AIC"], record["BIC"], record["given"]) == (None, None, "the output of the network")
    run.predict(module, data)
    assert "Predictions: " in capsys.readouterr().out
    assert list(pd.read_csv(tmp_path / "predictions.csv").columns)[-2:] == ["new_levels", "prediction"]


def test_an_interrupted_training_says_where_it_stopped(trainer, capsys):
    class Stop(Callback):
        def on_train_epoch_start(self, run, module):
            if run.current_epoch == 2:
                raise KeyboardInterrupt

    data = NetworkDataModule("sleepstudy", "Reaction ~ scale(Days)", ["Subject"], 60)
    module = MixedModelRegressor(MLP(1, [4]), MixedModelHead(data.effects), refit=True)
    run = trainer(max_epochs=5, callbacks=[RefitFiles(), Stop()])
    with pytest.raises(SystemExit):
        run.fit(module, data)
    assert "Interrupted in epoch 3, without a refit." in capsys.readouterr().out
    assert module.result is None


def test_a_training_that_has_ended_says_that_no_step_was_made(trainer, tmp_path, capsys):
    data = NetworkDataModule("sleepstudy", "Reaction ~ scale(Days)", ["Subject"], 60)
    module = MixedModelRegressor(MLP(1, [4]), MixedModelHead(data.effects), refit=True)
    run = trainer(max_epochs=1, callbacks=[])
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "after.ckpt")
    run = trainer(max_epochs=1, callbacks=[RefitFiles(tmp_path)])
    with pytest.warns(UserWarning, match="No step was made: the checkpoint is of epoch 1, .* `max_epochs` is 1"):
        run.fit(module, data, ckpt_path=tmp_path / "after.ckpt")
    assert (capsys.readouterr().out, (tmp_path / "fit.json").exists()) == ("", False)


def test_other_modules_and_data_are_refused(trainer, tmp_path):
    with pytest.raises(TypeError, match="`RefitFiles` needs a `MixedModelRegressor`, got Linear"):
        RefitFiles(tmp_path).on_fit_end(trainer(callbacks=[]), nn.Linear(1, 1))
    data = NetworkDataModule("sleepstudy", "Reaction ~ Days", ["Subject"])
    module = MixedModelRegressor(MLP(1, [4]), MixedModelHead(data.effects))
    module.condition(data.train_dataloader())
    rows = DataLoader(data.training_rows, batch_size=90, collate_fn=lambda batch: batch)
    with pytest.raises(TypeError, match="needs a `NetworkDataModule`, got NoneType"):
        trainer(callbacks=[RowPredictionFiles(tmp_path)]).predict(module, rows)
