"""Callbacks of a `MixedModelRegressor`: write its refit, write its predictions."""

from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from openreml_nn.lightning.callbacks import log_folder, stops_fit, write_predictions
from openreml_nn.lightning.network_batches import joined
from openreml_nn.lightning.network_data import NetworkDataModule
from openreml_nn.lightning.regressor import MixedModelRegressor
from openreml_nn.report import write_result

TRAINED_ALONE = "Variance parameters as trained (`refit: true` fits them by REML)"


class RefitFiles(Callback):
    """Writes the refit into the log folder at the end of a fit, as a `REMLModule`'s results, and prints its summary.

    Without a refit it prints the variance parameters as the training left them, and writes nothing. A warning says
    where no step was made, because the checkpoint already has the epochs asked for.

    Args:
        folder: Where to write; the Trainer's log folder when left out.
        verbose: Print.
    """

    def __init__(self, folder: str | Path | None = None, verbose: bool = True) -> None:
        self.folder, self.verbose, self._idle = folder, verbose, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._idle = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._idle = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder, module = log_folder(trainer, self.folder), _regressor(pl_module, self)
        if self._idle:
            rank_zero_warn(
                f"No step was made: the checkpoint is of epoch {trainer.current_epoch}, and `max_epochs` is "
                f"{trainer.max_epochs}; raise it. For a refit of the checkpoint take `openreml-nn network refit`."
            )
        elif trainer.is_global_zero:
            write_refit(module, folder, self.verbose)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self.verbose and stops_fit(exception, trainer):
            last = getattr(trainer.checkpoint_callback, "last_model_path", "")
            hint = f" Go on from {last} by --ckpt_path, or predict from it after `network refit`." if last else ""
            print(f"\nInterrupted in epoch {trainer.current_epoch + 1}, without a refit.{hint}")


class RowPredictionFiles(Callback):
    """Writes ``predictions.csv``: the new rows, ``new_levels``, ``prediction`` and ``sd``, that of a new observation.

    Where there are predictions already, the next ones are ``predictions_2.csv``.

    Args:
        folder: Where to write; the Trainer's log folder when left out, on the command line the folder of the run that
            the checkpoint belongs to.
        verbose: Print the path.
    """

    def __init__(self, folder: str | Path | None = None, verbose: bool = True) -> None:
        self.folder, self.verbose = folder, verbose

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder, data = log_folder(trainer, self.folder), getattr(trainer, "datamodule", None)
        if not isinstance(data, NetworkDataModule):
            raise TypeError(f"`RowPredictionFiles` needs a `NetworkDataModule`, got {type(data).__name__}.")
        if trainer.is_global_zero:
            assert data.predict_table is not None
            table = predictions(data.predict_table, trainer.predict_loop.predictions)
            write_predictions(table, folder, self.verbose)


def predictions(table: pd.DataFrame, batches: list[Any]) -> pd.DataFrame:
    """The table with the columns ``prediction`` and, where there are variances, ``sd``.

    Args:
        table: The rows that were predicted.
        batches: What ``predict_step`` gave for them, in their order.
    """
    means, variances = zip(*batches, strict=True)
    table = table.assign(prediction=joined(list(means)).cpu().numpy())
    return table if variances[0] is None else table.assign(sd=joined(list(variances)).sqrt().cpu().numpy())


def write_refit(module: MixedModelRegressor, folder: Path, verbose: bool = True, held: str = TRAINED_ALONE) -> None:
    """Write the refit of a module into a folder, where there is one, and print it.

    Args:
        module: The module.
        folder: Where to write.
        verbose: Print.
        held: What the variance parameters are where there is no refit, which are printed then.
    """
    if module.result is not None:
        write_result(module.result, folder)
    if verbose:
        fitted = module.result
        print(variance_text(module, held) if fitted is None else f"{fitted.summary()}\n\nResults: {folder}")


def variance_text(module: MixedModelRegressor, title: str = TRAINED_ALONE) -> str:
    """The variance parameters of the head, one a line, below a title."""
    return "\n".join([title, *(f"  {name} = {value:.6g}" for name, value in module.head.variance().items())])


def _regressor(module: L.LightningModule, callback: Callback) -> MixedModelRegressor:
    if not isinstance(module, MixedModelRegressor):
        raise TypeError(f"`{type(callback).__name__}` needs a `MixedModelRegressor`, got {type(module).__name__}.")
    return module
