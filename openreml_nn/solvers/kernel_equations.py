r"""The numbers of V = aA + bI at one a and b, from a reduction A = QBQ' and [U e] in its coordinates; all on the host.

With F the rows' coordinates (columns SQ, see `spectral_form`), c = F'v for a vector v of rows, H = (aB + bI)⁻¹ and v⊥
what of v the kernel does not reach,

    S'S = I, A = FBF':      V⁻¹v = F H c + v⊥/b,            AV⁻¹v = F B H c;
    A = FF', F'F = B:       V⁻¹v = −(a/b) F H c + v/b,      AV⁻¹v = F H c,

so that U and e enter through C = F'[U e] and the cross-products E of what is left. Matrices of p + 1 columns are
NumPy's, which starts an operation in a fifth of the time that PyTorch takes.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from openreml_nn.solvers.reductions import Reduction

FEW_DIGITS = 1e-3  # share of a quadratic form below which a difference has lost three digits of it
NO_DIGITS = 1e-14  # share below which hardly one is left
ROUNDING = 1e-16  # of a vector


@dataclass(frozen=True)
class KernelData:
    """What the numbers of V depend on beside a and b.

    Attributes:
        reduction: The reduced kernel.
        orthonormal: Whether S'S = I.
        outside: Dimensions that the kernel does not reach.
        C: F'[U e], shape (m, p + 1), column after column.
        E: Cross-products of what is left of [U e], shape (p + 1, p + 1).
    """

    reduction: Reduction
    orthonormal: bool
    outside: int
    C: Tensor
    E: np.ndarray

    @property
    def p(self) -> int:
        """Rank of X."""
        return len(self.E) - 1

    @cached_property
    def ee(self) -> float:
        """e'e."""
        e = self.C.numpy()[:, -1]
        return float(self.E[-1, -1] + (e @ e if self.orthonormal else 0.0))


class KernelEquations:
    """V factored at one a and b.

    Attributes:
        logdet_V: log|V|.
        logdet_M: log|M|, M = U'V⁻¹U.
        ePe: e'Pe.
        L: The Cholesky factor of M, shape (p, p).
        M_inverse: M⁻¹.
        z: [−γ̂, 1], so that [U e]z is the residual of generalised least squares.
        HX: H F'[U [U e]z], shape (m, p + 1).

    Raises:
        torch.linalg.LinAlgError: V is not positive definite, or so close to that that U'V⁻¹U or e'Pe is lost.
    """

    def __init__(self, data: KernelData, a: float, b: float) -> None:
        self.data, self.a, self.b = data, a, b
        if not (math.isfinite(a) and math.isfinite(b)):
            raise torch.linalg.LinAlgError("no finite variances")
        if data.outside and not b > 0:
            raise torch.linalg.LinAlgError("no residual variance")
        factored = data.reduction.factor(a, b)
        self.H = factored.solve
        self.logdet_V = factored.logdet + (data.outside * math.log(b) if data.outside else 0.0)
        self.of_rest = 1.0 / b if data.outside else 0.0
        self.of_span = 1.0 if data.orthonormal else -a / b
        with np.errstate(over="ignore", invalid="ignore"):  # of a response beyond 1e154, whose e'Pe is looked at
            self._fit()
            self._require_digits()

    def _fit(self) -> None:
        C, E, p = self.data.C.numpy(), self.data.E, self.data.p
        HX = self.H(self.data.C).numpy()
        G = self.of_span * (C.T @ HX) + self.of_rest * E
        self.M = G[:p, :p]
        try:
            self.L, self.M_inverse = np.linalg.cholesky(self.M), np.linalg.inv(self.M)
        except np.linalg.LinAlgError as error:
            raise torch.linalg.LinAlgError("U'V⁻¹U") from error
        self.z = z = np.append(-self.M_inverse @ G[:p, p], 1.0)
        HX[:, p] = HX @ z
        self.HX = HX
        self.ePe = float(self.of_span * (C @ z) @ HX[:, p] + self.of_rest * (z @ E @ z))
        self.logdet_M = 2.0 * float(np.log(self.L.diagonal()).sum())

    def _require_digits(self) -> None:
        """e'Pe of a response without noise is a difference, or a square, of which only rounding is left."""
        if not math.isfinite(self.ePe):
            raise torch.linalg.LinAlgError("e'Pe is not finite; give y in larger units")
        terms = self.of_rest * (abs(self.z) @ abs(self.data.E) @ abs(self.z) + ROUNDING * self.data.ee)
        if not self.ePe > NO_DIGITS * terms:
            raise torch.linalg.LinAlgError(f"e'Pe = {self.ePe:.3g} is rounding of {terms:.3g}: is y without noise?")

    @cached_property
    def _second(self) -> tuple[np.ndarray, np.ndarray]:
        """X'V⁻¹AV⁻¹X and X'V⁻¹V⁻¹X for X = [U [U e]z], each of shape (p + 1, p + 1).

        One of them gives the other, by a X'V⁻¹AV⁻¹X + b X'V⁻¹V⁻¹X = X'V⁻¹X.
        """
        data, p, HX = self.data, self.data.p, self.HX
        span = HX.T @ HX
        whole = np.zeros_like(span)
        whole[:p, :p], whole[p, p] = self.M, self.ePe
        if not data.orthonormal:
            return span, (whole - self.a * span) / self.b
        without = span
        if data.outside:
            T = np.eye(p + 1)
            T[:, p] = self.z
            without = span + self.of_rest**2 * (T.T @ data.E @ T)
        part_of_A = whole - self.b * without
        if (part_of_A.diagonal() > FEW_DIGITS * whole.diagonal()).all():
            return part_of_A / self.a, without
        return HX.T @ data.reduction.times(torch.from_numpy(HX)).numpy(), without

    def jacobian(self) -> np.ndarray:
        """∂(log|V|, log|M|, e'Pe)/∂(a, b), shape (3, 2)."""
        data, p, second = self.data, self.data.p, self._second
        of_a, of_b = data.reduction.slopes(self.a, self.b)
        J = np.array([[of_a, of_b + data.outside * self.of_rest], [0.0, 0.0], [0.0, 0.0]])
        for i, N in enumerate(second):
            J[1, i], J[2, i] = -(self.M_inverse * N[:p, :p]).sum(), -N[p, p]
        return J

    def information(self) -> np.ndarray:
        """[APe Pe]'P[APe Pe], shape (2, 2)."""
        data, p, Hc = self.data, self.data.p, torch.from_numpy(self.HX[:, self.data.p :])
        pair = np.empty((len(Hc), 2), order="F")
        pair[:, :1], pair[:, 1:] = Hc, data.reduction.times(Hc)
        (s, sB), (_, sBB) = pair.T @ self.H(torch.from_numpy(pair)).numpy()
        if data.orthonormal:
            aa, ab, bb = sBB, sB, s + self.of_rest**3 * (self.z @ data.E @ self.z)
        else:
            aa, ab, bb = sB, s, (self._second[1][p, p] - self.a * s) / self.b
        n = np.stack([N[:p, p] for N in self._second])
        return np.array([[aa, ab], [ab, bb]]) - n @ self.M_inverse @ n.T
