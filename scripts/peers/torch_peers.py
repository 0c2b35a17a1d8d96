"""Programs on PyTorch: pyreml and torch-openreml, used as their public documentation shows.

torch-openreml does not import on Python 3.10 and 3.11; it needs an interpreter of 3.12 or later. A first fit of pyreml
is in float32, as its `fit` does by itself, the final one in float64.
"""

from importlib import import_module
from typing import Any

import numpy as np

from peers.report import Fit, lower_triangle
from peers.workloads import Data

LATTICES = ("alpha", "trials", "trials24")

def pyreml(data: Data, threads: int) -> Fit:
    """`MixedModel` of pyreml."""
    package, pandas, torch = (import_module(name) for name in ("pyreml", "pandas", "torch"))
    torch.set_num_threads(threads)
    random_class, residual_class = package.Random, package.Residual
    among = {"left_hand": "full"} if data.workload == "traits" else {}
    if data.workload in LATTICES:
        frame, response, fixed = pandas.DataFrame(data.table), "y", "1 + C(rep)"
    else:
        frame, response, fixed = _wide(data, pandas)

    def random() -> Any:
        if data.workload in LATTICES:
            return [random_class(unit="gen"), random_class(unit="rep_block")]
        labels = frame["genotype"].tolist()
        return random_class(unit="genotype", right_hand="str", covariance=data.more["K"], matrix_index=labels, **among)

    def run() -> Any:
        model = package.MixedModel.from_dataframe(
            data=frame, response=response, fixed=fixed, random=random(), residual=residual_class(**among)
        )
        model.fit()
        return model

    def report(model: Any) -> dict[str, Any]:
        parts = [part.variance["sigma"] for part in model.random] + [model.residual.variance["sigma"]]
        names = ["kernel", "residual"] if data.workload == "kernel" else ["gen", "rep:block", "residual"]
        if data.workload == "traits":
            variances = lower_triangle("g", parts[0]) | lower_triangle("e", parts[1])
        else:
            values = [float(np.asarray(part).ravel()[0]) for part in parts]
            variances = dict(zip(names, values, strict=True))
        losses = model.opti_REML.loss
        note = "" if model.opti_REML.converged else "NOT CONVERGED"
        loglik = -0.5 * float(losses[-1])
        return {"variances": variances, "loglik": loglik, "iterations": len(losses), "note": note}

    return Fit(run, report)


def _wide(data: Data, pandas: Any) -> tuple[Any, Any, str]:
    """Data frame with a row for each genotype, the responses, and the fixed formula."""
    count = len(data.more["K"])
    labels = [f"G{i}" for i in range(count)]
    if data.workload == "kernel":
        columns = {name: data.table[name] for name in ("y", "x1", "x2")}
        return pandas.DataFrame(columns | {"genotype": labels}), "y", "1 + x1 + x2"
    Y = data.y.reshape(-1, count)
    responses = [f"t{i}" for i in range(len(Y))]
    return pandas.DataFrame(dict(zip(responses, Y, strict=True)) | {"genotype": labels}), responses, "1"


def torch_openreml(data: Data, threads: int) -> Fit:
    """`MarginalREML` of torch-openreml from its zero start; building V is part of the fit."""
    torch, package, C = openreml(threads)
    y, X = torch.from_numpy(data.y), torch.from_numpy(data.X)
    K = torch.from_numpy(data.more["K"]) if data.workload == "kernel" else None
    names = ["kernel", "residual"] if K is not None else ["gen", "rep:block", "residual"]

    def run() -> Any:
        if K is not None:
            random = [C.CovariancePropagation(torch.linalg.cholesky(K), C.ScalarMatrix(data.n))]
        else:
            random = crossed_terms(C, [data.table["gen"], data.table["rep_block"]])
        V = C.Sum(*random, C.ScalarMatrix(data.n))
        model = package.MarginalREML(V)
        theta, _, steps = model.optimize(y, X, torch.zeros(len(names)), verbose=0)
        return V, model, theta, steps

    def report(result: Any) -> dict[str, Any]:
        V, model, theta, steps = result
        values = V.build_params(theta).tolist()
        note = "1e-6 on the diagonal of V" + ("" if model.is_converged() else "; NOT CONVERGED")
        return {
            "variances": dict(zip(names, values, strict=True)),
            "loglik": float(model.loglik(y, X, theta)) + data.constant,
            "iterations": int(steps),
            "note": note,
        }

    return Fit(run, report)


def openreml(threads: int) -> tuple[Any, Any, Any]:
    """torch, torch-openreml and its covariance module, in float64."""
    torch, package = import_module("torch"), import_module("torch_openreml")
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float64)
    return torch, package, import_module("torch_openreml.covariance")


def crossed_terms(C: Any, factors: list[np.ndarray]) -> list[Any]:
    """Z Z' σ² for each factor, in torch-openreml's classes."""
    series = import_module("pandas").Series
    sizes = [len(np.unique(factor)) for factor in factors]
    pairs = zip(factors, sizes, strict=True)
    return [C.CovariancePropagation(C.DummyMatrix(series(f.astype(str))), C.ScalarMatrix(q)) for f, q in pairs]
