"""Step control: how far to follow a direction. Each control turns (H, g, radius) into a step and adapts the radius."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

NOTHING = 1e-100  # an information as good as zero; the square of its inverse is still a number
FLAT = 1e-14  # relative eigenvalue below which a direction counts as flat


class StepControl(ABC):
    """How long a step is. A control holds options; its one changing number, the radius, is kept by the optimiser."""

    @property
    @abstractmethod
    def first_radius(self) -> float:
        """The radius before the first step."""

    @abstractmethod
    def step(self, H: np.ndarray, g: np.ndarray, radius: float) -> np.ndarray:
        """The step for score g and information H, both in units of the parameters, shape (k,)."""

    @abstractmethod
    def after_rejection(self, radius: float, length: float) -> float | None:
        """The next radius after a step of this length was rejected; None where there is nothing more to try."""

    @abstractmethod
    def after_acceptance(self, radius: float, length: float, ratio: float) -> float:
        """The next radius after a step that gained ``ratio`` times what the quadratic model promised."""


def newton_step(H: np.ndarray, g: np.ndarray) -> np.ndarray:
    """H⁻¹ g without the directions in which H is flat or falls."""
    if not len(g):
        return g
    values, vectors = np.linalg.eigh(H)  # eigenvalues in order
    first = int(np.searchsorted(values, FLAT * max(values[-1], 0.0), side="right"))
    return vectors[:, first:] @ ((g @ vectors[:, first:]) / values[first:])


@dataclass(frozen=True)
class FixedStep(StepControl):
    """``length`` times the full step, and no second attempt: a step that lowers ℓ ends the fit.

    Args:
        length: Factor of the step.
    """

    length: float = 1.0

    @property
    def first_radius(self) -> float:
        return self.length

    def step(self, H: np.ndarray, g: np.ndarray, radius: float) -> np.ndarray:
        return radius * newton_step(H, g)

    def after_rejection(self, radius: float, length: float) -> float | None:
        return None

    def after_acceptance(self, radius: float, length: float, ratio: float) -> float:
        return self.length


@dataclass(frozen=True)
class Halving(StepControl):
    """The full step, halved until ℓ rises.

    Args:
        most: How often at most.
    """

    most: int = 30

    @property
    def first_radius(self) -> float:
        return 1.0

    def step(self, H: np.ndarray, g: np.ndarray, radius: float) -> np.ndarray:
        return radius * newton_step(H, g)

    def after_rejection(self, radius: float, length: float) -> float | None:
        return 0.5 * radius if radius > 0.5**self.most else None

    def after_acceptance(self, radius: float, length: float, ratio: float) -> float:
        return 1.0


@dataclass(frozen=True)
class TrustRegion(StepControl):
    """The best step of the quadratic model within a ball, whose radius follows how well the model predicts ℓ.

    δ = (H + λI)⁻¹ g with the smallest λ ≥ 0 for which |δ| ≤ radius. The radius is in units of the parameters: 2 allows
    a variance to change by a factor of exp(4) in a step.

    Args:
        radius: The first radius.
        most: The largest radius.

    Source: Moré & Sorensen (1983), SIAM Journal on Scientific and Statistical Computing 4, 553-572.
    """

    radius: float = 2.0
    most: float = 4.0

    @property
    def first_radius(self) -> float:
        return self.radius

    def step(self, H: np.ndarray, g: np.ndarray, radius: float) -> np.ndarray:
        values, vectors = np.linalg.eigh(H)
        z = vectors.T @ g
        floor = FLAT * max(abs(values[0]), abs(values[-1]), NOTHING)
        low = max(0.0, floor - values[0])
        if np.linalg.norm(z / (values + low)) <= radius:
            return vectors @ (z / (values + low))
        high = low + np.linalg.norm(z) / radius + abs(values[0])
        for _ in range(200):  # bisection on a decreasing function; in logarithms once away from zero
            middle = np.sqrt(low * high) if low > 0 else 1e-3 * high
            if np.linalg.norm(z / (values + middle)) > radius:
                low = middle
            else:
                high = middle
            if high <= low * (1 + 1e-6) or high < 1e-300:
                break
        return vectors @ (z / (values + high))

    def after_rejection(self, radius: float, length: float) -> float | None:
        return 0.25 * min(radius, length) if length > 1e-12 else None

    def after_acceptance(self, radius: float, length: float, ratio: float) -> float:
        if ratio < 0.25:
            return max(0.5 * min(radius, length), 1e-6)
        if ratio > 0.75 and length > 0.9 * radius:
            return min(2.0 * radius, self.most)
        return radius
