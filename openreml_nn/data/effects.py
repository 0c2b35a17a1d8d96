"""From a term and a table to Z G Z': levels from the columns, Z as codes, G as a structure or a Kronecker product."""

import itertools
from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from openreml_nn.covariance import (
    CellMatrix,
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    IncidenceMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    Levels,
    Matrix,
    ScalarMatrix,
    UnstructuredMatrix,
)
from openreml_nn.data.columns import require_columns, split_columns
from openreml_nn.data.factors import Factor
from openreml_nn.data.formulas import Design, columns_of, design, levels_in, parse_design
from openreml_nn.data.kernels import Kernel
from openreml_nn.data.terms import Structure, Term

EFFECTS = "the effects of one group"
_HINTS = {EFFECTS: " (A structure over the groups is a `relationship`; one over repeated measures needs `within`.)"}


class TermEffects:
    r"""The effects of a term over a table: Z for its rows or for new ones, and G.

    Args:
        name: Name of the term.
        term: Its specification.
        frame: Tidy columns of the table.

    Attributes:
        groups: Levels of the groups, or None where all rows are one group.
        cells: Levels of each column, or list of columns, of ``within``.
        design: Design of the effects of one group.

    Raises:
        ValueError: A structure cannot be made over the levels, or a kernel does not have all of them.
    """

    def __init__(self, name: str, term: Term, frame: pd.DataFrame) -> None:
        self.name, self.term = name, term
        kernel = term.relationship if isinstance(term.relationship, Kernel) else None
        self.groups: Factor | None = None
        if term.groups is not None:
            columns = split_columns(term.groups, frame.columns)
            self.groups = Factor(columns, frame)
            if kernel is not None:
                try:
                    kernel.require(self.groups.observed)
                except ValueError as error:
                    raise ValueError(f"Term {name!r}: {error}") from None
                self.groups = Factor(columns, frame, kernel.labels)
        self.cells = [Factor(split_columns(spec, frame.columns), frame) for spec, _ in _separable(term)]
        self.design: Design = design(parse_design(term.design, _where(name)), frame, _where(name))

    @property
    def factors(self) -> list[Factor]:
        """The groups and the columns of ``within``."""
        return [*([] if self.groups is None else [self.groups]), *self.cells]

    @property
    def effects(self) -> list[str]:
        """Names of the effects of one group: columns of the design, or combinations of the levels of ``within``."""
        if not self.cells:
            return self.design.names
        return [":".join(part) for part in itertools.product(*(cell.labels for cell in self.cells))]

    @property
    def size(self) -> int:
        """Number of effects of all groups."""
        return len(self.effects) * self.num_groups

    @property
    def num_groups(self) -> int:
        """Number of groups, also of those without records."""
        return 1 if self.groups is None else len(self.groups)

    def group_codes(self, frame: pd.DataFrame) -> np.ndarray:
        """Index of the group of each row, shape (n,); −1 where it was not in the fit."""
        return np.zeros(len(frame), dtype=np.int64) if self.groups is None else self.groups.codes(frame)

    def Z(self, frame: pd.DataFrame, *, unseen: bool = False) -> IncidenceMatrix:
        """Design of the effects for rows of the fit or new ones; unknown levels give rows of zeros.

        With ``unseen`` it is the other way round: unknown levels stand at the first one, known ones give rows of zeros.
        """
        groups, cells = self.group_codes(frame), self.cell_codes(frame)
        known = (groups >= 0) & (cells >= 0)
        keep = ~known if unseen else known
        groups, cells = groups.clip(min=0), cells.clip(min=0)
        labels = ["all"] if self.groups is None else self.groups.labels
        if self.cells and self.groups is None:
            return DummyMatrix.from_codes(np.where(keep, cells, -1), self.effects)
        of_group = DummyMatrix.from_codes(np.where(keep, groups, -1), labels)
        if self.cells:
            return CellMatrix(torch.from_numpy(cells), of_group, self.effects)
        return (
            of_group
            if self.design.is_intercept
            else KhatriRaoMatrix(self.design.of(frame), of_group, self.design.names)
        )

    def places(self, frame: pd.DataFrame) -> np.ndarray:
        """Which effect of which group each row has, as one number, where each row has one; −1 for unknown levels."""
        groups, cells = self.group_codes(frame), self.cell_codes(frame)
        return np.where((cells < 0) | (groups < 0), -1, cells * self.num_groups + groups)

    def cell_codes(self, frame: pd.DataFrame) -> np.ndarray:
        """Index of the effect of each row into ``effects``; −1 where a value of ``within`` was not in the fit."""
        codes = np.zeros(len(frame), dtype=np.int64)
        known = np.ones(len(frame), dtype=bool)
        for cell in self.cells:
            own = cell.codes(frame)
            known &= own >= 0
            codes = codes * len(cell) + own
        return np.where(known, codes, -1)

    def G(self) -> Matrix:
        """Covariance of the effects, those of one group slower than the groups."""
        front = self._front()
        if self.groups is None:
            return _product([*front], self.name)
        levels, what = self.groups.levels, f"the levels of {self.groups.name!r}"
        given = self.term.relationship
        R = None if given is None else make(given, levels, self.name, what)
        if not front and R is None:
            return ScalarMatrix(levels)
        if not front and R is not None and any(R.scale_powers):
            return R
        front = front or [("effects", ScalarMatrix(1))]
        return _product([*front, (self.groups.name, IdentityMatrix(levels) if R is None else R)], self.name)

    def _front(self) -> list[tuple[str, Matrix]]:
        """Structures over the effects of one group; none for one effect with the default covariance."""
        if self.cells:
            pairs = zip(self.cells, _separable(self.term), strict=True)
            return [
                (cell.name, make(structure, cell.levels, self.name, f"the levels of {cell.name!r}"))
                for cell, (_, structure) in pairs
            ]
        given = self.term.covariance
        if given is None and len(self.effects) == 1:
            return [] if self.groups is not None else [("effects", ScalarMatrix(1))]
        levels = Levels(self.effects)
        return [("effects", make(given or UnstructuredMatrix, levels, self.name, EFFECTS))]

    @property
    def separate(self) -> bool:
        """Whether groups are independent and alike, so that V can be had for some of them alone."""
        return self.groups is not None and self.term.relationship is None

    @property
    def num_observed(self) -> int:
        """Number of groups that have records."""
        return 1 if self.groups is None else len(self.groups.observed)

    @property
    def group_columns(self) -> list[str]:
        """Columns of the groups; none where all rows are one group."""
        return [] if self.groups is None else self.groups.columns

    def over(self, groups: Factor) -> "TermEffects":
        """The same effects over other groups."""
        effects = copy(self)
        effects.groups = groups
        return effects

    def only(self, frame: pd.DataFrame) -> tuple["TermEffects", np.ndarray]:
        """The effects of the groups that some rows of the table have, for ``separate`` ones; the groups' places."""
        assert self.groups is not None
        groups, places = self.groups.only(frame)
        return self.over(groups), places

    def covariance(self, frame: pd.DataFrame) -> CovariancePropagation:
        """Z G Z' over the rows of the table."""
        return CovariancePropagation(self.Z(frame), self.G())


