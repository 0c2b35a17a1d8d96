"""What the scores of predictions say of their rows; what they share with every metric is in test_laws.py."""

import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.regression import MeanSquaredError

from openreml_nn.metrics import (
    IntervalCoverage,
    IntervalWidth,
    IntraclassCorrelation,
    MarginalR2,
    NegativeLogLikelihoodPerRow,
    NegativeLogPredictiveDensity,
)

ONE = torch.ones(4)
KNOWN = torch.tensor([True, True, False, True])


def test_rows_that_nothing_is_said_of_count_only_in_all() -> None:
    every, known, new = (IntervalCoverage(rows=rows) for rows in ("all", "known", "new"))  # type: ignore[arg-type]
    for metric in (every, known, new):
        metric.update(ONE, torch.tensor([1.0, 9.0, 1.0, 9.0]), 1.0, KNOWN)
    every.update(ONE, ONE, 1.0)
    assert [float(metric.compute()) for metric in (every, known, new)] == [6 / 8, 1 / 3, 1.0]


def test_no_rows_of_a_kind() -> None:
    metric = NegativeLogPredictiveDensity(rows="new")
    metric.update(ONE, ONE, 1.0, torch.ones(4, dtype=torch.bool))
    assert metric.compute().isnan()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="takes rows='all', 'known' or 'new', got 'old'"):
        IntervalWidth(rows="old")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a `level` between 0 and 1"):
        IntervalCoverage(level=95)
    metric = IntervalCoverage(rows="new")
    with pytest.raises(ValueError, match=r"`IntervalCoverage\(rows='new'\)` needs the mask `known`"):
        metric.update(ONE, ONE, 1.0)
    with pytest.raises(TypeError, match="needs a tensor of truth values as `known`"):
        metric.update(ONE, ONE, 1.0, ONE)
    with pytest.raises(ValueError, match=r"got shape \(2, 2\) for rows of shape \(4,\)"):
        metric.update(ONE, ONE, 1.0, KNOWN.reshape(2, 2))
    with pytest.raises(ValueError, match="`NegativeLogPredictiveDensity` needs variances greater than 0"):
        NegativeLogPredictiveDensity().update(ONE, ONE, 0.0)


def test_positional_arguments_in_a_collection() -> None:
    """Scores of predictions have one signature; a metric of other things refuses their arguments."""
    scores = {"density": NegativeLogPredictiveDensity(), "coverage": IntervalCoverage(), "width": IntervalWidth()}
    preds, target, known = torch.zeros(4), torch.tensor([-3.0, -1.0, 0.0, 1.5]), torch.tensor([True, True, False, True])
    by_position, by_name = MetricCollection(scores).clone(), MetricCollection(scores).clone()
    for variance in (torch.full((4,), 4.0), 4.0):
        by_position.reset()
        by_name.reset()
        by_position.update(preds, target, variance, known)
        by_name.update(preds=preds, target=target, variance=variance, known=known)
        assert by_position.compute() == by_name.compute()
    assert by_name.compute()["width"].item() == pytest.approx(2 * 1.959964 * 2.0)
    for metric in (MarginalR2(), IntraclassCorrelation(), NegativeLogLikelihoodPerRow()):
        with pytest.raises(TypeError, match="positional argument"):
            MetricCollection([metric, MeanSquaredError()]).update(preds, target)
    with pytest.raises(TypeError, match="needs the variances by name"):
        IntervalWidth().update(preds)
