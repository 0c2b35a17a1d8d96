"""`openreml-nn network`: a network with random effects from a YAML file, its checkpoint, predictions and mistakes."""

import re
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from openreml_nn import fit
from openreml_nn.cli import main
from openreml_nn.data import MixedModel, read_table
from openreml_nn.lightning import MixedModelRegressor

CONFIG = str(Path(__file__).parents[2] / "configs" / "regressor.yaml")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENREML_NN_DEBUG", raising=False)


def network(command, *more):
    main(["network", command, "--config", CONFIG, *more])


def test_fit_validate_predict(capsys):
    table = read_table("ratpup")
    held = table.iloc[::5]
    table.drop(index=held.index).to_csv("train.csv", index=False)
    held.to_csv("held.csv", index=False)
    held.head(3).drop(columns="weight").assign(Litter=["L01", "L99", "L02"]).to_csv("new.csv", index=False)
    tables = ["--data.table", "train.csv", "--data.validation_table", "held.csv"]
    network("fit", *tables)
    shown, folder = capsys.readouterr(), Path("runs", "regressor", "version_0")
    assert "Litter/sigma^2" in shown.out
    assert f"Results: {folder}" in shown.out
    assert "error" not in shown.err
    variance = pd.read_csv(folder / "variance_parameters.csv").set_index("name")["estimate"]
    linear = MixedModel("train.csv", "weight ~ sex * Treatment + Lsize", ["Litter"])
    expected = fit(linear.V, linear.y, linear.X).variance.set_index("name")["estimate"]
    assert variance["residual/sigma^2"] == pytest.approx(expected["residual/sigma^2"], rel=0.2)
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    network("validate", *tables, "--ckpt_path", checkpoint, "--model.metrics", "true")  # which the training had not
    shown = capsys.readouterr().out
    for name in ("mse", "nlpd", "coverage", "r2_marginal", "r2_conditional", "icc"):
        assert f"val/{name}" in shown
    network("predict", *tables, "--data.predict_table", "new.csv", "--ckpt_path", checkpoint)
    assert capsys.readouterr().out.strip() == f"Predictions: {folder / 'predictions.csv'}"
    predicted = pd.read_csv(folder / "predictions.csv", keep_default_na=False)
    assert list(predicted.columns) == ["Litter", "Treatment", "sex", "Lsize", "new_levels", "prediction", "sd"]
    assert predicted["new_levels"].tolist() == ["", "Litter", ""]
    assert predicted["sd"].idxmax() == 1
    assert ((predicted["prediction"] - table["weight"].mean()).abs() < 2.5).all()


def test_other_data_than_those_of_the_training_are_refused(capsys):
    """Inputs are scaled as in the training rows, so that other rows would change every prediction."""
    table = read_table("ratpup")
    table.head(2).to_csv("new.csv", index=False)
    network("fit", "--trainer.max_epochs", "1")
    checkpoint = str(Path("runs", "regressor", "version_0", "checkpoints", "last.ckpt"))
    table.assign(weight=table["weight"] + 1.0).to_csv("other.csv", index=False)
    capsys.readouterr()
    for command, more in (("fit", ["--trainer.max_epochs", "2"]), ("predict", ["--data.predict_table", "new.csv"])):
        with pytest.raises(SystemExit):
            network(command, "--ckpt_path", checkpoint, "--data.table", "other.csv", *more)
        assert "The checkpoint is of a fit to other data: the response differs." in capsys.readouterr().err


