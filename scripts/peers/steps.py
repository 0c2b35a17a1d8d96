"""Seconds of one average-information step on a dense V: this project's, torch-openreml's, and Cholesky + inverse.

A step of ours is an evaluation with its gradient and the average information, from V's parameters on; that of
torch-openreml is its `ai_step`. Each repetition is at other parameters, so that nothing that was kept can serve again.
"""

from importlib import import_module
from typing import Any

import numpy as np

from peers.report import Fit
from peers.torch_peers import crossed_terms, openreml
from peers.workloads import Data


def ours(data: Data, threads: int) -> Fit:
    """Likelihood, score and average information of `openreml_nn` with the dense solver."""
    torch = import_module("torch")
    torch.set_num_threads(threads)
    package, covariance = import_module("openreml_nn"), import_module("peers.ours")
    information = import_module("openreml_nn.likelihood").average_information
    names = [name for name in data.table if name != "y"]
    tensors = {name: torch.from_numpy(data.table[name]) for name in names}
    V = covariance.intercepts(names, data, tensors)
    objective = package.REML(V, "dense")
    problem = objective.prepare(torch.from_numpy(data.y), torch.from_numpy(data.X))
    draw = thetas(V.num_params)

    def run() -> Any:
        theta = torch.from_numpy(next(draw)).requires_grad_()
        evaluation = problem.evaluate(theta)
        loss = -objective.loglik(evaluation)
        loss.backward()
        return theta.grad, information(evaluation)

    return Fit(run, lambda result: {"solver": "dense", "note": "one step"})


def torch_openreml(data: Data, threads: int) -> Fit:
    """`MarginalREML.ai_step`."""
    torch, package, C = openreml(threads)
    factors = [column for name, column in data.table.items() if name != "y"]
    y, X = torch.from_numpy(data.y), torch.from_numpy(data.X)
    model = package.MarginalREML(C.Sum(*crossed_terms(C, factors), C.ScalarMatrix(data.n)))
    draw = thetas(len(factors) + 1)
    return Fit(lambda: model.ai_step(y, X, torch.from_numpy(next(draw))), lambda result: {"note": "one step"})


def cholesky(data: Data, threads: int) -> Fit:
    """One Cholesky factor of n × n and the inverse from it: what a step cannot do without."""
    torch = import_module("torch")
    torch.set_num_threads(threads)
    A = torch.randn(data.n, data.n, dtype=torch.float64)
    A = A @ A.mT + data.n * torch.eye(data.n, dtype=torch.float64)
    return Fit(lambda: torch.cholesky_inverse(torch.linalg.cholesky(A)), lambda result: {"note": "no step"})


def thetas(count: int) -> Any:
    """Raw parameters near zero, other ones at each call."""
    rng = np.random.default_rng(9)
    while True:
        yield 0.1 * rng.standard_normal(count)
