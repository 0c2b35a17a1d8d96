"""Designs of new rows, and what they must say of levels that were not in the fit."""

import warnings
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from openreml_nn.covariance import IncidenceMatrix, Matrix, ScalarMatrix
from openreml_nn.solvers.ranks import Ranks


class NewDesign(Protocol):
    """Designs of new rows, such as `openreml_nn.data.NewRows`."""

    @property
    def X(self) -> Tensor:
        """Design of the fixed effects, shape (m, p)."""

    @property
    def Z(self) -> Mapping[str, Matrix]:
        """Design of the random effects of each term, shape (m, q); rows of zeros for new levels."""

    @property
    def unseen(self) -> Mapping[str, Matrix]:
        """The other way round: new levels at a level of the fit that has their variance."""


def warn_of_new_levels(Z: Mapping[str, Matrix], ranks: Ranks) -> None:
    """Warn of rows without a level, whose standard error lacks the variance of one.

    Args:
        Z: Designs of new rows by term, each without an ``unseen``.
        ranks: The processes that share the rows of the fit; each may have other levels.
    """
    known = {name: ranks.largest(_has_level(design)) for name, design in Z.items()}
    counts = {name: int((rows == 0).sum()) for name, rows in known.items()}
    found = ", ".join(f"{name!r} ({count} of {len(known[name])})" for name, count in counts.items() if count)
    if found:
        warnings.warn(
            f"`predict` got rows of Z without a level of the term {found} and no `unseen`, which says what variance a "
            f"new level has: their `std_error` is without it. Give all that `design` gives: `predict(new)`.",
            stacklevel=3,
        )


def _has_level(Z: Matrix) -> Tensor:
    """1 for each row of a design that has a level, or where there are no codes is not all zero, else 0, shape (m,)."""
    if isinstance(Z, IncidenceMatrix):
        return (Z.codes >= 0).to(torch.uint8)
    squares = Z.sandwich_diagonal(Z.theta, ScalarMatrix(Z.shape[1]), Z.theta.new_zeros(1))
    return (squares != 0).to(torch.uint8)
