"""What a fit is to the runner, and what the runner reports of it."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Fit:
    """A program about to fit a workload.

    Attributes:
        run: The fit, which is timed; returns whatever the program gives.
        report: From that, fields of `Outcome`: ``variances``, ``loglik``, ``iterations``, ``solver``, ``seconds``.
    """

    run: Callable[[], Any]
    report: Callable[[Any], dict[str, Any]]


@dataclass
class Outcome:
    """What one program did with one workload.

    Attributes:
        program: Its name.
        version: Its version.
        seconds: Of each repetition.
        variances: Estimates by name, the same names in every program.
        loglik: ℓ with the constants of `openreml_nn.REML` (of `ML` where the program has ML only).
        iterations: Steps or evaluations, where the program tells.
        solver: Which way was taken.
        peak: Peak memory of the process, in MiB.
        above: The same above the level before the first fit.
        missing: Why it could not be imported.
        failed: Why it could not fit.
        note: What else there is to say.
    """

    program: str
    version: str = ""
    seconds: list[float] = field(default_factory=list)
    variances: dict[str, float] = field(default_factory=dict)
    loglik: float = math.nan
    iterations: int = -1
    solver: str = ""
    peak: float = math.nan
    above: float = math.nan
    missing: str = ""
    failed: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def lower_triangle(prefix: str, matrix: Any) -> dict[str, float]:
    """Elements of the lower triangle of a symmetric matrix by name: ``g00``, ``g10``, ``g11``, …."""
    return {f"{prefix}{i}{j}": float(matrix[i][j]) for i in range(len(matrix)) for j in range(i + 1)}
