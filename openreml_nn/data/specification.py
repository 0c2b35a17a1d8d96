"""The formula and the terms of a model as a user gives them: their names, their columns, and what can be wrong."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from openreml_nn.data.columns import complete_rows
from openreml_nn.data.effects import columns_of_term, level_columns_of_term
from openreml_nn.data.formulas import columns_of, parse_design, parse_fixed, require_row_by_row
from openreml_nn.data.terms import Term, TermLike, as_term

FIXED, RESPONSE = "the fixed formula", "the response"  # what errors call the sides of the formula


@dataclass(frozen=True)
class Records:
    """The records of a table that a model uses.

    Attributes:
        frame: The columns that it uses, as they are in the table, rows numbered from 0.
        labels: Label of each row, from the table's index, shape (n,).
        positions: Place of each row in the table, shape (n,).
        dropped: Number of rows with missing values that were left out.
    """

    frame: pd.DataFrame
    labels: pd.Index
    positions: np.ndarray
    dropped: int


class Specification:
    """A mixed model without its table. Arguments are those of `MixedModel`.

    Attributes:
        fixed: The fixed formula.
        random: Random terms by name.
        residual: Residual terms by name; ``residual`` is the name of one that has none.
        left: Left side of the formula, the response.
        right: Its right side, the fixed effects.

    Raises:
        TypeError: A term is none.
        ValueError: The formula cannot be read, or a name of a term cannot be used.
    """

    def __init__(
        self,
        fixed: str,
        random: Mapping[str, TermLike] | Sequence[str | list[str]] | str | None = None,
        residual: Mapping[str, Term] | Term | None = None,
    ) -> None:
        self.fixed, self.random = fixed, named_terms(random)
        self.residual = dict(residual) if isinstance(residual, Mapping) else {"residual": residual or Term()}
        check_names(self.random, self.residual)
        self.left, self.right = parse_fixed(fixed)

    @property
    def terms(self) -> dict[str, Term]:
        """Random and residual terms by name."""
        return self.random | self.residual

    def fixed_columns(self, table: pd.DataFrame) -> list[str]:
        """Columns that the fixed effects use; raises a ValueError for names that the table does not have."""
        return columns_of(self.right, table, FIXED)

    def columns(self, table: pd.DataFrame) -> list[str]:
        """Columns that the model uses; raises a ValueError for names that the table does not have."""
        used = [*columns_of(self.left, table, RESPONSE), *self.fixed_columns(table)]
        for name, term in self.terms.items():
            used += columns_of_term(name, term, table)
        return list(dict.fromkeys(used))

    def level_columns(self, table: pd.DataFrame, groups_of: Collection[str]) -> list[list[str]]:
        """Columns, or lists of columns, whose values are levels of the terms.

        Args:
            table: The table.
            groups_of: Names of the terms whose groups are wanted too.
        """
        found: list[list[str]] = []
        for name, term in self.terms.items():
            found += level_columns_of_term(name, term, table, groups=name in groups_of)
        return found

    def records(self, table: pd.DataFrame, missing: str) -> Records:
        """The records of a table.

        Args:
            table: The table.
            missing: ``"error"``: missing values are an error; ``"drop"``: their rows are left out.

        Raises:
            ValueError: A column is not there, values are missing or infinite, or no row is left.
        """
        table = table.set_axis([str(column) for column in table.columns], axis=1)
        chosen = table[self.columns(table)]
        keep = complete_rows(chosen, missing)
        frame = chosen[keep].reset_index(drop=True)
        return Records(frame, table.index[keep], np.flatnonzero(keep), int((~keep).sum()))

    def require_row_by_row(self) -> None:
        """Raise a ValueError that names a part of a formula whose value in a row depends on other rows."""
        require_row_by_row(self.left, RESPONSE)
        require_row_by_row(self.right, FIXED)
        for name, term in self.terms.items():
            require_row_by_row(parse_design(term.design, f"term {name!r}"), f"term {name!r}")


def named_terms(random: Mapping[str, TermLike] | Sequence[str | list[str]] | str | None) -> dict[str, Term]:
    """Random terms by name, from a dictionary or from columns, which then name their term.

    Raises:
        TypeError: A term in a list is not one by its columns, and so has no name.
        ValueError: A name occurs twice.
    """
    if random is None:
        return {}
    if isinstance(random, Mapping):
        return {str(name): as_term(spec, str(name)) for name, spec in random.items()}
    specs = [random] if isinstance(random, str) else list(random)
    for spec in specs:
        if isinstance(spec, Term):
            raise TypeError("A `Term` in a list of random terms has no name. Give a dictionary: {'name': Term(...)}.")
    terms = [as_term(spec, str(spec)) for spec in specs]
    names = [spec if isinstance(spec, str) else ":".join(spec) for spec in specs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"The random term {twice[0]!r} is given twice. Leave one out.")
    return dict(zip(names, terms, strict=True))


def check_names(random: Mapping[str, Term], residual: Mapping[str, Term]) -> None:
    """Raise a ValueError that says which name of a term, or which two terms, cannot be used."""
    if {"class_path", "init_args"} & {*random, *residual}:
        raise ValueError("A term takes its fields directly (groups, within, …), without `class_path` and `init_args`.")
    for name in [*random, *residual]:
        if not name or "/" in name:
            raise ValueError(f"A term needs a name without '/', got {name!r}.")
    if not residual:
        raise ValueError("`residual` is an empty dictionary. Name at least one residual term, or leave it out.")
    for name, term in residual.items():
        if not isinstance(term, Term):
            raise TypeError(f"Residual term {name!r} must be a `Term`, got {type(term).__name__}.")
    both = [name for name in random if name in residual]
    if both:
        raise ValueError(f"The name {both[0]!r} is given to a random and to a residual term. Rename one.")
    for kind, terms in (("random", list(random.items())), ("residual", list(residual.items()))):
        for i, (name, term) in enumerate(terms):
            same = [other for other, earlier in terms[:i] if earlier == term]
            if same:
                raise ValueError(f"The {kind} terms {same[0]!r} and {name!r} are the same. Leave one out.")
