"""How the cost of this project grows with rows, levels and parameters, for each solver.

Every series lets one size grow and holds the others. Told are seconds of preparing a problem once, and of one
evaluation with its gradient and average information, medians of --repeats; and the exponents, the slopes of a straight
line through the logarithms of size and seconds: with respect to what grows, and to the number of rows n and of variance
parameters where these grow in another way. Small sizes are dominated by what does not grow, so that their exponents are
too low.

    OMP_WAIT_POLICY=PASSIVE python scripts/benchmark_scaling.py [--solver NAME …] [--threads 2] [--repeats 3] [--small]
        [--cpu]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch
from torch import Tensor

from openreml_nn import REML
from openreml_nn.covariance import (
    AR1Matrix,
    CellMatrix,
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.likelihood import average_information
from openreml_nn.solvers import SOLVERS


@dataclass
class Series:
    """One size that grows.

    Attributes:
        solver: Name of the solver.
        what: What grows.
        sizes: Its values.
        model: From a value to V.
        held: What is held, in words.
    """

    solver: str
    what: str
    sizes: list[int]
    model: Callable[[int], Matrix]
    held: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solver", nargs="+", choices=SOLVERS, default=list(SOLVERS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="two sizes of each, small, to try the script")
    parser.add_argument("--cpu", action="store_true", help="seconds of the processor, on a machine that others use too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu else time.perf_counter
    print(f"openreml_nn {metadata.version('openreml_nn')}, torch {torch.__version__}, {platform.machine()}, float64, "
          f"{options.threads} threads, medians of {options.repeats}{' in processor time' * options.cpu}")  # fmt: skip
    for series in all_series():
        if series.solver not in options.solver:
            continue
        sizes = [size // 8 if size > 100 else size for size in series.sizes[:2]] if options.small else series.sizes
        print(f"\n{series.solver}: {series.what} ({series.held})")
        print(f"{series.what:>36} {'n':>9} {'parameters':>10} {'prepare':>10} {'evaluate':>10}")
        found = [measure(series.model(size), series.solver, options.repeats, clock) for size in sizes]
        for size, (n, k, prepare, evaluate) in zip(sizes, found, strict=True):
            print(f"{size:36d} {n:9d} {k:10d} {prepare:9.4f}s {evaluate:9.4f}s")
        seconds = [[taken[part] for taken in found] for part in (2, 3)]
        for name, grown in (
            (series.what, sizes),
            ("n", [n for n, *_ in found]),
            ("parameters", [k for _, k, *_ in found]),
        ):
            if grown is sizes or grows_otherwise(grown, sizes):
                slopes = [exponent(grown, taken) for taken in seconds]
                print(f"{'exponent in ' + name:>36} {'':20} {slopes[0]:10.2f} {slopes[1]:10.2f}", flush=True)


def measure(V: Matrix, solver: str, repeats: int, clock: Callable[[], float]) -> tuple[int, int, float, float]:
    """Rows, free parameters, median seconds of preparing and of evaluating; each is done once before, to warm up."""
    n = V.shape[0]
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(n, generator=generator, dtype=torch.float64)
    X = torch.cat([torch.ones(n, 1), torch.randn(n, 1, generator=generator)], dim=1).to(torch.float64)
    objective = REML(V, solver)
    prepares, evaluates = [], []
    for turn in range(repeats + 1):
        began = clock()
        problem = objective.prepare(y, X)
        prepares.append(clock() - began)
        theta = (0.05 * turn + torch.zeros(V.num_params, dtype=torch.float64)).requires_grad_()
        began = clock()
        evaluation = problem.evaluate(theta)
        (-objective.loglik(evaluation)).backward()
        average_information(evaluation)
        evaluates.append(clock() - began)
        del problem, evaluation
    return n, len(V.free_index), statistics.median(prepares[1:]), statistics.median(evaluates[1:])


def grows_otherwise(size: list[int], grown: list[int]) -> bool:
    """Whether a size grows, and not in proportion to another."""
    return len(set(size)) > 1 and any(a * grown[0] != b * size[0] for a, b in zip(size, grown, strict=True))


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log seconds on log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


# ---- the series ------------------------------------------------------------------------------------------------------


def all_series() -> list[Series]:
    """Every series, solver by solver."""
    mme, blocks, dense = "mixed_model_equations", "blocks", "dense"
    return [
        Series(mme, "rows", [50_000, 100_000, 200_000, 400_000], lambda n: crossed(n, 500, 2), "500 × 500 levels"),
        Series(mme, "levels of the first term", [4000, 16_000, 64_000], lambda q: unequal(256_000, q, 100),
               "256,000 rows, 100 levels of the second"),
        Series(mme, "levels of each term", [500, 1000, 2000, 4000], lambda q: crossed(40_000, q, 2), "40,000 rows"),
        Series(mme, "effects of each level", [2, 4, 8], lambda s: slopes(160_000, 4000, s),
               "160,000 rows, 4,000 levels"),
        Series(blocks, "subjects", [4000, 16_000, 64_000], lambda m: serial(m, 10), "10 times"),
        Series(blocks, "times", [32, 64, 128], lambda t: serial(400, t), "400 subjects"),
        Series(blocks, "times, unstructured", [4, 8, 16], lambda t: unstructured(4000, t),
               "4,000 subjects, t (t + 1) / 2 parameters"),
        Series("spectral", "individuals", [500, 1000, 2000, 4000], kernel, "one kernel"),
        Series("spectral_traits", "genotypes", [400, 800, 1600, 3200], lambda g: traits(g, 3), "3 traits"),
        Series("spectral_traits", "traits", [2, 4, 8], lambda t: traits(800, t), "800 genotypes"),
        Series(dense, "rows", [500, 1000, 2000, 4000], lambda n: crossed(n, n // 10, 3), "3 factors of n/10 levels"),
        Series(dense, "factors", [2, 4, 8, 16], lambda k: crossed(1000, 100, k), "1,000 rows, 100 levels"),
    ]  # fmt: skip


def crossed(n: int, levels: int, factors: int) -> Matrix:
    """Random factors of so many levels each, crossed at random."""
    return intercepts([_codes(n, levels, seed) for seed in range(factors)])


def unequal(n: int, first: int, second: int) -> Matrix:
    """Two crossed factors of different numbers of levels."""
    return intercepts([_codes(n, first, 1), _codes(n, second, 2)])


def intercepts(factors: list[Tensor]) -> Matrix:
    terms: dict[str, Matrix] = {}
    for i, codes in enumerate(factors):
        Z = DummyMatrix(codes)
        terms[f"factor{i}"] = CovariancePropagation(Z, ScalarMatrix(Z.num_levels))
    return Sum(terms | {"residual": ScalarMatrix(len(factors[0]))})


def slopes(n: int, levels: int, effects: int) -> Matrix:
    """One factor with correlated effects."""
    dummy = DummyMatrix(_codes(n, levels, 3))
    values = torch.randn(n, effects, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    G = KroneckerProduct(UnstructuredMatrix(effects), IdentityMatrix(dummy.num_levels))
    return Sum({"subject": CovariancePropagation(KhatriRaoMatrix(values, dummy), G), "residual": ScalarMatrix(n)})


def serial(subjects: int, times: int) -> Matrix:
    """Random intercepts and an autoregressive residual."""
    dummy = DummyMatrix(torch.arange(subjects).repeat_interleave(times))
    intercept = CovariancePropagation(dummy, ScalarMatrix(subjects))
    return Sum({"subject": intercept, "residual": within(dummy, times, AR1Matrix(times))})


def unstructured(subjects: int, times: int) -> Matrix:
    """Any covariance between the times of a subject."""
    dummy = DummyMatrix(torch.arange(subjects).repeat_interleave(times))
    return Sum({"residual": within(dummy, times, UnstructuredMatrix(times))})


def within(dummy: DummyMatrix, times: int, C: Matrix) -> Matrix:
    Z = CellMatrix(torch.arange(times).repeat(dummy.num_levels), dummy, [str(t) for t in range(times)])
    return CovariancePropagation(Z, KroneckerProduct(C, IdentityMatrix(dummy.num_levels)))


def kernel(n: int) -> Matrix:
    """σ_g² K + σ_e² I."""
    return Sum({"genotype": KnownMatrix(_relationship(n)), "residual": ScalarMatrix(n)})


def traits(genotypes: int, count: int) -> Matrix:
    """Σ_g ⊗ K + Σ_e ⊗ I."""
    K = KnownMatrix(_relationship(genotypes))
    K.set_no_grad([0])
    return Sum({
        "genotype": KroneckerProduct(UnstructuredMatrix(count), K),
        "residual": KroneckerProduct(UnstructuredMatrix(count), IdentityMatrix(genotypes)),
    })  # fmt: skip


def _relationship(n: int) -> Tensor:
    M = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return M @ M.mT / (2 * n)


def _codes(n: int, levels: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % levels


if __name__ == "__main__":
    main()
