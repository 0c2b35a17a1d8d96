"""Metrics of mixed models for torchmetrics, each also a function in `functional` (an index).

In a ``torchmetrics.MetricCollection`` those of predictions take ``(preds, target, variance, known)``, by position or
by name, and beside other metrics by name; those of other things take keywords alone, so that none is given the wrong
thing.
"""

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
