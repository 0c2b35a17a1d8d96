"""Whole fits by this project and by the peers that are installed: same data, same machine, one run.

Every program runs in a process of its own, reads the same data, fits once to warm up and then as often as --repeats
says (a fit of more than 25 s is not repeated). Told is the median of the seconds of the whole fit from arrays or a data
frame in memory, without importing and reading; ours includes standard errors. Everything is in float64, with --threads
threads that do not spin while they wait. A peer that is missing is listed with what its import said, one that fails is
listed with its message. The estimates are compared with ours, with those of maximum likelihood for programs that have
no other: digits of the variance parameters (at least 3.3, which is 5e-4 relative, small ones on the scale of a tenth of
the largest) and ℓ (1e-6 relative); what falls short has an exclamation mark. Exit code 1 where something does, or where
a fit of ours fails.

    python scripts/benchmark_peers.py [--workload NAME …] [--peers-python PATH …] [--insteval FILE] [--small]

Workloads:
    insteval       y ~ service + (1 | s) + (1 | d), 73,421 ratings (GPBoost by ML)
    insteval_dept  the same with service × dept fixed
    million        1,000,000 rows, 100,000 subjects with correlated intercept and slope, from arrays and from a table
    kernel         n individuals with a known relationship K; the same K again; one eigh of the same size
    alpha          one alpha-lattice trial of 288, 1152 and 4608 plots: random gen and rep:block
    trials         as many plots in trials of 72, each with genotypes of its own
    trials24       the same with the same 24 genotypes in all trials
    ar1            2,000 subjects × 10: AR(1) residual and random intercept
    traits         4 traits, Σ_g ⊗ K + Σ_e ⊗ I, both unstructured
    dense          one step on a dense V with 6 factors, beside one Cholesky and inverse
    markers        a kernel given by markers, 50,000 × 5,000; ours only
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
from peers.report import Outcome
from peers.tables import lines
from peers.workloads import Data, insteval, save, sizes

SCRIPTS = Path(__file__).resolve().parent
OURS = ("openreml_nn", "Cholesky", "torch.linalg")  # programs of the interpreter that runs this script
OF_R = ("lme4", "nlme")
INSTEVAL = [
    "openreml_nn", "openreml_nn, table", "openreml_nn, ML", "gpboost, ML", "gpboost exact, ML", "mixedlm", "lme4",
]  # fmt: skip
LATTICE = ["openreml_nn", "openreml_nn, table", "mixedlm", "lme4", "lme-python", "pyreml", "torch-openreml"]
PROGRAMS = {
    "insteval": INSTEVAL,
    "insteval_dept": INSTEVAL,
    "million": [
        "openreml_nn", "openreml_nn, table", "mixedlm-rs", "mixedlm-rs, formula", "mixedlm", "lme-python", "lme4",
    ],
    "kernel": [
        "openreml_nn", "openreml_nn, again", "torch.linalg.eigh", "jamma", "fastlmm", "pyreml", "torch-openreml",
    ],
    "alpha": LATTICE,
    "trials": LATTICE,
    "trials24": LATTICE,
    "ar1": ["openreml_nn", "openreml_nn, table", "nlme"],
    "traits": ["openreml_nn", "openreml_nn, table", "pyreml"],
    "dense": ["openreml_nn, step", "Cholesky + inverse", "torch-openreml, step"],
    "markers": ["openreml_nn"],
}  # fmt: skip
MOST_ROWS = {  # above this a program would take minutes, or more memory than there is
    ("torch-openreml", "alpha"): 1152,
    ("torch-openreml", "trials"): 1152,
    ("torch-openreml", "trials24"): 1152,
    ("torch-openreml", "kernel"): 4000,
    ("pyreml", "alpha"): 1152,
    ("pyreml", "trials"): 1152,
    ("pyreml", "kernel"): 4000,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), metavar="NAME")
    parser.add_argument("--peers-python", nargs="+", default=[sys.executable], metavar="PATH",
                        help="interpreters with Python peers; the first that can import a peer runs it")  # fmt: skip
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only these peers; none after it: ours alone")
    parser.add_argument("--insteval", type=Path, metavar="FILE", help="InstEval as .csv(.gz); from R where left out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that one program may take (default 900)")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--largest", action="store_true", help="the kernel with n = 8000 too")
    parser.add_argument("--markers", type=int, nargs=2, default=(50_000, 5_000), metavar=("ROWS", "MARKERS"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    print("\n".join(header(options)))
    fine, written = True, []
    for workload in options.workload:
        makers = instevals(workload, options) if workload.startswith("insteval") else sizes(
            workload, options.small, options.largest, tuple(options.markers))  # fmt: skip
        for make in makers:
            data = make()
            outcomes = run_all(data, options)
            table, agree = lines(outcomes)
            print("\n".join([f"\n{workload}: {data.size}", *table]), flush=True)
            fine &= agree and bool(outcomes[0].seconds)
            written.append({"workload": workload, "size": data.size, "outcomes": [o.as_dict() for o in outcomes]})
            if options.json:
                options.json.write_text(json.dumps(written, indent=1))
    return 0 if fine else 1


def header(options: argparse.Namespace) -> list[str]:
    """Machine, versions and date."""
    try:
        models = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")]  # fmt: skip
    except OSError:
        models = []
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("openreml_nn", "torch", "numpy"))
    return [
        f"{date.today()}, {(models or [platform.machine()])[0]}, {os.cpu_count()} cores, {platform.system()}",
        f"Python {platform.python_version()}, {versions}",
        f"float64, {options.threads} threads, medians of {options.repeats}{', SMALL SIZES' if options.small else ''}",
    ]


def instevals(workload: str, options: argparse.Namespace) -> list[Callable[[], Data]]:
    """What makes the InstEval workload; nothing, with a message, where the data are not to be had."""
    with tempfile.TemporaryDirectory() as folder:
        path = options.insteval or exported(Path(folder) / "insteval.csv")
        if path is None:
            print(f"\n{workload}: left out, there is neither --insteval FILE nor R with lme4")
            return []
        frame = pd.read_csv(path)
    if options.small:
        frame = frame[frame["s"] % 10 == 0]
    table = {name: frame[name].to_numpy() for name in ("y", "s", "d", "service", "dept")}
    table["y"] = table["y"].astype(np.float64)
    return [lambda: insteval(table, workload == "insteval_dept")]


def exported(path: Path) -> Path | None:
    """InstEval from R's lme4; None where it is not installed."""
    rscript = shutil.which("Rscript")
    columns = 'c("y", "s", "d", "service", "dept")'
    code = f'write.csv(lme4::InstEval[{columns}], "{path.as_posix()}", row.names = FALSE)'
    done = subprocess.run([rscript, "-e", code], capture_output=True, check=False) if rscript else None
    return path if done and done.returncode == 0 else None


