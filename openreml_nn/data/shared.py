"""A mixed model over a Parquet table that each of several processes reads only its rows of.

Before the processes are there, `SharedTable.V` has V's parameters; when they are, `SharedTable.share` reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from openreml_nn.data.coding import Coding
from openreml_nn.data.columns import is_coded, tidy
from openreml_nn.data.model import MixedModel
from openreml_nn.data.row_groups import LevelScan, RowGroups, read_in_order, require_same_columns
from openreml_nn.data.shards import require_rows, sharing_text
from openreml_nn.data.specification import Specification
from openreml_nn.data.tables import TableLike
from openreml_nn.data.terms import Term, TermLike
from openreml_nn.solvers import ALONE, Choice, Ranks, Solver, choose_shared, choose_solver
from openreml_nn.solvers.auto import costs_more
from openreml_nn.solvers.blocks import BlockSolver, are_small
from openreml_nn.solvers.mixed_model_equations import MixedModelEquationsSolver


@dataclass(frozen=True)
class Share:
    """What a process has of a model.

    Attributes:
        model: The model of its rows, or of all rows.
        ranks: The processes that share the rows; `ALONE` where each has all of them.
        text: How they are shared, in words.
        choice: The solver.
    """

    model: MixedModel
    ranks: Ranks
    text: str
    choice: Choice


class SharedTable:
    """The specification of a mixed model over a Parquet table.

    Args:
        table: Path of the table.
        fixed: As `MixedModel` has it, without functions of all rows such as ``scale``.
        random: As `MixedModel` has it.
        residual: As `MixedModel` has it.
        missing: As `MixedModel` has it.

    Attributes:
        specification: The formula and the terms.
        columns: Columns of the table that the model uses.
        coding: Levels and codings of rows that have every level on which a parameter of V depends; not those of others.
        V: The covariance of these rows, with the parameters of the model's.

    Raises:
        TypeError: A term is none.
        ValueError: The table is no Parquet file, or the formula or a term cannot be used.
    """

    def __init__(
        self,
        table: str | Path,
        fixed: str,
        random: Mapping[str, TermLike] | Sequence[str | list[str]] | str | None = None,
        residual: Mapping[str, Term] | Term | None = None,
        missing: str = "error",
    ) -> None:
        self.table, self.missing = table, missing
        self.specification = Specification(fixed, random, residual)
        groups = RowGroups(table)
        empty = groups.empty()
        self.columns = self.specification.columns(empty)
        related = [name for name, term in self.specification.terms.items() if term.relationship is not None]
        coded = [column for columns in self.specification.level_columns(empty, related) for column in columns]
        records = self.specification.records(_rows_with_levels(groups, coded), "drop")
        self.coding = Coding(self.specification, tidy(records.frame))
        self.V = self.coding.covariance(self.coding.frame, records.positions)

    def share(self, solver: str | Solver, ranks: Ranks) -> Share:
        """Read the rows of this process; all processes call this.

        Args:
            solver: The solver that was asked for.
            ranks: The processes.

        Raises:
            ValueError: On all processes together, where the tables differ or the model cannot be used.
        """
        table = ranks.together(lambda: RowGroups(self.table))
        require_same_columns(table, ranks)
        require_rows(table.n, ranks.size)
        asked = solver if isinstance(solver, str) else solver.name
        if ranks.size > 1:
            found = self._rows_for_equations(table, asked, ranks)
            if found is not None:
                model, sharing = self._model_of_rows(*found, ranks)
                if asked != "auto" or not costs_more(model.V, sharing):
                    return _share(model, sharing, solver)
            found = self._rows_for_blocks(table, asked, ranks)
            if found is not None:
                return _share(*self._model_of_rows(*found, ranks), solver)
        model = ranks.together(lambda: self._model(table.path))
        text = f"{ranks.size} processes; each has all {len(model.y)} rows" if ranks.size > 1 else ""
        return Share(model, ALONE, text, choose_solver(model.V, solver))

    def _model(self, table: TableLike, **sharing: Any) -> MixedModel:
        given = self.specification
        return MixedModel(table, given.fixed, given.random, given.residual, self.missing, **sharing)

    def _model_of_rows(self, rows: pd.DataFrame, own: list[str], ranks: Ranks) -> tuple[MixedModel, Ranks]:
        """The model of rows of this process, and the processes with the terms of which each has levels of its own."""
        return self._model(rows, ranks=ranks, own=own), ranks.owning(own)

    def _separate(self) -> dict[str, list[str]]:
        """Columns of the groups of the terms whose groups may be on different processes."""
        return {name: own.group_columns for name, own in self.coding.correlated.items() if own.separate}

    def _rows_for_equations(self, table: RowGroups, asked: str, ranks: Ranks) -> tuple[pd.DataFrame, list[str]] | None:
        """The rows of this process for the mixed-model equations, and the terms of which it has levels of its own.

        The groups of the term with the most effects stay whole. None where this solver was not asked for, or no term
        has groups that may be on different processes.
        """
        equations, terms, separate = MixedModelEquationsSolver(), self.coding.correlated, self._separate()
        if asked not in ("auto", equations.name) or equations.refusal(self.V) is not None or (terms and not separate):
            return None
        if not terms:
            return read_in_order(table, self.columns, ranks), []
        scan = LevelScan(table, separate, ranks)
        sizes = {name: own.size for name, own in terms.items()}
        sizes |= {name: scan.count(name) * len(terms[name].effects) for name in separate}
        largest = max(separate, key=lambda name: sizes[name])
        owners = scan.owners([largest])
        if owners is None:
            return read_in_order(table, self.columns, ranks), []
        return scan.read(owners, self.columns), [largest]

    def _rows_for_blocks(self, table: RowGroups, asked: str, ranks: Ranks) -> tuple[pd.DataFrame, list[str]] | None:
        """The rows of this process for blocks, and the terms that link them; None where they cannot be shared so."""
        separate, linking = self._separate(), BlockSolver().whole_terms(self.V)
        if asked not in ("auto", BlockSolver.name) or not linking or set(linking) != set(separate):
            return None
        scan = LevelScan(table, separate, ranks)
        owners = scan.owners(linking)
        if owners is None or not are_small(scan.largest_block(linking), table.n):
            return None
        return scan.read(owners, self.columns), linking


def _share(model: MixedModel, ranks: Ranks, solver: str | Solver) -> Share:
    text = sharing_text(ranks.objects(len(model.y)), " and ".join(ranks.own) or "rows")
    return Share(model, ranks, text, choose_shared(model.V, solver, ranks))


def _rows_with_levels(table: RowGroups, coded: list[str]) -> pd.DataFrame:
    """Rows that have every combination of the values of some columns, and in the others a few values, in pairs."""
    known = table.distinct(list(dict.fromkeys(coded))) if coded else pd.DataFrame(index=range(6))
    known = pd.concat([known] * (1 if len(known) > 5 else 6), ignore_index=True)
    pair = np.arange(len(known)) // 2
    for name, column in table.empty().items():
        if name not in known:
            known[name] = pair.astype(str) if is_coded(column) else pair + 1.0
    return known
