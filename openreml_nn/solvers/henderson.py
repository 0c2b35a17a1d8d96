r"""The mixed-model equations solved at one θ.

With B₁ the design of the term that is eliminated level by level, B_T that of the rest, and covariances S and Ĝ in units
of σ²,

    S̃ = B_T'R₀⁻¹B_T − Σ_l C_l'K_l C_l,   K_l = S(I + A_l S)⁻¹,   N_l = (I + A_l S)⁻¹,   Φ = Ĝ (I + S̃Ĝ)⁻¹,

and everything that a likelihood, its gradient and predictions ask for follows from products with (I + S̃Ĝ)⁻¹ and Φ. The
formulas hold for singular covariances.
"""

import math
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from openreml_nn.solvers.cross_products import CrossProducts
from openreml_nn.solvers.ranks import ALONE, Ranks
from openreml_nn.solvers.rests import CorrelatedRest, IndependentRest, Rest
from openreml_nn.solvers.small_blocks import eliminate, multiply, transpose


class NoSolution(LinAlgError):
    """The equations have no solution at a θ.

    Attributes:
        piece: What fails: ``"residual"`` for a σ² that is not above zero, ``"first"`` for the levels of the first term,
            ``"rest"`` for the system of the others, ``"fixed"`` for U'V⁻¹U.
    """

    def __init__(self, piece: str) -> None:
        super().__init__(piece)
        self.piece = piece


