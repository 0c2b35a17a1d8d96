"""The simulations of Simchoni & Rosset, with a network and a training that are the same for every method.

    python examples/lmmnn_simulation.py                     # prints the tables of the results that are there
    python examples/lmmnn_simulation.py --run --results again.csv --tables one --only "q=1000 " --repetitions 1
    python examples/lmmnn_simulation.py --run --results small.csv --rows 2000 --epochs 1 --repetitions 1

Data (`lmmnn.data`): 100,000 rows, f(x) = s cos s + 2x₀x₁ with s = 1 + Σx, x uniform on (−1, 1)¹⁰, σ² = 1, random
effects of 100 to 10,000 levels; a fifth of the rows is the test, a tenth of the others is for validation.

Methods (`lmmnn.methods`), all with the network 100-50-25-12: the levels are ignored, one-hot or embedded; ours are
the head with batches by cluster, with all rows at once (exact), with the last layer profiled out (features), and
alternating. The floor is the best linear unbiased prediction with f and all variances known.

Recipes: ``plain`` is 20 epochs of Adam on batches of 500 rows, the rate one cycle up to 0.02, no dropout; ``papers``
that of the papers: rate 0.001, batches of 30, dropout of 0.25, until 10 epochs bring no better validation error. In
both the weights of the epoch with the smallest validation error are kept, for every method. The variances are then
fitted once by REML to all rows but the test rows; with ``last layer`` the last layer of the same network is fitted
again with them, its features being fixed and without dropout.

Two methods are trained otherwise. The loss of the exact mode has no noise, so it takes 40 steps of L-BFGS, 10
iterations each, with a line search, the validation error being looked at after each step. Two crossed factors of
10,000 levels fit into no batch, and a matrix over the levels of one of them is dense: ``alternating`` has batches of
whole clusters of the first factor, as ever, and takes the effects of the second as known; twice in an epoch the
effects and the variances of both are found anew from all training rows (`lmmnn.backfitting`). The variances are there
those of the training; a refit takes 3 minutes and 7 GiB.

Results are those of ``lmmnn_simulation.csv`` beside this file or of ``--results``, each with date, versions and
machine. With ``--run`` they are appended as they come, and what is there is not run again; times are process times.
With other ``--rows`` the numbers of levels change in proportion. Estimates are means, with their standard errors, of
the repetitions.

Sources: Simchoni & Rosset (2021), NeurIPS 34, 25111-25122; (2023), JMLR 24 (156), 1-57; their programs and result
files at https://github.com/gsimchoni/lmmnn.
"""

import argparse
import logging
import math
import os
import platform
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import pandas as pd
from lmmnn import published
from lmmnn.data import Setting, floor, join, simulate
from lmmnn.methods import BASELINES, OURS, RECIPES, Outcome, run

RESULTS = Path(__file__).with_suffix(".csv")
ROWS = 100_000


class Job(NamedTuple):
    """One cell of a table.

    Attributes:
        setting: What is simulated.
        method: How it is fitted.
        recipe: How it is trained.
        repetitions: How often.
        blocks: Neighbouring levels of the first factor that a batch keeps together.
        refit: Whether the variances are fitted to all rows after the training.
    """

    setting: Setting
    method: str
    recipe: str = "plain"
    repetitions: int = 5
    blocks: int = 1
    refit: bool = True


ONE = [Setting((q,), (v,)) for q in (100, 1000, 10000) for v in (0.1, 1.0, 10.0)]
IN_ORDER = Setting((10000, 10000), (5.0, 5.0))
CROSSED = IN_ORDER._replace(crossed=True)
TIME = [Setting((10000,), v, time="longest")
        for v in [(0.3, 0.3, 0.3), (0.3, 0.3, 3.0), (3.0, 0.3, 0.3), (3.0, 3.0, 3.0)]]  # fmt: skip
