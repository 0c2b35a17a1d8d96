"""The objectives: value against a plain formula, derivatives with respect to θ, y and X, and the module's manners."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from openreml_nn import ML, REML
from openreml_nn.covariance import (
    AR1Matrix,
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DiagonalPropagation,
    DummyMatrix,
    ExponentialMatrix,
    FactorAnalyticMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.objectives import Objective
from openreml_nn.solvers import DenseSolver

N = 10
generator = torch.Generator().manual_seed(7)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


Y, X = normal(N) + 3.0, torch.cat([torch.ones(N, 1, dtype=torch.float64), normal(N, 2)], dim=1)
TWO, FIVE = DummyMatrix([0, 1] * 5), DummyMatrix([i // 2 for i in range(N)])
SLOPES = KhatriRaoMatrix(X[:, :2], FIVE)
ROOT = normal(5, 3)

CASES: dict[str, Callable[[], Matrix]] = {
    "scalar": lambda: ScalarMatrix(N),
    "serial": lambda: AR1Matrix(N),
    "compound": lambda: CompoundSymmetricMatrix(N),
    "crossed": lambda: Sum(
        a=CovariancePropagation(TWO, ScalarMatrix(2)),
        b=CovariancePropagation(FIVE, ScalarMatrix(5)),
        residual=ScalarMatrix(N),
    ),
    "slopes": lambda: Sum(
        s=CovariancePropagation(SLOPES, KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(5))),
        residual=ScalarMatrix(N),
    ),
    "factors": lambda: Sum(g=CovariancePropagation(FIVE, FactorAnalyticMatrix(5)), residual=ScalarMatrix(N)),
    "kernel": lambda: Sum(
        k=CovariancePropagation(FIVE, KnownMatrix(ROOT @ ROOT.mT)),
        residual=DiagonalPropagation(TWO.build(X), DiagonalMatrix(2)),
    ),
    "spatial": lambda: Sum(field=ExponentialMatrix(list(range(N))), nugget=ScalarMatrix(N)),
}
METHODS = (REML, ML)


def theta_of(V: Matrix, seed: int = 1) -> Tensor:
    return 0.5 * torch.randn(V.num_params, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_loglik(method: type[Objective], V: Tensor, y: Tensor, X: Tensor) -> Tensor:
    """ℓ by the formula that textbooks print, without any care for digits."""
    Vi = torch.linalg.inv(V)
    XtViX = X.mT @ Vi @ X
    P = Vi - Vi @ X @ torch.linalg.inv(XtViX) @ X.mT @ Vi
    n, p = X.shape
    twice = torch.logdet(V) + y @ P @ y + (n - p if method is REML else n) * math.log(2.0 * math.pi)
    return -0.5 * (twice + torch.logdet(XtViX) if method is REML else twice)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("solver", ["dense", "auto"])
def test_value(name: str, method: type[Objective], solver: str) -> None:
    V = CASES[name]()
    for seed in range(3):
        theta = theta_of(V, seed)
        got = method(V, solver)(Y, X, theta)
        torch.testing.assert_close(got, -plain_loglik(method, V(theta), Y, X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_derivatives_with_respect_to_theta_y_and_x(name: str, method: type[Objective]) -> None:
    V = CASES[name]()
    objective = method(V, "dense")
    inputs = tuple(x.clone().requires_grad_() for x in (theta_of(V), Y, X))

    def function(theta: Tensor, y: Tensor, X: Tensor) -> Tensor:
        return objective(y, X, theta)

    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["serial", "slopes"])
@pytest.mark.parametrize("method", METHODS)
def test_derivatives_entry_by_entry(name: str, method: type[Objective]) -> None:
    V = CASES[name]()
    objective = method(V, "dense")
    inputs = tuple(x.clone().requires_grad_() for x in (theta_of(V), Y, X))
    assert gradcheck(lambda theta, y, X: objective(y, X, theta), inputs, check_forward_ad=True)
    assert gradgradcheck(lambda theta, y, X: objective(y, X, theta), inputs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("solver", ["dense", "auto"])
def test_score_is_the_trace_formula(name: str, solver: str) -> None:
    """sₖ = −½ [tr(P Vₖ) − y'P Vₖ P y] for REML, with tr(V⁻¹Vₖ) for ML."""
    V = CASES[name]()
    theta = theta_of(V)
    J = torch.func.jacfwd(V.build)(theta).movedim(-1, 0)
    Vi = torch.linalg.inv(V(theta))
    P = Vi - Vi @ X @ torch.linalg.inv(X.mT @ Vi @ X) @ X.mT @ Vi
    Py = P @ Y
    for method, weight in ((REML, P), (ML, Vi)):
        expected = torch.stack([-0.5 * ((weight * D).sum() - Py @ D @ Py) for D in J])
        leaf = theta.clone().requires_grad_()
        (score,) = torch.autograd.grad(-method(V, solver)(Y, X, leaf), leaf)
        torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_torch_func(method: type[Objective]) -> None:
    V = CASES["slopes"]()
    objective, theta = method(V, "dense"), theta_of(V)

    def function(t: Tensor) -> Tensor:
        return objective(Y, X, t)

    def by_formula(t: Tensor) -> Tensor:
        return -plain_loglik(method, V(t), Y, X)

    expected = torch.autograd.functional.hessian(by_formula, theta)
    torch.testing.assert_close(torch.func.hessian(function)(theta), expected)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(function))(theta), expected)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacrev(function))(theta), expected)
    torch.testing.assert_close(torch.autograd.functional.hessian(function, theta), expected)
    several = torch.stack([theta, theta + 0.5, theta - 0.5])
    torch.testing.assert_close(torch.func.vmap(function)(several), torch.stack([function(t) for t in several]))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(function))(several),
        torch.stack([torch.func.grad(function)(t) for t in several]),
    )


