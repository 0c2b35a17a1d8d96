"""Functions of estimates and their standard errors by the delta method: heritability, repeatability, any other."""

from collections.abc import Callable, Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from openreml_nn.metrics.functional.checks import array_as_float64

ROUNDING = 1e-10  # of the sum of absolute terms: a variance more negative than this is no rounding error


def delta_method(
    function: Callable[[Tensor], Tensor], estimates: Tensor | ArrayLike, covariance: Tensor | ArrayLike
) -> tuple[Tensor, Tensor]:
    r"""Value g(θ̂) of a differentiable function of estimates and its standard error √(J C J'), J = ∂g/∂θ at θ̂.

    Args:
        function: From a tensor of shape (k,) to a tensor of any shape, differentiable by PyTorch.
        estimates: θ̂, shape (k,); a tensor, or an array, Series or list.
        covariance: Covariance C of the estimates, shape (k, k). A parameter whose variance is NaN or 0, as of one that
            is fixed or on a boundary in ``FitResult.theta_cov``, is taken as known.

    Returns:
        (value, standard error), in float64 and in the shape of the function's value. The standard error is NaN where
        the value depends on known parameters only.

    Raises:
        TypeError: An argument is no tensor and no array of real numbers.
        ValueError: Shapes do not fit, an estimate is not finite, or ``covariance`` is no covariance matrix.

    Source: Oehlert (1992), The American Statistician 46, 27-29.

    Example:
        >>> import torch
        >>> estimates = torch.tensor([1764.05, 2451.25])
        >>> covariance = torch.tensor([[2052776.0, -100143.8], [-100143.8, 500718.9]])
        >>> delta_method(lambda s: s[0] / (s[0] + s[1]), estimates, covariance)
        (tensor(0.4185, dtype=torch.float64), tensor(0.2162, dtype=torch.float64))
    """
    value, C = delta_covariance(function, estimates, covariance)
    return value, C.diagonal().sqrt().reshape(value.shape)


def delta_covariance(
    function: Callable[[Tensor], Tensor], estimates: Tensor | ArrayLike, covariance: Tensor | ArrayLike
) -> tuple[Tensor, Tensor]:
    r"""Value g(θ̂), of m elements, and their covariance J C J', shape (m, m), as `delta_method` has them.

    Rows and columns of an element that depends on known parameters only are NaN, so that the result can be the input
    of another function. ``delta_covariance(V.natural, result.theta, result.theta_cov)`` gives the variance parameters
    of a fit on their natural scale.

    Args:
        function: From a tensor of shape (k,) to a tensor of m elements, differentiable by PyTorch.
        estimates: θ̂, shape (k,); a tensor, or an array, Series or list.
        covariance: Covariance C of the estimates, shape (k, k), with NaN or 0 for parameters that are taken as known.

    Returns:
        (value, covariance): g(θ̂) in its shape, and J C J', shape (m, m), both in float64.

    Raises:
        TypeError: An argument is no tensor and no array of real numbers.
        ValueError: Shapes do not fit, an estimate is not finite, or ``covariance`` is no covariance matrix.

    Example:
        >>> import torch
        >>> delta_covariance(torch.exp, torch.zeros(2), torch.tensor([[0.04, 0.01], [0.01, 0.09]]))[1]
        tensor([[0.0400, 0.0100],
                [0.0100, 0.0900]], dtype=torch.float64)
    """
    theta, C = checked_estimates("delta_method", estimates, covariance)
    with torch.inference_mode(False):  # metrics compute in inference mode, where nothing can be differentiated
        theta = theta.detach().clone()
        J, value = torch.func.jacrev(lambda at: (function(at),) * 2, has_aux=True)(theta)
    J = J.reshape(-1, len(theta))
    own = J @ C @ J.mT
    variances = own.diagonal()
    terms = ((J.abs() @ C.abs()) * J.abs()).sum(1)
    if bool((variances < -ROUNDING * terms).any()):
        raise ValueError("`delta_method` needs a covariance matrix, got one that gives the value a negative variance.")
    known = (J[:, C.diagonal() > 0] == 0).all(1)
    own = own.diagonal_scatter(variances.clamp(min=0))
    return value.detach(), torch.where(known[:, None] | known, torch.nan, own)


