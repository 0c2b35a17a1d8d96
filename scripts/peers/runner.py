"""Fit one workload with one program in this process, several times, and report it.

    PYTHONPATH=scripts python -m peers.runner PROGRAM FOLDER [--repeats N] [--threads N]

FOLDER holds the data and gets ``result.json``. A first fit warms up; a fit that takes longer than LONG seconds is not
repeated, and the first one is what is reported. Seconds are those of the whole fit from arrays or a data frame in
memory; memory is the peak of this process during the fits. A program that cannot be imported is reported as missing.
"""

import argparse
import json
import math
import time
import traceback
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from peers.report import Fit, Outcome
from peers.workloads import load

LONG = 25.0
PROGRAMS = {  # name: (module of its adapter, function of it, the distribution whose version is told)
    "openreml_nn": ("peers.ours", "arrays", "openreml_nn"),
    "openreml_nn, table": ("peers.ours", "table", "openreml_nn"),
    "openreml_nn, ML": ("peers.ours", "arrays_ml", "openreml_nn"),
    "openreml_nn, again": ("peers.ours", "again", "openreml_nn"),
    "openreml_nn, step": ("peers.steps", "ours", "openreml_nn"),
    "torch-openreml, step": ("peers.steps", "torch_openreml", "torch-openreml"),
    "Cholesky + inverse": ("peers.steps", "cholesky", "torch"),
    "torch.linalg.eigh": ("peers.kernels", "eigh", "torch"),
    "jamma": ("peers.kernels", "jamma", "jamma"),
    "fastlmm": ("peers.kernels", "fastlmm", "fastlmm"),
    "pyreml": ("peers.torch_peers", "pyreml", "pyreml"),
    "torch-openreml": ("peers.torch_peers", "torch_openreml", "torch-openreml"),
    "gpboost, ML": ("peers.grouped", "gpboost", "gpboost"),
    "gpboost exact, ML": ("peers.grouped", "gpboost_exact", "gpboost"),
    "mixedlm": ("peers.grouped", "mixedlm", "mixedlm"),
    "mixedlm-rs": ("peers.grouped", "mixedlm_rs_arrays", "mixedlm-rs"),
    "mixedlm-rs, formula": ("peers.grouped", "mixedlm_rs_formula", "mixedlm-rs"),
    "lme-python": ("peers.grouped", "lme_python", "lme_python"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    module, function, distribution = PROGRAMS[options.program]
    outcome = Outcome(options.program)
    try:
        outcome.version = metadata.version(distribution)
        fit: Fit = getattr(import_module(module), function)(load(options.folder), options.threads)
    except (ImportError, SyntaxError, metadata.PackageNotFoundError) as error:
        outcome.missing = f"{type(error).__name__}: {error}"
    except Exception as error:
        outcome.failed = _told(error)
    else:
        try:
            measure(fit, options.repeats, outcome)
        except Exception as error:
            outcome.failed = _told(error)
    (options.folder / "result.json").write_text(json.dumps(outcome.as_dict()))


def measure(fit: Fit, repeats: int, outcome: Outcome) -> None:
    """Time the fits and report the last one."""
    before = reset_peak()
    seconds: list[float] = []
    fitted: Any = None
    for turn in range(repeats + 1):
        fitted = None  # the memory of one fit is not that of two
        began = time.perf_counter()
        fitted = fit.run()
        elapsed = time.perf_counter() - began
        if turn or elapsed > LONG:
            seconds.append(elapsed)
        if elapsed > LONG:
            break
    outcome.peak = status("VmHWM")
    outcome.above = outcome.peak - before
    outcome.seconds = seconds
    for name, value in fit.report(fitted).items():
        setattr(outcome, name, value)


def reset_peak() -> float:
    """Forget the peak memory of this process so far; returns what it uses now, in MiB (NaN where there is no /proc)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    return status("VmRSS")


def status(field: str) -> float:
    """A field of this process's status, in MiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _told(error: Exception) -> str:
    """What an error says, and the innermost line of ours that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "peers" in Path(frame.filename).parts]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


if __name__ == "__main__":
    main()
