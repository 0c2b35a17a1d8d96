"""A mixed model over a Parquet table that each of several processes reads only its rows of.

Before the processes are there, `SharedTable.outline` has V's parameters; when they are, `SharedTable.share` reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from openreml_nn.data.columns import is_coded
from openreml_nn.data.effects import coded_columns, columns_of_term
from openreml_nn.data.formulas import columns_of, parse_fixed
from openreml_nn.data.model import FIXED, MixedModel
from openreml_nn.data.row_groups import LevelScan, RowGroups, read_in_order, require_same_columns
from openreml_nn.data.shards import require_rows, sharing_text
from openreml_nn.data.specification import named_terms
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

    Raises:
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
        self.model = (fixed, named_terms(random), residual)
        groups = RowGroups(table)
        terms = self.model[1] | (dict(residual) if isinstance(residual, Mapping) else {"residual": residual or Term()})
        empty = groups.empty()
        left, right = parse_fixed(fixed, empty)
        used = [*columns_of(left, empty, "the response"), *columns_of(right, empty, FIXED)]
        coded: list[str] = []
        for name, term in terms.items():
            used += columns_of_term(name, term, empty)
            of_term = coded_columns(term, empty, name, groups=term.relationship is not None)
            coded += [column for columns in of_term for column in columns]
        self.columns = list(dict.fromkeys(used))
        self.outline = MixedModel.outline(_rows_with_levels(groups, coded), *self.model)

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
        equations = MixedModelEquationsSolver()
        able = asked in ("auto", equations.name) and equations.refusal(self.outline.V) is None
        for by_equations in () if ranks.size == 1 else (True, False) if able else (False,):
            found = self._rows(table, asked, ranks, by_equations)
            if found is None:
                continue
            rows, own = found
            model, sharing = MixedModel.of_share(rows, *self.model, self.missing, own, ranks), ranks.owning(own)
            if by_equations and asked == "auto" and costs_more(model.V, sharing):
                continue
            text = sharing_text(ranks.objects(len(model.y)), " and ".join(own) or "rows")
            return Share(model, sharing, text, choose_shared(model.V, solver, sharing))
        model = ranks.together(lambda: MixedModel(table.path, *self.model, self.missing))
        text = f"{ranks.size} processes; each has all {len(model.y)} rows" if ranks.size > 1 else ""
        return Share(model, ALONE, text, choose_solver(model.V, solver))

    def _rows(
        self, table: RowGroups, asked: str, ranks: Ranks, by_equations: bool
    ) -> tuple[pd.DataFrame, list[str]] | None:
        """The rows of this process and the terms of which it has levels of its own, for the mixed-model equations or
        for blocks; None where that solver was not asked for, or rows cannot be shared for it."""
        V, terms = self.outline.V, self.outline.correlated
        separate = {name: own.groups.columns for name, own in terms.items() if own.separate and own.groups is not None}
        if by_equations and not terms:
            return read_in_order(table, self.columns, ranks), []
        if not separate:
            return None
        scan = LevelScan(table, separate, ranks)
        sizes = {name: own.size for name, own in terms.items()}
        sizes |= {name: scan.count(name) * len(terms[name].effects) for name in separate}
        first = max(separate, key=lambda name: sizes[name])
        if by_equations:
            owners = scan.owners([first])
            return (read_in_order(table, self.columns, ranks), []) if owners is None else (
                scan.read(owners, self.columns), [first])  # fmt: skip
        linking = BlockSolver().whole_terms(V)
        if asked in ("auto", BlockSolver.name) and linking and set(linking) == set(separate):
            owners = scan.owners(linking)
            if owners is not None and are_small(scan.largest_block(linking), table.n):
                return scan.read(owners, self.columns), linking
        return None


def _rows_with_levels(table: RowGroups, coded: list[str]) -> pd.DataFrame:
    """Rows that have every combination of the values of some columns, and in the others a few values, in pairs."""
    known = table.distinct(list(dict.fromkeys(coded))) if coded else pd.DataFrame(index=range(6))
    known = pd.concat([known] * (1 if len(known) > 5 else 6), ignore_index=True)
    pair = np.arange(len(known)) // 2
    for name, column in table.empty().items():
        if name not in known:
            known[name] = pair.astype(str) if is_coded(column) else pair + 1.0
    return known
