"""Fit every model of a case file from its structured form and compare with the fits of other programs.

    python scripts/check_references.py --cases FILE [--solver NAME | all] [--only NAME …] [--most-rows N]

A case file is a JSON list of data set, model in structured form and reference fit; data paths are relative to its
folder. Each model is built from the structured form alone, fitted from its default start, and evaluated away from the
optimum. The table shows matching digits: of ℓ (relative), the natural variance parameters (relative, small ones to
1e-3 of the largest), β (in standard errors) and its standard errors, the BLUPs (relative to the largest of the term), ℓ
and score at the probe, and the average information at the reference. With ``--solver all`` it has a column for each
solver and the fewest of these digits. An exclamation mark stands where digits do not suffice. A case that a solver
cannot take is told with its reason, and counts neither as passed nor as short. Exit code 1 when a case falls short.
"""

import argparse
import copy
import json
import logging
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from openreml_nn import FitResult, fit
from openreml_nn.covariance import (
    AR1Matrix,
    CompoundSymmetricMatrix,
    DiagonalMatrix,
    ExponentialMatrix,
    FactorAnalyticMatrix,
    GaussianMatrix,
    Matrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.data import Kernel, MixedModel, Structure, Term, read_table
from openreml_nn.fit import OBJECTIVES
from openreml_nn.likelihood import average_information
from openreml_nn.solvers import SOLVERS, Solver

STRUCTURES: dict[str, Structure] = {
    "us": UnstructuredMatrix,
    "diag": DiagonalMatrix,
    "cs": CompoundSymmetricMatrix,
    "ar1": AR1Matrix,
    "exp": ExponentialMatrix,
    "gau": GaussianMatrix,
    "fa1": partial(FactorAnalyticMatrix, k=1),
}
HAS_VARIANCE = ("cs", "ar1", "exp", "gau")  # structures with a sigma^2 of their own, before their `params`
NEEDED = {"loglik": 1e-8, "variance": 1e-5, "beta": 1e-6, "se": 1e-6, "blup": 1e-5, "probe": 1e-8, "score": 1e-7,
          "AI": 1e-7}  # fmt: skip
SINGULAR = 1e-4  # for variance parameters of a case that its notes call singular, or with one on a boundary


@dataclass
class Model:
    """A case as a model: data, the term of each part of V, and the reference's name of each natural parameter."""

    data: MixedModel
    method: str
    parameters: list[str | None]


@dataclass
class Outcome:
    """What a solver made of a case.

    Attributes:
        case: Name of the case.
        rows: Number of observations.
        kind: ``"passed"``, ``"short"``, ``"cannot take"`` or ``"left out"``.
        said: How the fit ended, or why there is none.
        marks: Matching digits by quantity, with an exclamation mark where they do not suffice.
        steps: Steps of the optimiser.
        seconds: Of building, fitting and comparing.
    """

    case: str
    rows: int
    kind: str
    said: str
    marks: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    seconds: float = math.nan

    @property
    def line(self) -> str:
        """A line of the table of one solver."""
        start = f"{self.case:20}{self.rows:6d} "
        if not self.marks:
            return f"{start}{self.kind}: {self.said}"
        cells = "".join(f"{self.marks[name]:>9}" for name in NEEDED)
        return f"{start}{cells}{self.steps:7d}{self.seconds:8.2f}  {self.said}"

    @property
    def worst(self) -> str:
        """The fewest matching digits, or what kind of outcome it is where there are none."""
        digits = [float(mark.rstrip("!")) for mark in self.marks.values() if mark not in ("-", "free")]
        return f"{min(digits):.1f}" + "!" * (self.kind == "short") if digits else self.kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--solver", default="auto", choices=["auto", *SOLVERS, "all"], metavar="NAME")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--most-rows", type=int, default=8000,
                        help="leave out larger cases for the dense solver (default 8000)")  # fmt: skip
    options = parser.parse_args()
    cases = json.loads(options.cases.read_text())
    unknown = set(options.only or []) - {case["name"] for case in cases}
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    logging.getLogger("openreml_nn").setLevel(logging.ERROR)  # columns of whole numbers, dropped rows
    chosen = [case for case in cases if not options.only or case["name"] in options.only]
    solvers = ["auto", *SOLVERS] if options.solver == "all" else [options.solver]
    tables: dict[str, list[Outcome]] = {solver: [] for solver in solvers}
    print(header(solvers))
    for case in chosen:
        for solver in solvers:
            tables[solver].append(attempt(case, options.cases.parent, solver, options.most_rows))
        last = [outcomes[-1] for outcomes in tables.values()]
        wide = f"{last[0].case:20}{last[0].rows:6d} " + "".join(f"{outcome.worst:>23}" for outcome in last)
        print(last[0].line if len(solvers) == 1 else wide, flush=True)
    for solver, outcomes in tables.items():
        print((f"{solver}: " if len(solvers) > 1 else "") + counts(outcomes))
    return int(any(outcome.kind == "short" for outcomes in tables.values() for outcome in outcomes))