def test_refit_of_a_checkpoint_of_an_earlier_epoch(capsys):
    read_table("ratpup").head(2).to_csv("new.csv", index=False)
    network("fit", "--trainer.max_epochs", "2", "--checkpoint.save_top_k", "-1")
    folder = Path("runs", "regressor", "version_0")
    first = str(folder / "checkpoints" / "epoch=0-step=4.ckpt")
    with pytest.raises(SystemExit):
        network("predict", "--data.predict_table", "new.csv", "--ckpt_path", first)
    assert "`openreml-nn network refit --ckpt_path FILE`" in capsys.readouterr().err
    network("refit", "--ckpt_path", first)
    shown, made = capsys.readouterr(), folder / "epoch=0-step=4-refit"
    assert (shown.err, "given the output of the network" in shown.out) == ("", True)
    assert shown.out.strip().endswith(f"Results: {made}\nCheckpoint: {made / 'refit.ckpt'}")
    assert (made / "fit.json").exists()
    network("predict", "--data.predict_table", "new.csv", "--ckpt_path", str(made / "refit.ckpt"))
    assert len(pd.read_csv(made / "predictions.csv")) == 2
    assert sorted(path.name for path in Path("runs", "regressor").iterdir()) == ["version_0"]
    with pytest.raises(SystemExit):
        network("refit")
    assert "the following arguments are required: --ckpt_path" in capsys.readouterr().err


def test_a_validation_needs_rows_and_logs_go_where_they_are_asked_to(capsys):
    network("fit", "--trainer.max_epochs", "1", "--trainer.default_root_dir", "own")
    assert sorted(path.name for path in Path().iterdir()) == ["own"]
    checkpoint = str(Path("own", "regressor", "version_0", "checkpoints", "last.ckpt"))
    with pytest.raises(SystemExit):
        network("validate", "--ckpt_path", checkpoint)
    assert "error: Nothing to validate on. Give --data.validation_table FILE" in capsys.readouterr().err


def test_the_configuration_says_whether_a_training_that_goes_on_ends_with_a_refit(capsys):
    network("fit", "--trainer.max_epochs", "1", "--model.refit", "false")
    checkpoint = str(Path("runs", "regressor", "version_0", "checkpoints", "last.ckpt"))
    network("fit", "--trainer.max_epochs", "2", "--ckpt_path", checkpoint)
    assert Path("runs", "regressor", "version_1", "fit.json").exists()


def test_modes_terms_and_structures_are_options(capsys):
    options = yaml.safe_load(Path(CONFIG).read_text())
    options["trainer"]["max_epochs"] = 2
    options["data"] |= {"batch_size": None, "table": "sleepstudy", "formula": "Reaction ~ Days", "random": {"Subject": {
        "groups": "Subject", "design": "1 + Days", "covariance": "openreml_nn.covariance.DiagonalMatrix"}}}  # fmt: skip
    options["model"]["network"]["init_args"] |= {"inputs": 1, "outputs": None}
    options["model"]["head"]["init_args"] = {"mode": "features", "method": "ML"}
    schedule = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 2}}
    options["model"] |= {"refit": False, "head_lr": 0.1, "scheduler": schedule}
    Path("own.yaml").write_text(yaml.safe_dump(options))
    main(["network", "fit", "--config", "own.yaml"])
    shown = capsys.readouterr()
    assert "Subject/sigma^2_Intercept = " in shown.out
    assert not Path("runs", "own", "version_0", "fit.json").exists()


def test_a_network_of_the_present_folder(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part])
    Path("own_net_of_test.py").write_text(
        "import torch\n\nclass Net(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(4, 1)\n"
    )
    network("fit", "--model.network", "own_net_of_test.Net", "--trainer.max_epochs", "1", "--trainer.logger", "false")
    assert "Litter/sigma^2" in capsys.readouterr().out


