"""What a `MixedModelRegressor` logs of rows with a response."""

import torch
from torchmetrics import MeanSquaredError, Metric, MetricCollection

from openreml_nn.metrics import (
    ConditionalR2,
    IntervalCoverage,
    IntraclassCorrelation,
    MarginalR2,
    NegativeLogPredictiveDensity,
)

VAL_MSE = "val/mse"


def scores(prefix: str, more: bool) -> MetricCollection:
    """The squared error of predictions as ``<prefix>mse``, and, where more is asked for, the scores of a mixed model.

    These are ``nlpd``, the negative log predictive density; ``coverage`` of 95 % intervals; ``r2_marginal`` and
    ``r2_conditional``; and ``icc``, the intraclass correlation. `MixedModelHead.scored` gives what they take.
    """
    found: dict[str, Metric | MetricCollection] = {"mse": MeanSquaredError().set_dtype(torch.float64)}
    if more:
        found |= {
            "nlpd": NegativeLogPredictiveDensity(),
            "coverage": IntervalCoverage(),
            "r2_marginal": MarginalR2(),
            "r2_conditional": ConditionalR2(),
            "icc": IntraclassCorrelation(),
        }
    return MetricCollection(found, prefix=prefix)
