r"""The mixed-model equations solved at one θ.

With B₁ the design of the term that is eliminated level by level, B_T that of the rest, and covariances S and Ĝ in units
of σ²,

    S̃ = B_T'R₀⁻¹B_T − Σ_l C_l'K_l C_l,   K_l = S(I + A_l S)⁻¹,   N_l = (I + A_l S)⁻¹,   Φ = Ĝ (I + S̃Ĝ)⁻¹,

and everything that a likelihood, its gradient and predictions ask for follows from products with (I + S̃Ĝ)⁻¹ and Φ. The
formulas hold for singular covariances.
"""

from functools import cached_property

import torch
from torch import Tensor

from openreml_nn.solvers.cross_products import CrossProducts
from openreml_nn.solvers.rests import CorrelatedRest, IndependentRest, Rest
from openreml_nn.solvers.small_blocks import eliminate, multiply, transpose


class Equations:
    """The equations at one θ; tensors without history.

    What the levels of the first term give to all others are sums over them: log-determinant, S̃ and F by the rest and by
    itself when they are eliminated, and the derivatives of what they share.

    Args:
        products: Cross-products of the data.
        n: Number of rows.
        p: Columns of U.
        sigma2: σ².
        first: Covariance S of the first term by level, shape (s, s, L), or (s, s, 1) if all levels share it.
        rest: Covariance of each other term: its diagonal (q,), or all of it (q, q).
    """

    def __init__(self, products: CrossProducts, n: int, p: int, sigma2: Tensor, first: Tensor,
                 rest: list[Tensor]) -> None:  # fmt: skip
        self.products, self.n, self.p, self.sigma2 = products, n, p, sigma2
        self.S, self.G = first / sigma2, [G / sigma2 for G in rest]
        self.diagonal = all(G.ndim == 1 for G in self.G)
        self.K, self.N, logdet_first = eliminate(products.first, self.S)
        KF = multiply(self.K, products.first_F)
        FF = products.FF - sum(left @ right.mT for left, right in zip(products.first_F, KF, strict=True))
        self.logdet_V = n * sigma2.log() + logdet_first
        self.rest: Rest | None = None
        self.NF = self.PhiF = products.rest_F
        if len(self.NF):
            coupling, layout = products.coupling, products.layout
            Schur, TF = coupling.schur(products.rest, self.K), products.rest_F - coupling.to_rest(KF)
            self.rest = (
                IndependentRest(layout, Schur, torch.cat(self.G)) if self.diagonal
                else CorrelatedRest(layout, Schur, self.G)
            )  # fmt: skip
            self.NF, self.PhiF = self.rest.solve(TF)
            FF = FF - TF.mT @ self.PhiF
            self.logdet_V = self.logdet_V + self.rest.logdet
        UU, Ue, ee = FF[:p, :p], FF[:p, p], FF[p, p]
        L = torch.linalg.cholesky(UU)
        self.UU_inverse = torch.cholesky_inverse(L) if p else L
        self.gamma = self.UU_inverse @ Ue
        self.ePe = (ee - Ue @ self.gamma) / sigma2
        self.logdet_M = 2.0 * L.diagonal().log().sum() - p * sigma2.log()

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
        own = multiply(self.N, self.products.first)
        if self.rest is None:
            return own
        return own - multiply(multiply(self.N, self.products.coupling.within(self.rest.Phi)), transpose(self.N))

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
        """B'V⁻¹t σ² from B'R₀⁻¹t, shapes (s, m, L) and (q, m)."""
        if self.rest is None:
            return multiply(self.N, first), rest
        coupling = self.products.coupling
        down, u = self.rest.solve(rest - coupling.to_rest(multiply(self.K, first)))
        return multiply(self.N, first - coupling.to_first(u)), down

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
        r"""Derivatives of a log|V| + b log|U'V⁻¹U| + c e'Pe with respect to σ², S and the other covariances.

        B'(aV⁻¹ − bQQ' − cPe(Pe)')B for each covariance; that of σ² follows from the trace of the same with V, which is
        a n − b p − c e'Pe.
        """
        first_Pe, rest_Pe = self.Pe
        first = (a * self.first_blocks - b * self._first_UU()) / self.sigma2 - c * first_Pe[:, None] * first_Pe
        if self.S.shape[2] == 1:
            first = first.sum(2, keepdim=True)
        outer = rest_Pe.square() if self.diagonal else torch.outer(rest_Pe, rest_Pe)
        whole = (a * self.rest_blocks - b * self._rest_UU()) / self.sigma2 - c * outer
        rest, offset = [], 0
        for G in self.G:
            own = slice(offset, offset + len(G))
            part = whole[own] if self.diagonal else whole[own, own]
            rest.append(part.diagonal() if part.ndim > G.ndim else part)
            offset += len(G)
        explained = (first * self.S).sum() + sum((g * G).sum() for g, G in zip(rest, self.G, strict=True))
        return (a * self.n - b * self.p - c * self.ePe) / self.sigma2 - explained, first, rest
