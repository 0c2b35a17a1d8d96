"""From a residual term and a table to its part of V. Without groups each row is its own, and V stays a diagonal."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from openreml_nn.covariance import DiagonalMatrix, DiagonalPropagation, Levels, Matrix, ScalarMatrix
from openreml_nn.data.effects import EFFECTS, Effects, make
from openreml_nn.data.formulas import design, parse_design
from openreml_nn.data.terms import Term


def is_plain(term: Term) -> bool:
    """Whether a residual term is σ² I."""
    return term == Term()


def is_diagonal(term: Term) -> bool:
    """Whether rows are independent in a residual term."""
    return term.groups is None and term.within is None and (term.covariance is None or term.design != "1")


def residual_covariance(name: str, term: Term, frame: pd.DataFrame, positions: np.ndarray) -> Matrix:
    r"""The part of V of a residual term.

    Args:
        name: Name of the term.
        term: Its specification.
        frame: Tidy columns of the table, n rows.
        positions: Position of each row in the whole table, for a covariance over the rows.

    Returns:
        σ² I; diag(x_i' C x_i) where there is a ``design``; else Z (C ⊗ K) Z'.

    Raises:
        ValueError: The design is zero in a row, or a structure cannot be made.
    """
    if term.groups is not None or term.within is not None:
        return Effects(name, term, frame).covariance(frame)
    where = f"term {name!r}"
    X = design(parse_design(term.design, where), frame, where)
    if X.is_intercept:
        if term.covariance is None:
            return ScalarMatrix(len(frame))
        return make(term.covariance, Levels(positions.tolist()), name, "the rows")
    zero = int((X.values == 0.0).all(axis=1).sum())
    if zero:
        raise ValueError(
            f"Term {name!r}: the design {term.design!r} is zero in {zero} row{'s' * (zero > 1)}, which leaves no "
            f"residual variance there. Give every row a level."
        )
    return DiagonalPropagation(X.values, make(term.covariance or DiagonalMatrix, Levels(X.names), name, EFFECTS))


def check_residual(terms: Mapping[str, Term], frame: pd.DataFrame) -> None:
    """Raise a ValueError if V must be singular: two rows with the same correlated residual, and no independent one."""
    (name, term), *others = terms.items()
    if others or is_diagonal(term) or term.design != "1" or (term.groups is None and term.within is None):
        return
    effects = Effects(name, term, frame)
    repeated = pd.Series(effects.places(frame)).duplicated().to_numpy()
    if repeated.any():
        what = ", ".join(factor.name for factor in effects.factors)
        raise ValueError(
            f"Residual term {name!r}: {int(repeated.sum())} of {len(frame)} rows have the same {what} as an earlier "
            f"one (the first of them is row {int(repeated.argmax())}), so that V is singular. Index the rows by "
            f"another column, or add an independent residual term, such as nugget: Term()."
        )