def run_all(data: Data, options: argparse.Namespace) -> list[Outcome]:
    """Every program on one workload."""
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(data, folder)
        pd.DataFrame(data.table).to_csv(folder / "table.csv", index=False)
        for program in PROGRAMS[data.workload]:
            chosen = program.startswith(OURS) or options.peers is None or re.split("[, ]", program)[0] in options.peers
            if chosen and data.n <= MOST_ROWS.get((program, data.workload), data.n):
                print(f"  {data.workload}, {data.size}: {program} …", file=sys.stderr, flush=True)
                outcomes.append(run_one(program, folder, options))
    return outcomes


def run_one(program: str, folder: Path, options: argparse.Namespace) -> Outcome:
    """One program, in the first interpreter in which it can be imported."""
    if program.startswith(OF_R):
        rscript = shutil.which("Rscript")
        if rscript is None:
            return Outcome(program, missing="no Rscript")
        command = [rscript, str(SCRIPTS / "peers" / "fit.R"), program, str(folder), str(options.repeats)]
        return outcome_of(program, command, folder, options)
    outcome = Outcome(program)
    for python in [sys.executable] if program.startswith(OURS) else options.peers_python:
        command = [python, "-m", "peers.runner", program, str(folder), "--repeats", str(options.repeats),
                   "--threads", str(options.threads)]  # fmt: skip
        outcome = outcome_of(program, command, folder, options)
        if not outcome.missing:
            break
    return outcome


def outcome_of(program: str, command: list[str], folder: Path, options: argparse.Namespace) -> Outcome:
    """Run a command that writes ``result.json``; what goes wrong becomes the outcome."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    libraries = ("OMP", "OPENBLAS", "MKL", "RAYON", "NUMEXPR")
    threads = {f"{library}_NUM_THREADS": str(options.threads) for library in libraries}
    threads |= {"OMP_WAIT_POLICY": "PASSIVE", "POLARS_MAX_THREADS": str(options.threads)}
    paths = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)]) if command[0] == sys.executable else str(SCRIPTS)
    try:
        done = subprocess.run(command, env=os.environ | threads | {"PYTHONPATH": paths}, capture_output=True, text=True,
                              errors="replace", timeout=options.timeout, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome(program, failed=f"stopped after {options.timeout:g} s")
    except OSError as error:
        return Outcome(program, missing=str(error))
    if not result.exists():
        said = done.stderr.strip().splitlines()
        return Outcome(program, failed=f"exit code {done.returncode}: {said[-1] if said else 'nothing said'}")
    return Outcome(**json.loads(result.read_text()))


if __name__ == "__main__":
    sys.exit(main())
