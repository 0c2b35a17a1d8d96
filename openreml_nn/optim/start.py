"""Start values from the data: the least-squares residual variance, shared equally among the terms of V."""

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix, Sum
from openreml_nn.solvers import Problem


def data_start(problem: Problem) -> Tensor:
    r"""Raw thetas at which each term of V has an equal share of the least-squares residual variance s² = e'e/(n − p).

    Each term is taken at its present thetas (raw zero by default, where correlations are moderate) and multiplied by a
    constant, so that the average of its diagonal is s² over the number of terms. Fixed parameters stay as they are.

    Returns:
        Raw thetas, shape (k,).
    """
    V, s2 = problem.V, float(problem.fixed.residual_variance)
    theta = V.theta.detach().clone()
    fixed = torch.zeros(len(theta), dtype=torch.bool)
    fixed[V.no_grad_index] = True
    terms: list[tuple[Matrix, list[int]]] = [(V, list(range(V.num_params)))]
    if isinstance(V, Sum):
        terms = [(V.operand(name), V.operand_index(name)) for name in V.operand_names]
    scalable = [(term, index) for term, index in terms if _can_scale(term, fixed[index])]
    for term, index in scalable:
        with torch.no_grad():
            size = float(term.mean_diagonal(theta[index]))
        if size > 0:
            scaled = term.rescale(theta[index], s2 / (len(scalable) * size)).to(theta)
            theta[index] = torch.where(fixed[index].to(theta.device), theta[index], scaled)
    return theta


def _can_scale(term: Matrix, fixed: Tensor) -> bool:
    return any(power and not bool(f) for power, f in zip(term.scale_powers, fixed, strict=True))
