"""A refit of a checkpoint; on the command line in test_commands.py."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from openreml_nn.data import read_table
from openreml_nn.lightning import MixedModelRegressor, NetworkDataModule
from openreml_nn.lightning.network_refit import NetworkTrainer, refit_folder
from openreml_nn.nn import MLP, MixedModelHead

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*workers:UserWarning", "ignore:The dirpath:UserWarning", "ignore:Be aware that when using:UserWarning"
)


def rats(**options):
    return NetworkDataModule("ratpup", "weight ~ sex + Treatment + scale(Lsize)", ["Litter"], 100, **options)


def model(data):
    torch.manual_seed(0)
    return MixedModelRegressor(MLP(4, [8]), MixedModelHead(data.effects), lambda p: torch.optim.Adam(p, 0.02))


def trainer(folder, **options):
    plain = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
             "enable_model_summary": False, "default_root_dir": folder, "log_every_n_steps": 1}  # fmt: skip
    return NetworkTrainer(**plain | options)


@pytest.mark.parametrize("hold", [False, True])
def test_of_an_earlier_epoch(tmp_path, capsys, hold):
    data = rats(predict_table="ratpup")
    saved, whole = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1), model(data)
    run = trainer(tmp_path, max_epochs=2, callbacks=[saved])
    run.fit(whole, data)
    (first,) = (tmp_path / "checkpoints").glob("epoch=0*")
    new = trainer(tmp_path, enable_checkpointing=False)
    refitted = model(data)
    path = new.refit(refitted, data, str(first), hold=hold)
    assert path == tmp_path / f"{first.stem}-{'held' if hold else 'refit'}" / "refit.ckpt"
    shown = capsys.readouterr().out
    assert str(path) in shown
    assert ("Variance parameters as in the checkpoint\n  Litter/sigma^2 = " in shown) is hold
    assert (refitted.result is None) is hold is not (path.parent / "fit.json").exists()
    trained = model(data)
    trained.load_state_dict(torch.load(first, weights_only=True)["state_dict"])
    assert (refitted.head.variance() == trained.head.variance()) is hold
    trained.condition(data.train_dataloader(), refit=not hold)
    expected = new.predict(trained, data)
    torch.testing.assert_close(new.predict(refitted, data), expected)
    torch.testing.assert_close(new.predict(model(data), data, ckpt_path=path), expected)
    goes_on = model(data)
    trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(goes_on, data, ckpt_path=path)
    assert goes_on.head.variance() == whole.head.variance()  # as if there had been no refit


def test_other_data_are_refused(tmp_path):
    data, other = rats(), read_table("ratpup").assign(weight=lambda table: table["weight"] + 1.0)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model(data), data)
    data = NetworkDataModule(pd.DataFrame(other), "weight ~ sex + Treatment + scale(Lsize)", ["Litter"], 100)
    with pytest.raises(ValueError, match="a fit to other data: the response differs"):
        run.refit(model(data), data, run.checkpoint_callback.best_model_path)


def test_one_process_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(NetworkTrainer, "world_size", 2)
    data = rats()
    with pytest.raises(ValueError, match="`refit` runs in one process, got 2"):
        trainer(tmp_path).refit(model(data), data, "last.ckpt")


def test_folders():
    assert refit_folder("runs/a/version_0/checkpoints/last.ckpt") == str(Path("runs/a/version_0/last-refit"))
    assert refit_folder("runs/a/version_0/checkpoints/last.ckpt", hold=True) == str(Path("runs/a/version_0/last-held"))
    assert refit_folder("own/best.ckpt") == str(Path("own/best-refit"))
