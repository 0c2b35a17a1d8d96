"""What TensorBoard gets: the event file is read back."""

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from openreml_nn.lightning import ConvergenceCallback, REMLModule, TensorBoardMonitor

ALL = {"scalars": 0, "images": 0, "tensors": 0}


def events(folder: str) -> EventAccumulator:
    return EventAccumulator(folder, size_guidance=ALL).Reload()


def test_course_and_end_of_a_fit(data, trainer, tmp_path):
    module, datamodule = REMLModule(data().covariance), data()
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    trainer(logger=logger, callbacks=[TensorBoardMonitor(), ConvergenceCallback()]).fit(module, datamodule)
    board, result = events(logger.log_dir), module.result()
    tags = board.Tags()

    names = result.variance["name"].tolist()
    course = {f"fit/{name}" for name in ("loglik", "score_norm", "step_norm", "step_length", "condition")}
    assert course | {f"{kind}/{name}" for kind in ("variance", "std_error") for name in names} <= set(tags["scalars"])
    loglik = board.Scalars("fit/loglik")
    assert [event.step for event in loglik] == [1, 2, 3, 4]
    assert [event.value for event in loglik] == pytest.approx([at.loglik for at in result.history], rel=1e-6)
    for name, estimate, se in result.variance[["name", "estimate", "std_error"]].to_numpy():
        assert board.Scalars(f"variance/{name}")[-1].value == pytest.approx(estimate, rel=1e-6)
        assert board.Scalars(f"std_error/{name}")[-1].value == pytest.approx(se, rel=1e-6)
    assert board.Scalars("final/loglik")[0].value == pytest.approx(result.loglik)

    pictures = {f"{kind}/{term}" for kind in ("covariance", "correlation", "random_effects")
                for term in ("gen", "rep:block")}  # fmt: skip
    assert set(tags["images"]) == pictures
    assert board.Images("random_effects/gen")[0].width > 300
    assert "custom_scalars__config__" in tags["tensors"]
    text = board.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "log-likelihood = -46.5969" in text
    parts = ("_hparams_/experiment", "_hparams_/session_start_info")
    hparams = b"".join(board.summary_metadata[part].plugin_data.content for part in parts)
    for word in ("yield ~ rep", "gen, rep:block", "REML", result.objective.solver.name, "final/loglik"):
        assert word.encode() in hparams


def test_covariances_of_effects(data, trainer, tmp_path):
    module, datamodule = REMLModule(data("slopes").covariance), data("slopes")
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    trainer(logger=logger, callbacks=[TensorBoardMonitor(), ConvergenceCallback()]).fit(module, datamodule)
    tags = events(logger.log_dir).Tags()
    assert {"variance/Subject/sigma_Intercept_Days", "std_error/Subject/sigma_Intercept_Days"} <= set(tags["scalars"])
    assert "correlation/Subject" in tags["images"]


def test_residual_covariance_and_boundary(data, trainer, tmp_path):
    for name, picture in (("serial", "correlation/residual"), ("boundary", "covariance/Batch")):
        module, datamodule = REMLModule(data(name).covariance), data(name)
        logger = TensorBoardLogger(tmp_path, name, default_hp_metric=False)
        trainer(logger=logger, callbacks=[TensorBoardMonitor(), ConvergenceCallback()]).fit(module, datamodule)
        board = events(logger.log_dir)
        assert picture in board.Tags()["images"]
    assert board.Scalars("variance/Batch/sigma^2")[-1].value == 0.0
    assert "std_error/Batch/sigma^2" not in board.Tags()["scalars"]  # it is at zero from the first step on


def test_other_loggers_get_the_scalars(data, trainer, tmp_path):
    module, datamodule = REMLModule(data().covariance), data()
    logger = CSVLogger(tmp_path)
    trainer(logger=logger, callbacks=[TensorBoardMonitor(), ConvergenceCallback()]).fit(module, datamodule)
    assert "variance/gen/sigma^2" in (next(tmp_path.rglob("metrics.csv"))).read_text()
