"""What the scores of predictions say of their rows; what they share with every metric is in test_laws.py."""

import pytest
import torch

from openreml_nn.metrics import IntervalCoverage, IntervalWidth, NegativeLogPredictiveDensity

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
