"""Metrics of mixed models for torchmetrics, each also a function in `functional` (an index)."""

from openreml_nn.metrics import functional
from openreml_nn.metrics.estimates import CullisHeritability, FunctionOfEstimates, VarianceRatio
from openreml_nn.metrics.likelihood import NegativeLogLikelihoodPerRow
from openreml_nn.metrics.prediction import IntervalCoverage, IntervalWidth, NegativeLogPredictiveDensity
from openreml_nn.metrics.variance_shares import ConditionalR2, IntraclassCorrelation, MarginalR2

__all__ = [
    "ConditionalR2",
    "CullisHeritability",
    "FunctionOfEstimates",
    "IntervalCoverage",
    "IntervalWidth",
    "IntraclassCorrelation",
    "MarginalR2",
    "NegativeLogLikelihoodPerRow",
    "NegativeLogPredictiveDensity",
    "VarianceRatio",
    "functional",
]
