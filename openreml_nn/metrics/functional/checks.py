"""What every metric asks of its input: rows of one shape, finite numbers, variances that are variances.

Values are judged by their extremes, which NaN is one of, so that an update waits for a GPU once.
"""

import math
from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def checked_rows(
    call: str,
    *,
    numbers: Collection[str] = (),
    nonnegative: Collection[str] = (),
    positive: Collection[str] = (),
    **values: Tensor | float,
) -> list[Tensor]:
    """The values as float64 tensors of one shape.

    Args:
        call: Name of the caller, for messages.
        numbers: Names of values that may be one number for all rows.
        nonnegative: Names of values that must be at least 0.
        positive: Names of values that must be greater than 0.
        values: Values by name, all of one shape; a tensor without dimensions is one row.

    Raises:
        TypeError: A value is no real tensor.
        ValueError: Shapes differ, or a value is missing, infinite or too small.
    """
    tensors = {name: as_float64(call, name, value, name in numbers) for name, value in values.items()}
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t.ndim or name not in numbers}
    if len(set(shapes.values())) > 1:
        said = ", ".join(f"`{name}` {shape}" for name, shape in shapes.items())
        raise ValueError(f"`{call}` needs values of one shape, one for each row, got {said}.")
    like = tensors[next(iter(shapes), next(iter(tensors)))]
    rows = like.reshape(-1)
    tensors = {
        name: t.reshape(-1) if name in shapes else t.to(rows.device).expand_as(rows) for name, t in tensors.items()
    }
    if rows.numel():
        extremes = torch.stack([torch.stack([t.amin(), t.amax()]) for t in map(Tensor.detach, tensors.values())])
        for name, (low, high) in zip(tensors, extremes.tolist(), strict=True):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"`{call}` needs finite numbers in `{name}`, got missing or infinite ones.")
            if (name in nonnegative and low < 0.0) or (name in positive and low <= 0.0):
                wanted = "greater than 0" if name in positive else "of at least 0"
                raise ValueError(f"`{call}` needs variances {wanted} in `{name}`, the smallest is {low}.")
    return list(tensors.values())


def as_float64(call: str, name: str, value: Tensor | float, number: bool = False) -> Tensor:
    """The value as a real float64 tensor; a Python number only where ``number`` is true."""
    if number and isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, Tensor) or value.is_complex():
        wanted = "a tensor of real numbers" + (" or a number" if number else "")
        raise TypeError(f"`{call}` needs {wanted} as `{name}`, got {_kind(value)}.")
    return value.to(torch.float64)


def array_as_float64(call: str, name: str, value: Tensor | ArrayLike) -> Tensor:
    """As `as_float64`, also of an array, a Series or a list of real numbers, as a fit gives them."""
    if isinstance(value, Tensor):
        return as_float64(call, name, value)
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        wanted = "a tensor or an array of real numbers"
        raise TypeError(f"`{call}` needs {wanted} as `{name}`, got {_kind(value)} of {array.dtype}.")
    return torch.from_numpy(array.astype(np.float64))


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