def columns_of_term(name: str, term: Term, table: pd.DataFrame) -> list[str]:
    """Columns that a term uses; raises a ValueError for those that the table does not have."""
    specs = [] if term.groups is None else [term.groups]
    specs += [spec for spec, _ in _separable(term)]
    used = [column for spec in specs for column in split_columns(spec, table.columns)]
    require_columns(used, table, _where(name))
    used += columns_of(parse_design(term.design, _where(name)), table, _where(name))
    return list(dict.fromkeys(used))


def level_columns_of_term(name: str, term: Term, table: pd.DataFrame, *, groups: bool) -> list[list[str]]:
    """Columns, or lists of columns, whose values are levels of a term.

    Args:
        name: Name of the term.
        term: Its specification.
        table: The table.
        groups: Whether the columns of its groups are wanted too.
    """
    specs = [term.groups] if groups and term.groups is not None else []
    specs += [spec for spec, _ in _separable(term)]
    factors = levels_in(parse_design(term.design, _where(name)), table)
    return [split_columns(spec, table.columns) for spec in specs] + [[column] for column in factors]


def make(structure: Structure, levels: Levels, name: str, what: str) -> Matrix:
    """The matrix of a structure over levels; what goes wrong in it is told with the term and the columns.

    Args:
        structure: What makes the matrix.
        levels: The levels, n of them.
        name: Name of the term.
        what: The levels in words.

    Raises:
        ValueError: The structure refuses the levels, or gives something else than a `Matrix` of shape (n, n).
    """
    try:
        matrix = structure(levels)
    except (TypeError, ValueError) as error:
        hint = _HINTS.get(what, " A structure over times or coordinates needs numeric columns.")
        raise ValueError(f"Term {name!r}: {_title(structure)} over {what} failed. {error}{hint}") from error
    if not isinstance(matrix, Matrix) or matrix.shape != (len(levels), len(levels)):
        came = f"shape {matrix.shape}" if isinstance(matrix, Matrix) else type(matrix).__name__
        raise ValueError(
            f"Term {name!r}: {_title(structure)} over {what} must give a `Matrix` of size {len(levels)}, got {came}."
        )
    return matrix


