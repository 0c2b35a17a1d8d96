r"""A symmetric matrix as A = Q B Q', B of small bandwidth, by blocked Householder reflections.

It is the first stage of a two-stage tridiagonal reduction, and the whole of it here: a banded system is factored in
n w² operations, so that B serves as well as a tridiagonal matrix, and the stage consists of products of matrices where
the direct way is bound by memory. Neither eigenvectors nor eigenvalues are needed.

Source: Bischof, Lang & Sun (2000), ACM Transactions on Mathematical Software 26(4), 581-601.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg.blas import dsbmv
from scipy.linalg.lapack import dpbtrf, dpbtrs, dtrtrs
from torch import Tensor

from openreml_nn.solvers.threads import one_thread

BLOCK = 1024  # columns of the lower triangle that are updated at once


@dataclass(frozen=True)
class Panel:
    """The reflection I − V T V' on all rows from ``first`` on."""

    first: int
    V: Tensor
    T: Tensor

    def apply(self, x: Tensor, transpose: bool) -> None:
        """Multiply ``x`` by the reflection, or by its transpose, in place."""
        tail = x[self.first :]
        T = self.T.mT if transpose else self.T
        tail.addmm_(self.V, T @ (self.V.mT @ tail), alpha=-1.0)

    def apply_to_few(self, x: np.ndarray, transpose: bool) -> None:
        """As ``apply``, for a few columns, by NumPy: an operation starts in a fifth of the time that PyTorch takes."""
        V, T, tail = self.V.numpy(), self.T.numpy(), x[self.first :]
        tail -= V @ ((T.T if transpose else T) @ (V.T @ tail))


def bandwidth_for(n: int) -> int:
    """Subdiagonals of B: more make the reduction faster and each evaluation slower."""
    return min(n - 1, 32 if n < 3000 else 48 if n < 6000 else 64)


def reduce_to_band(A: Tensor, w: int) -> tuple[np.ndarray, list[Panel]]:
    """Reduce A, of which the lower triangle is read and overwritten, in 4/3 n³ operations.

    Args:
        A: Symmetric matrix, shape (n, n), float64.
        w: Number of subdiagonals of the result.

    Returns:
        (B, panels): B in LAPACK's lower band storage, B[i − j, j], shape (w + 1, n); Q is the product of the panels.
    """
    n, panels = len(A), []
    for c, d in _blocks(0, n):
        A[c:d, c:d] = A[c:d, c:d].tril() + A[c:d, c:d].tril(-1).mT
    for j in range(0, n - w - 1, max(w, 1)):
        below = A[j + w :, j : j + w]
        with one_thread():
            R, V, T = _reflect(below)
        below[: len(R)] = R
        panel = Panel(j + w, V, T)
        _two_sided(A, panel)
        panels.append(panel)
    band = np.zeros((w + 1, n), order="F")
    for i in range(w + 1):
        band[i, : n - i] = A.diagonal(-i).numpy()
    return band, panels


def _reflect(P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P = (I − V T V') R: (R, V, T), V unit lower trapezoidal."""
    packed, tau = torch.geqrf(P)
    m = len(tau)
    V = packed[:, :m].tril(-1).contiguous()
    V.diagonal().fill_(1.0)
    G = tau[:, None] * (V.mT @ V).triu(1)  # T = (D⁻¹ + striu(V'V))⁻¹, D = diag(tau), also where a tau is zero
    T = torch.linalg.solve_triangular(G, torch.diag(tau), upper=True, unitriangular=True)
    return packed[:m].triu(), V, T


def _two_sided(A: Tensor, panel: Panel) -> None:
    """H' A H on the lower triangle from ``panel.first`` on, H the reflection: A − X V' − V X'."""
    first, V, T = panel.first, panel.V, panel.T
    VT = V @ T
    Y = torch.zeros_like(VT)
    for c, d in _blocks(first, len(A)):
        Y[c - first :].addmm_(A[c:, c:d], VT[c - first : d - first])
        Y[c - first : d - first].addmm_(A[d:, c:d].mT, VT[d - first :])
    X = Y.addmm_(V, T.mT @ (V.mT @ Y), alpha=-0.5)
    left, right = torch.cat([X, V], dim=1), torch.cat([V, X], dim=1)
    for c, d in _blocks(first, len(A)):
        A[c:, c:d].addmm_(left[c - first :], right[c - first : d - first].mT, alpha=-1.0)


def _blocks(first: int, n: int) -> Iterator[tuple[int, int]]:
    """Ranges of columns from ``first`` on, with the same limits for every panel; diagonal blocks are whole."""
    while first < n:
        last = min((first // BLOCK + 1) * BLOCK, n)
        yield first, last
        first = last


class BandFactor:
    """The Cholesky factor of a banded matrix in LAPACK's lower band storage, which is overwritten.

    Raises:
        torch.linalg.LinAlgError: The matrix is not positive definite.
    """

    def __init__(self, band: np.ndarray) -> None:
        self.L, info = dpbtrf(band, lower=1, overwrite_ab=1)
        if info or not np.isfinite(self.L[0]).all():
            raise torch.linalg.LinAlgError(f"leading block of {info} rows")

    @property
    def logdet(self) -> float:
        """The log-determinant."""
        return 2.0 * float(np.log(self.L[0]).sum())

    def solve(self, rhs: Tensor) -> Tensor:
        """The inverse times ``rhs``, shape (n, m)."""
        return torch.from_numpy(dpbtrs(self.L, rhs.numpy(), lower=1)[0])

    def inverse_trace(self) -> float:
        """The trace of the inverse, a sum of squares, in 3 n w² operations.

        With D_j the blocks of w columns of L on the diagonal and C_j those below them, the squares of a block row of
        L⁻¹ sum up to the trace of R_j = D_j⁻¹(I + C_{j−1} R_{j−1} C'_{j−1})D_j⁻ᵀ.
        """
        trace, w = 0.0, max(len(self.L) - 1, 1)
        inner = unit = np.eye(w)
        for first, panel in zip(range(0, self.L.shape[1], w), self._panels(w), strict=True):
            D, C = panel[:w], panel[w:]
            R = dtrtrs(D, dtrtrs(D, inner, lower=1)[0].T, lower=1)[0]
            trace += float(R.diagonal()[: self.L.shape[1] - first].sum())
            inner = unit + C @ R @ C.T
        return trace

    def _panels(self, w: int) -> np.ndarray:
        """L by blocks of w columns, each with the 2w rows from its diagonal on; 1 on the diagonal beyond the end."""
        n = self.L.shape[1]
        blocks = -(-n // w)
        skewed = np.zeros((blocks * w, 2 * w + 1))  # column c of a block begins in row c: one further in rows of 2w
        skewed[:n, : len(self.L)] = self.L.T
        skewed[n:, 0] = 1.0
        return skewed.reshape(blocks, -1)[:, : 2 * w * w].reshape(blocks, w, 2 * w).transpose(0, 2, 1)


def band_times(band: np.ndarray, x: Tensor) -> Tensor:
    """B ``x``, shape (n, m)."""
    given, product = x.numpy(), np.empty(x.shape, order="F")
    for j in range(x.shape[1]):
        dsbmv(len(band) - 1, 1.0, band, given[:, j], y=product[:, j], overwrite_y=1, lower=1)
    return torch.from_numpy(product)
