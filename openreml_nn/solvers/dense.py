"""The dense solver: any V, one Cholesky an evaluation, and one inverse for its gradient. The oracle of all others."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.covariance import Matrix
from openreml_nn.solvers.base import Evaluation, NotPositiveDefinite, Problem, Solver, where_it_fails
from openreml_nn.solvers.fixed_effects import FixedEffects, prepare_fixed_effects
from openreml_nn.solvers.gaussian_terms import GaussianTerms
from openreml_nn.solvers.memory import require_memory
from openreml_nn.solvers.threads import threads_for
from openreml_nn.solvers.watching import is_watched

MATRICES_AT_PEAK = 5  # V, L, V⁻¹ and room for what a structure forms on the way


class DenseSolver(Solver):
    """Factor V as a dense matrix: n³/3 operations for the likelihood, n³ with its gradient, 5 n² numbers of memory."""

    name = "dense"

    def refusal(self, V: Matrix) -> str | None:
        return None

    def cost(self, V: Matrix) -> str:
        n = V.shape[0]
        return f"n³ = {n**3:.1e} multiplications and {MATRICES_AT_PEAK * 8 * n * n / 2**20:.0f} MiB an evaluation"

    def prepare(self, V: Matrix, y: Tensor, X: Tensor | None = None, *, rank: str = "drop") -> "DenseProblem":
        self.require(V)
        fixed = prepare_fixed_effects(y, X, rank)
        n = fixed.n
        what = f"A dense V of {n} observations ({MATRICES_AT_PEAK} matrices of {n} x {n})"
        require_memory(MATRICES_AT_PEAK * 8 * n * n, fixed.e.device, what)
        return DenseProblem(V, fixed)


class DenseProblem(Problem):
    """V, U and e, ready to be evaluated densely."""

    def threads(self) -> AbstractContextManager[None]:
        return threads_for(self.n**2, self.n**3)

    def evaluate(self, theta: Tensor | None = None) -> "DenseEvaluation":
        theta = self.V.theta if theta is None else theta
        return DenseEvaluation(self, theta)

    def dense_V(self, theta: Tensor) -> Tensor:
        """V(θ), added up in one buffer where nothing of ``torch.func`` watches."""
        if is_watched(theta):
            return self.V.build(theta)
        return self.V.add_to(theta.new_zeros(self.V.shape), theta)


class DenseEvaluation(Evaluation):
    """V = L L' at one θ."""

    def __init__(self, problem: DenseProblem, theta: Tensor) -> None:
        self.problem, self.theta = problem, theta
        fixed: FixedEffects = problem.fixed
        try:
            logdet_V, logdet_M, yPy, L, Q, Py, gamma, gamma_cov = GaussianTerms.apply(
                problem.dense_V(theta), fixed.U, fixed.e
            )
        except torch.linalg.LinAlgError as error:
            raise NotPositiveDefinite(_no_factor(problem, theta)) from error
        self.logdet_V, self.logdet_XtViX, self.yPy = logdet_V, logdet_M + fixed.logdet_RtR, yPy
        self.L, self.Q, self.gamma, self.gamma_cov = L, Q, gamma, gamma_cov
        self._Py = Py

    @property
    def Py(self) -> Tensor:
        return self._Py

    def solve(self, rhs: Tensor) -> Tensor:
        return torch.cholesky_solve(rhs, self.L)

    def project(self, rhs: Tensor) -> Tensor:
        return self.solve(rhs) - self.Q @ (self.Q.mT @ rhs)

    def inner(self, rhs: Tensor) -> Tensor:
        W, q = solve_triangular(self.L, rhs, upper=False), self.Q.mT @ rhs
        return W.mT @ W - q.mT @ q

    def inner_diagonal(self, rhs: Tensor) -> Tensor:
        W, q = solve_triangular(self.L, rhs, upper=False), self.Q.mT @ rhs
        return W.square().sum(0) - q.square().sum(0)


def _no_factor(problem: DenseProblem, theta: Tensor) -> str:
    with torch.no_grad():
        row = int(torch.linalg.cholesky_ex(problem.dense_V(theta.detach())).info)
    return (
        f"V is not positive definite at {where_it_fails(problem, theta)}: "
        f"its leading block of {row} rows has no Cholesky factor. "
        f"Is there a residual variance, and is every kernel positive semi-definite?"
    )
