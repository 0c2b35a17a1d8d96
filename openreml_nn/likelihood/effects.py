"""Estimates of fixed effects (BLUE) and predictions of random effects (BLUP), on an evaluation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.covariance import CovariancePropagation, Matrix, Sum
from openreml_nn.solvers import Evaluation

RESIDUAL = "residual"  # operands of V with this name are no random term
COLUMNS_AT_ONCE = 512


@dataclass(frozen=True)
class RandomTerm:
    """One term Z G Z' of V.

    Attributes:
        name: Name of the operand of V.
        Z: Design, shape (n, q).
        G: Covariance of the effects, shape (q, q).
        Z_params: Raw parameters of Z.
        G_params: Raw parameters of G.
    """

    name: str
    Z: Matrix
    G: Matrix
    Z_params: Tensor
    G_params: Tensor


def random_terms(V: Matrix, theta: Tensor) -> list[RandomTerm]:
    """The terms Z G Z' of V, a `Sum` or a single term, but for the operand named ``residual``."""
    named = [("", V, theta)]
    if isinstance(V, Sum):
        named = [(name, V.operand(name), own) for name, own in zip(V.operand_names, V.split(theta), strict=True)]
    terms = []
    for name, operand, own in named:
        if isinstance(operand, CovariancePropagation) and name != RESIDUAL:
            z, g = operand.split(own)
            terms.append(RandomTerm(name, operand.Z, operand.G, z, g))
    return terms


def beta(evaluation: Evaluation) -> Tensor:
    r"""β̂ = (X'V⁻¹X)⁻¹X'V⁻¹y for the kept columns of X, shape (p,)."""
    return evaluation.problem.fixed.beta(evaluation.gamma.detach())


def beta_cov(evaluation: Evaluation) -> Tensor:
    r"""Covariance (X'V⁻¹X)⁻¹ of β̂, shape (p, p)."""
    fixed = evaluation.problem.fixed
    half = fixed.solve_R(evaluation.gamma_cov.detach())
    return fixed.solve_R(half.mT)


def blup(evaluation: Evaluation, term: RandomTerm) -> Tensor:
    r"""û = G Z' P y, shape (q,)."""
    ZtPy = term.Z.rmatmul(term.Z_params, evaluation.Py.detach()[:, None])
    return term.G.matmul(term.G_params, ZtPy)[:, 0].detach()


def prediction_error_variance(evaluation: Evaluation, term: RandomTerm) -> Tensor:
    r"""Diagonal of var(û − u) = G − G Z' P Z G, shape (q,)."""
    q = term.G.shape[0]
    explained = []
    with torch.no_grad():
        for first in range(0, q, COLUMNS_AT_ONCE):
            columns = _unit_columns(evaluation, q, first)
            ZG = term.Z.matmul(term.Z_params, term.G.matmul(term.G_params, columns))
            explained.append(evaluation.inner_diagonal(ZG))
        return term.G.diagonal(term.G_params) - torch.cat(explained)


def predict(evaluation: Evaluation, X: Tensor, Z: dict[str, Matrix]) -> tuple[Tensor, Tensor]:
    r"""Predictions Xβ̂ + Σ Z û for new rows and their prediction error variances.

    With k = Σ Z G Z' for a new row against the old ones, the variance of the error in x'β + z'u is
    z'Gz − k'Pk + x'Cx − 2 x'C X'V⁻¹k, C the covariance of β̂. A level without records contributes its variance z'Gz.

    Args:
        evaluation: The fitted model.
        X: Fixed-effects design of the new rows, kept columns only, shape (m, p).
        Z: Design of the new rows for each random term by name, with the columns of the fitted one.

    Returns:
        (prediction, variance), each of shape (m,).
    """
    with torch.no_grad():
        mean = X @ beta(evaluation)
        C = beta_cov(evaluation)
        variance = ((X @ C) * X).sum(1)
        k = mean.new_zeros((evaluation.problem.n, len(X)))
        empty = mean.new_zeros(0)
        for term in random_terms(evaluation.problem.V, evaluation.theta.detach()):
            if term.name in Z:
                new = Z[term.name]
                mean = mean + new.matmul(empty, blup(evaluation, term)[:, None])[:, 0]
                for first in range(0, len(X), COLUMNS_AT_ONCE):
                    rows = new.rmatmul(empty, _unit_columns(evaluation, len(X), first))
                    G_rows = term.G.matmul(term.G_params, rows)
                    variance[first : first + rows.shape[1]] += (rows * G_rows).sum(0)
                    k[:, first : first + rows.shape[1]] += term.Z.matmul(term.Z_params, G_rows)
        fixed = evaluation.problem.fixed
        XtVik = fixed.R.mT @ (fixed.U.mT @ evaluation.solve(k))
        variance = variance - evaluation.inner_diagonal(k) - 2.0 * ((X @ C) * XtVik.mT).sum(1)
        return mean, variance


def _unit_columns(evaluation: Evaluation, size: int, first: int) -> Tensor:
    last = min(first + COLUMNS_AT_ONCE, size)
    columns = evaluation.Py.new_zeros((size, last - first))
    columns[first:last] = torch.eye(last - first, dtype=columns.dtype, device=columns.device)
    return columns
