"""Fixed effects, before any covariance: rank, an orthonormal basis U of X, and the response centred by it.

Every likelihood quantity depends on y only through its part outside the column space of X, and on X only through that
space (but for log|R|, X = U R). Working with U and the least-squares residual e makes a fit the same for y and for
y + 10⁸, and as accurate for badly scaled columns as for good ones.

Where the rows are on several processes, R is that of the stacked R of all of them (the QR of tall matrices of Demmel,
Grigori, Hoemmen & Langou 2012, SIAM Journal on Scientific Computing 34), so that all decide alike what is aliased.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from openreml_nn.solvers.ranks import ALONE, Ranks
from openreml_nn.solvers.threads import threads_for
from openreml_nn.solvers.watching import is_watched

SAMPLE = 1000  # values of the response by which its middle is found
ALIASED = 1e-7  # relative length of what is left of a column after the ones before it: R's and lme4's tolerance


@dataclass(frozen=True)
class FixedEffects:
    """X and y as solvers see them; of several processes each has its rows of U and e, and all have the same R and β̂.

    Attributes:
        U: Orthonormal basis of the kept columns, shape (n, p).
        R: Upper triangular, X[:, kept] = U R, shape (p, p).
        e: Least-squares residual of y, shape (n,).
        kept: Indices of the columns of X that are kept.
        aliased: Indices of the columns that depend on columns to their left.
        ols: Least-squares coefficients of y on the kept columns, shape (p,).
        ranks: The processes that share the rows.
        others: Number of observations of the other processes.
    """

    U: Tensor
    R: Tensor
    e: Tensor
    kept: list[int]
    aliased: list[int]
    ols: Tensor
    ranks: Ranks = ALONE
    others: int = 0

    @property
    def n_here(self) -> int:
        """Number of observations of this process."""
        return self.U.shape[0]

    @property
    def n(self) -> int:
        """Number of observations."""
        return self.n_here + self.others

    @property
    def p(self) -> int:
        """Rank of X."""
        return self.U.shape[1]

    def residual_variance(self) -> Tensor:
        """e'e / (n − p), the least-squares residual variance; where there are several processes, all call this."""
        return self.ranks.sum(self.e.square().sum()) / max(self.n - self.p, 1)

    @property
    def logdet_RtR(self) -> Tensor:
        """log|R'R|, by which log|X'V⁻¹X| differs from log|U'V⁻¹U|."""
        return 2.0 * self.R.diagonal().abs().log().sum()

    def beta(self, gamma: Tensor) -> Tensor:
        """β̂ of the kept columns from the coefficients of e on U, shape (p,)."""
        return self.ols + self.solve_R(gamma[:, None])[:, 0]

    def solve_R(self, rhs: Tensor) -> Tensor:
        """R⁻¹ ``rhs``."""
        return torch.linalg.solve_triangular(self.R, rhs, upper=True)


def prepare_fixed_effects(y: Tensor, X: Tensor | None = None, rank: str = "drop", ranks: Ranks = ALONE) -> FixedEffects:
    """Check y and X, find the rank and centre y.

    Args:
        y: Response, shape (n,); of several processes each gives its own rows.
        X: Design, shape (n, p); a column of ones when left out.
        rank: ``"drop"``: drop aliased columns of X from left to right; ``"error"``: refuse them.
        ranks: The processes that share the rows.

    Raises:
        TypeError: y or X is no tensor of real numbers.
        ValueError: Shapes do not fit, values are missing or infinite, y is constant given X, X is rank deficient with
            ``rank="error"``, there are no degrees of freedom left, or a process has no rows.
    """
    if rank not in ("drop", "error"):
        raise ValueError(f"`rank` must be 'drop' or 'error', got {rank!r}.")
    y, X = ranks.together(lambda: _checked_rows(y, X))
    n = _number_of_rows(X, ranks)
    U, R = _orthonormal(X, ranks)
    kept, aliased = _independent_columns(R.detach())
    if aliased and rank == "error":
        raise ValueError(f"X is rank deficient: columns {aliased} depend on columns to their left. Remove them.")
    if len(kept) >= n:
        raise ValueError(f"{n} observations leave no degrees of freedom beside {len(kept)} fixed effects.")
    if aliased:
        X = X[:, kept]
        U, R = _orthonormal(X, ranks)
    shift, constant, outside = _exact_shift(y, X, U, R, ranks)
    e, a = y - shift, U.new_zeros(U.shape[1])
    for _ in range(2):
        c = ranks.sum(U.mT @ e)
        e, a = torch.addmv(e, U, ranks.shared(c), alpha=-1.0), a + c
    if not _is_constant(X):
        e = e + shift * (outside - outside.detach())
    left, whole = ranks.largest(torch.stack([e.detach().abs().max(), y.detach().abs().max()]))
    if not bool(left > 1e-13 * whole):
        raise ValueError("The response is constant, or the fixed effects fit it exactly: no variance is left.")
    ols = torch.linalg.solve_triangular(R, a[:, None], upper=True)[:, 0] + shift * constant
    return FixedEffects(U, R, e, kept, aliased, ols, ranks, n - len(e))


def _checked_rows(y: Tensor, X: Tensor | None) -> tuple[Tensor, Tensor]:
    y = _checked("y", y, 1)
    X = torch.ones_like(y)[:, None] if X is None else _checked("X", X, 2).to(y)
    if len(X) != len(y):
        raise ValueError(f"X needs one row for each of the {len(y)} observations, got {len(X)} rows.")
    return y, X