@pytest.mark.parametrize("method", METHODS)
def test_ar1_at_its_default_start_has_a_derivative(method: type[Objective]) -> None:
    V = AR1Matrix(N)
    method(V)(Y, X).backward()
    score = torch.cat([p.grad for p in V.theta_parameters()])  # type: ignore[misc]
    expected = torch.autograd.functional.jacobian(
        lambda t: -plain_loglik(method, V(t), Y, X), torch.tensor([0.0, 1e-9], dtype=torch.float64)
    )
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-8)


def test_constants() -> None:
    """By hand: y = (1, 2, 3), V = I, X = 1: y'Py = 2, |X'V⁻¹X| = 3."""
    y, ones = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, 1)
    V = ScalarMatrix(3, start=1.0)
    assert float(REML(V)(y, ones).detach()) == pytest.approx(0.5 * (2 * math.log(2 * math.pi) + math.log(3) + 2))
    assert float(ML(V)(y, ones).detach()) == pytest.approx(0.5 * (3 * math.log(2 * math.pi) + 2))


def test_x_may_be_left_out() -> None:
    V = ScalarMatrix(N)
    assert float(REML(V)(Y).detach()) == float(REML(V)(Y, torch.ones(N, 1)).detach())


def test_backward_twice_and_after_no_grad() -> None:
    V = CASES["crossed"]()
    objective = REML(V)
    with torch.no_grad():
        quiet = float(objective(Y, X))
    loss = objective(Y, X)
    assert float(loss.detach()) == quiet
    loss.backward()
    first = [p.grad.clone() for p in V.theta_parameters() if p.grad is not None]
    objective(Y, X).backward()
    for p, once in zip(V.theta_parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2.0 * once)


def test_data_are_cast_up_never_down() -> None:
    V = ScalarMatrix(N)
    assert REML(V)(Y.float(), X.float()).dtype == torch.float64
    integers = torch.arange(N)
    assert float(REML(V)(integers).detach()) == float(REML(V)(integers.double()).detach())


def test_gradient_of_a_learned_design() -> None:
    """With the last hidden layer as X the objective trains what is before it."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()).double()
    loss = REML(ScalarMatrix(N), "dense")(Y, network(X[:, 1:]))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_module() -> None:
    V = CASES["slopes"]()
    objective = REML(V)
    assert [id(p) for p in objective.parameters()] == [id(p) for p in V.theta_parameters()]
    V.set_theta(theta_of(V))
    value = float(objective(Y, X).detach())
    for other in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert float(other(Y, X).detach()) == value
    fresh = REML(CASES["slopes"]())
    fresh.load_state_dict(objective.state_dict())
    assert float(fresh(Y, X).detach()) == value


def test_solver_by_name_or_object() -> None:
    V = AR1Matrix(N)
    chosen = DenseSolver()
    assert REML(V, chosen).solver is chosen
    assert isinstance(REML(V, "dense").solver, DenseSolver)
    with pytest.raises(ValueError, match="There is no solver 'cholesky'; there are 'auto'"):
        REML(V, "cholesky")


def test_strict_rank() -> None:
    double = torch.cat([X, X[:, :1]], dim=1)
    objective = REML(ScalarMatrix(N))
    assert float(objective(Y, double).detach()) == pytest.approx(float(objective(Y, X).detach()))
    with pytest.raises(ValueError, match=r"columns \[3\]"):
        objective.prepare(Y, double, rank="error")


def test_thetas_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 2 parameters, got 3"):
        REML(AR1Matrix(N))(Y, X, theta=torch.zeros(3, dtype=torch.float64))


def test_thetas_by_name() -> None:
    objective = REML(AR1Matrix(N))
    by_name = objective(Y, X, theta={"sigma^2": torch.tensor([0.25]).double(), "rho": torch.tensor([0.5]).double()})
    assert float(by_name) == float(objective(Y, X, theta=torch.tensor([0.25, 0.5], dtype=torch.float64)))
