"""The seam between structure and algebra: V(θ) → a prepared problem → an evaluation.

A solver says which structures it takes and prepares a problem once from V, y and X. The problem keeps what depends on
the data alone and is evaluated at a θ as often as wanted. An evaluation gives log-determinants, quadratic forms and
products with P; the likelihood, its information, estimates and predictions are written once on it, in `likelihood`.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.solvers.fixed_effects import FixedEffects


class NotPositiveDefinite(ValueError):
    """A covariance matrix is not positive definite at a θ; the message names the matrix and where it fails."""


class Solver(ABC):
    """How a V is factored. A solver holds options and no data."""

    name: str

    @abstractmethod
    def prepare(self, V: Matrix, y: Tensor, X: Tensor | None = None, *, rank: str = "drop") -> "Problem":
        """Do once what depends on the data alone.

        Args:
            V: Covariance of the observations, shape (n, n).
            y: Response, shape (n,).
            X: Design of the fixed effects, shape (n, p); a column of ones when left out.
            rank: ``"drop"``: drop aliased columns of X from left to right; ``"error"``: refuse them.

        Raises:
            ValueError: V has a structure that this solver cannot take, shapes do not fit, values are not finite.
            MemoryError: The problem does not fit.
        """


class Problem(ABC):
    """A prepared problem: V, and y and X centred by an orthonormal basis U of X.

    Args:
        V: Covariance of the observations.
        fixed: The fixed effects: basis, centred response, and the way back to β.
    """

    def __init__(self, V: Matrix, fixed: FixedEffects) -> None:
        if V.shape != (fixed.n, fixed.n):
            raise ValueError(f"V must be of shape ({fixed.n}, {fixed.n}) for {fixed.n} observations, got {V.shape}.")
        self.V = V
        self.fixed = fixed

    @property
    def n(self) -> int:
        """Number of observations."""
        return self.fixed.n

    @property
    def p(self) -> int:
        """Rank of X."""
        return self.fixed.p

    @abstractmethod
    def evaluate(self, theta: Tensor | None = None) -> "Evaluation":
        """Factor V at raw thetas ``theta`` (the module's own when left out).

        Raises:
            NotPositiveDefinite: V is not positive definite there.
        """


class Evaluation(ABC):
    """V factored at one θ.

    Attributes:
        problem: The problem that was evaluated.
        theta: Raw thetas, shape (k,).
        logdet_V: log|V|, differentiable.
        logdet_XtViX: log|X'V⁻¹X|, differentiable.
        yPy: y'Py, differentiable.
        Py: P y, shape (n,), not differentiable.
        gamma: Generalised least-squares coefficients of the centred response on the basis U, shape (p,).
        gamma_cov: (U'V⁻¹U)⁻¹, shape (p, p).
    """

    problem: Problem
    theta: Tensor
    logdet_V: Tensor
    logdet_XtViX: Tensor
    yPy: Tensor
    Py: Tensor
    gamma: Tensor
    gamma_cov: Tensor

    @abstractmethod
    def solve(self, rhs: Tensor) -> Tensor:
        """V⁻¹ ``rhs``, shape (n, m)."""

    @abstractmethod
    def project(self, rhs: Tensor) -> Tensor:
        """P ``rhs``, shape (n, m)."""

    @abstractmethod
    def inner(self, rhs: Tensor) -> Tensor:
        """``rhs``' P ``rhs``, shape (m, m)."""

    @abstractmethod
    def inner_diagonal(self, rhs: Tensor) -> Tensor:
        """The diagonal of ``inner(rhs)``, shape (m,), at the cost of the diagonal."""

    def working_variates(self) -> Tensor:
        r"""V̇_k P y for each free parameter k, shape (n, k): one forward-mode product, no derivative matrix."""
        V, theta, Py = self.problem.V, self.theta.detach(), self.Py.detach()[:, None]
        fixed = set(V.no_grad_index)
        free = [k for k in range(len(theta)) if k not in fixed]
        if not free:
            return Py.new_zeros((len(Py), 0))
        directions = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)[free]

        def variate(direction: Tensor) -> Tensor:
            return torch.func.jvp(lambda t: V.matmul(t, Py), (theta,), (direction,))[1]

        with torch.no_grad():
            return torch.func.vmap(variate)(directions)[:, :, 0].mT
