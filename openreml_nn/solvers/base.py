"""The seam between structure and algebra: V(θ) → a prepared problem → an evaluation.

A solver says which structures it takes and prepares a problem once from V, y and X. The problem keeps what depends on
the data alone and is evaluated at a θ as often as wanted. An evaluation gives log-determinants, quadratic forms and
products with P; the likelihood, its information, estimates and predictions are written once on it, in `likelihood`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.solvers.closed_form import ClosedForm
from openreml_nn.solvers.fixed_effects import FixedEffects, prepare_fixed_effects
from openreml_nn.solvers.ranks import Ranks
from openreml_nn.solvers.terms import RandomTerm

COLUMNS_AT_ONCE = 512  # of a matrix of n rows that is made for a diagonal only
ELEMENTS_AT_ONCE = 2**24  # of such a matrix, 128 MiB
FEW_DIRECTIONS = 4  # up to which one derivative after the other is quicker


class NotPositiveDefinite(ValueError):
    """A covariance matrix is not positive definite at a θ; the message names the matrix and where it fails."""


class Solver(ABC):
    """How a V is factored. A solver holds options and no data."""

    name: str
    may_tear: bool = False  # whether levels of ``whole_terms`` may be on several processes, at some cost

    @abstractmethod
    def refusal(self, V: Matrix) -> str | None:
        """Why this solver cannot take V, in words that say what it needs; None where it can."""

    @abstractmethod
    def cost(self, V: Matrix) -> str:
        """What an evaluation of V costs, in words with numbers: ``"n³/3 = 1.2e+05 multiplications"``."""

    def require(self, V: Matrix) -> None:
        """Raise a ValueError where this solver cannot take V."""
        refusal = self.refusal(V)
        if refusal is not None:
            raise ValueError(f"The {self.name} solver cannot take this V: {refusal} Take solver='auto' or 'dense'.")

    def whole_terms(self, V: Matrix) -> list[str] | None:
        """Which terms of V must have all records of a level on one process, where several processes share the rows.

        Returns:
            Their names, none where the rows may be spread in any way; None where each process needs all rows.
        """
        return None

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

    def prepare_shared(self, V: Matrix, y: Tensor, X: Tensor | None, ranks: Ranks, *, rank: str = "drop") -> "Problem":
        """As ``prepare`` where several processes share the rows: V, y and X are those of the rows of this one.

        Raises:
            ValueError: As ``prepare``, on all processes; or this solver needs all rows on each.
        """
        if ranks.size == 1:
            return self.prepare(V, y, X, rank=rank)
        raise ValueError(
            f"The {self.name} solver needs all rows on each process, and they are spread over {ranks.size}. Give each "
            f"process all rows, or take a solver that shares them: 'mixed_model_equations' or 'blocks'."
        )


class Problem(ABC):
    """A prepared problem: V, and y and X centred by an orthonormal basis U of X.

    Args:
        V: Covariance of the observations.
        fixed: The fixed effects: basis, centred response, and the way back to β.
    """

    def __init__(self, V: Matrix, fixed: FixedEffects) -> None:
        n = fixed.n_here
        if V.shape != (n, n):
            raise ValueError(f"V must be of shape ({n}, {n}) for {n} observations, got {V.shape}.")
        if V.num_params and V.theta.device != fixed.e.device:
            raise ValueError(
                f"V and y must be on one device, got V on {V.theta.device} and y on {fixed.e.device}. Move V by "
                f"`V.to(y.device)`, or y."
            )
        self.V = V
        self.fixed = fixed

    @property
    def n(self) -> int:
        """Number of observations, of all processes."""
        return self.fixed.n

    @property
    def n_here(self) -> int:
        """Number of observations of this process: the rows of V, y and X."""
        return self.fixed.n_here

    @property
    def ranks(self) -> Ranks:
        """The processes that share the rows."""
        return self.fixed.ranks

    @property
    def p(self) -> int:
        """Rank of X."""
        return self.fixed.p

    def with_data(self, y: Tensor, X: Tensor | None = None, *, rank: str = "drop") -> "Problem":
        """The problem of other data with the same V, whose designs are not gone through again.

        Arguments are those of ``Solver.prepare``.
        """
        fixed = prepare_fixed_effects(y, X, rank, self.ranks)
        if fixed.n_here != self.n_here:
            raise ValueError(f"This V has {self.n_here} observations, and the other data are {fixed.n_here}.")
        return self._with(fixed)

    def _with(self, fixed: FixedEffects) -> "Problem":
        """The problem of another y and X; a solver whose preparation depends on V keeps that."""
        return type(self)(self.V, fixed)

    def moment_variances(self) -> dict[int, float]:
        """Estimates at little cost: a variance for the index of each raw theta; empty where there are none."""
        return {}

    def threads(self) -> AbstractContextManager[None]:
        """For evaluations and what follows from them: one thread where they are short, else as many as there are."""
        return nullcontext()

    def mean_diagonal(self, term: Matrix, params: Tensor) -> Tensor:
        """The mean of the diagonal of V, or of an operand of V, over the rows of all processes."""
        own = term.mean_diagonal(params)
        return own if self.ranks.size == 1 else self.ranks.sum(self.n_here * own) / self.n

    def by_level(self, term: RandomTerm, rhs: Tensor) -> Tensor:
        """Z' ``rhs`` over the rows of all processes, for the levels of a random term that V has on this one."""
        return self.ranks.sum_unless_own(term.name, term.Z.rmatmul(term.Z_params, rhs))

    @abstractmethod
    def evaluate(self, theta: Tensor | None = None) -> "Evaluation":
        """Factor V at raw thetas ``theta`` (the module's own when left out).

        Raises:
            NotPositiveDefinite: V is not positive definite there.
        """


