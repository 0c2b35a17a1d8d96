"""Levels of columns: from rows to codes, for the table of the fit and for new rows."""

import math
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import pandas as pd

from openreml_nn.covariance import Levels
from openreml_nn.data.columns import is_factor

_UNKNOWN = "\x00unknown"
SPREAD = 4  # combinations that are marked one by one, for each row


class Factor:
    """Observed combinations of the values of one or more columns, as ordered levels.

    The first column is the slowest index. Levels of a numeric column are in the order of its values, those of a factor
    in the order of its categories. A label joins the values by ``:``.

    Args:
        columns: Names of the columns.
        frame: Tidy columns of the table.
        labels: Labels in the order wanted, a superset of those observed; the observed ones when left out.

    Attributes:
        labels: One for each level.
        observed: Labels of the levels that have a record.

    Raises:
        ValueError: Two combinations have the same label.
    """

    def __init__(self, columns: Sequence[str], frame: pd.DataFrame, labels: Sequence[str] | None = None) -> None:
        self.columns = list(columns)
        self._uniques = [_uniques(frame[column]) for column in self.columns]
        sizes = [len(unique) for unique in self._uniques]
        self._cells = _distinct(_joint(self._column_codes(frame), sizes), math.prod(sizes))
        digits = np.unravel_index(self._cells, sizes)
        parts = [_texts(unique[digit]) for unique, digit in zip(self._uniques, digits, strict=True)]
        self.observed = parts[0] if len(parts) == 1 else [":".join(part) for part in zip(*parts, strict=True)]
        if len(set(self.observed)) != len(self.observed):
            twice = next(label for label in self.observed if self.observed.count(label) > 1)
            raise ValueError(f"Columns {self.columns} have two combinations with the label {twice!r}. Rename a level.")
        self.labels, self._place = self.observed, np.arange(len(self.observed))
        if labels is not None:
            self.labels = list(labels)
            place = {label: i for i, label in enumerate(self.labels)}
            self._place = np.array([place[label] for label in self.observed], dtype=np.int64)
        self._numeric = labels is None and not any(is_factor(frame[column]) for column in self.columns)
        self._values = [unique.to_numpy()[digit] for unique, digit in zip(self._uniques, digits, strict=True)]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def name(self) -> str:
        """The columns joined by ``:``."""
        return ":".join(self.columns)

    @property
    def levels(self) -> Levels:
        """The levels for a structure, with values of shape (n,) or (n, d) where all columns are numeric."""
        if not self._numeric:
            return Levels(self.labels)
        return Levels(self.labels, self._values[0] if len(self._values) == 1 else np.stack(self._values, axis=1))

    def codes(self, frame: pd.DataFrame) -> np.ndarray:
        """Level of each row, shape (n,); −1 where it is missing or was not seen in the fit."""
        codes = self._column_codes(frame)
        both = _joint(codes, [len(unique) for unique in self._uniques])
        known = np.all([code >= 0 for code in codes], axis=0)
        at = both
        if len(self._cells) < math.prod(len(unique) for unique in self._uniques):  # else a cell is its own place
            at = np.searchsorted(self._cells, both).clip(max=len(self._cells) - 1)
            known &= self._cells[at] == both
        found = np.where(known, self._place[at], -1)
        if len(self.labels) > len(self.observed) and not known.all():
            found[~known] = self._codes_by_label(frame[self.columns][~known])
        return found

    def only(self, frame: pd.DataFrame) -> tuple["Factor", np.ndarray]:
        """The factor with the levels that some rows of its table have, and their places among all its levels.

        Its levels must be those observed, without further labels.
        """
        kept = np.unique(self.codes(frame))
        kept = kept[kept >= 0]
        part = copy(self)
        part._cells, part._values = self._cells[kept], [value[kept] for value in self._values]
        part.labels = part.observed = [self.labels[place] for place in kept]
        part._place = np.arange(len(kept))
        return part, kept

    def _codes_by_label(self, rows: pd.DataFrame) -> np.ndarray:
        """Codes of rows whose level may be one that has no record in the fit."""
        texts = [[_UNKNOWN if pd.isna(value) else _text(value) for value in rows[column]] for column in self.columns]
        place = {label: i for i, label in enumerate(self.labels)}
        return np.array([place.get(":".join(parts), -1) for parts in zip(*texts, strict=True)], dtype=np.int64)

    def _column_codes(self, frame: pd.DataFrame) -> list[np.ndarray]:
        return [_codes(frame[column], unique) for column, unique in zip(self.columns, self._uniques, strict=True)]


def _uniques(column: pd.Series) -> pd.Index:
    return column.cat.categories if is_factor(column) else pd.Index(np.sort(pd.unique(column.to_numpy())))


def _codes(column: pd.Series, unique: pd.Index) -> np.ndarray:
    if is_factor(column) and column.cat.categories.equals(unique):
        return column.cat.codes.to_numpy(np.int64)
    return unique.get_indexer(pd.Index(column.astype(object) if is_factor(column) else column)).astype(np.int64)


def _joint(codes: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """One number for each combination of codes, the first the slowest."""
    joint = np.zeros(len(codes[0]), dtype=np.int64)
    for code, size in zip(codes, sizes, strict=True):
        joint = joint * size + code.clip(min=0)
    return joint


def _distinct(cells: np.ndarray, count: int) -> np.ndarray:
    """The numbers below ``count`` that occur, in order; by marks where these are few."""
    if count > SPREAD * len(cells):
        return np.unique(cells)
    seen = np.zeros(count, dtype=bool)
    seen[cells] = True
    return np.flatnonzero(seen)


def _texts(values: pd.Index) -> list[str]:
    if pd.api.types.is_integer_dtype(values.dtype):
        return list(map(str, values.tolist()))
    return [value if type(value) is str else _text(value) for value in values.tolist()]


def _text(value: Any) -> str:
    """Text of a value; a whole number without a decimal point, however the column is stored."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
