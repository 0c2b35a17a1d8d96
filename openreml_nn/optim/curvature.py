"""Small symmetric matrices of information: what is left to gain, which parameters they tell apart, and their parts."""

import math

import numpy as np

DISTINCT = 1e-10  # smallest relative eigenvalue of the scaled information of parameters that can be told apart


def newton_decrement(H: np.ndarray, g: np.ndarray) -> float:
    """g'H⁻¹g, scaled by the diagonal of H so that units do not matter; infinite where H is not positive definite."""
    if not len(g):
        return 0.0
    d = H.diagonal()
    if not ((d > 0).all() and np.isfinite(H).all()):
        return math.inf if g.any() else 0.0
    r = 1.0 / np.sqrt(d)
    values, vectors = np.linalg.eigh(H * r * r[:, None])
    z = (r * g) @ vectors
    return float((z**2 / np.maximum(values, 1e-12)).sum())


def confounded(H: np.ndarray) -> np.ndarray:
    """Indices of the parameters in the null space of H, none where H is regular."""
    flat = (H.diagonal() <= 0) | (np.abs(_null_space(H)) > 0.1).any(axis=1)
    return np.flatnonzero(flat)


def null_directions(H: np.ndarray) -> np.ndarray:
    """Directions along which H is flat, a basis of its null space in the units of its rows, shape (k, m)."""
    d = H.diagonal()
    return _null_space(H) / np.sqrt(np.where(d > 0, d, 1.0))[:, None]


def _null_space(H: np.ndarray) -> np.ndarray:
    """A basis of the null space of H with a diagonal of ones; unit vectors of rows whose diagonal is not above 0."""
    d = H.diagonal()
    if (d <= 0).any():
        return np.eye(len(d))[:, d <= 0]
    r = 1.0 / np.sqrt(d)
    values, vectors = np.linalg.eigh(H * r * r[:, None])
    return vectors[:, values <= DISTINCT]


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
