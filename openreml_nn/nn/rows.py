"""All rows at once: V over them and the solver that it allows, made once and evaluated at each step of a training."""

from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.solvers import Evaluation, Solver, choose_solver


class Rows:
    """What the exact likelihood needs of the levels of all rows; `MixedModelHead.rows` makes it.

    Args:
        V: Covariance of all rows, shape (n, n); its thetas are those of the head.
        solver: ``"auto"``, the name of a solver, or a solver.

    Attributes:
        V: Covariance of all rows.
        choice: The solver and why it was taken.
    """

    def __init__(self, V: Matrix, solver: str | Solver = "auto") -> None:
        self.V = V
        self.choice = choose_solver(V, solver)

    def __len__(self) -> int:
        return self.V.shape[0]

    def evaluate(self, y: Tensor, X: Tensor) -> Evaluation:
        """The model at the present thetas, differentiable in y, X and θ.

        Args:
            y: Response, shape (n,).
            X: Design of the fixed effects, shape (n, p); p may be 0.
        """
        if len(y) != len(self):
            raise ValueError(f"The likelihood of these rows needs all {len(self)} of them, got {len(y)}.")
        return self.choice.solver.prepare(self.V, y, X).evaluate()

    def deviance(self, y: Tensor, X: Tensor, restricted: bool = True) -> tuple[Tensor, int]:
        """log|V| + log|U'V⁻¹U| + y'Py, without log|U'V⁻¹U| unless restricted, and the rank of X."""
        evaluation = self.evaluate(y, X)
        fixed = evaluation.problem.fixed
        deviance = evaluation.logdet_V + evaluation.yPy
        return deviance + evaluation.logdet_XtViX - fixed.logdet_RtR if restricted else deviance, fixed.p
