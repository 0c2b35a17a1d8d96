"""A mixed model over a table: y, X and V from a formula and named terms, and the same designs for new rows.

Everything that can be wrong with a table is found here, before a likelihood is evaluated, and told as one error that
names the column or the term.
"""

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import IncidenceMatrix, Matrix, Sum
from openreml_nn.data.columns import complete_rows, log, require_columns, tidy, tidy_like
from openreml_nn.data.effects import Effects, coded_columns, columns_of_term
from openreml_nn.data.factors import Factor
from openreml_nn.data.formulas import (
    columns_of,
    design,
    levels_in,
    parse_design,
    parse_fixed,
    require_row_by_row,
    response,
)
from openreml_nn.data.residual import Residual, check_residual, is_plain
from openreml_nn.data.specification import check_names, check_random, named_terms
from openreml_nn.data.tables import TableLike, read_table
from openreml_nn.data.terms import Term, TermLike
from openreml_nn.solvers.ranks import ALONE, Ranks

FIXED = "the fixed formula"


@dataclass(frozen=True)
class NewRows:
    """Designs of new rows.

    Attributes:
        X: Design of the fixed effects, shape (m, p).
        Z: Design of the random effects of each term, shape (m, q); rows of zeros for unknown levels.
        known: Whether the level of each row was in the fit, shape (m,), for each term.
        unseen: The other way round: unknown levels at the first level of the fit, rows of zeros for known ones. It
            gives an unknown level the variance of the first one.
    """

    X: Tensor
    Z: dict[str, IncidenceMatrix]
    known: dict[str, Tensor]
    unseen: dict[str, IncidenceMatrix]


