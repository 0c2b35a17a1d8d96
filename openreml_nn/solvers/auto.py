"""Which solver takes which V: the table."""

from dataclasses import dataclass, field

from openreml_nn.covariance import Matrix
from openreml_nn.solvers.base import Solver
from openreml_nn.solvers.block_pattern import block_sizes
from openreml_nn.solvers.blocks import BlockSolver, are_small
from openreml_nn.solvers.dense import DenseSolver
from openreml_nn.solvers.mixed_model_equations import MixedModelEquationsSolver
from openreml_nn.solvers.plan import Plan
from openreml_nn.solvers.ranks import ALONE, Ranks
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
        V: The covariance that it was taken for.
    """

    solver: Solver
    reason: str
    V: Matrix = field(repr=False)

    @property
    def cost(self) -> str:
        """What it is expected to cost; V is taken apart for it when it is asked for."""
        return self.solver.cost(self.V)


def choose_solver(V: Matrix, solver: str | Solver = "auto", *, share: bool = False) -> Choice:
    """The solver for a V by this table, the first row that fits.

    ====================================== ======================= ============================= =====================
    structure of V                         solver                  once                          each evaluation
    ====================================== ======================= ============================= =====================
    a Z K Z' + b I, one kernel or Z dense  spectral                one reduction to a band       n
    Σ_g ⊗ K + Σ_e ⊗ I, t complete traits   spectral_traits         one eigendecomposition of K   n t³
    Σ Z G Z' + σ² (I or known weights)     mixed_model_equations   cross-products of [Z X y]     q³ or less, below
    block diagonal by subject              blocks                  sorting                       Σ m³, equal blocks once
    anything                               dense                   –                             n³
    ====================================== ======================= ============================= =====================

    q counts the effects of all terms but the largest. Where each meets few others, as in field trials, their system is
    a band or a chain of blocks and costs much less than q³. With q above n/2 the mixed-model equations are passed over
    if their system, as it would be kept, costs more than (n/2)³. Several processes choose by the same rules.

    Args:
        V: Covariance of the observations.
        solver: ``"auto"``, the name of a solver, or a solver object.
        share: Whether several processes are to share the rows: the first row that fits by which they share them by the
            levels of a term, if there is one.

    Raises:
        ValueError: No solver has this name, or the one that was asked for cannot take V.
    """
    if solver == "auto":
        kinds, by_effects = (kind() for kind in SOLVERS.values()), MixedModelEquationsSolver.name
        fitting = (own for own in kinds if own.refusal(V) is None and not (own.name == by_effects and costs_more(V)))
        if not share:
            return _chosen(next(fitting), V)
        several = list(fitting)
        return _chosen(next((own for own in several if own.whole_terms(V)), several[0]), V)
    named = _solver_of(solver)
    named.require(V)
    return Choice(named, "it was asked for", V)


def choose_shared(V: Matrix, solver: str | Solver, ranks: Ranks) -> Choice:
    """The solver for a V of whose rows each process has its own: the mixed-model equations, else blocks.

    Args:
        V: Covariance of the observations of this process.
        solver: ``"auto"``, the name of a solver, or a solver object.
        ranks: The processes that share the rows.

    Raises:
        ValueError: On all processes, where no solver can share the rows of V.
    """
    if ranks.size == 1:
        return choose_solver(V, solver)
    if solver != "auto":
        named = _solver_of(solver)
        return Choice(named, "it was asked for", V)
    equations, blocks = MixedModelEquationsSolver(), BlockSolver()
    n, in_blocks = ranks.count(V.shape[0]), blocks.whole_terms(V) is not None
    refused = any(ranks.objects(equations.refusal(V) is not None))
    if not refused and len(ranks.own) < 2 and not costs_more(V, ranks):
        return _chosen(equations, V)
    largest = max(ranks.objects(int(block_sizes(V).max()) if in_blocks else 0))
    if in_blocks and are_small(largest, n):
        return _chosen(blocks, V)
    raise ValueError(
        f"No solver shares the rows of this V between processes: the mixed-model equations need random terms and σ²I, "
        f"and blocks need small ones (here up to {largest} of {n} rows). Give each process all rows."
    )


def costs_more(V: Matrix, ranks: Ranks = ALONE) -> bool:
    """Whether the mixed-model equations are passed over: their system is large and not sparse enough.

    Args:
        V: Covariance of the observations, of this process where several share them; a V that the equations can take.
        ranks: The processes that share the rows, which all find the same.
    """
    many = TOO_MANY * ranks.count(V.shape[0])
    return Plan.of(V, ranks).size_of_rest > many and MixedModelEquationsSolver().layout(V, ranks).work > many**3


def _solver_of(solver: str | Solver) -> Solver:
    if isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"There is no solver {solver!r}; there are 'auto', {', '.join(map(repr, SOLVERS))}.")
    return SOLVERS[solver]()


def _chosen(solver: Solver, V: Matrix) -> Choice:
    return Choice(solver, _REASONS[solver.name], V)


_REASONS = {
    "spectral": "V is one kernel plus σ²I",
    "spectral_traits": "V is Σ_g ⊗ K + Σ_e ⊗ I with complete records",
    "mixed_model_equations": "V is random terms plus σ²R₀",
    "blocks": "V is block diagonal",
    "dense": "V has no structure that another solver takes",
}
