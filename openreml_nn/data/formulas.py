"""Wilkinson formulas, read by formulaic: which columns they use and the design matrices they stand for.

Coding is that of R's ``model.matrix`` with treatment contrasts: the first level of a factor is the reference, also of
an ordered one. A name in backticks may be any column. Expressions see the columns and formulaic's own functions,
nothing else.
"""

import ast
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from formulaic import Formula, SimpleFormula
from formulaic.errors import DataMismatchWarning, FormulaicError
from formulaic.parser.types import Factor as Part
from formulaic.transforms import TRANSFORMS

from openreml_nn.data.columns import is_coded, is_factor, require_columns

ROW_BY_ROW = frozenset(  # functions that give a row a value from that row alone
    ("log", "log10", "log2", "exp", "exp10", "exp2", "C", "I", "Q", "Treatment", "Poly", "Sum", "Helmert", "Diff")
)
_RANDOM = (
    "Random effects go into `random`: for (1 | site) write random: {site: site}, for (1 + x | site) write "
    "random: {site: {groups: site, design: 1 + x}}."
)
_BACKTICKS = re.compile(r"`([^`]+)`")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Design:
    """A design matrix and the recipe by which it was made.

    Attributes:
        names: Names of the columns, as formulaic gives them: ``Intercept``, ``nitro``, ``rep[T.R2]``.
        values: Shape (n, p), float64.
        spec: The recipe: formulaic's specification with the coding of the fit.
        columns: Columns of the table that it uses.
        where: What errors call it.
    """

    names: list[str]
    values: np.ndarray
    spec: Any
    columns: list[str]
    where: str

    @property
    def is_intercept(self) -> bool:
        """Whether it is a single column of ones."""
        return self.names == ["Intercept"]

    def of(self, frame: pd.DataFrame) -> np.ndarray:
        """The same design for other rows, shape (m, p), with the coding of the fit.

        Raises:
            ValueError: A row has a level that the fit did not see, or a value that is missing or not finite.
        """
        if self.is_intercept:
            return np.ones((len(frame), 1))
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("error", DataMismatchWarning)
                matrix = self.spec.get_model_matrix(frame, context={}, na_action="ignore", output="pandas")
        except DataMismatchWarning as warning:
            raise ValueError(f"New rows have a level that {self.where} did not see in the fit: {warning}") from None
        return _finite(matrix, self.where)


def parse_fixed(text: str) -> tuple[SimpleFormula, SimpleFormula]:
    """Left and right side of ``"yield ~ rep"``; raises a ValueError unless there is one response."""
    formula = _parse(text, "the fixed formula")
    if isinstance(formula, SimpleFormula) or not isinstance(getattr(formula, "lhs", None), SimpleFormula):
        raise ValueError(f"The fixed formula {text!r} has no response. Write it as 'response ~ effects'.")
    if not isinstance(formula.rhs, SimpleFormula):
        raise ValueError(f"The fixed formula {text!r} has a '|'. {_RANDOM}")
    if len(formula.lhs) != 1:
        raise ValueError(f"The fixed formula {text!r} needs one response, got {len(formula.lhs)}.")
    return formula.lhs, formula.rhs


def parse_design(text: str, where: str) -> SimpleFormula:
    """Right-hand side such as ``"1 + Days"``; raises a ValueError if it has a response."""
    formula = _parse(text, where)
    if not isinstance(formula, SimpleFormula) or "~" in text:
        raise ValueError(f"{_start(where)} needs a design such as '1 + x', without '~' and '|', got {text!r}.")
    return formula


def columns_of(side: SimpleFormula, table: pd.DataFrame, where: str) -> list[str]:
    """Columns of the table that one side of a formula uses; raises a ValueError for names that it does not know."""
    known = {str(column) for column in table.columns}
    used: list[str] = []
    for part in (part for term in side for part in term.factors):
        names = _names_in(part)
        used += [name for name in names if name in known or name not in TRANSFORMS]
    used = list(dict.fromkeys(used))
    require_columns(used, table, where)
    return used


def design(side: SimpleFormula, frame: pd.DataFrame, where: str) -> Design:
    """The design matrix of one side of a formula over tidy columns.

    Args:
        side: Side of a formula.
        frame: Tidy columns of n rows.
        where: What errors call it.

    Raises:
        ValueError: It uses a column that is not there, cannot be evaluated, has a factor of one level, or gives values
            that are not finite.
    """
    columns = columns_of(side, frame, where)
    if [str(term) for term in side] == ["1"]:
        return Design(["Intercept"], np.ones((len(frame), 1)), None, columns, where)
    try:
        with np.errstate(all="ignore"):
            matrix: Any = side.get_model_matrix(frame, context={}, na_action="ignore", output="pandas")
    except (FormulaicError, TypeError, ValueError, NameError) as error:
        raise ValueError(f"{_start(where)} could not be evaluated: {_plain(error)}") from None
    _require_levels(matrix.model_spec, where)
    names = [str(name) for name in matrix.columns]
    return Design(names, _finite(matrix, where), matrix.model_spec, columns, where)


