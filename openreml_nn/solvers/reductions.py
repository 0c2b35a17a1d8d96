r"""A symmetric matrix A reduced once, A = Q B Q', so that aA + bI is cheap at every a and b.

What is reduced depends on a kernel and on which of its levels have records, not on the response and the fixed effects:
a caller may keep the reduction and hand it to the solvers for further responses and sub-models.
"""

import math
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Chebyshev
from torch import Tensor

from openreml_nn.covariance import KnownMatrix
from openreml_nn.covariance.levels import tensor_of
from openreml_nn.solvers.band import BandFactor, Panel, band_times, bandwidth_for, reduce_to_band
from openreml_nn.solvers.memory import require_memory
from openreml_nn.solvers.sources import Source, known

CELL = 6.0  # length of the intervals of log(a/b) on which the log-determinant is interpolated
CELLS = 1  # of them with more of A in V; beyond b has less than 1e-4 of V, and a difference loses too many digits
DEGREE = 44  # of the interpolation: its error is below rounding, see `BandReduction`
SMALL = 1e-7  # of the largest eigenvalue of aB/b: the series of (I + aB/b)⁻¹ then ends after two terms
FEW_COLUMNS = 64  # columns below which a product with Q is bound by memory


class Reduction(ABC):
    """A = Q B Q'. Q is applied where the kernel is, B and what is factored are on the host.

    Attributes:
        source: What was reduced.
        size: Rows of A.
        trace: tr A.
    """

    source: Source
    size: int
    trace: float

    @abstractmethod
    def rotate(self, x: Tensor) -> Tensor:
        """Q'x, shape (size, m)."""

    @abstractmethod
    def rotate_back(self, x: Tensor) -> Tensor:
        """Q x, shape (size, m)."""

    @abstractmethod
    def times(self, x: Tensor) -> Tensor:
        """B x, shape (size, m)."""

    @abstractmethod
    def factor(self, a: float, b: float) -> "BandFactor | DiagonalFactor":
        """Factor aB + bI: an object with its log-determinant that solves with it.

        Raises:
            torch.linalg.LinAlgError: It is not positive definite.
        """

    @abstractmethod
    def slopes(self, a: float, b: float) -> tuple[float, float]:
        """Derivatives of log|aB + bI| with respect to a and b."""


class DiagonalFactor:
    """A positive definite diagonal matrix.

    Raises:
        torch.linalg.LinAlgError: It is not positive definite.
    """

    def __init__(self, values: Tensor) -> None:
        if not bool((values > 0).all()):
            raise torch.linalg.LinAlgError(f"smallest eigenvalue {float(values.min()):.3g}")
        self.values = values

    @property
    def logdet(self) -> float:
        """The log-determinant."""
        return float(self.values.log().sum())

    def solve(self, rhs: Tensor) -> Tensor:
        """The inverse times ``rhs``, shape (n, m)."""
        return rhs / self.values[:, None]


class SpectralDecomposition(Reduction):
    """B = diag(λ), Q the eigenvectors; Q = I where they are None. Products with Q run where the kernel is."""

    def __init__(self, source: Source, eigenvalues: Tensor, vectors: Tensor | None) -> None:
        self.source, self.size = source, len(eigenvalues)
        self.eigenvalues, self.vectors = eigenvalues.cpu(), vectors
        self.trace = float(self.eigenvalues.sum())

    def rotate(self, x: Tensor) -> Tensor:
        return x if self.vectors is None else self.vectors.mT @ x

    def rotate_back(self, x: Tensor) -> Tensor:
        return x if self.vectors is None else self.vectors @ x

    def times(self, x: Tensor) -> Tensor:
        return self.eigenvalues[:, None] * x

    def factor(self, a: float, b: float) -> "DiagonalFactor":
        return DiagonalFactor(a * self.eigenvalues + b)

    def slopes(self, a: float, b: float) -> tuple[float, float]:
        values = a * self.eigenvalues + b
        return float((self.eigenvalues / values).sum()), float(values.reciprocal().sum())