LONG = [24, 100, 24, 10, 3, 3, 3, 3]  # repetitions: a small variance has a standard error of two thirds of itself
OWN_TIME = [setting._replace(time="own") for setting in TIME]
TABLES: dict[str, list[Job]] = {
    "one": [Job(s, m, repetitions=5 if m in ("floor", "batch") else 2)
            for s in ONE for m in ("floor", *BASELINES, "batch")],
    "modes": [Job(s, m, repetitions=2) for s in ONE[1::3] for m in ("floor", "batch", "features", "exact")],
    "two": [
        *(Job(s, m, repetitions=1) for s in (IN_ORDER, CROSSED) for m in ("ignore", "embedding")),
        Job(IN_ORDER, "floor", repetitions=3),
        Job(IN_ORDER, "batch", repetitions=3, blocks=50),
        Job(CROSSED, "floor", repetitions=5),
        Job(CROSSED, "batch", repetitions=1, refit=False),
        Job(CROSSED, "alternating", repetitions=5, refit=False),
    ],
    "longitudinal": [Job(s, m, repetitions=times) for s, times in zip(OWN_TIME + TIME, LONG, strict=True)
                     for m in ("floor", "batch")],
    "more subjects": [Job(s, m, repetitions=24 if s.sigma2[2] > 1.0 else 12)
                      for s in OWN_TIME[:3] for m in ("floor", "batch")],
    "papers": [Job(s, m, repetitions=2, recipe="papers") for s in ONE for m in ("floor", "batch")],
}  # fmt: skip
TITLES = {
    "one": "One factor, no dropout",
    "modes": "One factor, the modes of the head",
    "two": "Two factors of 10,000 levels; not crossed: in the order of the authors' program",
    "longitudinal": "Random intercept, slope and quadratic term of 10,000 subjects; t=own: t ends at 1 for each "
    "subject, as the papers say; t=longest: for the longest one, as the authors' program has it",
    "more subjects": "The same with t=own of four times as many subjects, 40,000, and rows",
    "papers": "One factor, the papers' recipe with dropout",
}
TIMES = {"more subjects": 4}  # how many rows a table has beside the others


def main() -> None:
    """Print the tables; with ``--run`` after running what the results do not have."""
    parser = argparse.ArgumentParser(description="The simulations of Simchoni & Rosset (2021, 2023).")
    parser.add_argument("--run", action="store_true", help="run what the results do not have")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--methods", nargs="+", choices=["floor", *BASELINES, *OURS])
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--epochs", type=int, help="fewer epochs than the recipe has")
    parser.add_argument("--repetitions", type=int, help="fewer or more repetitions than planned")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # after its import
    for name in options.tables:
        jobs = [job for job in TABLES[name] if options.only in str(job.setting)]
        if options.methods:
            jobs = [job for job in jobs if job.method in options.methods]
        if not jobs:
            continue
        done, rows = read(options.results), options.rows * TIMES.get(name, 1)
        most = max(options.repetitions or job.repetitions for job in jobs)
        for repetition in range(most if options.run else 0):
            for job in jobs:
                key = (name, str(job.setting), job.method, rows, options.epochs or 0, repetition)
                if repetition < (options.repetitions or job.repetitions) and key not in done.index:
                    for method, outcome in compute(job, rows, options.epochs, repetition).items():
                        append(options.results, (*key[:2], method, *key[3:]), outcome)
        print_table(name, jobs, read(options.results), rows, options.epochs or 0)


