"""The command line: a fit, its validation and its predictions; one clear error for each mistake."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from openreml_nn.cli import is_mistake, main, message, nearest_option
from openreml_nn.data import read_table
from openreml_nn.lightning import REMLModule
from openreml_nn.lightning.commands import REMLCLI

CONFIGS = Path(__file__).parents[1] / "configs"
ALPHA = str(CONFIGS / "john_alpha.yaml")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Each test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENREML_NN_DEBUG", raising=False)


def error(capsys, *args: str) -> tuple[int, str]:
    """Exit code and message of a command that fails."""
    with pytest.raises(SystemExit) as end:
        main(args)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("openreml-nn: error: ")]
    return end.value.code, line.removeprefix("openreml-nn: error: ")


def test_fit_validate_predict(tmp_path, capsys):
    command = [sys.executable, "-m", "openreml_nn", "fit", "--config", ALPHA]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr == ""
    folder = Path("runs", "john_alpha", "version_0")
    assert f"Results: {folder}" in done.stdout
    for line in ("log-likelihood = -46.5969", "Converged after 4 steps: the score is zero.", "gen/sigma^2  "):
        assert line in done.stdout
    record = json.loads((folder / "fit.json").read_text())
    assert record["converged"] is True
    assert record["iterations"] <= 10
    assert record["loglik"] == pytest.approx(-46.59691012098521, rel=1e-10)
    variance = pd.read_csv(folder / "variance_parameters.csv").set_index("name")["estimate"]
    for name, value in (("gen", 0.14290), ("rep:block", 0.07022), ("residual", 0.08162)):
        assert variance[f"{name}/sigma^2"] == pytest.approx(value, abs=1e-5)
    assert {"fixed_effects.csv", "random_effects.csv", "config.yaml"} <= {path.name for path in folder.iterdir()}
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert board.Scalars("variance/gen/sigma^2")[-1].value == pytest.approx(0.142902, rel=1e-5)
    assert "random_effects/gen" in board.Tags()["images"]

    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    main(["validate", "--config", ALPHA, "--ckpt_path", checkpoint])
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "fit/loglik" in shown.out
    assert "-46.596910120985" in shown.out

    Path("new.csv").write_text("rep,block,gen\nR1,B1,G01\nR2,B3,G99\n")
    main(["predict", "--config", ALPHA, "--ckpt_path", checkpoint, "--data.predict_table", "new.csv"])
    shown = capsys.readouterr()
    assert shown.err == ""
    path = Path(shown.out.strip().removeprefix("Predictions: "))
    table = pd.read_csv(path, keep_default_na=False)
    assert list(table.columns) == ["rep", "block", "gen", "new_levels", "prediction", "std_error"]
    assert table["new_levels"].tolist() == ["", "gen"]
    known, new = table["std_error"]
    assert new**2 > variance["gen/sigma^2"] > known**2

    assert path == folder / "predictions.csv"
    main(["predict", "--config", ALPHA, "--ckpt_path", checkpoint, "--data.predict_table", "new.csv"])
    assert capsys.readouterr().out.strip() == f"Predictions: {folder / 'predictions_2.csv'}"
    assert (folder / "predictions_2.csv").read_text() == path.read_text()

    code, told = error(capsys, "predict", "--config", ALPHA, "--ckpt_path", checkpoint)
    assert (code, "predict_table" in told) == (1, True)
    drop = ["--data.table", "fewer.csv", "--data.predict_table", "new.csv", "--predictions.folder", "given"]
    read_table("john_alpha").iloc[1:].to_csv("fewer.csv", index=False)
    code, told = error(capsys, "predict", "--config", ALPHA, "--ckpt_path", checkpoint, *drop)
    assert (code, "it had 72 rows, this table has 71" in told) == (1, True)
    assert not Path("given").exists()
    main(["predict", "--config", ALPHA, "--ckpt_path", checkpoint, *drop[2:]])
    assert Path("given", "predictions.csv").read_text() == path.read_text()
    assert [run.name for run in Path("runs", "john_alpha").iterdir()] == ["version_0"]
    assert [entry.name for entry in Path("runs").iterdir()] == ["john_alpha"]
    code, told = error(capsys, "validate", "--config", str(CONFIGS / "sleepstudy.yaml"), "--ckpt_path", checkpoint)
    assert "checkpoint is of another model: it has the parameters ['gen/sigma^2'" in told


def test_resume_and_limit(capsys):
    two = ["fit", "--config", ALPHA, "--trainer.max_epochs", "2", "--monitor.figures", "false"]
    with pytest.raises(SystemExit) as end:
        main(two)
    assert end.value.code == 3
    assert "openreml-nn: warning: The fit was cut off after 2 steps" in capsys.readouterr().err
    folder = Path("runs", "john_alpha")
    assert json.loads((folder / "version_0" / "fit.json").read_text())["converged"] is False
    checkpoint = str(folder / "version_0" / "checkpoints" / "last.ckpt")
    with pytest.raises(SystemExit) as end:
        main([*two, "--ckpt_path", checkpoint])
    assert end.value.code == 3
    shown = capsys.readouterr()
    assert "openreml-nn: warning: No step was made: the checkpoint already has 2 steps." in shown.err
    assert "NOT CONVERGED after 2 steps" in shown.out
    a, b = (json.loads((folder / f"version_{i}" / "fit.json").read_text()) for i in (0, 1))
    assert a["loglik"] == b["loglik"]
    code, told = error(capsys, "fit", "--config", ALPHA, "--ckpt_path", checkpoint, "--model.objective", "ml")
    assert (code, "is of a fit by REML, and this one is by ml. Give --model.objective REML" in told) == (1, True)
    main(["fit", "--config", ALPHA, "--ckpt_path", checkpoint])
    record = json.loads((folder / "version_2" / "fit.json").read_text())
    assert record["converged"] is True
    assert record["iterations"] == 4


def test_written_configuration_runs_again(capsys):
    main(["fit", "--config", str(CONFIGS / "orthodont_ar1.yaml"), "--monitor.figures", "false"])
    first = Path("runs", "orthodont_ar1", "version_0")
    main(["fit", "--config", str(first / "config.yaml"), "--monitor.figures", "false"])
    second = Path("runs", "orthodont_ar1", "version_1")
    a, b = (json.loads((folder / "fit.json").read_text()) for folder in (first, second))
    assert a["loglik"] == b["loglik"]


def test_optimizer_and_control_from_the_command_line(capsys):
    main([
        "fit", "--config", ALPHA, "--model.objective", "ml", "--model.optimizer", "torch.optim.LBFGS",
        "--model.optimizer.line_search_fn", "strong_wolfe", "--monitor.figures", "false",
    ])  # fmt: skip
    shown = capsys.readouterr().out
    assert "by ML" in shown
    assert "Converged after" in shown
    main([
        "fit", "--config", ALPHA, "--model.control", "openreml_nn.optim.Halving", "--model.direction",
        "openreml_nn.optim.Fisher", "--model.solver.class_path", "openreml_nn.solvers.DenseSolver",
        "--monitor.figures", "false",
    ])  # fmt: skip
    shown = capsys.readouterr().out
    assert "dense" in shown.split("Linear mixed model")[1]
    assert "log-likelihood = -46.5969" in shown


def test_unknown_keys(capsys):
    text = Path(ALPHA).read_text()
    Path("bad.yaml").write_text(text.replace("random:", "randm:"))
    code, told = error(capsys, "fit", "--config", "bad.yaml")
    assert code == 2
    assert told.endswith("'data.randm.gen'; did you mean 'data.random'?")
    Path("bad.yaml").write_text(text.replace("data:", "dta:"))
    code, told = error(capsys, "fit", "--config", "bad.yaml")
    assert (code, told.endswith("; did you mean 'data'?")) == (2, True)
    for wrong, right in (("trainer.max_epocs", "trainer.max_epochs"), ("model.tolerence", "model.tolerance")):
        code, told = error(capsys, "fit", "--config", ALPHA, f"--{wrong}", "3")
        assert (code, told) == (2, f"unrecognized arguments: --{wrong} 3; did you mean '{right}'?")
    code, told = error(capsys, "fit", "--data.fixed", "yield ~ 1")
    assert (code, told) == (2, "the following arguments are required: --data.table")
    assert nearest_option("nothing.like_it") is None
    assert nearest_option("data.zzz") is None


@pytest.mark.parametrize(
    ("term", "told"),
    [
        ("covarance: x", "In `data.random`: Option 'covarance' is not accepted; did you mean 'covariance'?"),
        ("covariance: Foo", "In `data.random.covariance`: Expected a dot import path string: Foo"),
        (
            "covariance: openreml_nn.covariance.Foo",
            "In `data.random.covariance`: module 'openreml_nn.covariance' has no attribute 'Foo'",
        ),
        (
            "covariance: {class_path: openreml_nn.covariance.AR1Matrix, init_args: {strt: 1}}",
            "In `data.random.covariance`: Option 'strt' is not accepted; did you mean 'start'?",
        ),
        ("design: 3", "In `data.random.design`: Expected a <class 'str'>. Got value: 3"),
        ("within: 3", "In `data.random.within`: no accepted type fits 3"),
        (
            "relationship: {class_path: openreml_nn.data.Kernel, init_args: {source: nofile.csv}}",
            "There is no file 'nofile.csv' (looked from ",
        ),
    ],
)
def test_mistakes_in_a_term(term, told, capsys):
    config = f"data: {{table: oats, fixed: yield ~ 1, random: {{Block: {{groups: Block, {term}}}}}}}"
    Path("bad.yaml").write_text(config)
    code, text = error(capsys, "fit", "--config", "bad.yaml")
    assert code > 0
    assert text.startswith(told)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data.fixed", "yield ~ repp"], ["'repp'", "did you mean 'rep'?"]),
        (["--data.table", "nofile.csv"], ["nofile.csv"]),
        (["--data.table", "john_alfa"], ["did you mean 'john_alpha'?"]),
        (
            ["--data.table", "orthodont_miss", "--data.fixed", "distance ~ age", "--data.random", "Subject"],
            ["'distance' (12 rows)", "--data.missing drop"],
        ),
        (["--model.objective", "MAP"], ["`objective` must be 'REML', 'ML' or a class of objectives, got 'MAP'."]),
        (["--model.solver", "magic"], ["There is no solver 'magic'"]),
        (["--ckpt_path", "nofile.ckpt"], ["nofile.ckpt"]),
        (["--data.random", "[gen, plots]"], ["'plots'", "did you mean 'plot'?"]),
    ],
)
def test_mistakes_in_the_model(args, words, capsys):
    code, told = error(capsys, "fit", "--config", ALPHA, *args)
    assert code == 1
    assert all(word in told for word in words), told
    assert not Path("runs").exists() or not list(Path("runs").rglob("fit.json"))


def test_missing_files_and_checkpoints(capsys):
    code, told = error(capsys, "fit", "--config", "nofile.yaml")
    assert (code, "nofile.yaml" in told) == (2, True)
    for command in ("validate", "predict"):
        code, told = error(capsys, command, "--config", ALPHA)
        assert (code, told) == (1, f"`{command}` needs the checkpoint of a fit: --ckpt_path FILE.")
    assert error(capsys)[0] == 2
    Path("half.ckpt").write_bytes(b"PK half of a file")
    for command in ("fit", "validate", "predict"):
        code, told = error(capsys, command, "--config", ALPHA, "--ckpt_path", "half.ckpt")
        assert (code, "half.ckpt was not loaded" in told or "half.ckpt is no checkpoint" in told) == (1, True)


def test_files_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    code, told = error(capsys, "fit", "--config", ALPHA, "--results.folder", "file/runs")
    assert (code, told) == (1, "Not a directory: file/runs")

    def full(*args, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkstemp", full)
    code, told = error(capsys, "fit", "--config", ALPHA)
    assert (code, told) == (1, "No space left on device")
    assert not list(tmp_path.rglob("fit.json"))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt(sent, code, capsys, monkeypatch):
    def interrupt(module, batch, batch_idx, step=REMLModule.training_step):
        if module.progress is not None and module.progress.iteration == 2:
            signal.raise_signal(sent)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(REMLModule, "training_step", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config", ALPHA, "--trainer.logger.flush_secs", "1"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert end.value.code == code
    folder = Path("runs", "john_alpha", "version_0")
    steps = 2 if sent == signal.SIGINT else 3  # SIGTERM waits for the end of a step
    assert f"interrupted after {steps} complete steps. It goes on from the checkpoint" in capsys.readouterr().out
    record = json.loads((folder / "fit.json").read_text())
    assert (record["converged"], record["iterations"]) == (False, steps)
    assert (folder / "checkpoints" / "last.ckpt").exists()


def test_interrupt_before_the_fit(capsys, monkeypatch):
    def interrupt(cli):
        raise KeyboardInterrupt

    monkeypatch.setattr(REMLCLI, "before_instantiate_classes", interrupt)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", ALPHA])
    assert (end.value.code, capsys.readouterr().err) == (130, "")


def test_sigterm_in_the_last_step_leaves_the_fit_that_it_is(capsys, monkeypatch):
    def terminate(module, *args, end=REMLModule.on_train_batch_end):
        end(module, *args)
        if module.ended:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(REMLModule, "on_train_batch_end", terminate)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", ALPHA])
    assert end.value.code == 143
    assert "Converged after 4 steps" in capsys.readouterr().out
    assert json.loads(Path("runs", "john_alpha", "version_0", "fit.json").read_text())["converged"] is True


def test_memory_that_is_not_there(capsys, monkeypatch):
    """torch tells of it in a RuntimeError; the machine may have less than it said beforehand."""

    def build(module, *args):
        torch.empty(2**50, dtype=torch.float64)

    monkeypatch.setattr(REMLModule, "training_step", build)
    code, told = error(capsys, "fit", "--config", ALPHA)
    assert (code, "not enough for this fit: 8388608.0 GiB more were asked for. Take a solver that" in told) == (1, True)
    text = message(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB."))
    assert text.startswith("the memory is not enough for this fit (CUDA out of memory). Take a solver")
    assert not is_mistake(RuntimeError("other"))


def test_debug_gives_the_traceback(monkeypatch):
    monkeypatch.setenv("OPENREML_NN_DEBUG", "1")
    with pytest.raises(ValueError, match="'repp'"):
        main(["fit", "--config", ALPHA, "--data.fixed", "yield ~ repp"])


def test_a_defect_is_no_mistake_of_the_user():
    with pytest.raises(ValueError) as defect:
        int("x")
    assert not is_mistake(defect.value)


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("fit", "validate", "predict"))
    assert "3 a fit that did not converge" in " ".join(shown.split())
