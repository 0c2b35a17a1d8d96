"""Functions of variance estimates with standard errors, over one fit or several."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from openreml_nn.metrics.base import SummedMetric
from openreml_nn.metrics.functional.estimates import checked_estimates, delta_method, variance_ratio
from openreml_nn.metrics.functional.heritability import cullis_heritability
from openreml_nn.metrics.moments import merge_moments, moments, no_moments, split_moments


class PooledEstimates(SummedMetric):
    r"""Base class of a function of the estimates of a fit, or of the pooled estimates of several.

    One update is one fit. After one update since the last reset, as at the end of an epoch of a fit, the value is
    g(θ̂) with its standard error by the delta method. After m > 1 updates, as from m imputed data sets, θ̂ is their mean
    and its covariance T = W + (1 + 1/m) B, W the mean of their covariances and B the covariance between them: equal
    fits give what one of them gives.

    Source: Rubin (1987), Multiple Imputation for Nonresponse in Surveys, ch. 3.

    Args:
        size: Number of estimates k.
        standard_error: `compute` gives the standard error in place of the value. A second metric with it shares the
            state of the first in a ``torchmetrics.MetricCollection``.
        kwargs: Those of ``torchmetrics.Metric``.
    """

    estimate_moments: Tensor
    covariance_sum: Tensor

    def __init__(self, size: int, standard_error: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if size < 1:
            raise ValueError(f"`{type(self).__name__}` needs at least one estimate, got {size}.")
        self.standard_error = standard_error
        self.add_state("estimate_moments", no_moments(size), merge_moments)
        self.add_state("covariance_sum", torch.zeros(size, size, dtype=torch.float64), "sum")

    def update(self, estimates: Tensor | ArrayLike, covariance: Tensor | ArrayLike | None = None) -> None:
        """Add a fit, ``metric.update(result.variance["estimate"], result.variance_cov)``.

        Args:
            estimates: θ̂, shape (k,); a tensor, or an array, Series or list.
            covariance: Its covariance, shape (k, k), with NaN or 0 for parameters that are taken as known. Without it
                there is a standard error only from differences between fits.

        Raises:
            TypeError: An argument is no tensor and no array of real numbers.
            ValueError: Shapes do not fit, an estimate is not finite, or ``covariance`` is no covariance matrix.
        """
        given = checked_estimates(type(self).__name__, estimates, covariance)
        theta, C = (values.to(self.covariance_sum.device) for values in given)
        if C.shape != self.covariance_sum.shape:
            raise ValueError(f"`{type(self).__name__}` needs {len(self.covariance_sum)} estimates, got {len(theta)}.")
        self.estimate_moments = merge_moments(torch.stack([self.estimate_moments, moments(theta[None])]))
        self.covariance_sum = self.covariance_sum + C

    def compute(self) -> Tensor:
        """g(θ̂), or its standard error, in the shape of g's value.

        Raises:
            ValueError: There was no update.
        """
        m, theta, deviations = split_moments(self.estimate_moments)
        self.require_updates(m)
        if not self.standard_error:
            return self.quantity(theta)
        within = self.covariance_sum / m
        between = deviations / (m - 1.0).clamp(min=1.0)
        return delta_method(self.quantity, theta, within + (1.0 + 1.0 / m) * between)[1]

    @abstractmethod
    def quantity(self, estimates: Tensor) -> Tensor:
        """g, a function of estimates of shape (k,) that PyTorch can differentiate."""


class VarianceRatio(PooledEstimates):
    """Heritability, repeatability or another ratio of variance components; see `functional.variance_ratio`.

    Args:
        numerator: Weights a of the components, of length k.
        denominator: Weights b, of length k.
        standard_error: `compute` gives the standard error in place of the value.
        kwargs: Those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = VarianceRatio(numerator=[1, 0], denominator=[1, 1])
        >>> metric.update(torch.tensor([1764.05, 2451.25]))
        >>> metric.compute()
        tensor(0.4185, dtype=torch.float64)
    """

    is_differentiable = True

    def __init__(
        self, numerator: Sequence[float], denominator: Sequence[float], standard_error: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(len(numerator), standard_error, **kwargs)
        if len(numerator) != len(denominator):
            raise ValueError(
                f"`VarianceRatio` needs numerator and denominator of one length, got {len(numerator)} and "
                f"{len(denominator)} weights."
            )
        self.numerator, self.denominator = list(map(float, numerator)), list(map(float, denominator))

    def quantity(self, estimates: Tensor) -> Tensor:
        return variance_ratio(estimates, self.numerator, self.denominator)


class FunctionOfEstimates(PooledEstimates):
    """Any differentiable function of estimates; see `functional.delta_method`.

    Args:
        function: From a tensor of shape (k,) to a tensor; one of a module, not a lambda, where the metric is pickled.
        size: Number of estimates k.
        standard_error: `compute` gives the standard error in place of the value.
        kwargs: Those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = FunctionOfEstimates(torch.exp, size=1, standard_error=True)
        >>> metric.update(torch.tensor([0.0]), torch.tensor([[0.04]]))
        >>> metric.compute()
        tensor(0.2000, dtype=torch.float64)
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], size: int, standard_error: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(size, standard_error, **kwargs)
        self.function = function

    def quantity(self, estimates: Tensor) -> Tensor:
        return self.function(estimates)


class CullisHeritability(SummedMetric):
    """Heritability of a trial, balanced or not, its mean over trials; see `functional.cullis_heritability`.

    Example:
        >>> metric = CullisHeritability()
        >>> metric.update(difference_variance=0.0545504, genetic_variance=0.142902)
        >>> metric.compute()
        tensor(0.8091, dtype=torch.float64)
    """

    higher_is_better = True
    is_differentiable = True
    plot_upper_bound = 1.0
    heritability_sum: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("heritability_sum", torch.zeros(2, dtype=torch.float64), "sum")

    def update(self, difference_variance: Tensor | float, genetic_variance: Tensor | float) -> None:
        """Add a trial.

        Args:
            difference_variance: v̄, the mean variance of the prediction error of u_i − u_j.
            genetic_variance: σ_g².

        Raises:
            TypeError: An argument is neither a real tensor nor a number.
            ValueError: v̄ is negative, σ_g² is not greater than 0, or one of them is not a single number.
        """
        h2 = cullis_heritability(difference_variance, genetic_variance).to(self.heritability_sum.device)
        self.heritability_sum = self.heritability_sum + torch.stack([torch.ones_like(h2), h2])

    def compute(self) -> Tensor:
        """The mean heritability, a number.

        Raises:
            ValueError: There was no update.
        """
        self.require_updates(self.heritability_sum[0])
        return self.heritability_sum[1] / self.heritability_sum[0]
