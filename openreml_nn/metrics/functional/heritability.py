"""Heritability of a trial that need not be balanced, from the mean variance of a difference between genotypes."""

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from openreml_nn.likelihood import prediction_error_variance
from openreml_nn.metrics.functional.checks import array_as_float64, as_float64
from openreml_nn.solvers import Evaluation, RandomTerm


def cullis_heritability(difference_variance: Tensor | float, genetic_variance: Tensor | float) -> Tensor:
    r"""Heritability 1 − v̄ / (2 σ_g²) of a trial, balanced or not, v̄ the mean variance of a difference of two BLUPs.

    Genotypes are independent with variance σ_g². Where they are related, half the mean variance of a difference of
    their true values, ``mean_difference_variance(G) / 2``, stands in place of σ_g²: the average semivariance of Piepho
    (2019), Biometrical Journal 61, 860-872.

    Args:
        difference_variance: v̄, the mean variance of the prediction error of u_i − u_j: `blup_difference_variance` of
            a fit, or `mean_difference_variance` of the prediction error covariance.
        genetic_variance: σ_g².

    Returns:
        A number, shape (), at most 1.

    Raises:
        TypeError: An argument is neither a real tensor nor a number.
        ValueError: v̄ is negative, σ_g² is not greater than 0, or one of them is not a single number.

    Source: Cullis, Smith & Coombes (2006), Journal of Agricultural, Biological, and Environmental Statistics 11,
    381-393.

    Example:
        >>> cullis_heritability(0.0545504, 0.142902)
        tensor(0.8091, dtype=torch.float64)
    """
    v = as_float64("cullis_heritability", "difference_variance", difference_variance, number=True)
    sigma2 = as_float64("cullis_heritability", "genetic_variance", genetic_variance, number=True)
    if v.ndim or sigma2.ndim or not bool(v >= 0) or not bool(sigma2 > 0):
        raise ValueError(
            f"`cullis_heritability` needs a variance of a difference of at least 0 and a genetic variance greater than "
            f"0, got {v.tolist()} and {sigma2.tolist()}."
        )
    return 1.0 - v / (2.0 * sigma2)


def mean_difference_variance(covariance: Tensor | ArrayLike) -> Tensor:
    r"""Mean variance of a difference, 2 (tr C − 1'C1 / q) / (q − 1): of C_ii + C_jj − 2 C_ij over all pairs.

    Args:
        covariance: C, such as the prediction error covariance of BLUPs or the covariance of adjusted means, (q, q).

    Raises:
        TypeError: ``covariance`` is no tensor and no array of real numbers.
        ValueError: It is not square, has fewer than two rows, or is not finite.

    Example:
        >>> import torch
        >>> mean_difference_variance(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        tensor(2., dtype=torch.float64)
    """
    C = array_as_float64("mean_difference_variance", "covariance", covariance)
    if C.ndim != 2 or C.shape[0] != C.shape[1] or len(C) < 2 or not bool(torch.isfinite(C).all()):
        raise ValueError(
            f"`mean_difference_variance` needs a square matrix of at least 2 rows and finite numbers, got shape "
            f"{tuple(C.shape)}."
        )
    return _mean_over_pairs(C.diagonal().sum(), C.sum(), len(C))


def blup_difference_variance(evaluation: Evaluation, term: RandomTerm) -> Tensor:
    r"""Mean prediction error variance of û_i − û_j over all pairs of levels of a term, without the (q, q) matrix.

    With C = G − G Z'PZ G it is 2 (tr C − 1'C1 / q) / (q − 1); tr C is the sum of the prediction error variances, and
    1'C1 = 1'G1 − (ZG1)'P(ZG1) is one product with P.

    Args:
        evaluation: The fitted model, ``FitResult.evaluation``.
        term: One of `openreml_nn.solvers.random_terms`, with one effect for each level.

    Raises:
        ValueError: The term has fewer than two levels.
    """
    q = term.G.shape[0]
    if q < 2:
        raise ValueError(f"`blup_difference_variance` needs a term of at least 2 levels, got {q} in {term.name!r}.")
    with torch.no_grad():
        G1 = term.G.matmul(term.G_params, evaluation.theta.new_ones((q, 1)))
        explained = evaluation.inner_diagonal(term.Z.matmul(term.Z_params, G1))[0]
        return _mean_over_pairs(prediction_error_variance(evaluation, term).sum(), G1.sum() - explained, q)


def _mean_over_pairs(trace: Tensor, total: Tensor, q: int) -> Tensor:
    return 2.0 * (trace - total / q) / (q - 1)