def compute(job: Job, rows: int, epochs: int | None, repetition: int) -> dict[str, Outcome]:
    """One repetition of one cell, by method."""
    setting = job.setting._replace(levels=tuple(max(2, q * rows // ROWS) for q in job.setting.levels))
    parts = train, validation, test = simulate(setting, rows, repetition)
    if job.method == "floor":
        mse, variances = floor(setting, join(train, validation), test, refit=len(setting.levels) == 1)
        return {"floor": Outcome(mse, variances=variances)}
    recipe = RECIPES[job.recipe]
    if epochs is not None:
        recipe = recipe._replace(epochs=epochs, steps=epochs)
    last_layer = job.recipe == "papers"
    return run(job.method, recipe, setting.effects, parts, repetition, job.blocks, job.refit, last_layer)


# ---- results ---------------------------------------------------------------------------------------------------------

KEY = ["table", "setting", "method", "rows", "epochs", "repetition"]
VALUES = ["mse", "error_f", "variances", "trained", "epochs_run", "seconds", "run"]


def append(path: Path, key: tuple, outcome: Outcome) -> None:
    """Add a line to the results and say so."""
    texts = [";".join(f"{name}={x:.4f}" for name, x in found.items()) for found in (outcome.variances, outcome.trained)]
    error_f = "" if outcome.error_f != outcome.error_f else f"{outcome.error_f:.4f}"
    line = [*key, f"{outcome.mse:.4f}", error_f, *texts, outcome.epochs, f"{outcome.seconds:.1f}", origin()]
    fresh = not path.exists()
    with path.open("a") as file:
        file.write((",".join(KEY + VALUES) + "\n") * fresh + ",".join(map(str, line)) + "\n")
    print(f"{key[0]:12s} {key[1]:40s} {key[2]:12s} {key[5]}  {outcome.mse:.4f}  {outcome.seconds:.0f} s", flush=True)


def origin() -> str:
    """Date, versions and machine of a result."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "lightning")]
    return "; ".join([f"{date.today()}", *versions, (models or [platform.machine()])[0], f"{os.cpu_count()} cores"])


def read(path: Path) -> pd.DataFrame:
    """The results by table, setting, method, rows, epochs and repetition."""
    if not path.exists():
        return pd.DataFrame(columns=KEY + VALUES).set_index(KEY)
    return pd.read_csv(path, keep_default_na=False).set_index(KEY).sort_index()


def print_table(name: str, jobs: list[Job], results: pd.DataFrame, rows: int, epochs: int) -> None:
    """Mean test errors beside the published ones, then the variances."""
    methods = [*dict.fromkeys(job.method for job in jobs), *(["last layer"] if name == "papers" else [])]
    theirs = ["ignore", "one-hot", "embedding", "lme4", "LMMNN"]
    print(f"\n{TITLES[name]}: mean test error (repetitions){'; published' * (name != 'modes')}\n")
    _line(["setting", *methods, *(f"{m} publ." for m in theirs)])
    _line(["---"] * (1 + len(methods) + len(theirs)))
    settings = list(dict.fromkeys(job.setting for job in jobs))
    found = {(s, m): results[(results.index.get_level_values("table") == name)
                             & (results.index.get_level_values("setting") == str(s))
                             & (results.index.get_level_values("method") == m)
                             & (results.index.get_level_values("rows") == rows)
                             & (results.index.get_level_values("epochs") == epochs)]
             for s in settings for m in methods}  # fmt: skip
    for s in settings:
        cells = [found[s, m] for m in methods]
        publ = published.ERRORS.get(_published(s), {})
        _line([str(s), *(f"{c.mse.astype(float).mean():.3f} ({len(c)})" if len(c) else "" for c in cells),
               *("" if publ.get(m) is None else f"{publ[m]:.3f}" for m in theirs)])  # fmt: skip
    for where in sorted({where for cell in found.values() for where in cell.run}):
        print(f"\nRun: {where}")
    ours = [(s, m) for s in settings for m in methods if any(found[s, m].variances + found[s, m].trained)]
    if not ours:
        return
    print("\nMean estimates (standard errors) after the refit, and before it; the floor's are REML with f known\n")
    _line(["setting", "method", "after the refit", "in training", "error of f"])
    _line(["---"] * 5)
    for s, m in ours:
        cell = found[s, m]
        errors = [float(x) for x in cell.error_f if x != ""]
        _line([str(s), m, _mean(cell.variances), _mean(cell.trained), f"{fmean(errors):.4f}" if errors else ""])
        if m == "batch" and _published(s) in published.VARIANCES:
            _line([str(s), "LMMNN publ.", "", " ".join(map(str, published.VARIANCES[_published(s)])), ""])


def _published(setting: Setting) -> Setting:
    """The setting by whose name the published results are."""
    return setting._replace(crossed=False, time=setting.time and "longest")


def _mean(texts: pd.Series) -> str:
    """Means of ``name=value;name=value`` and their standard errors, by name."""
    rows = [dict(part.split("=") for part in text.split(";")) for text in texts if text]
    found = pd.DataFrame(rows).astype(float)
    error = found.std() / math.sqrt(max(len(found), 1))
    return ", ".join(f"{name} {found[name].mean():.3f}" + f" ({error[name]:.3f})" * (len(found) > 1) for name in found)


def _line(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
