"""A mixed model over a table: y, X and V from a formula and named terms, and the same designs for new rows.

Everything that can be wrong with a table is found here, before a likelihood is evaluated, and told as one error that
names the column or the term.
"""

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import IncidenceMatrix, Matrix
from openreml_nn.data.coding import Coding, coding_of_all
from openreml_nn.data.columns import complete_rows, log, require_columns, tidy, tidy_like
from openreml_nn.data.effects import TermEffects
from openreml_nn.data.formulas import columns_of, response
from openreml_nn.data.residual import check_residual
from openreml_nn.data.specification import RESPONSE, Specification
from openreml_nn.data.tables import TableLike, read_table
from openreml_nn.data.terms import Term, TermLike
from openreml_nn.solvers.ranks import ALONE, Ranks


@dataclass(frozen=True)
class NewRows:
    """Designs of new rows, which `openreml_nn.FitResult.predict` takes as a whole.

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
        ranks: Processes of which each gives a table of some rows of its own; all of them make the model together. They
            exchange rows that have every level and learn the coding from them. Functions of all rows, such as
            ``scale``, are then refused in formulas.
        own: With ``ranks``, independent terms whose groups have all their records on one process; V gets the groups of
            this process, and the others do not hear of them.

    Attributes:
        y: Response, float64, shape (n,); values of another type are converted, which is logged once.
        X: Design of the fixed effects, float64, shape (n, p); it may be rank deficient.
        x_names: Names of the columns of X.
        V: Covariance of y: a sum with an operand for each random term, then ``residual`` or the named residual terms.
        specification: The formula and the terms.
        coding: Levels and codings of all rows.
        frame: Tidy columns of the rows, shape (n, columns used).
        response: Name of the response.
        rows: Labels of the rows that were kept, from the table's index.
        dropped: Number of rows that were dropped.

    Raises:
        TypeError: A term is none.
        ValueError: The table, the formula or a term cannot be used; the message names the column or term. With
            ``ranks`` it is raised on all processes together.

    Example:
        >>> from openreml_nn.data import MixedModel
        >>> model = MixedModel("john_alpha", "yield ~ rep", random=["gen", "rep:block"])
        >>> model.V.natural_names
        ['gen/sigma^2', 'rep:block/sigma^2', 'residual/sigma^2']
    """

    V: Matrix

    def __init__(
        self,
        table: TableLike,
        fixed: str,
        random: Mapping[str, TermLike] | Sequence[str | list[str]] | str | None = None,
        residual: Mapping[str, Term] | Term | None = None,
        missing: str = "error",
        *,
        ranks: Ranks | None = None,
        own: Collection[str] = (),
    ) -> None:
        whole, sharing = read_table(table), ranks or ALONE
        if ranks is None and len(whole) == 0:
            raise ValueError("The table has no rows.")
        self.specification = Specification(fixed, random, residual)
        records = sharing.together(lambda: self.specification.records(whole, missing))
        self.rows, self.dropped, self._positions = records.labels, records.dropped, records.positions
        if ranks is None:
            self.frame = tidy(records.frame)
            self.coding = Coding(self.specification, self.frame)
        else:
            self.coding, self.frame = coding_of_all(self.specification, records.frame, own, ranks)
        sharing.together(self._fill)
        self._check(sharing, own)

    def _fill(self) -> None:
        """y, X and V of the rows."""
        fixed = self.coding.fixed
        self.x_names = fixed.names
        self.response, values = response(self.specification.left, self.frame)
        self.y = _as_float64(values, self.response)
        self.X = torch.from_numpy(fixed.values if self.frame is self.coding.frame else fixed.of(self.frame))
        self.V = self.coding.covariance(self.frame, self._positions)
        check_residual(self.specification.residual, self.frame)

    def _check(self, ranks: Ranks, own: Collection[str]) -> None:
        """Raise a ValueError on all processes where the rows of all of them do not make a model."""
        n, terms = ranks.count(len(self.y)), self.correlated
        counts = {name: ranks.count(terms[name].num_observed) for name in own}
        if n < 2:
            raise ValueError(f"The response {self.response!r} has {n} value. A model needs at least two.")
        self.coding.check(n, counts)
        least, most = -float(ranks.largest(-self.y.min())), float(ranks.largest(self.y.max()))
        if least == most:
            raise ValueError(
                f"The response {self.response!r} is constant ({most:g} in all {n} rows). Check the column."
            )

    @property
    def correlated(self) -> dict[str, TermEffects]:
        """The terms by which rows are correlated: the random ones, and residual ones with groups or ``within``."""
        return self.coding.correlated

    def part(self, rows: np.ndarray, own: Collection[str] = ()) -> tuple["MixedModel", dict[str, np.ndarray]]:
        """The model over some of its rows, in the coding of all of them.

        Args:
            rows: Positions of the rows, shape (m,).
            own: `correlated` terms of which V gets the levels of these rows alone; they must be `TermEffects.separate`.

        Returns:
            The model, and for each of ``own`` the places of its levels among all of them.
        """
        part = copy(self)
        part.frame = self.frame.iloc[rows].reset_index(drop=True)
        part.y, part.X = self.y[rows], self.X[rows]
        part.rows, part._positions = self.rows[rows], self._positions[rows]
        found = {name: self.correlated[name].only(part.frame) for name in own}
        part.coding = self.coding.with_effects({name: effects for name, (effects, _) in found.items()})
        part.V = part.coding.covariance(part.frame, part._positions)
        return part, {name: places for name, (_, places) in found.items()}

    def design(self, new_table: TableLike, ranks: Ranks = ALONE) -> NewRows:
        """Designs of new rows, coded as in the fit; the response is not needed.

        Args:
            new_table: Rows with the columns of the fixed effects and of the random terms; a missing or new level of a
                random term gives a row of zeros, and the number of missing ones is logged.
            ranks: The processes that share the rows of the fit; a level that another one has gives a row of zeros too,
                and is known.

        Raises:
            ValueError: A column of the fixed effects or of a term's design is missing, has missing values or a level
                that was not in the fit; or a column of the groups is missing.
        """
        new = read_table(new_table)
        new = new.set_axis([str(column) for column in new.columns], axis=1)
        effects, fixed = self.coding.effects, self.coding.fixed
        needed = [*fixed.columns, *(column for own in effects.values() for column in own.design.columns)]
        exact = tidy_like(new, self.coding.frame, dict.fromkeys(needed))
        Z, unseen = {}, {}
        for name, own in effects.items():
            levels = dict.fromkeys(column for factor in own.factors for column in factor.columns)
            require_columns(levels, new, f"term {name!r}")
            if gaps := int(new[list(levels)].isna().any(axis=1).sum()):
                said = "%d of %d new rows have no value in %s, and are taken as rows of a level that is not in the fit."
                log.warning(said, gaps, len(new), ", ".join(map(repr, levels)))
            other = new[[column for column in levels if column not in exact]].reset_index(drop=True)
            frame = pd.concat([exact, other], axis=1)
            Z[name], unseen[name] = own.Z(frame), own.Z(frame, unseen=True)
        known = {name: ranks.largest((design.codes >= 0).to(torch.uint8)).bool() for name, design in Z.items()}
        if ranks.size > 1:
            unseen = {name: design.where(~known[name]) for name, design in unseen.items()}
        return NewRows(torch.from_numpy(fixed.of(exact)), Z, known, unseen)

    def new_response(self, new_table: TableLike) -> Tensor:
        """The response of new rows, float64, shape (m,).

        Args:
            new_table: Rows with the columns of the response.

        Raises:
            ValueError: A column is not there, or a value is missing, infinite or no number.
        """
        new, side = read_table(new_table), self.specification.left
        columns = new[columns_of(side, new, RESPONSE)]
        complete_rows(columns, "error")
        return torch.from_numpy(response(side, tidy(columns))[1].astype(np.float64))

    def __repr__(self) -> str:
        given = self.specification
        random, residual = ", ".join(given.random) or "none", ", ".join(given.residual)
        return f"MixedModel({given.fixed!r}, random: {random}, residual: {residual}, n={len(self.y)})"


def _as_float64(values: np.ndarray, name: str) -> Tensor:
    y = torch.from_numpy(np.array(values, dtype=np.float64))
    if values.dtype != np.float64:
        log.warning("The response %r is %s and was converted to float64.", name, values.dtype)
    return y
