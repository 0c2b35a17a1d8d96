r"""The mixed-model equations, on cross-products: an evaluation whose cost does not depend on n.

V = σ²R₀ + Σ Z G Z' with R₀ diagonal and known. The term with the most levels is eliminated level by level, what is left
is one system for the other terms (the rest), dense or sparse (`layouts`), and one for the fixed effects. A variance of
zero is an ordinary number.

Several processes share the rows by the levels of that term: each eliminates its own, and they add up what is left, a
message of q² numbers however many rows there are. Where the levels are torn, the cross-products are added up once, and
every process has all of the equations.

Sources: Henderson (1953), Biometrics 9, 226-252; the blocking is that of Bates, Mächler, Bolker & Walker (2015),
Journal of Statistical Software 67(1), and of MixedModels.jl.
"""

from torch import Tensor

from openreml_nn.covariance import CovariancePropagation, DiagonalPropagation, Matrix
from openreml_nn.solvers.base import Solver
from openreml_nn.solvers.cross_products import layout_of
from openreml_nn.solvers.fixed_effects import prepare_fixed_effects
from openreml_nn.solvers.layouts import DenseLayout, Layout
from openreml_nn.solvers.mixed_model_problem import NAME, MixedModelProblem
from openreml_nn.solvers.plan import Plan, is_scaled_diagonal
from openreml_nn.solvers.ranks import ALONE, Ranks
from openreml_nn.solvers.terms import operands_of, propagated_terms


class MixedModelEquationsSolver(Solver):
    """Solve for effects, not observations: q_T³ an evaluation, q_T the columns of all terms but the largest.

    Where these meet few others in the levels of the largest, as in field trials, it costs much less.
    """

    name = NAME
    may_tear = True

    def refusal(self, V: Matrix) -> str | None:
        operands = [(name, operand) for name, operand, _ in operands_of(V, V.theta.detach())]
        if sum(is_scaled_diagonal(operand) for _, operand in operands) != 1:
            return "it needs exactly one residual σ²I, or σ² times known weights (a `ScalarMatrix` operand of a `Sum`)."
        for name, operand in operands:
            if isinstance(operand, CovariancePropagation) and operand.Z.num_params:
                return f"it needs a fixed Z, and that of {name!r} has parameters."
            if isinstance(operand, DiagonalPropagation) and not bool(operand.X.all()):
                return f"it needs weights other than zero, and {name!r} has rows without a residual."
            if not isinstance(operand, CovariancePropagation) and not is_scaled_diagonal(operand):
                return f"it needs terms `CovariancePropagation(Z, G)`, and {name!r} is a {type(operand).__name__}."
            below = _variance_below_zero(operand) if isinstance(operand, CovariancePropagation) else None
            if below is not None:
                return (f"it needs variances that their transforms keep at or above zero, as `TransformExpPow2` does, "
                        f"and that of {'/'.join(part for part in (name, below) if part)!r} does not.")  # fmt: skip
        return None

    def cost(self, V: Matrix) -> str:
        plan = Plan.of(V)
        L = 0 if plan.first is None else plan.first.num_levels
        return f"{self.layout(V).cost}, after {L} levels are eliminated one by one"

    def layout(self, V: Matrix, ranks: Ranks = ALONE) -> Layout:
        """How the system of the rest is kept, by all processes alike."""
        plan = Plan.of(V, ranks)
        if not plan.sparse:
            return DenseLayout(plan.size_of_rest)
        return layout_of(plan.first, plan.rest, V.theta, ranks, bool(ranks.own))

    def whole_terms(self, V: Matrix) -> list[str] | None:
        if self.refusal(V) is not None:
            return None
        plan = Plan.of(V)
        if plan.first is None:
            return []
        term = propagated_terms(V, V.theta.detach())[plan.first_index]
        alike = term.G.common_block(term.G_params, plan.first.num_levels) is not None
        return [term.name] if alike else []

    def prepare(self, V: Matrix, y: Tensor, X: Tensor | None = None, *, rank: str = "drop") -> MixedModelProblem:
        return self.prepare_shared(V, y, X, ALONE, rank=rank)

    def prepare_shared(
        self, V: Matrix, y: Tensor, X: Tensor | None, ranks: Ranks, *, rank: str = "drop"
    ) -> MixedModelProblem:
        ranks.together(lambda: self.require(V))
        fixed = prepare_fixed_effects(y, X, rank, ranks)
        return MixedModelProblem(V, fixed)


def _variance_below_zero(term: CovariancePropagation) -> str | None:
    """The name of a variance of G that its transform lets below zero; None where there is none."""
    for path, leaf, _ in term.leaves():
        for name, trans in zip(leaf.param_names, leaf.param_transforms, strict=True):
            if name.startswith("sigma^2") and (trans is None or trans.image[0] < 0.0):
                return "/".join([*path, name])
    return None
