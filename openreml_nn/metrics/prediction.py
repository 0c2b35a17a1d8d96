"""Scores of predicted distributions over batches of rows, of all rows or of those of known or of new levels."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from openreml_nn.metrics.base import SummedMetric
from openreml_nn.metrics.functional.prediction import (
    covered_rows,
    deviations,
    log_density_losses,
    normal_quantile,
)

ROWS = ("new", "known", "all")


class RowScore(SummedMetric):
    """Base class of means over rows: one sum for rows of new levels, one for known levels, one for unmarked rows.

    Args:
        state: Name of the state.
        rows: Rows that `compute` takes the mean over: ``"all"``, those of ``"known"`` levels, whose random effects
            were predicted, or those of ``"new"`` levels.
        kwargs: Those of ``torchmetrics.Metric``.
    """

    def __init__(self, state: str, rows: Literal["all", "known", "new"] = "all", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if rows not in ROWS:
            raise ValueError(f"`{type(self).__name__}` takes rows='all', 'known' or 'new', got {rows!r}.")
        self.rows, self.state = rows, state
        self.add_state(state, torch.zeros(3, 2, dtype=torch.float64), "sum")

    def add(self, scores: Tensor, known: Tensor | None, shape: torch.Size) -> None:
        """Add scores of shape (n,) to the sums; ``shape`` is that of the rows before they were made flat."""
        self._check(known, shape)
        marks = scores.new_zeros(3, len(scores))
        if known is None:
            marks[2] = 1.0
        else:
            marks[0], marks[1] = ~known.flatten(), known.flatten()
        sums = torch.stack([marks.sum(1), marks @ scores], dim=1)
        setattr(self, self.state, getattr(self, self.state) + sums)

    def _check(self, known: Tensor | None, shape: torch.Size) -> None:
        name = type(self).__name__
        if known is None and self.rows != "all":
            raise ValueError(f"`{name}(rows={self.rows!r})` needs the mask `known` of rows of known levels.")
        if known is None:
            return
        if not isinstance(known, Tensor) or known.dtype != torch.bool:
            raise TypeError(f"`{name}` needs a tensor of truth values as `known`, got {known!r}.")
        if known.shape != shape:
            raise ValueError(
                f"`{name}` needs a truth value in `known` for each row, got shape {tuple(known.shape)} for rows of "
                f"shape {tuple(shape)}."
            )

    def compute(self) -> Tensor:
        """The mean over the rows, a number; NaN where there were rows, but none of these.

        Raises:
            ValueError: There was no update.
        """
        sums = getattr(self, self.state)
        self.require_updates(sums[:, 0].sum())
        count, total = sums.sum(0) if self.rows == "all" else sums[ROWS.index(self.rows)]
        return self.value(total / count)

    def value(self, mean: Tensor) -> Tensor:
        """What `compute` gives for a mean score: the mean itself."""
        return mean


class DistributionScore(RowScore, ABC):
    """Base class of means over rows of a score of the observation in its predicted distribution."""

    @abstractmethod
    def scores(self, preds: Tensor, target: Tensor, variance: Tensor | float) -> Tensor:
        """Score of each row, shape (n,)."""

    def update(self, preds: Tensor, target: Tensor, variance: Tensor | float, known: Tensor | None = None) -> None:
        """Add rows.

        Args:
            preds: Predicted means, shape (n,) or any other.
            target: Observations, of the same shape.
            variance: Variances of the observations about their predictions, of the same shape, or one for all.
            known: Whether the levels of a row are known, of the same shape; needed unless ``rows="all"``.

        Raises:
            TypeError: An argument is no real tensor, or ``known`` not one of truth values.
            ValueError: Shapes differ, a value is missing or infinite, or a variance is negative; for a density, or 0.
        """
        self.add(self.scores(preds, target, variance), known, preds.shape)


class NegativeLogPredictiveDensity(DistributionScore):
    """Mean of −log p(y) over rows; see `functional.negative_log_predictive_density`.

    Args:
        rows: ``"all"`` rows, those of ``"known"`` levels or those of ``"new"`` levels.
        kwargs: Those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = NegativeLogPredictiveDensity(rows="new")
        >>> metric.update(torch.zeros(2), torch.tensor([9.0, 0.0]), 1.0, known=torch.tensor([True, False]))
        >>> metric.compute()
        tensor(0.9189, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False

    def __init__(self, rows: Literal["all", "known", "new"] = "all", **kwargs: Any) -> None:
        super().__init__("log_density_losses", rows, **kwargs)

    def scores(self, preds: Tensor, target: Tensor, variance: Tensor | float) -> Tensor:
        return log_density_losses(type(self).__name__, preds, target, variance)


class IntervalCoverage(DistributionScore):
    """Share of rows in their prediction intervals; see `functional.interval_coverage`.

    Args:
        level: Nominal coverage, between 0 and 1.
        rows: ``"all"`` rows, those of ``"known"`` levels or those of ``"new"`` levels.
        kwargs: Those of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, level: float = 0.95, rows: Literal["all", "known", "new"] = "all", **kwargs: Any) -> None:
        # the level is in the name, so that counts at different levels are neither merged nor shared in a collection
        super().__init__(f"covered_{float(level)}".replace(".", "_"), rows, **kwargs)
        normal_quantile("IntervalCoverage", level)
        self.level = level

    def scores(self, preds: Tensor, target: Tensor, variance: Tensor | float) -> Tensor:
        return covered_rows(type(self).__name__, preds, target, variance, self.level)


class IntervalWidth(RowScore):
    """Mean width of prediction intervals; see `functional.interval_width`.

    Args:
        level: Nominal coverage, between 0 and 1.
        rows: ``"all"`` rows, those of ``"known"`` levels or those of ``"new"`` levels.
        kwargs: Those of ``torchmetrics.Metric``.
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0

    def __init__(self, level: float = 0.95, rows: Literal["all", "known", "new"] = "all", **kwargs: Any) -> None:
        super().__init__("predicted_deviations", rows, **kwargs)
        self.level, self.quantile = level, normal_quantile("IntervalWidth", level)

    def update(
        self,
        preds: Tensor | None = None,
        target: Tensor | None = None,
        variance: Tensor | float | None = None,
        known: Tensor | None = None,
    ) -> None:
        """Add rows; the signature is that of the other scores, so that a collection calls all of them alike.

        Args:
            preds: Predicted means; they count only where ``variance`` is one number for all.
            target: Observations; they do not count.
            variance: Variances of the observations about their predictions, shape (n,) or any other; or one for all.
            known: Whether the levels of a row are known, of the same shape; needed unless ``rows="all"``.

        Raises:
            TypeError: There is no ``variance``, it is no real tensor, or ``known`` not one of truth values.
            ValueError: Shapes differ, or a variance is negative, missing or infinite.
        """
        if variance is None:
            raise TypeError("`IntervalWidth` needs the variances by name, `update(variance=...)`.")
        if preds is not None and not isinstance(variance, Tensor):
            variance = torch.full_like(preds, variance, dtype=torch.float64)
        self.add(deviations("IntervalWidth", variance), known, variance.shape)  # type: ignore[arg-type,union-attr]

    def value(self, mean: Tensor) -> Tensor:
        return 2.0 * self.quantile * mean
