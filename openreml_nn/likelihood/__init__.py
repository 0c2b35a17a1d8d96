"""The formulas of mixed models, each once, on an evaluation (an index)."""

from openreml_nn.likelihood.effects import (
    beta,
    beta_cov,
    blup,
    predict,
    prediction_error_variance,
)
from openreml_nn.likelihood.gaussian import full_loglik, restricted_loglik
from openreml_nn.likelihood.information import average_information, fisher_information, observed_information

__all__ = [
    "average_information",
    "beta",
    "beta_cov",
    "blup",
    "fisher_information",
    "full_loglik",
    "observed_information",
    "predict",
    "prediction_error_variance",
    "restricted_loglik",
]
