"""What the rows of a table say of a model's terms: their levels, and the coding of the fixed effects.

Where each of several processes has read some rows only, they exchange rows that together have every level, and all
learn the same coding from them.
"""

from collections.abc import Collection, Mapping
from copy import copy
from functools import cached_property

import numpy as np
import pandas as pd

from openreml_nn.covariance import Sum
from openreml_nn.data.columns import tidy, tidy_like
from openreml_nn.data.effects import TermEffects
from openreml_nn.data.factors import Factor
from openreml_nn.data.formulas import Design, design, levels_in
from openreml_nn.data.residual import Residual, is_plain
from openreml_nn.data.specification import FIXED, Specification
from openreml_nn.solvers.ranks import Ranks


class Coding:
    """Levels and codings of a model, learned from rows that have every level.

    Args:
        specification: The model.
        frame: Tidy columns of these rows.

    Attributes:
        effects: The effects of each random term.
        residuals: Each residual term over the rows.

    Raises:
        ValueError: A term cannot be made over the levels; the message names it.
    """

    def __init__(self, specification: Specification, frame: pd.DataFrame) -> None:
        self.specification, self.frame = specification, frame
        self.effects = {name: TermEffects(name, term, frame) for name, term in specification.random.items()}
        self.residuals = {name: Residual(name, term, frame) for name, term in specification.residual.items()}

    @cached_property
    def fixed(self) -> Design:
        """Design of the fixed effects."""
        return design(self.specification.right, self.frame, FIXED)

    @property
    def correlated(self) -> dict[str, TermEffects]:
        """The terms by which rows are correlated: the random ones, and residual ones with groups or ``within``."""
        residuals = {name: own.effects for name, own in self.residuals.items() if own.effects is not None}
        return self.effects | residuals

    def covariance(self, frame: pd.DataFrame, positions: np.ndarray) -> Sum:
        """V of some rows: a sum with an operand for each random term, then one for each residual term.

        Args:
            frame: Tidy columns of the rows, coded as those of the whole table.
            positions: Place of each row in the table, for a residual covariance over the rows.
        """
        return Sum(
            {name: effects.covariance(frame) for name, effects in self.effects.items()}
            | {name: residual.covariance(frame, positions) for name, residual in self.residuals.items()}
        )

    def with_effects(self, others: Mapping[str, TermEffects]) -> "Coding":
        """The same coding with other effects for some of the ``correlated`` terms."""
        coding = copy(self)
        coding.effects = {name: others.get(name, own) for name, own in self.effects.items()}
        coding.residuals = {name: own.with_effects(others.get(name)) for name, own in self.residuals.items()}
        return coding

    def check(self, n: int, counts: Mapping[str, int]) -> None:
        """Raise a ValueError that names a random term whose variance cannot be told.

        Args:
            n: Number of rows.
            counts: Number of levels of the terms of which they have been counted, on all processes.
        """
        residuals = list(self.specification.residual.values())
        plain = len(residuals) == 1 and is_plain(residuals[0])
        for name, effects in self.effects.items():
            check_random(effects, n, plain, counts.get(name))


def coding_of_all(
    specification: Specification, kept: pd.DataFrame, own: Collection[str], ranks: Ranks
) -> tuple[Coding, pd.DataFrame]:
    """The coding of a table of which each of several processes has read some rows; all of them call this.

    Args:
        specification: The model.
        kept: Columns of the rows of this process.
        own: Independent terms whose groups have all their records on one process; their levels are those of this one.
        ranks: The processes.

    Returns:
        The coding, and the tidy columns of the rows of this process.

    Raises:
        ValueError: On all processes together: a formula may depend on all rows, a process has none, or as for `Coding`.
    """
    few = kept[ranks.together(lambda: _first_of_each_level(specification, kept, own))]
    every = pd.concat(ranks.objects(few), ignore_index=True)
    return ranks.together(lambda: _learned(specification, tidy(every), kept, own))


def _level_columns(specification: Specification, table: pd.DataFrame, own: Collection[str]) -> list[list[str]]:
    """Columns, or lists of columns, whose values are levels, but for the groups of the terms in ``own``."""
    others = [name for name in specification.terms if name not in own]
    fixed = [[column] for column in levels_in(specification.right, table)]
    return fixed + specification.level_columns(table, groups_of=others)


def _first_of_each_level(specification: Specification, kept: pd.DataFrame, own: Collection[str]) -> np.ndarray:
    """Which rows to send to the others: the first one of each level that they need to know."""
    if len(kept) == 0:
        raise ValueError("There are no rows. Take fewer processes.")
    specification.require_row_by_row()
    chosen = np.zeros(len(kept), dtype=bool)
    chosen[:2] = True
    for columns in _level_columns(specification, kept, own):
        chosen |= ~kept.duplicated(columns).to_numpy()
    return chosen


def _learned(
    specification: Specification, every: pd.DataFrame, kept: pd.DataFrame, own: Collection[str]
) -> tuple[Coding, pd.DataFrame]:
    """The coding of rows of all processes that have every level, with the own levels of this one, and its rows."""
    coding = Coding(specification, every)
    shared = {column for columns in _level_columns(specification, kept, own) for column in columns}
    groups = {name: coding.correlated[name].group_columns for name in own}
    alone = sorted({column for columns in groups.values() for column in columns} - shared)
    frame = tidy_like(kept, every, [str(column) for column in kept if column not in alone])
    frame[alone] = tidy(kept[alone])
    others = {name: coding.correlated[name].over(Factor(columns, frame)) for name, columns in groups.items()}
    return coding.with_effects(others), frame


def check_random(effects: TermEffects, n: int, plain_residual: bool, count: int | None = None) -> None:
    """Raise a ValueError that names a random term whose variance cannot be told from the mean or from the residual.

    Args:
        effects: The term over its table.
        n: Number of rows.
        plain_residual: Whether the residual is σ² I.
        count: Number of groups with records; those of ``effects`` when left out.
    """
    name, term = effects.name, effects.term
    count = count or effects.num_observed
    if effects.cells:
        if count * len(effects.effects) == 1:
            raise ValueError(f"Term {name!r} has one level of `within`, so that nothing varies. Leave the term out.")
        return
    if count == 1 and (term.groups is not None or len(effects.effects) == 1):
        which = f"{effects.groups.observed[0]!r} of {effects.groups.name!r}" if effects.groups else "all rows"
        raise ValueError(f"Term {name!r} has one level ({which}), so that it has no variance. Leave the term out.")
    if count == 1 and term.covariance is None:
        raise ValueError(
            f"Term {name!r} has no groups and {len(effects.effects)} effects, whose covariances cannot be estimated. "
            f"Give a `covariance` with few parameters, such as ScalarMatrix, or `groups`."
        )
    if (
        plain_residual
        and term.relationship is None
        and (term.covariance is None or len(effects.effects) == 1)
        and (count * len(effects.effects) >= n)
    ):
        what = f"{count} levels" + (f" × {len(effects.effects)} effects" if len(effects.effects) > 1 else "")
        raise ValueError(
            f"Term {name!r} has {what} for {n} rows, so that it is confounded with the residual σ² I. Leave the term "
            f"out, give it a `relationship` between its levels, or give the residual another structure."
        )