class Evaluation(ABC):
    """V factored at one θ. Where several processes share the rows, "shape (n,)" means those of a process.

    The attributes marked so are differentiable; ``Py`` is not, and ``solve`` and ``project`` need not be, whatever
    requires a gradient.

    A solver that works in other coordinates than rows overrides ``working_variates`` together with ``inner``, and
    ``ZtPy`` and ``explained_variance``, so that nothing of n rows is touched; the defaults follow from ``Py`` and
    ``inner_diagonal``.

    Attributes:
        problem: The problem that was evaluated.
        theta: Raw thetas, shape (k,).
        logdet_V: log|V|, differentiable.
        logdet_XtViX: log|X'V⁻¹X|, differentiable.
        yPy: y'Py, differentiable.
        gamma: Generalised least-squares coefficients of the centred response on the basis U, shape (p,).
        gamma_cov: (U'V⁻¹U)⁻¹, shape (p, p).
    """

    problem: Problem
    theta: Tensor
    logdet_V: Tensor
    logdet_XtViX: Tensor
    yPy: Tensor
    gamma: Tensor
    gamma_cov: Tensor

    def detached(self) -> "Evaluation":
        """The same without the history of its values; what it has computed is shared."""
        other = copy(self)
        for name in ("theta", "logdet_V", "logdet_XtViX", "yPy"):
            setattr(other, name, getattr(self, name).detach())
        return other

    @property
    @abstractmethod
    def Py(self) -> Tensor:
        """P y, shape (n,), not differentiable."""

    @abstractmethod
    def solve(self, rhs: Tensor) -> Tensor:
        """V⁻¹ ``rhs``, shape (n, m)."""

    @abstractmethod
    def project(self, rhs: Tensor) -> Tensor:
        """P ``rhs``, shape (n, m)."""

    def followed_by_rows(self, who: str, logdet_M: Tensor, yPy: Tensor) -> tuple[Tensor, Tensor]:
        """log|U'V⁻¹U| and e'Pe with their derivatives by U and e too, where these are wanted.

        They are 2 V⁻¹U(U'V⁻¹U)⁻¹ by U of the one, −2 Pe γ' by U and 2 Pe by e of the other. For a solver, ``who``, that
        has the derivatives by θ in closed form.
        """
        U, e = self.problem.fixed.U, self.problem.fixed.e
        if not (U.requires_grad or e.requires_grad):
            return logdet_M, yPy
        with torch.no_grad():
            Pe = self.Py
            of_U = torch.stack([2.0 * self.solve(U) @ self.gamma_cov, -2.0 * torch.outer(Pe, self.gamma)])
            of_e = torch.stack([torch.zeros_like(Pe), 2.0 * Pe])
        moved = ClosedForm.apply(Pe.new_zeros(2), who, of_U, of_e, U, e)
        return logdet_M + moved[0], yPy + moved[1]

    def inner(self, rhs: Tensor) -> Tensor:
        """``rhs``' P ``rhs``, shape (m, m), for columns such as ``working_variates`` gives."""
        return rhs.mT @ self.project(rhs)

    def inner_diagonal(self, rhs: Tensor) -> Tensor:
        """The diagonal of ``rhs``' P ``rhs``, shape (m,), for ``rhs`` of n rows."""
        return self.problem.ranks.sum((rhs * self.project(rhs)).sum(0))

    def working_variates(self) -> Tensor:
        r"""V̇_k P y for each free parameter k, shape (n, k): one forward-mode product, no derivative matrix."""
        V, Py = self.problem.V, self.Py.detach()[:, None]
        return along_free(V, self.theta, lambda theta: V.matmul(theta, Py)[:, 0])

    def ZtPy(self, term: RandomTerm) -> Tensor:
        """Z'Py of a random term, shape (q,)."""
        return self.problem.by_level(term, self.Py.detach()[:, None])[:, 0]

    def explained_variance(self, term: RandomTerm) -> Tensor:
        """The diagonal of G Z'P Z G of a random term, shape (q,): by how much the data narrow its effects."""
        q, parts, width = term.G.shape[0], [], columns_at_once(self.problem.n)
        for first in range(0, q, width):
            columns = unit_columns(self.Py, q, first, width)
            parts.append(self.inner_diagonal(term.Z.matmul(term.Z_params, term.G.matmul(term.G_params, columns))))
        return torch.cat(parts)


