"""Parameters near an end of their scale, where a likelihood is flat in the raw parameter and no quadratic at all.

A variance that falls to zero, its raw parameter without bound, still has a direction: g²/d, score and information of
the one parameter, does not depend on the scale, and at zero it is that of the natural parameter.
"""

from dataclasses import dataclass

import numpy as np

from openreml_nn.optim.controls import NOTHING

PUSHED = 13.0  # raw step towards an end: a standard deviation falls by a factor of exp(13)
NEAR, AT = 1e-3, 1e-10  # score and information below which a parameter nears, and is at, an end
SLOPE = 1e-4  # g²/d above which a score has a direction
FARTHEST = 2.0  # raw step of an entry that is led through zero, at most
BEYOND = 2.0  # a joint Newton step of a variance exp(2θ) that leads by this much down leads far below zero
CROSSED = 2.0  # a Newton step of a diagonal entry this many times its own size leads through zero


@dataclass(frozen=True)
class Place:
    """Where k parameters are; scores and information in their units.

    Attributes:
        g: Score, shape (k,).
        d: Diagonal of the information.
        theta: Raw parameters.
        moved: Way from the start.
        held: −1 or 1 for a parameter held at its lower or upper end, else 0.
        finite: Whether the natural parameter has a finite lower and upper limit, shape (2, k).
        mirrors: Element (i, j) tells that parameter j is not zero and changes sign when i is led through zero.
    """

    g: np.ndarray
    d: np.ndarray
    theta: np.ndarray
    moved: np.ndarray
    held: np.ndarray
    finite: np.ndarray
    mirrors: np.ndarray

    def flat(self, bound: float) -> tuple[np.ndarray, np.ndarray]:
        """Free parameters that hardly change ℓ: −1 or 1 where they run to an end, and where they come back from one.

        Where a variance is next to nothing its score is small also if it points upwards. So a score that points to the
        only finite end runs there; between two finite ends the nearer one counts, raw 0 being the middle; and towards
        infinity a parameter runs only if it has moved there from its start. Of a variance that is at zero a score that
        does not point upwards is enough, however little of it is left.
        """
        small = (np.abs(self.g) < bound) & (self.d < bound) & (self.held == 0)
        if not small.any():
            return np.zeros(len(small)), np.zeros(len(small))
        at_zero = (self.g < 0) & (self.g > -AT) & (self.d < AT) & self.finite[0] & ~self.finite[1]
        way = np.sign(self.g) * (small & ((self.g**2 > SLOPE * self.d) | at_zero))
        gone = small & (self.g == 0) & (self.d == 0)  # so far that nothing is left of its derivatives
        way = np.where(gone, np.sign(self.moved), way)
        ahead, behind = self._finite(way), self._finite(-way)
        runs = np.where(ahead, ~behind | (way * self.theta > 0), way * self.moved > 0)
        return way * (runs & ~self.mirrors.any(axis=1)), way * (~runs & behind)

    def inwards(self) -> np.ndarray:
        """Whether the score of a held parameter points away from its end."""
        return (self.held != 0) & (self.g * self.held < 0) & (self.g**2 > SLOPE * self.d)

    def _finite(self, way: np.ndarray) -> np.ndarray:
        return np.where(way < 0, *self.finite)


@dataclass(frozen=True)
class Leap:
    """Steps of single parameters that a quadratic model would not make; 0 for all others.

    Attributes:
        step: Shape (k,).
        signs: Factors ±1 of all parameters after the step, shape (k,).
        promised: Expected gain in ℓ, beside that of the other parameters and of ``linear``.
        alone: Whether the other parameters stay where they are.
        linear: The part of the step that a quadratic model can follow, to which the other parameters adapt, shape (k,).
    """

    step: np.ndarray
    signs: np.ndarray
    promised: float
    alone: bool = False
    linear: np.ndarray | float = 0.0


def leaps(place: Place, newton: np.ndarray) -> list[Leap]:
    """What to try before an ordinary step, most promising first.

    Args:
        place: Where the parameters are.
        newton: Newton's step of all free parameters together, shape (k,).
    """
    found = (_through_zero(place), _beyond_an_end(place, newton), _to_ends_and_back(place))
    return [leap for leap in found if leap is not None]


def _through_zero(place: Place) -> Leap | None:
    """Lead diagonal entries of a triangular factor through zero.

    The diagonal entry exp(θ) is positive, but the column times −1 is the same matrix: where Newton's step of the entry,
    exp(θ) (1 + g/d), is negative, the entry takes its size and the rest of the column the other sign.
    """
    if not place.mirrors.any():
        return None
    g, d = place.g, np.maximum(place.d, NOTHING)
    cross = place.mirrors.any(axis=1) & (place.held == 0) & (g < -CROSSED * d) & (g**2 > SLOPE * d)
    if not cross.any():
        return None
    step = np.where(cross, np.clip(np.log(np.maximum(np.abs(g) / d - 1.0, 1.0)), 1e-3, FARTHEST), 0.0)
    signs = np.prod(np.where(place.mirrors & cross[:, None], -1.0, 1.0), axis=0)
    return Leap(step, signs, 0.5 * float((g**2 / d)[cross].sum()), alone=True)


def _beyond_an_end(place: Place, newton: np.ndarray) -> Leap | None:
    """Send variances to zero that the quadratic model wants below zero.

    The model moves a variance exp(2θ) to exp(2θ) (1 + 2δ) where θ moves by δ, and to zero by δ = −1/2. Steps of θ along
    it would take a dozen steps there; the others adapt to the variance of zero at once.
    """
    if not (newton < -BEYOND).any():
        return None
    sure = (place.g < 0) & (place.g**2 > SLOPE * place.d) & ~place.mirrors.any(axis=1)
    out = sure & (newton < -BEYOND) & (place.held == 0) & place.finite[0] & ~place.finite[1]
    if not out.any():
        return None
    return Leap(np.where(out, -PUSHED, 0.0), np.ones(len(out)), 0.0, linear=np.where(out, -0.5, 0.0))


def _to_ends_and_back(place: Place) -> Leap | None:
    """Towards a finite end a long step; back from one Newton's step of the natural parameter exp(2θ), half of it."""
    runs, returns = place.flat(NEAR)
    runs = runs * place._finite(runs)
    if not (runs.any() or returns.any()):
        return None
    g, d = place.g, np.maximum(place.d, NOTHING)
    step = PUSHED * runs + 0.5 * returns * np.log1p(np.abs(g) / d)
    promised = 0.5 * float(np.abs(g[runs != 0]).sum() + (g**2 / d)[returns != 0].sum())
    return Leap(step, np.ones(len(g)), promised)