class MixedModel:
    r"""y = Xβ + Σ Z_i b_i + ε over a table: ``y``, ``X`` and the covariance ``V`` of the rows.

    Args:
        table: A DataFrame, a path to CSV or Parquet, or the name of a bundled table; one row per record.
        fixed: Wilkinson formula of response and fixed effects, ``"yield ~ rep"``; treatment coding, first level as
            reference.
        random: Random terms by name; a column or list of columns is short for `Term` with these groups. A list of
            such short forms gives each a term of its name, ``["rep", "block"]`` that of ``"rep:block"``.
        residual: One residual term, several by name, or None for σ² I.
        missing: ``"error"``: missing values are an error; ``"drop"``: their rows are left out, counted and logged.

    Attributes:
        y: Response, float64, shape (n,); values of another type are converted, which is logged once.
        X: Design of the fixed effects, float64, shape (n, p); it may be rank deficient.
        x_names: Names of the columns of X.
        V: Covariance of y: a sum with an operand for each random term, then ``residual`` or the named residual terms.
        response: Name of the response.
        rows: Labels of the rows that were kept, from the table's index.
        dropped: Number of rows that were dropped.

    Raises:
        ValueError: The table, the formula or a term cannot be used; the message names the column or term.

    Example:
        >>> from openreml_nn.data import MixedModel
        >>> model = MixedModel("john_alpha", "yield ~ rep", random=["gen", "rep:block"])
        >>> model.V.natural_names
        ['gen/sigma^2', 'rep:block/sigma^2', 'residual/sigma^2']
    """

    y: Tensor
    X: Tensor
    V: Matrix
    effects: dict[str, Effects]
    _residuals: dict[str, Residual]

    def __init__(
        self,
        table: TableLike,
        fixed: str,
        random: Mapping[str, TermLike] | Sequence[str | list[str]] | str | None = None,
        residual: Mapping[str, Term] | Term | None = None,
        missing: str = "error",
    ) -> None:
        whole = read_table(table)
        if len(whole) == 0:
            raise ValueError("The table has no rows.")
        chosen, keep = self._specify(whole, fixed, random, residual, missing)
        self._positions = np.flatnonzero(keep)
        frame = tidy(chosen[keep])
        self._learn(frame)
        self._fill(frame)
        self._check(len(frame), {})
        check_residual(self.residual, frame)
        if bool((self.y == self.y[0]).all()):
            raise ValueError(_constant(self.response, float(self.y[0]), len(frame)))

    @classmethod
    def of_share(
        cls,
        table: pd.DataFrame,
        fixed: str,
        random: Mapping[str, TermLike] | Sequence[str | list[str]] | str | None,
        residual: Mapping[str, Term] | Term | None,
        missing: str,
        own: Collection[str],
        ranks: Ranks,
    ) -> "MixedModel":
        """The model of a table of which each of several processes has read some rows; all of them call this.

        They exchange rows that together have every level, but for the groups of the terms in ``own``, and learn the
        coding from them.

        Args:
            table: The rows of this process.
            fixed: As for the class, without functions of all rows such as ``scale``.
            random: As for the class.
            residual: As for the class.
            missing: As for the class.
            own: Independent terms whose groups have all their records on one process; V gets those of this process.
            ranks: The processes.

        Raises:
            ValueError: As for the class, on all processes together.
        """
        model = cls.__new__(cls)
        chosen, keep = ranks.together(lambda: model._specify(table, fixed, random, residual, missing))
        kept = chosen[keep].reset_index(drop=True)
        few = kept[ranks.together(lambda: model._representatives(kept, own))]
        coding = pd.concat(ranks.objects(few), ignore_index=True)
        ranks.together(lambda: model._learn_share(tidy(coding), kept, own))
        counts = {name: ranks.count(len(model.correlated[name].groups.observed)) for name in own}  # type: ignore[union-attr]
        model._check(ranks.count(len(kept)), counts)
        least, most = (-float(ranks.largest(-model.y.min())), float(ranks.largest(model.y.max())))
        if least == most:
            raise ValueError(_constant(model.response, most, ranks.count(len(kept))))
        return model

    @classmethod
    def outline(
        cls,
        table: pd.DataFrame,
        fixed: str,
        random: Mapping[str, TermLike] | Sequence[str | list[str]] | str | None,
        residual: Mapping[str, Term] | Term | None,
    ) -> "MixedModel":
        """A model of its terms alone, with a V that has their parameters; without y and X.

        Args:
            table: Rows that have every level on which a parameter of V depends.
            fixed: As for the class.
            random: As for the class.
            residual: As for the class.
        """
        model = cls.__new__(cls)
        chosen, keep = model._specify(table, fixed, random, residual, "drop")
        model._positions = np.flatnonzero(keep)
        model._learn_terms(tidy(chosen[keep]))
        model.V = model._covariance(model._frame)
        return model

    def _representatives(self, kept: pd.DataFrame, own: Collection[str]) -> np.ndarray:
        """Which rows to send to the others: the first one of each level that they need to know."""
        if len(kept) == 0:
            raise ValueError("There are no rows. Take fewer processes.")
        require_row_by_row(self._sides[0], "the response")
        require_row_by_row(self._sides[1], FIXED)
        for name, term in (self.random | self.residual).items():
            require_row_by_row(parse_design(term.design, f"term {name!r}"), f"term {name!r}")
        chosen = np.zeros(len(kept), dtype=bool)
        chosen[:2] = True
        for columns in self._coded(kept, own):
            chosen |= ~kept.duplicated(columns).to_numpy()
        return chosen

    def _coded(self, table: pd.DataFrame, own: Collection[str]) -> list[list[str]]:
        """Columns, or lists of columns, whose values are levels, but for the groups of the terms in ``own``."""
        lists = [[column] for column in levels_in(self._sides[1], table)]
        for name, term in (self.random | self.residual).items():
            lists += coded_columns(term, table, name, groups=name not in own)
        return lists

    def _learn_share(self, coding: pd.DataFrame, kept: pd.DataFrame, own: Collection[str]) -> None:
        """Learn from rows of all processes that have all levels, and take up the rows of this one."""
        self._positions = np.arange(len(kept))
        self._learn(coding)
        shared = {column for columns in self._coded(kept, own) for column in columns}
        groups = {name: self.correlated[name].groups.columns for name in own}  # type: ignore[union-attr]
        used = {column for columns in groups.values() for column in columns}
        alone = sorted(used - shared)
        frame = tidy_like(kept, coding, [str(column) for column in kept if column not in alone])
        frame[alone] = tidy(kept[alone])
        for name, columns in groups.items():
            effects = copy(self.correlated[name])
            effects.groups = Factor(columns, frame)
            self._replace(name, effects)
        check_residual(self.residual, frame)
        self._fill(frame)

    def _replace(self, name: str, effects: Effects) -> None:
        """Take other effects for a term, without a change to a model that this one is a copy of."""
        if name in self.effects:
            self.effects = self.effects | {name: effects}
            return
        residual = copy(self._residuals[name])
        residual.effects = effects
        self._residuals = self._residuals | {name: residual}

    def _specify(
        self, whole: pd.DataFrame, fixed: str, random: Any, residual: Any, missing: str
    ) -> tuple[pd.DataFrame, np.ndarray]:
        """Read the formula and the terms; returns the columns that they use, and which rows to keep."""
        whole = whole.set_axis([str(column) for column in whole.columns], axis=1)
        self.fixed, self.random = fixed, named_terms(random)
        self.residual = {"residual": residual or Term()} if not isinstance(residual, Mapping) else dict(residual)
        check_names(self.random, self.residual)
        left, right = parse_fixed(fixed, whole)
        self._sides, self._fixed_columns = (left, right), columns_of(right, whole, FIXED)
        used = [*columns_of(left, whole, "the response"), *self._fixed_columns]
        for name, term in (self.random | self.residual).items():
            used += columns_of_term(name, term, whole)
        chosen = whole[list(dict.fromkeys(used))]
        keep = complete_rows(chosen, missing)
        self.rows, self.dropped = whole.index[keep], int((~keep).sum())
        return chosen, keep

    def _learn(self, frame: pd.DataFrame) -> None:
        """Levels, codings and terms, from rows that have all levels."""
        self._design = design(self._sides[1], frame, FIXED)
        self.x_names = self._design.names
        self._learn_terms(frame)

    def _learn_terms(self, frame: pd.DataFrame) -> None:
        self._frame = frame
        self.effects = {name: Effects(name, term, frame) for name, term in self.random.items()}
        self._residuals = {name: Residual(name, term, frame) for name, term in self.residual.items()}

    def _fill(self, frame: pd.DataFrame) -> None:
        """y, X and V of some rows."""
        self.response, values = response(self._sides[0], frame)
        self.y = _checked_response(values, self.response)
        same = frame is self._frame
        self.X = torch.from_numpy(self._design.values if same else self._design.of(frame))
        self.V = self._covariance(frame)

    def _check(self, n: int, counts: Mapping[str, int]) -> None:
        """Raise a ValueError that names a term whose variance cannot be told; ``counts`` are levels counted before."""
        if n < 2:
            raise ValueError(f"The response {self.response!r} has {n} value. A model needs at least two.")
        plain = len(self.residual) == 1 and is_plain(next(iter(self.residual.values())))
        for name, effects in self.effects.items():
            check_random(effects, n, plain, counts.get(name))

    def _covariance(self, frame: pd.DataFrame) -> Sum:
        return Sum(
            {name: effects.covariance(frame) for name, effects in self.effects.items()}
            | {name: residual.covariance(frame, self._positions) for name, residual in self._residuals.items()}
        )

    @property
    def correlated(self) -> dict[str, Effects]:
        """The terms by which rows are correlated: the random ones, and residual ones with groups or ``within``."""
        residuals = {name: own.effects for name, own in self._residuals.items() if own.effects is not None}
        return self.effects | residuals

    def part(self, rows: np.ndarray, own: Collection[str] = ()) -> tuple["MixedModel", dict[str, np.ndarray]]:
        """The model over some of its rows, in the coding of all of them.

        Args:
            rows: Positions of the rows.
            own: `correlated` terms of which V gets the levels of these rows alone; they must be `Effects.separate`.

        Returns:
            The model, and for each of ``own`` the places of its levels among all of them.
        """
        part, places = copy(self), {}
        part._frame = frame = self._frame.iloc[rows].reset_index(drop=True)
        part.y, part.X = self.y[rows], self.X[rows]
        part.rows, part._positions = self.rows[rows], self._positions[rows]
        for name in own:
            effects, places[name] = self.correlated[name].only(frame)
            part._replace(name, effects)
        part.V = part._covariance(frame)
        return part, places

    def design(self, new_table: TableLike, ranks: Ranks = ALONE) -> NewRows:
        """Designs of new rows, coded as in the fit; the response is not needed.

        Args:
            new_table: Rows with the columns of the fixed effects and of the random terms; a missing or new level of a
                random term gives a row of zeros.
            ranks: The processes that share the rows of the fit; a level that another one has gives a row of zeros too,
                and is known.

        Raises:
            ValueError: A column of the fixed effects or of a term's design is missing, has missing values or a level
                that was not in the fit; or a column of the groups is missing.
        """
        new = read_table(new_table)
        new = new.set_axis([str(column) for column in new.columns], axis=1)
        needed = [*self._fixed_columns, *(c for e in self.effects.values() for c in e.design.columns)]
        exact = tidy_like(new, self._frame, dict.fromkeys(needed))
        Z, unseen = {}, {}
        for name, effects in self.effects.items():
            levels = dict.fromkeys(column for factor in effects.factors for column in factor.columns)
            require_columns(levels, new, f"term {name!r}")
            other = new[[column for column in levels if column not in exact]].reset_index(drop=True)
            frame = pd.concat([exact, other], axis=1)
            Z[name], unseen[name] = effects.Z(frame), effects.Z(frame, unseen=True)
        known = {name: ranks.largest((design.codes >= 0).to(torch.uint8)).bool() for name, design in Z.items()}
        if ranks.size > 1:
            unseen = {name: design.where(~known[name]) for name, design in unseen.items()}
        return NewRows(torch.from_numpy(self._design.of(exact)), Z, known, unseen)

    def __repr__(self) -> str:
        random = ", ".join(self.random) or "none"
        n = f"n={len(self.y)}" if hasattr(self, "y") else "without rows"  # as an outline has none
        return f"MixedModel({self.fixed!r}, random: {random}, residual: {', '.join(self.residual)}, {n})"


def _constant(name: str, value: float, n: int) -> str:
    return f"The response {name!r} is constant ({value:g} in all {n} rows). Check the column."


def _checked_response(values: np.ndarray, name: str) -> Tensor:
    y = torch.from_numpy(np.array(values, dtype=np.float64))
    if values.dtype != np.float64:
        log.warning("The response %r is %s and was converted to float64.", name, values.dtype)
    return y
