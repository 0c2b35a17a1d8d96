"""From a residual term and a table to its part of V. Without groups each row is its own, and V stays a diagonal."""

from collections.abc import Mapping
from copy import copy

import numpy as np
import pandas as pd

from openreml_nn.covariance import DiagonalMatrix, DiagonalPropagation, Levels, Matrix, ScalarMatrix
from openreml_nn.data.effects import EFFECTS, TermEffects, make
from openreml_nn.data.formulas import design, parse_design
from openreml_nn.data.terms import Term


def is_plain(term: Term) -> bool:
    """Whether a residual term is σ² I."""
    return term == Term()


def is_diagonal(term: Term) -> bool:
    """Whether rows are independent in a residual term."""
    return term.groups is None and term.within is None and (term.covariance is None or term.design != "1")


class Residual:
    """A residual term over a table.

    Args:
        name: Name of the term.
        term: Its specification.
        frame: Tidy columns of the table.

    Attributes:
        effects: Its effects where rows are correlated within groups; None where each row is its own group.

    Raises:
        ValueError: The design is zero in a row, or a structure cannot be made.
    """

    effects: TermEffects | None

    def __init__(self, name: str, term: Term, frame: pd.DataFrame) -> None:
        self.name, self.term, self.effects = name, term, None
        if term.groups is not None or term.within is not None:
            self.effects = TermEffects(name, term, frame)
            return
        where = f"term {name!r}"
        self.design = design(parse_design(term.design, where), frame, where)
        zero = int((self.design.values == 0.0).all(axis=1).sum())
        if zero:
            raise ValueError(
                f"Term {name!r}: the design {term.design!r} is zero in {zero} row{'s' * (zero > 1)}, which leaves no "
                f"residual variance there. Give every row a level."
            )

    def covariance(self, frame: pd.DataFrame, positions: np.ndarray) -> Matrix:
        r"""The part of V of the term.

        Args:
            frame: Tidy columns of rows of the table.
            positions: Position of each row in the whole table, for a covariance over the rows.

        Returns:
            σ² I; diag(x_i' C x_i) where there is a ``design``; else Z (C ⊗ K) Z'.
        """
        if self.effects is not None:
            return self.effects.covariance(frame)
        if self.design.is_intercept:
            if self.term.covariance is None:
                return ScalarMatrix(len(frame))
            return make(self.term.covariance, Levels(positions.tolist()), self.name, "the rows")
        structure = self.term.covariance or DiagonalMatrix
        return DiagonalPropagation(
            self.design.of(frame), make(structure, Levels(self.design.names), self.name, EFFECTS)
        )

    def with_effects(self, effects: TermEffects | None) -> "Residual":
        """The same term over other effects; itself where there are none."""
        if effects is None:
            return self
        residual = copy(self)
        residual.effects = effects
        return residual


def check_residual(terms: Mapping[str, Term], frame: pd.DataFrame) -> None:
    """Raise a ValueError if V must be singular: two rows with the same correlated residual, and no independent one."""
    (name, term), *others = terms.items()
    if others or is_diagonal(term) or term.design != "1" or (term.groups is None and term.within is None):
        return
    effects = TermEffects(name, term, frame)
    repeated = pd.Series(effects.places(frame)).duplicated().to_numpy()
    if repeated.any():
        what = ", ".join(factor.name for factor in effects.factors)
        raise ValueError(
            f"Residual term {name!r}: {int(repeated.sum())} of {len(frame)} rows have the same {what} as an earlier "
            f"one (the first of them is row {int(repeated.argmax())}), so that V is singular. Index the rows by "
            f"another column, or add an independent residual term, such as nugget: Term()."
        )
