"""Shares of fixed effects, random effects and residual in the variance of the observations of a Gaussian mixed model.

The variance of an observation has three parts: σ_f², the variance of the fixed part over the rows; σ_r², the variance
z'Gz that the random effects give to a row, averaged over the rows, because with random slopes it differs from row to
row; and σ_e², that of the residual.
"""

import torch
from torch import Tensor

from openreml_nn.metrics.functional.checks import checked_rows
from openreml_nn.metrics.moments import moments, split_moments


def marginal_r2(
    fixed: Tensor, random_variance: Tensor | float, residual_variance: Tensor | float, correction: int = 1
) -> Tensor:
    r"""Share σ_f² / (σ_f² + σ_r² + σ_e²) of the fixed effects in the variance of the observations.

    Args:
        fixed: Fixed part Xβ̂, or f(x) of a network, of each row, shape (n,).
        random_variance: z'Gz of each row, summed over the random terms, shape (n,), or one number for all: the sum of
            the variance components where there are only random intercepts. The diagonal of Z G Z'.
        residual_variance: Residual variance of each row, shape (n,), or one number for all.
        correction: σ_f² has the divisor n − ``correction``; 1 as in R.

    Returns:
        A number, shape (); NaN where n is not larger than ``correction``.

    Raises:
        TypeError: An argument is no real tensor.
        ValueError: Shapes differ, a value is missing or infinite, or a variance is negative.

    Source: Nakagawa & Schielzeth (2013), Methods in Ecology and Evolution 4, 133-142; for random slopes Johnson (2014),
    Methods in Ecology and Evolution 5, 944-946.

    Example:
        >>> import torch
        >>> marginal_r2(torch.tensor([1.0, 2.0, 3.0]), random_variance=1.0, residual_variance=2.0)
        tensor(0.2500, dtype=torch.float64)
    """
    packed, sums = variance_parts("marginal_r2", fixed, random_variance, residual_variance)
    return marginal_share(packed, sums, correction)


def conditional_r2(
    fixed: Tensor, random_variance: Tensor | float, residual_variance: Tensor | float, correction: int = 1
) -> Tensor:
    r"""Share (σ_f² + σ_r²) / (σ_f² + σ_r² + σ_e²) of fixed and random effects in the variance of the observations.

    Arguments, errors and sources are those of `marginal_r2`.

    Example:
        >>> import torch
        >>> conditional_r2(torch.tensor([1.0, 2.0, 3.0]), random_variance=1.0, residual_variance=2.0)
        tensor(0.5000, dtype=torch.float64)
    """
    packed, sums = variance_parts("conditional_r2", fixed, random_variance, residual_variance)
    return conditional_share(packed, sums, correction)


def intraclass_correlation(random_variance: Tensor | float, residual_variance: Tensor | float) -> Tensor:
    r"""Adjusted intraclass correlation σ_r² / (σ_r² + σ_e²), the share of the random effects beside the fixed ones.

    For its standard error see `variance_ratio` with `delta_method`.

    Args:
        random_variance: z'Gz of each row, summed over the random terms, shape (n,), or one number for all.
        residual_variance: Residual variance of each row, shape (n,), or one number for all.

    Returns:
        A number, shape (); NaN where both variances are 0.

    Raises:
        TypeError: An argument is neither a real tensor nor a number.
        ValueError: Shapes differ, a value is missing or infinite, or a variance is negative.

    Source: Nakagawa, Johnson & Schielzeth (2017), Journal of the Royal Society Interface 14, 20170213.

    Example:
        >>> intraclass_correlation(1764.05, 2451.25)
        tensor(0.4185, dtype=torch.float64)
    """
    return random_share(variance_sums("intraclass_correlation", random_variance, residual_variance))


def variance_parts(
    call: str, fixed: Tensor, random_variance: Tensor | float, residual_variance: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Moments of the fixed part, and n, Σ z'Gz and Σ σ_e² of some rows: what batches and processes add up."""
    fixed, random, residual = checked_rows(
        call,
        numbers=("random_variance", "residual_variance"),
        nonnegative=("random_variance", "residual_variance"),
        fixed=fixed,
        random_variance=random_variance,
        residual_variance=residual_variance,
    )
    return moments(fixed[:, None]), _sums(random, residual)


def variance_sums(call: str, random_variance: Tensor | float, residual_variance: Tensor | float) -> Tensor:
    """n, Σ z'Gz and Σ σ_e² of some rows; numbers for both are one row."""
    names = ("random_variance", "residual_variance")
    random, residual = checked_rows(
        call, numbers=names, nonnegative=names, random_variance=random_variance, residual_variance=residual_variance
    )
    return _sums(random, residual)


def marginal_share(packed: Tensor, sums: Tensor, correction: int) -> Tensor:
    """σ_f² / (σ_f² + σ_r² + σ_e²) from `variance_parts`."""
    f, r, e = _variances(packed, sums, correction)
    return f / (f + r + e)


def conditional_share(packed: Tensor, sums: Tensor, correction: int) -> Tensor:
    """(σ_f² + σ_r²) / (σ_f² + σ_r² + σ_e²) from `variance_parts`."""
    f, r, e = _variances(packed, sums, correction)
    return (f + r) / (f + r + e)


def random_share(sums: Tensor) -> Tensor:
    """σ_r² / (σ_r² + σ_e²) from `variance_sums`."""
    return sums[1] / (sums[1] + sums[2])


def _sums(random: Tensor, residual: Tensor) -> Tensor:
    return torch.stack([random.new_full((), len(random)), random.sum(), residual.sum()])


def _variances(packed: Tensor, sums: Tensor, correction: int) -> tuple[Tensor, Tensor, Tensor]:
    n, _, deviations = split_moments(packed)
    free = n - correction
    return torch.where(free > 0, deviations[0, 0] / free, torch.nan), sums[1] / n, sums[2] / n
