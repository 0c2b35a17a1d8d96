"""Which solver takes which V: the table."""

from openreml_nn.covariance import Matrix
from openreml_nn.solvers.base import Solver
from openreml_nn.solvers.dense import DenseSolver

SOLVERS: dict[str, type[Solver]] = {DenseSolver.name: DenseSolver}


def choose_solver(V: Matrix, solver: str | Solver = "auto") -> Solver:
    """The solver for a V, by this table, the first row that fits.

    ============ ======== ==================== ====================
    structure    solver   once                 each evaluation
    ============ ======== ==================== ====================
    anything     dense    –                    n³
    ============ ======== ==================== ====================

    Args:
        V: Covariance of the observations.
        solver: ``"auto"``, the name of a solver, or a solver object, which is returned.

    Raises:
        ValueError: No solver has this name.
    """
    if isinstance(solver, Solver):
        return solver
    if solver == "auto":
        return DenseSolver()
    if solver not in SOLVERS:
        raise ValueError(f"There is no solver {solver!r}; there are 'auto', {', '.join(map(repr, SOLVERS))}.")
    return SOLVERS[solver]()
