"""Scores of predicted distributions: each row has a predicted mean and a variance, and the prediction is Gaussian.

The variance is that of the observation to come: what `openreml_nn.likelihood.predict` gives for x'β + z'u, plus the
residual variance.
"""

import math
from statistics import NormalDist

from torch import Tensor

from openreml_nn.metrics.functional.checks import checked_rows


def negative_log_predictive_density(preds: Tensor, target: Tensor, variance: Tensor | float) -> Tensor:
    r"""Mean of −log p(y) = ½ [log(2π v) + (y − m)² / v] over rows, the lower the better.

    Args:
        preds: Predicted means m, shape (n,) or any other.
        target: Observations y, of the same shape.
        variance: Variances v of the observations about their predictions, of the same shape, or one number for all.

    Returns:
        A number, shape ().

    Raises:
        TypeError: An argument is no real tensor.
        ValueError: Shapes differ, a value is missing or infinite, or a variance is not greater than 0.

    Source: Good (1952), Journal of the Royal Statistical Society B 14, 107-114; Gneiting & Raftery (2007), Journal of
    the American Statistical Association 102, 359-378.

    Example:
        >>> import torch
        >>> negative_log_predictive_density(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), 1.0)
        tensor(1.1689, dtype=torch.float64)
    """
    return log_density_losses("negative_log_predictive_density", preds, target, variance).mean()


def interval_coverage(preds: Tensor, target: Tensor, variance: Tensor | float, level: float = 0.95) -> Tensor:
    r"""Share of rows with y within the prediction interval m ± z √v, z the normal quantile of (1 + level) / 2.

    Args:
        preds: Predicted means m, shape (n,) or any other.
        target: Observations y, of the same shape.
        variance: Variances v of the observations about their predictions, of the same shape, or one number for all.
        level: Nominal coverage, between 0 and 1.

    Returns:
        A number between 0 and 1, shape (); it is about ``level`` where variances are right.

    Raises:
        TypeError: An argument is no real tensor.
        ValueError: Shapes differ, a value is missing or infinite, a variance is negative, or ``level`` is not between
            0 and 1.

    Example:
        >>> import torch
        >>> interval_coverage(torch.zeros(4), torch.tensor([-3.0, -1.0, 0.0, 1.5]), 1.0)
        tensor(0.7500, dtype=torch.float64)
    """
    return covered_rows("interval_coverage", preds, target, variance, level).mean()


def interval_width(variance: Tensor, level: float = 0.95) -> Tensor:
    r"""Mean width 2 z √v of prediction intervals over rows: of two with the same coverage the narrower is better.

    Args:
        variance: Variances v of the observations about their predictions, shape (n,) or any other.
        level: Nominal coverage, between 0 and 1.

    Raises:
        TypeError: ``variance`` is no real tensor.
        ValueError: A variance is negative, missing or infinite, or ``level`` is not between 0 and 1.

    Example:
        >>> import torch
        >>> interval_width(torch.tensor([1.0, 4.0]))
        tensor(5.8799, dtype=torch.float64)
    """
    quantile = normal_quantile("interval_width", level)
    return 2.0 * quantile * deviations("interval_width", variance).mean()


def normal_quantile(call: str, level: float) -> float:
    """z with a standard normal variable between −z and z with probability ``level``."""
    if not 0.0 < level < 1.0 or not math.isfinite(level):
        raise ValueError(f"`{call}` needs a `level` between 0 and 1, such as 0.95, got {level}.")
    return NormalDist().inv_cdf(0.5 + 0.5 * level)


def log_density_losses(call: str, preds: Tensor, target: Tensor, variance: Tensor | float) -> Tensor:
    """−log p(y) of each row, shape (n,)."""
    m, y, v = checked_rows(
        call, numbers=("variance",), positive=("variance",), preds=preds, target=target, variance=variance
    )
    return 0.5 * ((2.0 * math.pi * v).log() + (y - m).square() / v)


def covered_rows(call: str, preds: Tensor, target: Tensor, variance: Tensor | float, level: float) -> Tensor:
    """1 for each row that is in its prediction interval, else 0, shape (n,)."""
    quantile = normal_quantile(call, level)
    m, y, v = checked_rows(
        call, numbers=("variance",), nonnegative=("variance",), preds=preds, target=target, variance=variance
    )
    return ((y - m).abs() <= quantile * v.sqrt()).to(v.dtype)


def deviations(call: str, variance: Tensor) -> Tensor:
    """√v of each row, shape (n,)."""
    (v,) = checked_rows(call, nonnegative=("variance",), variance=variance)
    return v.sqrt()
