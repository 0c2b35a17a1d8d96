"""The likelihood of a batch: V of its rows alone, by the cheapest way that its random effects allow."""

from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.nn.by_level import LevelTerms, OneEffect
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


def batch_deviance(
    terms: list[Term], sigma2: Tensor, U: Tensor, e: Tensor, restricted: bool = True, path: str = "auto"
) -> Tensor:
    r"""log|V| + log|U'V⁻¹U| + e'Pe of V = Σ ZGZ' + σ²I over the rows of a batch; without log|U'V⁻¹U| unless restricted.

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
        restricted: Whether to count the fixed effects.
        path: ``"auto"``: the first row of the table that fits; or the name of one.
    """
    if path != "dense" and len(terms) == 1:
        found = _by_levels(terms[0], sigma2, U, e, restricted)
        if found is not None:
            return found
    logdet_V, logdet_M, quadratic = GaussianTerms.apply(dense_V(terms, sigma2, len(e)), U, e)[:3]
    return logdet_V + logdet_M + quadratic if restricted else logdet_V + quadratic


def _by_levels(term: Term, sigma2: Tensor, U: Tensor, e: Tensor, restricted: bool) -> Tensor | None:
    G, q, m, p = term.effects.G, term.effects.num_levels, len(e), U.shape[1]
    theta = G.theta.to(e.dtype)
    S = G.common_block(theta, q)
    blocks = G.level_blocks(theta, q) if S is None else S
    if blocks is None:
        return None
    if not p and term.effects.num_effects == 1:
        rows = torch.arange(m, device=e.device)
        place = term.codes.new_empty(q).scatter_(0, term.codes, rows)
        own = place.gather(0, term.codes)  # a row of each level stands for it: the levels at hand, without sorting
        x = None if term.design is None else term.design[:, 0]
        return OneEffect.apply(e, sigma2, (blocks if S is not None else blocks[term.codes]).reshape(-1), own, x, m)
    present, own = torch.unique(term.codes, return_inverse=True)
    blocks = blocks[..., None] if S is not None else blocks[present].permute(1, 2, 0)
    F = torch.cat([U, e[:, None]], dim=1)
    logdet_V, M = LevelTerms.apply(F, sigma2, blocks, own, term.design, len(present))
    L = torch.linalg.cholesky(M[:p, :p])
    half = torch.linalg.solve_triangular(L, M[:p, p:], upper=False)
    deviance = logdet_V + M[p, p] - half.square().sum()
    return deviance + 2.0 * L.diagonal().log().sum() if restricted else deviance


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
