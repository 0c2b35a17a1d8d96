"""The same fit on one process and on several: every case of a case file, by every solver that takes it.

    python scripts/check_ranks.py [--cases FILE] [--solver NAME …] [--processes K …] [--only NAME …] [--most-rows N]

Each model is fitted by one process, and then by K processes that share its rows: by the levels that the solver needs
whole, unevenly (the first process gets the fewest rows that it can get), and for the mixed-model equations by rows too,
so that levels are torn. A solver that needs all rows together has them on each process, and the steps are those of the
first one. The table shows the largest differences from the fit of one process over the numbers of processes: of ℓ
(relative), of θ (absolute, for those that are not on a boundary), of the number of steps, of β̂ (in standard errors) and
of the BLUPs (relative to the largest of their term), and the bytes that a process sent for each evaluation of the
likelihood, with all that goes with it. θ must be the same on all processes, bit by bit. Exit code 1 where ℓ differs by
more than 1e-10, θ by more than 1e-8, or the number of steps at all.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _processes import on_processes
from check_references import build

from openreml_nn import FitResult, fit
from openreml_nn.data import MixedModel
from openreml_nn.data.shards import runs
from openreml_nn.solvers import ALONE, SOLVERS, ProcessGroup, Ranks
from openreml_nn.solvers.block_pattern import blocks_of_rows

CASES = Path(__file__).resolve().parents[1] / "tests" / "references" / "cases.json"
NEEDED = {"loglik": 1e-10, "theta": 1e-8, "steps": 0.0}


@dataclass
class Fit:
    """What is compared of a fit, as plain numbers."""

    loglik: float
    theta: np.ndarray
    held: np.ndarray
    steps: int
    beta: np.ndarray
    se: np.ndarray
    blup: dict[str, np.ndarray]
    sent: int = 0
    trials: int = 1
    same: bool = True

    @classmethod
    def of(cls, result: FitResult) -> "Fit":
        blup, table = {}, result.blup()
        for term, rows in table.groupby("term", sort=False):
            blup[str(term)] = rows.sort_values(["effect", "level"])["blup"].to_numpy()
        fixed = result.fixed_effects
        return cls(
            result.loglik, result.theta.numpy(), np.array(result.held) != 0, result.n_iter,
            fixed["estimate"].to_numpy(), fixed["std_error"].to_numpy(), blup,
            trials=1 + sum(progress.trials for progress in result.history),
        )  # fmt: skip

    def differences(self, one: "Fit") -> dict[str, float]:
        """From the fit of one process."""
        free, blup = ~one.held, [0.0]
        for term, theirs in one.blup.items():
            blup.append(np.abs(self.blup[term] - theirs).max() / max(np.abs(theirs).max(), 1e-300))
        return {
            "loglik": abs(self.loglik - one.loglik) / max(1.0, abs(one.loglik)),
            "theta": float(np.abs(self.theta - one.theta)[free].max(initial=0.0)) if self.same else np.inf,
            "steps": abs(self.steps - one.steps),
            "beta": float((np.abs(self.beta - one.beta) / one.se).max(initial=0.0)),
            "blup": max(blup),
            "bytes": self.sent / self.trials,
        }


@dataclass
class Row:
    """A line of the table: a case, by a solver, with its rows shared in a way."""

    case: str
    solver: str
    shared: str
    rows: int
    found: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def short(self) -> bool:
        """Whether the fits differ."""
        return any(own[name] > needed for own in self.found.values() for name, needed in NEEDED.items())

    def __str__(self) -> str:
        most = {name: max(own[name] for own in self.found.values()) for name in next(iter(self.found.values()))}
        numbers = f"{most['loglik']:8.0e} {most['theta']:8.0e} {most['steps']:5.0f} {most['beta']:8.0e}"
        mark = "  !" if self.short else ""
        return (f"{self.case:20} {self.solver:21} {self.shared:6} {self.rows:7} {numbers} {most['blup']:8.0e} "
                f"{most['bytes']:9.0f}{mark}")  # fmt: skip


def ways(model: MixedModel, solver: str) -> list[str]:
    """How the rows of a model can be shared: by ``levels``, by ``rows``, or ``all`` on each process."""
    kind = SOLVERS[solver]()
    whole = kind.whole_terms(model.V)
    if whole is None:
        return ["all"]
    return [*(["levels"] if whole else []), *(["rows"] if kind.may_tear else [])]


def owners(model: MixedModel, solver: str, way: str, size: int) -> np.ndarray | None:
    """The process of each row, unevenly; None where there are too few levels."""
    n = len(model.y)
    if way == "rows":
        block, order = np.arange(n), np.arange(n)
    else:
        whole = SOLVERS[solver]().whole_terms(model.V)
        codes = [model.V.operand(name).Z.codes.numpy() for name in whole]  # type: ignore[operator, union-attr]
        block = blocks_of_rows(n, codes)
        order = np.argsort(np.bincount(block), kind="stable")
    if len(order) < size:
        return None
    run = np.zeros(len(order), dtype=np.int64)  # the first process: the smallest block alone
    run[order[1:]] = 1 + runs(np.bincount(block)[order[1:]], size - 1)
    return run[block]


def fitted(model: MixedModel, method: str, solver: str, way: str, ranks: Ranks) -> Fit | None:
    """The fit of a model by the processes; None where they cannot share its rows."""
    ours, places = model, dict[str, np.ndarray]()
    if ranks.size > 1 and way != "all":
        owner = owners(model, solver, way, ranks.size)
        if owner is None:
            return None
        whole = SOLVERS[solver]().whole_terms(model.V) or []
        own = [name for name in whole if way == "levels" and model.correlated[name].separate]
        ours, places = model.part(np.flatnonzero(owner == ranks.rank), own)
        ranks = ranks.owning(places)
    world = ranks if way != "all" else ALONE
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="X is rank deficient")
        result = fit(ours.V, ours.y, ours.X, method=method, solver=solver, x_names=ours.x_names, ranks=world)
    found = Fit.of(result)
    found.sent, thetas = world.sent, ranks.gather(result.theta)
    found.same = all(torch.equal(theta, thetas[0]) for theta in thetas)
    return found


def compare(case: dict[str, Any], folder: Path, solvers: list[str], sizes: list[int], groups: dict[int, Any],
            most_rows: int) -> list[Row]:  # fmt: skip
    """The rows of the table of a case, on each process."""
    built, rows = build(case, folder), []
    model = built.data
    if "fixed_params" in case or len(model.y) > most_rows:
        return []
    rank = dist.get_rank()
    for solver in solvers:
        if SOLVERS[solver]().refusal(model.V) is not None:
            continue
        for way in ways(model, solver):
            row = Row(case["name"], solver, way, len(model.y))
            model.V.set_theta(torch.zeros(model.V.num_params))
            one = fitted(model, built.method, solver, way, ALONE) if rank == 0 else None
            for size in sizes:
                if rank < size:
                    model.V.set_theta(torch.zeros(model.V.num_params))
                    ours = fitted(model, built.method, solver, way, ProcessGroup(group=groups[size]))
                    if ours is not None and one is not None:  # the first process has all levels
                        row.found[size] = ours.differences(one)
                dist.barrier()
            if row.found:
                rows.append(row)
                print(row, flush=True)
    return rows


def work(cases: list[dict[str, Any]], folder: Path, solvers: list[str], sizes: list[int], most_rows: int) -> list[Row]:
    """All cases, on each process."""
    logging.getLogger("openreml_nn").setLevel(logging.ERROR)
    groups = {size: dist.new_group(list(range(size))) for size in sizes}
    return [row for case in cases for row in compare(case, folder, solvers, sizes, groups, most_rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, default=CASES, help="case file (default: the project's own)")
    parser.add_argument("--solver", nargs="*", choices=list(SOLVERS), default=list(SOLVERS), help="solvers")
    parser.add_argument("--processes", nargs="*", type=int, default=[2, 3, 4], help="numbers of processes")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--most-rows", type=int, default=10_000, help="largest table (default: 10000)")
    options = parser.parse_args()
    cases = [case for case in json.loads(options.cases.read_text()) if not options.only or case["name"] in options.only]
    sizes, began = sorted(set(options.processes)), time.monotonic()
    print(f"{'case':20} {'solver':21} {'shared':6} {'rows':>7} {'loglik':>8} {'theta':>8} {'steps':>5} {'beta':>8} "
          f"{'BLUP':>8} {'bytes':>9}   differences, at most, for {sizes} processes", flush=True)  # fmt: skip
    arguments = (cases, options.cases.parent, options.solver, sizes, options.most_rows)
    rows = on_processes(max(sizes), work, *arguments, timeout=7200.0)[0]
    short = [row for row in rows if row.short]
    print(f"{len(rows)} comparisons, {len(short)} differ; {time.monotonic() - began:.0f} s")
    return 1 if short or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
