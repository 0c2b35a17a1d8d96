"""The marginal likelihood of data in independent clusters, over batches of clusters."""

from typing import Any

import torch
from torch import Tensor

from openreml_nn.metrics.base import SummedMetric
from openreml_nn.metrics.functional.likelihood import loglik_sums


class NegativeLogLikelihoodPerRow(SummedMetric):
    """Marginal negative log-likelihood of a row, Σ −ℓ / Σ n; see `functional.negative_loglik_per_row`.

    Example:
        >>> import torch
        >>> metric = NegativeLogLikelihoodPerRow()
        >>> metric.update(torch.tensor(12.0), rows=3)
        >>> metric.update(torch.tensor(20.0), rows=5)
        >>> metric.compute()
        tensor(4., dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    loss_and_rows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("loss_and_rows", torch.zeros(2, dtype=torch.float64), "sum")

    def update(self, loss: Tensor, *, rows: Tensor | int) -> None:
        """Add clusters.

        Args:
            loss: −ℓ of a cluster or of a batch of independent clusters, with its constants, of any shape; of a
                `MixedModelHead`, whose loss is per row, ``loss * len(y)``.
            rows: Number of rows of each, of the same shape, or the total of all.

        Raises:
            TypeError: ``loss`` is no real tensor, or ``rows`` is not of whole numbers.
            ValueError: Shapes differ, a loss is not finite, or a number of rows is negative.
        """
        self.loss_and_rows = self.loss_and_rows + loglik_sums(type(self).__name__, loss, rows)

    def compute(self) -> Tensor:
        """Σ −ℓ / Σ n, a number.

        Raises:
            ValueError: There was no update.
        """
        self.require_updates(self.loss_and_rows[1])
        return self.loss_and_rows[0] / self.loss_and_rows[1]
