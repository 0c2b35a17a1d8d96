"""What every metric asks of its input: rows of one shape, finite numbers, variances that are variances.

Values are looked at in one pass, so that an update waits for a GPU once; which one is wrong is found only if one is.
"""

from collections.abc import Callable, Collection

import torch
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
    laws: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
        *((name, "finite numbers", torch.isfinite) for name in tensors),
        *((name, "variances of at least 0", lambda t: t >= 0) for name in nonnegative),
        *((name, "variances greater than 0", lambda t: t > 0) for name in positive),
    ]
    held = torch.stack([holds(tensors[name].detach()).all() for name, _, holds in laws])
    if not bool(held.all()):
        name, what, holds = laws[int((~held).nonzero()[0])]
        wrong = tensors[name].detach()[~holds(tensors[name].detach())]
        raise ValueError(f"`{call}` needs {what} in `{name}`, got {len(wrong)} others, the first is {float(wrong[0])}.")
    return list(tensors.values())


def as_float64(call: str, name: str, value: Tensor | float, number: bool = False) -> Tensor:
    """The value as a real float64 tensor; a Python number only where ``number`` is true."""
    if number and isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, Tensor) or value.is_complex():
        wanted = "a tensor of real numbers" + (" or a number" if number else "")
        raise TypeError(f"`{call}` needs {wanted} as `{name}`, got {_kind(value)}.")
    return value.to(torch.float64)


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
