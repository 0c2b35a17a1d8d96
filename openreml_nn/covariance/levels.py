"""The levels of a factor: what a structure over them may ask, a number, labels or coordinates.

A structure such as ``ScalarMatrix(n)`` needs a number, ``AR1Matrix(times)`` and ``ExponentialMatrix(coordinates)``
need values, and ``UnstructuredMatrix(n)`` names its variances. `Levels` is each of these, so that the part that reads a
table can hand the same object to any structure, also to a user's own.
"""

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor


class Levels:
    """Ordered levels of one or more columns.

    ``operator.index(levels)`` is their number and ``numpy.asarray(levels)`` their values, so that it stands where a
    structure expects a size or coordinates.

    Args:
        labels: One label for each level, unique.
        values: The levels' values, shape (n,) or (n, d); the labels themselves when left out.

    Raises:
        ValueError: Labels repeat, or ``values`` has another length.
    """

    def __init__(self, labels: Sequence[Any], values: Any = None) -> None:
        self.labels = [str(label) for label in labels]
        self.values = np.asarray(labels if values is None else values)
        if len(set(self.labels)) != len(self.labels):
            twice = next(label for label in self.labels if self.labels.count(label) > 1)
            raise ValueError(f"`Levels` needs unique labels, got {twice!r} more than once.")
        if len(self.values) != len(self.labels):
            raise ValueError(
                f"`Levels` needs a value for each label, got {len(self.labels)} labels and {len(self.values)} values."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __index__(self) -> int:
        return len(self.labels)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.values, dtype=dtype)

    def __repr__(self) -> str:
        shown = ", ".join(self.labels[:4]) + (", …" if len(self) > 4 else "")
        return f"Levels({len(self)}: {shown})"


def size_of(n: SupportsIndex, name: str) -> int:
    """The number of rows of structure ``name`` from an integer or `Levels`.

    Raises:
        TypeError: It is no integer.
        ValueError: It is below 1.
    """
    try:
        size = operator.index(n)
    except TypeError:
        raise TypeError(f"`{name}` needs its size as an integer, got {type(n).__name__}.") from None
    if size < 1:
        raise ValueError(f"`{name}` needs a size of at least 1, got {size}.")
    return size


def labels_of(n: SupportsIndex, size: int) -> list[str]:
    """One label for each level: those of `Levels`, else 0, 1, ….

    A slash joins the names of operands, so that one in a label becomes ``_``.
    """
    if isinstance(n, Levels):
        return [label.replace("/", "_") for label in n.labels]
    return [str(i) for i in range(size)]


def tensor_of(values: Any) -> Tensor:
    """A tensor of array-like values, a table of pandas too; a tensor is returned as it is."""
    return values if isinstance(values, Tensor) else torch.as_tensor(np.require(values, requirements="W"))


def values_of(values: Any, name: str) -> Tensor:
    """Numeric values of `Levels` or array-like as a float64 tensor of shape (n, d), for the structure ``name``.

    Raises:
        TypeError: They are not numeric.
        ValueError: They are none, of another shape than (n,) or (n, d), or not finite.
    """
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        try:
            values = torch.tensor(np.asarray(array, dtype=np.float64))
        except (TypeError, ValueError):
            first = array.ravel()[:1].tolist()
            raise TypeError(f"`{name}` needs numeric values, got {array.dtype} {first}.") from None
    values = values.detach().to(torch.float64)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or len(values) == 0 or not bool(torch.isfinite(values).all()):
        raise ValueError(f"`{name}` needs finite values of shape (n,) or (n, d), got shape {tuple(values.shape)}.")
    return values