def _number_of_rows(X: Tensor, ranks: Ranks) -> int:
    """Rows of all processes together; a ValueError where one has none, or other columns than the first."""
    shapes = ranks.objects(tuple(X.shape))
    columns = [shape[1] for shape in shapes]
    if len(set(columns)) > 1:
        raise ValueError(f"X needs the same columns on every process, got {columns} columns.")
    if ranks.size > 1 and not all(shape[0] for shape in shapes):
        empty = [place for place, shape in enumerate(shapes) if not shape[0]]
        raise ValueError(
            f"Process {empty[0] + 1} of {ranks.size} has no rows. Take fewer processes, or spread the rows otherwise."
        )
    return sum(shape[0] for shape in shapes)


def _orthonormal(X: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """U and R with X = U R; where columns depend on others, R alone is right.

    On several processes R comes from the stacked R of all, without derivatives, and one pass of the Cholesky QR makes
    X R⁻¹ orthonormal to the last digit and U and R differentiable, also where a process has fewer rows than columns, or
    columns of zeros.
    """
    if ranks.size == 1:
        with threads_for(X.numel(), X.numel() * X.shape[1]):
            return torch.linalg.qr(X)
    own = torch.linalg.qr(X.detach(), mode="r")[1]
    R = ranks.first(torch.linalg.qr(torch.cat(ranks.gather(own)), mode="r")[1])
    if _independent_columns(R)[1]:
        return X, R
    W = torch.linalg.solve_triangular(R, X, upper=True, left=False)
    C = torch.linalg.cholesky(ranks.sum(W.mT @ W))
    return torch.linalg.solve_triangular(ranks.shared(C).mT, W, upper=True, left=False), C.mT @ R


def _exact_shift(y: Tensor, X: Tensor, U: Tensor, R: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """A constant c to take from y, without rounding, where X spans the constants.

    Differences of neighbours such as y − y_median are exact in floating point, products with U are not: of
    10¹² + 0.4 they would keep no digit after the point.

    Returns:
        (c, coefficients of 1 on X, part of 1 outside the span of X). The last is rounding, but its derivative with
        respect to X is not: the caller adds c · (part − its value), a zero that carries it.
    """
    found = _column_of_ones(X) if ranks.size == 1 and _is_constant(X) else None
    if found is not None:
        return _middle(y), torch.eye(X.shape[1], dtype=y.dtype, device=y.device)[found], y.new_zeros(())
    ones = torch.ones_like(y)
    a = ranks.sum(U.mT @ ones)
    outside = ones - U @ ranks.shared(a)
    if ranks.largest(outside.detach().abs().max()) > 1e-10:
        return y.new_zeros(()), torch.zeros_like(a), torch.zeros_like(y)
    coefficients = torch.linalg.solve_triangular(R, a[:, None], upper=True)
    for _ in range(2):  # refined, because the caller multiplies them by a c that may be large
        left = ranks.sum(U.mT @ (ones[:, None] - X @ ranks.shared(coefficients)))
        coefficients = coefficients + torch.linalg.solve_triangular(R, left, upper=True)
    return torch.cat(ranks.gather(_middle(y)[None])).median(), coefficients[:, 0], outside


def _middle(y: Tensor) -> Tensor:
    """The median of some thousand values."""
    return y.detach()[:: 1 + len(y) // SAMPLE].median()


def _is_constant(x: Tensor) -> bool:
    """Whether no mode of automatic differentiation follows a tensor."""
    followed = x.requires_grad or is_watched(x)
    return not followed and unpack_dual(x).tangent is None


def _column_of_ones(X: Tensor) -> int | None:
    """Index of the first column of ones; None where there is none."""
    candidates = (X[:1] == 1.0).any(0).nonzero()[:, 0].tolist()
    return next((j for j in candidates if bool((X[:, j] == 1.0).all())), None)


def _independent_columns(R: Tensor) -> tuple[list[int], list[int]]:
    """Columns kept and columns aliased, decided from left to right as R's lm and lme4 do; X = U R says it all by R."""
    kept, aliased = list(range(R.shape[1])), list[int]()
    lengths = torch.linalg.vector_norm(R, dim=0)
    while kept:
        left = (torch.linalg.qr(R[:, kept], mode="r")[1] if aliased else R).diagonal().abs()
        if len(left) < len(kept):  # more columns than rows: those beyond depend on the others
            left = torch.cat([left, left.new_zeros(len(kept) - len(left))])
        dependent = (left <= ALIASED * lengths[kept]).nonzero()
        if not len(dependent):
            break
        aliased.append(kept.pop(int(dependent[0])))
    return kept, sorted(aliased)


def _checked(name: str, values: Tensor, dimensions: int) -> Tensor:
    if not isinstance(values, Tensor) or values.is_complex():
        raise TypeError(f"{name} must be a tensor of real numbers, got {type(values).__name__}.")
    if values.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimension{'s' * (dimensions > 1)}, got {tuple(values.shape)}.")
    values = values.to(torch.float64)
    sound = bool(values.detach().sum().isfinite())  # one quick pass; values are looked at one by one only if it fails
    bad = 0 if sound else int((~torch.isfinite(values.detach())).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} missing or infinite values. Drop or replace them.")
    return values
