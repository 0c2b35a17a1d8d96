"""The columns that a model uses: that they exist, that their values are there and finite, and which ones are factors.

A column is a factor if it holds text, categories, truth values or dates; every other one is numeric. A categorical
keeps the order of its categories, other factors are sorted.
"""

import logging
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

import numpy as np
import pandas as pd

log = logging.getLogger("openreml_nn.data")


def split_columns(spec: str | list[str], columns: Iterable[str]) -> list[str]:
    """Names of columns from ``"rep:block"``, ``["rep", "block"]`` or the name of one, which may hold a colon."""
    if not isinstance(spec, str):
        return list(spec)
    return [spec] if spec in set(columns) else [part.strip().strip("`") for part in spec.split(":")]


def require_columns(names: Iterable[str], table: pd.DataFrame, where: str) -> None:
    """Raise a ValueError that names the first column that the table does not have, with those that look like it."""
    columns = [str(column) for column in table.columns]
    for name in names:
        if name not in columns:
            near = get_close_matches(str(name), columns, 3, 0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"columns: {', '.join(columns[:20])}."
            raise ValueError(f"The table has no column {name!r}, which {where} uses; {hint}")
        if columns.count(name) > 1:
            count = columns.count(name)
            raise ValueError(f"The table has {count} columns named {name!r}, which {where} uses. Rename one.")


def complete_rows(frame: pd.DataFrame, missing: str) -> np.ndarray:
    """Which rows hold a value in every column, shape (n,).

    Args:
        frame: The columns that the model uses.
        missing: ``"error"``: every row must; ``"drop"``: those that do not are left out, and their number is logged.

    Raises:
        ValueError: Values are missing and ``missing`` is ``"error"``; values are infinite; no row is left.
    """
    if missing not in ("error", "drop"):
        raise ValueError(f"`missing` must be 'error' or 'drop', got {missing!r}.")
    numeric = frame.select_dtypes("number")
    infinite = {str(c): int(np.isinf(numeric[c].to_numpy(np.float64, na_value=np.nan)).sum()) for c in numeric.columns}
    if any(infinite.values()):
        raise ValueError(f"Infinite values in {_counts(infinite)}. Correct them, or leave these rows out.")
    gaps = frame.isna()
    counts = {str(column): int(gaps[column].sum()) for column in frame.columns}
    keep = ~gaps.any(axis=1).to_numpy()
    if keep.all():
        return keep
    if missing == "error":
        raise ValueError(
            f"Missing values in {_counts(counts)}. Fill them in, or leave these rows out with missing='drop', on the "
            f"command line --data.missing drop."
        )
    if not keep.any():
        raise ValueError(f"No row is left after dropping those with missing values in {_counts(counts)}.")
    log.warning("Dropped %d of %d rows with missing values in %s.", int((~keep).sum()), len(keep), _counts(counts))
    return keep


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns as factors (categoricals without unused categories) and plain numbers, rows numbered from 0."""
    return pd.DataFrame({column: _tidy(frame[column].reset_index(drop=True)) for column in frame.columns})


def tidy_like(new: pd.DataFrame, fitted: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Columns of new rows coded as in the table of the fit.

    Raises:
        ValueError: A value is missing or infinite, a factor has a level that the fit did not see, or a column is
            numeric in one table and a factor in the other.
    """
    names = list(names)
    require_columns(names, new, "the model")
    gaps = new[names].isna().sum()
    if gaps.any():
        found = _counts({str(name): int(count) for name, count in gaps.items()})
        raise ValueError(f"Missing values in {found} of the new rows. Fill them in, or leave these rows out.")
    return pd.DataFrame(
        {name: _tidy_like(new[name].reset_index(drop=True), fitted[name], name) for name in names},
        index=range(len(new)),
    )


def is_factor(column: pd.Series) -> bool:
    """Whether a tidy column is a factor."""
    return isinstance(column.dtype, pd.CategoricalDtype)


def is_coded(column: pd.Series) -> bool:
    """Whether a column of a table becomes a factor."""
    return not pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_bool_dtype(column.dtype)


def _tidy(column: pd.Series) -> pd.Series:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.remove_unused_categories()
    if not is_coded(column):
        integer = pd.api.types.is_integer_dtype(column.dtype)
        return pd.Series(
            column.to_numpy(column.dtype if isinstance(column.dtype, np.dtype) else np.int64 if integer else np.float64)
        )
    kinds = {type(value) for value in column} if column.dtype == object else set()
    return pd.Series(pd.Categorical(column.astype(str) if len(kinds) > 1 else column))


def _tidy_like(column: pd.Series, fitted: pd.Series, name: str) -> pd.Series:
    if not is_factor(fitted):
        done = _tidy(column)
        if is_factor(done) and len(done):
            shown = str(column.iloc[0])
            raise ValueError(f"Column {name!r} was numeric in the fit and holds {shown!r} in the new rows.")
        return done
    levels = fitted.cat.categories
    values = column.astype(object)
    strange = list(dict.fromkeys(str(value) for value in values[~values.isin(levels)]))
    if strange:
        raise ValueError(
            f"Column {name!r} has the new level{'s' * (len(strange) > 1)} {', '.join(strange[:5])}, which the fit did "
            f"not see; fitted levels: {', '.join(map(str, levels[:10]))}. Leave these rows out."
        )
    return pd.Series(pd.Categorical(values, categories=levels))


def _counts(counts: Mapping[str, int]) -> str:
    some = [f"{name!r} ({count} row{'s' * (count > 1)})" for name, count in counts.items() if count]
    return ", ".join(some)