def test_what_the_readme_shows(capsys):
    text = (Path(CONFIG).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = [part for part in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL) if "network:" in part]
    Path("model.yaml").write_text(block)
    main(["network", "fit", "--config", "model.yaml", "--trainer.max_epochs", "2", "--trainer.logger", "false"])
    assert "Litter/sigma^2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [(["--data.formula", "weight ~ Age"], 1, "The table has no column 'Age'"),
     (["--model.network.inputs", "3"], 1, "made for 3 inputs, got 4"),
     (["--model.head.mode", "whole"], 1, "needs a mode of 'batch', 'exact', 'features'"),
     (["--data.cluster", "Pen"], 1, "`cluster` must be one of the random terms ['Litter']"),
     (["--model.refits", "true"], 2, "did you mean 'model.refit'?"),
     (["--data.formla", "y ~ x"], 2, "did you mean 'data.formula'?")],
)  # fmt: skip
def test_mistakes(more, code, said, capsys):
    with pytest.raises(SystemExit) as end:
        network("fit", *more)
    told = capsys.readouterr().err
    assert end.value.code == code
    (line,) = [line for line in told.splitlines() if line.startswith("openreml-nn: error: ")]
    assert said in line


def test_checkpoints_of_other_models(capsys):
    def said(*args):
        with pytest.raises(SystemExit) as end:
            main(args)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        return end.value.code, line

    mixed = str(Path(CONFIG).with_name("john_alpha.yaml"))
    main(["fit", "--config", mixed, "--monitor.figures", "false"])
    network("fit", "--trainer.max_epochs", "1")
    fitted, trained = (
        str(Path("runs", name, "version_0/checkpoints/last.ckpt")) for name in ("john_alpha", "regressor")
    )
    for command in ("fit", "predict", "refit"):
        code, told = said("network", command, "--config", CONFIG, "--ckpt_path", fitted)
        assert (code, "is of a mixed model, which `openreml-nn fit|validate|predict` take" in told) == (1, True)
    for command in ("fit", "predict"):
        code, told = said(command, "--config", mixed, "--ckpt_path", trained)
        assert (code, "is of a network with random effects, which `openreml-nn network" in told) == (1, True)
    for command in ("fit", "refit"):
        args = ["--config", CONFIG, "--ckpt_path", trained, "--model.network.hidden", "[32]"]
        code, told = said("network", command, *args)
        assert (code, "another model: network.0.weight is 16 x 4 there and 32 x 4 here" in told) == (1, True)


def test_sigterm(capsys, monkeypatch):
    def terminate(module, end=MixedModelRegressor.on_train_epoch_end):
        end(module)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MixedModelRegressor, "on_train_epoch_end", terminate)
    with pytest.raises(SystemExit) as end:
        network("fit", "--trainer.max_epochs", "3")
    shown = capsys.readouterr().out
    assert end.value.code == 143
    last = re.search(r"Interrupted in epoch \d, without a refit. Go on from (\S+) by --ckpt_path", shown)
    assert Path(last[1]).exists()


def test_the_log_is_written_often():
    """Ctrl-C amid a message to TensorBoard's thread waits until the thread looks again."""
    network("fit", "--trainer.max_epochs", "1")
    config = yaml.safe_load(Path("runs", "regressor", "version_0", "config.yaml").read_text())
    logger = config["trainer"]["logger"]
    assert (logger["init_args"] | logger.get("dict_kwargs", {}))["flush_secs"] == 2


def test_predictions_need_a_checkpoint(capsys):
    with pytest.raises(SystemExit):
        network("predict", "--data.predict_table", "new.csv")
    assert "needs the checkpoint of a fit" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_own_lightning_cli_with_effects_by_class():
    """Without the data module of this package: everything by class."""
    effects = {"class_path": "openreml_nn.nn.Effects", "init_args": {"levels": 4, "covariance": {
        "class_path": "openreml_nn.covariance.AR1Matrix", "init_args": {"times": 4}}}}  # fmt: skip
    model = {
        "network": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 1}},
        "head": {"class_path": "openreml_nn.nn.MixedModelHead", "init_args": {"effects": {"site": effects}}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    }
    Path("own.yaml").write_text(yaml.safe_dump({"model": model}))
    cli = LightningCLI(MixedModelRegressor, args=["--config", "own.yaml"], run=False)
    head = cli.model.head
    assert list(head.variance()) == ["site/sigma^2", "site/rho", "residual/sigma^2"]
    assert isinstance(cli.model.configure_optimizers(), torch.optim.AdamW)
