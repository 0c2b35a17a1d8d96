"""Known relationships between the levels of a factor, from a labelled matrix: pedigree A, genomic G, any kernel."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import KnownMatrix, Levels
from openreml_nn.covariance.structures.known import check_kernel
from openreml_nn.data.tables import EXACT, find_table


class Kernel:
    r"""A labelled matrix K; called with levels it is the covariance σ² K over them, in their order.

    As the ``relationship`` of a `Term` it brings its own levels: all of its labels, in its order, also those without a
    record. The order of K therefore need not be that of the table, and BLUPs come out for every label.

    Args:
        source: Path to .csv, .csv.gz or .parquet whose first column holds the row labels and whose header holds the
            column labels; the name of a bundled table; or a DataFrame with row labels in its index, or in its first
            column where its index only counts rows.
        name: What errors call it; the file's name when left out.

    Raises:
        TypeError: The source has no labels, as an array.
        ValueError: K is not square, not symmetric, not positive semi-definite or not finite; labels repeat; row labels
            are not the column labels in the same order.

    Example:
        >>> from openreml_nn.data import Kernel
        >>> len(Kernel("gblup150_K").labels)
        150
    """

    labels: list[str]
    K: Tensor

    def __init__(self, source: str | Path | pd.DataFrame, name: str | None = None) -> None:
        if not isinstance(source, (str, Path, pd.DataFrame)):
            raise TypeError(
                f"`Kernel` needs the labels of its rows: a DataFrame with them in its index and header, or a file, got "
                f"{type(source).__name__}. Give pandas.DataFrame(K, index=labels, columns=labels)."
            )
        self.name = name or ("K" if isinstance(source, pd.DataFrame) else Path(source).name)
        self.labels, values = _labelled(source, self.name)
        self.K = check_kernel(torch.tensor(values), self.name)

    def __call__(self, levels: Levels) -> KnownMatrix:
        """σ² K over ``levels``, in their order.

        Raises:
            ValueError: A level is not in the kernel; it is named.
        """
        if levels.labels == self.labels:
            return KnownMatrix(self.K, checked=True)
        place = {label: i for i, label in enumerate(self.labels)}
        self.require(levels.labels)
        index = torch.tensor([place[label] for label in levels.labels])
        return KnownMatrix(self.K[index][:, index], checked=True)

    def require(self, labels: list[str]) -> None:
        """Raise a ValueError that names the labels that are not in the kernel, if there are any."""
        known = set(self.labels)
        missing = [label for label in labels if label not in known]
        if missing:
            raise ValueError(
                f"The kernel {self.name} has no row for {len(missing)} level{'s' * (len(missing) > 1)} of the data "
                f"({_some(missing)}); its labels are {_some(self.labels)}. Add them to the kernel, or leave their "
                f"records out."
            )

    def __repr__(self) -> str:
        return f"Kernel({self.name!r}, {len(self.labels)} labels)"


def _labelled(source: str | Path | pd.DataFrame, name: str) -> tuple[list[str], np.ndarray]:
    """Labels and values of a kernel, of which only shape and labels are checked."""
    rows, columns, frame = _parts(source)
    if len(rows) != frame.shape[1]:
        raise ValueError(
            f"The kernel {name} must be square, got {len(rows)} rows and {frame.shape[1]} columns beside the labels. "
            f"The first column must hold the row labels."
        )
    for kind, labels in (("row", rows), ("column", columns)):
        twice = [label for label, count in Counter(labels).items() if count > 1]
        if twice:
            raise ValueError(f"The kernel {name} has {kind} labels that repeat: {_some(twice)}. Labels must be unique.")
    known = set(columns)
    if set(rows) != known:
        strange = [label for label in rows if label not in known]
        raise ValueError(
            f"The kernel {name} needs the same labels on rows and columns; {_some(strange)} "
            f"{'is a row' if len(strange) == 1 else 'are rows'} without a column."
        )
    if rows != columns:
        at = next(i for i, pair in enumerate(zip(rows, columns, strict=True)) if pair[0] != pair[1])
        raise ValueError(
            f"The kernel {name} has its rows in another order than its columns (row {at + 1} is {rows[at]!r}, column "
            f"{at + 1} is {columns[at]!r}). Put both in one order."
        )
    try:
        return rows, frame.to_numpy(dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"The kernel {name} holds values that are not numbers.") from None


def _parts(source: str | Path | pd.DataFrame) -> tuple[list[str], list[str], pd.DataFrame]:
    """Row labels, column labels, and the rest. CSV is read without header, so that labels that repeat are seen."""
    if not isinstance(source, pd.DataFrame):
        path = find_table(source)
        if path.name.lower().endswith(".parquet"):
            source = pd.read_parquet(path)
        else:
            header = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
            frame = pd.read_csv(path, header=None, skiprows=1, dtype={0: str}, keep_default_na=False, **EXACT)
            return frame.iloc[:, 0].tolist(), header[1:], frame.iloc[:, 1:]
    columns = [str(column) for column in source.columns]
    if len(source) == len(columns) or not isinstance(source.index, pd.RangeIndex):
        return [str(label) for label in source.index], columns, source
    return [str(label) for label in source.iloc[:, 0]], columns[1:], source.iloc[:, 1:]


def _some(labels: list[str]) -> str:
    return ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