def hold_scale(matrix: Matrix) -> None:
    """Hold the first free parameter that scales ``matrix`` at 1; the rest of its shape stays free."""
    fixed, powers = matrix.no_grad_index, matrix.scale_powers
    if any(powers[i] for i in fixed):
        return
    index = next(i for i, power in enumerate(powers) if power)
    transform = matrix.param_transforms[index]
    one = torch.ones((), dtype=torch.float64)
    theta = matrix.theta.detach().clone()
    theta[index] = one if transform is None else transform.inverse(one)
    matrix.set_theta(theta)
    matrix.set_no_grad([*fixed, index])


def _product(parts: list[tuple[str, Matrix]], name: str) -> Matrix:
    """Kronecker product in which one operand has the scale, named where several have free parameters."""
    free_scale = [
        matrix
        for _, matrix in parts
        if any(power for i, power in enumerate(matrix.scale_powers) if i not in matrix.no_grad_index)
    ]
    for matrix in free_scale[1:]:
        hold_scale(matrix)
    if len(parts) == 1:
        return parts[0][1]
    free = [matrix for _, matrix in parts if len(matrix.no_grad_index) < matrix.num_params]
    names = [label.replace("/", "_") for label, _ in parts]
    if len(free) > 1 and len(set(names)) == len(names):
        return KroneckerProduct(dict(zip(names, (matrix for _, matrix in parts), strict=True)))
    return KroneckerProduct(*(matrix for _, matrix in parts))


def _separable(term: Term) -> Sequence[tuple[Any, Structure]]:
    """Columns of ``within`` with the structure over them, one pair for each factor of the product."""
    if term.within is None:
        return []
    if isinstance(term.within, dict):
        return list(term.within.items())
    return [(term.within, term.covariance)]  # type: ignore[list-item]


def _title(structure: Structure) -> str:
    """Name of a structure for a message, found also inside a ``functools.partial``."""
    inner = [structure.func, *structure.args] if isinstance(structure, partial) else [structure]
    names = [part.__name__ for part in inner if isinstance(part, type)]
    return f"`{names[0]}`" if names else repr(structure) if isinstance(structure, Kernel) else "the structure"


def _where(name: str) -> str:
    return f"term {name!r}"
