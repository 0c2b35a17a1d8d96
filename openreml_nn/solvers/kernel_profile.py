r"""The restricted likelihood of V = b (eᵗA + I) in t alone: start values that a fit need hardly move.

With b at its maximum for each t, e'Pe/(n − p) at b = 1, there is left a function of one number,

    −2ℓ = log|V| + log|U'V⁻¹U| + (n − p) log e'Pe + constants,   V = eᵗA + I,

whose slope takes a third of what a step of a fit does. A zero of it is found by scoring with the average information
of t, and near the end by the secant method where that shows a maximum. The search starts from equal shares of A and I
in V and climbs: as in a fit, what it finds is a local maximum. There may be two of them, with 8 to 20 records in one of
twenty data sets.

Source: Kang et al. (2008), Genetics 178, 1709-1723, for the likelihood of one kernel as a function of t.
"""

import math

from openreml_nn.solvers.kernel_equations import KernelData, KernelEquations

MOST = 8  # points that are evaluated
LONGEST = 2.0  # step in t
FARTHEST = 4.6  # way from the start, to shares of a hundredth: nearer to zero a variance hardly moves any more
SHORT = 0.3  # step in t after which two slopes tell the curvature better than the information does
LAST = 3e-4  # step in t after which the next would be below 1e-6


class _Point:
    """ℓ at one t, but for constants, and its slope where b follows t."""

    def __init__(self, data: KernelData, degrees: int, t: float) -> None:
        self.at, self.t, self.degrees = KernelEquations(data, math.exp(t), 1.0), t, degrees
        self.log_b = math.log(self.at.ePe / degrees)
        self.loglik = -0.5 * (self.at.logdet_V + self.at.logdet_M + degrees * self.log_b)
        of_V, of_M, of_ePe = (math.exp(t) * self.at.jacobian()[:, 0]).tolist()
        self.slope_of_log_b = of_ePe / self.at.ePe
        self.slope = -0.5 * (of_V + of_M + degrees * self.slope_of_log_b)

    def information(self) -> float:
        """Average information of t where b follows it."""
        of_APe = math.exp(2.0 * self.t) * self.at.information()[0, 0]
        return 0.5 * self.degrees * (of_APe / self.at.ePe - self.slope_of_log_b**2)

    def moved(self, step: float) -> tuple[float, float]:
        """a and b at a short step in t from here."""
        log_b = self.log_b + step * self.slope_of_log_b
        return math.exp(self.t + step + log_b), math.exp(log_b)


def profiled_variances(data: KernelData, degrees: int, t: float) -> tuple[float, float]:
    """a and b close to a maximum of the restricted likelihood; else the best of the points that were evaluated.

    Args:
        data: What the likelihood is computed from.
        degrees: n − p.
        t: log a/b to start from.

    Raises:
        torch.linalg.LinAlgError: V is not positive definite at one of the points, or e'Pe is lost there.
    """
    best = here = _Point(data, degrees, t)
    curvature = here.information()
    for _ in range(MOST - 1):
        if not curvature > 0.0:  # A is a multiple of I, and ℓ does not depend on t
            break
        step = here.slope / curvature
        if abs(step) < LAST:
            return here.moved(step)
        step = math.copysign(min(abs(step), LONGEST), step)
        if abs(here.t + step - t) > FARTHEST:
            break
        before, here = here, _Point(data, degrees, here.t + step)
        secant = (before.slope - here.slope) / step
        curvature = secant if abs(step) < SHORT and secant > 0.0 else here.information()
        best = max(best, here, key=lambda point: point.loglik)
    return best.moved(0.0)
