"""Time, memory and messages of a fit against the number of processes that share its rows.

    python scripts/benchmark_ranks.py [--rows N …] [--processes K …] [--per-subject M]

A random intercept and slope for each subject, y = β₀ + β₁x + b₀ + b₁x + ε, fitted by the mixed-model equations. Each
process makes the rows of its own subjects; the data are the same whatever the number of processes. Told are, of the
process that has most of it: seconds to prepare and for an evaluation (likelihood, score and average information; the
least of a few), as wall time and as CPU time, and the largest memory during a fit above that of the program, also for
each row; and bytes that the first process sends for an evaluation. All processes are on this machine, with one thread
each: where there are fewer cores than processes, CPU time says what each has to do.

Result: 2 shared cores of an AMD EPYC (busy with other work: wall times say little), Python 3.11, torch 2.13, gloo.
          rows  processes  prepare, CPU s  evaluation, CPU ms  memory, MiB  bytes a row  bytes sent
     1 000 000          1            0.09                27.3          236          248           0
     1 000 000          2            0.08                16.1          141          295         336
     1 000 000          4            0.08                10.4           84          352         336
    10 000 000          1            1.03               339.6         1779          187           0
    10 000 000          2            0.87               166.9          963          202         336
    10 000 000          4            0.41                79.6          475          199         336
    10 000 000          8            0.23                42.5          292          245         336
"""

import argparse
import resource
import time
from dataclasses import dataclass

import psutil
import torch
from _processes import on_processes
from torch import Tensor

from openreml_nn import REML, fit
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.optim import data_start
from openreml_nn.solvers import processes
from openreml_nn.solvers.mixed_model_equations import MixedModelEquationsSolver

CHUNK = 1000  # subjects that are made with one seed
EVALUATIONS = 5


@dataclass
class Told:
    """What a process tells."""

    rows: int
    prepare: float
    prepare_cpu: float
    evaluate: float
    evaluate_cpu: float
    memory: int
    sent: int
    loglik: float
    steps: int


def subjects(first: int, last: int, each: int) -> tuple[Tensor, Tensor]:
    """x and y of some subjects, shape (subjects · each,)."""
    xs, ys = [], []
    for chunk in range(first // CHUNK, -(-last // CHUNK)):
        generator = torch.Generator().manual_seed(chunk)
        x, noise = torch.randn(2, CHUNK, each, generator=generator, dtype=torch.float64)
        b = torch.randn(2, CHUNK, 1, generator=generator, dtype=torch.float64)
        own = slice(max(first - chunk * CHUNK, 0), min(last - chunk * CHUNK, CHUNK))
        xs.append(x[own].flatten())
        ys.append((10.0 + x + 0.7 * b[0] + 0.4 * (b[0] + b[1]) * x + noise)[own].flatten())
    return torch.cat(xs), torch.cat(ys)


def work(rows: int, each: int) -> Told:
    """Make the rows of this process, and fit."""
    ranks, before, count = processes(), psutil.Process().memory_info().rss, rows // each
    first, last = (place * count // ranks.size for place in (ranks.rank, ranks.rank + 1))
    x, y = subjects(first, last, each)
    X, codes = torch.stack([torch.ones_like(x), x], dim=1), torch.arange(last - first).repeat_interleave(each)
    Z = KhatriRaoMatrix(X, DummyMatrix(codes), ["1", "x"])
    G = KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(last - first))
    V = Sum(subject=CovariancePropagation(Z, G), residual=ScalarMatrix(len(y)))
    ranks = ranks.owning(["subject"])

    objective = REML(V, MixedModelEquationsSolver(), ranks)
    began, cpu = time.perf_counter(), time.process_time()
    problem = objective.prepare(y, X, ranks=ranks)
    prepare, prepare_cpu = time.perf_counter() - began, time.process_time() - cpu
    V.set_theta(ranks.first(data_start(problem)))
    walls, cpus, before_sent = [], [], ranks.sent
    for _ in range(EVALUATIONS):
        began, cpu = time.perf_counter(), time.process_time()
        evaluation = problem.evaluate()
        objective.loglik(evaluation).backward()
        evaluation.inner(evaluation.working_variates())
        walls.append(time.perf_counter() - began)
        cpus.append(time.process_time() - cpu)
    sent = (ranks.sent - before_sent) // EVALUATIONS
    del problem, evaluation
    result = fit(V, y, X, solver=MixedModelEquationsSolver(), ranks=ranks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Told(len(y), prepare, prepare_cpu, min(walls), min(cpus), peak - before, sent, result.loglik, result.n_iter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", type=int, default=[1_000_000, 10_000_000], help="numbers of rows")
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--per-subject", type=int, default=10, help="rows of a subject (default: 10)")
    options = parser.parse_args()
    print("      rows  processes   prepare (CPU), s  evaluation (CPU), ms   memory, MiB  bytes a row  bytes sent  steps"
          "  log-likelihood", flush=True)  # fmt: skip
    for rows in options.rows:
        for size in options.processes:
            told = on_processes(size, work, rows, options.per_subject, timeout=3600.0)
            most = {name: max(getattr(own, name) for own in told) for name in vars(told[0])}
            print(f"{rows:10} {size:10} {most['prepare']:9.2f} ({most['prepare_cpu']:5.2f}) "
                  f"{1e3 * most['evaluate']:13.1f} ({1e3 * most['evaluate_cpu']:6.1f}) {most['memory'] / 2**20:12.0f} "
                  f"{most['memory'] / most['rows']:12.0f} {told[0].sent:11} {most['steps']:6}  {most['loglik']:.6f}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
