"""The workloads fitted by this project, from arrays and from a table with a formula."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from openreml_nn import FitResult, fit
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
from openreml_nn.data import Kernel, MixedModel, Term
from openreml_nn.data.effects import hold_scale
from openreml_nn.natural_scale import natural_scale
from peers.report import Fit
from peers.workloads import Data, marker_matrix

CANONICAL = {
    "insteval": ["s", "d", "residual"],
    "million": ["intercept", "covariance", "slope", "residual"],
    "kernel": ["kernel", "residual"],
    "alpha": ["gen", "rep:block", "residual"],
    "ar1": ["intercept", "sigma2", "rho"],
    "traits": [f"{part}{i}{j}" for part in "ge" for i in range(4) for j in range(i + 1)],
    "markers": ["markers", "residual"],
}
CANONICAL |= {"insteval_dept": CANONICAL["insteval"], "trials": CANONICAL["alpha"]}
CANONICAL["trials24"] = CANONICAL["alpha"]


def arrays(data: Data, threads: int, method: str = "REML") -> Fit:
    """Build V from codes and kernels, and fit; all of it is timed."""
    torch.set_num_threads(threads)
    y, X = torch.from_numpy(data.y).to(torch.float64), torch.from_numpy(data.X)
    make = covariance(data)
    return Fit(lambda: finished(fit(make(), y, X, method=method)), partial(report, data))


def arrays_ml(data: Data, threads: int) -> Fit:
    """Full maximum likelihood, to compare with programs that have no other."""
    return arrays(data, threads, "ML")


def table(data: Data, threads: int) -> Fit:
    """From a data frame and a formula."""
    torch.set_num_threads(threads)
    frame, fixed, options = specification(data)

    def run() -> FitResult:
        model = MixedModel(frame, fixed, **options)
        return finished(fit(model.V, model.y, model.X, x_names=model.x_names))

    return Fit(run, partial(report, data))


def again(data: Data, threads: int) -> Fit:
    """Another response and a model with a column less, on the V and on what the first fit reduced."""
    torch.set_num_threads(threads)
    y, X = torch.from_numpy(data.more["y2"]), torch.from_numpy(data.X[:, :-1])
    V = covariance(data)()
    first = fit(V, torch.from_numpy(data.y), torch.from_numpy(data.X))
    solver: Any = first.objective.solver
    reduction = getattr(first.evaluation.problem, "reduction", None)
    note = "another response, a submodel" + ("" if reduction is None else ", K reduced before")
    if reduction is not None:
        solver = type(solver)(reduction)

    def run() -> FitResult:
        V.set_theta(torch.zeros(V.num_params, dtype=torch.float64))
        return finished(fit(V, y, X, solver=solver))

    return Fit(run, lambda result: report(data, result) | {"variances": {}, "loglik": math.nan, "note": note})


def finished(result: FitResult) -> FitResult:
    """A result with the standard errors that it would else compute when asked; without tables, as other programs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _ = natural_scale(result.V, result.theta, result.theta_cov, result.held), result.beta_cov
    return result


def report(data: Data, result: FitResult) -> dict[str, Any]:
    """Estimates under the names that all programs share."""
    variance = result.variance
    free = variance["estimate"][~variance["fixed"]].tolist()
    return {
        "variances": dict(zip(CANONICAL[data.workload], free, strict=True)),
        "loglik": result.loglik,
        "iterations": result.n_iter,
        "solver": result.objective.solver.name,
        "note": "" if result.converged else f"NOT CONVERGED: {result.reason}",
    }


# ---- from arrays -----------------------------------------------------------------------------------------------------


def covariance(data: Data) -> Callable[[], Matrix]:
    """What builds V from arrays; converting the arrays to tensors is not part of it."""
    codes = {name: torch.from_numpy(column) for name, column in data.table.items() if column.dtype.kind in "iu"}
    more = {name: torch.from_numpy(array) for name, array in data.more.items()}
    if data.workload == "markers":
        more["W"] = torch.from_numpy(marker_matrix(data))
    return partial(COVARIANCES[data.workload], data, codes | more)


