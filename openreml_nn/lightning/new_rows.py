"""What a fit says of new rows: predictions, and their errors where the response is known."""

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import gaussian_nll_loss
from torchmetrics.functional import mean_squared_error

from openreml_nn.lightning.batches import NewRowsBatch
from openreml_nn.result import FitResult


def predictions(result: FitResult, batch: NewRowsBatch) -> pd.DataFrame:
    """The table of the new rows with ``new_levels``, ``prediction`` and ``std_error`` of Xβ + Zu."""
    predicted = result.predict(batch)
    return pd.concat([batch.table, predicted.set_axis(batch.table.index)], axis=1)


def errors(result: FitResult, batch: NewRowsBatch, y: Tensor) -> dict[str, Tensor]:
    """Errors of predictions of ``y``, shape (m,).

    Returns:
        ``val/rmse``, and ``val/nlpd``, the mean negative log density, where the residual variance of a new row is known
        because it is the same in all rows of the fit.
    """
    predicted = torch.tensor(result.predict(batch).to_numpy()).to(y)
    mean, variance, residual = predicted[:, 0], predicted[:, 1].square(), result.variance_beside(batch.Z)
    values = {"val/rmse": mean_squared_error(mean, y, squared=False)}
    most, minus_least = batch.fitted.ranks.largest(torch.stack([residual.max(), -residual.min()]))
    if torch.allclose(most, -minus_least):
        values["val/nlpd"] = gaussian_nll_loss(mean, y, variance + most, full=True, eps=0.0)
    return values
