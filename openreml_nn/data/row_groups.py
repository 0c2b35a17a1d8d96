"""The rows of one of several processes from a Parquet table, by reading the row groups that have them.

Who gets which rows is settled by the columns of the levels that stay whole: each process scans them in its part of the
row groups, and tells the others which levels there are, with how many rows.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from openreml_nn.data.shards import assign, require_same
from openreml_nn.data.tables import find_table
from openreml_nn.solvers.block_pattern import blocks_of_rows
from openreml_nn.solvers.ranks import Ranks


class RowGroups:
    """A Parquet table that is read by row groups.

    Args:
        source: Its path, or the name of a bundled table.

    Raises:
        ValueError: There is no such table, or it is no Parquet file.
    """

    def __init__(self, source: str | Path) -> None:
        self.path = find_table(source)
        if not self.path.name.lower().endswith(".parquet"):
            raise ValueError(f"Only a Parquet table can be read in parts, got {self.path.name!r}. Convert it.")
        self._file = pq.ParquetFile(self.path)
        meta = self._file.metadata
        self.sizes = np.array([meta.row_group(i).num_rows for i in range(meta.num_row_groups)], dtype=np.int64)

    @property
    def columns(self) -> dict[str, str]:
        """Names of the columns and their types."""
        return {field.name: str(field.type) for field in self._file.schema_arrow}

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.sizes.sum())

    def empty(self) -> pd.DataFrame:
        """The table without rows."""
        return self._file.schema_arrow.empty_table().to_pandas()

    def read(self, groups: Sequence[int], columns: Sequence[str]) -> pd.DataFrame:
        """Some columns of some row groups, in the order of the table."""
        table = self._file.read_row_groups(sorted(groups), columns=list(columns), use_threads=False)
        return table.to_pandas().reset_index(drop=True)

    def distinct(self, columns: Sequence[str]) -> pd.DataFrame:
        """The combinations of values that the columns have in the table, in the order of their first rows."""
        found: list[pd.DataFrame] = []
        for group in range(len(self.sizes)):
            found = [pd.concat([*found, self.read([group], columns).drop_duplicates()]).drop_duplicates()]
        return found[0].reset_index(drop=True) if found else self.empty()[list(columns)]


def require_same_columns(table: RowGroups, ranks: Ranks) -> None:
    """Raise a ValueError on all processes where their tables have other columns, rows, or row groups."""
    require_same(table.columns, table.n, table.sizes.tolist(), "it has other row groups", ranks)


def read_in_order(table: RowGroups, columns: Sequence[str], ranks: Ranks) -> pd.DataFrame:
    """The rows of this process where each has as many as the others, in the order of the table."""
    n = table.n
    first, last = (-(-place * n // ranks.size) for place in (ranks.rank, ranks.rank + 1))
    ends = np.cumsum(table.sizes)
    groups = np.flatnonzero((ends > first) & (ends - table.sizes < last))
    offset = int((ends - table.sizes)[groups[0]])
    rows = ranks.together(lambda: table.read(groups.tolist(), columns)).iloc[first - offset : last - offset]
    return rows.set_axis(pd.RangeIndex(first, last))


class LevelScan:
    """Which levels a Parquet table has, and how many rows of each; all processes make one.

    Args:
        table: The table.
        terms: Columns of the groups of each term.
        ranks: The processes.

    Attributes:
        levels: Combinations of the columns, a row each, sorted; the column ``rows`` counts their rows.
    """

    def __init__(self, table: RowGroups, terms: dict[str, list[str]], ranks: Ranks) -> None:
        self.table, self.terms, self.ranks = table, terms, ranks
        self.columns = list(dict.fromkeys(column for columns in terms.values() for column in columns))
        mine = np.array_split(np.arange(len(table.sizes)), ranks.size)[ranks.rank]
        self._own = ranks.together(lambda: {int(i): self._count(table.read([i], self.columns)) for i in mine})
        self.levels = self._sum(ranks.objects(self._sum(list(self._own.values()))))

    def _count(self, rows: pd.DataFrame) -> pd.DataFrame:
        counted = rows.groupby(self.columns, sort=False, observed=True, dropna=False).size()
        return counted.rename("rows").reset_index()

    def _sum(self, parts: list[pd.DataFrame]) -> pd.DataFrame:
        if not parts:
            return self._count(self.table.empty()[self.columns])
        grouped = pd.concat(parts, ignore_index=True).groupby(self.columns, observed=True, dropna=False)
        return grouped["rows"].sum().reset_index()

    def codes(self, term: str) -> np.ndarray:
        """Number of the level of a term in each combination, in the order of its levels."""
        return self.levels.groupby(self.terms[term], observed=True, dropna=False).ngroup().to_numpy()

    def count(self, term: str) -> int:
        """Number of levels of a term."""
        return int(self.codes(term).max()) + 1

    def owners(self, terms: Sequence[str]) -> np.ndarray | None:
        """Process of each combination, the levels of some terms whole; None where there are fewer than processes."""
        return assign([self.codes(term) for term in terms], self.ranks.size, self.levels["rows"].to_numpy())

    def largest_block(self, terms: Sequence[str]) -> int:
        """Rows of the largest block that some terms link."""
        block = blocks_of_rows(len(self.levels), [self.codes(term) for term in terms])
        return int(np.bincount(block, weights=self.levels["rows"]).max())

    def read(self, owners: np.ndarray, columns: Sequence[str]) -> pd.DataFrame:
        """The rows of this process: those of its levels, in the order of the table."""
        owned = self.levels[self.columns].assign(owner=owners)
        having = {group: np.unique(self._owner_of(counted, owned)) for group, counted in self._own.items()}
        groups = [
            group for part in self.ranks.objects(having) for group, found in part.items() if self.ranks.rank in found
        ]
        return self.ranks.together(lambda: self._read(sorted(groups), owned, list(columns)))

    def _read(self, groups: list[int], owned: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
        """The rows of this process in some row groups."""
        starts, parts = np.cumsum(self.table.sizes) - self.table.sizes, []
        for group in groups:
            rows = self.table.read([group], [*dict.fromkeys([*columns, *self.columns])])
            rows.index = pd.RangeIndex(starts[group], starts[group] + len(rows))
            mine = self._owner_of(rows, owned) == self.ranks.rank
            parts.append(rows.loc[mine, columns])
        return pd.concat(parts) if parts else self.table.empty()[columns]

    def _owner_of(self, rows: pd.DataFrame, owned: pd.DataFrame) -> np.ndarray:
        return rows[self.columns].merge(owned, how="left", on=self.columns)["owner"].to_numpy()
