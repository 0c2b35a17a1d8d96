"""Which solver takes which V: the table."""

from openreml_nn.covariance import Matrix
from openreml_nn.solvers.base import Solver
from openreml_nn.solvers.dense import DenseSolver
from openreml_nn.solvers.mixed_model_equations import MixedModelEquationsSolver

SOLVERS: dict[str, type[Solver]] = {solver.name: solver for solver in (MixedModelEquationsSolver, DenseSolver)}


def choose_solver(V: Matrix, solver: str | Solver = "auto") -> Solver:
    """The solver for a V, by this table, the first row that fits.

    ================================ ======================= ============================ ===========================
    structure of V                   solver                  once                         each evaluation
    ================================ ======================= ============================ ===========================
    Σ Z G Z' + σ² (I or weights)     mixed_model_equations   cross-products of [Z X y]    q³, q all but one term
    anything                         dense                   –                            n³
    ================================ ======================= ============================ ===========================

    Args:
        V: Covariance of the observations.
        solver: ``"auto"``, the name of a solver, or a solver object, which is returned.

    Raises:
        ValueError: No solver has this name.
    """
    if isinstance(solver, Solver):
        return solver
    if solver == "auto":
        return next(able for able in (kind() for kind in SOLVERS.values()) if able.refusal(V) is None)
    if solver not in SOLVERS:
        raise ValueError(f"There is no solver {solver!r}; there are 'auto', {', '.join(map(repr, SOLVERS))}.")
    return SOLVERS[solver]()
