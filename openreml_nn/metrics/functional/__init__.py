"""Metrics of mixed models as functions of all rows at once (an index)."""

from openreml_nn.metrics.functional.estimates import delta_covariance, delta_method, variance_ratio
from openreml_nn.metrics.functional.heritability import (
    blup_difference_variance,
    cullis_heritability,
    mean_difference_variance,
)
from openreml_nn.metrics.functional.likelihood import negative_loglik_per_row
from openreml_nn.metrics.functional.prediction import (
    interval_coverage,
    interval_width,
    negative_log_predictive_density,
)
from openreml_nn.metrics.functional.variance_shares import conditional_r2, intraclass_correlation, marginal_r2

__all__ = [
    "blup_difference_variance",
    "conditional_r2",
    "cullis_heritability",
    "delta_covariance",
    "delta_method",
    "interval_coverage",
    "interval_width",
    "intraclass_correlation",
    "marginal_r2",
    "mean_difference_variance",
    "negative_log_predictive_density",
    "negative_loglik_per_row",
    "variance_ratio",
]