def levels_in(side: SimpleFormula, table: pd.DataFrame) -> list[str]:
    """Columns of which a formula uses the levels: factors, and numeric columns within ``C()``."""
    used = []
    for part in (part for term in side for part in term.factors):
        names = [name for name in _names_in(part) if name in table.columns]
        coded = part.expr.startswith("C(")
        used += [name for name in names if coded or is_coded(table[name])]
    return list(dict.fromkeys(used))


def require_row_by_row(side: SimpleFormula, where: str) -> None:
    """Raise a ValueError that names a part of a formula whose value in a row depends on other rows."""
    for part in (part for term in side for part in term.factors):
        if part.eval_method.value != "python":
            continue
        nodes = list(ast.walk(ast.parse(_BACKTICKS.sub("_", part.expr), mode="eval")))
        calls = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
        if not calls <= ROW_BY_ROW or any(getattr(node.value, "id", "") != "contr" for node in attributes):
            raise ValueError(
                f"{_start(where)} has {part.expr!r}, which may depend on all rows, and each process reads only its "
                f"own. Make it a column of the table, or let each process read the whole table."
            )


def response(side: SimpleFormula, frame: pd.DataFrame) -> tuple[str, np.ndarray]:
    """Name and values of the response, shape (n,), in the dtype of the table.

    Raises:
        ValueError: It uses no column, or one that is not numeric, or cannot be evaluated.
    """
    where = "the response"
    columns = columns_of(side, frame, where)
    for column in columns:
        if is_factor(frame[column]):
            shown = str(frame[column].iloc[0])
            raise ValueError(f"The response {column!r} is not numeric (first value {shown!r}). Convert it to numbers.")
    if not columns:
        raise ValueError(f"The response {str(side)!r} uses no column of the table.")
    if str(side) in columns:
        return str(side), frame[str(side)].to_numpy()
    done = design(side, frame, where)
    return str(side), done.values[:, 0]


@lru_cache(maxsize=128)  # the design of a term is needed in several places, and most designs are "1"
def _formula(text: str) -> Any:
    return Formula(text)


def _parse(text: str, where: str) -> Any:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{_start(where)} is empty. Write it as 'response ~ effects', or a design as '1'.")
    try:
        return _formula(text)
    except (FormulaicError, SyntaxError) as error:
        if "|" in text:
            raise ValueError(f"{_start(where)} {text!r} has a '|'. {_RANDOM}") from None
        hint = "."
        if isinstance(error, SyntaxError):
            hint = ". Rename a column whose name Python reserves, such as yield: it cannot stand inside a function."
        raise ValueError(f"{_start(where)} {text!r} is not a formula: {_plain(error)}{hint}") from None


def _names_in(part: Part) -> list[str]:
    """Names in one factor of a formula, those in backticks as they are, names of functions left out if known."""
    if part.eval_method.value == "lookup":
        return [part.expr]
    if part.eval_method.value == "literal":
        return []
    quoted = _BACKTICKS.findall(part.expr)
    tree = ast.parse(_BACKTICKS.sub("_", part.expr), mode="eval")
    return quoted + [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id != "_"]


def _require_levels(spec: Any, where: str) -> None:
    """Raise a ValueError that names a factor with one level, which treatment coding would drop without a word."""
    for name, (_, state) in spec.encoder_state.items():
        levels = state.get("categories", [])
        if len(levels) == 1:
            raise ValueError(
                f"{_start(where)} uses the factor {str(name)!r}, which has one level ({str(levels[0])!r}), so that it "
                f"has no effect. Leave it out."
            )


def _finite(matrix: Any, where: str) -> np.ndarray:
    values = np.array(matrix, dtype=np.float64)  # its own: those of pandas may be read-only
    bad = ~np.isfinite(values)
    if bad.any():
        at = int(bad.any(axis=0).argmax())
        raise ValueError(
            f"{_start(where)} is not finite in {int(bad[:, at].sum())} rows of {matrix.columns[at]!r}. "
            f"Check the values that the expression is applied to."
        )
    return values


def _start(where: str) -> str:
    return where[0].upper() + where[1:]


def _plain(error: Exception) -> str:
    text = _COLOURS.sub("", str(error)).replace("⧛", "").replace("⧚", "")
    return " ".join(text.split()).replace("insuffient", "insufficient")[:200]