def header(solvers: list[str]) -> str:
    """Names of the columns."""
    start = f"{'case':20}{'n':>6} "
    if len(solvers) > 1:
        return start + "".join(f"{solver:>23}" for solver in solvers)
    return start + "".join(f"{name:>9}" for name in NEEDED) + "  steps seconds  ended"


def counts(outcomes: Iterable[Outcome]) -> str:
    """How many outcomes there are of each kind, and which cases are short."""
    outcomes = list(outcomes)
    kinds = Counter(outcome.kind for outcome in outcomes)
    short = ", ".join(outcome.case for outcome in outcomes if outcome.kind == "short")
    told = [f"{kinds['passed']} passed", f"{kinds['short']} short" + (f" ({short})" if short else "")]
    return ", ".join(told + [f"{kinds[kind]} {kind}" for kind in ("cannot take", "left out") if kinds[kind]])


def attempt(case: dict[str, Any], folder: Path, solver: str, most_rows: int) -> Outcome:
    """Fit and compare a case, if the solver takes it."""
    name, rows = case["name"], case["reference"]["n"]
    if solver == "dense" and rows > most_rows:
        return Outcome(name, rows, "left out", f"more than {most_rows} rows")
    began = time.perf_counter()
    reason = refusal(case, folder, solver)
    if reason is not None:
        return Outcome(name, rows, "cannot take", reason)
    try:
        errors, result = check(case, folder, solver)
    except (ValueError, MemoryError) as error:
        return Outcome(name, rows, "short", f"FAILED: {error}")
    tolerances = needed(case)
    marks = {name: cell(errors.get(name), tolerances[name]) for name in NEEDED}
    bad = not result.converged or any(mark.endswith("!") for mark in marks.values())
    seconds = time.perf_counter() - began
    return Outcome(name, rows, "short" if bad else "passed", result.reason, marks, result.n_iter, seconds)


def refusal(case: dict[str, Any], folder: Path, solver: str) -> str | None:
    """Why a solver cannot take a case, None where it can."""
    return None if solver == "auto" else SOLVERS[solver]().refusal(build(case, folder).data.V)


def cell(error: float | None, tolerance: float) -> str:
    """Matching digits, marked where they do not suffice; a dash where the case has no such reference."""
    if error is None:
        return "-"
    if math.isinf(tolerance):
        return "free"
    digits = 16.0 if error == 0 else min(16.0, -math.log10(error)) if math.isfinite(error) else 0.0
    return f"{digits:.1f}" + ("" if error <= tolerance else "!")


def needed(case: dict[str, Any]) -> dict[str, float]:
    """Tolerances of a case."""
    singular = "boundary" in case or any("singular" in note for note in case.get("notes", []))
    tolerances = NEEDED | ({"variance": SINGULAR} if singular else {})
    published = case["tolerance"].get("varpar_rel")
    if published is not None and published > NEEDED["variance"]:  # the reference itself is no better
        tolerances |= {"variance": max(tolerances["variance"], published), "se": published}
    if "nist" in case:  # against the exact answer for the data as float64 holds them
        tolerances["variance"] = case["tolerance"]["varpar_rel_vs_float64_input_answer"]
        tolerances |= dict.fromkeys(("beta", "se", "blup"), math.inf)
    return tolerances


# ---- from the structured form to a model -----------------------------------------------------------------------------


def build(case: dict[str, Any], folder: Path) -> Model:
    """The model of a case."""
    case = copy.deepcopy(case)
    table = read_table(folder / case["data"])
    for column, levels in case["factors"].items():
        table[column] = pd.Categorical(table[column].astype("string"), categories=[str(level) for level in levels])
    for dim in (dim for term in case["random"] + case["residual"] for dim in term["dims"]):
        if dim["type"] in ("us", "diag", "fa1") and not isinstance(dim["by"], list):
            dim["by"] = ordered_column(table, dim)
    random = {term["name"]: term_of(term, folder, residual=False) for term in case["random"]}
    residual = {term["name"]: term_of(term, folder, residual=True) for term in case["residual"]}
    data = MixedModel(table, case["fixed"], random, residual, missing="drop")
    parameters = [name for term in case["random"] + case["residual"] for name in parameters_of(term)]
    return Model(data, case["method"], parameters)


