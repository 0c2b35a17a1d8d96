"""What a mixed-model head costs: milliseconds a step of a training epoch with it and without.

N = 100,000 rows of 10 numbers, q = 10,000 clusters, batches of 1,000 rows, the network 10-100-50-25-12-1 with ReLU in
float32, Adam. Without the head: shuffled batches and the squared error. With it: batches of whole clusters from
`ClusterBatchSampler` and the head's loss, its thetas among Adam's parameters. Both index tensors by the batch, and the
drawing of the batches is in the time, so that the network is as cheap as it can be; dropout, a DataLoader, a logger
or a larger network make the head's share smaller. Epochs of the variants take turns, and times are medians of the CPU
time of the process, so that other programs on the machine hardly count.

Variants of the head:
    intercepts    one factor, one effect a level: closed form in one pass
    curves        one factor with intercept, slope and quadratic, a full covariance of the three
    features      one factor, the 12 units of the last hidden layer as fixed effects, restricted likelihood
    crossed       two factors of 10,000 levels each

Requirement: an epoch with intercepts costs at most 1.5 times the same without.

Result: 1 thread of 2 cores of an Intel Xeon that had other work too, Python 3.11, torch 2.13, 7 epochs of each.
    no head         1.72 ms a step   1.00 x
    intercepts      2.35 ms a step   1.37 x
    curves          3.97 ms a step   2.31 x
    features        4.33 ms a step   2.52 x
    crossed        14.02 ms a step   8.16 x
Another run gave 1.40 for intercepts. A dense V of the batch would take some 50 ms a step in the last line.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.nn import ClusterBatchSampler, Effects, MixedModelHead

N, Q, BATCH = 100_000, 10_000, 1_000
LIMIT = 1.5


def network(last: bool = True) -> nn.Sequential:
    """10-100-50-25-12-1, or without its last layer."""
    sizes, layers = [10, 100, 50, 25, 12], []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(12, 1)) if last else nn.Sequential(*layers)


class Data:
    """One set of rows for all variants.

    Args:
        rows: Number of rows.
        levels: Number of clusters.
    """

    def __init__(self, rows: int, levels: int) -> None:
        self.levels = levels
        self.x = torch.rand(rows, 10) * 2 - 1
        self.codes, self.other = torch.randint(0, levels, (rows,)), torch.randint(0, levels, (rows,))
        t = torch.rand(rows)
        self.curve = torch.stack([torch.ones(rows), t, t.square()], dim=1)
        self.y = self.x.sum(1) + torch.randn(levels)[self.codes] + torch.randn(rows)


def variants(data: Data) -> dict[str, tuple[MixedModelHead, Callable[[Tensor], Any]]]:
    """Each head and what it is told of the rows of a batch."""
    q = data.levels
    return {
        "intercepts": (MixedModelHead({"a": Effects(q)}), lambda i: {"a": data.codes[i]}),
        "curves": (
            MixedModelHead({"a": Effects(q, ["intercept", "t", "t2"])}),
            lambda i: {"a": (data.codes[i], data.curve[i])},
        ),
        "features": (MixedModelHead({"a": Effects(q)}, mode="features"), lambda i: {"a": data.codes[i]}),
        "crossed": (
            MixedModelHead({"a": Effects(q), "b": Effects(q)}),
            lambda i: {"a": data.codes[i], "b": data.other[i]},
        ),
    }


class Run:
    """One variant: a network, its optimiser and its epochs.

    Args:
        data: The rows.
        batch: Rows of a batch.
        head: The head and its groups; None for the squared error.
    """

    def __init__(self, data: Data, batch: int, head: tuple[MixedModelHead, Callable[[Tensor], Any]] | None) -> None:
        self.data, self.batch, self.head = data, batch, head
        self.network = network(head is None or head[0].mode != "features")
        own = [] if head is None else list(head[0].parameters())
        self.optimizer = torch.optim.Adam([*self.network.parameters(), *own])
        self.sampler = ClusterBatchSampler(data.codes, batch)
        self.steps: list[float] = []

    def batches(self) -> Iterable[Tensor]:
        """Row indices of the batches of an epoch."""
        if self.head is None:
            return torch.randperm(len(self.data.y)).split(self.batch)
        return self.sampler.batches()

    def loss(self, i: Tensor) -> Tensor:
        output, y = self.network(self.data.x[i]), self.data.y[i]
        if self.head is None:
            return nn.functional.mse_loss(output[:, 0], y)
        head, groups = self.head
        return head(output, y, groups(i))

    def epoch(self) -> None:
        began, count = time.process_time(), 0
        for i in self.batches():
            self.optimizer.zero_grad()
            self.loss(i).backward()
            self.optimizer.step()
            count += 1
        self.steps.append(1e3 * (time.process_time() - began) / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--epochs", type=int, default=7, help="epochs of each variant, after one that is not counted")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--small", action="store_true", help="a hundredth of the rows, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    data = Data(N // 100, Q // 100) if options.small else Data(N, Q)
    batch = BATCH // 10 if options.small else BATCH
    runs = {"no head": Run(data, batch, None)}
    runs |= {name: Run(data, batch, head) for name, head in variants(data).items()}
    for _ in range(options.epochs + 1):
        for run in runs.values():
            run.epoch()
    medians = {name: statistics.median(run.steps[1:]) for name, run in runs.items()}
    for name, median in medians.items():
        print(f"{name:12s} {median:7.2f} ms a step  {median / medians['no head']:5.2f} x")
    ratio = medians["intercepts"] / medians["no head"]
    print(f"An epoch with intercepts costs {ratio:.2f} times one without; at most {LIMIT} is wanted.")


if __name__ == "__main__":
    main()
