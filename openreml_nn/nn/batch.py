"""The likelihood of a batch: V of its rows alone, by the cheapest way that its random effects allow."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.covariance import CovariancePropagation, IncidenceMatrix, Matrix, ScalarMatrix, Sum
from openreml_nn.covariance.operators.base import Operator
from openreml_nn.nn.by_level import LevelTerms, OneEffect
from openreml_nn.nn.effects import Effects
from openreml_nn.solvers import Problem
from openreml_nn.solvers.fixed_effects import prepare_fixed_effects
from openreml_nn.solvers.gaussian_terms import GaussianTerms
from openreml_nn.solvers.mixed_model_equations import MixedModelEquationsSolver

PATHS = ("auto", "levels", "equations", "dense")
RESIDUAL = "residual"
FEW_ROWS = 300  # below which a dense V is quicker than the mixed-model equations


@dataclass(frozen=True)
class BatchTerm:
    """One factor of a batch.

    Attributes:
        effects: Its effects.
        codes: Level of each row, shape (m,).
        design: Values of the effects, shape (m, s); None for ones.
    """

    effects: Effects
    codes: Tensor
    design: Tensor | None

    @property
    def one_effect(self) -> bool:
        """Whether a level has one effect, independent of those of other levels."""
        return self.effects.num_effects == 1 and self.effects.independent


def batch_deviance(
    terms: list[BatchTerm], residual: ScalarMatrix, r: Tensor, X: Tensor, restricted: bool = True, path: str = "auto"
) -> tuple[Tensor, int]:
    r"""log|V| + log|U'V⁻¹U| + r'Pr of V = Σ ZGZ' + σ²I over the rows of a batch, U an orthonormal basis of X.

    =============================================== ============= ================================
    random effects                                  path          cost for m rows
    =============================================== ============= ================================
    one factor, levels independent of one another   levels        m (s + p)²
    the same and others of at most m/2 effects      equations     cube of the effects of the others
    anything                                        dense         m³
    =============================================== ============= ================================

    Effects are counted for the levels that the batch has. A batch of fewer than 300 rows takes the dense path instead
    of the equations, which is then quicker. For one effect a level without fixed effects ``one_effect_loss`` is quicker
    still.

    Args:
        terms: The factors.
        residual: σ² as a structure.
        r: Response, or what the network leaves of it, shape (m,).
        X: Fixed effects, shape (m, p); p may be 0.
        restricted: Whether to count the fixed effects; log|U'V⁻¹U| is left out otherwise.
        path: ``"auto"``: the first row of the table that fits; or the name of one.

    Returns:
        The deviance without its constant, and the rank of X.

    Raises:
        ValueError: There is no such path, or the random effects do not allow it.
    """
    if path not in PATHS:
        raise ValueError(f"`batch_deviance` has the paths {', '.join(map(repr, PATHS))}, got {path!r}.")
    if path == "levels" and not (len(terms) == 1 and terms[0].effects.independent):
        raise ValueError(
            f"The path 'levels' of `batch_deviance` needs one factor with levels independent of one another, got "
            f"{len(terms)} factor{'s' * (len(terms) > 1)}{'' if len(terms) > 1 else ' with correlated levels'}."
        )
    if path == "equations" or (path == "auto" and len(terms) > 1):
        parts = [local(term) for term in terms] if path == "equations" or len(r) >= FEW_ROWS else []
        if path == "equations" or _few(terms, parts, len(r)):
            V = Sum({str(i): CovariancePropagation(Z, G) for i, (Z, G) in enumerate(parts)}
                    | {RESIDUAL: scalar_like(residual, len(r))})  # fmt: skip
            return deviance_of(MixedModelEquationsSolver().prepare(V, r, X), restricted)
    sigma2 = residual.trans_params(residual.theta.to(r.dtype))[0]
    U, e = (X, r) if not X.shape[1] else _centred(r, X)
    if path in ("auto", "levels") and len(terms) == 1:
        found = _by_levels(terms[0], sigma2, U, e, restricted)
        if found is not None:
            return found, U.shape[1]
    logdet_V, logdet_M, quadratic = GaussianTerms.apply(dense_V(terms, sigma2, len(e)), U, e)[:3]
    return logdet_V + logdet_M + quadratic if restricted else logdet_V + quadratic, U.shape[1]


def _centred(r: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    fixed = prepare_fixed_effects(r, X)
    return fixed.U, fixed.e


def one_effect_loss(term: BatchTerm, residual: ScalarMatrix, f: Tensor, y: Tensor) -> Tensor:
    """−ℓ per row of y ~ N(f, V), V of one factor with one effect for each level, levels independent.

    Args:
        term: The factor.
        residual: σ² as a structure.
        f: Mean, shape (m,) or (m, 1), of any floating-point type.
        y: Response, shape (m,) or (m, 1).
    """
    sigma2, G = residual.trans_params(residual.theta.to(torch.float64))[0], term.effects.G
    theta = G.theta.to(torch.float64)
    S = G.mean_diagonal(theta) if term.effects.alike else G.diagonal(theta)[term.codes]
    x = None if term.design is None else term.design[:, 0]
    return OneEffect.apply(f, y, sigma2, S, term.codes, x, term.effects.num_levels)


def _by_levels(term: BatchTerm, sigma2: Tensor, U: Tensor, e: Tensor, restricted: bool) -> Tensor | None:
    effects, p = term.effects, U.shape[1]
    if not effects.independent:
        return None
    G, q, theta = effects.G, effects.num_levels, effects.G.theta.to(e.dtype)
    present, own = torch.unique(term.codes, return_inverse=True)
    shared = G.common_block(theta, q)
    blocks = G.level_blocks(theta, q) if shared is None else shared[None]
    assert blocks is not None
    blocks = (blocks[present] if shared is None else blocks).permute(1, 2, 0)
    F = torch.cat([U, e[:, None]], dim=1)
    logdet_V, M = LevelTerms.apply(F, sigma2, blocks, own, term.design, len(present))
    L = torch.linalg.cholesky(M[:p, :p])
    half = torch.linalg.solve_triangular(L, M[:p, p:], upper=False)
    deviance = logdet_V + M[p, p] - half.square().sum()
    return deviance + 2.0 * L.diagonal().log().sum() if restricted else deviance


def _few(terms: list[BatchTerm], parts: list[tuple[IncidenceMatrix, "LevelsOf"]], rows: int) -> bool:
    """Whether the mixed-model equations are quicker than a dense V; see the table of ``batch_deviance``."""
    sizes = [G.shape[0] for _, G in parts]
    independent = [size for term, size in zip(terms, sizes, strict=False) if term.effects.independent]
    return bool(independent) and 2 * (sum(sizes) - max(independent)) <= rows


def local(term: BatchTerm) -> tuple[IncidenceMatrix, "LevelsOf"]:
    """Z and G of the levels that a batch has."""
    levels, own = torch.unique(term.codes, return_inverse=True)
    Z = IncidenceMatrix(own, [""] * len(levels), term.design, term.effects.effects)
    return Z, LevelsOf(term.effects.G, levels, term.effects.num_levels)


def deviance_of(problem: Problem, restricted: bool) -> tuple[Tensor, int]:
    """log|V| + log|U'V⁻¹U| + y'Py of a prepared problem, as ``batch_deviance`` gives it, in float64."""
    evaluation = problem.evaluate(problem.V.theta.to(torch.float64))
    deviance = evaluation.logdet_V + evaluation.yPy
    logdet_M = evaluation.logdet_XtViX - problem.fixed.logdet_RtR
    return deviance + logdet_M if restricted else deviance, problem.p


def scalar_like(residual: ScalarMatrix, rows: int) -> ScalarMatrix:
    """σ²I over rows with the parameter of another one."""
    own = ScalarMatrix(rows)
    own.raw = residual.raw
    return own


class LevelsOf(Operator):
    """The part of a covariance of effects that belongs to some levels.

    Args:
        G: Covariance of s effects of q levels, effects the slower index.
        levels: Levels, shape (k,).
        count: q.
    """

    index: Tensor
    levels: Tensor

    def __init__(self, G: Matrix, levels: Tensor, count: int) -> None:
        self.effects, self.count = G.shape[0] // count, count
        effect = torch.arange(self.effects, device=levels.device)
        super().__init__(G)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("index", (effect[:, None] * count + levels).flatten(), persistent=False)
        self._shape = (len(self.index), len(self.index))

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        return operands[0].shape

    def build(self, params: Tensor) -> Tensor:
        return self.operand_list()[0].submatrix(params, self.index, self.index)

    def submatrix(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self.operand_list()[0].submatrix(params, self.index[rows], self.index[columns])

    def diagonal(self, params: Tensor) -> Tensor:
        return self.operand_list()[0].diagonal(params)[self.index]

    @property
    def is_diagonal(self) -> bool:
        return self.operand_list()[0].is_diagonal

    def level_blocks(self, params: Tensor, count: int) -> Tensor | None:
        blocks = self.operand_list()[0].level_blocks(params, self.count) if count == len(self.levels) else None
        return None if blocks is None else blocks[self.levels]

    def common_block(self, params: Tensor, count: int) -> Tensor | None:
        return self.operand_list()[0].common_block(params, self.count) if count == len(self.levels) else None


def dense_V(terms: list[BatchTerm], sigma2: Tensor, rows: int) -> Tensor:
    """V of the rows of a batch, shape (m, m)."""
    V = sigma2 * torch.eye(rows, dtype=sigma2.dtype, device=sigma2.device)
    for term in terms:
        G, theta = term.effects.G, term.effects.G.theta.to(sigma2.dtype)
        S = G.common_block(theta, term.effects.num_levels)
        if S is None:
            Z, own = local(term)
            V = V + Z.sandwich(theta[:0], own, theta)
        else:
            x = term.design
            V = V + (term.codes[:, None] == term.codes) * (S[0, 0] if x is None else x @ S @ x.mT)
    return V
