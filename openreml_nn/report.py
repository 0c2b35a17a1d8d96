"""A fit on disk: the files that are written for it."""

import json
import math
import os
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

from openreml_nn.result import FitResult

FILES = ("variance_parameters.csv", "fixed_effects.csv", "random_effects.csv", "fit.json")


def fit_record(result: FitResult) -> dict[str, Any]:
    """What ``fit.json`` holds."""
    return {
        "method": result.objective.method,
        "loglik": result.loglik,
        "n": result.n,
        "p": result.p,
        "aliased": result.aliased,
        "AIC": None if result.given else result.AIC,
        "BIC": None if result.given else result.BIC,
        "given": result.given or None,
        "converged": result.converged,
        "reason": result.reason,
        "iterations": result.n_iter,
        "solver": {
            "name": result.objective.solver.name,
            "reason": result.objective.choice.reason,
            "cost": result.objective.choice.cost,
        },
        "sharing": result.sharing or None,
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


def unused(path: Path) -> Path:
    """The path, with the next free number behind its name where there is such a file: ``predictions_2.csv``."""
    names = (path.with_stem(f"{path.stem}_{i}") for i in count(2))
    return next(name for name in chain([path], names) if not name.exists())


def write_text(path: Path, text: str) -> Path:
    """Write a file so that another process sees the old one or the new one, never a part."""
    return write_whole(path, lambda file: file.write(text.encode()))


def write_whole(path: Path, write: Callable[[BinaryIO], Any], *, sync: bool = True) -> Path:
    """Let ``write`` fill a file beside ``path``, and move it there when it is complete.

    Args:
        path: Where the file is to be.
        write: Writes into the open file that it is given.
        sync: Wait until it is on the disk, so that it also outlives a machine that stops.

    Raises:
        OSError: It cannot be written; what was there before is untouched.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
