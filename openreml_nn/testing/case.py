"""What a law is checked on, and how two results are compared."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix


class LawBroken(AssertionError):
    """A matrix does not keep a law of its contract; the message says which law, at which theta, and by how much."""


@dataclass(frozen=True)
class Case:
    """A matrix, the raw thetas at which its laws are checked, and what is expected of it.

    Args:
        matrix: The matrix; a law that changes one takes a copy.
        thetas: Shape (t, k); the module's own thetas first.
        covariance: Symmetric, and positive definite or semi-definite.
        definite: Positive definite rather than semi-definite.
        seed: Seed of the random vectors that a law multiplies by.
    """

    matrix: Matrix
    thetas: Tensor
    covariance: bool
    definite: bool
    seed: int

    def random(self, *shape: int) -> Tensor:
        """Standard normal numbers in float64, the same at each call."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.thetas.device)

    def indices(self, below: int, count: int) -> Tensor:
        """Random integers below ``below``, some twice."""
        generator = torch.Generator().manual_seed(self.seed + below)
        return torch.randint(below, (count,), generator=generator).to(self.thetas.device)


@dataclass(frozen=True)
class Law:
    """A law, as one function of a case and a theta that raises `LawBroken`.

    Args:
        name: What the law says.
        holds: The function.
        thetas: Number of thetas at which it is checked; None for all.
    """

    name: str
    holds: Callable[[Case, Tensor], None]
    thetas: int | None = None


def domains(matrix: Matrix) -> list[tuple[float, float]]:
    """The raw values that each parameter may take."""
    return [(-math.inf, math.inf) if t is None else t.domain for t in matrix.param_transforms]


def require(condition: bool, broken: str) -> None:
    """Raise `LawBroken` with this text unless the condition holds."""
    if not condition:
        raise LawBroken(broken)


def require_close(got: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Raise `LawBroken` unless the tensors agree up to ``tolerance`` times the largest element (at least 1)."""
    require(got.shape == expected.shape, f"{what} has shape {tuple(got.shape)} for {tuple(expected.shape)}")
    if not got.numel():
        return
    got, expected = got.detach().to(torch.float64), expected.detach().to(torch.float64)
    require(bool(torch.isfinite(got).all()), f"{what} is not finite")
    off = (got - expected).abs().max().item()
    bound = tolerance * max(1.0, expected.abs().max().item())
    require(off <= bound, f"{what} is off by {off:.3g} (at most {bound:.3g})")


def require_raises(error: type[Exception], call: Callable[[], object], what: str) -> None:
    """Raise `LawBroken` unless the call raises this error."""
    try:
        call()
    except error:
        return
    raise LawBroken(f"{what} is accepted; it must raise {error.__name__}")
