"""Tables as a LightningDataModule around `openreml_nn.data.MixedModel`."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch

from openreml_nn.covariance import Matrix
from openreml_nn.data import MixedModel, Term, TermLike, read_table
from openreml_nn.data.shards import require_same_table, share_rows
from openreml_nn.data.shared import SharedTable
from openreml_nn.lightning.batches import Batch, NewRowsBatch, OneBatch
from openreml_nn.lightning.module import REMLModule
from openreml_nn.solvers import Ranks, choose_solver, processes

NOT_READ = (
    "With `read='share'` rows are read when the Trainer begins, and there are none yet. Give this data module to a "
    "Trainer, or take `read='whole'`."
)


class MixedModelDataModule(L.LightningDataModule):
    r"""A mixed model over a table: its y, X and V, and designs of new rows for validation and prediction.

    The table is read at once, so that ``REMLModule(data.covariance)`` can be made. On several processes each takes its
    rows of it when the Trainer begins: the levels of a term, or the blocks of rows that terms link, stay whole where
    the solver needs them whole. Where it needs all rows together, each process has them all.

    Args:
        table: Path to CSV or Parquet, the name of a bundled table, or a DataFrame; one row per record.
        fixed: Wilkinson formula of response and fixed effects, ``"yield ~ rep"``.
        random: Random terms by name, each a `Term`, a column, or a list of columns; or a list of such columns.
        residual: One residual term, several by name, or None for σ² I.
        missing: ``"error"``: missing values are an error; ``"drop"``: their rows are left out and counted.
        validation_table: Rows with a response, on which predictions are compared with it.
        predict_table: Rows to predict; levels of random terms may be new.
        read: ``"whole"``: each process reads the table at once; ``"share"``: of a Parquet table each process reads only
            the row groups that have its rows, and only when the Trainer begins. Functions of all rows, such as
            ``scale``, are then refused in formulas.

    Attributes:
        batch: The rows of this process; None where they are not read yet.
        validation_rows: The rows to validate on, where there are any.
        predict_rows: The rows to predict, where there are any.

    Raises:
        ValueError: A table, the formula or a term cannot be used; the message names the column or term.
    """

    def __init__(
        self,
        table: str | Path | pd.DataFrame,
        fixed: str,
        random: dict[str, TermLike] | list[str | list[str]] | str | None = None,
        residual: dict[str, Term] | Term | None = None,
        missing: Literal["error", "drop"] = "error",
        validation_table: str | Path | pd.DataFrame | None = None,
        predict_table: str | Path | pd.DataFrame | None = None,
        read: Literal["whole", "share"] = "whole",
    ) -> None:
        super().__init__()
        if read not in ("whole", "share"):
            raise ValueError(f"`read` must be 'whole' or 'share', got {read!r}.")
        self.table = table
        self._limit: int | float | None = None
        self._tables = (validation_table, predict_table)
        self._moved: dict[int, tuple[Any, torch.device, Any]] = {}  # batches, and themselves on a device
        self.validation_rows: NewRowsBatch | None = None
        self.predict_rows: NewRowsBatch | None = None
        self.batch: Batch | None = None
        self._shared: SharedTable | None = None
        self._model: MixedModel | None = None
        if read == "share":
            if isinstance(table, pd.DataFrame):
                raise ValueError("`read='share'` needs the path of a Parquet table, got a DataFrame.")
            self._shared = SharedTable(table, fixed, random, residual, missing)
            return
        self._model = model = MixedModel(table, fixed, random, residual, missing)
        self._whole = Batch(model.y, model.X, model.x_names)
        self._take(model, self._whole)

    @property
    def model(self) -> MixedModel:
        """The model of the table; with ``read="share"`` of the rows of this process.

        Raises:
            ValueError: These rows are not read yet.
        """
        if self._model is None:
            raise ValueError(NOT_READ)
        return self._model

    @property
    def covariance(self) -> Matrix:
        """V, the covariance of the records; with ``read="share"`` one with its parameters, for some other rows."""
        return self.model.V if self._shared is None else self._shared.V

    def describe(self) -> dict[str, str]:
        """The model in words, for loggers."""
        given = (self._shared or self.model).specification
        return {
            "table": "DataFrame" if isinstance(self.table, pd.DataFrame) else str(self.table),
            "fixed": given.fixed,
            "random": ", ".join(given.random),
            "residual": ", ".join(given.residual),
        }

    def setup(self, stage: str) -> None:
        """Take the rows of this process; without rows to validate on, a fit has no validation."""
        ranks = processes()
        if self._shared is not None:
            self._read(self._shared, ranks)
        elif ranks.size > 1 or self.batch is not self._whole:
            self._share(ranks)
        if stage == "fit" and self._tables[0] is None and self.trainer is not None:
            self._limit = self.trainer.limit_val_batches
            self.trainer.limit_val_batches = 0

    def _read(self, table: SharedTable, ranks: Ranks) -> None:
        """Read the rows of this process."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if not isinstance(module, REMLModule):
            raise TypeError(f"`read='share'` needs a `REMLModule`, got {type(module).__name__}.")
        share = table.share(module.asked_solver, ranks)
        self._model = model = share.model
        text = share.text + ("" if share.ranks.size > 1 or not share.text else _together(share.choice.solver.name))
        self._take(model, Batch(model.y, model.X, model.x_names, model.V, share.ranks, text, share.choice))

    def _share(self, ranks: Ranks) -> None:
        """Take the rows of this process, or all of them."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if ranks.size == 1 or not isinstance(module, REMLModule):
            self._take(self.model, self._whole)
            return
        require_same_table(self.model, ranks)
        V, n, size = self.model.V, len(self._whole.y), ranks.size
        choice = choose_solver(V, module.asked_solver, share=True)
        whole = choice.solver.whole_terms(V)
        shards = None if whole is None else share_rows(self.model, whole, size, choice.solver.may_tear)
        if shards is None:
            text = f"{size} processes; each has all {n} rows{_together(module.objective.solver.name)}"
            self._take(self.model, replace(self._whole, sharing=text))
            return
        part, places = self.model.part(np.flatnonzero(shards.owner == ranks.rank), shards.own)
        batch = Batch(
            part.y, part.X, part.x_names, part.V, ranks.owning(places), shards.text(size), choice, self._whole
        )
        self._take(part, batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on the device, moved there once: each step gets the same one."""
        kept, where, moved = self._moved.get(id(batch), (None, None, None))
        if kept is not batch or where != device:
            moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
            self._moved[id(batch)] = (batch, device, moved)
        return moved

    def _take(self, model: MixedModel, batch: Batch) -> None:
        """Fit to a batch, and predict new rows by its model."""
        self.batch, self._moved = batch, {}
        validation, predicted = self._tables
        self.validation_rows = self._new_rows(validation, model, batch, with_response=True)
        self.predict_rows = self._new_rows(predicted, model, batch)

    def teardown(self, stage: str) -> None:
        if self._limit is not None and self.trainer is not None:
            self.trainer.limit_val_batches, self._limit = self._limit, None

    def _read_batch(self) -> Batch:
        """The rows of this process.

        Raises:
            ValueError: They are not read yet.
        """
        if self.batch is None:
            raise ValueError(NOT_READ)
        return self.batch

    def train_dataloader(self) -> OneBatch:
        return OneBatch(self._read_batch())

    def val_dataloader(self) -> OneBatch:
        return OneBatch(self._read_batch() if self.validation_rows is None else self.validation_rows)

    def predict_dataloader(self) -> OneBatch:
        """The new rows.

        Raises:
            ValueError: There is no `predict_table`, or the rows of the fit are not read yet.
        """
        self._read_batch()
        if self.predict_rows is None:
            raise ValueError(
                "Nothing to predict. Give --data.predict_table FILE on the command line, or `predict_table` to "
                "`MixedModelDataModule`."
            )
        return OneBatch(self.predict_rows)

    def _new_rows(
        self, source: str | Path | pd.DataFrame | None, model: MixedModel, batch: Batch, with_response: bool = False
    ) -> NewRowsBatch | None:
        if source is None:
            return None
        table = read_table(source)
        rows = model.design(table, batch.ranks)
        new = np.array([(~known).tolist() for known in rows.known.values()], dtype=bool)
        names = np.array(list(rows.known), dtype=object)
        unseen = ["; ".join(names[column]) for column in new.reshape(len(names), len(table)).T]
        y = model.new_response(table) if with_response else None
        return NewRowsBatch(batch, rows.X, dict(rows.Z), dict(rows.unseen), y, table.assign(new_levels=unseen))


def _together(solver: str) -> str:
    return f", which the {solver} solver needs together"
