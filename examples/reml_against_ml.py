"""REML against ML with a network as the mean: how far σ² is off, by the number of features for each row.

A network ends in p features whose linear combination is the mean of y, and the head adds a random intercept: n = 1000
rows in 100 clusters, both variances 1, mean x'1 for x of 10 standard normal columns, which every network here can
express. REML integrates the p coefficients of the last layer out, ML does not. Three kinds of mean are fitted, each
with all rows at once:

- ``fixed``: the features are x and random ones that are not trained, so that the model is linear;
- ``trained``: all layers, with the last one profiled out (``mode="features"``);
- ``f``: all layers, the likelihood seeing only their output (``mode="exact"``), where REML and ML are the same; σ² is
  then also fitted to n new rows of the same clusters.

    python examples/reml_against_ml.py                       # the table, about ten minutes on one thread
    python examples/reml_against_ml.py --rows 100 --steps 2 --repetitions 1 --shares 0.2

Result of that run: see ``reml_against_ml.md`` beside this file.
"""

import argparse
from statistics import fmean, stdev

import torch
from torch import Tensor, nn

from openreml_nn.nn import Effects, MixedModelHead

COLUMNS = {
    "fixed, REML": ("fixed", "features", "REML"),
    "fixed, ML": ("fixed", "features", "ML"),
    "trained, REML": ("trained", "features", "REML"),
    "trained, ML": ("trained", "features", "ML"),
    "f": ("trained", "exact", "REML"),
    "f, new rows": ("new rows", "exact", "REML"),
}


class Features(nn.Module):
    """x itself and p − 11 more features of it, one of the p coefficients being the intercept."""

    def __init__(self, p: int) -> None:
        super().__init__()
        self.more = nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, p - 11))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.tanh(self.more(x))], dim=1)


def sigma2(kind: str, mode: str, method: str, rows: int, p: int, steps: int, seed: int) -> float:
    """Estimate of σ² from one simulated table."""
    torch.manual_seed(seed)
    b = torch.randn(rows // 10, dtype=torch.float64)
    codes = torch.arange(rows) % len(b)

    def table() -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, 10)
        return x, x.double().sum(1) + b[codes] + torch.randn(rows, dtype=torch.float64)

    x, y = table()
    network: nn.Module = Features(p)
    if mode == "exact":
        network = nn.Sequential(network, nn.Linear(p - 1, 1))
    head = MixedModelHead({"cluster": Effects(len(b))}, mode=mode, method=method)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=0.01)
    levels = head.rows(codes)
    for _ in range(0 if kind == "fixed" else steps):
        optimizer.zero_grad()
        head(network(x), y, levels).backward()
        optimizer.step()
    if kind == "new rows":
        x, y = table()
    head.refit(network(x), y, codes, variances=False)
    return head.variance()["residual/sigma^2"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Bias of the residual variance by features for each row.")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.4])
    options = parser.parse_args()
    print(f"Mean of the estimates of σ² = 1 (standard error) in {options.repetitions} repetitions\n")
    print("| p/n | " + " | ".join(COLUMNS) + " |\n| --- |" + " --- |" * len(COLUMNS))
    for share in options.shares:
        cells = []
        for kind, mode, method in COLUMNS.values():
            found = [sigma2(kind, mode, method, options.rows, max(12, round(share * options.rows)), options.steps, seed)
                     for seed in range(options.repetitions)]  # fmt: skip
            error = stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
            cells.append(f"{fmean(found):.3f} ({error:.3f})")
        print(f"| {share:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
