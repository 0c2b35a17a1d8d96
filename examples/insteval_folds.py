"""InstEval, 73,421 lecture ratings at ETH Zurich: five-fold cross-validation of a network with crossed random effects.

Students (2,972) and lecturers (1,128) are random; the mean is a function of the student's and the lecture's age, of
whether the lecture is a service for another department, and of the department: 26 indicators. The function is linear
plus a network of two layers of 32 units. All rows are in the likelihood at each of 100 steps (``mode="exact"``); width
and number of steps were chosen on one fold of another split. lme4 gets the same folds: all main effects, and these with
service × department.

    Rscript -e 'write.csv(lme4::InstEval, "insteval.csv", row.names = FALSE)'    # the table comes with lme4
    python examples/insteval_folds.py insteval.csv --lme4                        # --lme4 needs R with lme4
"""

import argparse
import logging
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from openreml_nn.nn import Effects, MixedModelHead

MEAN, RANDOM = ["studage", "lectage", "service", "dept"], ["s", "d"]
FORMULAS = [
    "y ~ studage + lectage + service + dept + (1 | s) + (1 | d)",
    "y ~ studage + lectage + service * dept + (1 | s) + (1 | d)",
]
R = """
suppressPackageStartupMessages(library(lme4)); a <- commandArgs(TRUE)
D <- read.csv(a[1], colClasses = c(s = "factor", d = "factor", studage = "factor", lectage = "factor",
                                   service = "factor", dept = "factor"))
for (k in sort(unique(D$fold))) {
  m <- lmer(as.formula(a[2]), D[D$fold != k, ]); new <- D[D$fold == k, ]
  cat(mean((predict(m, new, allow.new.levels = TRUE) - new$y)^2), "\\n")
}
"""


class Ratings(L.LightningModule):
    """f(x) = a linear function + a network, students and lecturers by the head."""

    def __init__(self, x: Tensor, y: Tensor, levels: dict[str, Tensor], sizes: dict[str, int], steps: int) -> None:
        super().__init__()
        self.x, self.y, self.levels, self.steps = x, y, levels, steps
        self.linear = nn.Linear(x.shape[1], 1)
        self.curved = nn.Sequential(
            nn.Linear(x.shape[1], 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.head = MixedModelHead({name: Effects(q) for name, q in sizes.items()}, mode="exact")
        self.head.start(y, levels)
        self.rows = self.head.rows(levels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.curved(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.head(self(self.x), self.y, self.rows)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, self.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def on_train_end(self) -> None:
        self.head.refit(self(self.x), self.y, self.rows, variances=False)


def ours(table: pd.DataFrame, fold: np.ndarray, k: int, steps: int) -> tuple[float, dict[str, float]]:
    """Error of fold k, and the variances that were estimated from the others."""
    torch.manual_seed(k)
    x = torch.tensor(pd.get_dummies(table[MEAN].astype(str)).to_numpy(np.float32))
    y = torch.tensor(table.y.to_numpy(np.float64))
    codes = {name: torch.from_numpy(pd.factorize(table[name])[0]) for name in RANDOM}
    x, sizes = x - x.mean(0), {name: int(code.max()) + 1 for name, code in codes.items()}
    train, test = (torch.from_numpy(np.flatnonzero(part)) for part in (fold != k, fold == k))
    module = Ratings(x[train], y[train], {name: code[train] for name, code in codes.items()}, sizes, steps)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer.fit(module, DataLoader(range(steps)))  # type: ignore[arg-type]
    with torch.no_grad():
        predicted = module.head.predict(
            module(x[test]), {name: code[test] for name, code in codes.items()}, variances=False
        )[0]
    return (predicted - y[test]).square().mean().item(), module.head.variance()


def lme4(table: pd.DataFrame, fold: np.ndarray, formula: str) -> list[float]:
    """Errors of all folds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        table.assign(fold=fold).to_csv(path, index=False)
        call = ["Rscript", "-e", R, str(path), formula]
        return [float(line) for line in subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()]


def main() -> None:
    """Print the errors fold by fold."""
    parser = argparse.ArgumentParser(description="Five-fold cross-validation on InstEval.")
    parser.add_argument("table", type=Path, help="CSV with s, d, studage, lectage, service, dept, y")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lme4", action="store_true", help="fit lme4 to the same folds")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    table = pd.read_csv(options.table)
    fold = np.random.default_rng(1).permutation(len(table)) % 5
    print("| method | mean | fold 1 | fold 2 | fold 3 | fold 4 | fold 5 |\n| --- |" + " --- |" * 6)
    for formula in FORMULAS if options.lme4 else []:
        _print(f"lme4, `{formula.replace('|', chr(92) + '|')}`", lme4(table, fold, formula))
    found = [ours(table, fold, k, options.steps) for k in range(5)]
    _print("network, crossed effects", [mse for mse, _ in found])
    print("\nvariances, mean of the folds: " + ", ".join(
        f"{name} {np.mean([v[name] for _, v in found]):.4f}" for name in found[0][1]))  # fmt: skip


def _print(method: str, errors: list[float]) -> None:
    print(f"| {method} | {np.mean(errors):.4f} | " + " | ".join(f"{error:.4f}" for error in errors) + " |", flush=True)


if __name__ == "__main__":
    main()
