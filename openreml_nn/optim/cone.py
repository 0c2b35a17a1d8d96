r"""Leaps to the best positive semidefinite covariance, where steps of its triangular factor crawl.

Where Σ = L L' is next to singular its likelihood is a curved valley in the entries of L: as L_cc falls to zero the
columns from c on turn into one another without changing Σ. In the entries of Σ itself ℓ is nearly the quadratic that
score and information say. So both are taken from θ to the lower triangles of Σ, and that quadratic is maximised over
all positive semidefinite Σ (the other parameters beside it), with Σ = F F', F square: there each local maximum is the
global one (Burer & Monteiro 2005, Mathematical Programming 103, 427-444). This costs the data nothing.
"""

import numpy as np

from openreml_nn.optim.boundaries import Leap
from openreml_nn.optim.controls import TrustRegion
from openreml_nn.optim.curvature import norm
from openreml_nn.optim.triangular import entries_of

CLEARLY = 1.5  # promised gain in ℓ over that of a step in θ from which on a leap is tried
CLEAR = 1e12  # condition number up to which derivatives in θ tell those in Σ
SEED = 1e-3  # least diagonal entry of F to begin with; from zero the search would not leave the boundary
ZERO, GONE = 1e-7, 1e-12  # a pivot as good as zero, and what it is set to, both in standard deviations
FINE, MOST = 1e-9, 100  # relative accuracy of the maximum of the model, and attempts to reach it


def to_the_best(
    cells: np.ndarray, theta: np.ndarray, score: np.ndarray, information: np.ndarray, held: np.ndarray,
    units: np.ndarray, least: float,
) -> list[Leap]:  # fmt: skip
    """The leap to the maximum of the quadratic model, if there is a factor and the model promises a gain.

    Args:
        cells: Factor, row and column of each parameter, shape (3, k); −1 where it is no entry of a whole factor.
        theta: Raw parameters: the entries, of the diagonal their logarithms, shape (k,).
        score: ∂ℓ/∂θ.
        information: Shape (k, k).
        held: Whether a parameter is on a boundary; the entries of factors move nevertheless.
        units: Units of the parameters.
        least: Gain in ℓ that an ordinary step promises.
    """
    mine, others = np.flatnonzero(cells[0] >= 0), np.flatnonzero((cells[0] < 0) & (held == 0))
    rows, i = np.unique((cells[0] + cells[1])[mine], return_inverse=True)  # factors one after the other
    a = np.searchsorted(rows, (cells[0] + cells[2])[mine])
    if len(mine) == len(rows):  # a factor of one entry does not turn
        return []
    L = np.zeros((len(rows), len(rows)))
    L[i, a] = entries_of(i, a, theta[mine])
    sd = np.sqrt((L**2).sum(1))
    L /= sd[:, None]
    J = changes(i, a, i, a, L) * np.where(i == a, L[i, a], 1.0 / sd[i])
    sizes = np.abs(J).max(0)
    if not sizes.all() or np.linalg.cond(J / sizes) > CLEAR:
        return []
    T, order = np.diag(units.astype(float)), np.concatenate([mine, others])  # ∂θ/∂x, x the lower triangles of Σ
    T[np.ix_(mine, mine)] = np.linalg.inv(J / sizes) / sizes[:, None]
    T = T[:, order]
    F, rest, promised = best(T.T @ score, T.T @ information @ T, L, i, a)
    if not promised > CLEARLY * least:
        return []
    new, step = triangular(F) * sd[:, None], np.zeros(len(theta))
    entries = np.where(i == a, np.log(np.maximum(new[i, a], GONE * sd[i])), new[i, a])
    step[mine], step[others] = (entries - theta[mine]) / units[mine], rest
    return [Leap(step, np.ones(len(theta)), promised, alone=True)]


def best(
    g: np.ndarray, H: np.ndarray, L: np.ndarray, i: np.ndarray, a: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Maximise g'x − ½ x'Hx over x = (the entries (i, a) of F F' − L L', other variables) and all square F.

    Args:
        g: Shape (m + r,).
        H: Shape (m + r, m + r); directions in which it falls count as flat.
        L: Factors with rows of length 1 along the diagonal.
        i: Rows of the entries of their lower triangles, shape (m,).
        a: Columns, shape (m,).

    Returns:
        (F, the other variables, the maximum).
    """
    values, vectors = np.linalg.eigh(0.5 * (H + H.T))
    H = (vectors * np.maximum(values, 0.0)) @ vectors.T
    square = np.zeros(L.shape, dtype=bool)
    square[i, a] = square[a, i] = True
    j, b = np.nonzero(square)
    F, rest = L + np.diag(np.maximum(SEED - L.diagonal(), 0.0)), np.zeros(len(g) - len(i))
    control, radius = TrustRegion(), 1.0

    def model(F: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, float]:
        x = np.concatenate([(F @ F.T - L @ L.T)[i, a], rest])
        return x, float(g @ x - 0.5 * x @ H @ x)

    x, value = model(F, rest)
    for _ in range(MOST):
        slope, S, K = g - H @ x, np.zeros_like(L), np.zeros((len(g), len(j) + len(rest)))
        S[i, a] = 0.5 * slope[: len(i)]
        S = S + S.T  # ∂/∂Σ
        K[: len(i), : len(j)] = changes(i, a, j, b, F)
        K[len(i) :, len(j) :] = np.eye(len(rest))
        curvature, slope = K.T @ H @ K, K.T @ slope
        curvature[: len(j), : len(j)] -= 2.0 * S[np.ix_(j, j)] * (b[:, None] == b)
        step = control.step(curvature, slope, radius)
        promised = float(step @ slope - 0.5 * step @ curvature @ step)
        if promised <= FINE * abs(value):
            break
        trial = F.copy()
        trial[j, b] += step[: len(j)]
        x_there, there = model(trial, rest + step[len(j) :])
        if there > value:
            radius = control.after_acceptance(radius, norm(step), (there - value) / promised)
            F, rest, x, value = trial, rest + step[len(j) :], x_there, there
        else:
            radius = 0.25 * min(radius, norm(step))
    return F, rest, value


def changes(p: np.ndarray, q: np.ndarray, i: np.ndarray, a: np.ndarray, F: np.ndarray) -> np.ndarray:
    """Derivatives of the entries (p, q) of F F' with respect to the entries (i, a) of F, shape (len(p), len(i))."""
    return (p[:, None] == i) * F[np.ix_(q, a)] + (q[:, None] == i) * F[np.ix_(p, a)]


def triangular(F: np.ndarray) -> np.ndarray:
    """The lower triangular L with L L' = F F', exact where that is singular: a column without a pivot is zero.

    Rows are made orthogonal one by one, twice each, so that a pivot is as accurate as F (its square would not be).
    """
    L, Q = np.zeros((2, *F.shape))
    for r, row in enumerate(F):
        left = row
        for _ in range(2):
            along = Q @ left
            L[r] += along
            left = left - along @ Q
        pivot = norm(left)
        if pivot > ZERO * norm(row):
            L[r, r], Q[r] = pivot, left / pivot
    return L
