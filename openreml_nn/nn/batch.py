"""The likelihood of a batch: V of its rows alone, by the cheapest way that its random effects allow."""

from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.nn.by_level import LevelTerms
from openreml_nn.nn.effects import Effects
from openreml_nn.solvers.gaussian_terms import GaussianTerms


@dataclass(frozen=True)
class Term:
    """One factor of a batch.

    Attributes:
        effects: Its effects.
        codes: Level of each row, shape (m,).
        design: Values of the effects, shape (m, s); None for ones.
    """

    effects: Effects
    codes: Tensor
    design: Tensor | None


def batch_terms(terms: list[Term], sigma2: Tensor, U: Tensor, e: Tensor, path: str = "auto") -> tuple[Tensor, ...]:
    r"""log|V|, log|U'V⁻¹U| and e'Pe of V = Σ ZGZ' + σ²I over the rows of a batch.

    ============================================== ========= ====================
    random effects                                 path      cost for m rows
    ============================================== ========= ====================
    one factor, levels independent of one another  levels    m (s + p)²
    anything                                       dense     m³
    ============================================== ========= ====================

    Args:
        terms: The factors.
        sigma2: σ², shape ().
        U: Orthonormal basis of the fixed effects, shape (m, p); p may be 0.
        e: Response, centred by U, shape (m,).
        path: ``"auto"``: the first row of the table that fits; or the name of one.
    """
    if path != "dense" and len(terms) == 1:
        found = _by_levels(terms[0], sigma2, U, e)
        if found is not None:
            return found
    return GaussianTerms.apply(dense_V(terms, sigma2, len(e)), U, e)[:3]


def _by_levels(term: Term, sigma2: Tensor, U: Tensor, e: Tensor) -> tuple[Tensor, ...] | None:
    G, q = term.effects.G, term.effects.num_levels
    theta = G.theta.to(e.dtype)
    present, codes = torch.unique(term.codes, return_inverse=True)
    S = G.common_block(theta, q)
    if S is None:
        blocks = G.level_blocks(theta, q)
        if blocks is None:
            return None
        S = blocks[present].permute(1, 2, 0)
    else:
        S = S[..., None]
    p = U.shape[1]
    F = torch.cat([U, e[:, None]], dim=1) if p else e[:, None]
    logdet, M = LevelTerms.apply(F, sigma2, S, codes, term.design, len(present))
    if not p:
        return logdet, logdet.new_zeros(()), M[0, 0]
    L = torch.linalg.cholesky(M[:p, :p])
    half = torch.linalg.solve_triangular(L, M[:p, p:], upper=False)
    return logdet, 2.0 * L.diagonal().log().sum(), M[p, p] - half.square().sum()


def dense_V(terms: list[Term], sigma2: Tensor, rows: int) -> Tensor:
    """V of the rows of a batch, shape (m, m)."""
    V = sigma2 * torch.eye(rows, dtype=sigma2.dtype, device=sigma2.device)
    for term in terms:
        G, theta = term.effects.G, term.effects.G.theta.to(sigma2.dtype)
        S = G.common_block(theta, term.effects.num_levels)
        if S is None:
            V = V + term.effects.incidence(term.codes, term.design).sandwich(theta[:0], G, theta)
        else:
            x = term.design
            V = V + (term.codes[:, None] == term.codes) * (S[0, 0] if x is None else x @ S @ x.mT)
    return V
