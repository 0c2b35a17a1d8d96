"""Before the first step: whether the data can tell the terms of V, and start values from the data."""

from contextlib import suppress

import torch
from torch import Tensor

from openreml_nn.covariance import IncidenceMatrix, KnownMatrix, Matrix, Sum
from openreml_nn.optim.average_information import ConfoundedParameters
from openreml_nn.solvers import Problem, random_terms
from openreml_nn.solvers.terms import RESIDUAL, operands_of

ROWS_PER_COLUMN = 64  # of X that are looked at for levels of a term
INSIDE = 1e-9  # relative length of a term's part outside the column space of X below which it has none


def data_start(problem: Problem) -> Tensor:
    r"""Raw thetas from the data: variances by moments where these cost little, else equal shares of the variance.

    With equal shares each term is taken at its present thetas (raw zero by default, where correlations are moderate)
    and multiplied by a constant, so that the average of its diagonal is the least-squares residual variance s² =
    e'e/(n − p) over the number of terms. Fixed parameters stay as they are.

    Returns:
        Raw thetas, shape (k,).
    """
    V = problem.V
    theta = V.theta.detach().clone()
    fixed = torch.zeros(len(theta), dtype=torch.bool)
    fixed[V.no_grad_index] = True
    with problem.threads():
        moments = {} if fixed.any() else problem.moment_variances()
    if moments:
        with suppress(ValueError):  # a variance that a transform cannot give
            return V.from_natural(theta.new_tensor([moments[i] for i in range(len(theta))]))
    terms: list[tuple[Matrix, list[int]]] = [(V, list(range(V.num_params)))]
    if isinstance(V, Sum):
        terms = [(V.operand(name), V.operand_index(name)) for name in V.operand_names]
    s2 = float(problem.fixed.residual_variance())
    scalable = [(term, index) for term, index in terms if _can_scale(term, fixed[index])]
    for term, index in scalable:
        with torch.no_grad():
            size = float(problem.mean_diagonal(term, theta[index]))
        if size > 0:
            scaled = term.rescale(theta[index], s2 / (len(scalable) * size)).to(theta)
            theta[index] = torch.where(fixed[index].to(theta.device), theta[index], scaled)
    return theta


def _can_scale(term: Matrix, fixed: Tensor) -> bool:
    return any(power and not bool(f) for power, f in zip(term.scale_powers, fixed, strict=True))


def require_estimable(problem: Problem) -> None:
    """Refuse a random term that the fixed effects take up whole: the restricted likelihood does not depend on it.

    Raises:
        ConfoundedParameters: The columns of a term's Z, or of a known matrix that has none, are in the column space of
            X, as those of a factor that is fixed and random at once.
    """
    U, ranks, theta = problem.fixed.U, problem.ranks, problem.V.theta.detach()
    terms = [term for term in random_terms(problem.V, theta) if term.G.free_index]
    sure = ranks.objects([_rank_is_above(problem.p, term.Z) for term in terms])
    doubtful = [term for term, *found in zip(terms, *sure, strict=True) if not any(found)]
    known = [(name, K, own) for name, K, own in operands_of(problem.V, theta)
             if isinstance(K, KnownMatrix) and isinstance(problem.V, Sum) and name != RESIDUAL and ranks.size == 1
             and K.free_index and not _corner_is_above(problem.p, K.K)]  # fmt: skip
    if not doubtful and not known:
        return
    generator = torch.Generator().manual_seed(ranks.rank)
    probe = torch.randn(problem.n_here, 1, generator=generator, dtype=torch.float64).to(U)
    both = torch.cat([probe - U @ ranks.sum(U.mT @ probe), probe], dim=1)
    for term in doubtful:
        squares = problem.by_level(term, both).square().sum(0)
        _require_outside(term.name, *ranks.sum_if_own(term.name, squares).sqrt())
    for name, K, own in known:
        _require_outside(name, *K.matmul(own.to(both), both).square().sum(0).sqrt())


def _require_outside(name: str, left: Tensor, whole: Tensor) -> None:
    """Refuse a term of whose product with a random vector nothing is left outside the column space of X."""
    if bool(left <= INSIDE * whole):
        raise ConfoundedParameters(
            f"The fixed effects take up the random term {name!r} whole, as if its factor were fixed too: the data say "
            f"nothing about its variance. Remove it from the fixed or from the random part."
        )


def _corner_is_above(p: int, K: Tensor) -> bool:
    """Whether a few rows and columns show that K has a rank above p."""
    m = min(len(K), 2 * p + 4)
    return int(torch.linalg.matrix_rank(K[:m, :m].to(torch.float64), hermitian=True)) > p


def _rank_is_above(p: int, Z: Matrix) -> bool:
    """Whether a few rows show that Z has more than p independent columns: those of different levels are independent."""
    if not isinstance(Z, IncidenceMatrix):
        return False
    codes = Z.codes[: ROWS_PER_COLUMN * (p + 1)]
    codes = codes if Z.values is None else codes[(Z.values[: len(codes)] != 0).any(1)]
    return len(codes[codes >= 0].unique()) > p
