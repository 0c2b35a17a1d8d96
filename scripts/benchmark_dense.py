"""Cost of one dense average-information step against the machine's own Cholesky and Cholesky inverse.

A step is what the optimiser does for one accepted step: V at the trial point, its likelihood and score, the average
information there. The model is y = μ + Σ Z_k u_k + ε with k random factors of n/10 levels given by level codes. Time is
the median over steps, in units of (one Cholesky + one Cholesky inverse) of the same n in the same run; memory is the
peak of the process above its level before the step, in matrices of n × n float64 (Linux only).

    OMP_WAIT_POLICY=PASSIVE python scripts/benchmark_dense.py [--sizes 2000 4000] [--factors 3 6] [--threads 2]
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from openreml_nn import REML, AverageInformation
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum
from openreml_nn.likelihood import average_information
from openreml_nn.optim import Geometry, data_start
from openreml_nn.solvers import Evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 4000])
    parser.add_argument("--factors", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, medians of {options.repeats}")
    print(f"{'n':>6} {'k':>3} {'Cholesky':>9} {'inverse':>9} {'step':>9} {'ratio':>6} {'n x n at peak':>14}")
    for n in options.sizes:
        for k in options.factors:
            cholesky, inverse, step, peak = measure(n, k, options.repeats)
            ratio = step / (cholesky + inverse)
            print(f"{n:6d} {k:3d} {cholesky:8.3f}s {inverse:8.3f}s {step:8.3f}s {ratio:6.2f} {peak:14.1f}", flush=True)


def measure(n: int, k: int, repeats: int) -> tuple[float, float, float, float]:
    """Median seconds of a Cholesky, of its inverse and of a step, and the peak of a step in n × n matrices."""
    V, y, X = model(n, k)
    objective = REML(V, "dense")
    problem = objective.prepare(y, X)
    V.set_theta(data_start(problem))
    current: list[Evaluation] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        current.clear()
        current.append(problem.evaluate())
        loss = -objective.loglik(current[0])
        loss.backward()
        return loss

    optimizer = AverageInformation(
        V.theta_parameters(), lambda: average_information(current[0]), geometry=lambda: Geometry.of(V), tolerance=1e-300
    )
    optimizer.step(closure)  # starts, and makes a first step
    steps, choleskies, inverses, peaks = [], [], [], []
    for _ in range(repeats):
        current.clear()
        A = V.build(V.theta.detach())
        began = time.perf_counter()
        L = torch.linalg.cholesky(A)
        middle = time.perf_counter()
        torch.cholesky_inverse(L)
        choleskies.append(middle - began)
        inverses.append(time.perf_counter() - middle)
        del A, L
        with torch.no_grad():  # away from the optimum again, so that a step is a step
            for p in V.theta_parameters():
                p.add_(0.3 * torch.randn(1, dtype=p.dtype))
        optimizer.state.clear()
        start(optimizer, closure)
        current.clear()
        before = reset_peak()
        began = time.perf_counter()
        optimizer.step(closure)
        steps.append((time.perf_counter() - began) / optimizer.progress.trials)
        peaks.append((peak_bytes() - before) / (8 * n * n))
    medians = [statistics.median(times) for times in (choleskies, inverses, steps)]
    return medians[0], medians[1], medians[2], max(peaks)


def start(optimizer: AverageInformation, closure: Callable[[], Tensor]) -> None:
    """Evaluate where the parameters are, so that the next step is one step and nothing else."""
    optimizer._begin(optimizer._memory(), torch.enable_grad()(closure))


def model(n: int, k: int) -> tuple[Sum, Tensor, Tensor]:
    """A model with k random factors of n/10 levels each, simulated with variances of 1."""
    generator = torch.Generator().manual_seed(1)
    levels = n // 10
    terms, y = {}, torch.randn(n, generator=generator, dtype=torch.float64)
    for i in range(k):
        codes = torch.randperm(n, generator=generator) % levels
        y = y + torch.randn(levels, generator=generator, dtype=torch.float64)[codes]
        terms[f"factor{i}"] = CovariancePropagation(DummyMatrix(codes), ScalarMatrix(levels))
    X = torch.cat([torch.ones(n, 1), torch.randn(n, 4, generator=generator)], dim=1).to(torch.float64)
    return Sum(terms | {"residual": ScalarMatrix(n)}), y, X


def reset_peak() -> int:
    """Forget the peak memory of this process so far; returns what it uses now, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed, but not yet given back, is not in use
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


if __name__ == "__main__":
    main()
