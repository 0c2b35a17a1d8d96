"""What a transform is: a monotone map f from a raw theta, any real number, to a parameter on its natural scale.

An optimiser moves the raw theta; a statistician reads f(theta). A transform therefore has three functions that must
agree (f, its inverse, its derivative) and an image, which says where the boundaries of the natural parameter are.
"""

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor


class Transform(ABC):
    """Elementwise, strictly monotone map f from raw to natural parameters.

    A subclass gives ``forward``, ``inverse`` and ``grad``, and ``domain`` if f does not take every real number; it
    holds no tensors and no state, so that one object serves any number of parameters, dtypes and devices.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Natural parameters f(x), same shape as ``x``."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """Raw parameters x with f(x) = y. Raises ValueError, naming the domain, where ``y`` is outside the image."""

    @abstractmethod
    def grad(self, x: Tensor) -> Tensor:
        """Elementwise derivative f'(x), same shape as ``x``."""

    @property
    def domain(self) -> tuple[float, float]:
        """Infimum and supremum of the x that f takes; every real number by default."""
        return -math.inf, math.inf

    def image_of(self, low: float, high: float) -> tuple[float, float]:
        """Infimum and supremum of f over the part of ``[low, high]`` in its domain."""
        ends = torch.tensor([max(low, self.domain[0]), min(high, self.domain[1])], dtype=torch.float64)
        first, last = sorted(self.forward(end).item() for end in ends)
        return first, last

    def domain_of(self, low: float, high: float) -> tuple[float, float]:
        """Infimum and supremum of the x in the domain whose f(x) is in ``[low, high]``."""
        (bottom, from_bottom), (top, from_top) = sorted((self.image_of(x, x)[0], x) for x in self.domain)

        def back(y: float) -> float:
            if bottom < y < top:
                return self.inverse(torch.tensor(y, dtype=torch.float64)).item()
            return from_bottom if y <= bottom else from_top

        first, last = sorted((back(low), back(high)))
        return first, last

    @cached_property
    def image(self) -> tuple[float, float]:
        """Infimum and supremum of f: the boundaries of the natural parameter. Found once, since f does not change."""
        return self.image_of(*self.domain)

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


def require(inside: Tensor, what: str, domain: str, values: Tensor) -> None:
    """Raise a ValueError that names the domain unless ``inside`` holds everywhere.

    Under ``torch.vmap`` values cannot be looked at; there the check is left out and a value outside gives NaN.
    """
    try:
        bad = not bool(inside.all())
    except RuntimeError:
        return
    if bad:
        came = values.detach()[~inside.detach()].flatten()[0].item()
        raise ValueError(f"`{what}` needs {domain}, got {came:g}.")
