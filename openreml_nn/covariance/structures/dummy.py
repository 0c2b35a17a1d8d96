"""Design of the levels of one or more factors, and how levels become codes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance.structures.incidence import IncidenceMatrix

SPREAD = 4  # integers that span so many times their number are counted


class DummyMatrix(IncidenceMatrix):
    r"""Z with Z_il = 1 where row i has level l, from one or more factors.

    Args:
        factors: Columns of equal length: strings, numbers, categoricals, Series.
        levels: The levels in order, for one factor (several: labels joined by ``:``); those observed when left out.
        full: Take every combination of the levels of several factors (and every category), also unobserved ones.
        unknown: ``"error"`` or ``"zero"``: what to do with a value that is not in ``levels``.

    Raises:
        ValueError: Missing values, different lengths, unknown levels.

    Example:
        >>> from openreml_nn.covariance import DummyMatrix
        >>> DummyMatrix(["b", "a", "b"]).levels
        ['a', 'b']
        >>> DummyMatrix(["b", "a", "b"], [1, 1, 2]).levels
        ['a:1', 'b:1', 'b:2']
    """

    def __init__(
        self, *factors: Any, levels: Sequence[Any] | None = None, full: bool = False, unknown: str = "error"
    ) -> None:
        if not factors:
            raise ValueError("`DummyMatrix` needs at least one factor.")
        if unknown not in ("error", "zero"):
            raise ValueError(f"`DummyMatrix` needs unknown='error' or unknown='zero', got {unknown!r}.")
        codes, labels = _codes_of_combination([_codes_of(f, full) for f in factors], full)
        if levels is not None:
            codes, labels = _recode(codes, labels, [str(level) for level in levels], unknown)
        super().__init__(torch.from_numpy(codes), labels, None, ["Intercept"])

    @classmethod
    def from_codes(cls, codes: np.ndarray, levels: Sequence[Any]) -> "DummyMatrix":
        """Z of rows whose levels are coded already.

        Args:
            codes: Place of the level of each row among the levels, shape (n,), integers; −1 for a row of zeros.
            levels: Labels of the levels, in order.

        Raises:
            ValueError: The codes are no integers, not of shape (n,), or not those of the levels.
        """
        codes = np.asarray(codes)
        if codes.ndim != 1 or codes.dtype.kind not in "iu":
            raise ValueError(f"`DummyMatrix.from_codes` needs integers of shape (n,), got {codes.dtype} {codes.shape}.")
        if len(codes) and not -1 <= codes.min() <= codes.max() < len(levels):
            found = f"{codes.min()} to {codes.max()}"
            raise ValueError(f"`DummyMatrix.from_codes` needs codes from -1 to {len(levels) - 1}, got {found}.")
        Z = cls.__new__(cls)
        IncidenceMatrix.__init__(Z, torch.from_numpy(codes.astype(np.int64)), levels, None, ["Intercept"])
        return Z


def _codes_of(factor: Any, full: bool) -> tuple[np.ndarray, Sequence[Any]]:
    """Codes and labels of one factor, levels sorted, or in the order of the categories of a categorical."""
    if isinstance(factor, Tensor):
        factor = factor.detach().cpu().numpy()
    column = factor if isinstance(factor, np.ndarray) and factor.ndim == 1 else pd.Series(factor)
    if isinstance(column.dtype, np.dtype) and column.dtype.kind == "i":
        found = _codes_of_integers(np.asarray(column))
        if found is not None:
            return found
    if isinstance(column, np.ndarray) and column.dtype.kind == "U":
        return _codes_of_texts(column)
    column = pd.Series(column)
    if column.isna().any():
        raise ValueError(f"`DummyMatrix` got {int(column.isna().sum())} missing values in factor {column.name!r}.")
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column if full else column.cat.remove_unused_categories()
        return column.cat.codes.to_numpy(np.int64), column.cat.categories.tolist()
    codes, unique = pd.factorize(column, sort=True)
    return codes.astype(np.int64, copy=False), unique.tolist()


def _codes_of_integers(values: np.ndarray) -> tuple[np.ndarray, Sequence[int]] | None:
    """Codes and labels of integers by counting, several times as fast as by hashes; None where they are far apart."""
    first, last = (int(values.min()), int(values.max())) if len(values) else (0, -1)
    if last - first > SPREAD * len(values):
        return None
    place = np.subtract(values, first, dtype=np.int64)
    seen = np.zeros(last - first + 1, dtype=bool)
    seen[place] = True
    return (np.cumsum(seen) - 1)[place], (np.flatnonzero(seen) + first).tolist()


def _codes_of_texts(values: np.ndarray) -> tuple[np.ndarray, Sequence[str]]:
    """Codes and labels of an array of texts, of which only the distinct ones are compared."""
    codes, unique = pd.factorize(values.astype(object))
    unique = unique.astype(values.dtype)
    order = np.argsort(unique)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[codes], unique[order].tolist()


def _codes_of_combination(
    parts: list[tuple[np.ndarray, Sequence[Any]]], full: bool
) -> tuple[np.ndarray, Sequence[Any]]:
    codes, labels = parts[0]
    for more, names in parts[1:]:
        if len(more) != len(codes):
            raise ValueError(f"`DummyMatrix` needs factors of equal length, got {len(codes)} and {len(more)}.")
        both = codes * len(names) + more
        present = np.arange(len(labels) * len(names)) if full else np.unique(both)
        codes = both if full else np.searchsorted(present, both)
        labels = [f"{labels[c // len(names)]!s}:{names[c % len(names)]!s}" for c in present.tolist()]
    return codes, labels


def _recode(codes: np.ndarray, found: Sequence[Any], levels: list[str], unknown: str) -> tuple[np.ndarray, list[str]]:
    labels = [str(label) for label in found]
    if len(set(levels)) != len(levels):
        raise ValueError("`DummyMatrix` needs levels without repetition.")
    place = {label: i for i, label in enumerate(levels)}
    strange = [labels[code] for code in np.unique(codes) if labels[code] not in place]
    if strange and unknown == "error":
        raise ValueError(
            f"`DummyMatrix` got {len(strange)} unknown level{'s' * (len(strange) > 1)} ({', '.join(strange[:5])}); "
            f"there are {len(levels)} levels ({', '.join(levels[:5])}, …). Give unknown='zero' for rows of zeros."
        )
    return np.array([place.get(label, -1) for label in labels], dtype=np.int64)[codes], levels
