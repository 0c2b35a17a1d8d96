"""Callbacks of a fit: stop when it has ended, write its results, write predictions."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from openreml_nn.lightning.batches import Batch
from openreml_nn.lightning.module import REMLModule
from openreml_nn.optim import AverageInformation
from openreml_nn.report import unused, write_result, write_text

MANY = 3000
"""Rows beyond which a step of these solvers may take long."""
COSTLY = ("dense", "blocks")


def reml_module(module: L.LightningModule, callback: Callback) -> REMLModule:
    """The module of a Trainer; raises a TypeError that names the callback where it is no `REMLModule`."""
    if not isinstance(module, REMLModule):
        raise TypeError(f"`{type(callback).__name__}` needs a `REMLModule`, got {type(module).__name__}.")
    return module


class ConvergenceCallback(Callback):
    """Stops the Trainer when the fit of a `REMLModule` has ended, and warns where it did not converge.

    Args:
        verbose: Print a line for each step, and the reason of the end; before the first one what it is expected to
            cost, where more than `MANY` rows are solved densely or in blocks.
    """

    def __init__(self, verbose: bool = False) -> None:
        self.verbose, self._begins = verbose, True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begins = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._begins and self.verbose and trainer.is_global_zero:
            given = Batch.of(batch)
            choice, n = given.choice or reml_module(pl_module, self).objective.choice, len(given.y)
            if n > MANY and choice.solver.name in COSTLY:
                print(f"{n} rows by the solver {choice.solver.name!r} ({choice.reason}): {choice.cost}.", flush=True)
        self._begins = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = reml_module(pl_module, self)
        talks, at = self.verbose and trainer.is_global_zero, module.progress
        if talks and at is not None:
            before = "  (before the step)" if math.isnan(at.step_length) and not at.done else ""
            line = f"step {trainer.global_step:3d}  log-likelihood {at.loglik:.6f}  decrement {at.decrement:.1e}"
            print(line + before)
        if module.ended:
            trainer.should_stop = True
            if talks:
                print(f"Stopped: {module.ended}.")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = reml_module(pl_module, self)
        if module.converged or module.progress is None or not trainer.is_global_zero:
            return
        if module.ended:
            warnings.warn(f"The fit did not converge: {module.ended}.", stacklevel=2)
        else:
            warnings.warn(
                f"The fit was cut off after {trainer.global_step} steps, before it converged (Newton decrement "
                f"{module.progress.decrement:.1e}, wanted {module.tolerance:.0e}). Raise the Trainer's "
                f"`max_epochs`{_other_rate(trainer)}.",
                stacklevel=2,
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = reml_module(pl_module, self)
        if not module.idle or not trainer.is_global_zero:
            return
        has = f": the checkpoint already has {trainer.global_step} steps" if trainer.global_step else ""
        if module.converged:
            print(f"No step was made{has}, and the fit has ended: {module.ended}.")
        else:
            limit = f"`max_epochs` is {trainer.max_epochs}"
            warnings.warn(f"No step was made{has}. The Trainer's {limit}; raise it.", stacklevel=2)


def _other_rate(trainer: L.Trainer) -> str:
    """What else than more steps may help: an optimizer of torch has a learning rate, which hardly fits by default."""
    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    if isinstance(optimizer, AverageInformation) or "lr" not in getattr(optimizer, "defaults", {}):
        return ""
    assert optimizer is not None
    name, rate = type(optimizer).__name__, optimizer.param_groups[0]["lr"]
    return f", or try another learning rate: `lr` of {name} is {float(rate):g} (--model.optimizer.lr)"


class ResultFiles(Callback):
    """Writes the fit into the log folder when it ends, and prints its summary.

    The files are ``variance_parameters.csv``, ``fixed_effects.csv``, ``random_effects.csv`` and ``fit.json``. After
    Ctrl-C or SIGTERM they hold the last complete step, as a fit that did not converge unless it was through; the
    checkpoint of that step is the ``ModelCheckpoint``'s. Several processes may stand at different steps then, and
    nothing is written: a fit from that checkpoint with as many ``max_epochs`` as it has steps writes its results.

    Args:
        folder: Where to write; the Trainer's log folder when left out.
        verbose: Print the summary and the folder.
    """

    def __init__(self, folder: str | Path | None = None, verbose: bool = True) -> None:
        self.folder, self.verbose, self._written = folder, verbose, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._written = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if reml_module(pl_module, self).idle:  # `on_train_end` is not called then
            self._write(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not stops_fit(exception, trainer):
            return
        module = reml_module(pl_module, self)
        steps = module.progress.iteration if module.progress else 0
        reason = f"interrupted after {steps} complete step{'s' * (steps != 1)}"
        checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
        goes_on = f" It goes on from the checkpoint {checkpoint}" if checkpoint else ""
        if goes_on and trainer.world_size > 1:
            goes_on += f"; with `max_epochs` {steps} its results are written from there"
        if module.progress is not None and trainer.world_size == 1 and not self._written:
            module.last_complete_step()
            self._write(trainer, pl_module, "" if module.ended else reason)
        print(f"The fit was {reason}.{goes_on}")

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, reason: str = "") -> None:
        folder, result = log_folder(trainer, self.folder), reml_module(pl_module, self).result()
        if reason:
            result = replace(result, converged=False, reason=reason)
        if trainer.is_global_zero:
            write_result(result, folder)
            if self.verbose:
                print(f"{result.summary()}\n\nResults: {folder}")
        self._written = True


def stops_fit(exception: BaseException, trainer: L.Trainer) -> bool:
    """Whether an exception is Ctrl-C or SIGTERM in a fit, and this is the first process, which tells it."""
    stop, fits = isinstance(exception, (KeyboardInterrupt, SIGTERMException)), trainer.state.fn == TrainerFn.FITTING
    return stop and fits and trainer.is_global_zero


class PredictionFiles(Callback):
    """Writes ``predictions.csv``: the new rows, ``new_levels``, ``prediction`` and ``std_error``, without the residual.

    Where there are predictions already, the next ones are ``predictions_2.csv``.

    Args:
        folder: Where to write; the Trainer's log folder when left out, on the command line the folder of the run that
            the checkpoint belongs to.
        verbose: Print the path.
    """

    def __init__(self, folder: str | Path | None = None, verbose: bool = True) -> None:
        self.folder, self.verbose = folder, verbose

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        folder = log_folder(trainer, self.folder)
        if trainer.is_global_zero:
            write_predictions(outputs, folder, self.verbose)


def write_predictions(table: pd.DataFrame, folder: Path, verbose: bool) -> None:
    """Write ``predictions.csv`` into a folder, under the next free name, and print its path if ``verbose``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_text(unused(folder / "predictions.csv"), table.to_csv(index=False))
    if verbose:
        print(f"Predictions: {path}")


def log_folder(trainer: L.Trainer, folder: str | Path | None) -> Path:
    """The folder asked for, else the Trainer's log folder; all processes must call this."""
    logged = trainer.log_dir
    return Path(folder or logged or trainer.default_root_dir)
