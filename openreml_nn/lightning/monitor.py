"""What TensorBoard shows of a fit: its course by step, its covariances and random effects at the end."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary

from openreml_nn.lightning.callbacks import reml_module
from openreml_nn.lightning.data import MixedModelDataModule
from openreml_nn.lightning.module import REMLModule
from openreml_nn.result import FitResult

COURSE = ("loglik", "score_norm", "step_norm", "step_length", "condition")


class TensorBoardMonitor(Callback):
    """Logs the course of a fit by step, and its result at the end.

    By step, to every logger: ``fit/loglik``, ``fit/score_norm``, ``fit/step_norm``, ``fit/step_length``,
    ``fit/condition`` (of the average information), and each variance parameter on its natural scale with its standard
    error as ``variance/<name>`` and ``std_error/<name>``. At the end, to TensorBoard: heat maps of each G and its
    correlation, a caterpillar plot of each random term, the summary as text, and the hyper-parameters of the run with
    its log-likelihood.

    Args:
        figures: Draw the figures.
        most: Largest number of rows of a covariance, and twice the number of levels at each end of a caterpillar plot.
    """

    def __init__(self, figures: bool = True, most: int = 60) -> None:
        self.figures, self.most = figures, most
        self._names: list[str] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._names = reml_module(pl_module, self).covariance.natural_names
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars(layout(self._names))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loggers = trainer.loggers if trainer.is_global_zero else []
        if not loggers or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        module = reml_module(pl_module, self)
        at = module.progress
        scalars = {} if at is None else {f"fit/{name}": float(getattr(at, name)) for name in COURSE}
        for name, estimate, se in zip(self._names, *module.natural_scale(), strict=True):
            scalars |= {f"variance/{name}": float(estimate), f"std_error/{name}": float(se)}
        scalars = {tag: value for tag, value in scalars.items() if math.isfinite(value)}
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                _add_scalars(logger.experiment, scalars, trainer.global_step)
            else:
                logger.log_metrics(scalars, step=trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not boards:
            return
        module = reml_module(pl_module, self)
        result = module.result()  # on all processes, which may share the rows
        if not trainer.is_global_zero:
            return
        hparams, metrics = run_record(trainer, module, result)
        for logger in boards:
            logger.log_hyperparams(hparams, metrics)
            logger.experiment.add_text("summary", _as_code(result.summary()), trainer.global_step)
            if self.figures:
                self._draw(logger.experiment, result, trainer.global_step)

    def _draw(self, writer: Any, result: FitResult, step: int) -> None:
        from openreml_nn import figures  # matplotlib is needed here only

        def show(tag: str, figure: Any) -> None:
            writer.add_image(tag, figures.picture(figure), step, dataformats="HWC")

        for name, labels, G, note in figures.term_covariances(result, self.most):
            title = f"{name} ({note})" if note else name
            show(f"covariance/{name}", figures.heat_map(G, labels, f"Covariance of {title}"))
            C = figures.correlation(G)
            show(f"correlation/{name}", figures.heat_map(C, labels, f"Correlation of {title}", 1.0))
        blup = result.blup()
        for name in dict.fromkeys(blup["term"]):
            show(f"random_effects/{name}", figures.caterpillar(blup[blup["term"] == name], name, self.most))


def _add_scalars(writer: Any, scalars: dict[str, float], step: int) -> None:
    """All scalars of a step as one event; ``add_scalar`` would cost some 40 µs for each."""
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
    writer._get_file_writer().add_summary(summary, step)


def layout(names: list[str]) -> dict[str, dict[str, list[Any]]]:
    """Charts of the custom-scalars page: the course of the fit, and the variance parameters with their errors."""
    course = {"log-likelihood": ["Multiline", ["fit/loglik"]], "score norm": ["Multiline", ["fit/score_norm"]]}
    together = {"all": ["Multiline", [f"variance/{_escaped(name)}$" for name in names]],
                "standard errors": ["Multiline", [f"std_error/{_escaped(name)}$" for name in names]]}  # fmt: skip
    return {"fit": course, "variance parameters": together}


def run_record(trainer: L.Trainer, module: REMLModule, result: FitResult) -> tuple[dict[str, Any], dict[str, float]]:
    """Hyper-parameters of a run and the numbers by which runs are compared."""
    data = getattr(trainer, "datamodule", None)
    hparams = {key: value for key, value in module.hparams.items() if not key.startswith("_")}
    hparams |= {"objective": result.objective.method, "solver": result.objective.solver.name, "n": result.n}
    hparams |= data.describe() if isinstance(data, MixedModelDataModule) else {}
    metrics = {
        "final/loglik": result.loglik,
        "final/AIC": result.AIC,
        "final/BIC": result.BIC,
        "final/converged": float(result.converged),
        "final/iterations": float(result.n_iter),
    }
    return hparams, metrics


def _escaped(name: str) -> str:
    """A name as a regular expression, as TensorBoard's layouts want it."""
    return "".join(f"\\{c}" if c in r"\^$.|?*+()[]{}" else c for c in name)


def _as_code(text: str) -> str:
    """Text as a block of Markdown that keeps its columns."""
    return "\n".join(f"    {line}" for line in text.splitlines())
