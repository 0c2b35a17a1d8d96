r"""Variances by moments, from cross-products: start values at the cost of a part of one evaluation.

For V = σ²R₀ + Σ σ_i² Z_iZ_i' the squares of the least-squares residual e and of Z_i'e, in the metric of R₀⁻¹, have
expectations that are linear in the variances: with M the projection on what X leaves,

    E|Z_i'Me|² = Σ_j σ_j² ‖Z_i'MZ_j‖² + σ² tr Z_i'MZ_i,    E e'Me = Σ_j σ_j² tr Z_j'MZ_j + σ² (n − p),

and ‖Z_i'MZ_j‖² = ‖A_ij‖² − 2 tr A_ij'B_iB_j' + tr B_i'B_iB_j'B_j with A_ij = Z_i'Z_j and B_i = Z_i'Q, Q an orthonormal
basis of X. The estimates are not efficient, but so close that a fit from there is a step or two shorter. No part of
E e'Me is negative, which bounds them from above.

Source: Rao (1971), Journal of Multivariate Analysis 1, 257-275 (MINQUE with all weight on the residual).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openreml_nn.solvers.cross_products import CrossProducts
from openreml_nn.solvers.ranks import ALONE, Ranks
from openreml_nn.solvers.sparse import SparseMatrix

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


def variances_by_moments(products: CrossProducts, n: int, sizes: list[int], ranks: Ranks = ALONE) -> np.ndarray:
    """σ², the variance of the first term if there is one, and those of the terms of the rest.

    Args:
        products: Cross-products of the data; each level of the first term has one effect.
        n: Number of rows.
        sizes: Effects of each term of the rest.
        ranks: The processes of which each has levels of its own of the first term.

    Returns:
        Shape (number of terms + 1,), above zero; NaN where the moments do not tell them.
    """
    FF, rest_F, rest = ranks.sums(products.FF, products.rest_F, products.rest)
    p = len(FF) - 1
    L = torch.linalg.cholesky(FF[:p, :p])
    w = torch.linalg.solve_triangular(L, FF[:p, p:], upper=False)

    def outside(F: Tensor) -> tuple[Tensor, Tensor]:
        """B_i and Z_i'Me from Z_i'R₀⁻¹F."""
        B = torch.linalg.solve_triangular(L.mT, F[:, :p], upper=True, left=False)
        return B, F[:, p] - (B @ w)[:, 0]

    B, e = outside(rest_F)
    A = products.rest_matrix if rest is products.rest else products.layout.matrix(rest)
    moments = _of_rest(A, products.layout.diagonal(rest), B, e, sizes)
    if ranks.count(products.first.shape[2]):
        *own, pairs = ranks.sums(*_of_first(products, *outside(products.first_F[0].mT), B))
        moments = _bordered(Moments(*own), _by_terms(pairs, sizes), moments)
    return _solution(moments, FF[p, p] - w.square().sum(), n, n - p)


def _by_terms(effects: Tensor, sizes: list[int]) -> Tensor:
    """Sums over the effects of each term, shape (…, m), for effects of shape (…, q)."""
    if not sizes:
        return effects
    return torch.stack([own.sum(-1) for own in effects.split(sizes, dim=-1)], dim=-1)


def _times_each(A: Tensor | SparseMatrix, B: Tensor, sizes: list[int]) -> list[Tensor]:
    """A times the rows of B of each term, the others set to zero, each of the shape of B."""
    if len(sizes) == 1:
        return [A @ B]
    places = [slice(end - size, end) for end, size in zip(np.cumsum(sizes).tolist(), sizes, strict=True)]
    if isinstance(A, Tensor):
        return [A[:, own] @ B[own] for own in places]
    products = []
    for own in places:
        alone = torch.zeros_like(B)
        alone[own] = B[own]
        products.append(A @ alone)
    return products


def _of_rest(A: Tensor | SparseMatrix, diagonal: Tensor, B: Tensor, e: Tensor, sizes: list[int]) -> Moments:
    """Those of the terms of the rest."""
    if not sizes:
        none = e.new_zeros((0, 0))
        return Moments(e, e, none, none, none.view(0, *2 * B.shape[1:]))
    squared, ones = A.square() if isinstance(A, Tensor) else A.squared(), e.new_ones((len(e), 1))
    columns = [e.square(), diagonal, *(own[:, 0] for own in _times_each(squared, ones, sizes))]
    columns += [(own * B).sum(1) for own in _times_each(A, B, sizes)]
    forms, traces, *pairs = _by_terms(torch.stack(columns), sizes)
    squares, mixed = torch.stack(pairs).chunk(2)
    return Moments(forms, traces, squares, mixed, torch.stack([own.mT @ own for own in B.split(sizes)]))


def _of_first(products: CrossProducts, B: Tensor, e: Tensor, of_rest: Tensor) -> list[Tensor]:
    """Those of the first term, given its B and e, and ‖·‖² and tr with each effect of the rest, shape (2, q)."""
    a, coupling = products.first[0, 0], products.coupling
    pair = e.new_zeros((2, 0))
    if len(of_rest):
        pair = torch.stack([coupling.squares(), (coupling.to_rest(B.mT[None]) * of_rest).sum(1)])
    mixed = (a[:, None] * B.square()).sum()
    of_pairs = [value.view(1, 1) for value in (a.square().sum(), mixed)]
    return [e.square().sum()[None], a.sum()[None], *of_pairs, (B.mT @ B)[None], pair]


def _bordered(first: Moments, pairs: Tensor, rest: Moments) -> Moments:
    """Those of the first term and of the rest together; ``pairs``, shape (2, m), are squares and mixed of the one with
    the others."""

    def bordered(corner: Tensor, side: Tensor, inner: Tensor) -> Tensor:
        return torch.cat([torch.cat([corner, side[None]], dim=1), torch.cat([side[:, None], inner], dim=1)])

    return Moments(
        torch.cat([first.forms, rest.forms]), torch.cat([first.traces, rest.traces]),
        bordered(first.squares, pairs[0], rest.squares), bordered(first.mixed, pairs[1], rest.mixed),
        torch.cat([first.grams, rest.grams]),
    )  # fmt: skip


def _solution(moments: Moments, residual: Tensor, n: int, degrees: int) -> np.ndarray:
    """The variances, from e'Me and its degrees of freedom too; all numbers are read at once."""
    m, grams = len(moments.traces), moments.grams
    left = moments.squares - 2.0 * moments.mixed + grams.flatten(1) @ grams.flatten(1).mT
    outside = moments.traces - grams.diagonal(dim1=1, dim2=2).sum(1)
    parts = [left.flatten(), outside, moments.forms, moments.traces, residual.view(1)]
    squares, side, forms, traces, (whole,) = np.split(torch.cat(parts).cpu().numpy(), np.cumsum([m * m, m, m, m]))
    C = np.empty((m + 1, m + 1))
    C[0, 0], C[0, 1:], C[1:, 0], C[1:, 1:] = degrees, side, side, squares.reshape(m, m)
    forms, shares = np.append(whole, forms), np.append(n, traces) / n
    if not (np.isfinite(C).all() and (C.diagonal() > 0).all()):
        return np.full(m + 1, np.nan)
    unit = np.sqrt(C.diagonal())
    values, vectors = np.linalg.eigh(C / np.outer(unit, unit))
    if values[0] < DISTINCT * values[-1]:
        return np.full(m + 1, np.nan)
    found = vectors @ ((forms / unit) @ vectors / values) / unit
    return np.minimum(np.maximum(found, LEAST * whole / degrees / shares), whole / C[0])