def intercepts(names: list[str], data: Data, tensors: dict[str, Tensor]) -> Matrix:
    terms: dict[str, Matrix] = {}
    for name in names:
        Z = DummyMatrix(tensors[name] if name in tensors else data.table[name])
        terms[name] = CovariancePropagation(Z, ScalarMatrix(Z.num_levels))
    return Sum(terms | {"residual": ScalarMatrix(data.n)})


def slopes(data: Data, tensors: dict[str, Tensor]) -> Matrix:
    subject = DummyMatrix(tensors["subject"])
    Z = KhatriRaoMatrix(torch.from_numpy(data.X), subject, ["intercept", "slope"])
    G = KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(subject.num_levels))
    return Sum({"subject": CovariancePropagation(Z, G), "residual": ScalarMatrix(data.n)})


def kernel(data: Data, tensors: dict[str, Tensor]) -> Matrix:
    return Sum({"genotype": KnownMatrix(tensors["K"]), "residual": ScalarMatrix(data.n)})


def serial(data: Data, tensors: dict[str, Tensor]) -> Matrix:
    subject, times = DummyMatrix(tensors["subject"]), int(tensors["time"].max()) + 1
    Z = CellMatrix(tensors["time"], subject, [str(time) for time in range(times)])
    R = KroneckerProduct(AR1Matrix(times), IdentityMatrix(subject.num_levels))
    return Sum({
        "subject": CovariancePropagation(subject, ScalarMatrix(subject.num_levels)),
        "residual": CovariancePropagation(Z, R),
    })  # fmt: skip


def several_traits(data: Data, tensors: dict[str, Tensor]) -> Matrix:
    K = KnownMatrix(tensors["K"])
    hold_scale(K)
    count = data.X.shape[1]
    return Sum({
        "genotype": KroneckerProduct(UnstructuredMatrix(count), K),
        "residual": KroneckerProduct(UnstructuredMatrix(count), IdentityMatrix(len(tensors["K"]))),
    })  # fmt: skip


def markers(data: Data, tensors: dict[str, Tensor]) -> Matrix:
    W = tensors["W"]
    return Sum({"markers": CovariancePropagation(W, ScalarMatrix(W.shape[1])), "residual": ScalarMatrix(data.n)})


COVARIANCES: dict[str, Callable[[Data, dict[str, Tensor]], Matrix]] = {
    "insteval": partial(intercepts, ["s", "d"]),
    "insteval_dept": partial(intercepts, ["s", "d"]),
    "million": slopes,
    "kernel": kernel,
    "alpha": partial(intercepts, ["gen", "rep_block"]),
    "trials": partial(intercepts, ["gen", "rep_block"]),
    "trials24": partial(intercepts, ["gen", "rep_block"]),
    "ar1": serial,
    "traits": several_traits,
    "markers": markers,
}


# ---- from a table ----------------------------------------------------------------------------------------------------


def specification(data: Data) -> tuple[pd.DataFrame, str, dict[str, Any]]:
    """Data frame, fixed formula, and random and residual terms."""
    frame = pd.DataFrame(data.table)
    if data.workload.startswith("insteval"):
        return frame, "y ~ service" + (" * dept" if data.workload.endswith("dept") else ""), {"random": ["s", "d"]}
    if data.workload == "million":
        return frame, "y ~ x", {"random": {"subject": Term("subject", design="1 + x")}}
    if data.workload in ("alpha", "trials", "trials24"):
        return frame, "y ~ rep", {"random": ["gen", "rep:block"]}
    if data.workload == "ar1":
        serial = Term("subject", within="time", covariance=AR1Matrix)
        return frame, "y ~ time", {"random": ["subject"], "residual": serial}
    K = Kernel(pd.DataFrame(data.more["K"], index=range(len(data.more["K"]))).rename(index=str, columns=str))
    if data.workload == "kernel":
        return frame, "y ~ x1 + x2", {"random": {"genotype": Term("genotype", relationship=K)}}
    among: dict[str, Any] = {"groups": "genotype", "within": "trait", "covariance": UnstructuredMatrix}
    return frame, "y ~ 0 + trait", {"random": {"g": Term(**among, relationship=K)}, "residual": Term(**among)}