def variance_ratio(
    estimates: Tensor | ArrayLike, numerator: Sequence[float] | Tensor, denominator: Sequence[float] | Tensor
) -> Tensor:
    r"""Ratio a'σ / b'σ of linear combinations of variance components σ: heritability, repeatability.

    With σ = (σ_g², σ_b², σ_e²) of genotypes, blocks and residual in r replicates, a = (1, 0, 0) with b = (1, 0, 1) is
    the heritability of a plot and with b = (1, 0, 1/r) that of an entry mean; a = (1, 1, 0) with b = (1, 1, 1) is the
    adjusted intraclass correlation. Covariances may be among σ: with the variance of an intercept, its covariance with
    a slope on x, the variance of the slope and that of the residual, a = (1, 2 mean(x), mean(x²), 0).

    Args:
        estimates: σ̂, shape (..., k); a tensor, or an array, Series or list.
        numerator: a, of length k.
        denominator: b, of length k.

    Returns:
        Shape (...), in float64. Its standard error: ``delta_method(lambda s: variance_ratio(s, a, b), estimates, C)``.

    Raises:
        TypeError: ``estimates`` is no tensor and no array of real numbers.
        ValueError: Lengths differ, or b'σ is not greater than 0.

    Source: Falconer & Mackay (1996), Introduction to Quantitative Genetics, 4th ed., ch. 8 and 10.

    Example:
        >>> import torch
        >>> variance_ratio(torch.tensor([0.142902, 0.070218, 0.081617]), [1, 0, 0], [1, 0, 1 / 3])
        tensor(0.8401, dtype=torch.float64)
    """
    sigma = array_as_float64("variance_ratio", "estimates", estimates)
    if not sigma.ndim or not len(numerator) == len(denominator) == sigma.shape[-1]:
        raise ValueError(
            f"`variance_ratio` needs a weight for each estimate, got {len(numerator)} in the numerator and "
            f"{len(denominator)} in the denominator for estimates of shape {tuple(sigma.shape)}."
        )
    a, b = (torch.as_tensor(weights, dtype=sigma.dtype, device=sigma.device) for weights in (numerator, denominator))
    below = sigma @ b
    if not bool((below > 0).all()):
        raise ValueError(
            f"`variance_ratio` needs a denominator greater than 0, got {float(below.detach().min())} with the weights "
            f"{b.tolist()}."
        )
    return (sigma @ a) / below


def checked_estimates(
    call: str, estimates: Tensor | ArrayLike, covariance: Tensor | ArrayLike | None
) -> tuple[Tensor, Tensor]:
    """Estimates and their covariance in float64, with zeros for parameters that are taken as known.

    Raises:
        TypeError: An argument is no tensor and no array of real numbers.
        ValueError: Shapes do not fit, an estimate is not finite, or ``covariance`` is no covariance matrix.
    """
    theta = array_as_float64(call, "estimates", estimates)
    k = len(theta) if theta.ndim == 1 else 0
    given = theta.new_zeros(k, k) if covariance is None else covariance
    C = array_as_float64(call, "covariance", given).to(theta.device)
    if k == 0 or C.shape != (k, k):
        raise ValueError(
            f"`{call}` needs estimates of shape (k,) and their covariance of shape (k, k), got shapes "
            f"{tuple(theta.shape)} and {tuple(C.shape)}."
        )
    if not bool(torch.isfinite(theta).all()):
        raise ValueError(f"`{call}` needs finite estimates, got {theta.tolist()}.")
    estimated = ~(C.diagonal().isnan() | (C.diagonal() == 0))
    C = torch.where(estimated[:, None] & estimated, C, 0.0)
    lopsided = (C - C.mT).abs().max() > 1e-6 * C.abs().max()
    if not bool(torch.isfinite(C).all()) or bool(lopsided | (C.diagonal() < 0).any()):
        raise ValueError(f"`{call}` needs a symmetric covariance with variances of at least 0, got {C.tolist()}.")
    return theta, C
