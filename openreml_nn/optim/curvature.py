"""Small symmetric matrices of information: what is left to gain, which parameters they tell apart, and their parts."""

import math

import numpy as np

DISTINCT = 1e-10  # smallest relative eigenvalue of the scaled information of parameters that can be told apart


def newton_decrement(H: np.ndarray, g: np.ndarray) -> float:
    """g'H⁻¹g, scaled by the diagonal of H so that units do not matter; infinite where H is not positive definite."""
    d = H.diagonal()
    if not len(g):
        return 0.0
    if (d <= 0).any() or not np.isfinite(H).all():
        return float("inf") if np.abs(g).max() > 0 else 0.0
    r = 1.0 / np.sqrt(d)
    values, vectors = np.linalg.eigh(H * np.outer(r, r))
    z = vectors.T @ (r * g)
    return float((z**2 / np.maximum(values, 1e-12)).sum())


def confounded(H: np.ndarray) -> np.ndarray:
    """Indices of the parameters in the null space of H, none where H is regular."""
    d = H.diagonal()
    if len(d) < 2 or (d <= 0).any():
        return np.flatnonzero(d <= 0)
    r = 1.0 / np.sqrt(d)
    values, vectors = np.linalg.eigh(H * np.outer(r, r))
    return np.flatnonzero((np.abs(vectors[:, values <= DISTINCT]) > 0.1).any(axis=1))


def embedded(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Values of some parameters among zeros for the others."""
    full = np.zeros(len(where))
    full[where] = values
    return full


def among(H: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The rows and columns of some parameters."""
    return H if where.all() else H[np.ix_(where, where)]


def norm(x: np.ndarray) -> float:
    """Euclidean norm."""
    return math.sqrt(float(x @ x))


def condition(H: np.ndarray) -> float:
    """Condition number of a symmetric matrix; 1 for one without rows."""
    if not len(H):
        return 1.0
    sizes = np.abs(np.linalg.eigvalsh(H))
    return float(sizes.max() / sizes.min()) if sizes.min() > 0 else math.inf
