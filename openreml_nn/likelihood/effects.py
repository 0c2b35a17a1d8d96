"""Estimates of fixed effects (BLUE) and predictions of random effects (BLUP), on an evaluation."""

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.solvers import Evaluation, RandomTerm, random_terms
from openreml_nn.solvers.base import columns_at_once


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
    with torch.no_grad():
        return term.G.matmul(term.G_params, evaluation.ZtPy(term)[:, None])[:, 0]


def prediction_error_variance(evaluation: Evaluation, term: RandomTerm) -> Tensor:
    r"""Diagonal of var(û − u) = G − G Z' P Z G, shape (q,)."""
    with torch.no_grad():
        return term.G.diagonal(term.G_params) - evaluation.explained_variance(term)


def predict(
    evaluation: Evaluation, X: Tensor, Z: dict[str, Matrix], unseen: dict[str, Matrix] | None = None
) -> tuple[Tensor, Tensor]:
    r"""Predictions Xβ̂ + Σ Z û for new rows and their prediction error variances.

    With k = Σ Z G Z' for a new row against the old ones, the variance of the error in x'β + z'u is
    z'Gz − k'Pk + x'Cx − 2 x'C X'V⁻¹k, C the covariance of β̂. A level without records contributes its variance z'Gz;
    so does a level that is not in G at all, through ``unseen``.

    Args:
        evaluation: The fitted model.
        X: Fixed-effects design of the new rows, kept columns only, shape (m, p).
        Z: Design of the new rows for each random term by name, with the columns of the fitted one; where several
            processes share the rows of the fit, each has all new rows, with zeros for levels that its V does not have.
        unseen: The same for rows whose level is not in G, at a level of the same variance; zeros in all other rows.

    Returns:
        (prediction, variance), each of shape (m,).
    """
    with torch.no_grad():
        mean = X @ beta(evaluation)
        XC = X @ beta_cov(evaluation)
        variance = (XC * X).sum(1)
        empty, ranks = mean.new_zeros(0), evaluation.problem.ranks
        known = []
        for term in random_terms(evaluation.problem.V, evaluation.theta.detach()):
            if term.name in Z:
                known.append((term, Z[term.name]))
                part = Z[term.name].matmul(empty, blup(evaluation, term)[:, None])[:, 0]
                mean = mean + ranks.sum_if_own(term.name, part)
            if term.name in (unseen or {}):
                variance = variance + unseen[term.name].sandwich_diagonal(empty, term.G, term.G_params)  # type: ignore
        for rows in torch.arange(len(X), device=mean.device).split(columns_at_once(evaluation.problem.n)):
            variance[rows] += _variance_by_effects(evaluation, known, rows, XC[rows])
        return mean, variance


def _variance_by_effects(
    evaluation: Evaluation, known: list[tuple[RandomTerm, Matrix]], rows: Tensor, XC: Tensor
) -> Tensor:
    """z'Gz − k'Pk − 2 x'C X'V⁻¹k for some of the new rows, shape (len(rows),)."""
    own, empty, ranks = XC.new_zeros(len(rows)), XC.new_zeros(0), evaluation.problem.ranks
    k = XC.new_zeros((evaluation.problem.n_here, len(rows)))
    for term, new in known:
        z = new.entries(empty, rows[:, None], torch.arange(new.shape[1], device=rows.device)).mT
        Gz = term.G.matmul(term.G_params, z)
        own += ranks.sum_if_own(term.name, (z * Gz).sum(0))
        k += term.Z.matmul(term.Z_params, Gz)
    fixed = evaluation.problem.fixed
    XtVik = fixed.R.mT @ ranks.sum(fixed.U.mT @ evaluation.solve(k))
    return own - evaluation.inner_diagonal(k) - 2.0 * (XC * XtVik.mT).sum(1)
