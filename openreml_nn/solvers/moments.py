r"""Variances by moments, from cross-products: start values at the cost of a part of one evaluation.

For V = σ²R₀ + Σ σ_i² Z_iZ_i' the squares of the least-squares residual e and of Z_i'e, in the metric of R₀⁻¹, have
expectations that are linear in the variances: with M the projection on what X leaves,

    E|Z_i'Me|² = Σ_j σ_j² ‖Z_i'MZ_j‖² + σ² tr Z_i'MZ_i,    E e'Me = Σ_j σ_j² tr Z_j'MZ_j + σ² (n − p),

and ‖Z_i'MZ_j‖² = ‖A_ij‖² − 2 tr A_ij'B_iB_j' + tr B_i'B_iB_j'B_j with A_ij = Z_i'Z_j and B_i = Z_i'Q, Q an orthonormal
basis of X. The estimates are not efficient, but so close that a fit from there is a step or two shorter.

Source: Rao (1971), Journal of Multivariate Analysis 1, 257-275 (MINQUE with all weight on the residual).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openreml_nn.solvers.cross_products import CrossProducts
from openreml_nn.solvers.ranks import Ranks

LEAST = 0.01  # share of the residual variance that each variance explains at least; an estimate may be negative
DISTINCT = 1e-8  # smallest reciprocal condition of equations that tell the variances


class Moments(NamedTuple):
    """What is needed of m terms.

    Attributes:
        forms: |Z_i'Me|², shape (m,).
        traces: tr A_ii, shape (m,).
        squares: ‖A_ij‖², shape (m, m).
        mixed: tr A_ij'B_iB_j', shape (m, m).
        grams: B_i'B_i, shape (m, p, p).
    """

    forms: Tensor
    traces: Tensor
    squares: Tensor
    mixed: Tensor
    grams: Tensor


def variances_by_moments(products: CrossProducts, n: int, p: int, sizes: list[int], first: bool, ranks: Ranks
                         ) -> np.ndarray:  # fmt: skip
    """σ², the variance of the first term if there is one, and those of the terms of the rest.

    Args:
        products: Cross-products of the data; each level of the first term has one effect.
        n: Number of rows.
        p: Columns of U.
        sizes: Effects of each term of the rest.
        first: Whether there is a first term.
        ranks: The processes of which each has levels of its own of the first term.

    Returns:
        Shape (number of terms + 1,), above zero; NaN where the moments do not tell them.
    """
    FF, rest_F, rest = ranks.sums(products.FF, products.rest_F, products.rest)
    L = torch.linalg.cholesky(FF[:p, :p])
    w = torch.linalg.solve_triangular(L, FF[:p, p:], upper=False)

    def outside(F: Tensor) -> tuple[Tensor, Tensor]:
        """B_i and Z_i'Me from Z_i'R₀⁻¹F."""
        B = torch.linalg.solve_triangular(L.mT, F[:, :p], upper=True, left=False)
        return B, F[:, p] - (B @ w)[:, 0]

    member = torch.block_diag(*(rest_F.new_ones(size, 1) for size in sizes)) if sizes else rest_F.new_zeros(0, 0)
    B, e = outside(rest_F)
    moments = _of_rest(products, rest, B, e, member)
    if first:
        moments = _with_first(products, moments, *outside(products.first_F[0].mT), B, member, ranks)
    return _solution(moments, FF[p, p] - w.square().sum(), n, n - p)


def _of_rest(products: CrossProducts, rest: Tensor, B: Tensor, e: Tensor, member: Tensor) -> Moments:
    """Those of the terms of the rest; ``member`` has the indicators of their effects, shape (q, m)."""
    A = products.rest_matrix if rest is products.rest else products.layout.matrix(rest)
    m, p = member.shape[1], B.shape[1]
    squared = A.square() if isinstance(A, Tensor) else A.squared()
    of_B = member[:, :, None] * B[:, None]
    across = (A @ of_B.flatten(1)).view(len(B), m, p)
    return Moments(
        member.mT @ e.square(), member.mT @ products.layout.diagonal(rest), member.mT @ (squared @ member),
        torch.einsum("qmp,qjp->mj", across, of_B), torch.einsum("qmp,qr->mpr", of_B, B),
    )  # fmt: skip


def _with_first(products: CrossProducts, rest: Moments, B: Tensor, e: Tensor, of_rest: Tensor, member: Tensor,
                ranks: Ranks) -> Moments:  # fmt: skip
    """Those of the first term, of which B and e are given, and after it those of the rest."""
    a, coupling, m = products.first[0, 0], products.coupling, member.shape[1]
    squares, mixed = a.new_zeros(m), a.new_zeros(m)
    if m:
        squares = member.mT @ coupling.squares()
        mixed = member.mT @ (coupling.to_rest(B.mT[None]) * of_rest).sum(1)
    form, trace, own_squares, own_mixed, squares, mixed, gram = ranks.sums(
        e.square().sum(), a.sum(), a.square().sum(), (a[:, None] * B.square()).sum(), squares, mixed, B.mT @ B
    )

    def bordered(corner: Tensor, side: Tensor, inner: Tensor) -> Tensor:
        top = torch.cat([corner.view(1, 1), side[None]], dim=1)
        return torch.cat([top, torch.cat([side[:, None], inner], dim=1)])

    return Moments(
        torch.cat([form[None], rest.forms]), torch.cat([trace[None], rest.traces]),
        bordered(own_squares, squares, rest.squares), bordered(own_mixed, mixed, rest.mixed),
        torch.cat([gram[None], rest.grams]),
    )  # fmt: skip


def _solution(moments: Moments, residual: Tensor, n: int, degrees: int) -> np.ndarray:
    """The variances, from e'Me and its degrees of freedom too."""
    left = moments.squares - 2.0 * moments.mixed + torch.einsum("ipr,jpr->ij", moments.grams, moments.grams)
    side = moments.traces - moments.grams.diagonal(dim1=1, dim2=2).sum(1)
    table = torch.cat([left, side[:, None], moments.forms[:, None], moments.traces[:, None]], dim=1).cpu().numpy()
    m = len(table)
    C = np.empty((m + 1, m + 1))
    C[0, 0], C[0, 1:], C[1:, 0], C[1:, 1:] = degrees, table[:, m], table[:, m], table[:, :m]
    forms, sizes = np.append(float(residual), table[:, m + 1]), np.append(n, table[:, m + 2]) / n
    if not (np.isfinite(C).all() and (C.diagonal() > 0).all()):
        return np.full(m + 1, np.nan)
    unit = np.sqrt(C.diagonal())
    values, vectors = np.linalg.eigh(C / np.outer(unit, unit))
    if values[0] < DISTINCT * values[-1]:
        return np.full(m + 1, np.nan)
    found = vectors @ ((forms / unit) @ vectors / values) / unit
    return np.maximum(found, LEAST * forms[0] / degrees / sizes)
