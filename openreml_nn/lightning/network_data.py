"""Tables as a LightningDataModule for a network with random effects."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from openreml_nn.covariance import CovariancePropagation, IncidenceMatrix, Matrix, Sum
from openreml_nn.data import TermLike
from openreml_nn.lightning.batches import Batch, NewRowsBatch
from openreml_nn.lightning.data import MixedModelDataModule
from openreml_nn.lightning.fingerprints import fingerprint, require_same_data
from openreml_nn.nn import ClusterBatchSampler, Effects, Entry

INTERCEPT = "Intercept"


class TableRows(Dataset):
    """Rows ``(x, y, groups)``, or ``(x, groups)`` without a response, many at a time.

    Args:
        x: Inputs, shape (n, d).
        y: Response, shape (n,), or None.
        groups: What a head is told of each factor.
    """

    def __init__(self, x: Tensor, y: Tensor | None, groups: Mapping[str, Entry]) -> None:
        self.parts = (x, groups) if y is None else (x, y, groups)

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int]) -> tuple[Any, ...]:
        """A batch of rows, which needs no collation."""
        index = torch.as_tensor(rows)
        return tuple(_of_rows(part, index) for part in self.parts)


class NetworkDataModule(L.LightningDataModule):
    r"""Batches ``(x, y, groups)`` of a table for `MixedModelRegressor`, and the vocabulary of its random effects.

    The table is read at once, so that ``MixedModelHead(data.effects)`` can be made. Rows are held as tensors: the
    inputs in the default dtype of torch, the response and the designs of random effects in float64.

    Args:
        table: Path to CSV or Parquet, the name of a bundled table, or a DataFrame; one row per record.
        formula: Wilkinson formula of response and inputs, ``"y ~ age + scale(dose) + sex"``: numbers as they are (or
            scaled as in the training rows), factors by treatment contrasts, without a column of ones.
        random: Random terms by name, each a `openreml_nn.data.Term`, a column, or a list of columns, as
            `MixedModelDataModule` takes them.
        batch_size: Rows of a batch, of which an epoch should have many; None for all rows as one batch, as the exact
            likelihood wants them.
        cluster: The term whose groups stay whole in a batch; the first one when left out.
        seed: Seed of the order of the groups.
        missing: ``"error"``: missing values are an error; ``"drop"``: their rows are left out, counted and logged.
        validation_table: Rows to validate on, with the response.
        predict_table: Rows to predict; levels may be new.

    Attributes:
        effects: The random effects of each term, for a head.
        inputs: Names of the columns of x.

    Raises:
        ValueError: The table, the formula or a term cannot be used, there are no inputs or no random terms, there is
            no term ``cluster``, or a validation or predictions are asked for without rows for them.

    Warns:
        UserWarning: An epoch has one or two steps.

    Example:
        >>> from openreml_nn.lightning import NetworkDataModule
        >>> data = NetworkDataModule("sleepstudy", "Reaction ~ Days", {"Subject": "Subject"}, batch_size=60)
        >>> data.inputs, data.effects["Subject"].num_levels, len(data.train_dataloader())
        (['Days'], 18, 3)
    """

    def __init__(
        self,
        table: str | Path | pd.DataFrame,
        formula: str,
        random: dict[str, TermLike] | list[str | list[str]] | str,
        batch_size: int | None = 1000,
        cluster: str | None = None,
        seed: int = 0,
        missing: Literal["error", "drop"] = "error",
        validation_table: str | Path | pd.DataFrame | None = None,
        predict_table: str | Path | pd.DataFrame | None = None,
    ) -> None:
        super().__init__()
        whole = MixedModelDataModule(
            table, formula, random, missing=missing, validation_table=validation_table, predict_table=predict_table
        )
        model, self.batch_size, self.seed = whole.model, batch_size, seed
        self._limit: int | float | None = None
        self._columns = [i for i, name in enumerate(model.x_names) if name != INTERCEPT]
        self.inputs, names = [model.x_names[i] for i in self._columns], list(model.specification.random)
        if not self.inputs or not names:
            raise ValueError(
                f"`NetworkDataModule` needs inputs and random terms, got {self.inputs or 'no inputs'} from {formula!r} "
                f"and {names or 'no random terms'}."
            )
        self.cluster = names[0] if cluster is None else cluster
        if self.cluster not in names:
            raise ValueError(f"`cluster` must be one of the random terms {names}, got {cluster!r}.")
        assert isinstance(model.V, Sum)
        terms = {name: _parts(model.V.operand(name)) for name in names}
        self.effects = {name: Effects(Z.levels, Z.effects, G) for name, (Z, G) in terms.items()}
        groups = {name: _entry(Z) for name, (Z, _) in terms.items()}
        self.training_rows = TableRows(self._inputs(model.X), model.y, groups)
        self.validation_rows, self.predict_rows = self._new(whole.validation_rows), self._new(whole.predict_rows)
        self.predict_table = None if whole.predict_rows is None else whole.predict_rows.table
        self._fingerprint = fingerprint(Batch(model.y, model.X), model.V)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the data: digests, by which other data are known."""
        return {"fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of a training with other data, of which scaled inputs would be others."""
        require_same_data(state_dict["fingerprint"], self._fingerprint)

    def _inputs(self, X: Tensor) -> Tensor:
        return X[:, self._columns].to(torch.get_default_dtype())

    def _new(self, batch: NewRowsBatch | None) -> TableRows | None:
        if batch is None:
            return None
        groups = {name: _entry(Z, batch.unseen[name]) for name, Z in batch.Z.items()}
        return TableRows(self._inputs(batch.X), batch.y, groups)

    def train_dataloader(self) -> DataLoader:
        if self.batch_size is None:
            return DataLoader([self.training_rows.parts], batch_size=None)  # type: ignore[arg-type]
        entry = self.training_rows.parts[-1][self.cluster]
        codes = entry if isinstance(entry, Tensor) else entry[0]
        sampler = ClusterBatchSampler(codes, self.batch_size, seed=self.seed)
        return DataLoader(self.training_rows, batch_sampler=sampler, collate_fn=_as_it_is)

    def val_dataloader(self) -> DataLoader | list:
        return [] if self.validation_rows is None else self._in_order(self.validation_rows)

    def setup(self, stage: str) -> None:
        """Without rows to validate on a fit has no validation, and a validation is refused."""
        if stage == "validate" and self.validation_rows is None:
            raise ValueError(
                "Nothing to validate on. Give --data.validation_table FILE on the command line, or `validation_table` "
                "to `NetworkDataModule`: rows with the response."
            )
        if stage == "fit":
            self._warn_of_few_steps()
        if stage == "fit" and self.validation_rows is None and self.trainer is not None:
            self._limit = self.trainer.limit_val_batches
            self.trainer.limit_val_batches = 0

    def _warn_of_few_steps(self) -> None:
        rows = len(self.training_rows)
        if self.batch_size is not None and 2 * self.batch_size > rows:
            batches = -(-rows // self.batch_size)
            rank_zero_warn(
                f"An epoch is {batches} step{'s' * (batches > 1)}: the table has {rows} rows, and `batch_size` is "
                f"{self.batch_size}. Give a smaller one for more steps, or None where all rows are to be one batch."
            )

    def teardown(self, stage: str) -> None:
        if self._limit is not None and self.trainer is not None:
            self.trainer.limit_val_batches, self._limit = self._limit, None

    def predict_dataloader(self) -> DataLoader:
        if self.predict_rows is None:
            raise ValueError(
                "Nothing to predict. Give --data.predict_table FILE on the command line, or `predict_table` to "
                "`NetworkDataModule`."
            )
        return self._in_order(self.predict_rows)

    def _in_order(self, rows: TableRows) -> DataLoader:
        return DataLoader(rows, batch_size=self.batch_size or len(rows), collate_fn=_as_it_is)


def _parts(term: Matrix) -> tuple[IncidenceMatrix, Matrix]:
    """Z and G of a random term."""
    assert isinstance(term, CovariancePropagation)
    Z, G = term.operand_list()
    assert isinstance(Z, IncidenceMatrix)
    return Z, G


def _entry(Z: Matrix, unseen: Matrix | None = None) -> Entry:
    """Codes, and the design unless it is ones; ``unseen`` has the design of the rows of unknown levels."""
    assert isinstance(Z, IncidenceMatrix)
    if Z.values is None and len(Z.effects) == 1:
        return Z.codes
    like = torch.zeros((), dtype=torch.float64)
    design = Z.effect_values(like)
    return Z.codes, design + unseen.effect_values(like) if isinstance(unseen, IncidenceMatrix) else design


def _of_rows(part: Any, index: Tensor) -> Any:
    if isinstance(part, Mapping):
        return {name: _of_rows(own, index) for name, own in part.items()}
    return part[index] if isinstance(part, Tensor) else tuple(own[index] for own in part)


def _as_it_is(batch: Any) -> Any:
    return batch
