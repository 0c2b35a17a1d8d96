"""Every quantity of an evaluation, by any solver, and their comparison with the dense one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openreml_nn import REML
from openreml_nn.covariance import Matrix
from openreml_nn.likelihood import average_information, beta, beta_cov, blup, predict, prediction_error_variance
from openreml_nn.objectives import Objective
from openreml_nn.solvers import Solver, random_terms


def all_quantities(
    V: Matrix, theta: Tensor, y: Tensor, X: Tensor, solver: str | Solver, objective: type[Objective] = REML
) -> dict[str, Tensor]:
    """ℓ, its derivatives, estimates, products with random columns and predictions, by name."""
    theta = theta.clone().requires_grad_()
    model = objective(V, solver)
    evaluation = model.prepare(y, X).evaluate(theta)
    loglik = model.loglik(evaluation)
    loglik.backward()
    assert theta.grad is not None
    rhs = torch.randn(len(y), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    found = {
        "loglik": loglik.detach(), "score": theta.grad, "AI": average_information(evaluation),
        "beta": beta(evaluation), "beta_cov": beta_cov(evaluation),
        "gamma": evaluation.gamma, "gamma_cov": evaluation.gamma_cov, "Py": evaluation.Py,
        "solve": evaluation.solve(rhs), "project": evaluation.project(rhs), "diagonal": evaluation.inner_diagonal(rhs),
    }  # fmt: skip
    terms = random_terms(V, theta.detach())
    for term in terms:
        found[f"blup {term.name}"] = blup(evaluation, term)
        found[f"pev {term.name}"] = prediction_error_variance(evaluation, term)
    found["prediction"], found["its variance"] = predict(evaluation, X, {term.name: term.Z for term in terms})
    return found


@pytest.fixture(scope="session")
def quantities() -> Callable[..., dict[str, Tensor]]:
    """`all_quantities` of (V, theta, y, X, solver, objective)."""
    return all_quantities


@pytest.fixture(scope="session")
def same_as_dense() -> Callable[..., None]:
    """Assert that all quantities of (V, theta, y, X, solver, objective) are those of the dense solver.

    ``tolerance`` is relative to the largest element, at least 1; ``loose`` gives other ones by name.
    """

    def check(
        V: Matrix, theta: Tensor, y: Tensor, X: Tensor, solver: str | Solver, objective: type[Objective] = REML,
        tolerance: float = 1e-9, loose: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        ours, dense = (all_quantities(V, theta, y, X, s, objective) for s in (solver, "dense"))
        for name, value in dense.items():
            allowed = (loose or {}).get(name, tolerance)
            near = allowed * max(1.0, value.abs().max().item())
            torch.testing.assert_close(ours[name], value, rtol=allowed, atol=near, msg=f"{name} differs")

    return check
