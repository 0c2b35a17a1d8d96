"""Objectives: −ℓ(θ) as modules, differentiable with respect to θ, y and X."""

from abc import abstractmethod

from torch import Tensor, nn

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.matrix import Params
from openreml_nn.likelihood import full_loglik, restricted_loglik
from openreml_nn.solvers import ALONE, Evaluation, Problem, Ranks, Solver, choose_shared


class Objective(nn.Module):
    """Base class of negative log-likelihoods of y ~ N(Xβ, V(θ)).

    Args:
        V: Covariance of the observations, shape (n, n).
        solver: ``"auto"``, the name of a solver, or a solver object.
        ranks: The processes that share the rows; V is then the covariance of those of this one.
    """

    method: str

    def __init__(self, V: Matrix, solver: str | Solver = "auto", ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.V = V
        self.choice = choose_shared(V, solver, ranks)

    @property
    def solver(self) -> Solver:
        """The solver that was chosen."""
        return self.choice.solver

    @abstractmethod
    def loglik(self, evaluation: Evaluation) -> Tensor:
        """ℓ of an evaluated problem, with its constants."""

    def prepare(self, y: Tensor, X: Tensor | None = None, *, rank: str = "drop", ranks: Ranks = ALONE) -> Problem:
        """Do once what depends on the data alone; ``-objective.loglik(problem.evaluate())`` is then the objective."""
        return self.solver.prepare_shared(self.V, y, X, ranks, rank=rank)

    def forward(self, y: Tensor, X: Tensor | None = None, theta: Params | None = None) -> Tensor:
        """−ℓ(θ) with its constants; prepares the data anew at each call, which ``prepare`` does once for a loop.

        Args:
            y: Response, shape (n,).
            X: Design of the fixed effects, shape (n, p); a column of ones when left out.
            theta: Raw thetas, shape (k,), or by name; the module's own when left out.

        Raises:
            TypeError: theta holds no floating-point numbers, or y or X is no tensor.
            ValueError: theta has another length than V has parameters, or as ``prepare``.
        """
        if theta is not None:
            theta = self.V.from_param_dict(theta)
            self.V.check_params(theta)
        return -self.loglik(self.prepare(y, X).evaluate(theta))


class REML(Objective):
    """Negative restricted log-likelihood, ½ [(n − p) log 2π + log|V| + log|X'V⁻¹X| + y'Py].

    Example:
        >>> import torch
        >>> from openreml_nn import REML
        >>> from openreml_nn.covariance import ScalarMatrix
        >>> objective = REML(ScalarMatrix(4))
        >>> loss = objective(torch.tensor([1.0, 2.0, 4.0, 5.0]), torch.ones(4, 1))
        >>> loss.backward()
    """

    method = "REML"

    def loglik(self, evaluation: Evaluation) -> Tensor:
        return restricted_loglik(evaluation)


class ML(Objective):
    """Negative log-likelihood, ½ [n log 2π + log|V| + y'Py], β at its maximum."""

    method = "ML"

    def loglik(self, evaluation: Evaluation) -> Tensor:
        return full_loglik(evaluation)
