"""Which solver takes which V: the table."""

from dataclasses import dataclass

from openreml_nn.covariance import Matrix
from openreml_nn.solvers.base import Solver
from openreml_nn.solvers.blocks import BlockSolver
from openreml_nn.solvers.dense import DenseSolver
from openreml_nn.solvers.mixed_model_equations import MixedModelEquationsSolver, Plan
from openreml_nn.solvers.spectral import SpectralSolver
from openreml_nn.solvers.spectral_traits import SpectralTraitsSolver

SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver
    for solver in (SpectralSolver, SpectralTraitsSolver, MixedModelEquationsSolver, BlockSolver, DenseSolver)
}
TOO_MANY = 0.5  # effects beside the largest term, as a share of n, above which n × n is no worse


@dataclass(frozen=True)
class Choice:
    """A solver and why it was taken.

    Attributes:
        solver: The solver.
        reason: Why this one.
        cost: What it is expected to cost.
    """

    solver: Solver
    reason: str
    cost: str


def choose_solver(V: Matrix, solver: str | Solver = "auto") -> Choice:
    """The solver for a V by this table, the first row that fits.

    ====================================== ======================= ============================= =====================
    structure of V                         solver                  once                          each evaluation
    ====================================== ======================= ============================= =====================
    a Z K Z' + b I, one kernel or Z dense  spectral                one reduction to a band       n
    Σ_g ⊗ K + Σ_e ⊗ I, t complete traits   spectral_traits         one eigendecomposition of K   n t³
    Σ Z G Z' + σ² (I or known weights)     mixed_model_equations   cross-products of [Z X y]     q³, see below
    block diagonal by subject              blocks                  sorting                       Σ m³, equal blocks once
    anything                               dense                   –                             n³
    ====================================== ======================= ============================= =====================

    q counts the effects of all terms but the largest; above n/2 the mixed-model equations are passed over.

    Args:
        V: Covariance of the observations.
        solver: ``"auto"``, the name of a solver, or a solver object.

    Raises:
        ValueError: No solver has this name, or the one that was asked for cannot take V.
    """
    if solver == "auto":
        return _choose(V)
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(f"There is no solver {solver!r}; there are 'auto', {', '.join(map(repr, SOLVERS))}.")
        solver = SOLVERS[solver]()
    solver.require(V)
    return Choice(solver, "it was asked for", solver.cost(V))


def _choose(V: Matrix) -> Choice:
    for kind in SOLVERS.values():
        solver = kind()
        if solver.refusal(V) is None and not _passed_over(solver, V):
            return Choice(solver, _REASONS[kind.name], solver.cost(V))
    raise AssertionError("The dense solver takes any V.")


def _passed_over(solver: Solver, V: Matrix) -> bool:
    return isinstance(solver, MixedModelEquationsSolver) and Plan.of(V).size_of_rest > TOO_MANY * V.shape[0]


_REASONS = {
    "spectral": "V is one kernel plus σ²I",
    "spectral_traits": "V is Σ_g ⊗ K + Σ_e ⊗ I with complete records",
    "mixed_model_equations": "V is random terms plus σ²R₀",
    "blocks": "V is block diagonal",
    "dense": "V has no structure that another solver takes",
}
