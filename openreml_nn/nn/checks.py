"""What a head asks of a batch, and what it says where a loss cannot be had."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from openreml_nn.solvers import NotPositiveDefinite

RUN_AWAY = (
    "A variance that goes to zero says that the network fits the rows without error: give it less freedom, or stop it "
    "earlier. One that grows without bounds or is not a number says that its steps are too large: take a smaller "
    "learning rate for the thetas."
)


def without_autocast(device: str) -> AbstractContextManager:
    """Operations on a kind of device in the dtypes that they are given."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def require_column(name: str, values: Tensor) -> None:
    """Raise a ValueError unless values are of shape (m,) or (m, 1)."""
    if values.ndim != 1 and (values.ndim != 2 or values.shape[1] != 1):
        raise ValueError(f"{name} must be of shape (m,) or (m, 1), got {tuple(values.shape)}.")


def one_number(value: Any) -> float:
    """An offset as a number; a TypeError unless it is one: a float, an integer, or a tensor with one element."""
    given = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(given, bool) or not isinstance(given, Real) or not math.isfinite(given):
        said = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        raise TypeError(f"`offset` must be one finite number, such as the mean of y of the training rows, got {said}.")
    return float(given)


def require_pair(output: Tensor, y: Any) -> None:
    """Raise a TypeError unless y is a tensor, a ValueError unless it has one value for each row of the output."""
    if not isinstance(y, Tensor):
        raise TypeError(f"`MixedModelHead` needs y as a tensor, got {type(y).__name__}. Take `torch.as_tensor(y)`.")
    require_column("y", y)
    if not output.ndim:
        raise ValueError("`MixedModelHead` needs one output for each y, got a single number from the network.")
    if len(y) != len(output):
        raise ValueError(f"`MixedModelHead` needs one output for each y, got {len(output)} outputs and {len(y)} y.")


def require_finite(output: Tensor, y: Tensor) -> None:
    """Raise a ValueError where y or the output of the network has missing or infinite values; one look at both."""
    bad = torch.stack([(~torch.isfinite(values.detach())).sum() for values in (y, output)]).tolist()
    if bad[0]:
        raise ValueError(
            f"`MixedModelHead` got {bad[0]} missing or infinite values in y, of {y.numel()}. Leave such rows out."
        )
    if bad[1]:
        raise ValueError(
            f"`MixedModelHead` got {bad[1]} missing or infinite values in the output of the network, of "
            f"{output.numel()}. Are there any among its inputs? If not, its training has diverged: take a smaller "
            f"learning rate, clip gradients, or scale the inputs."
        )


@contextmanager
def enough_rows(m: int, p: int) -> Iterator[None]:
    """Let the error of a batch of m rows that p fixed effects, those of features, fit exactly say what it needs."""
    try:
        yield
    except ValueError as error:
        if m > p:
            raise
        raise ValueError(
            f"`MixedModelHead` fits the coefficients of {p - 1} features and the intercept to each batch, which needs "
            f"more than {p} rows, and many more to estimate variances; this batch has {m}. Take larger batches, fewer "
            f"features, or all rows at once: `head(phi, y, head.rows(groups))`."
        ) from error


class _NotFiniteError(ValueError):
    """A loss is not finite."""


def finite(loss: Tensor) -> Tensor:
    """The loss; a ValueError that `explained` completes unless it is finite. This is the one look at it."""
    if not math.isfinite(value := loss.item()):
        raise _NotFiniteError(f"{value:g}")
    return loss


@contextmanager
def explained(output: Tensor, y: Tensor, variance: Callable[[], Mapping[str, float]]) -> Iterator[None]:
    """Let errors of a likelihood say what is the matter: with y, with the output, or with the variance parameters.

    Args:
        output: What the network gave.
        y: Response.
        variance: Gives the variance parameters on their natural scale by name.

    Raises:
        ValueError: For one of values, or of a loss that is not finite.
        NotPositiveDefinite: For one of a factorisation.
    """
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        require_finite(output, y)
        at = ", ".join(f"{name} = {value:.4g}" for name, value in variance().items())
        if isinstance(error, _NotFiniteError):
            raise ValueError(f"The loss of these {len(y)} rows is {error} at {at}. {RUN_AWAY}") from None
        if not isinstance(error, (NotPositiveDefinite, torch.linalg.LinAlgError)):
            raise
        said = f" The solver says: {error}" if isinstance(error, NotPositiveDefinite) else ""
        raise NotPositiveDefinite(
            f"V of these {len(y)} rows is not positive definite at {at}. {RUN_AWAY}{said}"
        ) from error
