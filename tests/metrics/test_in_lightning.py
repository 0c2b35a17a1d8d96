"""Metrics logged by a LightningModule, over several batches of an epoch."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from openreml_nn.metrics import (
    IntervalCoverage,
    MarginalR2,
    NegativeLogLikelihoodPerRow,
    NegativeLogPredictiveDensity,
    VarianceRatio,
)
from openreml_nn.metrics.functional import marginal_r2, negative_log_predictive_density

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
X, Y = torch.randn(25, 3, generator=torch.Generator().manual_seed(1)), torch.linspace(-2.0, 2.0, 25)


class Regression(L.LightningModule):
    """y ~ N(x'w, v), with metrics that are logged by themselves and in a collection."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Linear(3, 1)
        self.r2, self.likelihood = MarginalR2(), NegativeLogLikelihoodPerRow()
        self.ratio = VarianceRatio([1, 0], [1, 1], standard_error=True)
        self.scores = MetricCollection(
            {"nlpd": NegativeLogPredictiveDensity(), "new": NegativeLogPredictiveDensity(rows="new"),
             "coverage": IntervalCoverage()}, prefix="val/",
        )  # fmt: skip

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = 0.5 * (y - self.weights(x)[:, 0]).square().sum()
        self.likelihood(loss.detach(), rows=len(y))
        self.log("train/loss", self.likelihood, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        fixed = self.weights(x)[:, 0]
        self.r2(fixed=fixed, random_variance=1.0, residual_variance=2.0)
        self.scores.update(preds=fixed, target=y, variance=3.0, known=x[:, 0] > 0)
        self.log("val/r2", self.r2)
        self.log_dict(self.scores)

    def on_validation_epoch_end(self) -> None:
        self.ratio.update(torch.tensor([1.0, 2.0]), torch.eye(2))
        self.log("val/ratio", self.ratio)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_logged_values_are_those_of_all_rows(tmp_path: Path) -> None:
    module = Regression()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    trainer = L.Trainer(
        max_epochs=2, default_root_dir=tmp_path, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    logged = trainer.callback_metrics
    fixed = module.weights(X)[:, 0].detach()
    torch.testing.assert_close(logged["val/r2"], marginal_r2(fixed, 1.0, 2.0))
    torch.testing.assert_close(logged["val/nlpd"], negative_log_predictive_density(fixed, Y, 3.0))
    new = X[:, 0] <= 0
    torch.testing.assert_close(logged["val/new"], negative_log_predictive_density(fixed[new], Y[new], 3.0))
    torch.testing.assert_close(logged["val/ratio"], torch.tensor(5**0.5 / 9, dtype=torch.float64))
    assert {"train/loss_step", "train/loss_epoch", "val/coverage"} <= set(logged)
