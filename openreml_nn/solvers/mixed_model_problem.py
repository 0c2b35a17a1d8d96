"""The data of the mixed-model equations, and what they give at one θ: likelihood, score, information and effects."""

from contextlib import AbstractContextManager
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from openreml_nn.covariance import DiagonalPropagation, Matrix
from openreml_nn.solvers.base import Evaluation, NotPositiveDefinite, Problem, where_it_fails
from openreml_nn.solvers.closed_form import ClosedForm, refuse_second_derivative
from openreml_nn.solvers.cross_products import CrossProducts, cross_products, with_columns
from openreml_nn.solvers.fixed_effects import FixedEffects
from openreml_nn.solvers.henderson import Equations, NoSolution, inner
from openreml_nn.solvers.moments import variances_by_moments
from openreml_nn.solvers.plan import Plan
from openreml_nn.solvers.ranks import ALONE
from openreml_nn.solvers.small_blocks import multiply
from openreml_nn.solvers.term_covariances import TermCovariances
from openreml_nn.solvers.terms import RandomTerm, operands_of, propagated_terms
from openreml_nn.solvers.threads import threads_for

NAME = "mixed_model_equations"  # of the solver


class MixedModelProblem(Problem):
    """Cross-products of [Z U e]; the rows are not touched again."""

    def __init__(self, V: Matrix, fixed: FixedEffects) -> None:
        super().__init__(V, fixed)
        self.plan = Plan.of(V, fixed.ranks)
        terms = propagated_terms(V, V.theta.detach())
        own = self.plan.first is not None and terms[self.plan.first_index].name in fixed.ranks.own
        self.own = own
        self.by_levels = fixed.ranks if own else ALONE  # the processes of which each has levels of its own
        self.by_rows = ALONE if own else fixed.ranks  # the processes of which each has rows of any levels
        self.covariances = TermCovariances(V, self.plan.residual, self.plan.first_index)
        self.names, self.sizes = [term.name for term in terms], [term.Z.shape[1] for term in terms]
        self.sizes_of_rest = [Z.shape[1] for Z in self.plan.rest]
        self.weight = self._weight(fixed.e)
        self.F = torch.cat([fixed.U, fixed.e[:, None]], dim=1).detach()
        with threads_for(fixed.n_here * (fixed.p + 1 + len(terms))):
            self.products: CrossProducts = cross_products(
                self.plan.first, self.plan.rest, self.F, self.weight, self.plan.sparse, fixed.ranks, own
            )
        self.logdet_R0 = fixed.e.new_zeros(()) if self.weight is None else -fixed.ranks.sum(self.weight.log().sum())

    def _with(self, fixed: FixedEffects) -> "MixedModelProblem":
        other = copy(self)
        other.fixed = fixed
        other.F = torch.cat([fixed.U, fixed.e[:, None]], dim=1).detach()
        other.products = with_columns(
            self.products, self.plan.first, self.plan.rest, other.F, self.weight, fixed.ranks, self.own
        )
        return other

    def moment_variances(self) -> dict[int, float]:
        thetas, plan = self.covariances.variances, self.plan
        if thetas is None or len(thetas.unique()) < len(thetas) or len(thetas) != len(self.names) + 1:
            return {}
        found = variances_by_moments(self.products, self.n, self.sizes_of_rest, self.by_levels)
        order = [plan.first_index, *plan.rest_index] if plan.first is not None else plan.rest_index
        index = thetas.tolist()
        places = [index[0], *(index[1 + i] for i in order)]
        return {} if np.isnan(found).any() else dict(zip(places, found.tolist(), strict=True))

    def threads(self) -> AbstractContextManager[None]:
        products = self.products
        numbers = products.first.numel() + products.first_F.numel() + products.coupling.numel()
        return threads_for(numbers, products.layout.work)

    def _weight(self, like: Tensor) -> Tensor | None:
        """1/R₀, None for ones."""
        residual = operands_of(self.V, self.V.theta)[self.plan.residual][1]
        return residual.X[:, 0].to(like).square().reciprocal() if isinstance(residual, DiagonalPropagation) else None

    def evaluate(self, theta: Tensor | None = None) -> "MixedModelEvaluation":
        return MixedModelEvaluation(self, (self.V.theta if theta is None else theta).to(self.F.dtype))


