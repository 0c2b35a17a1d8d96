"""Models for the optimiser, and a loop as a user writes it by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn import REML, AverageInformation
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    FactorAnalyticMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.data import MixedModel, Term
from openreml_nn.objectives import Objective
from openreml_nn.optim import Average, Direction, Geometry
from openreml_nn.solvers import Problem

MODELS: dict[str, Callable[[], MixedModel]] = {
    "dyestuff": lambda: MixedModel("dyestuff", "Yield ~ 1", random=["Batch"]),
    "dyestuff2": lambda: MixedModel("dyestuff2", "Yield ~ 1", random=["Batch"]),
    "john_alpha": lambda: MixedModel("john_alpha", "yield ~ rep", random=["gen", "rep:block"]),
    "sleepstudy": lambda: MixedModel(
        "sleepstudy", "Reaction ~ Days", random={"Subject": Term("Subject", "1 + Days")}
    ),
    "oats": lambda: MixedModel("oats", "yield ~ nitro", random={"Block": Term("Block", "0 + Variety")}),
    "cake": lambda: MixedModel("cake", "angle ~ recipe * temp", random={"rep": Term("replicate", "0 + recipe")}),
    "orthodont": lambda: MixedModel(
        "orthodont", "distance ~ age + Sex",
        residual=Term("Subject", within="age", covariance=UnstructuredMatrix),
    ),
    "fa1": lambda: MixedModel(
        "fa1", "y ~ env",
        random={"gen": Term("gen", within="env", covariance=FactorAnalyticMatrix)},
        residual=Term(design="0 + env"),
    ),
}  # fmt: skip


def serial_with_intercept() -> tuple[Matrix, Tensor, Tensor]:
    """20 subjects, 6 times each: random intercept and AR(1) residual."""
    g = np.random.default_rng(5)
    subject = np.repeat(np.arange(20), 6)
    noise = g.normal(size=(20, 6))
    for t in range(1, 6):
        noise[:, t] = 0.6 * noise[:, t - 1] + 0.8 * noise[:, t]
    y = torch.tensor(2.0 + g.normal(size=20)[subject] + noise.ravel())
    cells = KhatriRaoMatrix(np.tile(np.eye(6), (20, 1)), DummyMatrix(subject))
    V = Sum(
        subject=CovariancePropagation(DummyMatrix(subject), ScalarMatrix(20)),
        residual=CovariancePropagation(cells, KroneckerProduct(AR1Matrix(6), IdentityMatrix(20))),
    )
    return V, y, torch.ones(120, 1, dtype=torch.float64)


def _problem_of(name: str) -> tuple[Matrix, Tensor, Tensor]:
    if name == "serial":
        return serial_with_intercept()
    model = MODELS[name]()
    return model.V, model.y, model.X


class Loop:
    """A loop as a user writes it by hand."""

    def __init__(self, V: Matrix, y: Tensor, X: Tensor, direction: Direction | None = None, **options: Any) -> None:
        self.objective: Objective = REML(V, "dense")
        self.problem: Problem = self.objective.prepare(y, X)
        self.direction = direction or Average()
        self.optimizer = AverageInformation(
            V.theta_parameters(), self.information, geometry=lambda: Geometry.of(V), **options
        )

    def information(self) -> Tensor:
        return self.direction.information(self.objective, self.evaluation)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        self.evaluation = self.problem.evaluate()
        loss = -self.objective.loglik(self.evaluation)
        loss.backward()
        return loss

    def run(self, most: int = 100) -> list[float]:
        """ℓ after each step."""
        path = []
        for _ in range(most):
            path.append(-float(self.optimizer.step(self.closure)))
            if self.optimizer.progress.done:
                break
        return path


@pytest.fixture
def problem_of() -> Callable[[str], tuple[Matrix, Tensor, Tensor]]:
    """V, y and X of a model by name."""
    return _problem_of


@pytest.fixture
def make_loop() -> type[Loop]:
    """The loop, to be made for V, y and X."""
    return Loop