def ordered_column(table: pd.DataFrame, dim: dict[str, Any]) -> str:
    """The column of a dim with its levels in the order of its parameters; a new one if the fixed part has another."""
    column, levels = dim["by"], dim.get("levels")
    if levels is None or list(pd.Categorical(table[column]).categories.astype(str)) == levels:
        return column
    table[f"{column} in order"] = pd.Categorical(table[column].astype("string"), categories=levels)
    return f"{column} in order"


def term_of(term: dict[str, Any], folder: Path, residual: bool) -> Term:
    """The `Term` of Σ variance × ∘_d Z_d C_d Z_d'."""
    groups: list[str] = []
    relationship, structured = None, []
    for dim in term["dims"]:
        numeric = isinstance(dim["by"], list) and dim["type"] in ("us", "diag", "identity")
        if dim["type"] == "kernel":
            groups, relationship = [*groups, dim["by"]], Kernel(folder / dim["file"])
        elif dim["type"] == "identity" and not isinstance(dim["by"], list):
            groups += [] if dim["by"] == "units" else dim["by"].split(":")
        else:
            structured.append((dim, numeric))
    where: dict[str, Any] = {"groups": groups or None, "relationship": relationship}
    if not structured:
        return Term(**where)
    if all(numeric for _, numeric in structured):
        ((dim, _),) = structured
        design = " + ".join(dim["by"]) if "1" in dim["by"] else " + ".join(["0", *dim["by"]])
        return Term(design=design, covariance=STRUCTURES.get(dim["type"]), **where)
    if residual and not groups and [dim["type"] for dim, _ in structured] == ["diag"]:
        return Term(design=f"0 + {structured[0][0]['by']}")
    if len(structured) == 1:
        return Term(within=structured[0][0]["by"], covariance=STRUCTURES[structured[0][0]["type"]], **where)
    return Term(within={dim["by"]: STRUCTURES[dim["type"]] for dim, _ in structured}, **where)


def parameters_of(term: dict[str, Any]) -> list[str | None]:
    """The reference's names of the natural parameters of a term, in our order; None for a scale that is held at 1."""
    names: list[str | None] = []
    for dim in term["dims"]:
        if dim["type"] in HAS_VARIANCE:
            names.append(term["variance"] if term["variance"] not in names else None)
        if dim["type"] == "kernel" and names:
            names.append(None)
        names += dim.get("params", [])
    return names or [term["variance"]]


# ---- comparison ------------------------------------------------------------------------------------------------------