class _Terms(Function):
    """(log|V|, log|U'V⁻¹U|, e'Pe) as functions of what is small and of what is large, once differentiable."""

    @staticmethod
    def forward(
        ctx: Any, equations: Equations, covariances: TermCovariances, z: Tensor, *large: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.equations, ctx.covariances = equations, covariances  # and not the evaluation, which holds the results
        ctx.z, ctx.large = z.detach(), [G.detach() for G in large]
        return equations.logdet_V.clone(), equations.logdet_M.clone(), equations.ePe.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second_derivative(NAME)
        z, large = ctx.covariances.gradients(*ctx.equations.gradients(*grads), ctx.z, ctx.large)
        return None, None, z, *large


class MixedModelEvaluation(Evaluation):
    """The mixed-model equations solved at one θ.

    Working variates are in the coordinates of [B e]: a column (α, s) is the vector Bα + s e, up to the span of U.
    """

    problem: MixedModelProblem

    def __init__(self, problem: MixedModelProblem, theta: Tensor) -> None:
        self.problem, self.theta = problem, theta
        covariances = problem.covariances
        if covariances.by_theta and torch.is_grad_enabled() and theta.requires_grad:
            values, self.jacobian = covariances.differentiated(theta)
            z, large = ClosedForm.apply(values, NAME, self.jacobian, theta), []
        else:
            z, large = covariances.small(theta), covariances.large(theta)
        self.z = z.detach()
        try:
            with torch.no_grad():
                arranged = covariances.arranged(self.z, [G.detach() for G in large])
                self.equations = Equations(problem.products, problem.n, problem.p, *arranged, problem.by_levels)
        except NoSolution as error:
            at = where_it_fails(problem, theta)
            message = f"The mixed-model equations have no solution at {at}: {self._what(error.piece)}"
            raise NotPositiveDefinite(message) from error
        self.gamma = self.equations.gamma
        self.gamma_cov = self.equations.sigma2 * self.equations.UU_inverse
        logdet_V, logdet_M, yPy = _Terms.apply(self.equations, covariances, z, *large)
        logdet_M, self.yPy = self.followed_by_rows(NAME, logdet_M, yPy)
        self.logdet_V = logdet_V + problem.logdet_R0
        self.logdet_XtViX = logdet_M + problem.fixed.logdet_RtR

    def _what(self, piece: str) -> str:
        """A piece of the equations that has no solution, by the names of its terms, and what to do."""
        if piece == "residual":
            return "the residual variance is not above zero. Take a transform whose image is, such as TransformExpPow2."
        if piece == "fixed":
            return "X'V⁻¹X has no Cholesky factor. Are the variances of a size that the data allow?"
        first = self.problem.plan.first_index
        of = [i for i in range(len(self.problem.names)) if (i == first) == (piece == "first")]
        names = " and ".join(repr(self.problem.names[i]) for i in of)
        return (f"a covariance of the effects of {names} is indefinite or not finite. Take solver='dense' or 'blocks' "
                f"if it may be while V is positive definite; else, is every variance above zero?")  # fmt: skip

    # ---- effects: level by level for the first term, columns of the rest for the others ------------------------------

    def _by_level(self, effects: Tensor) -> Tensor:
        """Effects of the first term, shape (s · L, m), effect by effect, as (s, m, L)."""
        s, _, L = self.equations.products.first.shape
        return effects.reshape(s, L, effects.shape[1]).transpose(1, 2)

    def _by_term(self, effects: Tensor) -> list[Tensor]:
        """Rows of all terms, in the order of V, as one piece for each term."""
        return list(effects.split(self.problem.sizes)) if self.problem.sizes else []

    def _split(self, effects: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of all terms, in the order of V, as those of the first term by level and those of the rest."""
        parts, plan = self._by_term(effects), self.problem.plan
        first = parts[plan.first_index] if plan.first is not None else effects[:0]
        rest = [parts[i] for i in plan.rest_index]
        return self._by_level(first), torch.cat(rest) if len(rest) > 1 else rest[0] if rest else effects[:0]

    def _terms(self, first: Tensor, rest: Tensor) -> list[Tensor]:
        """Rows of each term, in the order of V, from those of the first term and of the rest."""
        plan, parts = self.problem.plan, self._by_rest(rest)
        return parts if plan.first is None else [*parts[: plan.first_index], first, *parts[plan.first_index :]]

    def _by_rest(self, rest: Tensor) -> list[Tensor]:
        """Rows of the rest as one piece for each of its terms."""
        return list(rest.split(self.problem.sizes_of_rest)) if self.problem.sizes_of_rest else []

    def _Pe(self) -> list[Tensor]:
        """Z'Pe of each term, shape (q,)."""
        first, rest = self.equations.Pe
        return self._terms(first.reshape(-1), rest)

    # ---- average information -----------------------------------------------------------------------------------------

    def working_variates(self) -> Tensor:
        r"""V̇_k P y = B(Ġ_k − (σ̇²/σ²) G) B'Py + (σ̇²/σ²) e, shape (q + 1, k)."""
        with torch.no_grad():
            J = self.problem.V.free_columns(self.jacobian)
            relative = J[:1] / self.equations.sigma2
            moved = self.problem.covariances.moved(self._Pe(), self.z, J, relative, self.theta.detach())
            return torch.cat([*moved, relative.mT], dim=1).mT  # by column: what the levels of a term have lies together

    @cached_property
    def jacobian(self) -> Tensor:
        """J of σ² and the shared covariances by θ."""
        return self.problem.covariances.differentiated(self.theta)[1]

    def inner(self, rhs: Tensor) -> Tensor:
        equations, p, relative = self.equations, self.problem.p, rhs[-1:]
        first, rest = self._split(rhs[:-1])
        first_down, rest_down = equations.down_effects(first, rest)
        first_Pe, rest_Pe = equations.Pe
        quadratic, N, cross = self.problem.by_levels.sums(
            inner(first, first_down), inner(equations.first_F[:, :p], first), inner(first, first_Pe[:, None])
        )
        quadratic, N = quadratic + rest.mT @ rest_down, N + equations.NF[:, :p].mT @ rest
        cross = (cross + rest.mT @ rest_Pe[:, None]) @ relative
        return torch.addmm(
            (quadratic - N.mT @ equations.UU_inverse @ N) / equations.sigma2 + cross + cross.mT,
            relative.mT, equations.ePe * relative,
        )  # fmt: skip

    # ---- effects and their variances ---------------------------------------------------------------------------------

    def ZtPy(self, term: RandomTerm) -> Tensor:
        return self._Pe()[self.problem.names.index(term.name)]

    def explained_variance(self, term: RandomTerm) -> Tensor:
        plan, place = self.problem.plan, self.problem.names.index(term.name)
        first, rest = self.equations.projected_blocks()
        sigma2 = self.equations.sigma2
        if place == plan.first_index:
            S = self.equations.S
            return multiply(multiply(S, first), S).diagonal(dim1=0, dim2=1).mT.flatten() * sigma2
        k = plan.rest_index.index(place)
        start = sum(self.problem.sizes_of_rest[:k])
        own = slice(start, start + term.Z.shape[1])
        G = self.equations.G[k]
        if G.ndim == 1:
            return G.square() * (rest[own] if rest.ndim == 1 else rest.diagonal()[own]) * sigma2
        return ((G @ rest[own, own]) * G).sum(1) * sigma2

    # ---- rows --------------------------------------------------------------------------------------------------------

    @cached_property
    def _rows_Py(self) -> Tensor:
        fixed = self.problem.fixed
        return self._residual((fixed.e - fixed.U @ self.gamma)[:, None], [b[:, None] for b in self._Pe()])[
            :, 0
        ].detach()

    @property
    def Py(self) -> Tensor:
        return self._rows_Py

    def _residual(self, rows: Tensor, b: list[Tensor]) -> Tensor:
        """R⁻¹ (``rows`` − Σ Z G b), b = Z'V⁻¹ ``rows`` of each term."""
        left = rows
        for term, own in zip(propagated_terms(self.problem.V, self.theta.detach()), b, strict=True):
            left = left - term.Z.matmul(term.Z_params, term.G.matmul(term.G_params, own))
        weight = self.problem.weight
        return (left if weight is None else weight[:, None] * left) / self.equations.sigma2

    @torch.no_grad()
    def solve(self, rhs: Tensor) -> Tensor:
        weight = self.problem.weight
        weighted = rhs if weight is None else weight[:, None] * rhs
        terms = propagated_terms(self.problem.V, self.theta.detach())
        t = torch.cat([term.Z.rmatmul(term.Z_params, weighted) for term in terms]) if terms else rhs[:0]
        t = self.problem.by_rows.sum(t)
        first, rest = self.equations.down(*self._split(t))
        parts = self._terms(first.transpose(1, 2).flatten(0, 1), rest)
        return self._residual(rhs, [part / self.equations.sigma2 for part in parts])

    @torch.no_grad()
    def project(self, rhs: Tensor) -> Tensor:
        U = self.problem.fixed.U
        if not U.shape[1]:
            return self.solve(rhs)
        return self.solve(rhs) - self._ViU @ (self.gamma_cov @ self.problem.ranks.sum(self._ViU.mT @ rhs))

    @cached_property
    @torch.no_grad()
    def _ViU(self) -> Tensor:
        U = self.problem.fixed.U
        return self.solve(U) if U.shape[1] else U