def where_it_fails(problem: Problem, theta: Tensor) -> str:
    """The parameters of V on their natural scale, ``"name = value, …"``, for the message of a `NotPositiveDefinite`."""
    V = problem.V
    values = V.trans_params(theta.detach()).tolist()
    return ", ".join(f"{name} = {value:.4g}" for name, value in zip(V.param_names, values, strict=True))


def along_free(V: Matrix, theta: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Derivatives of ``function(θ)``, shape (m,), along each free parameter of V, shape (m, k).

    They are those of J'w with respect to w, J'w by reverse mode: torch's forward mode takes two tenths of a millisecond
    for each product with a constant, whatever its size.
    """
    theta = theta.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function(theta)
        w = torch.zeros_like(value, requires_grad=True)
        (Jw,) = torch.autograd.grad(value @ w, theta, create_graph=True, allow_unused=True)
    directions = V.free_columns(torch.eye(len(theta), dtype=theta.dtype, device=theta.device)).mT
    if not len(directions) or Jw is None:  # None for a function that does not depend on θ
        return value.new_zeros((len(value), len(directions)))
    return derivatives_along(Jw, w, directions).mT


def derivatives_along(y: Tensor, x: Tensor, directions: Tensor) -> Tensor:
    """d'∂y/∂x for each direction d, shape (c, n), for y of shape (m,), x of shape (n,) and d of shape (c, m).

    A few are differentiated one after the other, which takes less than the preparations for all at once.
    """
    if len(directions) > FEW_DIRECTIONS:
        return torch.func.vmap(lambda d: torch.autograd.grad(y, x, d)[0])(directions)
    with torch.enable_grad():
        sums = [y @ d for d in directions]
    return torch.stack([torch.autograd.grad(total, x, retain_graph=True)[0] for total in sums])


def columns_at_once(rows: int) -> int:
    """How many columns of so many rows to make at once."""
    return max(1, min(COLUMNS_AT_ONCE, ELEMENTS_AT_ONCE // rows))


def unit_columns(like: Tensor, size: int, first: int, width: int = COLUMNS_AT_ONCE) -> Tensor:
    """Columns ``first`` to ``first + width`` of the identity of a size, shape (size, at most that many)."""
    last = min(first + width, size)
    columns = like.new_zeros((size, last - first))
    columns[first:last] = torch.eye(last - first, dtype=like.dtype, device=like.device)
    return columns
