"""The transforms themselves; each is its formula, its inverse, its derivative and its image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.covariance.transform.base import Transform, require


def _positive(y: Tensor, name: str) -> Tensor:
    require(y > 0, f"{name}.inverse", "y > 0", y)
    return y


@dataclass(frozen=True)
class TransformIdentity(Transform):
    """f(x) = x, for a parameter without constraint (a loading, a covariance)."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, y: Tensor) -> Tensor:
        return y

    def grad(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


@dataclass(frozen=True)
class TransformExp(Transform):
    """f(x) = exp(x) > 0: x is a log standard deviation, or the log of any positive parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.log(_positive(y, "TransformExp"))

    def grad(self, x: Tensor) -> Tensor:
        return torch.exp(x)


@dataclass(frozen=True)
class TransformExp2(Transform):
    """f(x) = 2ˣ > 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp2(x)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.log2(_positive(y, "TransformExp2"))

    def grad(self, x: Tensor) -> Tensor:
        return math.log(2.0) * torch.exp2(x)


@dataclass(frozen=True)
class TransformExp10(Transform):
    """f(x) = 10ˣ > 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(math.log(10.0) * x)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.log10(_positive(y, "TransformExp10"))

    def grad(self, x: Tensor) -> Tensor:
        return math.log(10.0) * torch.exp(math.log(10.0) * x)


@dataclass(frozen=True)
class TransformExpPow2(Transform):
    """f(x) = exp(x)² = exp(2x) > 0: x is a log standard deviation, f(x) the variance. The default of a variance."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x + x)

    def inverse(self, y: Tensor) -> Tensor:
        return 0.5 * torch.log(_positive(y, "TransformExpPow2"))

    def grad(self, x: Tensor) -> Tensor:
        return 2.0 * torch.exp(x + x)


@dataclass(frozen=True)
class TransformPow(Transform):
    """f(x) = xᵖ on the largest domain where it is one-to-one.

    An odd p > 0 takes any real x; every other p > 0 takes x ≥ 0; a p < 0 takes x > 0.

    Args:
        power: The exponent p, not 0.
    """

    power: float

    def __post_init__(self) -> None:
        if self.power == 0 or not math.isfinite(self.power):
            raise ValueError(f"`TransformPow` needs a finite power other than 0, got {self.power}.")

    @property
    def _odd(self) -> bool:
        return self.power > 0 and self.power % 2 == 1

    @property
    def domain(self) -> tuple[float, float]:
        return (-math.inf if self._odd else 0.0), math.inf

    def image_of(self, low: float, high: float) -> tuple[float, float]:
        ends = torch.tensor([max(low, self.domain[0]), high], dtype=torch.float64)
        first, last = sorted(torch.pow(ends, self.power).tolist())
        return first, last

    def _inside(self, values: Tensor, call: str, letter: str) -> None:
        if self.power < 0:
            require(values > 0, call, f"{letter} > 0 for power {self.power:g}", values)
        elif not self._odd:
            require(values >= 0, call, f"{letter} >= 0 for power {self.power:g}", values)

    def forward(self, x: Tensor) -> Tensor:
        self._inside(x, "TransformPow", "x")
        return torch.pow(x, self.power)

    def inverse(self, y: Tensor) -> Tensor:
        self._inside(y, "TransformPow.inverse", "y")
        root = torch.pow(y.abs(), 1.0 / self.power)
        return torch.copysign(root, y) if self._odd else root

    def grad(self, x: Tensor) -> Tensor:
        self._inside(x, "TransformPow.grad", "x")
        return self.power * torch.pow(x, self.power - 1.0)


@dataclass(frozen=True)
class TransformScaleShift(Transform):
    """f(x) = scale · x + shift.

    Args:
        scale: Factor, finite and not 0.
        shift: Constant that is added, finite.
    """

    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.scale == 0 or not (math.isfinite(self.scale) and math.isfinite(self.shift)):
            raise ValueError(
                f"`TransformScaleShift` needs a finite scale other than 0 and a finite shift, "
                f"got scale {self.scale} and shift {self.shift}."
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift

    def inverse(self, y: Tensor) -> Tensor:
        return (y - self.shift) / self.scale

    def grad(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.scale)


@dataclass(frozen=True)
class TransformSigmoid(Transform):
    """f(x) = low + (high − low) / (1 + exp(−x)), between ``low`` and ``high``; x = 0 is their middle.

    Args:
        low: Lower end of the image.
        high: Upper end of the image, above ``low``. A correlation takes (−1, 1).
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"`TransformSigmoid` needs finite low < high, got low {self.low} and high {self.high}.")

    def forward(self, x: Tensor) -> Tensor:
        middle, half = 0.5 * (self.low + self.high), 0.5 * (self.high - self.low)
        return middle + half * torch.tanh(0.5 * x)

    def inverse(self, y: Tensor) -> Tensor:
        inside = (y > self.low) & (y < self.high)
        require(inside, "TransformSigmoid.inverse", f"{self.low:g} < y < {self.high:g}", y)
        return torch.log(y - self.low) - torch.log(self.high - y)

    def grad(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return (self.high - self.low) * s * torch.sigmoid(-x)


class TransformChain(Transform):
    """f = f_m ∘ … ∘ f_1: the transforms of a list, the first one applied first; the empty list is the identity.

    Args:
        transforms: Transforms in the order in which they are applied.

    Raises:
        TypeError: An element is not a ``Transform``.
    """

    def __init__(self, transforms: Sequence[Transform] = ()) -> None:
        self.transforms = tuple(transforms)
        for t in self.transforms:
            if not isinstance(t, Transform):
                raise TypeError(f"`TransformChain` needs a list of `Transform`s, got an element of {type(t).__name__}.")

    def forward(self, x: Tensor) -> Tensor:
        for t in self.transforms:
            x = t.forward(x)
        return x

    def inverse(self, y: Tensor) -> Tensor:
        for t in reversed(self.transforms):
            y = t.inverse(y)
        return y

    def grad(self, x: Tensor) -> Tensor:
        slope = torch.ones_like(x)
        for t in self.transforms:
            slope = slope * t.grad(x)
            x = t.forward(x)
        return slope

    @property
    def domain(self) -> tuple[float, float]:
        ends = (-math.inf, math.inf)
        for t in reversed(self.transforms):
            ends = t.domain_of(*ends)
        return ends

    def image_of(self, low: float, high: float) -> tuple[float, float]:
        ends = (low, high)
        for t in self.transforms:
            ends = t.image_of(*ends)
        return ends

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TransformChain) and self.transforms == other.transforms

    def __hash__(self) -> int:
        return hash(self.transforms)

    def __repr__(self) -> str:
        return f"TransformChain([{', '.join(map(repr, self.transforms))}])"