def check(case: dict[str, Any], folder: Path, solver: str | Solver) -> tuple[dict[str, float], FitResult]:
    """Errors of a fit and of evaluations against the reference of a case."""
    model = build(case, folder)
    V, reference = model.data.V, case["reference"]
    if "fixed_params" in case:
        V.set_theta(raw(V, model, case["fixed_params"]))
        V.set_no_grad(list(range(V.num_params)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="X is rank deficient")
        result = fit(V, model.data.y, model.data.X, method=model.method, solver=solver, x_names=model.data.x_names)
    errors = compare_fit(case, model, result)
    if "probe" in case:
        errors |= compare_probe(case["probe"], model, result)
    if "average_information_matrix" in reference and "boundary" not in case and "fixed_params" not in case:
        errors |= compare_information(reference, model, result)
    return errors, result


def compare_fit(case: dict[str, Any], model: Model, result: FitResult) -> dict[str, float]:
    """Errors of ℓ, variance parameters, β, its standard errors and the BLUPs."""
    reference = case["reference"]
    values = dict(reference["varpars"])
    loglik = reference["loglik"]
    if "nist" in case:
        exact = case["nist"]["float64_input_exact_answer"]
        values, loglik = {name: float(exact[name]) for name in values}, float(exact["loglik"])
    estimates = result.variance["estimate"].to_numpy()
    pairs = [(e, values[n]) for e, n in zip(estimates, model.parameters, strict=True) if n is not None]
    small = 1e-3 * max(abs(value) for value in values.values())
    beta, blup = compare_fixed(reference, result), compare_blups(case, result)
    return beta | blup | {
        "loglik": abs(result.loglik - loglik) / max(1.0, abs(loglik)),
        "variance": max(abs(ours - theirs) / max(abs(theirs), small) for ours, theirs in pairs),
    }  # fmt: skip


def compare_fixed(reference: dict[str, Any], result: FitResult) -> dict[str, float]:
    """Errors of β̂, in standard errors, and of the standard errors."""
    ours = {plain_name(row["name"]): row for _, row in result.fixed_effects.iterrows()}
    theirs = [row for row in reference["fixed"] if row.get("estimate") is not None]
    if {row["name"] for row in theirs} != set(ours):
        different = sorted({row["name"] for row in theirs} ^ set(ours))
        raise ValueError(f"the fixed effects differ: {different}")
    return {
        "beta": max(abs(ours[row["name"]]["estimate"] - row["estimate"]) / row["se"] for row in theirs),
        "se": max(abs(ours[row["name"]]["std_error"] / row["se"] - 1.0) for row in theirs),
    }


def plain_name(name: str) -> str:
    """R's name of a column of X: ``rep[T.R2]`` is repR2, ``Intercept`` is (Intercept)."""
    return "(Intercept)" if name == "Intercept" else name.replace("[T.", "").replace("[", "").replace("]", "")


def compare_blups(case: dict[str, Any], result: FitResult) -> dict[str, float]:
    """Error of the BLUPs, relative to the largest of their term."""
    worst = []
    terms = {term["name"]: term for term in case["random"]}
    for name, theirs in case["reference"].get("blups", {}).items():
        table = result.blup(name)
        if len(terms[name]["dims"]) > 1:  # labels of several dimensions, "1 | S308"
            effects = table["effect"].replace({"Intercept": "1", "(Intercept)": "1"})
            keys = effects + " | " + table["level"]
        else:
            keys = table["level"]
        ours = dict(zip(keys, table["blup"], strict=True))
        largest = max(abs(value) for value in theirs.values())
        if largest == 0:
            worst.append(max(abs(ours[label]) for label in theirs))
        else:
            worst.append(max(abs(ours[label] - value) for label, value in theirs.items()) / largest)
    return {"blup": max(worst)} if worst else {}


def compare_probe(probe: dict[str, Any], model: Model, result: FitResult) -> dict[str, float]:
    """Errors of ℓ and of its natural score away from the optimum; the score relative to its largest element."""
    objective = OBJECTIVES[model.method](model.data.V, result.objective.solver)
    theta = raw(model.data.V, model, probe["theta"]).requires_grad_()
    loglik = objective.loglik(result.evaluation.problem.evaluate(theta))
    loglik.backward()
    J = jacobian(model, theta)
    free = [i for i, name in enumerate(model.parameters) if name in probe["score"]]
    score = torch.linalg.solve(J[free][:, free].mT, theta.grad[free])  # type: ignore[index]
    theirs = torch.tensor([probe["score"][model.parameters[i]] for i in free], dtype=torch.float64)
    return {
        "probe": abs(loglik.item() - probe["loglik"]) / max(1.0, abs(probe["loglik"])),
        "score": float((score - theirs).abs().max() / theirs.abs().max()),
    }


def compare_information(reference: dict[str, Any], model: Model, result: FitResult) -> dict[str, float]:
    """Error of the natural average information at the reference, relative to its diagonal."""
    theta = raw(model.data.V, model, reference["varpars"])
    AI = average_information(result.evaluation.problem.evaluate(theta))
    free = [i for i, name in enumerate(model.parameters) if name is not None]
    J = jacobian(model, theta)[free][:, free]
    natural = torch.linalg.solve(J.mT, torch.linalg.solve(J.mT, AI.mT).mT)
    order = reference["average_information_matrix"]["order"]
    place = [order.index(model.parameters[i]) for i in free]
    theirs = torch.tensor(reference["average_information_matrix"]["matrix"], dtype=torch.float64)[place][:, place]
    scale = theirs.diagonal().sqrt()
    return {"AI": float(((natural - theirs) / (scale[:, None] * scale)).abs().max())}


def raw(V: Matrix, model: Model, values: dict[str, float]) -> Tensor:
    """Raw thetas at natural values by the reference's names; a variance of 0 is 1e-9 of the largest value."""
    small = 1e-9 * max(abs(value) for value in values.values())
    natural = [1.0 if name is None else values[name] or small for name in model.parameters]
    return V.from_natural(torch.tensor(natural, dtype=torch.float64))


def jacobian(model: Model, theta: Tensor) -> Tensor:
    """∂ natural / ∂θ."""
    V = model.data.V
    assert isinstance(V, Sum)
    return torch.func.jacfwd(V.natural)(theta.detach())


if __name__ == "__main__":
    sys.exit(main())
