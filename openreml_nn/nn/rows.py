"""All rows at once: V over them and the solver that it allows, made once and evaluated at each step of a training."""

from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.nn.batch import deviance_of
from openreml_nn.solvers import Problem, Solver, choose_solver


class Rows:
    """What the exact likelihood needs of the levels of all rows; `MixedModelHead.rows` makes it.

    Args:
        V: Covariance of all rows, shape (n, n); its thetas are those of the head.
        solver: ``"auto"``, the name of a solver, or a solver.

    Attributes:
        V: Covariance of all rows.
        choice: The solver and why it was taken.

    Raises:
        ValueError: There is no such solver, or it cannot take V.

    Example:
        >>> import torch
        >>> from openreml_nn.nn import Effects, MixedModelHead
        >>> head, codes = MixedModelHead({"site": Effects(2)}, mode="exact"), torch.tensor([0, 0, 1])
        >>> rows = head.rows(codes)
        >>> len(rows), head(torch.zeros(3), torch.tensor([1.0, 2.0, 0.0]), rows).shape
        (3, torch.Size([]))
    """

    def __init__(self, V: Matrix, solver: str | Solver = "auto") -> None:
        self.V = V
        self.choice = choose_solver(V, solver)
        self._first: Problem | None = None

    def __len__(self) -> int:
        return self.V.shape[0]

    def deviance(self, y: Tensor, X: Tensor, restricted: bool = True) -> tuple[Tensor, int]:
        """log|V| + log|U'V⁻¹U| + y'Py, as ``batch_deviance`` gives it, at the present thetas.

        Args:
            y: Response, shape (n,).
            X: Fixed effects, shape (n, p); p may be 0.
            restricted: Whether to count the fixed effects.

        Returns:
            The deviance without its constant, a scalar, and the rank of X.

        Raises:
            ValueError: There are not all rows, or values that are not finite.
            NotPositiveDefinite: V is not positive definite at the present thetas.
        """
        if len(y) != len(self):
            raise ValueError(f"The likelihood of these rows needs all {len(self)} of them, got {len(y)}.")
        if self._first is None:  # without the history of y and X, which it would keep alive
            self._first = self.choice.solver.prepare(self.V, y.detach(), X.detach())
        return deviance_of(self._first.with_data(y, X), restricted)
