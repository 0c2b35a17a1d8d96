r"""The system of the rest, (I + S̃Ĝ)⁻¹ and Φ = Ĝ (I + S̃Ĝ)⁻¹, for independent effects and for correlated ones.

Independent effects have a Cholesky factor of S̃ + Ĝ⁻¹, which is Φ⁻¹. It is as accurate as one of I + √Ĝ S̃ √Ĝ, because
rounding in a Cholesky factor does not depend on the scale of rows; so a variance of zero may stand for one that is
smaller than anything beside which it counts. Correlated effects, whose covariance may be singular, have an LU factor.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from openreml_nn.solvers.layouts import Layout
from openreml_nn.solvers.small_blocks import is_indefinite

LEAST = 1e-120  # ratio of a variance to σ² that stands for zero
CANCELLED = 1e-3  # share of 1 − Φ/Ĝ below which it is not taken as a difference


class Rest(ABC):
    """Base class: the system at one θ.

    Attributes:
        logdet: log|I + S̃Ĝ|.
    """

    logdet: Tensor

    @abstractmethod
    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """(I + S̃Ĝ)⁻¹ ``rhs`` and Φ ``rhs``, each of shape (q, m)."""

    @property
    @abstractmethod
    def Phi(self) -> Tensor:
        """The elements of Φ that the layout has a place for, whole."""

    @property
    @abstractmethod
    def dense_Phi(self) -> Tensor:
        """Φ, shape (q, q), symmetric."""

    @property
    @abstractmethod
    def blocks(self) -> Tensor:
        """B_T'V⁻¹B_T σ² = (I + S̃Ĝ)⁻¹S̃: its diagonal, shape (q,), for independent effects, else all of it."""


class IndependentRest(Rest):
    """A diagonal Ĝ.

    Args:
        layout: How S̃ is kept.
        Schur: S̃ by its lower triangle; it is written to.
        G: The diagonal of Ĝ, shape (q,).

    Raises:
        torch.linalg.LinAlgError: The system is not positive definite, or a variance is negative.
    """

    def __init__(self, layout: Layout, Schur: Tensor, G: Tensor) -> None:
        self.layout, self.Schur, self.own = layout, Schur, layout.diagonal(Schur)
        G = torch.where(G >= 0.0, G.clamp(min=LEAST), torch.nan)  # without a factor, as `factor` will find
        self.precision = G.reciprocal()
        layout.set_diagonal(Schur, self.own + self.precision)
        self.factor = layout.factor(Schur)
        self.logdet = (self.factor.pivots * G).log().sum()

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        u = self.factor.solve(rhs)
        return self.precision[:, None] * u, u

    @cached_property
    def Phi(self) -> Tensor:
        return self.factor.inverse()

    @property
    def dense_Phi(self) -> Tensor:
        return self.factor.dense_inverse()

    @cached_property
    def blocks(self) -> Tensor:
        explained = 1.0 - self.layout.diagonal(self.Phi) * self.precision
        if not explained.is_cpu or bool((explained < CANCELLED).any()):  # a look at a GPU costs more than the sums
            self.layout.set_diagonal(self.Schur, self.own)
            explained = self.layout.row_sums(self.Phi * self.Schur)
        return explained * self.precision


class CorrelatedRest(Rest):
    """Any Ĝ, on a dense layout.

    Args:
        layout: How S̃ is kept.
        Schur: S̃ by its lower triangle.
        G: Ĝ by terms: the diagonal (q,), or all of it (q, q).

    Raises:
        torch.linalg.LinAlgError: A covariance is indefinite by more than rounding, or the system has no solution.
    """

    def __init__(self, layout: Layout, Schur: Tensor, G: list[Tensor]) -> None:
        self.Schur = layout.dense(Schur)
        self.G = torch.block_diag(*(torch.diag(own) if own.ndim == 1 else own for own in G))
        M = self.Schur @ self.G
        M.diagonal().add_(1.0)
        self.LU, self.pivots = torch.linalg.lu_factor(M)
        swaps = (self.pivots != torch.arange(1, len(M) + 1, device=M.device)).sum()
        odd = ((self.LU.diagonal() < 0).sum() + swaps) % 2 == 1  # a negative determinant
        if bool(torch.stack([odd, *(is_indefinite(own) for own in G)]).any()):
            raise torch.linalg.LinAlgError("The matrix of the rest is not positive definite.")
        self.logdet = self.LU.diagonal().abs().log().sum()

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        NF = torch.linalg.lu_solve(self.LU, self.pivots, rhs)
        return NF, self.G @ NF

    @property
    def Phi(self) -> Tensor:
        return self.dense_Phi.reshape(-1)

    @cached_property
    def dense_Phi(self) -> Tensor:
        Phi = self.solve(torch.eye(len(self.LU), dtype=self.LU.dtype, device=self.LU.device))[1]
        return 0.5 * (Phi + Phi.mT)

    @cached_property
    def blocks(self) -> Tensor:
        return self.solve(self.Schur)[0]
