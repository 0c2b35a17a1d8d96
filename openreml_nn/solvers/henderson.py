r"""The mixed-model equations solved at one θ.

With B₁ the design of the term that is eliminated level by level, B_T that of the rest, and covariances S and Ĝ in units
of σ²,

    S̃ = B_T'R₀⁻¹B_T − Σ_l C_l'K_l C_l,   K_l = S(I + A_l S)⁻¹,   N_l = (I + A_l S)⁻¹,   Φ = Ĝ (I + S̃Ĝ)⁻¹,

and everything that a likelihood, its gradient and predictions ask for follows from products with (I + S̃Ĝ)⁻¹. The
formulas hold for singular covariances; where Ĝ is diagonal the system is symmetric, I + √Ĝ S̃ √Ĝ.
"""

from functools import cached_property

import torch
from torch import Tensor

from openreml_nn.solvers.cross_products import CrossProducts
from openreml_nn.solvers.small_blocks import eliminate, multiply, transpose

SMALL = 1e-3  # ratio of a variance to σ² below which (I + S̃Ĝ)⁻¹S̃ is taken as a difference, not as a quotient


class Equations:
    """The equations at one θ; tensors without history.

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
        self.Schur, TF = products.rest, products.rest_F
        if len(self.Schur):
            self.Schur, TF = self.Schur - products.coupling.schur(self.K), TF - products.coupling.to_rest(KF)
        logdet_rest = self._factor_rest()
        self.NF = self._apply_N(TF)
        first_FF = sum(left @ right.mT for left, right in zip(products.first_F, KF, strict=True))
        FF = products.FF - first_FF - TF.mT @ self.apply_G(self.NF)
        UU, Ue, ee = FF[:p, :p], FF[:p, p], FF[p, p]
        L = torch.linalg.cholesky(UU)
        self.UU_inverse = torch.cholesky_solve(torch.eye(p, dtype=L.dtype, device=L.device), L)
        self.gamma = self.UU_inverse @ Ue
        self.ePe = (ee - Ue @ self.gamma) / sigma2
        self.logdet_V = n * sigma2.log() + logdet_first + logdet_rest
        self.logdet_M = 2.0 * L.diagonal().log().sum() - p * sigma2.log()

    # ---- the rest: (I + S̃Ĝ)⁻¹ by Cholesky where Ĝ is diagonal, by LU where it is not --------------------------------

    def _factor_rest(self) -> Tensor:
        """Factor; returns log|I + S̃Ĝ|."""
        if self.diagonal:
            self.root = torch.cat(self.G).sqrt() if self.G else self.Schur.new_zeros(0)
            M = self.root[:, None] * self.Schur * self.root
            M.diagonal().add_(1.0)
            self.L = torch.linalg.cholesky(M)
            return 2.0 * self.L.diagonal().log().sum()
        self.dense_G = torch.block_diag(*(torch.diag(G) if G.ndim == 1 else G for G in self.G))
        M = self.Schur @ self.dense_G
        M.diagonal().add_(1.0)
        self.LU, self.pivots = torch.linalg.lu_factor(M)
        swaps = (self.pivots != torch.arange(1, len(M) + 1, device=M.device)).sum()
        if ((self.LU.diagonal() < 0).sum() + swaps) % 2:
            raise torch.linalg.LinAlgError("I + S̃Ĝ has a negative determinant: a covariance of effects is indefinite.")
        return self.LU.diagonal().abs().log().sum()

    def apply_G(self, rhs: Tensor) -> Tensor:
        """Ĝ ``rhs``, shape (q, m)."""
        return self.root.square()[:, None] * rhs if self.diagonal else self.dense_G @ rhs

    def _apply_N(self, rhs: Tensor) -> Tensor:
        """(I + S̃Ĝ)⁻¹ ``rhs``, shape (q, m)."""
        if not self.diagonal:
            return torch.linalg.lu_solve(self.LU, self.pivots, rhs)
        x, small = torch.cholesky_solve(self.root[:, None] * rhs, self.L), self.small
        quotient = x / torch.where(small, 1.0, self.root)[:, None]
        if not bool(small.any()):
            return quotient
        return torch.where(small[:, None], rhs - self.Schur @ (self.root[:, None] * x), quotient)

    @cached_property
    def small(self) -> Tensor:
        """Which effects have next to no variance, shape (q,)."""
        return self.root.square() < SMALL

    @cached_property
    def inverse(self) -> Tensor:
        """(I + √Ĝ S̃ √Ĝ)⁻¹, for a diagonal Ĝ."""
        return torch.cholesky_inverse(self.L) if len(self.L) else self.L

    @cached_property
    def Phi(self) -> Tensor:
        """Φ = Ĝ (I + S̃Ĝ)⁻¹, shape (q, q), symmetric."""
        if self.diagonal:
            return self.root[:, None] * self.inverse * self.root
        Phi = self.dense_G @ self._apply_N(torch.eye(len(self.Schur), dtype=self.LU.dtype, device=self.LU.device))
        return 0.5 * (Phi + Phi.mT)

    # ---- what V⁻¹ and P are between the designs, times σ² ------------------------------------------------------------

    @cached_property
    def first_F(self) -> Tensor:
        """B₁'V⁻¹F σ² by level, shape (s, f, L)."""
        if not len(self.Schur):
            return multiply(self.N, self.products.first_F)
        return multiply(self.N, self.products.first_F - self.products.coupling.to_first(self.apply_G(self.NF)))

    @cached_property
    def first_blocks(self) -> Tensor:
        """Blocks of B₁'V⁻¹B₁ σ², shape (s, s, L)."""
        own = multiply(self.N, self.products.first)
        if not len(self.Schur):
            return own
        return own - multiply(multiply(self.N, self.products.coupling.within(self.Phi)), transpose(self.N))

    @cached_property
    def rest_blocks(self) -> Tensor:
        """B_T'V⁻¹B_T σ² = (I + S̃Ĝ)⁻¹S̃: its diagonal, shape (q,), where Ĝ is diagonal, else all of it."""
        if not self.diagonal:
            return self._apply_N(self.Schur)
        small = self.small
        quotient = ((self.inverse * self.Schur) @ self.root) / torch.where(small, 1.0, self.root)
        if not bool(small.any()):
            return quotient
        difference = self.Schur.diagonal() - ((self.Schur @ self.Phi) * self.Schur).sum(1)
        return torch.where(small, difference, quotient)

    @cached_property
    def Pe(self) -> tuple[Tensor, Tensor]:
        """B'Pe for the first term, shape (s, L), and for the rest, shape (q,)."""
        contrast = torch.cat([-self.gamma, self.gamma.new_ones(1)]) / self.sigma2
        return contrast @ self.first_F, self.NF @ contrast

    def down(self, first: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """B'V⁻¹t σ² from B'R₀⁻¹t, shapes (s, m, L) and (q, m)."""
        if not len(rest):
            return multiply(self.N, first), rest
        coupling = self.products.coupling
        down = self._apply_N(rest - coupling.to_rest(multiply(self.K, first)))
        return multiply(self.N, first - coupling.to_first(self.apply_G(down))), down

    def projected_blocks(self) -> tuple[Tensor, Tensor]:
        """As ``first_blocks`` and ``rest_blocks``, with P in the place of V⁻¹."""
        rest_U = self.NF[:, : self.p]
        first = self.first_blocks - self._first_UU()
        if self.diagonal:
            return first, self.rest_blocks - ((rest_U @ self.UU_inverse) * rest_U).sum(1)
        return first, self.rest_blocks - rest_U @ self.UU_inverse @ rest_U.mT

    def _first_UU(self) -> Tensor:
        """Blocks of B₁'V⁻¹U (U'V⁻¹U)⁻¹ U'V⁻¹B₁ σ², shape (s, s, L)."""
        first_U = self.first_F[:, : self.p]
        scaled = self.UU_inverse @ first_U
        return torch.stack([torch.stack([(left * right).sum(0) for right in scaled]) for left in first_U])

    # ---- derivatives -------------------------------------------------------------------------------------------------

    def gradients(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        r"""Derivatives of a log|V| + b log|U'V⁻¹U| + c e'Pe with respect to σ², S and the other covariances.

        B'(aV⁻¹ − bQQ' − cPe(Pe)')B for each covariance; that of σ² follows from the trace of the same with V, which is
        a n − b p − c e'Pe.
        """
        (first_Pe, rest_Pe), rest_U = self.Pe, self.NF[:, : self.p]
        first = (a * self.first_blocks - b * self._first_UU()) / self.sigma2 - c * first_Pe[:, None] * first_Pe
        if self.S.shape[2] == 1:
            first = first.sum(2, keepdim=True)
        scaled = rest_U @ self.UU_inverse
        if self.diagonal:
            whole = (a * self.rest_blocks - b * (scaled * rest_U).sum(1)) / self.sigma2 - c * rest_Pe.square()
        else:
            whole = (a * self.rest_blocks - b * scaled @ rest_U.mT) / self.sigma2 - c * torch.outer(rest_Pe, rest_Pe)
        rest, offset = [], 0
        for G in self.G:
            own = slice(offset, offset + len(G))
            part = whole[own] if self.diagonal else whole[own, own]
            rest.append(part.diagonal() if part.ndim > G.ndim else part)
            offset += len(G)
        explained = (first * self.S).sum() + sum((g * G).sum() for g, G in zip(rest, self.G, strict=True))
        return (a * self.n - b * self.p - c * self.ePe) / self.sigma2 - explained, first, rest
