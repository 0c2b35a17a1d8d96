"""A fit on paper: the summary that is printed, and the files that are written."""

import json
import math
import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from openreml_nn.result import FitResult

FILES = ("variance_parameters.csv", "fixed_effects.csv", "random_effects.csv", "fit.json")


def summary(result: FitResult) -> str:
    """The fit as a text: likelihood, how it ended, variance parameters, fixed effects."""
    ended = "Converged" if result.converged else "NOT CONVERGED"
    steps = f"{result.n_iter} step" + "s" * (result.n_iter != 1)
    lines = [
        f"Linear mixed model by {result.objective.method} ({result.objective.solver.name} solver)",
        f"n = {result.n}, rank of X = {result.p}, variance parameters = {result.num_variance_parameters}",
        f"log-likelihood = {result.loglik:.4f}, AIC = {result.AIC:.2f}, BIC = {result.BIC:.2f}",
        f"{ended} after {steps}: {result.reason}.",
        "",
        "Variance parameters",
        _variance_table(result.variance),
        "",
        "Fixed effects",
        _aligned(result.fixed_effects.rename(columns={"std_error": "std. error"})) if result.p else "  none",
    ]
    if result.aliased:
        lines.append(f"Aliased, dropped: {', '.join(result.aliased)}")
    return "\n".join(lines)


def _variance_table(variance: pd.DataFrame) -> str:
    table = variance.rename(columns={"std_error": "std. error"}).drop(columns=["boundary", "fixed"])
    table["share"] = [f"{100 * share:.1f} %" if math.isfinite(share) else "" for share in table["share"]]
    table["note"] = [
        "boundary" if boundary else "fixed" if fixed else ""
        for boundary, fixed in zip(variance["boundary"], variance["fixed"], strict=True)
    ]
    return _aligned(table if (table["note"] != "").any() else table.drop(columns="note"))


def _aligned(table: pd.DataFrame) -> str:
    """The table with numbers to six digits and names to the left."""
    text = table.copy()
    for column in text.columns:
        if text[column].dtype.kind == "f":
            text[column] = [f"{value:.6g}" if math.isfinite(value) else "-" for value in text[column]]
    width = max(len(str(name)) for name in text["name"])
    text["name"] = [f"{name:<{width}}" for name in text["name"]]
    rows = text.rename(columns={"name": f"{'name':<{width}}"}).to_string(index=False)
    return "\n".join(f"  {row.strip() if i == 0 and not row.strip() else row}" for i, row in enumerate(rows.split("\n")))


def fit_record(result: FitResult) -> dict[str, Any]:
    """What ``fit.json`` holds."""
    return {
        "method": result.objective.method,
        "loglik": result.loglik,
        "n": result.n,
        "p": result.p,
        "aliased": result.aliased,
        "AIC": result.AIC,
        "BIC": result.BIC,
        "converged": result.converged,
        "reason": result.reason,
        "iterations": result.n_iter,
        "solver": result.objective.solver.name,
        "seconds": None if math.isnan(result.seconds) else result.seconds,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }


_PACKAGES = ("openreml_nn", "torch", "lightning", "numpy", "pandas")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_result(result: FitResult, folder: str | Path) -> list[Path]:
    """Write ``variance_parameters.csv``, ``fixed_effects.csv``, ``random_effects.csv`` and, last, ``fit.json``.

    Each file is complete or not there: it is written beside its place and then moved.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [
        result.variance.to_csv(index=False),
        result.fixed_effects.to_csv(index=False),
        result.blup().to_csv(index=False),
        json.dumps(fit_record(result), indent=2) + "\n",
    ]
    return [write_text(folder / name, text) for name, text in zip(FILES, texts, strict=True)]


def write_text(path: Path, text: str) -> Path:
    """Write a file so that another process sees the old one or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
