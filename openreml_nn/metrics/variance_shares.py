"""R² of Gaussian mixed models and the intraclass correlation, over batches of rows."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from openreml_nn.metrics.base import SummedMetric
from openreml_nn.metrics.functional.variance_shares import (
    conditional_share,
    marginal_share,
    random_share,
    variance_parts,
    variance_sums,
)
from openreml_nn.metrics.moments import merge_moments, no_moments


class VarianceShare(SummedMetric):
    """Base class of R²: shares of the variance of the fixed part, of the random effects and of the residual.

    Args:
        correction: The variance of the fixed part has the divisor n − ``correction``; 1 as in R.
        kwargs: Those of ``torchmetrics.Metric``.
    """

    is_differentiable = True
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    fixed_moments: Tensor
    variance_sums: Tensor

    def __init__(self, correction: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.correction = correction
        self.add_state("fixed_moments", no_moments(1), merge_moments)
        self.add_state("variance_sums", torch.zeros(3, dtype=torch.float64), "sum")

    def update(self, *, fixed: Tensor, random_variance: Tensor | float, residual_variance: Tensor | float) -> None:
        """Add rows, by keywords: a collection with other metrics then cannot take one thing for another.

        Args:
            fixed: Fixed part Xβ̂, or f(x) of a network, of each row, shape (n,).
            random_variance: z'Gz of each row, summed over the random terms, shape (n,), or one number for all.
            residual_variance: Residual variance of each row, shape (n,), or one number for all.

        Raises:
            TypeError: An argument is no real tensor.
            ValueError: Shapes differ, a value is missing or infinite, or a variance is negative.
        """
        packed, sums = variance_parts(type(self).__name__, fixed, random_variance, residual_variance)
        self.fixed_moments = merge_moments(torch.stack([self.fixed_moments, packed]))
        self.variance_sums = self.variance_sums + sums

    def compute(self) -> Tensor:
        """The share of all rows, a number; NaN where they are not more than ``correction``.

        Raises:
            ValueError: There was no update.
        """
        self.require_updates(self.variance_sums[0])
        return self.share(self.fixed_moments, self.variance_sums)

    @abstractmethod
    def share(self, packed: Tensor, sums: Tensor) -> Tensor:
        """The share, from the moments of the fixed part and the sums of the variances."""


class MarginalR2(VarianceShare):
    """Share of the fixed effects in the variance of the observations; see `functional.marginal_r2`.

    Example:
        >>> import torch
        >>> metric = MarginalR2()
        >>> metric.update(fixed=torch.tensor([1.0, 2.0]), random_variance=1.0, residual_variance=2.0)
        >>> metric.update(fixed=torch.tensor([3.0]), random_variance=1.0, residual_variance=2.0)
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def share(self, packed: Tensor, sums: Tensor) -> Tensor:
        return marginal_share(packed, sums, self.correction)


class ConditionalR2(VarianceShare):
    """Share of fixed and random effects in the variance of the observations; see `functional.conditional_r2`."""

    def share(self, packed: Tensor, sums: Tensor) -> Tensor:
        return conditional_share(packed, sums, self.correction)


class IntraclassCorrelation(SummedMetric):
    """Adjusted intraclass correlation, the share of the random effects beside the fixed ones.

    See `functional.intraclass_correlation`. The unadjusted one is ``ConditionalR2() - MarginalR2()``, also a metric;
    `VarianceRatio` gives standard errors.
    """

    is_differentiable = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    random_and_residual: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("random_and_residual", torch.zeros(3, dtype=torch.float64), "sum")

    def update(self, *, random_variance: Tensor | float, residual_variance: Tensor | float) -> None:
        """Add rows, by keywords; two numbers count as one row.

        Args:
            random_variance: z'Gz of each row, summed over the random terms, shape (n,), or one number for all.
            residual_variance: Residual variance of each row, shape (n,), or one number for all.

        Raises:
            TypeError: An argument is neither a real tensor nor a number.
            ValueError: Shapes differ, a value is missing or infinite, or a variance is negative.
        """
        sums = variance_sums(type(self).__name__, random_variance, residual_variance)
        self.random_and_residual = self.random_and_residual + sums.to(self.random_and_residual.device)

    def compute(self) -> Tensor:
        """σ_r² / (σ_r² + σ_e²) of all rows, a number; NaN where both are 0.

        Raises:
            ValueError: There was no update.
        """
        self.require_updates(self.random_and_residual[0])
        return random_share(self.random_and_residual)