class Equations:
    """The equations at one θ; tensors without history.

    What the levels of the first term give to all others are sums over them: log-determinant, S̃ and F by the rest and by
    itself when they are eliminated, and the derivatives of what they share. Where each of several processes has levels
    of its own, with products of its own rows, these sums are over all processes, and what is said of levels is of its
    own ones.

    Args:
        products: Cross-products of the data.
        n: Number of rows.
        p: Columns of U.
        sigma2: σ².
        first: Covariance S of the first term by level, shape (s, s, L), or (s, s, 1) if all levels share it; over σ².
        rest: Covariance of each other term: its diagonal (q,), or all of it (q, q); over σ².
        ranks: The processes of which each has levels of its own of the first term.

    Raises:
        NoSolution: σ² is not above zero, a covariance is indefinite, or U'V⁻¹U has no Cholesky factor.
    """

    def __init__(self, products: CrossProducts, n: int, p: int, sigma2: Tensor, first: Tensor,
                 rest: list[Tensor], ranks: Ranks = ALONE) -> None:  # fmt: skip
        self.products, self.n, self.p, self.sigma2 = products, n, p, sigma2
        self.S, self.G, self.ranks = first, rest, ranks
        self.diagonal = all(G.ndim == 1 for G in rest)
        self.rest: Rest | None = None
        logdet, FF, Schur, TF = self._eliminate_first()
        first_logdet = logdet
        self.NF = self.PhiF = TF
        if len(TF):
            layout = products.layout
            try:
                self.rest = (
                    IndependentRest(layout, Schur, torch.cat(rest)) if self.diagonal
                    else CorrelatedRest(layout, Schur, rest)
                )  # fmt: skip
            except LinAlgError as error:
                raise NoSolution(self._failing(first_logdet)) from error
            self.NF, self.PhiF = self.rest.solve(TF)
            FF = FF - TF.mT @ self.PhiF
            logdet = logdet + self.rest.logdet
        L, info = torch.linalg.cholesky_ex(FF[:p, :p])
        self.UU_inverse = torch.cholesky_inverse(L) if p else L
        self.gamma = self.UU_inverse @ FF[:p, p]
        self.ePe = (FF[p, p] - FF[p, :p] @ self.gamma) / sigma2
        log_sigma2 = sigma2.log()
        self.logdet_V = n * log_sigma2 + logdet
        self.logdet_M = 2.0 * L.diagonal().log().sum() - p * log_sigma2
        if not math.isfinite((self.logdet_V + self.logdet_M + self.ePe) / (info == 0)):  # one number is read
            raise NoSolution(self._failing(first_logdet))

    def _failing(self, first_logdet: Tensor) -> str:
        """Which piece has no solution."""
        if not bool(self.sigma2 > 0.0):
            return "residual"
        if not bool(first_logdet.isfinite()):
            return "first"
        return "rest" if len(self.G) and (self.rest is None or not bool(self.rest.logdet.isfinite())) else "fixed"

    def _eliminate_first(self) -> list[Tensor]:
        """What is left when the first term is eliminated: log|I + A S|, F by itself, S̃, and F by the rest."""
        products, ranks = self.products, self.ranks
        left = [self.sigma2.new_zeros(()), products.FF, products.rest, products.rest_F]
        try:
            self.K, self.N, left[0] = eliminate(products.first, self.S)
        except LinAlgError as error:
            left[0] = left[0] + torch.nan
            ranks.sums(*(torch.full_like(part, torch.nan) for part in left))  # the other processes are told
            raise NoSolution(self._failing(left[0])) from error
        KF = multiply(self.K, products.first_F)
        left[1] = products.FF - inner(products.first_F, KF)
        if len(products.rest_F):
            coupling = products.coupling
            left[2:] = coupling.schur(products.rest, self.K), products.rest_F - coupling.to_rest(KF)
        left = ranks.sums(*left)
        if ranks.size > 1 and bool(left[0].isnan()):
            raise NoSolution(self._failing(left[0]))
        return left

    # ---- what V⁻¹ and P are between the designs, times σ² ------------------------------------------------------------

    @property
    def Phi(self) -> Tensor:
        """Φ, shape (q, q), symmetric."""
        return self.NF.new_zeros((0, 0)) if self.rest is None else self.rest.dense_Phi

    @cached_property
    def first_F(self) -> Tensor:
        """B₁'V⁻¹F σ² by level, shape (s, f, L)."""
        left = self.products.first_F
        return multiply(self.N, left if self.rest is None else left - self.products.coupling.to_first(self.PhiF))

    @cached_property
    def first_blocks(self) -> Tensor:
        """Blocks of B₁'V⁻¹B₁ σ², shape (s, s, L)."""
        left = self.products.first
        if self.rest is not None:
            left = left - multiply(self.products.coupling.within(self.rest.Phi), transpose(self.N))
        return multiply(self.N, left)

    @property
    def rest_blocks(self) -> Tensor:
        """B_T'V⁻¹B_T σ² = (I + S̃Ĝ)⁻¹S̃: its diagonal, shape (q,), where Ĝ is diagonal, else all of it."""
        return self.NF[:, 0] if self.rest is None else self.rest.blocks

    @cached_property
    def Pe(self) -> tuple[Tensor, Tensor]:
        """B'Pe for the first term, shape (s, L), and for the rest, shape (q,)."""
        contrast = torch.cat([-self.gamma, self.gamma.new_ones(1)]) / self.sigma2
        return contrast @ self.first_F, self.NF @ contrast

    def down(self, first: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """B'V⁻¹t σ² from B'R₀⁻¹t, shapes (s, m, L) and (q, m); the latter of the rows of a process."""
        if self.rest is None:
            return multiply(self.N, first), rest
        return self._down(first, rest - self.products.coupling.to_rest(multiply(self.K, first)), self.rest)

    def down_effects(self, first: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """``down`` of t = Bα, from the effects α, shapes (s, m, L) and (q, m)."""
        products, t = self.products, multiply(self.products.first, first)
        if self.rest is None:
            return multiply(self.N, t), rest
        t = t + products.coupling.to_first(rest)
        left = products.rest_matrix @ rest + products.coupling.to_rest(first - multiply(self.K, t))
        return self._down(t, left, self.rest)

    def _down(self, first: Tensor, left: Tensor, rest: Rest) -> tuple[Tensor, Tensor]:
        """``down`` where ``left``, added up, is what is left of the rest when the first term is eliminated."""
        down, u = rest.solve(self.ranks.sum(left))
        return multiply(self.N, first - self.products.coupling.to_first(u)), down

    def projected_blocks(self) -> tuple[Tensor, Tensor]:
        """As ``first_blocks`` and ``rest_blocks``, with P in the place of V⁻¹."""
        return self.first_blocks - self._first_UU(), self.rest_blocks - self._rest_UU()

    def _first_UU(self) -> Tensor:
        """Blocks of B₁'V⁻¹U (U'V⁻¹U)⁻¹ U'V⁻¹B₁ σ², shape (s, s, L)."""
        first_U = self.first_F[:, : self.p]
        scaled = self.UU_inverse @ first_U
        return torch.stack([torch.stack([(left * right).sum(0) for right in scaled]) for left in first_U])

    def _rest_UU(self) -> Tensor:
        """B_T'V⁻¹U (U'V⁻¹U)⁻¹ U'V⁻¹B_T σ², in the shape of ``rest_blocks``."""
        rest_U = self.NF[:, : self.p]
        scaled = rest_U @ self.UU_inverse
        return (scaled * rest_U).sum(1) if self.diagonal else scaled @ rest_U.mT

    # ---- derivatives -------------------------------------------------------------------------------------------------

    def gradients(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        r"""Derivatives of f = a log|V| + b log|U'V⁻¹U| + c e'Pe along V, and with respect to all covariances but σ².

        They are B'(aV⁻¹ − bQQ' − cPe(Pe)')B for each covariance. Along V, σ² ∂f/∂σ² + Σ S ∂f/∂S is a n − b p − c e'Pe.

        Returns:
            (σ² ∂f/∂σ² + Σ S ∂f/∂S, ∂f/∂S, what the others are), the latter in the shapes of ``first`` and ``rest``.
        """
        first_Pe, rest_Pe = self.Pe
        if self.S.shape[2] == 1:
            blocks, of_U, outer = self._sum_of_first_blocks(), self._sum_of_first_UU(), first_Pe @ first_Pe.mT
        else:
            blocks, of_U, outer = self.first_blocks, self._first_UU(), first_Pe[:, None] * first_Pe
        first = self.ranks.sum((a * blocks - b * of_U) / self.sigma2 - c * outer).view(self.S.shape)
        outer = rest_Pe.square() if self.diagonal else torch.outer(rest_Pe, rest_Pe)
        whole = (a * self.rest_blocks - b * self._rest_UU()) / self.sigma2 - c * outer
        rest, offset = [], 0
        for G in self.G:
            own = slice(offset, offset + len(G))
            part = whole[own] if self.diagonal else whole[own, own]
            rest.append(part.diagonal() if part.ndim > G.ndim else part)
            offset += len(G)
        return a * self.n - b * self.p - c * self.ePe, first, rest

    def _sum_of_first_blocks(self) -> Tensor:
        """Σ_l of ``first_blocks``, shape (s, s)."""
        if self.rest is not None:
            return self.first_blocks.sum(2)
        return inner(self.N.transpose(0, 1), self.products.first)

    def _sum_of_first_UU(self) -> Tensor:
        """Σ_l of ``_first_UU``, shape (s, s)."""
        s, p = len(self.S), self.p
        flat = self.first_F[:, :p].reshape(s * p, self.first_F.shape[2])
        return ((flat @ flat.mT).view(s, p, s, p) * self.UU_inverse[:, None]).sum((1, 3))


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Σ_l left_l' right_l, shape (m, k), for shapes (s, m, L) and (s, k, L)."""
    return torch.bmm(left, right.mT).sum(0)
