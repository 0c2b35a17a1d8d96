r"""Curvature along a triangular factor of a covariance that is singular at the maximum, which information leaves out.

Information is the curvature of ℓ where V is linear in its parameters. In the entries of L, Σ = L L' is not: with
S = ∂ℓ/∂Σ the curvature has another part, −2 S_ij for the entries (i, a) and (j, a) of a column. At a maximum inside the
space S is zero, so that nothing is missing. At a singular Σ it is not: S falls in the directions that Σ lacks, and
steps without it overshoot there again and again.
"""

from collections.abc import Sequence
from posixpath import commonpath

import numpy as np

STILL = 0.02  # relative change of a covariance along a direction in which its factor only turns
TINY = 1e-150  # a diagonal entry as good as zero; its square is still a number


def entries_of(i: np.ndarray, a: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The entries (i, a) of a factor from raw parameters, which are logarithms on its diagonal; all of shape (m,)."""
    diagonal = i == a
    return np.where(diagonal, np.maximum(np.exp(np.where(diagonal, theta, 0.0)), TINY), theta)


def left_out(cells: np.ndarray, theta: np.ndarray, score: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The positive part of that curvature, for factors with a diagonal entry that is held at zero, shape (k, k).

    Args:
        cells: Factor, row and column of each parameter, shape (3, k); −1 where it is no entry of a whole factor.
        theta: Raw parameters: the entries, of the diagonal their logarithms, shape (k,).
        score: ∂ℓ/∂θ.
        held: Whether a parameter is on a boundary.
    """
    factor, row, column = cells
    missing = np.zeros((len(theta), len(theta)))
    if not held.any():
        return missing
    for f in np.unique(factor[(factor >= 0) & (row == column) & (held != 0)]):
        index = np.flatnonzero(factor == f)
        i, a = row[index], column[index]
        entries = entries_of(i, a, theta[index])
        units = np.where(i == a, entries, 1.0)  # ∂L/∂θ
        S = _slope(i, a, entries, score[index] / units)
        values, vectors = np.linalg.eigh(S)
        falls = 2.0 * (vectors * np.maximum(-values, 0.0)) @ vectors.T
        missing[np.ix_(index, index)] = np.where(a[:, None] == a, falls[np.ix_(i, i)], 0.0) * np.outer(units, units)
    return missing


def turns_only(cells: np.ndarray, theta: np.ndarray, directions: np.ndarray) -> bool:
    """Whether parameters move along directions without changing the covariances L L' that they are entries of.

    Where L_cc is next to nothing the columns of L from c on can be turned into one another; so a singular information
    does not mean that the data leave anything open.

    Args:
        cells: Factor, row and column of each parameter, shape (3, k); −1 where it is no entry of a whole factor.
        theta: Raw parameters, shape (k,).
        directions: Shape (k, m).
    """
    factor, row, column = cells
    if (factor < 0).any() or not directions.shape[1]:
        return False
    for f in np.unique(factor):
        index = np.flatnonzero(factor == f)
        i, a = row[index], column[index]
        entries = entries_of(i, a, theta[index])
        for d in directions[index].T:
            L, dL = np.zeros((2, int(i.max()) + 1, int(i.max()) + 1))
            L[i, a], dL[i, a] = entries, np.where(i == a, entries, 1.0) * d
            change = dL @ L.T
            if np.linalg.norm(change + change.T) > STILL * np.linalg.norm(L) * np.linalg.norm(dL):
                return False
    return True


def _slope(i: np.ndarray, a: np.ndarray, entries: np.ndarray, score: np.ndarray) -> np.ndarray:
    """S = ∂ℓ/∂Σ from L and ∂ℓ/∂L, the lower triangle of 2 S L, column by column from the last."""
    size = int(i.max()) + 1
    L, G, S = np.zeros((3, size, size))
    L[i, a], G[i, a] = entries, 0.5 * score
    for c in reversed(range(size)):
        below, pivot = slice(c + 1, size), L[c, c]
        S[below, c] = S[c, below] = (G[below, c] - S[below, below] @ L[below, c]) / pivot
        S[c, c] = (G[c, c] - S[c, below] @ L[below, c]) / pivot
    return S


def boundary_in_words(names: Sequence[str], cells: np.ndarray, held: np.ndarray) -> str:
    """Where held parameters are: "of a/rho", "where the covariance of g is singular", or both with "and".

    Args:
        names: Names of the parameters, each behind that of the operand it belongs to.
        cells: Factor, row and column of each, as in ``left_out``, shape (3, k).
        held: Which are held, shape (k,); entries of a factor's diagonal are held at zero.
    """
    every = np.array(names)
    own = every[held & (cells[0] < 0)].tolist()
    parts = [f"of {', '.join(own)}"] if own else []
    for f in np.unique(cells[0][held & (cells[0] >= 0)]):
        term = commonpath([name.rpartition("/")[0] for name in every[cells[0] == f].tolist()])
        parts.append(f"where {f'the covariance of {term}' if term else 'V'} is singular")
    return " and ".join(parts)