class BandReduction(Reduction):
    r"""B banded, Q a product of reflections: a tenth of the work of eigenvectors, 2 n² operations for a product with Q.

    The derivatives of log|aB + bI| = n log b + f(log a/b), f(t) = log|I + eᵗB|, come from a polynomial through f at
    Chebyshev points. f is analytic for |Im t| < π, so that on intervals of length 6 the error of degree 44 is below
    2.49⁻⁴⁴ = 4e-18 of f (Trefethen 2013, Approximation Theory and Approximation Practice, theorem 8.2). It costs 45
    factors once and next to nothing for a further a and b; where b is small beside aB the trace of (aB + bI)⁻¹, which
    takes the time of three factors, has the digits that n − f'(t) has not.
    """

    def __init__(self, source: Source, A: Tensor) -> None:
        self.source, self.size = source, len(A)
        self.trace = float(A.diagonal().sum())
        self.band, self.panels = reduce_to_band(A, bandwidth_for(len(A)))
        self.squares = float(2.0 * np.square(self.band).sum() - np.square(self.band[0]).sum())  # tr(A²)
        self._slopes: dict[int, Chebyshev] = {}
        self._even = -math.log(self.trace / self.size) if self.trace > 0 else 0.0  # t at which both have a half of V

    def rotate(self, x: Tensor) -> Tensor:
        return self._apply(x, self.panels, transpose=True)

    def rotate_back(self, x: Tensor) -> Tensor:
        return self._apply(x, self.panels[::-1], transpose=False)

    def _apply(self, x: Tensor, panels: list[Panel], transpose: bool) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        if x.shape[1] < FEW_COLUMNS:
            few = x.numpy()
            for panel in panels:
                panel.apply_to_few(few, transpose)
        else:
            for panel in panels:
                panel.apply(x, transpose)
        return x

    def times(self, x: Tensor) -> Tensor:
        return band_times(self.band, x)

    def factor(self, a: float, b: float) -> BandFactor:
        shifted = self.band * a
        shifted[0] += b
        return BandFactor(shifted)

    def slopes(self, a: float, b: float) -> tuple[float, float]:
        if abs(a) * math.sqrt(self.squares) < SMALL * b:
            return (self.trace - a / b * self.squares) / b, (self.size - a / b * self.trace) / b
        t = math.log(a / b) if a > 0.0 and b > 0.0 else math.inf
        if t - self._even < (CELLS + 0.5) * CELL:
            with suppress(torch.linalg.LinAlgError):  # B has eigenvalues below zero, and I + eᵗB no factor somewhere
                slope = float(self._slope_on(round((t - self._even) / CELL))(t))
                return slope / a, (self.size - slope) / b
        of_b = self.factor(a, b).inverse_trace()
        return (self.size - b * of_b) / a, of_b

    def _slope_on(self, cell: int) -> Chebyshev:
        """f'(t) on an interval; kept, since it depends on B alone."""
        if cell not in self._slopes:
            ends = [self._even + (cell - 0.5) * CELL, self._even + (cell + 0.5) * CELL]
            f = Chebyshev.interpolate(
                lambda t: np.array([self.factor(math.exp(s), 1.0).logdet for s in t]), DEGREE, domain=ends
            )
            self._slopes[cell] = f.deriv()
        return self._slopes[cell]


def reduce_kernel(K: Any, counts: Any = None, *, eigenvectors: bool | None = None) -> Reduction:
    r"""Reduce a kernel once, for fits of any response and any fixed effects on it.

    Args:
        K: Tensor or array-like of shape (q, q), symmetric and positive semi-definite, or a `KnownMatrix`.
        counts: Number of records of each level, shape (q,); 1 each when left out. What is reduced is √D K √D over the
            levels with records, D = diag(counts): with √D the means of the levels have the residual variance σ².
        eigenvectors: Find eigenvectors too, which the solver for several traits needs; always so on a GPU.

    Example:
        >>> import torch
        >>> from openreml_nn.solvers.reductions import reduce_kernel
        >>> reduce_kernel(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), counts=[3, 0]).size
        1
    """
    if not isinstance(K, KnownMatrix):
        given = tensor_of(K).detach().to(torch.float64)
        if given.ndim != 2 or given.shape[0] != given.shape[1]:
            raise ValueError(f"`reduce_kernel` needs a square K, got shape {tuple(given.shape)}.")
        kernel = 0.5 * (given + given.mT)
    else:
        kernel = K.K
    D = torch.ones(len(kernel)) if counts is None else tensor_of(counts)
    if D.shape != (len(kernel),) or bool((D < 0).any()):
        raise ValueError(f"`reduce_kernel` needs a count for each of {len(kernel)} levels, got {tuple(D.shape)}.")
    return reduce(Source("kernel", (kernel, D.to(kernel))), eigenvectors)


def reduce_factor(W: Any, *, eigenvectors: bool | None = None) -> Reduction:
    """Reduce K = W W' through the smaller side of W, shape (n, m): W'W where m < n, else W W'."""
    W = tensor_of(W).detach()
    return reduce(Source("inner" if W.shape[1] < W.shape[0] else "outer", (W,)), eigenvectors)


def reduce(source: Source, eigenvectors: bool | None = None) -> Reduction:
    """Reduce a source: to a band on the CPU, to eigenvectors on a GPU or where they are wanted.

    Raises:
        MemoryError: It does not fit.
    """
    n = source.size
    if source.kind == "kernel" and (source.tensors[0] is None or n == 0):
        D = known(source.tensors[1])
        return SpectralDecomposition(source, D[source.observed], None)
    device = known(source.tensors[0]).device
    full = bool(eigenvectors) or device.type != "cpu"
    require_memory(8 * n * n * (5 if full else 2), device, f"The reduction of a matrix of {n} x {n}")
    A = source.matrix()
    if not full:
        return BandReduction(source, A)
    values, vectors = torch.linalg.eigh(A, UPLO="L")
    return SpectralDecomposition(source, values, vectors)
