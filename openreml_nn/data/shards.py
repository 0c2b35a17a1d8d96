"""Which rows of a table each of several processes gets.

Levels stay whole where the solver needs them whole: the blocks of rows that they link are cut, in the order of the
levels, into runs of about as many rows each.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from openreml_nn.covariance import CovariancePropagation, Sum
from openreml_nn.covariance.structures import IncidenceMatrix
from openreml_nn.data.model import MixedModel
from openreml_nn.solvers.block_pattern import blocks_of_rows
from openreml_nn.solvers.ranks import Ranks


@dataclass(frozen=True)
class Shards:
    """The rows of each process.

    Attributes:
        owner: Process of each row, shape (n,).
        own: Names of the terms of which each process has levels of its own.
        by: What was kept whole, in words; ``"rows"`` for nothing.
    """

    owner: np.ndarray
    own: list[str]
    by: str

    def text(self, size: int) -> str:
        """``"2 processes; 36 + 36 rows by gen"``."""
        return sharing_text(np.bincount(self.owner, minlength=size).tolist(), self.by)


def sharing_text(counts: Sequence[int], by: str) -> str:
    """How the rows are shared, in words, from the number of rows of each process."""
    few = len(counts) <= 8
    told = " + ".join(map(str, counts)) if few else f"{min(counts)} to {max(counts)} of {sum(counts)}"
    return f"{len(counts)} processes; {told} rows " + ("in their order" if by == "rows" else f"by {by}")


def share_rows(model: MixedModel, whole: Sequence[str], size: int, may_tear: bool) -> Shards | None:
    """Which rows each of ``size`` processes gets.

    Args:
        model: The model of all rows.
        whole: Terms whose levels must be whole on a process.
        size: Number of processes.
        may_tear: Whether levels may be torn where there are too few of them.

    Returns:
        The rows; None where the levels cannot be shared, so that each process needs all rows.

    Raises:
        ValueError: There are more processes than rows.
    """
    n = len(model.y)
    require_rows(n, size)
    if whole:
        owner = assign([_codes(model, name) for name in whole], size)
        if owner is not None:
            own = [name for name in whole if model.correlated[name].separate]
            return Shards(owner, own, " and ".join(whole))
        if not may_tear:
            return None
    return Shards(np.arange(n) * size // n, [], "rows")


def require_rows(n: int, size: int) -> None:
    """Raise a ValueError where there are more processes than rows."""
    if n < size:
        raise ValueError(f"{size} processes cannot share {n} row{'s' * (n > 1)}. Take at most {n}.")


def assign(codes: list[np.ndarray], size: int, counts: np.ndarray | None = None) -> np.ndarray | None:
    """Process of each of some rows, so that each level is on one process, in the order of the first term's levels.

    Args:
        codes: Level of each row in each of some terms, shape (n,); −1 for none.
        size: Number of processes.
        counts: Number of records that each row stands for, shape (n,); one where left out.

    Returns:
        Shape (n,); None where the terms link the rows into fewer blocks than there are processes.
    """
    block = blocks_of_rows(len(codes[0]), codes)
    last = codes[0].max() + 1  # the place of rows without a level
    first = np.full(block.max() + 1, last)
    np.minimum.at(first, block, np.where(codes[0] < 0, last, codes[0]))
    order = np.argsort(first, kind="stable")
    if len(order) < size:
        return None
    run = np.empty(len(order), dtype=np.int64)
    run[order] = runs(np.bincount(block, weights=counts).astype(np.int64)[order], size)
    return run[block]


def runs(counts: np.ndarray, size: int) -> np.ndarray:
    """Run of each of some blocks in order, none of the runs empty, with about as many rows in each.

    Example:
        >>> import numpy as np
        >>> from openreml_nn.data.shards import runs
        >>> runs(np.array([3, 3, 3, 9, 1]), 3).tolist()
        [0, 0, 1, 2, 2]
    """
    ends, blocks = np.cumsum(counts), len(counts)
    cuts = [0]
    for run in range(1, size):
        wanted = run * ends[-1] / size
        place = int(np.searchsorted(ends, wanted))  # the cut is before or after this block, whichever is nearer
        nearer = place + (2 * wanted > 2 * ends[place] - counts[place])
        cuts.append(min(max(nearer, cuts[-1] + 1), blocks - (size - run)))
    return np.repeat(np.arange(size), np.diff([*cuts, blocks]))


def require_same_table(model: MixedModel, ranks: Ranks) -> None:
    """Raise a ValueError on all processes where they have read different tables; the message says in what."""
    frame = model.frame
    columns = {str(name): str(frame[name].dtype.name) for name in frame.columns}
    digest = hashlib.sha256(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes()).hexdigest()
    require_same(columns, len(frame), digest, "some of its values differ", ranks)


def require_same(columns: dict[str, str], rows: int, content: Any, otherwise: str, ranks: Ranks) -> None:
    """Raise a ValueError on all processes where their tables differ.

    Args:
        columns: Type of each column.
        rows: Number of rows.
        content: What else must be the same.
        otherwise: What is said where it is not.
        ranks: The processes.
    """
    tables = ranks.objects((columns, rows, content))
    first, n, expected = tables[0]
    for place, (other, count, found) in enumerate(tables):
        differ = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if differ:
            said = "its column " + "; ".join(f"{name!r} is {other.get(name)}, not {first.get(name)}" for name in differ)
        elif count != n:
            said = f"it has {count} rows, not {n}"
        elif found != expected:
            said = otherwise
        else:
            continue
        raise ValueError(
            f"Process {place + 1} of {ranks.size} has another table than process 1: {said}. Give all processes the "
            f"same file."
        )


def _codes(model: MixedModel, name: str) -> np.ndarray:
    """Level of each row in a term of V."""
    assert isinstance(model.V, Sum)
    operand = model.V.operand(name)
    assert isinstance(operand, CovariancePropagation)
    assert isinstance(operand.Z, IncidenceMatrix)
    return operand.Z.codes.cpu().numpy()
