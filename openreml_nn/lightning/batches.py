"""What travels from a data module to `REMLModule`: one batch is the whole data set, or a process's rows of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.solvers import ALONE, Choice, Ranks


@dataclass(eq=False)
class Batch:
    """Response and fixed effects of all records, or of those of one of several processes.

    Attributes:
        y: Response, shape (n,).
        X: Design of the fixed effects, shape (n, p); a column of ones when left out.
        x_names: Names of the columns of X.
        V: Covariance of these records, with the parameters of the module's; the module's own when left out.
        ranks: The processes that share the records.
        sharing: How they share them, in words.
        choice: The solver for V; that of the module when left out.
        whole: All records, where this process has them too.
    """

    y: Tensor
    X: Tensor | None = None
    x_names: list[str] | None = None
    V: Matrix | None = None
    ranks: Ranks = ALONE
    sharing: str = ""
    choice: Choice | None = None
    whole: "Batch | None" = None

    @classmethod
    def of(cls, batch: Any) -> "Batch":
        """A batch from one, or from ``y``, ``(y,)``, ``(y, X)`` or ``(y, X, x_names)`` of any DataLoader.

        Raises:
            TypeError: It is something else.
        """
        if isinstance(batch, NewRowsBatch):
            return batch.fitted
        if isinstance(batch, Batch):
            return batch
        if isinstance(batch, Tensor):
            return cls(batch)
        if isinstance(batch, Sequence) and 1 <= len(batch) <= 3 and isinstance(batch[0], Tensor):
            return cls(*batch)
        raise TypeError(
            f"`REMLModule` needs a batch (y, X) of all records, got {type(batch).__name__}. Use "
            f"`MixedModelDataModule`, or a DataLoader with batch_size=None over a list of one such pair."
        )

    def same_as(self, other: "Batch") -> bool:
        """Whether both hold the same numbers."""
        return _same(self.y, other.y) and _same(self.X, other.X)

    def to(self, device: torch.device, **options: Any) -> "Batch":
        """The batch on a device."""
        X = None if self.X is None else self.X.to(device, **options)
        V = self.V if self.V is None or self.y.device == device else self.V.to(device)
        return replace(self, y=self.y.to(device, **options), X=X, V=V)


@dataclass(eq=False)
class NewRowsBatch:
    """New rows beside the records that the model was fitted to.

    Attributes:
        fitted: The records of the fit.
        X: Fixed-effects design of the new rows, shape (m, p).
        Z: Design of the new rows for each random term by name; zeros for levels that the fit has not seen.
        unseen: The other way round, as `openreml_nn.data.NewRows` has it.
        y: Their response where it is known, shape (m,).
        table: The new rows as they were read, with a column ``new_levels``.
    """

    fitted: Batch
    X: Tensor
    Z: dict[str, Matrix]
    unseen: dict[str, Matrix]
    y: Tensor | None = None
    table: pd.DataFrame = field(default_factory=pd.DataFrame)

    def to(self, device: torch.device, **options: Any) -> "NewRowsBatch":
        """The batch on a device."""
        y = None if self.y is None else self.y.to(device, **options)
        Z, unseen = ({name: Z.to(device) for name, Z in designs.items()} for designs in (self.Z, self.unseen))
        return NewRowsBatch(self.fitted.to(device, **options), self.X.to(device, **options), Z, unseen, y, self.table)


class OneBatch:
    """A data loader of one batch.

    Args:
        batch: The batch.
    """

    def __init__(self, batch: Batch | NewRowsBatch) -> None:
        self.batch = batch

    def __iter__(self) -> Any:
        yield self.batch

    def __len__(self) -> int:
        return 1


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b.to(a)))
